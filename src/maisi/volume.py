"""`Volume`: a 3D array with its place in the world. Knows no file format and no network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.errors import MaisiError

Array = NDArray[Any]


@dataclass(frozen=True)
class Volume:
    """A 3D array and the affine that takes voxel indices to millimetres.

    Attributes:
        array: shape (X, Y, Z). CT in HU, label maps as integers.
        affine: (4, 4) float64; `affine @ (i, j, k, 1)` is the world position in mm, RAS+
            (x grows to the patient's Right, y to Anterior, z to Superior), as in NIfTI.
    """

    array: Array
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Check shape and affine.

        Raises:
            MaisiError: the array is not 3D or empty, or the affine is not an invertible, finite 4 x 4 matrix.
        """
        if self.array.ndim != 3:
            raise MaisiError(f"A volume has 3 axes, this one has {self.array.ndim}; give one 3D volume.")
        if 0 in self.array.shape:
            raise MaisiError(f"The volume is empty (shape {self.array.shape}); give one with voxels in it.")
        object.__setattr__(self, "affine", checked_affine(self.affine))

    def __repr__(self) -> str:
        """In a line, without voxels."""
        spacing = " x ".join(f"{s:.3g}" for s in self.spacing_mm)
        return f"Volume({' x '.join(map(str, self.shape))} {self.array.dtype}, {spacing} mm)"

    @classmethod
    def from_spacing(
        cls,
        array: Array,
        spacing_mm: tuple[float, float, float],
        origin_mm: tuple[float, float, float] | None = None,
    ) -> Volume:
        """Make a RAS+ volume with axes along the world's; its centre is the world's origin unless `origin_mm`."""
        affine = np.diag([*spacing_mm, 1.0])
        if origin_mm is None:
            affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(array.shape, spacing_mm, strict=True)]
        else:
            affine[:3, 3] = origin_mm
        return cls(array, affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along X, Y, Z."""
        x, y, z = self.array.shape
        return (int(x), int(y), int(z))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each array axis, in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return (float(x), float(y), float(z))

    def with_array(self, array: Array) -> Volume:
        """Return the same geometry with other values; the shape must be the same."""
        if array.shape != self.array.shape:
            raise ValueError(f"shape {array.shape} differs from the volume's {self.array.shape}")
        return replace(self, array=array)

    def same_grid(self, other: Volume, tolerance_mm: float = 1e-3) -> bool:
        """Say whether both volumes have the same shape and, to `tolerance_mm` at every corner, the same affine."""
        if self.shape != other.shape:
            return False
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], [1])).reshape(4, -1)
        return bool(np.abs((self.affine - other.affine) @ corners).max() <= tolerance_mm)

    def axes_only(self) -> Volume:
        """The grid with its axes along RAS+, without the values."""
        return Volume(np.broadcast_to(np.uint8(0), self.shape), self.affine).to_ras()

    @property
    def grid(self) -> str:
        """The grid in words: voxels, their size, where the first one is and where the axes point."""
        size = " x ".join(str(n) for n in self.shape)
        origin = ", ".join(f"{mm:.4g}" for mm in self.affine[:3, 3])
        spacing = " x ".join(f"{s:.4g}" for s in self.spacing_mm)
        return f"{size} voxels of {spacing} mm from {origin}, {self.axes}"

    @property
    def axes(self) -> str:
        """Where the axes mostly point, such as 'RAS'."""
        turn = turn_to_ras(self.shape, self.affine)
        words = {axis: ("RL", "AP", "SI")[world][turn.flipped[world]] for world, axis in enumerate(turn.order)}
        return "".join(words[axis] for axis in range(3))

    def to_ras(self) -> Volume:
        """Reorder and flip the axes so that they run closest to Right, Anterior, Superior; no resampling."""
        turn = turn_to_ras(self.shape, self.affine)
        return Volume(np.ascontiguousarray(turn.applied(self.array)), turn.affine)


@dataclass(frozen=True)
class Turn:
    """How the axes of a grid are reordered and flipped, and what grid that makes.

    Attributes:
        order: for each new axis, the old one.
        flipped: whether the new axis runs the other way.
        shape: of the new grid.
        affine: of the new grid.
    """

    order: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def applied(self, array: Array) -> Array:
        """Turn an array of the old grid, or some of its rows: a view."""
        turned: Array = np.flip(np.transpose(array, self.order), tuple(a for a in range(3) if self.flipped[a]))
        return turned


def turn_to_ras(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> Turn:
    """Bring the axes of a grid closest to Right, Anterior, Superior; no resampling."""
    first, second, third = _closest_axes(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    order = (first, second, third)
    turned = affine.copy()
    turned[:3, :3] = affine[:3, order]
    x, y, z = (turned[axis, axis] < 0 for axis in range(3))
    for axis, flipped in enumerate((x, y, z)):
        if flipped:
            turned[:3, 3] += turned[:3, axis] * (shape[order[axis]] - 1)
            turned[:3, axis] *= -1
    return Turn(order, (bool(x), bool(y), bool(z)), (shape[first], shape[second], shape[third]), turned)


RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Places of the world toward Left, Posterior, Superior (DICOM, ITK, NRRD) for those in RAS+; its own inverse."""


def checked_affine(affine: NDArray[Any]) -> NDArray[np.float64]:
    """Return `affine` as float64 (4, 4).

    Raises:
        MaisiError: it is not finite, or not one that maps a grid to places in the world and back.
    """
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise MaisiError("The affine is not a finite 4 x 4 matrix; repair the file's header.")
    if not np.array_equal(affine[3], (0, 0, 0, 1)):
        raise MaisiError("The affine's last row is not 0 0 0 1; repair the file's header.")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < 1e-6 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        raise MaisiError("The affine is singular (axes without extent or apart); repair the file's header.")
    return affine


def _closest_axes(rotation: NDArray[np.float64]) -> list[int]:
    """For each world axis, the array axis that runs closest to it; each array axis is used once."""
    from itertools import permutations

    return list(max(permutations(range(3)), key=lambda p: sum(abs(rotation[w, a]) for w, a in enumerate(p))))
