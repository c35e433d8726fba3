from __future__ import annotations

import numpy as np

from maisi.generation.masks import without_tumors
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
