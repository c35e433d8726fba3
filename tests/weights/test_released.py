import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from maisi.errors import MaisiError
from maisi.weights.released import read_released

CONTAINERS = ["unet_state_dict", "controlnet_state_dict"]
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("container", [None, *CONTAINERS])
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_and_contained_state_dicts(tmp_path: Path, container: str | None, zipped: bool):
    content = STATE if container is None else {container: STATE, "epoch": 3, "loss": 0.25}
    path = saved(tmp_path / "a.pt", content, _use_new_zipfile_serialization=zipped)
    released = read_released(path, CONTAINERS)
    assert released.scale_factor is None
    assert all(torch.equal(released.state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("scale", [1.25, torch.tensor(1.25), torch.tensor([1.25]), 1])
def test_scale_factor_in_any_form(tmp_path: Path, scale: Any):
    path = saved(tmp_path / "a.pt", {"unet_state_dict": STATE, "scale_factor": scale})
    assert read_released(path, CONTAINERS).scale_factor == float(scale)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "1.0x", None, torch.ones(2)])
def test_scale_factor_that_is_no_positive_number(tmp_path: Path, scale: Any):
    path = saved(tmp_path / "a.pt", {"unet_state_dict": STATE, "scale_factor": scale})
    with pytest.raises(MaisiError, match="scale_factor"):
        read_released(path, CONTAINERS)


def test_metatensor_is_read_without_monai(tmp_path: Path):
    """In a process of its own: MONAI, once imported, tells torch to trust its classes."""
    import numpy as np
    from monai.data import MetaTensor

    z = MetaTensor(torch.arange(4.0), meta={"spatial_shape": np.array([4, 4, 4]), "space": "RAS", "name": "x"})
    saved(tmp_path / "a.pt", {"unet_state_dict": STATE, "scale_factor": 1 / torch.std(z), "loss": np.float64(0.5)})
    code = (
        "import sys, pathlib; from maisi.weights.released import read_released; "
        f"f = read_released(pathlib.Path(sys.argv[1]), {CONTAINERS}); "
        "assert 'monai' not in sys.modules; print(f.scale_factor, type(f.state['a.bias']).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.pt")], capture_output=True, text=True, check=True
    )
    scale, kind = run.stdout.split()
    assert float(scale) == pytest.approx(1 / float(torch.arange(4.0).std()))
    assert kind == "Tensor"


class Harmful:
    """What a hostile file would hold: unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(tmp_path: Path, zipped: bool):
    marker = tmp_path / "was_here"
    content = {"unet_state_dict": STATE, "loss": Harmful(marker)}
    path = saved(tmp_path / "a.pt", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(MaisiError, match="more than plain tensors"):
        read_released(path, CONTAINERS)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Harmful(marker)))
    with pytest.raises(MaisiError, match="more than plain tensors"):
        read_released(tmp_path / "b.pt", CONTAINERS)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
        (torch.ones(2), "no state dict"),
        ({"unet_state_dict": 3}, "no state dict"),
        ({"a": torch.ones(2), "epoch": 3}, "'epoch' is not a tensor"),
        ({1: torch.ones(2)}, "'1' is not a tensor"),
        ({"a": torch.ones(2, dtype=torch.int32)}, "'a' is not a tensor of weights"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, match: str):
    with pytest.raises(MaisiError, match=match):
        read_released(saved(tmp_path / "a.pt", content), CONTAINERS)


def test_truncated_foreign_and_missing_files(tmp_path: Path):
    whole = saved(tmp_path / "a.pt", STATE).read_bytes()
    for name, data in {"cut": whole[:-40], "half": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MaisiError, match="damaged or holds more"):
            read_released(tmp_path / name, CONTAINERS)
    with pytest.raises(MaisiError, match="No such file"):
        read_released(tmp_path / "nothing.pt", CONTAINERS)
    with pytest.raises(MaisiError, match="Cannot read"):
        read_released(tmp_path, CONTAINERS)
