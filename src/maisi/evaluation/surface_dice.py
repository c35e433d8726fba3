"""Surface Dice: how much of two structures' surfaces lie within a tolerance of each other. Knows no label, no file.

The normalised surface Dice of Nikolov et al. (arXiv:1809.04430), with the voxels of a mask that have a face neighbour
outside it as its surface and distances between voxel centres in mm, as MONAI counts it, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]


def surface_dice(a: Mask, b: Mask, spacing_mm: Spacing, tolerance_mm: float) -> float | None:
    """Return the share of both surfaces' voxels that have the other surface within `tolerance_mm`.

    Args:
        a: (X, Y, Z).
        b: (X, Y, Z).
        spacing_mm: along X, Y, Z.
        tolerance_mm: 0 or more; the spacing decides what a small one can tell apart.

    Returns:
        0 to 1; None where both are empty, 0 where one is.
    """
    box = _box(a | b)
    if box is None:
        return None
    edges = [_surface(mask[box]) for mask in (a, b)]
    sizes = [int(edge.sum()) for edge in edges]
    if 0 in sizes:
        return 0.0
    near = sum(
        int((_distance(there, spacing_mm)[here] <= tolerance_mm + 1e-6).sum()) for here, there in (edges, edges[::-1])
    )
    return near / sum(sizes)


def _surface(mask: Mask) -> Mask:
    """Voxels of the mask with a face neighbour outside it; beyond the array is outside."""
    inner: Mask = ndimage.binary_erosion(mask)
    return mask & ~inner


def _distance(mask: Mask, spacing_mm: Spacing) -> NDArray[np.float64]:
    return np.asarray(ndimage.distance_transform_edt(~mask, sampling=spacing_mm), dtype=np.float64)


def _box(mask: Mask) -> tuple[Any, ...] | None:
    """The smallest box that holds all of the mask; None where nothing is in it."""
    found = ndimage.find_objects(mask.astype(np.uint8))
    return found[0] if found else None
