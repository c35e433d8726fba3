"""`maisi generate` with wishes for anatomy, and `maisi inpaint`: what is written, gone on with, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from maisi import cli
from maisi.data.phantom import phantom
from maisi.io.nifti import read_label_names, read_labels, read_volume, write_volume

FAST = ("--device", "cpu", "--precision", "fp32", "--steps", "1", "--retries", "0")


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scan")
    image, labels = phantom((56, 48, 32), (6.0, 6.0, 7.0), ("abdomen",), 1)
    write_volume(folder / "ct.nii.gz", image, synthetic=False)
    write_volume(folder / "labels.nii.gz", labels, synthetic=False)
    write_volume(folder / "offset.nii.gz", image.with_array(image.array + np.int16(1024)), synthetic=False)
    other = phantom((40, 48, 32), (6.0, 6.0, 7.0), ("abdomen",), 1)[1]
    write_volume(folder / "other.nii.gz", other, synthetic=False)
    return folder


def inpaint(model_folder: Path, scan: Path, out: Path, *more: str) -> int:
    files = [str(scan / "ct.nii.gz"), "--labels", str(scan / "labels.nii.gz")]
    return cli.run(["inpaint", *files, "--model", str(model_folder), *FAST, "-o", str(out), *more])


def test_inpaint_writes_items_and_goes_on(model_folder, scan, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert inpaint(model_folder, scan, out, "--tumor", "liver:40mm", "-n", "2") == 0
    record = json.loads((out / "0001" / "record.json").read_text())
    assert (record["synthetic"], record["painted"]) == (False, True)
    assert record["tumors"][0]["kind"] == "liver"
    assert record["painted_by"] == "network"
    names = {path.name for path in (out / "0001").iterdir()}
    assert names == {"image.nii.gz", "labels.nii.gz", "preview.png", "record.json"}
    before = read_volume(scan / "ct.nii.gz")
    after = read_volume(out / "0001" / "image.nii.gz")
    assert after.same_grid(before)
    labels = read_labels(out / "0001" / "labels.nii.gz").array
    assert (labels == 26).any()
    assert 0 < (after.array != before.array).sum() < 0.2 * after.array.size
    (out / "0000" / "preview.png").unlink()
    bytes_before = (out / "0000" / "image.nii.gz").read_bytes()
    assert inpaint(model_folder, scan, out, "--tumor", "liver:40mm", "-n", "2") == 0
    assert (out / "0000" / "image.nii.gz").read_bytes() == bytes_before
    assert "2 of them from before" in capsys.readouterr().out
    assert inpaint(model_folder, scan, out, "--tumor", "liver:30mm", "-n", "2") == 2


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ((), "No tumour is asked for"),
        (("--tumor", "livr:20mm"), "did you mean 'liver'"),
        (("--tumor", "liver:180mm"), "ask for at most"),
        (("--tumor", "lung:20mm", "--labels", "other.nii.gz"), "different grids"),
        (("--tumor", "none"), "no tumour to remove"),
        (("--tumor", "liver:20mm", "--by", "magic"), "'network' or 'rules'"),
        (("--tumor", "liver:20mm", "--first", "-1"), "numbered from 0"),
    ],
)
def test_what_cannot_be_painted_is_refused(model_folder, scan, tmp_path, capsys, more, sentence) -> None:
    words = [str(scan / word) if word.endswith(".nii.gz") else word for word in more]
    assert inpaint(model_folder, scan, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_values_that_are_no_hu_are_told(model_folder, scan, tmp_path, capsys) -> None:
    files = [str(scan / "offset.nii.gz"), "--labels", str(scan / "labels.nii.gz"), "--tumor", "liver:30mm"]
    assert cli.run(["inpaint", *files, "--by", "rules", "-o", str(tmp_path / "out")]) == 2
    assert "offset by 1024; subtract that" in capsys.readouterr().err


def test_generate_finds_what_is_asked_for_and_keeps_what_is_wanted(model_folder, tmp_path) -> None:
    grid = ("--region", "abdomen", "--size", "48,40,24", "--spacing", "8,8,9")
    wishes = ("--structure", "liver", "--tumor", "liver:40mm", "--keep", "liver,hepatic tumor")
    assert cli.run(["generate", "--model", str(model_folder), *FAST, *grid, *wishes, "-o", str(tmp_path / "out")]) == 0
    labels = read_labels(tmp_path / "out" / "0000" / "labels.nii.gz")
    assert set(np.unique(labels.array)) == {0, 1, 26}
    assert read_label_names(tmp_path / "out" / "0000" / "labels.nii.gz") == {1: "liver", 26: "hepatic tumor"}
    record = json.loads((tmp_path / "out" / "0000" / "record.json").read_text())
    assert record["tumors"][0]["diameter_mm"] == pytest.approx(40, rel=0.1)
    assert "hantom" in record["mask_source"]
    assert record["quality"]["attempts"] == 1
