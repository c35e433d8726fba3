"""Multi-scale structural similarity of 3D arrays (Wang, Simoncelli and Bovik 2003), for how alike volumes of a set are.

Knows no file and no network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.errors import MaisiError
from maisi.evaluation.reconstruction import SSIM_RADIUS, Window, similarity

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales, finest first."""


def scales_for(shape: tuple[int, ...], window: Window = "gaussian") -> int:
    """How many scales, at most five, leave a whole window on each axis; 0 for axes too short for one."""
    widest = 2 * SSIM_RADIUS[window] + 1
    return sum(min(shape) // 2**scale >= widest for scale in range(len(WEIGHTS)))


def ms_ssim(a: NDArray[Any], b: NDArray[Any], window: Window = "gaussian", data_range: float = 1.0) -> float:
    """Return the similarity of two arrays (X, Y, Z): 1 for equal ones.

    Small volumes have fewer scales (`scales_for`); the weights that are left are made to add up to 1.

    Args:
        a: any real type.
        b: the same shape.
        window: as in `reconstruction.ssim`.
        data_range: of the values.

    Raises:
        MaisiError: shapes differ, or an axis is shorter than the window.
    """
    scales = scales_for(a.shape, window)
    if not scales:
        wanted = 2 * SSIM_RADIUS[window] + 1
        raise MaisiError(f"MS-SSIM needs {wanted} voxels along each axis, not {a.shape}; compare larger volumes.")
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    factors = []
    for scale in range(scales):
        whole, structure = similarity(a, b, window, data_range)
        factors.append(max(0.0, whole if scale == scales - 1 else structure))
        a, b = _halved(a), _halved(b)
    return float(np.prod(np.array(factors) ** weights))


def _halved(array: NDArray[Any]) -> NDArray[np.float32]:
    """Means of blocks of 2^3; an odd last voxel is left out."""
    x, y, z = (n // 2 for n in array.shape)
    blocks = array[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2)
    means: NDArray[np.float32] = blocks.mean(axis=(1, 3, 5), dtype=np.float32)
    return means
