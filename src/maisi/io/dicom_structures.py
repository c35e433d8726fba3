"""Structures that people and programs drew, as DICOM keeps them: RTSTRUCT (contours) and SEG (voxels). Read only.

Both hold structures by name, which may overlap; a label map holds one id a voxel. So the structures stay apart until
somebody says which are to be covered by others. Contours are filled where a voxel's centre lies inside of an odd number
of them (PS3.3, C.8.8.6.3: inner contours are holes); where a structure was drawn on every second or third slice alone,
those between are filled by the mean of the distances to both outlines. Knows no vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.errors import MaisiError
from maisi.io.dicom import STRUCTURES, read_dicom
from maisi.io.stored import StoredHeader
from maisi.volume import Volume

Array = NDArray[Any]
Bools = NDArray[np.bool_]

_CONTOURS = ("StructureSetROISequence", "ROIContourSequence")
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_OFF_PLANE = 0.35
"""Part of a slice's thickness by which contours may lie off its middle."""


@dataclass(frozen=True)
class Piece:
    """One structure's voxels.

    Attributes:
        start: index of the box's first voxel in the grid.
        inside: (x, y, z), of the box alone.
    """

    start: tuple[int, int, int]
    inside: Bools

    @property
    def box(self) -> tuple[slice, ...]:
        """Where it lies in the grid."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.inside.shape, strict=True))


@dataclass(frozen=True)
class StructureSet:
    """The structures of a file that hold something.

    Attributes:
        names: number of a structure, from 1 in the file's order -> its name; no two are alike.
        pieces: number -> its voxels.
        shape: of the grid.
        affine: of the grid, see `Volume`.
    """

    names: Mapping[int, str]
    pieces: Mapping[int, Piece]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def painted(self, below: Collection[int] = ()) -> Volume:
        """A label map of the numbers, uint8 or uint16: where structures overlap, the smaller one.

        Args:
            below: numbers of structures that all others cover.
        """
        labels = np.zeros(self.shape, np.uint8 if len(self.pieces) < 256 else np.uint16, order="F")
        largest_first = sorted(self.pieces, key=lambda n: (n not in below, -np.count_nonzero(self.pieces[n].inside)))
        for number in largest_first:
            piece = self.pieces[number]
            labels[piece.box][piece.inside] = number
        return Volume(labels, self.affine)


def holds_structures(path: Path) -> bool:
    """Say whether a file is an RTSTRUCT or a SEG.

    Raises:
        MaisiError: a DICOM file whose header is damaged.
        OSError: it may not be read.
    """
    told = read_dicom(path) if path.is_file() else None
    return told is not None and told.get("Modality") in STRUCTURES


def read_structures(path: Path, grid: Volume | None) -> StructureSet:
    """Read an RTSTRUCT or a SEG.

    Args:
        path: for which `holds_structures` is true.
        grid: of the CT. Contours need one to be filled on; a SEG has a grid of its own, which this one replaces where
            it is a part of the same lattice (SEG leave out empty slices).

    Raises:
        MaisiError: no grid for contours, contours that do not lie in its planes or lie elsewhere, two structures of one
            name, nothing in it, a package is missing, or the file is damaged.
    """
    told = read_dicom(path, ("Modality", "NumberOfFrames", "Rows", "Columns", *_CONTOURS))
    try:
        found = _contours(path, told, grid) if told and told.Modality == "RTSTRUCT" else _segments(path, told)
    except (MaisiError, OSError):
        raise
    except Exception as error:  # what is not as the standard has it shows in many ways
        told_by = type(error).__name__
        raise MaisiError(f"{path} is damaged, or not as DICOM has it ({told_by}); export it again.") from error
    if not found.names:
        raise MaisiError(f"{path} holds no structure with voxels in it on this grid; is it of this CT?")
    double = {name for name in found.names.values() if list(found.names.values()).count(name) > 1}
    if double:
        raise MaisiError(f"{path} calls two structures '{min(double)}'; rename one.")
    return found if grid is None else _on_grid(found, grid)


# --- contours


def _contours(path: Path, told: Any, grid: Volume | None) -> StructureSet:
    if grid is None:
        raise MaisiError(f"{path} holds contours, which are filled on the grid of a CT; give it with --ct.")
    names = {int(roi.ROINumber): str(roi.ROIName).strip() for roi in told.StructureSetROISequence}
    to_index = np.linalg.inv(grid.affine) @ _LPS
    found: dict[int, tuple[str, Piece]] = {}
    for roi in told.get("ROIContourSequence") or ():
        name = names[int(roi.ReferencedROINumber)]
        outlines = [_outline(c, to_index) for c in roi.get("ContourSequence") or () if _is_closed(c)]
        piece = _filled(f"{path}: '{name}'", outlines, grid.shape)
        if piece is not None:
            found[int(roi.ReferencedROINumber)] = (name, piece)
    ordered = [found[number] for number in sorted(found)]
    return StructureSet(
        {n: name for n, (name, _) in enumerate(ordered, 1)},
        {n: piece for n, (_, piece) in enumerate(ordered, 1)},
        grid.shape,
        grid.affine,
    )


def _is_closed(contour: Any) -> bool:
    return str(contour.get("ContourGeometricType", "")) in _CLOSED


def _outline(contour: Any, to_index: NDArray[Any]) -> NDArray[np.float64]:
    """A contour's points as indices of the grid, (n, 3)."""
    points = np.array(contour.ContourData, dtype=np.float64).reshape(-1, 3)
    if not np.isfinite(points).all():
        raise ValueError("a contour has points without a place")
    return np.asarray(points @ to_index[:3, :3].T + to_index[:3, 3], np.float64)


def _filled(what: str, outlines: list[NDArray[np.float64]], shape: tuple[int, ...]) -> Piece | None:
    """Fill outlines; None where there is nothing on the grid."""
    from skimage.draw import polygon

    if not outlines:
        return None
    axis = int(np.ptp(np.concatenate([o - o.mean(0) for o in outlines]), axis=0).argmin())
    heights = np.array([o[:, axis].mean() for o in outlines])
    flat = max(float(np.ptp(o[:, axis])) for o in outlines) < 2 * _OFF_PLANE
    if not flat or np.abs(heights - np.rint(heights)).max() > _OFF_PLANE:
        raise MaisiError(f"{what} was not drawn on the slices of this CT; give the CT that it was drawn on.")
    plane = [a for a in range(3) if a != axis]
    points = np.concatenate(outlines)[:, plane]
    low = np.clip(np.floor(points.min(0)), 0, None).astype(int)
    high = np.minimum(np.ceil(points.max(0)) + 1, [shape[a] for a in plane]).astype(int)
    slices = np.rint(heights).astype(int)
    within = (slices >= 0) & (slices < shape[axis])
    if not within.any() or (high <= low).any():
        return None
    first, last = int(slices[within].min()), int(slices[within].max())
    inside = np.zeros((last - first + 1, *(high - low)), bool)
    for outline, z in zip(outlines, slices, strict=True):
        if first <= z <= last:
            rows, columns = (outline[:, plane] - low).T
            within_rows, within_columns = polygon(rows, columns, tuple(high - low))  # type: ignore[no-untyped-call]
            inside[z - first, within_rows, within_columns] ^= True
    if not inside.any():
        return None
    _fill_between(inside)
    start = [0, 0, 0]
    start[axis], start[plane[0]], start[plane[1]] = first, int(low[0]), int(low[1])
    return Piece((start[0], start[1], start[2]), np.moveaxis(inside, 0, axis))


def _fill_between(inside: Bools) -> None:
    """Fill slices between those drawn, where it is the rule that some were left out; (slices, ., .), in place."""
    drawn = np.flatnonzero(inside.any((1, 2)))
    gaps = np.diff(drawn)
    usual = int(np.median(gaps)) if gaps.size else 1
    for z, gap in zip(drawn, gaps, strict=False):
        if 1 < gap <= usual:
            below, above = _depth(inside[z]), _depth(inside[z + gap])
            for n in range(1, gap):
                inside[z + n] = below * (gap - n) + above * n > 0


def _depth(inside: Bools) -> NDArray[np.float64]:
    """Distance to the outline, positive inside."""
    padded = np.pad(inside, 1)
    depth = ndimage.distance_transform_edt(padded) - ndimage.distance_transform_edt(~padded)
    return np.asarray(depth[1:-1, 1:-1], np.float64)


# --- voxels


def _segments(path: Path, told: Any) -> StructureSet:
    try:
        from highdicom.seg import segread
    except ImportError:
        raise MaisiError(
            f"{path} is a DICOM segmentation, which the package highdicom reads; install it with: "
            "pip install 'maisi[dicom]'"
        ) from None
    frames = int(told.get("NumberOfFrames") or 1)
    StoredHeader(
        path, (int(told.Columns), int(told.Rows), frames), np.dtype(np.uint8), np.eye(4), offset=0, compressed=True
    ).check_memory()
    segmentation = segread(path)
    names: dict[int, str] = {}
    pieces: dict[int, Piece] = {}
    shape, affine = (0, 0, 0), np.eye(4)
    for number, held in _each_segment(segmentation):
        inside = held.array.T  # highdicom indexes slice, row, column
        shape = inside.shape
        affine = _LPS @ held.affine[:, [2, 1, 0, 3]]
        box = ndimage.find_objects(inside.astype(np.uint8, copy=False))
        if not box:
            continue
        n = len(names) + 1
        names[n] = str(segmentation.get_segment_description(number).segment_label).strip()
        pieces[n] = Piece(tuple(s.start for s in box[0]), inside[box[0]].astype(bool))
    return StructureSet(names, pieces, shape, affine)


def _each_segment(segmentation: Any) -> Iterator[tuple[int, Any]]:
    for number in segmentation.segment_numbers:
        held = segmentation.get_volume(segment_numbers=[number], combine_segments=True, relabel=True, dtype=np.uint8)
        yield int(number), held


def _on_grid(found: StructureSet, grid: Volume) -> StructureSet:
    """The structures on a grid of which theirs is a part, moved by whole voxels; else as they are."""
    moved = np.linalg.inv(grid.affine) @ found.affine
    turn, shift = np.rint(moved[:3, :3]), np.rint(moved[:3, 3])
    one_each = (np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all()
    reach = np.array(found.shape)
    if not one_each or np.abs((moved[:3, :3] - turn) @ reach).max() > 0.1 or np.abs(moved[:3, 3] - shift).max() > 0.1:
        return found
    order = [int(np.abs(turn[a]).argmax()) for a in range(3)]
    flipped = [turn[a, order[a]] < 0 for a in range(3)]
    pieces = {}
    for number, piece in found.pieces.items():
        inside = np.flip(piece.inside.transpose(order), tuple(a for a in range(3) if flipped[a]))
        first = [
            int(shift[a]) - piece.start[order[a]] - inside.shape[a] + 1
            if flipped[a]
            else int(shift[a]) + piece.start[order[a]]
            for a in range(3)
        ]
        low = [max(0, f) for f in first]
        high = [min(n, f + k) for n, f, k in zip(grid.shape, first, inside.shape, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            cut = tuple(slice(a - f, b - f) for a, b, f in zip(low, high, first, strict=True))
            pieces[number] = Piece((low[0], low[1], low[2]), inside[cut])
    names = {number: name for number, name in found.names.items() if number in pieces}
    return StructureSet(names, pieces, grid.shape, grid.affine)
