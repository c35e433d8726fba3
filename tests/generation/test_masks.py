from __future__ import annotations

import numpy as np
import pytest

from maisi.errors import MaisiError
from maisi.generation.masks import checked_mask, ids_of, without_tumors
from maisi.volume import Volume


def volume(array: np.ndarray) -> Volume:
    return Volume.from_spacing(array, (1, 1, 1))


def test_whole_reals_become_labels() -> None:
    mask = checked_mask(volume(np.full((2, 3, 4), 28.0)))
    assert mask.array.dtype == np.uint8
    assert ids_of(mask.array) == {28}


@pytest.mark.parametrize(
    ("values", "word"),
    [([0, 250, 16], "16, 250"), ([-1, 200], "-1"), ([300, 1], "300"), ([0, 0], "empty"), ([0.5, 1], "fractions")],
)
def test_values_without_a_meaning_are_refused(values, word) -> None:
    with pytest.raises(MaisiError, match=word):
        checked_mask(volume(np.array(values).reshape(-1, 1, 1)))


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
