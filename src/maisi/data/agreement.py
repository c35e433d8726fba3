"""How far two label maps agree: the Dice coefficient, by label and by group of labels. Knows no image."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import ANY_BONE, LUNGS
from maisi.errors import MaisiError

Array = NDArray[Any]

STRUCTURES: Mapping[str, frozenset[int]] = MappingProxyType(
    {"lungs": frozenset(LUNGS), "skeleton": frozenset(ANY_BONE), "body": frozenset(range(1, 256))}
)
"""What `data.segmentation` finds by rules, as groups of ids: comparable whatever a mask names the parts."""


def joint_counts(a: Array, b: Array) -> NDArray[np.int64]:
    """Count voxels by the pair of ids they have in two label maps: (256, 256), rows for `a`, columns for `b`.

    Everything else here follows from this table, and the tables of several volumes add up.

    Raises:
        MaisiError: shapes differ, or values are not whole numbers from 0 to 255.
    """
    if a.shape != b.shape:
        raise MaisiError(f"Label maps of shapes {a.shape} and {b.shape} can't be compared; bring them to one grid.")
    counts = np.zeros(256 * 256, np.int64)
    for slab_a, slab_b in zip(a, b, strict=True):
        pairs = label_ids(slab_a) * 256 + label_ids(slab_b)
        counts += np.bincount(pairs.ravel(), minlength=counts.size)
    return counts.reshape(256, 256)


def dice_by_group(
    counts: NDArray[np.int64], groups: Mapping[str, Collection[int]] = STRUCTURES
) -> dict[str, float | None]:
    """Return the Dice coefficient of each group of ids taken as one structure, from `joint_counts`.

    None stands where neither map holds the structure: there is nothing to agree on.
    """
    return {name: _dice(counts, sorted(ids)) for name, ids in groups.items()}


def _dice(counts: NDArray[np.int64], ids: list[int]) -> float | None:
    size = int(counts[ids].sum() + counts[:, ids].sum())
    both = int(counts[np.ix_(ids, ids)].sum())
    return 2 * both / size if size else None


def label_ids(labels: Array) -> NDArray[np.int64]:
    """Return the labels as int64.

    Raises:
        MaisiError: values are not whole numbers from 0 to 255.
    """
    ids = labels.astype(np.int64)
    if (ids != labels).any() or ids.min() < 0 or ids.max() > 255:
        raise MaisiError("A label map holds values other than whole numbers from 0 to 255; give label ids.")
    return ids
