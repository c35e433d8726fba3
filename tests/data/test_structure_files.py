"""Folders of binary masks, as TotalSegmentator leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maisi.cli import run
from maisi.data.phantom import phantom
from maisi.data.structure_files import read_structure_files, structure_files
from maisi.errors import MaisiError
from maisi.io.nifti import read_labels, write_volume
from maisi.volume import Volume

OURS = {"liver": 1, "spleen": 3, "kidney_right": 5, "kidney_left": 14, "aorta": 6}


@pytest.fixture(scope="module")
def truth() -> tuple[Volume, Volume]:
    return phantom((64, 52, 44), (6.0, 6.0, 7.0), ("abdomen",), seed=1)


@pytest.fixture
def folder(truth: tuple[Volume, Volume], tmp_path: Path) -> Path:
    """One file a class; most of a real folder's are empty."""
    made = tmp_path / "segmentations"
    made.mkdir()
    for name, id in OURS.items():
        write_volume(made / f"{name}.nii.gz", truth[1].with_array((truth[1].array == id).astype(np.uint8)))
    for name in ("brain", "gallbladder", "femur_left"):
        write_volume(made / f"{name}.nii.gz", truth[1].with_array(np.zeros(truth[1].shape, np.uint8)))
    return made


def test_a_folder_of_binary_masks_is_imported_by_the_names_of_its_files(
    folder: Path, truth: tuple[Volume, Volume], tmp_path: Path
) -> None:
    write_volume(tmp_path / "ct.nii.gz", truth[0])
    words = ["--from", "totalsegmentator", "--ct", str(tmp_path / "ct.nii.gz"), "-o", str(tmp_path / "mask.nii.gz")]
    assert run(["mask", "import", str(folder), *words]) == 0
    mask = read_labels(tmp_path / "mask.nii.gz").array
    for id in OURS.values():
        assert ((mask == id) == (truth[1].array == id)).all()
    assert set(np.unique(mask)) == {0, 200, *OURS.values()}


@pytest.mark.parametrize("words", ["totalsegmentator", "vista3d", "maisi"])
def test_a_single_binary_mask_is_what_its_name_says(folder: Path, tmp_path: Path, words: str) -> None:
    name = "kidney_left" if words == "totalsegmentator" else "left kidney"
    (folder / "kidney_left.nii.gz").rename(folder / f"{name}.nii.gz")
    made = tmp_path / "mask.nii.gz"
    assert run(["mask", "import", str(folder / f"{name}.nii.gz"), "--from", words, "-o", str(made)]) == 0
    assert set(np.unique(read_labels(made).array)) == {0, 14, 200}


def test_a_label_map_is_no_folder_of_structures(folder: Path, truth: tuple[Volume, Volume], tmp_path: Path) -> None:
    write_volume(tmp_path / "liver.nii.gz", truth[1])  # called as a class, but with many ids
    write_volume(tmp_path / "seg.nii.gz", truth[1].with_array((truth[1].array == 1).astype(np.uint8)))
    for name in ("liver", "seg"):
        assert structure_files(tmp_path / f"{name}.nii.gz", "totalsegmentator") == []
    assert len(structure_files(folder, "totalsegmentator")) == 8


def test_what_cannot_be_one_map_is_told(folder: Path, truth: tuple[Volume, Volume], tmp_path: Path, capsys) -> None:
    empty = [*sorted(folder.glob("[bf]*")), folder / "gallbladder.nii.gz"]
    with pytest.raises(MaisiError, match="Nothing is drawn in any of 3 files"):
        read_structure_files(empty)
    shifted = Volume(np.ones(truth[1].shape, np.uint8), truth[1].affine + np.array([[0, 0, 0, 5.0]] + [[0.0] * 4] * 3))
    write_volume(folder / "stomach.nii.gz", shifted)
    with pytest.raises(MaisiError, match=r"stomach.nii.gz \(.*\) lies on another grid than"):
        read_structure_files(structure_files(folder, "totalsegmentator"))
    (folder / "stomach.nii.gz").unlink()
    write_volume(folder / "my_lesion.nii.gz", truth[1].with_array((truth[1].array == 4).astype(np.uint8)))
    words = ["mask", "import", str(folder), "--from", "totalsegmentator", "-o", str(tmp_path / "mask.nii.gz")]
    assert run(words) == 2
    assert "'my_lesion'" in capsys.readouterr().err
    write_volume(folder / "pancreas.nii.gz", truth[1])
    with pytest.raises(MaisiError, match=r"pancreas.nii.gz holds more than one structure"):
        read_structure_files(structure_files(folder, "totalsegmentator"))
    (folder / "pancreas.nii.gz").unlink()
    table = tmp_path / "table.json"
    table.write_text(
        '{"liver": "liver", "my_lesion": "hepatic tumor", "dropped": {"spleen": "not asked for", '
        '"kidney_left": "so", "kidney_right": "so", "aorta": "so"}}'
    )
    words[4] = str(table)
    assert run(words) == 0
    assert set(np.unique(read_labels(tmp_path / "mask.nii.gz").array)) == {0, 1, 26, 200}
