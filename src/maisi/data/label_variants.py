"""Other names for the parts of a label map, for training: rules find whole lungs and unnamed bone, users name them.

The names given are plausible, not true: a network that follows label maps should learn that any lobe is lung and any
bone is bone. Knows no image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import LUNGS, SKELETON, UNNAMED_BONE

Labels = NDArray[np.uint8]

BONE_SLABS = 12
"""Unnamed bone is named by that many slabs along z, in three columns from right to left."""


def vary_names(labels: Labels, rng: np.random.Generator) -> Labels:
    """Split whole lungs (28, 32) into lobes and name unnamed bone (133); RAS+ (X, Y, Z) in and out.

    Lungs that have more than one lobe's label already stay as they are.
    """
    tilt, heights, names = rng.uniform(0.2, 1.2), np.sort(rng.uniform(0.25, 0.75, 3)), rng.permutation(SKELETON)
    result = labels.copy()
    left_upper, left_lower, right_upper, right_middle, right_lower = LUNGS
    if not np.isin(labels, (left_lower, right_upper, right_middle)).any():
        _split(result, labels == left_upper, tilt, heights[1:2], (left_lower, left_upper))
        _split(result, labels == right_lower, tilt, heights[[0, 2]], (right_lower, right_middle, right_upper))
    bone = labels == UNNAMED_BONE
    if bone.any():
        x, _, z = np.nonzero(bone)
        column = 3 * x // labels.shape[0]
        slab = BONE_SLABS * z // labels.shape[2]
        result[bone] = names[(column * BONE_SLABS + slab) % len(names)]
    return result


def _split(
    result: Labels, lung: NDArray[np.bool_], tilt: float, levels: NDArray[np.float64], ids: tuple[int, ...]
) -> None:
    """Cut a lung by planes that fall to the front, as its fissures do, at shares `levels` of its height.

    `ids`: from the lowest part (and the one furthest to the back) up.
    """
    if not lung.any():
        return
    _, y, z = np.nonzero(lung)
    height = (z - z.min()) / max(np.ptp(z), 1) + tilt * ((y - y.min()) / max(np.ptp(y), 1) - 0.5)
    height = (height - height.min()) / max(np.ptp(height), 1e-6)
    result[lung] = np.array(ids, dtype=np.uint8)[np.digitize(height, levels)]
