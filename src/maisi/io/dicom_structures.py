"""Structures that people and programs drew, as DICOM keeps them: RTSTRUCT (contours) and SEG (voxels). Read only.

Both hold structures by name, which may overlap; a label map holds one id a voxel. So the structures stay apart until
somebody says whose word counts for more. A voxel is inside of a contour where its centre is; of contours in one plane
that lie within another those inside are holes, and what they hold is not (PS3.3, C.8.8.6.3, by what planning systems
do). Where a structure was drawn on every second or third slice alone, those between are filled by the mean of the
distances to both outlines. Knows no vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.errors import MaisiError
from maisi.io.dicom import STRUCTURES, Frame, frames_of, from_the_system, quiet, read_dicom
from maisi.io.stored import StoredHeader
from maisi.volume import RAS_TO_LPS, Volume

Array = NDArray[Any]
Bools = NDArray[np.bool_]
Points = NDArray[np.float64]

_CONTOURS = ("StructureSetROISequence", "ROIContourSequence", "ReferencedFrameOfReferenceSequence")
_SEGMENTS = (
    "FrameOfReferenceUID",
    *("SegmentSequence", "SegmentationType", "MaximumFractionalValue", "NumberOfFrames", "Rows", "Columns"),
    *("SamplesPerPixel", "BitsStored", "PixelRepresentation"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_OFF_PLANE = 0.35
"""Part of a slice's thickness by which contours may lie off its middle; those of finer slices lie between, too."""

_LEFT_OUT = (2, 3)
"""Slices from one drawn to the next, where it was the rule that some were left out."""

_OFF_LATTICE = 0.1
_MOST_SLICES = 4096


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
    """The structures of a file.

    Attributes:
        names: number of a structure, from 1 in the file's order -> its name; no two are alike.
        pieces: number -> its voxels, of those that have some on the grid.
        faults: number -> why it could not be read.
        frames_of_reference: identifiers of the spaces that it says its places are in.
        shape: of the grid.
        affine: of the grid, see `Volume`.
    """

    names: Mapping[int, str]
    pieces: Mapping[int, Piece]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    faults: Mapping[int, str] = field(default_factory=dict)
    frames_of_reference: frozenset[str] = frozenset()

    @property
    def empty(self) -> tuple[int, ...]:
        """Numbers of structures without a voxel on the grid: nothing was drawn, or what is smaller than voxels."""
        return tuple(n for n in self.names if n not in self.pieces and n not in self.faults)

    def painted(self, rank: Callable[[int], int] = lambda _: 0) -> Volume:
        """A label map of the numbers, uint8 or uint16.

        Args:
            rank: of a structure's number; where structures overlap, the higher one is seen, of equals the smaller.
        """
        most = max(self.pieces, default=0)
        labels = np.zeros(self.shape, np.uint8 if most < 256 else np.uint16, order="F")
        for number in sorted(self.pieces, key=lambda n: (rank(n), -np.count_nonzero(self.pieces[n].inside))):
            piece = self.pieces[number]
            labels[piece.box][piece.inside] = number
        return Volume(labels, self.affine)


def holds_structures(path: Path) -> bool:
    """Say whether a file is an RTSTRUCT or a SEG; one that cannot be read is none.

    Raises:
        MaisiError: a DICOM file whose header is damaged.
    """
    try:
        told = read_dicom(path, ("Modality",)) if path.is_file() else None
    except OSError:
        return False
    return told is not None and told.get("Modality") in STRUCTURES


def read_structures(path: Path, grid: Volume | None) -> StructureSet:
    """Read an RTSTRUCT or a SEG.

    Args:
        path: for which `holds_structures` is true.
        grid: of the CT. Contours need one to be filled on; a SEG has a grid of its own, which this one replaces where
            it is a part of the same lattice (SEG leave out empty slices).

    Raises:
        MaisiError: no grid for contours, no structure with voxels on it, or the file is damaged.
    """
    told = read_dicom(path, ("Modality", *_CONTOURS, *_SEGMENTS), convert=False)
    try:
        with quiet():
            found = _contours(path, told, grid) if told and told.Modality == "RTSTRUCT" else _segments(path, told, grid)
    except MaisiError:
        raise
    except Exception as error:  # what is not as the standard has it shows in many ways
        if from_the_system(error):
            raise
        told_by = type(error).__name__
        raise MaisiError(f"{path} is damaged, or not as DICOM has it ({told_by}); export it again.") from error
    if not found.pieces and not found.faults:
        raise MaisiError(f"{path} holds no structure with voxels in it on this grid; is it of this CT?")
    return replace(found, names=_different(found.names), frames_of_reference=_spaces(told))


def _spaces(told: Any) -> frozenset[str]:
    said = [told.get("FrameOfReferenceUID")]
    for of in (*(told.get("ReferencedFrameOfReferenceSequence") or ()), *(told.get("StructureSetROISequence") or ())):
        said += [of.get("FrameOfReferenceUID"), of.get("ReferencedFrameOfReferenceUID")]
    return frozenset(str(uid) for uid in said if uid)


def _different(names: Mapping[int, str]) -> dict[int, str]:
    """The names; of those that several structures have, all but the first get a number."""
    used: set[str] = set()
    made: dict[int, str] = {}
    for number, name in names.items():
        count, called = 1, name or "unnamed"
        while called.lower() in used:
            count += 1
            called = f"{name or 'unnamed'} {count}"
        used.add(called.lower())
        made[number] = called
    return made


# --- contours


def _contours(path: Path, told: Any, grid: Volume | None) -> StructureSet:
    if grid is None:
        raise MaisiError(f"{path} holds contours, which are filled on the grid of a CT; give it with --ct.")
    numbers = {int(roi.ROINumber): n for n, roi in enumerate(told.StructureSetROISequence, 1)}
    names = {n: str(roi.get("ROIName") or "").strip() for n, roi in enumerate(told.StructureSetROISequence, 1)}
    to_index = np.linalg.inv(grid.affine) @ RAS_TO_LPS
    outlines: dict[int, list[Points]] = {}
    for roi in told.get("ROIContourSequence") or ():
        number = numbers.get(int(roi.ReferencedROINumber))
        if number is not None:
            drawn = [_outline(c, to_index) for c in roi.get("ContourSequence") or () if _is_closed(c)]
            outlines.setdefault(number, []).extend(outline for outline in drawn if len(outline) >= 3)
    pieces: dict[int, Piece] = {}
    faults: dict[int, str] = {}
    for number, drawn in outlines.items():
        try:
            piece = _filled(drawn, grid.shape)
        except _NotOnSlicesError:
            faults[number] = f"{path}: '{names[number]}' was not drawn on the slices of this CT; give the one it was."
            continue
        if piece is not None:
            pieces[number] = piece
    return StructureSet(names, pieces, grid.shape, grid.affine, faults)


class _NotOnSlicesError(Exception):
    """Contours lie between the slices of a grid, or across them."""


def _is_closed(contour: Any) -> bool:
    return str(contour.get("ContourGeometricType") or _CLOSED[0]) in _CLOSED


def _outline(contour: Any, to_index: NDArray[Any]) -> Points:
    """A contour's points as indices of the grid, (n, 3).

    Numbers are read from the bytes: a contour of 64 KB comes as bytes anyway (its own kind of value cannot be as long),
    and a large file has millions of them.
    """
    element = contour.get_item("ContourData")
    value = b"" if element is None else element.value
    if isinstance(value, (bytes, bytearray)):
        numbers = np.array([float(part) for part in bytes(value).strip(b" \0").split(b"\\") if part.strip()])
    else:
        numbers = np.array([float(part) for part in value or ()])
    points = numbers.reshape(-1, 3)
    if not np.isfinite(points).all():
        raise ValueError("a contour has points without a place")
    return np.asarray(points @ to_index[:3, :3].T + to_index[:3, 3], np.float64)


def _filled(outlines: Sequence[Points], shape: tuple[int, ...]) -> Piece | None:
    """Fill outlines; None where there is nothing on the grid.

    Raises:
        _NotOnSlicesError: so.
    """
    if not outlines:
        return None
    axis = int(np.sum([np.ptp(outline, axis=0) for outline in outlines], axis=0).argmin())
    heights = np.array([outline[:, axis].mean() for outline in outlines])
    slices = np.rint(heights).astype(int)
    flat = np.array([np.ptp(outline[:, axis]) < 2 * _OFF_PLANE for outline in outlines])
    on_slice = flat & (np.abs(heights - slices) <= _OFF_PLANE)
    if not flat.all() or not on_slice.any():
        raise _NotOnSlicesError
    plane = [a for a in range(3) if a != axis]
    points = np.concatenate(outlines)[:, plane]
    low = np.clip(np.floor(points.min(0)), 0, None).astype(int)
    high = np.minimum(np.ceil(points.max(0)) + 1, [shape[a] for a in plane]).astype(int)
    within = on_slice & (slices >= 0) & (slices < shape[axis])
    if not within.any() or (high <= low).any():
        return None
    first, last = int(slices[within].min()), int(slices[within].max())
    inside = np.zeros((last - first + 1, *(high - low)), bool)
    for z in np.unique(slices[within]):
        here = np.flatnonzero(within & (slices == z))
        nearest = np.abs(heights[here] - z).min()
        # of several planes within one slice, as contours of finer slices have them, the one in its middle
        chosen = [outlines[int(n)][:, plane] - low for n in here if abs(heights[n] - z) <= nearest + 0.01]
        inside[z - first] = _nested(chosen, (int(high[0] - low[0]), int(high[1] - low[1])))
    if not inside.any():
        return None
    _fill_between(inside)
    start = [0, 0, 0]
    start[axis], start[plane[0]], start[plane[1]] = first, int(low[0]), int(low[1])
    return Piece((start[0], start[1], start[2]), np.moveaxis(inside, 0, axis))


def _nested(outlines: Sequence[Points], shape: tuple[int, int]) -> Bools:
    """Contours of one plane together: what lies wholly within another is a hole, and so on inward; others unite."""
    masks = sorted((inside_of(outline, shape) for outline in outlines), key=np.count_nonzero, reverse=True)
    whole = np.zeros(shape, bool)
    seen: list[Bools] = []
    for mask in masks:
        if not mask.any() or any(np.array_equal(mask, other) for other in seen):
            continue  # drawn twice
        seen.append(mask)
        if whole[mask].all():
            whole &= ~mask
        else:
            whole |= mask
    return whole


def inside_of(outline: Points, shape: tuple[int, int]) -> Bools:
    """Pixels whose centres a closed outline goes around an odd number of times.

    Each edge turns over all pixels beyond it in the rows that it crosses; of an edge through a centre, the pixel
    belongs to what comes after, so that of two areas with a common edge one has it.

    Args:
        outline: (n, 2), in indices.
        shape: rows and columns.
    """
    (rows, columns), (next_rows, next_columns) = outline.T, np.roll(outline, -1, 0).T
    first = np.clip(np.ceil(np.minimum(rows, next_rows)), 0, shape[0]).astype(int)
    end = np.clip(np.ceil(np.maximum(rows, next_rows)), 0, shape[0]).astype(int)
    edges = np.repeat(np.arange(len(outline)), end - first)
    before = np.cumsum(end - first) - (end - first)
    crossed = np.arange(len(edges)) - before[edges] + first[edges]
    share = (crossed - rows[edges]) / (next_rows - rows)[edges]
    at = columns[edges] + share * (next_columns - columns)[edges]
    turned = np.zeros((shape[0], shape[1] + 1), np.int64)
    np.add.at(turned, (crossed, np.clip(np.ceil(at), 0, shape[1]).astype(int)), 1)
    odd: Bools = np.cumsum(turned[:, :-1], axis=1) % 2 == 1
    return odd


def _fill_between(inside: Bools) -> None:
    """Fill slices between those drawn, where it is the rule that some were left out; (slices, ., .), in place."""
    drawn = np.flatnonzero(inside.any((1, 2)))
    gaps = np.diff(drawn)
    usual = int(np.median(gaps)) if gaps.size >= 2 else 1
    if usual not in _LEFT_OUT or np.mean(gaps == usual) <= 0.5:
        return
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


def _segments(path: Path, told: Any, grid: Volume | None) -> StructureSet:
    """Put each frame where it lies; frames of empty slices are usually left out."""
    frames = list(frames_of(path, told))
    shape, affine, slices = _own_grid(path, frames, grid)
    StoredHeader(path, shape, np.dtype(np.uint8), affine, offset=0, compressed=True).check_memory()
    segments = [segment for segment in told.SegmentSequence if int(segment.SegmentNumber)]  # 0 is background
    numbers = [int(segment.SegmentNumber) for segment in segments]
    names = {n: str(segment.get("SegmentLabel") or "").strip() for n, segment in enumerate(segments, 1)}
    held: dict[int, list[tuple[int, Bools]]] = {n: [] for n in names}
    for index, (pixels, z) in enumerate(zip(_pixels(path), slices, strict=True)):
        for n, inside in _in_frame(told, index, pixels, numbers):
            if inside.any():
                held[n].append((int(z), np.ascontiguousarray(inside.T)))
    pieces = {n: _joined(parts) for n, parts in held.items() if parts}
    found = StructureSet(names, pieces, shape, affine)
    return found if grid is None else _on_grid(found, grid)


def _pixels(path: Path) -> Iterator[Array]:
    from pydicom.pixels.utils import iter_pixels

    yield from iter_pixels(path)


def _in_frame(told: Any, index: int, pixels: Array, numbers: Sequence[int]) -> Iterator[tuple[int, Bools]]:
    """The structures that a frame shows: all in one, or the one that it is of."""
    if told.get("SegmentationType") == "LABELMAP":
        for value in np.unique(pixels):
            if int(value) in numbers:
                yield numbers.index(int(value)) + 1, pixels == value
        return
    group, shared = (
        told.PerFrameFunctionalGroupsSequence[index],
        (told.get("SharedFunctionalGroupsSequence") or [{}])[0],
    )
    said = group.get("SegmentIdentificationSequence") or shared.get("SegmentIdentificationSequence")
    least = 1.0
    if told.get("SegmentationType") == "FRACTIONAL":
        least = float(told.get("MaximumFractionalValue") or 255) / 2
    yield numbers.index(int(said[0].ReferencedSegmentNumber)) + 1, pixels >= least


def _own_grid(
    path: Path, frames: Sequence[Frame], grid: Volume | None
) -> tuple[tuple[int, int, int], NDArray[np.float64], NDArray[Any]]:
    """Shape and affine (RAS+) of the slices that frames lie on, and the slice of each frame.

    How far apart slices are the CT's grid says, if it is the same lattice; else the frames do.
    """
    first = frames[0]
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(across, down)
    heights = np.array([np.dot(frame.position, normal) for frame in frames])
    lowest = frames[int(heights.argmin())]
    rising = np.unique(np.round(heights - heights.min(), 3))
    between_rows, between_columns = first.spacing_mm

    def affine_of(step: float) -> NDArray[np.float64]:
        affine = np.eye(4)
        affine[:3] = np.stack([across * between_columns, down * between_rows, normal * step, lowest.position], axis=1)
        return RAS_TO_LPS @ affine

    shape = (first.shape[1], first.shape[0], 1)
    steps = [float(np.diff(rising).min())] if len(rising) > 1 else []
    steps.append(first.thickness_mm or 1.0)
    if grid is not None and _lattice(shape, affine_of(_step_of(grid, normal)), grid) is not None:
        steps.insert(0, _step_of(grid, normal))
    step = next((s for s in steps if s > 0 and _on_lattice(rising, s)), None)
    if step is None:
        raise MaisiError(f"{path}: the slices of its segments are not evenly spaced; export it on the CT's slices.")
    slices = np.rint((heights - heights.min()) / step).astype(int)
    if slices.max() >= _MOST_SLICES:
        raise MaisiError(f"{path}: its segments lie on {slices.max() + 1:,} slices; the file is damaged.")
    return (*shape[:2], int(slices.max()) + 1), affine_of(step), slices


def _step_of(grid: Volume, normal: NDArray[Any]) -> float:
    """How far apart the slices of a grid are along a direction (LPS)."""
    axes = (RAS_TO_LPS[:3, :3] @ grid.affine[:3, :3]) / np.array(grid.spacing_mm)
    return float(grid.spacing_mm[int(np.abs(normal @ axes).argmax())])


def _on_lattice(rising: NDArray[Any], step: float) -> bool:
    places = rising / step
    return bool(np.abs(places - np.rint(places)).max() <= _OFF_LATTICE) and len(np.unique(np.rint(places))) == len(
        rising
    )


def _joined(parts: Sequence[tuple[int, Bools]]) -> Piece:
    """One box about the slices of a structure."""
    first, last = min(z for z, _ in parts), max(z for z, _ in parts)
    anywhere = np.any([inside for _, inside in parts], axis=0)
    x, y = ndimage.find_objects(anywhere.astype(np.uint8))[0]
    box = np.zeros((x.stop - x.start, y.stop - y.start, last - first + 1), bool)
    for z, inside in parts:
        box[:, :, z - first] |= inside[x, y]
    return Piece((x.start, y.start, first), box)


def _on_grid(found: StructureSet, grid: Volume) -> StructureSet:
    """The structures on a grid of which theirs is a part, moved by whole voxels; else as they are."""
    lattice = _lattice(found.shape, found.affine, grid)
    if lattice is None:
        return found
    turn, shift = lattice
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
    return StructureSet(found.names, pieces, grid.shape, grid.affine, found.faults)


def _lattice(
    shape: tuple[int, int, int], affine: NDArray[np.float64], grid: Volume
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """How whole voxels move onto a grid: axes turned, and a shift; None where they lie between its voxels."""
    moved = np.linalg.inv(grid.affine) @ affine
    turn, shift = np.rint(moved[:3, :3]), np.rint(moved[:3, 3])
    one_each = (np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all()
    off = np.abs((moved[:3, :3] - turn) @ np.array(shape)).max()
    if not one_each or off > _OFF_LATTICE or np.abs(moved[:3, 3] - shift).max() > _OFF_LATTICE:
        return None
    return turn, shift
