"""How close a reconstructed CT is to its original: PSNR, SSIM, errors in all and by structure, patterns in them.

Knows no network.

All look at HU clipped to the window that the models know, [-1000, 1000]; PSNR and SSIM see it mapped to
[0, 1], so their data range is 1. Sums run over slabs along X, so temporary arrays stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.data.agreement import label_ids
from maisi.data.preprocess import HU_MAX, HU_MIN, window_ct
from maisi.errors import MaisiError

Array = NDArray[Any]
Window = Literal["uniform", "gaussian"]

SSIM_RADIUS = {"uniform": 3, "gaussian": 5}
"""Voxels that the window reaches to each side: 7^3 uniform, 11^3 Gaussian (sigma 1.5 cut at 3.5 sigma)."""

SSIM_K1, SSIM_K2 = 0.01, 0.03
SLAB = 16

BLOCK = 4
"""Voxels of an edge of what the autoencoders turn into one latent; a slab holds whole ones."""

SOFT_HU = (-100.0, 150.0)
GRID_CLIP_HU = 50.0


@dataclass(frozen=True)
class Reconstruction:
    """The measures of one volume, or their means over several.

    Attributes:
        psnr_db: higher is closer; infinite for equal volumes.
        ssim: 1 for equal volumes.
        mae_hu: mean absolute difference in HU.
        bias_hu: mean difference in HU, above 0 where what was made is too bright.
        grid_hu: how strong a pattern repeats with the upsampling, see `grid_hu`; None where there is no soft tissue.
    """

    psnr_db: float
    ssim: float
    mae_hu: float
    bias_hu: float
    grid_hu: float | None


def compare(original_hu: Array, made_hu: Array, window: Window = "uniform") -> Reconstruction:
    """Compare two CTs in HU, of the same shape (X, Y, Z); see the module for what is clipped.

    Raises:
        MaisiError: shapes differ, or an axis is shorter than the SSIM window.
    """
    original, made = window_ct(original_hu), window_ct(made_hu)
    return Reconstruction(
        psnr(original, made),
        ssim(original, made, window),
        mean_absolute_error(original, made) * (HU_MAX - HU_MIN),
        _mean(made, original, np.positive) * (HU_MAX - HU_MIN),
        grid_hu(original_hu, made_hu),
    )


@dataclass(frozen=True)
class StructureError:
    """How far a reconstruction is off inside one structure.

    Attributes:
        voxels: of the structure.
        mae_hu: mean absolute difference in HU.
        bias_hu: mean difference in HU, above 0 where what was made is too bright.
        psnr_db: of its voxels alone, with the whole window as data range; infinite where nothing differs.
    """

    voxels: int
    mae_hu: float
    bias_hu: float
    psnr_db: float


def compare_structures(
    original_hu: Array, made_hu: Array, labels: Array, groups: Mapping[str, Collection[int]]
) -> dict[str, StructureError]:
    """Compare two CTs in HU inside groups of label ids, all (X, Y, Z); groups that the labels lack are left out.

    Raises:
        MaisiError: shapes differ, or a label is not a whole number from 0 to 255.
    """
    _require_same_shape(original_hu, made_hu)
    _require_same_shape(original_hu, labels)
    voxels, signed, absolute, squared = np.zeros((4, 256))
    for start in range(0, len(labels), SLAB):
        slab = slice(start, start + SLAB)
        ids = label_ids(labels[slab]).ravel()
        difference = (window_ct(made_hu[slab]) - window_ct(original_hu[slab])).astype(np.float64).ravel()
        voxels += np.bincount(ids, minlength=256)
        signed += np.bincount(ids, difference, 256)
        absolute += np.bincount(ids, np.abs(difference), 256)
        squared += np.bincount(ids, difference**2, 256)
    found = {}
    for name, members in groups.items():
        chosen = sorted(members)
        count = voxels[chosen].sum()
        if count:
            mae, bias = ((HU_MAX - HU_MIN) * sums[chosen].sum() / count for sums in (absolute, signed))
            mse = squared[chosen].sum() / count
            found[name] = StructureError(int(count), float(mae), float(bias), _decibels(mse, 1.0))
    return found


def mirror_hu(original_hu: Array, made_hu: Array, mirrored_hu: Array) -> float | None:
    """Return the mean absolute difference, in soft tissue, of what is made of a CT and of its mirror image.

    No anatomy says in which direction a voxel should come out otherwise, so a network that knows it has a fault.

    Args:
        original_hu: the CT, (X, Y, Z).
        made_hu: what was made of it.
        mirrored_hu: what was made of the CT mirrored along X, mirrored back; it may lack the last rows along X.

    Returns:
        HU; None without soft tissue.
    """
    total, voxels = 0.0, 0
    for start in range(0, len(mirrored_hu), SLAB):
        rows = slice(start, min(start + SLAB, len(mirrored_hu)))
        soft = (original_hu[rows] >= SOFT_HU[0]) & (original_hu[rows] <= SOFT_HU[1])
        apart = np.abs(window_ct(made_hu[rows]) - window_ct(mirrored_hu[rows]))
        total += float(apart[soft].sum(dtype=np.float64))
        voxels += int(np.count_nonzero(soft))
    return (HU_MAX - HU_MIN) * total / voxels if voxels else None


def grid_hu(original_hu: Array, made_hu: Array) -> float | None:
    """Return how strong a pattern repeats every `BLOCK` voxels in soft tissue, as a decoder's upsampling may leave one.

    It is the standard deviation, over the positions in such a block, of the mean difference at that position, in HU;
    differences beyond `GRID_CLIP_HU` count as that much, since edges differ by more. Chance alone makes it some
    12 HU / sqrt(voxels of soft tissue / 64).

    Args:
        original_hu: (X, Y, Z), where `SOFT_HU` is soft tissue.
        made_hu: the same shape.

    Returns:
        None where soft tissue lacks one of the positions.

    Raises:
        MaisiError: shapes differ.
    """
    _require_same_shape(original_hu, made_hu)
    sums, voxels = np.zeros((2, BLOCK, BLOCK, BLOCK))
    for start in range(0, len(original_hu), SLAB):
        original = original_hu[start : start + SLAB].astype(np.float32)
        difference = np.clip(made_hu[start : start + SLAB] - original, -GRID_CLIP_HU, GRID_CLIP_HU)
        soft = (original >= SOFT_HU[0]) & (original <= SOFT_HU[1])
        for position in np.ndindex(sums.shape):
            every = tuple(slice(first, None, BLOCK) for first in position)
            sums[position] += difference[every][soft[every]].sum(dtype=np.float64)
            voxels[position] += np.count_nonzero(soft[every])
    return float((sums / voxels).std()) if voxels.all() else None


def psnr(original: Array, made: Array, data_range: float = 1.0) -> float:
    """Return the peak signal-to-noise ratio in dB: 10 log10(data_range^2 / mean squared error)."""
    return _decibels(_mean(original, made, np.square), data_range)


def _decibels(squared_error: float, data_range: float) -> float:
    return float("inf") if squared_error == 0 else float(10 * np.log10(data_range**2 / squared_error))


def mean_absolute_error(original: Array, made: Array) -> float:
    """Return the mean absolute difference, in the unit of the arrays."""
    return _mean(original, made, np.abs)


def ssim(original: Array, made: Array, window: Window = "uniform", data_range: float = 1.0) -> float:
    """Return the mean structural similarity of two 3D arrays (Wang et al. 2004), K1 = 0.01, K2 = 0.03.

    The mean is taken where the window lies inside the volume, so no padding rule matters.

    Args:
        original: (X, Y, Z), any real type.
        made: the same shape.
        window: 'uniform' weighs 7^3 voxels alike and divides (co)variances by N - 1; 'gaussian' weighs with
            sigma 1.5 voxels out to 5 voxels and divides by N, as the 2004 paper does in 2D.
        data_range: of the values.

    Raises:
        MaisiError: shapes differ, or an axis is shorter than the window.
    """
    return similarity(original, made, window, data_range)[0]


def similarity(original: Array, made: Array, window: Window, data_range: float = 1.0) -> tuple[float, float]:
    """Return the mean of SSIM, as `ssim`, and that of its factor for contrast and structure alone."""
    _require_same_shape(original, made)
    radius = SSIM_RADIUS[window]
    if min(original.shape) < 2 * radius + 1:
        raise MaisiError(
            f"SSIM needs {2 * radius + 1} voxels along each axis, this volume has {original.shape}; "
            "compare a larger one."
        )
    whole = structure = 0.0
    for start in range(radius, original.shape[0] - radius, SLAB):
        block = slice(start - radius, min(start + SLAB, original.shape[0] - radius) + radius)
        values, contrast = _similarity(original[block], made[block], window, data_range)
        whole += float(values.sum())
        structure += float(contrast.sum())
    count = float(np.prod([n - 2 * radius for n in original.shape]))
    return whole / count, structure / count


def _similarity(a: Array, b: Array, window: Window, data_range: float) -> tuple[Array, Array]:
    """SSIM and its contrast-structure factor at each voxel whose window lies inside the block."""
    radius = SSIM_RADIUS[window]
    smooth = _smoother(window)
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    count = (2 * radius + 1) ** 3
    correction = count / (count - 1) if window == "uniform" else 1.0
    var_x = correction * (smooth(x * x) - mean_x**2)
    var_y = correction * (smooth(y * y) - mean_y**2)
    covariance = correction * (smooth(x * y) - mean_x * mean_y)
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    structure: Array = (2 * covariance + c2) / (var_x + var_y + c2)
    values: Array = structure * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    inside = (slice(radius, -radius),) * 3
    return values[inside], structure[inside]


def _smoother(window: Window) -> Callable[[Array], Array]:
    if window == "uniform":
        return partial(ndimage.uniform_filter, size=2 * SSIM_RADIUS[window] + 1)
    return partial(ndimage.gaussian_filter, sigma=1.5, radius=SSIM_RADIUS[window])


def _mean(a: Array, b: Array, of: Callable[[Array], Array]) -> float:
    """Mean of a function of the difference, summed in float64."""
    _require_same_shape(a, b)
    return sum(float(of(difference).sum()) for difference in _differences(a, b)) / a.size


def _differences(a: Array, b: Array) -> Iterator[Array]:
    for start in range(0, a.shape[0], SLAB):
        slab = slice(start, start + SLAB)
        yield a[slab].astype(np.float64) - b[slab].astype(np.float64)


def _require_same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape or a.ndim != 3:
        raise MaisiError(f"Volumes of shapes {a.shape} and {b.shape} can't be compared; bring them to one grid.")
