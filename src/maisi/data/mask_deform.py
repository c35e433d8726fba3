"""Label maps made to differ: turned, stretched, bent, and single structures grown or shrunk. Knows no file, no network.

One draw moves everything: for each output place x (mm from the centre of the field of view, along the array's
axes) the input is read at `matrix @ (x + u(x))`. The bend u is a cubic B-spline over control points that lie at
least `POINTS_PER_MM` times the displacement apart. A spline's slope along an axis is at most the step between
neighbouring control points over their distance, so in each row of its gradient the slopes add up to at most
3 * 2 / 12 = 0.5 < 1: x + u(x) maps no two places to one, and nothing folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import ANY_BONE, BACKGROUND, BODY, KNOWN_IDS, TUMORS, label_name
from maisi.data.augment import rotation, spline_weights
from maisi.data.label_maps import rest_of
from maisi.data.preprocess import resample_to_grid
from maisi.errors import MaisiError
from maisi.request import ORGAN_SIZE_RANGE
from maisi.volume import Volume

Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Spacing = tuple[float, float, float]

GRADIENT_LIMIT = 0.5
"""Largest sum of slopes in a row of the bend's gradient; below 1 the bend can be undone."""

POINTS_PER_MM = 12.0
"""Control points lie at least this many mm apart for each mm of displacement: it keeps `GRADIENT_LIMIT`."""

KEPT_SHARE = 0.75
"""What a soft neighbour keeps of its volume, at least, when a structure grows: else it is left where it is."""

_LIMITS = {"rotate_degrees": 30.0, "shear": 0.2, "elastic_mm": 25.0}
_ZOOM_LIMITS = (0.7, 1.4)
_SLAB_VOXELS = 1 << 22
_SPINAL_CORD = 121
_FIXED = (BACKGROUND, _SPINAL_CORD, *ANY_BONE)
"""What no growing structure moves: the air around the body, bones and what runs in them."""


@dataclass(frozen=True)
class DeformationRanges:
    """Bounds within which a deformation is drawn; 0 and (1, 1) switch a part off.

    Attributes:
        rotate_degrees: largest turn about each axis, at most 30.
        zoom: factors on the size of everything, drawn for each axis, 0.7 to 1.4; above 1 the body gets larger.
        shear: largest slope of one axis against another, at most 0.2.
        elastic_mm: largest displacement along each axis, at most 25.
        elastic_grid_mm: distance between control points; it is widened to 12 times `elastic_mm` where that is more.
    """

    rotate_degrees: float = 4.0
    zoom: tuple[float, float] = (0.95, 1.05)
    shear: float = 0.02
    elastic_mm: float = 5.0
    elastic_grid_mm: float = 60.0

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            MaisiError: a value is out of its range.
        """
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise MaisiError(f"A deformation with {name} {value:g} is not possible; give 0 to {limit:g}.")
        low, high = self.zoom
        if not _ZOOM_LIMITS[0] <= low <= high <= _ZOOM_LIMITS[1]:
            raise MaisiError(f"A zoom from {low:g} to {high:g} is not possible; give two factors from 0.7 to 1.4.")
        if not self.elastic_grid_mm > 0:
            raise MaisiError(f"Control points {self.elastic_grid_mm:g} mm apart are not possible; give more than 0.")


@dataclass(frozen=True)
class Deformation:
    """One drawn deformation, in mm; see the module for what it does.

    Attributes:
        matrix: (3, 3), invertible: place in the output -> place in the input, about the centre.
        points_mm: (3, A, B, C) displacement at the control points, spread evenly from face to face of the field
            of view, along R, A, S as nearly as the array's axes run so.
        extent_mm: the field of view (R, A, S) it was drawn for.
    """

    matrix: Floats
    points_mm: Floats
    extent_mm: Spacing

    def __post_init__(self) -> None:
        """Check that nothing folds.

        Raises:
            MaisiError: the matrix is not invertible, or the bend is steeper than `GRADIENT_LIMIT`.
        """
        if not np.isfinite(self.matrix).all() or np.linalg.det(self.matrix) <= 0:
            raise MaisiError("The deformation mirrors or flattens the body; give a matrix with a positive determinant.")
        if self.steepness() > GRADIENT_LIMIT + 1e-9:
            raise MaisiError(
                f"The deformation folds (slope {self.steepness():.2f}, limit {GRADIENT_LIMIT:g}); bend less."
            )

    def steepness(self) -> float:
        """Bound on the bend's gradient: the largest row sum of steps between control points over their distance."""
        total = np.zeros(3)
        for axis, (count, extent) in enumerate(zip(self.points_mm.shape[1:], self.extent_mm, strict=True)):
            steps = np.abs(np.diff(self.points_mm, axis=axis + 1)).reshape(3, -1)
            total += steps.max(axis=1, initial=0.0) / (extent / (count - 1))
        return float(total.max())


def draw_deformation(generator: np.random.Generator, ranges: DeformationRanges, volume: Volume) -> Deformation:
    """Draw a deformation for the field of view of `volume`; size and spacing of its voxels play no part.

    Args:
        generator: the only source of chance.
        ranges: see there.
        volume: only its grid is read.
    """
    ras = volume.to_ras()
    x, y, z = (n * s for n, s in zip(ras.shape, ras.spacing_mm, strict=True))
    extent = (x, y, z)
    angles, stretch, slopes = (generator.uniform(-1, 1, 3) for _ in range(3))
    low, high = np.log(ranges.zoom)
    zoom = np.exp(low + (high - low) * (stretch + 1) / 2)
    shear = np.eye(3)
    shear[0, 1], shear[0, 2], shear[1, 2] = slopes * ranges.shear
    turn = rotation(np.radians(angles * ranges.rotate_degrees))
    distance = max(ranges.elastic_grid_mm, POINTS_PER_MM * ranges.elastic_mm)
    counts = [max(2, math.floor(round(e / distance, 6)) + 1) for e in extent]
    points = generator.uniform(-1, 1, (3, *counts)) * _reached_mm(ranges.elastic_mm, extent, counts)
    return Deformation(turn @ shear @ np.diag(1 / zoom), points, extent)


def _reached_mm(elastic_mm: float, extent: Spacing, counts: list[int]) -> float:
    """Displacement that keeps the gradient's bound; less than asked only in a field of view under `distance`."""
    slope = sum(2 * (count - 1) / e for e, count in zip(extent, counts, strict=True))
    return min(elastic_mm, GRADIENT_LIMIT / slope)


def deform(volume: Volume, deformation: Deformation, order: int = 0) -> Volume:
    """Move a volume by a drawn deformation, on its own grid; what lies beyond the field of view is as its edge.

    Args:
        volume: labels or image, of the field of view that the deformation was drawn for, any orientation.
        deformation: see there. A label map and its image moved by one deformation stay together.
        order: 0 nearest for labels, 1 linear for images.

    Raises:
        MaisiError: the field of view is another one.
    """
    ras = volume.to_ras()
    extent = np.multiply(ras.shape, ras.spacing_mm)
    if not np.allclose(extent, deformation.extent_mm, rtol=0.02):
        mm = " x ".join(f"{e:.0f}" for e in deformation.extent_mm)
        raise MaisiError(f"The deformation was drawn for a field of view of {mm} mm, not for this one; draw another.")
    moved = ras.with_array(_moved(ras.array, ras.spacing_mm, deformation, order))
    return moved if volume.same_grid(ras) else resample_to_grid(moved, volume, order=0)


def _moved(array: NDArray[Any], spacing: Spacing, deformation: Deformation, order: int) -> NDArray[Any]:
    """Read the input at the deformed places, a slab of X at a time: three float32 a voxel of the slab are held."""
    to_voxels = deformation.matrix / np.array(spacing)[:, None]
    points = np.tensordot(to_voxels, deformation.points_mm, 1)
    weights = [spline_weights(n, k) for n, k in zip(array.shape, points.shape[1:], strict=True)]
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(array.shape, spacing, strict=True)]
    middle = (np.array(array.shape) - 1) / 2
    source = array.astype(np.float32) if order else np.ascontiguousarray(array)
    result = np.empty_like(array, order="C")
    step = max(1, _SLAB_VOXELS // (array.shape[1] * array.shape[2]))
    along_z = np.vstack([weights[2].T, np.ones(array.shape[2]), axes[2]]).astype(np.float32)
    for start in range(0, array.shape[0], step):
        part = slice(start, start + step)
        places = np.empty((3, *result[part].shape), np.float32)
        for row in range(3):
            bent = np.tensordot(weights[0][part], np.tensordot(points[row], weights[1], (1, 1)), 1)  # x, C, y
            straight = to_voxels[row, 0] * axes[0][part, None] + to_voxels[row, 1] * axes[1][None] + middle[row]
            slope = np.full_like(straight, to_voxels[row, 2])
            lines = np.concatenate([np.moveaxis(bent, 1, 2), straight[..., None], slope[..., None]], axis=2)
            np.matmul(lines.astype(np.float32), along_z, out=places[row])
        result[part] = _read(source, places, order, array.dtype)
    return result


def _read(source: NDArray[Any], places: NDArray[np.float32], order: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values at (3, ...) places in voxels; beyond the edge, the edge's."""
    if order:
        read = ndimage.map_coordinates(source, places, order=1, mode="nearest", output=np.float32)
        return np.rint(read).astype(dtype) if dtype.kind in "iu" else read.astype(dtype)
    index: NDArray[Any] = np.zeros(places.shape[1:], np.int64)
    for place, count in zip(places, source.shape, strict=True):
        np.rint(place, out=place)
        np.clip(place, 0, count - 1, out=place)
        index *= count
        index += place.astype(np.int64)
    values: NDArray[Any] = source.ravel()[index]
    return values


# ---- one structure's size -----------------------------------------------------------------------------------------


def scale_organs(volume: Volume, sizes: Mapping[int, float]) -> Volume:
    """Apply `scale_organ` to one structure after the other, in the order of their ids.

    Raises:
        MaisiError: as `scale_organ`; all structures are looked for before any is changed.
    """
    check_sizes(volume, sizes)
    labels = volume.array
    for id, factor in sorted(sizes.items()):
        labels = scale_organ(labels, volume.spacing_mm, id, factor)
    return volume.with_array(labels)


def check_sizes(volume: Volume, sizes: Mapping[int, float]) -> None:
    """Refuse, before any work, sizes of structures that the mask does not hold.

    Raises:
        MaisiError: so, or a factor is out of range.
    """
    for id, factor in sizes.items():
        _check_size(volume.array, id, factor)


def scale_organ(labels: Labels, spacing_mm: Spacing, id: int, factor: float) -> Labels:
    """Give one structure `factor` times its volume, to the voxel.

    A structure grows by the voxels nearest to it; soft neighbours are pushed outwards, thinned within a shell three
    times as deep. Bones, spinal cord and the air around the body stay as they are, and so does everything farther
    off. It shrinks evenly towards its skeleton, so that it stays in one piece; what it leaves becomes body (200),
    and nothing else changes. Tumours and vessels in it are neither moved nor scaled.

    Args:
        labels: uint8 (X, Y, Z).
        spacing_mm: of its voxels.
        id: the structure.
        factor: 0.3 to 2.0.

    Raises:
        MaisiError: the structure is not there, the factor is out of range, or there is no room to grow or so few
            voxels that it would vanish; the message then says what fits.
    """
    _check_size(labels, id, factor)
    have = int(np.count_nonzero(labels == id))
    want = round(have * factor)
    if want == have:
        return labels.copy()
    return _shrunk(labels, spacing_mm, id, want) if want < have else _grown(labels, spacing_mm, id, want)


def _check_size(labels: Labels, id: int, factor: float) -> None:
    low, high = ORGAN_SIZE_RANGE
    if id not in KNOWN_IDS or id in (BACKGROUND, BODY):
        raise MaisiError(f"Label {id} has no size of its own; name an organ.")
    if not low <= factor <= high:
        raise MaisiError(f"The size {factor:g} of '{label_name(id)}' is out of range; give {low:g} to {high:g}.")
    if not (labels == id).any():
        raise MaisiError(f"The mask holds no '{label_name(id)}' to change in size; choose another structure or mask.")


def _box_around(mask: Mask, spacing_mm: Spacing, margin_mm: float) -> tuple[slice, slice, slice]:
    found = ndimage.find_objects(mask.astype(np.uint8))[0]
    pads = [math.ceil(margin_mm / s) + 1 for s in spacing_mm]
    x, y, z = (
        slice(max(0, part.start - pad), min(n, part.stop + pad))
        for part, pad, n in zip(found, pads, mask.shape, strict=True)
    )
    return (x, y, z)


def _solid(labels: Labels, id: int) -> Mask:
    """The structure with what lies in it: its tumours, vessels that mostly touch the structure, and holes, filled."""
    inside = [id, *(tumor for tumor, hosts in TUMORS.items() if id in hosts)]
    own = np.isin(labels, inside)
    for other, found in enumerate(ndimage.find_objects(labels), start=1):
        if found is None or other in (*inside, BODY, *_FIXED):
            continue
        box = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in found)
        it = labels[box] == other
        shell = ndimage.binary_dilation(it) & ~it
        if np.count_nonzero(shell & own[box]) > 0.5 * np.count_nonzero(shell):
            inside.append(other)
    filled: Mask = ndimage.binary_fill_holes(np.isin(labels, inside))
    return filled


def _shrunk(labels: Labels, spacing_mm: Spacing, id: int, want: int) -> Labels:
    """Keep the `want` voxels that lie nearest to the skeleton, measured by how far the surface is."""
    from skimage.morphology import skeletonize

    result = labels.copy()
    box = _box_around(labels == id, spacing_mm, 0)
    part = result[box]
    solid = np.pad(_solid(part, id), 1)
    core: Mask = skeletonize(solid)  # type: ignore[no-untyped-call]
    core |= solid & ~ndimage.binary_propagation(core, mask=solid)  # specks too small for a skeleton stay
    depth = ndimage.distance_transform_edt(solid, sampling=spacing_mm)
    to_core = ndimage.distance_transform_edt(~core, sampling=spacing_mm)
    relative = (depth / np.maximum(depth + to_core, 1e-6))[1:-1, 1:-1, 1:-1]
    own = part == id
    least = int(np.count_nonzero(own & core[1:-1, 1:-1, 1:-1]))
    if want < max(1, least):
        have = int(np.count_nonzero(own))
        raise MaisiError(
            f"'{label_name(id)}' is too thin in this mask to shrink so far; the smallest factor is {least / have:.2f}."
        )
    kept = _connected_first(relative, own, want)
    part[own & ~kept] = rest_of(labels)
    return result


def _connected_first(score: Floats, own: Mask, want: int) -> Mask:
    """`want` voxels of `own` by score, each piece of it left in one piece: what would break off goes first."""
    pieces, _ = ndimage.label(own, np.ones((3, 3, 3)))
    allowed, kept = own.copy(), own
    for _ in range(20):
        kept = _best(score, allowed, want)
        loose = _broken_off(kept, pieces)
        if not loose.any() or np.count_nonzero(allowed) - np.count_nonzero(loose) < want:
            break
        allowed &= ~loose
    return kept


def _broken_off(kept: Mask, pieces: NDArray[Any]) -> Mask:
    """Voxels outside the largest remainder of each original piece."""
    parts, count = ndimage.label(kept, np.ones((3, 3, 3)))
    voxels = np.bincount(parts.ravel(), minlength=count + 1)
    piece = np.zeros(count + 1, np.int64)
    piece[parts[kept]] = pieces[kept]
    largest = {int(p): int(k) for k, p in sorted(enumerate(piece), key=lambda item: voxels[item[0]]) if p}
    return kept & ~np.isin(parts, sorted(largest.values()))


def _best(score: Floats, allowed: Mask, want: int) -> Mask:
    """The `want` voxels of `allowed` with the largest score; ties go by place in the array."""
    places = np.flatnonzero(allowed)
    order = np.argsort(-score.ravel()[places], kind="stable")
    chosen = np.zeros(allowed.shape, bool)
    chosen.ravel()[places[order[:want]]] = True
    return chosen


def _grown(labels: Labels, spacing_mm: Spacing, id: int, want: int) -> Labels:
    have = int(np.count_nonzero(labels == id))
    radius = (3 * have * math.prod(spacing_mm) / (4 * math.pi)) ** (1 / 3)
    reach = 2.5 * radius * ((want / have) ** (1 / 3) - 1) + 2 * max(spacing_mm)
    box = _box_around(labels == id, spacing_mm, 3 * reach)
    part, voxels = labels[box], np.bincount(labels.ravel(), minlength=256)
    solid = _solid(part, id)
    away, nearest = ndimage.distance_transform_edt(~solid, sampling=spacing_mm, return_indices=True)
    held = {*_FIXED, *TUMORS}
    while True:
        fixed = np.isin(part, sorted(held))
        new = _nearest_reachable(away, solid, ~fixed & ~solid & (away <= reach), want - have)
        if np.count_nonzero(new) < want - have:
            most = math.floor(100 * (1 + np.count_nonzero(new) / have)) / 100
            raise MaisiError(f"'{label_name(id)}' has no room to grow so far; the largest factor here is {most:.2f}.")
        grown = _pushed(part, away, nearest, solid | fixed, float(away[new].max()))
        grown[new] = id
        lost = np.bincount(part.ravel(), minlength=256) - np.bincount(grown.ravel(), minlength=256)
        crushed = {int(i) for i in np.flatnonzero(lost > (1 - KEPT_SHARE) * voxels)} - held - {BODY}
        if not crushed:
            break
        held |= crushed
    result = labels.copy()
    result[box] = grown
    return result


def _nearest_reachable(away: Floats, solid: Mask, allowed: Mask, want: int) -> Mask:
    """The `want` voxels nearest to `solid` (fewer where there are no more) that hang together with it."""
    allowed = ndimage.binary_propagation(solid, mask=solid | allowed) & ~solid
    while True:
        new = _best(-away, allowed, want)
        loose = new & ~ndimage.binary_propagation(solid, mask=solid | new)
        if not loose.any():
            return new
        allowed &= ~loose


def _pushed(part: Labels, away: Floats, nearest: NDArray[Any], still: Mask, by_mm: float) -> Labels:
    """Move what lies outside a structure away from it by `by_mm` at its surface, by nothing at three times that."""
    reach = 3 * by_mm
    result = part.copy()
    shell = (away > by_mm) & (away < reach) & ~still
    places = np.stack(np.nonzero(shell))
    surface = nearest[:, shell]
    share = (away[shell] - by_mm) * reach / (reach - by_mm) / away[shell]
    source = np.rint(surface + (places - surface) * share).astype(np.intp)
    read = tuple(source)
    usable = ~still[read]
    result[tuple(places[:, usable])] = part[tuple(source[:, usable])]
    return result
