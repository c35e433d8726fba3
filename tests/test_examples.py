"""The examples run as they stand, with a small model in place of the carried one."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from maisi.io.nifti import read_labels, read_volume, write_volume
from maisi.volume import Volume

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_each_is_short_and_says_what_it_wants(example, name) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 40
    with pytest.raises(SystemExit) as left:
        example(name)
    assert f"python examples/{name}" in str(left.value.code)


def test_generate_chest(example, tmp_path, model_folder) -> None:
    example("generate_chest.py", tmp_path / "out", model_folder)
    assert read_volume(tmp_path / "out" / "image.nii.gz").shape == (48, 32, 32)


def test_generate_from_labels(example, tmp_path, model_folder) -> None:
    example("generate_from_labels.py", tmp_path / "out", model_folder)
    for number in ("0000", "0001"):
        names = {path.name for path in (tmp_path / "out" / number).iterdir()}
        assert names == {"image.nii.gz", "labels.nii.gz", "preview.png", "record.json"}


def test_encode_and_decode(example, tmp_path, model_folder, capsys) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (18, 16, 13)).astype(np.int16)
    write_volume(tmp_path / "ct.nii.gz", Volume.from_spacing(hu, (2, 2, 3)))
    example("encode_and_decode.py", tmp_path / "ct.nii.gz", tmp_path / "back.nii.gz", model_folder)
    assert "(4, 5, 4, 4) numbers" in capsys.readouterr().out
    assert read_volume(tmp_path / "back.nii.gz").shape == (18, 16, 13)


def test_tumor_pairs(example, tmp_path, model_folder) -> None:
    example("tumor_pairs.py", tmp_path / "out", model_folder)
    for number in ("0000", "0001"):
        labels = read_labels(tmp_path / "out" / number / "labels.nii.gz").array
        assert {1, 26} <= set(np.unique(labels))


def test_inpaint_tumors(example, tmp_path, model_folder, capsys) -> None:
    example("inpaint_tumors.py", tmp_path / "out", model_folder)
    assert capsys.readouterr().out.count("diameter_mm") == 3
    assert (read_labels(tmp_path / "out" / "0002" / "labels.nii.gz").array == 23).any()
