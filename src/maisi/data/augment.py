"""Random changes of geometry: drawn first, applied afterwards, the same to image and mask.

    parameters = draw(generator, ranges, shape)
    image, mask = apply(image, parameters, order=1), apply(mask, parameters, order=0)

One map takes each output voxel to a place in the input (crop, elastic, zoom, rotation, flip, all at once), so values
are interpolated once only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from maisi.config import Config
from maisi.data.preprocess import background_of

Array = NDArray[Any]
Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]


class SpatialRanges(Config):
    """What `draw` may choose from. Zero (or one, for the zoom) switches a change off.

    Attributes:
        flip: probability of mirroring along X, Y, Z. Left and right labels don't change names with it, so keep X at
            0 where the mask tells sides apart.
        rotate_degrees: largest turn about X, Y, Z, either way.
        zoom: smallest and largest magnification; 2 shows half the field of view in voxels half as large.
        zoom_axes: further factor of each axis, from 1/(1 + a) to 1 + a.
        elastic_mm: largest displacement of a node of the elastic grid, in units of `spacing_mm`.
        elastic_grid_mm: distance of these nodes.
        size: voxels to cut out, at a random place; None keeps the shape.
    """

    flip: Spacing = (0.0, 0.0, 0.0)
    rotate_degrees: Spacing = (0.0, 0.0, 0.0)
    zoom: tuple[float, float] = (1.0, 1.0)
    zoom_axes: Spacing = (0.0, 0.0, 0.0)
    elastic_mm: float = Field(default=0.0, ge=0)
    elastic_grid_mm: float = Field(default=60.0, gt=0)
    size: Triple | None = None


@dataclass(frozen=True)
class SpatialParameters:
    """One draw: everything that decides where each output voxel comes from.

    Attributes:
        shape: of the input.
        size: of the output.
        matrix: (3, 3): from output to input, both relative to their centres, in voxels.
        centre: place in the input (voxels) that the output's centre shows.
        displacement: (3, a, b, c) node values in voxels of the input, spread evenly over the output; or None.
        flip: axes along which the input is mirrored first.
    """

    shape: Triple
    size: Triple
    matrix: NDArray[np.float64]
    centre: NDArray[np.float64]
    displacement: NDArray[np.float64] | None = None
    flip: tuple[bool, bool, bool] = field(default=(False, False, False))

    @property
    def is_exact(self) -> bool:
        """Whether no interpolation is needed: flips and a crop at whole voxels."""
        return self.displacement is None and bool(np.array_equal(self.matrix, np.eye(3)))

    def spacing_mm(self, spacing_mm: Spacing) -> Spacing:
        """Spacing of the output, given that of the input: zooming in makes voxels smaller."""
        lengths = np.linalg.norm(np.diag(spacing_mm) @ self.matrix, axis=0)
        return (float(lengths[0]), float(lengths[1]), float(lengths[2]))


def draw(
    generator: np.random.Generator, ranges: SpatialRanges, shape: Triple, spacing_mm: Spacing = (1.0, 1.0, 1.0)
) -> SpatialParameters:
    """Draw the parameters of one change; the number of draws does not depend on what is switched on.

    Args:
        generator: the only source of chance.
        ranges: see `SpatialRanges`.
        shape: of the arrays that the parameters will be applied to.
        spacing_mm: of these arrays: rotations keep shapes in the world also where voxels are not cubes.
    """
    size = ranges.size or shape
    chances, angles = generator.random(3), generator.uniform(-1, 1, 3)
    zoom = np.exp(generator.uniform(*np.log(ranges.zoom)))
    stretch = (1 + np.array(ranges.zoom_axes)) ** generator.uniform(-1, 1, 3)
    place, seed = generator.random(3), int(generator.integers(2**63))
    turn = rotation(np.radians(angles * np.array(ranges.rotate_degrees)))
    to_mm = np.diag(np.asarray(spacing_mm, dtype=np.float64))
    matrix = np.linalg.inv(to_mm) @ turn @ to_mm @ np.diag(1 / (zoom * stretch))
    if np.allclose(matrix, np.eye(3), atol=1e-12):
        matrix = np.eye(3)
    return SpatialParameters(
        shape=shape,
        size=size,
        matrix=matrix,
        centre=_crop_centre(shape, size, matrix, place),
        displacement=_nodes(np.random.default_rng(seed), ranges, size, matrix, spacing_mm),
        flip=(bool(chances[0] < ranges.flip[0]), bool(chances[1] < ranges.flip[1]), bool(chances[2] < ranges.flip[2])),
    )


def apply(array: Array, parameters: SpatialParameters, order: int, fill: float | None = None) -> Array:
    """Move an array by drawn parameters.

    Args:
        array: (..., X, Y, Z) with the X, Y, Z that the parameters were drawn for; leading axes move alike.
        parameters: from `draw`.
        order: 1 linear for images, 0 nearest for masks.
        fill: beyond the input; default: 0 in unsigned arrays (masks), else the minimum (air in CT).

    Returns:
        (..., *parameters.size), of the same dtype.

    Raises:
        ValueError: another shape than the parameters were drawn for.
    """
    if array.shape[-3:] != parameters.shape:
        raise ValueError(f"parameters drawn for {parameters.shape} don't fit an array of {array.shape}")
    value = background_of(array) if fill is None else fill
    axes = tuple(axis - 3 for axis, flipped in enumerate(parameters.flip) if flipped)
    flat = np.flip(array, axes).reshape(-1, *parameters.shape)
    if parameters.is_exact:
        moved = np.stack([_crop(part, parameters, value) for part in flat])
    else:
        places = _places(parameters)
        moved = np.stack([_sample(part, places, order, value) for part in flat])
    return moved.reshape(*array.shape[:-3], *parameters.size)


def rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn about X, then Y, then Z, in radians."""
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def _crop_centre(
    shape: Triple, size: Triple, matrix: NDArray[np.float64], place: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where the output's centre lies: anywhere that keeps its box inside the input, else the input's centre."""
    reach = np.abs(matrix) @ np.array(size, dtype=np.float64)
    room = np.maximum(np.array(shape) - reach, 0.0)
    middle: NDArray[np.float64] = (np.array(shape) - 1) / 2
    if not np.array_equal(matrix, np.eye(3)):
        centre: NDArray[np.float64] = middle + (place - 0.5) * room
        return centre
    # whole voxels, so that nothing is interpolated where nothing is turned or zoomed
    start: NDArray[np.float64] = np.where(
        room > 0, np.floor(place * (room + 1)), -((np.array(size) - np.array(shape)) // 2)
    )
    start += (np.array(size) - 1) / 2
    return start


def _nodes(
    generator: np.random.Generator,
    ranges: SpatialRanges,
    size: Triple,
    matrix: NDArray[np.float64],
    spacing_mm: Spacing,
) -> NDArray[np.float64] | None:
    """Displacements at the nodes of a coarse grid, in input voxels; 0 at its rim, so that nothing tears there."""
    if ranges.elastic_mm == 0:
        return None
    voxel_mm = np.linalg.norm(np.diag(spacing_mm) @ matrix, axis=0)
    counts = np.maximum(np.ceil(np.array(size) * voxel_mm / ranges.elastic_grid_mm).astype(int) + 1, 4)
    nodes = np.zeros((3, *counts))
    inner = generator.uniform(-1, 1, (3, *(counts - 2))) * ranges.elastic_mm
    nodes[:, 1:-1, 1:-1, 1:-1] = inner / np.array(spacing_mm)[:, None, None, None]
    return nodes


def _places(parameters: SpatialParameters) -> NDArray[np.float32]:
    """Input place, in voxels, of each output voxel: (3, *size)."""
    axes = [np.arange(n) - (n - 1) / 2 for n in parameters.size]
    x, y, z = (axis.astype(np.float32) for axis in axes)
    matrix, centre = parameters.matrix.astype(np.float32), parameters.centre.astype(np.float32)
    places = np.empty((3, *parameters.size), np.float32)
    for row in range(3):
        places[row] = (
            (matrix[row, 0] * x)[:, None, None]
            + (matrix[row, 1] * y)[None, :, None]
            + (matrix[row, 2] * z + centre[row])[None, None, :]
        )
        if parameters.displacement is not None:
            places[row] += _spread(parameters.displacement[row], parameters.size)
    return places


def _spread(nodes: NDArray[np.float64], size: Triple) -> NDArray[np.float32]:
    """Smooth field over `size` voxels through a coarse grid of nodes (cubic B-splines, one axis after the other)."""
    spread: Array = nodes
    for axis, count in enumerate(size):
        weights = spline_weights(count, spread.shape[axis])
        spread = np.moveaxis(np.tensordot(weights, spread, (1, axis)), 0, axis)
    return spread.astype(np.float32)


def spline_weights(count: int, nodes: int) -> NDArray[np.float64]:
    """Cubic B-spline weights (count, nodes); nodes at the ends count for what would lie beyond them."""
    at = np.linspace(0, nodes - 1, count)
    weights = np.zeros((count, nodes))
    for shift in range(-1, 3):
        node = np.floor(at).astype(int) + shift
        t = np.abs(at - node)
        weight = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0.0))
        np.add.at(weights, (np.arange(count), np.clip(node, 0, nodes - 1)), weight)
    return weights


def _sample(array: Array, places: NDArray[np.float32], order: int, fill: float) -> Array:
    if order:
        moved = ndimage.map_coordinates(array.astype(np.float32), places, order=1, mode="constant", cval=fill)
        return np.rint(moved).astype(array.dtype) if array.dtype.kind in "iu" else moved.astype(array.dtype)
    return ndimage.map_coordinates(array, places, order=0, mode="constant", cval=fill)


def _crop(array: Array, parameters: SpatialParameters, fill: float) -> Array:
    """Cut out (or pad) at whole voxels."""
    starts = np.rint(parameters.centre - (np.array(parameters.size) - 1) / 2).astype(int)
    stops = starts + np.array(parameters.size)
    inside = tuple(slice(max(0, a), max(0, b)) for a, b in zip(starts, stops, strict=True))
    cut = array[inside]
    before = [max(0, -int(a)) for a in starts]
    pads = [(b, n - b - c) for b, n, c in zip(before, parameters.size, cut.shape, strict=True)]
    return np.pad(cut, pads, constant_values=array.dtype.type(fill))
