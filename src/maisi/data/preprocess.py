"""Intensities and grids: HU window, MR percentiles, resampling, cropping, padding. Knows no file, no network.

Convention of resampling: a voxel is a box, and its centre is where the affine says. A grid of another spacing
keeps the *physical extent* (edges of the boxes), so the centre of the volume stays where it was; the first
voxel's centre moves by half the change of the spacing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from maisi.errors import MaisiError
from maisi.volume import Volume

Array = NDArray[Any]
Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]

HU_MIN, HU_MAX = -1000.0, 1000.0
STORED_HU = (-1024, 3071)
"""Range of a CT's 12 bits; metal beyond it is clipped."""

MR_PERCENTILES = (0.0, 99.5)
LARGEST_SIZE = 4096  # voxels per axis that resampling will make
OFFSET_HU = 1024  # what scanners add to HU to store them unsigned
MANY_VOXELS = 1_000_000
TISSUE_SHARE = 0.1  # of the values, which soft tissue has at least and dense bone has not
AIR_BELOW_HU = -200.0  # what is lower is air or lung
BELOW_AIR_HU = -1100  # noise in air does not go below
PADDING_SHARE = 0.01  # of one lowest value, from which on it is padding


def window_ct(hu: Array) -> NDArray[np.float32]:
    """Clip HU to [-1000, 1000] and map linearly to [0, 1], float32; any shape."""
    scaled: NDArray[np.float32] = np.clip(hu, HU_MIN, HU_MAX).astype(np.float32)
    np.subtract(scaled, HU_MIN, out=scaled)
    np.divide(scaled, HU_MAX - HU_MIN, out=scaled)
    return scaled


def unwindow_ct(values: Array) -> NDArray[np.int16]:
    """Map [0, 1] back to int16 HU in [-1000, 1000], rounded; values outside [0, 1] are clipped."""
    hu = np.clip(values, 0.0, 1.0) * (HU_MAX - HU_MIN) + HU_MIN
    return np.rint(hu).astype(np.int16)


def window_mr(values: Array) -> NDArray[np.float32]:
    """Map the 0 and 99.5 percentile of an MR image linearly to 0 and 1, float32; not clipped.

    Raises:
        MaisiError: the image has no contrast at all (both percentiles are the same).
    """
    low, high = np.percentile(values, MR_PERCENTILES)
    if not high > low:
        raise MaisiError(f"The image has the value {low:g} nearly everywhere; give an MR image with contrast.")
    scaled: NDArray[np.float32] = ((values - low) / (high - low)).astype(np.float32)
    return scaled


def padding_of(array: Array) -> NDArray[np.bool_] | None:
    """Voxels of a CT that pad it around its scan: one lowest value that scanners do not measure; None without such."""
    low = array.min()
    if low >= STORED_HU[0]:
        return None
    padding: NDArray[np.bool_] = array == low
    return padding if float(padding.mean()) >= PADDING_SHARE else None


def without_padding(ct: Volume) -> Volume:
    """The same, nothing lower than what scanners measure, so that the value of padding does not matter."""
    return ct.with_array(np.maximum(ct.array, STORED_HU[0])) if ct.array.min() < STORED_HU[0] else ct


def hu_fault(array: Array) -> str | None:
    """Say why the values of a CT can't be HU, and the mend; None where they can. Of large ones looks at every fourth.

    HU have air below -200, or else some values below 0 and soft tissue about it. Padding, whatever its value, says
    nothing.
    """
    step = 4 if array.size > MANY_VOXELS else 1
    return fault_of_values(array[::step, ::step, ::step])


def fault_of_values(values: Array) -> str | None:
    """As `hu_fault`, of all of some values."""
    lowest = values.min()
    if lowest <= STORED_HU[0]:
        values = values[(values > lowest) & (values >= BELOW_AIR_HU)]
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    if low >= -5 and high <= 5:
        return f"its values run from {low:g} to {high:g}, so they were scaled; give the CT before that"
    if low >= 0 and high <= 255:
        return f"its values run from {low:g} to {high:g}, which are grey values; give the CT before that"
    if float(np.percentile(values, 0.5)) < AIR_BELOW_HU or high - low < 50:
        return None  # there is air, or nothing to tell by
    positive = low >= -5  # to rounding: in HU some noise, fat or air is not
    tissue = (values > OFFSET_HU - 124) & (values < OFFSET_HU + 176)
    seen = values > low + 200  # not the air around
    if tissue.mean() >= TISSUE_SHARE or (positive and tissue[seen].size and tissue[seen].mean() >= TISSUE_SHARE):
        return f"soft tissue has about {OFFSET_HU}, so all values are offset by {OFFSET_HU}; subtract that"
    if positive and float((values > 300).mean()) >= TISSUE_SHARE:
        return f"none of its values is below {low:g}, and many are above 300; give a CT in HU (MR has none)"
    return None


def robust_deviation(values: Array) -> float:
    """Return 1.4826 times the median distance from the median: the standard deviation, if values are normal."""
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def wider_box(box: Sequence[slice], shape: Sequence[int], margin_mm: float, spacing_mm: Spacing) -> tuple[slice, ...]:
    """A box, larger on each side by the voxels that a margin takes, within an array of `shape`."""
    more = [math.ceil(margin_mm / s) for s in spacing_mm]
    return tuple(slice(max(0, b.start - m), min(n, b.stop + m)) for b, m, n in zip(box, more, shape, strict=True))


def resample(volume: Volume, spacing_mm: Spacing | None = None, order: int = 1, size: Triple | None = None) -> Volume:
    """Bring a volume to another spacing, or another size, or both; its axes keep their directions.

    Args:
        volume: any orientation.
        spacing_mm: wanted spacing along the array's axes; the size follows (extent / spacing, rounded). The
            grid is centred on the old one, so the spacing is exact and the extent is kept to half a voxel.
        order: 1 = linear for images, with a triangle filter as wide as the new voxel where the grid gets
            coarser (no aliasing); 0 = nearest, for labels.
        size: wanted size; without `spacing_mm` the extent is kept exactly and the spacing follows. With it,
            the volume is resampled first, then cropped or padded.

    Returns:
        A volume of the same dtype (order 1 rounds integers).

    Raises:
        MaisiError: neither is given, or they are not positive, or the result would be absurdly large.
    """
    wanted = _spacing_for(volume, spacing_mm, size)
    x, y, z = (max(1, round(e / s)) for e, s in zip(_extent_mm(volume), wanted, strict=True))
    if max(x, y, z) > LARGEST_SIZE:
        raise MaisiError(f"A spacing of {wanted} mm makes {x} x {y} x {z} voxels; choose a coarser spacing.")
    result = _resample_centred(volume, (x, y, z), wanted, order)
    return result if size is None else crop_or_pad(result, size)


def turned_onto(labels: Volume, grid: Volume, tolerance_mm: float) -> Volume | None:
    """Labels on the grid of another volume, where that takes no more than turning their axes; else None."""
    if labels.same_grid(grid, tolerance_mm):
        return labels
    if labels.axes_only().same_grid(grid.axes_only(), tolerance_mm):
        return resample_to_grid(labels, grid, order=0)
    return None


def resample_to_grid(volume: Volume, like: Volume, order: int = 1, fill: float | None = None) -> Volume:
    """Bring a volume onto the grid of `like` (shape and affine), whatever the orientations.

    Args:
        volume: values to move.
        like: gives shape and affine only.
        order: 1 linear (with a filter against aliasing), 0 nearest.
        fill: value outside `volume`; default as in `crop_or_pad`.
    """
    matrix = np.linalg.inv(volume.affine) @ like.affine
    value = background_of(volume.array) if fill is None else fill
    order_of_axes = _axis_of_each(matrix[:3, :3])
    if order_of_axes is None:
        return _resample_oblique(volume, like, matrix, order, value)
    moved = np.transpose(volume.array, order_of_axes)
    rows = matrix[list(order_of_axes)]
    result = moved
    x, y, z = moved.shape
    for axis in _most_shrinking_first((x, y, z), like.shape):
        centres = rows[axis, 3] + rows[axis, axis] * np.arange(like.shape[axis])
        result = _resample_axis(result, axis, centres, abs(rows[axis, axis]), order, value)
    return Volume(np.ascontiguousarray(_as_dtype(result, volume.array.dtype)), like.affine)


def edged(volume: Volume) -> Volume:
    """The volume with its outermost voxels once more around it.

    A coarse grid may end up to half a voxel before the fine one that it was made of; what is brought back needs more.
    """
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3].sum(axis=1)
    return Volume(np.pad(volume.array, 1, mode="edge"), affine)


def crop_or_pad(volume: Volume, size: Triple, value: float | None = None) -> Volume:
    """Crop or pad each axis symmetrically to `size`; the affine follows, so that no voxel moves in the world.

    Args:
        volume: any orientation.
        size: wanted size; odd differences take or give one voxel more at the end.
        value: of the padding; default: 0 for unsigned arrays (label maps), else the minimum (air in CT).

    Raises:
        MaisiError: a size below 1.
    """
    if min(size) < 1:
        raise MaisiError(f"A size of {size} has an axis without voxels; give sizes of at least 1.")
    fill = background_of(volume.array) if value is None else value
    starts = [
        (have - wanted) // 2 if have > wanted else -((wanted - have) // 2)
        for wanted, have in zip(size, volume.shape, strict=True)
    ]
    crop = tuple(slice(max(0, s), s + n) for s, n in zip(starts, size, strict=True))
    cropped = volume.array[crop]
    before = [max(0, -s) for s in starts]
    pads = [(b, n - b - c) for b, n, c in zip(before, size, cropped.shape, strict=True)]
    array = np.pad(cropped, pads, constant_values=volume.array.dtype.type(fill))
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array(starts, dtype=np.float64)
    return Volume(array, affine)


def pad_to_multiple(array: Array, multiple: int, value: float = 0.0) -> tuple[Array, tuple[Any, ...]]:
    """Pad the last three axes at their ends to multiples of `multiple`.

    Padding at the end keeps the first voxel, so the affine stays true.

    Args:
        array: (..., X, Y, Z).
        multiple: at least 1.
        value: of the padding.

    Returns:
        The padded array, and the index that undoes it: `padded[index]` is the array again.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, not {multiple}")
    spatial = array.shape[-3:]
    pads = [(0, 0)] * (array.ndim - 3) + [(0, -n % multiple) for n in spatial]
    index = (..., *(slice(0, n) for n in spatial))
    if not any(after for _, after in pads):
        return array, index
    return np.pad(array, pads, constant_values=value), index


def background_of(array: Array) -> float:
    """Value that means "nothing here": 0 in unsigned arrays (label maps), else the minimum (air in CT)."""
    return 0.0 if array.dtype.kind in "ub" else float(array.min())


def _extent_mm(volume: Volume) -> Spacing:
    x, y, z = (n * s for n, s in zip(volume.shape, volume.spacing_mm, strict=True))
    return (x, y, z)


def _spacing_for(volume: Volume, spacing_mm: Spacing | None, size: Triple | None) -> Spacing:
    """Return the spacing asked for, or the one that fits `size` voxels into the volume's extent."""
    if spacing_mm is not None:
        if not all(np.isfinite(s) and s > 0 for s in spacing_mm):
            raise MaisiError(f"A spacing of {spacing_mm} mm is not possible; give three positive numbers.")
        return spacing_mm
    if size is None or min(size) < 1:
        raise MaisiError(f"Resampling needs a spacing or a size of at least 1 voxel, not {size}; give one.")
    x, y, z = (e / n for e, n in zip(_extent_mm(volume), size, strict=True))
    return (x, y, z)


def _resample_centred(volume: Volume, size: Triple, spacing_mm: Spacing, order: int) -> Volume:
    """Resample to a grid with the directions and centre of `volume`; beyond its edges, the edge's value."""
    scale = np.array(spacing_mm) / np.array(volume.spacing_mm)
    offset = ((np.array(volume.shape) - 1) - (np.array(size) - 1) * scale) / 2
    result = volume.array
    for axis in _most_shrinking_first(volume.shape, size):
        centres = offset[axis] + np.arange(size[axis]) * scale[axis]
        result = _resample_axis(result, axis, centres, scale[axis], order, None)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ offset
    affine[:3, :3] *= scale
    return Volume(np.ascontiguousarray(_as_dtype(result, volume.array.dtype)), affine)


def _most_shrinking_first(have: Triple, wanted: Triple) -> list[int]:
    """Order of the axes that needs least memory and work when they are resampled one after the other."""
    return sorted(range(3), key=lambda a: wanted[a] / have[a])


def _resample_axis(
    array: Array, axis: int, centres: NDArray[np.float64], scale: float, order: int, fill: float | None
) -> Array:
    """Values at the fractional indices `centres` of one axis; `fill` (None: the edge) beyond the edges."""
    count = array.shape[axis]
    if len(centres) == count and np.allclose(centres, np.arange(count), atol=1e-6):
        return array
    inside = (centres > -0.5 - 1e-6) & (centres < count - 0.5 + 1e-6)
    if order == 0:
        # ceil(x - 0.5): ties go down, as a fixed rule, instead of to the nearest even index
        nearest = np.clip(np.ceil(centres - 0.5 - 1e-9).astype(np.int64), 0, count - 1)
        result = np.take(array, nearest, axis=axis)
    else:
        weights = _triangle_weights(centres, count, max(1.0, scale))
        flat = np.moveaxis(array, axis, 0).reshape(count, -1).astype(np.float32, copy=False)
        shape = (len(centres), *np.delete(array.shape, axis))
        result = np.moveaxis((weights @ flat).reshape(shape), 0, axis)
    if fill is not None and not inside.all():
        result[tuple(~inside if a == axis else slice(None) for a in range(3))] = fill
    return result


def _triangle_weights(centres: NDArray[np.float64], count: int, width: float) -> sparse.csr_matrix:
    """Sparse (len(centres), count) float32: triangle of half-width `width` voxels; rows add up to 1."""
    reach = int(np.ceil(width))
    columns = np.floor(centres)[:, None].astype(np.int64) + np.arange(-reach + 1, reach + 1)[None]
    weights = np.clip(1.0 - np.abs(columns - centres[:, None]) / width, 0.0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(len(centres)), columns.shape[1])
    edge = np.clip(columns, 0, count - 1).ravel()
    return sparse.csr_matrix((weights.ravel().astype(np.float32), (rows, edge)), shape=(len(centres), count))


def _axis_of_each(matrix: NDArray[np.float64]) -> tuple[int, int, int] | None:
    """Input axis that follows each output axis where the map only permutes, flips and scales; else None."""
    order = np.abs(matrix).argmax(axis=0)
    rest = np.abs(matrix).copy()
    rest[order, np.arange(3)] = 0
    if sorted(order) != [0, 1, 2] or rest.max() > 1e-4 * np.abs(matrix).max():
        return None
    return (int(order[0]), int(order[1]), int(order[2]))


def _resample_oblique(volume: Volume, like: Volume, matrix: NDArray[np.float64], order: int, fill: float) -> Volume:
    source = volume.array
    if order:
        source = source.astype(np.float32)
        coarser = np.linalg.norm(matrix[:3, :3], axis=1)  # input voxels per output voxel
        sigma = np.sqrt(np.clip(coarser**2 - 1, 0, None)) / 2.355  # half the width of the new voxel's profile
        source = ndimage.gaussian_filter(source, sigma, mode="nearest") if sigma.any() else source
    result = ndimage.affine_transform(
        source,
        matrix[:3, :3],
        matrix[:3, 3],
        like.shape,
        order=1 if order else 0,
        mode="nearest",
        prefilter=False,
    )
    result[_beyond(matrix, volume.shape, like.shape)] = fill
    return Volume(_as_dtype(result, volume.array.dtype), like.affine)


def _beyond(matrix: NDArray[np.float64], have: Triple, wanted: Triple) -> NDArray[np.bool_]:
    """Voxels of a wanted grid whose centres lie outside all voxels of the one that there is."""
    x, y, z = np.ogrid[tuple(slice(n) for n in wanted)]
    beyond = np.zeros(wanted, bool)
    for row, count in zip(matrix[:3], have, strict=True):
        index = (row[0] * x + row[3]).astype(np.float32) + (row[1] * y + row[2] * z).astype(np.float32)
        beyond |= (index < -0.5 - 1e-3) | (index > count - 0.5 + 1e-3)
    return beyond


def _as_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    if array.dtype == dtype:
        return array
    return np.rint(array).astype(dtype) if dtype.kind in "iu" else array.astype(dtype)
