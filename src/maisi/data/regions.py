"""Which body regions a volume covers, told from its labels. The rule itself is `anatomy.regions_present`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import regions_present
from maisi.data import label_maps

MIN_VOLUME_ML = 1.0
"""A marker organ counts from this volume on: a stray voxel of "liver" makes no abdomen."""


def ids_in(labels: NDArray[Any]) -> tuple[int, ...]:
    """Return the ids that a label array of any shape holds, ascending, without 0."""
    return tuple(id for id in label_maps.ids_in(labels) if id)


def regions_of(
    labels: NDArray[Any], spacing_mm: tuple[float, float, float] | None = None, min_volume_ml: float = MIN_VOLUME_ML
) -> tuple[str, ...]:
    """Return the regions that a label map covers, from top to bottom, without a gap; () where nothing tells.

    Args:
        labels: maisi's ids, (X, Y, Z).
        spacing_mm: with it, labels of less than `min_volume_ml` don't count; without it, all do.
        min_volume_ml: see above.
    """
    if spacing_mm is None:
        return regions_present(ids_in(labels))
    ids, counts = np.unique(labels, return_counts=True)
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    return regions_present(int(id) for id, count in zip(ids, counts, strict=True) if count * voxel_ml >= min_volume_ml)
