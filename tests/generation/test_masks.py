from __future__ import annotations

import numpy as np
import pytest

from maisi.data.label_maps import vocabulary
from maisi.data.phantom import phantom
from maisi.errors import MaisiError
from maisi.generation.masks import read_mask, without_tumors
from maisi.io.nifti import write_volume
from maisi.volume import Volume


def volume(array: np.ndarray) -> Volume:
    return Volume.from_spacing(array, (1, 1, 1))


def test_a_tumor_becomes_the_nearest_of_its_hosts_in_mm() -> None:
    row = np.array([28, 23, 23, 23, 23, 32, 200], np.uint8).reshape(-1, 1, 1)
    assert without_tumors(row, (1, 1, 1)).ravel().tolist() == [28, 28, 28, 32, 32, 32, 200]
    block = np.full((3, 3, 1), 200, np.uint8)
    block[1, 1], block[0, 1], block[1, 0] = 23, 28, 32
    assert without_tumors(block, (1, 5, 1))[1, 1, 0] == 28
    assert without_tumors(block, (5, 1, 1))[1, 1, 0] == 32


def test_a_tumor_without_a_host_becomes_body_and_the_rest_stays() -> None:
    array = np.array([26, 28, 200, 0], np.uint8).reshape(2, 2, 1)
    assert without_tumors(array, (1, 1, 1)).ravel().tolist() == [200, 28, 200, 0]
    assert array[0, 0, 0] == 26


def test_a_file_in_another_vocabulary_is_told_by_its_anatomy(tmp_path) -> None:
    ours = phantom((64, 48, 64), (6.0, 6.0, 6.0), ("chest", "abdomen"), 0)[1]
    to = dict(vocabulary("totalsegmentator").to)
    theirs = np.zeros(256, np.uint8)
    for foreign, own in to.items():
        theirs[own] = foreign
    theirs[0] = 0
    foreign = ours.with_array(theirs[ours.array])
    write_volume(tmp_path / "ours.nii.gz", ours)
    write_volume(tmp_path / "theirs.nii.gz", foreign)
    assert read_mask(tmp_path / "ours.nii.gz").same_grid(ours)
    with pytest.raises(MaisiError, match=r"--from totalsegmentator.* of `maisi mask import`"):
        read_mask(tmp_path / "theirs.nii.gz")
