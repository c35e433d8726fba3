import json
import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytest

import maisi
from maisi.io.record import versions, write_record
from maisi.request import Request, item_seed


def test_record_says_what_made_the_item(tmp_path):
    request = Request.parse(region="chest", size="8,8,8", spacing="1,1,1", seed=4, mask=Path("a.nii.gz"))
    write_record(
        tmp_path / "record.json",
        request,
        item=2,
        seed=item_seed(4, 2),
        weights_sha256={"unet.safetensors": "ab"},
        timings_s={"denoise": 1.23456},
        peak_memory_bytes=1000,
        details={"solver": "euler"},
    )
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["synthetic"] is True
    assert Request.parse(**record["request"]) == request
    assert (record["item"], record["seed"]) == (2, item_seed(4, 2))
    assert record["weights_sha256"] == {"unet.safetensors": "ab"}
    assert record["timings_s"] == {"denoise": 1.235}
    assert record["peak_memory_bytes"] == 1000
    assert record["solver"] == "euler"
    assert datetime.fromisoformat(record["created"]).tzinfo is not None


def test_details_hide_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"details repeat \['synthetic'\]"):
        write_record(
            tmp_path / "record.json",
            Request(),
            item=0,
            seed=0,
            weights_sha256={},
            timings_s={},
            details={"synthetic": False},
        )
    assert list(tmp_path.iterdir()) == []


def test_versions():
    assert versions() == {
        "maisi": maisi.__version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }
