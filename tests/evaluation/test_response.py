"""Bodies of known size in place of generated ones; and the small model, which is deaf to the spacing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from maisi.cli import run
from maisi.data.phantom import phantom
from maisi.errors import MaisiError
from maisi.evaluation.response import AS_ASKED, SIZE_UP, SPACING_UP, Ask, asks, look, scale_found, summed_up
from maisi.volume import Volume
from maisi.weights.registry import find_model


def cylinder(width_mm: float, depth_mm: float, size=(48, 40, 24), spacing=(8.0, 8.0, 8.0)) -> Volume:
    """A body of water, an ellipse through all slices."""
    x, y = (
        (np.arange(n) - (n - 1) / 2) * s / (extent / 2)
        for n, s, extent in zip(size, spacing, (width_mm, depth_mm), strict=False)
    )
    section = np.where(x[:, None] ** 2 + y[None] ** 2 <= 1, 40, -1000).astype(np.int16)
    return Volume.from_spacing(np.repeat(section[:, :, None], size[2], axis=2), spacing)


def test_extents_in_millimetres() -> None:
    shown = look(cylinder(280, 200))
    assert shown.fov_mm == (384, 320, 192)
    np.testing.assert_allclose(shown.body_mm, (280, 200, 192), atol=8)
    assert shown.cut == (False, False, True)
    assert shown.lungs_ml == 0
    wide = look(cylinder(600, 200))
    assert wide.cut[0]
    assert wide.body_mm[0] == 384


def test_a_body_that_is_cut_into_is_not_mistaken_for_one_of_that_size() -> None:
    assert scale_found(look(cylinder(600, 500)), look(cylinder(280, 200))) is None
    # only its depth is known, and that is the same
    assert scale_found(look(cylinder(600, 200)), look(cylinder(280, 200))) == pytest.approx(1)


@pytest.mark.parametrize(("grows", "found", "ratio"), [(1.0, 1.5, 1.0), (1.5, 1.0, 1.5)])
def test_a_model_that_listens_to_the_spacing_and_one_that_is_deaf(grows, found, ratio) -> None:
    base = Ask(AS_ASKED, ("chest",), (48, 40, 24), (8.0, 8.0, 8.0))
    changed = Ask(SPACING_UP, ("chest",), (48, 40, 24), (12.0, 12.0, 12.0))
    made = [cylinder(280, 200), cylinder(280 * grows, 200 * grows, spacing=(12.0, 12.0, 12.0))]
    result = summed_up([[base, changed]], [[look(ct) for ct in made]], {})
    assert result.items[1]["scale asked"] == 1.5
    assert result.items[1]["scale found"] == pytest.approx(found, rel=0.06)
    assert result.summary[f"{SPACING_UP}: scale asked / found"] == pytest.approx(ratio, rel=0.06)
    assert result.summary[f"{SIZE_UP}: scale asked / found"] is None
    assert result.summary["largest error of the field of view, mm"] == 0
    assert result.summary["asked regions found"] == 0


@pytest.mark.parametrize(
    ("region", "size"),
    [("head-neck", (40, 40, 34)), ("chest", (64, 48, 32)), ("abdomen", (64, 48, 29)), ("lower-body", (64, 48, 36))],
)
def test_regions_told_by_rules(region, size) -> None:
    found = look(phantom(size, (8, 8, 8), (region,), seed=1)[0]).regions
    assert region in found
    opposite = {"head-neck": "lower-body", "chest": "lower-body", "abdomen": "head-neck", "lower-body": "head-neck"}
    assert opposite[region] not in found


def test_the_asks(model_folder) -> None:
    config = find_model(model_folder).config
    rows = asks(config, ("chest",), (32, 32, 48), (6, 6, 5))
    assert [(ask.size, ask.spacing_mm) for ask in rows[0]] == [
        ((32, 32, 48), (6, 6, 5)),
        ((32, 32, 48), (9, 9, 7.5)),
        ((64, 64, 96), (6, 6, 5)),
    ]
    # its table's views: head-neck and chest, 256 mm and more
    assert [row[0].regions for row in asks(config, spacing_mm=(6, 6, 6))] == [("head-neck",), ("chest",)]
    with pytest.raises(MaisiError, match=r"spacing x 1\.5.*10"):
        asks(config, ("chest",))


def test_the_command(model_folder, tmp_path, capsys) -> None:
    words = ["--model", str(model_folder), "--region", "chest", "--size", "16,16,16", "--spacing", "6,6,6"]
    command = ["evaluate", "response", *words, "--cache", str(tmp_path / "kept"), "--device", "cpu"]
    assert run([*command, "-o", str(tmp_path / "one")]) == 0
    values = json.loads((tmp_path / "one" / "result.json").read_text())
    assert values["summary"]["volumes"] == 3
    assert values["settings"]["weights_sha256"]
    assert [item["size"] for item in values["items"]] == [[16] * 3, [16] * 3, [32] * 3]
    width, height = Image.open(tmp_path / "one" / "figure.png").size
    assert width > height > 200
    kept = sorted(path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*/image.nii.gz"))
    assert len(kept) == 3
    assert run([*command, "-o", str(tmp_path / "two")]) == 0
    assert kept == sorted(path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*/image.nii.gz"))
    assert json.loads((tmp_path / "two" / "result.json").read_text()) == values
    assert run([*command, "-o", str(tmp_path / "two")]) == 2
    assert "exists" in capsys.readouterr().err
    other = shutil.copytree(model_folder, tmp_path / "elsewhere" / model_folder.name)
    settings = json.loads((other / "model.json").read_text())
    (other / "model.json").write_text(json.dumps(settings | {"self_guidance": 1.0}))
    command[command.index(str(model_folder))] = str(other)
    assert run([*command, "-o", str(tmp_path / "three")]) == 0
    assert len(list((tmp_path / "kept").glob("*/image.nii.gz"))) == 6
