from __future__ import annotations

import numpy as np

from maisi.data.regions import ids_in, regions_of


def test_ids_of_any_integer_array() -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0, 0, 0], labels[1, 1, 1] = 200, 5
    assert ids_in(labels) == ids_in(labels.astype(np.int32)) == (5, 200)


def test_regions_have_no_gap() -> None:
    labels = np.array([[[22, 1]]], np.uint8)
    assert regions_of(labels) == ("head-neck", "chest", "abdomen")


def test_a_stray_voxel_makes_no_region_where_volumes_are_known() -> None:
    labels = np.full((10, 10, 10), 28, np.uint8)
    labels[0, 0, 0] = 1
    assert regions_of(labels) == ("chest", "abdomen")
    assert regions_of(labels, spacing_mm=(3, 3, 3)) == ("chest",)


def test_no_markers_no_regions() -> None:
    assert regions_of(np.full((3, 3, 3), 200, np.uint8)) == ()
