"""Tumours in label maps: grown where a wish says, or a real one deformed. Knows no image and no network.

A tumour is the set of host voxels that lie lowest in a field: an ellipsoid's norm around its centre, made irregular by
smooth noise. The level is the one that gives the volume asked for, so a tumour has its size whatever it grows around,
is connected, and never leaves its host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import TUMORS, label_name
from maisi.data.augment import SpatialRanges, apply, draw
from maisi.data.label_maps import rest_of
from maisi.data.preprocess import wider_box
from maisi.errors import MaisiError
from maisi.tumors import KINDS, TumorKind, TumorWish
from maisi.volume import Volume

Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]
Slices = tuple[slice, ...]

TRIES = 24
"""Centres tried for one tumour, and draws for one deformation, before it is given up."""

DEPTH = 0.7
"""Share of its radius by which a tumour's centre lies inside its host at least: flatter hosts hold smaller tumours."""

TOLERANCE = 0.03
"""Of the volume, where voxels are small enough for that."""

KEPT = 0.8
"""Least share of its volume that a deformed tumour keeps (paper's augmentation of real tumour masks)."""

ASTRAY_MM = 10.0
"""A place that lies farther than a tumour's diameter and this from where it could grow is a mistake."""

SEEN_VOXELS = 3.0
"""Across a tumour, at least, for it to be seen."""

_TOUCHING = np.ones((3, 3, 3), np.bool_)
"""Voxels that share a corner touch."""

_NEAR_MM = 20.0
"""Around a tumour hosts are looked for within this, then four times as far, and so on."""


@dataclass(frozen=True)
class PlacedTumor:
    """One tumour that was put into a label map.

    Attributes:
        kind: key of `maisi.tumors.KINDS`.
        asked_mm: the diameter drawn from the wish.
        diameter_mm: equivalent diameter of what is there: that of the ball with its volume.
        centre_mm: its centre of mass in the world.
        volume_ml: its volume.
    """

    kind: str
    asked_mm: float
    diameter_mm: float
    centre_mm: tuple[float, float, float]
    volume_ml: float


def equivalent_diameter_mm(voxels: int, spacing_mm: Spacing) -> float:
    """Diameter of the ball that has the volume of so many voxels."""
    return float((6 * voxels * math.prod(spacing_mm) / math.pi) ** (1 / 3))


def grow_tumors(
    labels: Volume, wishes: Sequence[TumorWish], rng: np.random.Generator, anywhere: Mask | None = None
) -> tuple[Volume, tuple[PlacedTumor, ...]]:
    """Put tumours into a label map, one wish after the other, never over each other.

    Args:
        labels: uint8, any orientation, size and spacing.
        wishes: what to grow.
        rng: the only source of chance.
        anywhere: voxels (X, Y, Z) that count as a host of every kind beside its own: for training where organs have no
            labels.

    Raises:
        MaisiError: a host is not in the map, or too small (the message says what fits), or there is no room left; or a
            place lies far from every host.
    """
    array = labels.array.copy()
    placed = []
    for wish in wishes:
        kind = KINDS[wish.kind]
        for _ in range(wish.count):
            low, high = wish.diameter_mm or kind.diameter_mm
            diameter = float(rng.uniform(low, high))
            fixed = wish.diameter_mm is not None
            found = _hosts(array, kind, anywhere)
            inside, box, reached = _grow(found, labels, kind, diameter, fixed, wish.centre_mm, rng)
            array[box][inside] = kind.id
            placed.append(_described(kind, reached, inside, box, labels))
    return labels.with_array(array), tuple(placed)


def small_tumors(placed: Sequence[PlacedTumor], spacing_mm: Spacing) -> list[str]:
    """A sentence where tumours are so small for their voxels that little can be seen of them."""
    smallest = min((tumor.asked_mm for tumor in placed), default=math.inf)
    if smallest >= SEEN_VOXELS * max(spacing_mm):
        return []
    return [
        f"A tumour of {smallest:.3g} mm has less than {SEEN_VOXELS:g} voxels of {max(spacing_mm):.3g} mm across; "
        f"little is seen of it, and voxels of {smallest / SEEN_VOXELS:.2g} mm would do."
    ]


def deform_tumor(
    labels: Labels, tumor: int, hosts: Sequence[int], spacing_mm: Spacing, rng: np.random.Generator
) -> Labels:
    """Deform each tumour of one id inside its hosts: turned, zoomed, bent, closed; (X, Y, Z) in and out.

    What a tumour leaves becomes the nearest host. At least `KEPT` of its volume stays, in one piece that touches no
    other tumour; of `TRIES` draws the first that does so is taken, and one that none suits stays as it is.

    Raises:
        MaisiError: there is no such tumour, or no draw fits the host of any.
    """
    pieces, count = ndimage.label(labels == tumor, _TOUCHING)
    if not count:
        raise MaisiError(f"The label map has no {label_name(tumor)} to deform; give one that has.")
    result = labels.copy()
    boxes = ndimage.find_objects(pieces)
    rest = rest_of(labels)
    deformed = [
        _deform_piece(result, pieces[box] == n, box, hosts, rest, spacing_mm, rng) for n, box in enumerate(boxes, 1)
    ]
    if not any(deformed):
        raise MaisiError(f"The {label_name(tumor)} fits its host in none of {TRIES} deformations; leave it as it is.")
    return result


def _deform_piece(
    labels: Labels,
    own: Mask,
    box: Slices,
    hosts: Sequence[int],
    rest: int,
    spacing_mm: Spacing,
    rng: np.random.Generator,
) -> bool:
    """Deform one tumour (`own` is where it lies in its box) in `labels`; False where no draw suits.

    What it leaves becomes the nearest host, or the `rest` where the map has none.
    """
    wide = wider_box(box, labels.shape, 20.0, spacing_mm)
    seen = labels[wide]
    before = np.zeros(seen.shape, np.bool_)
    before[tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, wide, strict=True))] = own
    tumor = seen[before][0]
    others = np.isin(seen, list(TUMORS)) & ~before
    room = (np.isin(seen, hosts) | before) & ~ndimage.binary_dilation(others, _TOUCHING)
    ranges = SpatialRanges(
        rotate_degrees=(25.0, 25.0, 25.0), zoom=(0.9, 1.2), zoom_axes=(0.15,) * 3, elastic_mm=4.0, elastic_grid_mm=15.0
    )
    for _ in range(TRIES):
        parameters = draw(rng, ranges, seen.shape, spacing_mm)
        moved = apply(before.astype(np.uint8), parameters, order=0) > 0
        moved = ndimage.binary_closing(np.pad(moved, 2), iterations=2)[2:-2, 2:-2, 2:-2] & room
        if moved.sum() >= KEPT * before.sum() and ndimage.label(moved, _TOUCHING)[1] == 1:
            labels[wide] = with_hosts(seen, before, hosts, spacing_mm, rest)
            labels[wide][moved] = tumor
            return True
    return False


def deform_tumors(labels: Volume, rng: np.random.Generator) -> Volume:
    """Deform the tumours of every kind that is there, see `deform_tumor`.

    Raises:
        MaisiError: there are none, or no draw fits a host.
    """
    array = np.asarray(labels.array)
    present = [tumor for tumor in TUMORS if (array == tumor).any()]
    if not present:
        raise MaisiError("The label map has no tumours to deform; give one that has.")
    for tumor in present:
        array = deform_tumor(array, tumor, TUMORS[tumor], labels.spacing_mm, rng)
    return labels.with_array(array)


def with_hosts(labels: Labels, inside: Mask, hosts: Sequence[int], spacing_mm: Spacing, otherwise: int) -> Labels:
    """Replace what is `inside` by the nearest of the hosts, in mm; by `otherwise` where the map has none. (X, Y, Z)."""
    result, margin = labels.copy(), _NEAR_MM
    found = ndimage.find_objects(inside.view(np.uint8))
    whole = tuple(slice(0, n) for n in labels.shape)
    while found:
        box = wider_box(found[0], labels.shape, margin, spacing_mm)
        host, here = np.isin(labels[box], hosts), inside[box]
        if host.any():
            far, nearest = ndimage.distance_transform_edt(~host, sampling=spacing_mm, return_indices=True)
            # no host outside the box is nearer than its margin
            if box == whole or far[here].max() <= margin:
                result[box][here] = labels[box][tuple(axis[here] for axis in nearest)]
                break
        elif box == whole:
            result[inside] = otherwise
            break
        margin *= 4
    return result


def _fits(depth: NDArray[np.float32]) -> float:
    return 2 * float(depth.max()) / DEPTH


def _grow(
    found: tuple[Slices, NDArray[np.int16]] | None,
    grid: Volume,
    kind: TumorKind,
    diameter: float,
    fixed: bool,
    centre_mm: tuple[float, float, float] | None,
    rng: np.random.Generator,
) -> tuple[Mask, Slices, float]:
    """Voxels (of a box) of one tumour, the box, and the diameter grown; smaller than drawn unless it is `fixed`."""
    if found is None:
        names = ", ".join(label_name(host) for host in kind.hosts[:3]) + (" ..." if len(kind.hosts) > 3 else "")
        raise MaisiError(
            f"A {kind.name} tumour grows in {names}, which the mask does not hold; "
            "give a mask that does, or another kind."
        )
    if centre_mm is not None:
        _require_inside(grid, centre_mm)
    box, organs = found
    spacing = grid.spacing_mm
    depth = np.zeros(organs.shape, np.float32)
    for organ, place in enumerate(ndimage.find_objects(organs), start=1):
        if place is not None:
            around = tuple(slice(max(0, p.start - 1), p.stop + 1) for p in place)
            own = organs[around] == organ
            depth[around][own] = _depth(own, spacing)[own]
    fits = _fits(depth)
    if not fixed:
        diameter = min(diameter, 0.9 * fits)
    if diameter > fits:
        raise MaisiError(
            f"The mask holds {kind.name} tumours of up to {math.floor(fits)} mm, not of {diameter:.3g} mm; "
            f"ask for at most {math.floor(fits)} mm."
        )
    voxels = round(math.pi / 6 * diameter**3 / math.prod(spacing))
    if voxels < 1:
        raise MaisiError(
            f"A tumour of {diameter:.3g} mm is smaller than a voxel of {spacing[0]:.3g} x {spacing[1]:.3g} x "
            f"{spacing[2]:.3g} mm; ask for a larger one or a finer mask."
        )
    centres = _centres(depth, DEPTH * diameter / 2, grid, box, centre_mm, rng)
    if centre_mm is not None:
        _require_near(grid, box, centres[0], centre_mm, kind, diameter)
    for centre in centres:
        part, level = _field(organs.shape, centre, diameter, kind, spacing, rng)
        inside = _lowest(
            level, organs[part] == organs[centre], tuple(c - p.start for c, p in zip(centre, part, strict=True)), voxels
        )
        if inside is not None:
            offset = tuple(slice(p.start + b.start, p.stop + b.start) for p, b in zip(part, box, strict=True))
            return inside, offset, diameter
    raise MaisiError(
        f"No room is left for a {kind.name} tumour of {diameter:.3g} mm; "
        "ask for fewer or smaller ones, or another place."
    )


def _require_inside(grid: Volume, centre_mm: tuple[float, float, float]) -> None:
    """Refuse a place that the mask does not show.

    Raises:
        MaisiError: so; it says how far the mask reaches.
    """
    index = np.linalg.solve(grid.affine, np.array([*centre_mm, 1.0]))[:3]
    if ((index < -0.5) | (index > np.array(grid.shape) - 0.5)).any():
        corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(grid.shape) - 1)
        world = corners @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        reach = ", ".join(f"{low:.0f} to {high:.0f}" for low, high in zip(world.min(0), world.max(0), strict=True))
        place = ",".join(f"{v:g}" for v in centre_mm)
        raise MaisiError(f"The place @{place} lies outside the mask, which reaches from {reach} mm; give one inside.")


def _require_near(
    grid: Volume,
    box: Slices,
    centre: tuple[int, ...],
    centre_mm: tuple[float, float, float],
    kind: TumorKind,
    diameter: float,
) -> None:
    """Refuse a place that is nowhere near where such a tumour could grow.

    Raises:
        MaisiError: so; it says where the nearest one is.
    """
    index = [c + part.start for c, part in zip(centre, box, strict=True)]
    there = grid.affine[:3, :3] @ index + grid.affine[:3, 3]
    distance = float(np.linalg.norm(there - np.array(centre_mm)))
    if distance > diameter + ASTRAY_MM:
        place, nearest = (",".join(f"{v:.0f}" for v in point) for point in (centre_mm, there))
        raise MaisiError(
            f"From the place @{place} it is {distance:.0f} mm to where a {kind.name} tumour of {diameter:.3g} mm could "
            f"grow, @{nearest}; places are mm in the mask's world, RAS+ (x to the patient's right)."
        )


def _hosts(array: Labels, kind: TumorKind, anywhere: Mask | None = None) -> tuple[Slices, NDArray[np.int16]] | None:
    """The smallest box around the hosts with a layer of other voxels around it, and which host is where in it.

    Hosts are numbered from 1, all with the same number where a tumour may grow from one into the other; 0 is none of
    them, nor is what touches a tumour of the kind.
    """
    hosts = kind.hosts
    found = [box for id, box in enumerate(ndimage.find_objects(array), start=1) if id in hosts and box is not None]
    free = None
    if anywhere is not None:
        free = anywhere & ~np.isin(array, list(TUMORS))
        found += [box for box in ndimage.find_objects(free.view(np.uint8)) if box is not None]
    if not found:
        return None
    box = tuple(
        slice(max(0, min(b[a].start for b in found) - 1), min(n, max(b[a].stop for b in found) + 1))
        for a, n in enumerate(array.shape)
    )
    seen = array[box]
    inside = np.isin(seen, hosts) if free is None else np.isin(seen, hosts) | free[box]
    for there in ndimage.find_objects((seen == kind.id).view(np.uint8)):
        around = tuple(slice(max(0, p.start - 1), p.stop + 1) for p in there)
        inside[around] &= ~ndimage.binary_dilation(seen[around] == kind.id, _TOUCHING)
    if kind.apart and free is None:
        return box, np.where(inside, seen, 0).astype(np.int16)
    return box, inside.astype(np.int16)


def _depth(host: Mask, spacing: Spacing) -> NDArray[np.float32]:
    """Distance of each host voxel to the nearest place outside, mm; 0 outside. The map's edge is no outside."""
    if host.all():
        return np.full(host.shape, max(n * s for n, s in zip(host.shape, spacing, strict=True)) / 2, np.float32)
    return np.asarray(ndimage.distance_transform_edt(host, sampling=spacing), dtype=np.float32)


def _centres(
    depth: NDArray[np.float32],
    least: float,
    grid: Volume,
    box: Slices,
    centre_mm: tuple[float, float, float] | None,
    rng: np.random.Generator,
) -> list[tuple[int, ...]]:
    """Voxels of the box that may be a centre: at random, or the nearest to a place first."""
    allowed = np.argwhere(depth >= min(least, float(depth.max())))
    if centre_mm is None:
        chosen = allowed[rng.permutation(len(allowed))[:TRIES]]
    else:
        corner = np.array([part.start for part in box])
        world = (allowed + corner) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        distance = np.linalg.norm(world - np.array(centre_mm), axis=1)
        chosen = allowed[np.argsort(distance, kind="stable")[:TRIES]]
    return [tuple(int(i) for i in row) for row in chosen]


def _field(
    shape: tuple[int, ...],
    centre: tuple[int, ...],
    diameter: float,
    kind: TumorKind,
    spacing: Spacing,
    rng: np.random.Generator,
) -> tuple[Slices, NDArray[np.float32]]:
    """A box around the centre and the field in it: 1 on the surface of an ellipsoid of the diameter, roughened."""
    axes = rng.uniform(1.0, kind.elongation, 3)
    axes *= (diameter / 2) / np.prod(axes) ** (1 / 3)
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    roughness = rng.uniform(*kind.roughness)
    reach = 2.0 * float(axes.max()) + 2 * max(spacing)
    middle = tuple(slice(c, c + 1) for c in centre)
    part = wider_box(middle, shape, reach, spacing)
    steps = [(np.arange(p.start, p.stop) - c) * s for p, c, s in zip(part, centre, spacing, strict=True)]
    places = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1) @ turn
    level = np.linalg.norm(places / axes, axis=-1)
    coarse, fine = (smooth_noise(level.shape, diameter / share, spacing, rng) for share in (4, 9))
    noise = coarse + 0.5 * fine
    return part, (level * np.exp(roughness * noise)).astype(np.float32)


def smooth_noise(
    shape: Sequence[int], scale_mm: float, spacing: Spacing, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Smooth noise of standard deviation 1, correlated over `scale_mm`."""
    smooth = ndimage.gaussian_filter(rng.standard_normal(tuple(shape)), [scale_mm / s for s in spacing], mode="wrap")
    deviation = float(smooth.std())
    return smooth / deviation if deviation > 1e-12 else smooth


def _lowest(level: NDArray[np.float32], host: Mask, centre: tuple[int, ...], voxels: int) -> Mask | None:
    """The connected set around the centre, below some level in the host, that has (nearly) so many voxels."""
    values = np.sort(level[host])
    if len(values) < voxels:
        return None
    low, high = voxels - 1, len(values) - 1
    best: Mask | None = None
    while low <= high:
        middle = (low + high) // 2
        inside = _connected(host & (level <= values[middle]), centre)
        count = int(inside.sum())
        if best is None or abs(count - voxels) < abs(int(best.sum()) - voxels):
            best = inside
        if count == voxels:
            break
        low, high = (middle + 1, high) if count < voxels else (low, middle - 1)
    if best is None or abs(int(best.sum()) - voxels) > max(TOLERANCE * voxels, 0.5):
        return None
    return best


def _connected(inside: Mask, centre: tuple[int, ...]) -> Mask:
    parts, _ = ndimage.label(inside)
    own = parts[centre]
    return np.asarray(parts == own) if own else np.zeros_like(inside)


def _described(kind: TumorKind, asked: float, inside: Mask, box: Slices, grid: Volume) -> PlacedTumor:
    corner = np.array([part.start for part in box])
    middle = grid.affine[:3, :3] @ (np.argwhere(inside).mean(axis=0) + corner) + grid.affine[:3, 3]
    count = int(inside.sum())
    volume = count * math.prod(grid.spacing_mm) / 1000
    x, y, z = (round(float(v), 2) for v in middle)
    reached = equivalent_diameter_mm(count, grid.spacing_mm)
    return PlacedTumor(kind.name, round(asked, 3), round(reached, 3), (x, y, z), round(volume, 4))
