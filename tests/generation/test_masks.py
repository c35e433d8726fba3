from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.anatomy import label_id
from maisi.data.label_maps import vocabulary
from maisi.data.phantom import phantom
from maisi.errors import MaisiError
from maisi.generation.masks import bare_cords, read_mask, with_body_about_cords, without_tumors
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


def neck(shape: tuple[int, int, int], spacing: tuple[float, float, float], bare: int, strip_mm: float) -> np.ndarray:
    """A cord through a body, of which the first `bare` slices hold a strip about the cord alone."""
    labels = np.full(shape, 200, np.uint8)
    x, y = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape[:2], spacing[:2], strict=True)), indexing="ij")
    middle = [n // 2 * s for n, s in zip(shape[:2], spacing[:2], strict=True)]
    labels[np.hypot(x - middle[0], y - middle[1]) > strip_mm, :bare] = 0
    labels[shape[0] // 2, shape[1] // 2] = 121
    return labels


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(9, 16), st.integers(9, 16), st.integers(3, 12)),
    st.tuples(*[st.floats(4.5, 9)] * 3),
    st.integers(0, 8),
    st.floats(3, 9),
)
def test_a_cord_in_air_gets_a_spine_and_a_neck(shape, spacing, bare, strip_mm) -> None:
    labels = neck(shape, spacing, bare, strip_mm)
    told = with_body_about_cords(labels, spacing)
    cord = np.argwhere(labels == 121)
    air = [np.argwhere(labels[:, :, z] == 0) - (x, y) for x, y, z in cord]
    near = [(np.linalg.norm(offsets * spacing[:2], axis=1) <= 15).any() for offsets in air]
    cord = cord[near]
    if not len(cord) or not (labels == 200).any():
        assert told is labels
        return
    assert np.array_equal(told[labels != 0], labels[labels != 0])
    for place in np.argwhere(labels == 0):
        far = np.linalg.norm((cord - place) * spacing, axis=1).min()
        # floats may fall on either side of a bound
        if min(abs(far - 15), abs(far - 45)) > 1e-6:
            assert told[tuple(place)] == (label_id("vertebrae C4") if far < 15 else 200 if far < 45 else 0)


def test_bodies_that_reach_far_about_the_cord_stay_as_they_are() -> None:
    whole = phantom((64, 48, 32), (6.0, 6.0, 6.0), ("head-neck",), 0)[1]
    assert (whole.array == 121).any()
    assert bare_cords(whole.array, (6, 6, 6)) is None
    assert with_body_about_cords(whole.array, (6, 6, 6)) is whole.array
    # skin at 20 mm is far, at 12 mm near
    assert bare_cords(neck((31, 31, 4), (2, 2, 2), 2, 20), (2, 2, 2)) is None
    bare = bare_cords(neck((31, 31, 4), (2, 2, 2), 2, 12), (2, 2, 2))
    assert bare is not None
    assert bare.any((0, 1)).tolist() == [True, True, False, False]
    # without a body nothing says that there is air
    labels = neck((31, 31, 4), (2, 2, 2), 2, 0)
    assert bare_cords(np.where(labels == 200, 0, labels), (2, 2, 2)) is None


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
