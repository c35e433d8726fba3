"""What can be measured on a CT with its label map: numbers, no verdicts. Knows no file, no threshold, no network.

`data.quality` compares these numbers with ranges.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.data.agreement import STRUCTURES, dice_by_group, joint_counts
from maisi.data.preprocess import resample
from maisi.data.segmentation import segment
from maisi.errors import MaisiError
from maisi.volume import Array, Volume

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]

AIR_HU = -800.0
"""Below this a voxel is air: the threshold of MAISI's body envelope."""

COMPARED_SPACING_MM = 4.0
"""Structures are looked for by rules at this spacing or a coarser one: 0.4 s for 128^3 voxels of 3 mm."""

NEIGHBOURS = 4  # planes on each side that a jump is compared with
FLOOR_HU = 2.0  # added to theirs: a jump of less is nothing, however smooth the image
PLANE = 256  # lines along each axis of a plane that are looked at


def select(labels: Array, ids: Collection[int]) -> Mask:
    """Return where a uint8 label map (any shape) has one of `ids`."""
    wanted = np.zeros(256, np.bool_)
    wanted[list(ids)] = True
    return wanted[labels]


def label_medians(image: Volume, labels: Volume, smallest_ml: float) -> dict[int, float]:
    """Return label id -> median HU inside the label; ids of which the map has less than `smallest_ml` are left out.

    Its outermost voxels hold its neighbours too and are left out, as those of tumours are, but where it has no others.

    Args:
        image: HU.
        labels: uint8, on the same grid.
        smallest_ml: as above.
    """
    found = {}
    least = max(1.0, 1000 * smallest_ml / float(np.prod(image.spacing_mm)))
    for id, box in enumerate(ndimage.find_objects(labels.array), start=1):
        inside = np.zeros((0, 0, 0), np.bool_) if box is None else labels.array[box] == id
        if np.count_nonzero(inside) >= least:
            core = ndimage.binary_erosion(inside)
            found[id] = float(np.median(image.array[box][core if core.any() else inside]))
    return found


def stray_share(ct: Volume, body: Mask, margin_voxels: int = 1) -> float:
    """Return the share of non-air voxels (over -800 HU) among those outside the body.

    Args:
        ct: HU.
        body: the body envelope on the grid of `ct`, as from `maisi.data.segmentation.segment(ct).array > 0`.
        margin_voxels: this many voxels around the envelope don't count: the skin's surface is blurred.

    Returns:
        0 to 1; 0 where the body fills the volume.
    """
    if body.shape != ct.shape:
        raise MaisiError(f"The mask has shape {body.shape}, the CT {ct.shape}; bring them to one grid.")
    size = 2 * margin_voxels + 1
    near = ndimage.maximum_filter(body.astype(np.uint8), size=size).astype(bool)
    outside = ct.array[~near]
    return float((outside > AIR_HU).mean()) if outside.size else 0.0


def plane_jumps(image: Array, axis: int, air_below: float | None = AIR_HU) -> NDArray[np.float64]:
    """Return how far three quarters of a plane's voxels differ from the next plane's, at least, along an axis.

    Large planes are looked at along every second, third, ... line only, `PLANE` of them at least.

    Args:
        image: (X, Y, Z), finite.
        axis: across the planes.
        air_below: pairs of voxels of which one lies below don't count, so that the outline of a body, or padding,
            makes no jump. None: all count.

    Returns:
        25th percentile of the absolute differences, one number fewer than planes; NaN where fewer than a tenth as many
        pairs count as in the fullest planes.
    """
    lines = tuple(slice(None, None, 1 if a == axis else max(1, n // PLANE)) for a, n in enumerate(image.shape))
    planes = np.moveaxis(image[lines], axis, 0)
    jumps, counts = np.full(len(planes) - 1, np.nan), np.zeros(len(planes) - 1)
    for i, (before, behind) in enumerate(pairwise(planes)):
        jump = np.abs(behind.astype(np.float32) - before)
        if air_below is not None:
            jump = jump[(before > air_below) & (behind > air_below)]
        if jump.size:
            jumps[i], counts[i] = np.percentile(jump, 25), jump.size
    jumps[counts < 0.1 * counts.max(initial=0)] = np.nan
    return jumps


def seam(image: Array, axis: int, air_below: float | None = AIR_HU) -> tuple[float, int]:
    """Return how many times larger than its neighbours' the largest jump between two planes is, and where.

    Volumes that are put together of parts show seams: one plane across which everything jumps. The surface of an organ
    may be as flat, but is blurred, so that the planes beside it jump too; a seam that is blended is not found.

    Args:
        image: (X, Y, Z), finite.
        axis: across the planes.
        air_below: as in `plane_jumps`.

    Returns:
        The ratio of the jump (see `plane_jumps`) to the larger of the two beside it, or to the median of the four
        before and the four behind where that is more; 2 HU are added to it, so that the smoothest image has no seams.
        And the index of the plane behind the jump. (0, 0) where there are too few planes to compare.
    """
    jumps = plane_jumps(image, axis, air_below)
    places = np.flatnonzero(np.isfinite(jumps))
    jumps = jumps[places]
    ratios = [jumps[i] / (_usual_jump(jumps, i) + FLOOR_HU) for i in range(1, len(jumps) - 1)]
    if not ratios:
        return 0.0, 0
    worst = int(np.argmax(ratios))
    return float(ratios[worst]), int(places[worst + 1]) + 1


def _usual_jump(jumps: NDArray[np.float64], at: int) -> float:
    around = np.r_[jumps[max(0, at - NEIGHBOURS) : at], jumps[at + 1 : at + 1 + NEIGHBOURS]]
    return float(max(jumps[at - 1], jumps[at + 1], np.median(around)))


def agreement(image: Volume, labels: Volume) -> dict[str, float]:
    """Return the Dice coefficients of lungs, skeleton and body, found in the image by rules, with the label map.

    Both are brought to `COMPARED_SPACING_MM` first. A structure that neither has is left out.

    Args:
        image: HU.
        labels: uint8, on the same grid.
    """
    x, y, z = (max(s, COMPARED_SPACING_MM) for s in image.spacing_mm)
    found = segment(resample(image, (x, y, z)))
    given = resample(labels, (x, y, z), order=0)
    dice = dice_by_group(joint_counts(found.array, given.array), STRUCTURES)
    return {name: value for name, value in dice.items() if value is not None}
