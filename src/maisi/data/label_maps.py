"""Masks of other segmenters into maisi's ids, several masks into one, and the check of a mask in our ids.

A table is a JSON file beside this module: `{"note", "map": {"class name": {"id": theirs, "to": ours}},
"dropped": {"class name": reason}}`. Every class of the foreign vocabulary stands in one of the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import BODY, KNOWN_IDS
from maisi.errors import MaisiError
from maisi.io.nifti import read_labels
from maisi.volume import Volume

Array = NDArray[Any]
Mask = NDArray[np.uint8]

VOCABULARIES = ("maisi", "totalsegmentator", "openkbp")
"""Vocabularies a mask may come in; "maisi" is this package's own."""


@lru_cache
def label_table(vocabulary: str) -> Mapping[int, int]:
    """Return their id -> our id for one of `VOCABULARIES`; 0 is 0; a class that is dropped goes to 0.

    Raises:
        MaisiError: no such vocabulary.
    """
    if vocabulary not in VOCABULARIES:
        raise MaisiError(f"Unknown label vocabulary '{vocabulary}'; choose from {', '.join(VOCABULARIES)}.")
    if vocabulary == "maisi":
        return MappingProxyType({id: id for id in sorted(KNOWN_IDS)})
    text = resources.files("maisi.data").joinpath(f"{vocabulary}_labels.json").read_text(encoding="utf-8")
    table = json.loads(text)
    pairs = {int(entry["id"]): int(entry["to"]) for entry in table["map"].values()}
    dropped = {int(entry["id"]): 0 for entry in table["dropped"].values()}
    return MappingProxyType({0: 0} | dict(sorted((pairs | dropped).items())))


def apply_map(labels: Array, table: Mapping[int, int]) -> Mask:
    """Translate a label array by a table (see `label_table`) into uint8 of the same shape.

    Raises:
        MaisiError: an id of the array is not in the table; nothing is dropped silently.
    """
    present = np.unique(labels)
    unknown = [int(id) for id in present if int(id) not in table]
    if unknown:
        raise MaisiError(f"The mask holds ids {unknown} that its vocabulary lacks; name the right vocabulary.")
    ours = np.array([table[int(id)] for id in present], dtype=np.uint8)
    return ours[np.searchsorted(present, labels)]


def merge(by_priority: Sequence[Array], body: Array | None = None) -> Mask:
    """Lay masks over each other: where an earlier one is 0 the next speaks; what is left of `body` is 200.

    Args:
        by_priority: masks in maisi's ids, all of one shape, the most trusted first: organs of a careful
            segmenter, then rule-based ones. A 200 in them claims a voxel only where nothing else does.
        body: where not 0, the envelope (as bool, or a mask in which any label means body).

    Raises:
        ValueError: no masks, or of different shapes.
    """
    if not by_priority or len({mask.shape for mask in by_priority}) != 1:
        raise ValueError("merge needs at least one mask, and all of the same shape")
    result = np.zeros(by_priority[0].shape, np.uint8)
    if body is not None:
        result[body != 0] = BODY
    for mask in by_priority:
        result[mask == BODY] = BODY
    for mask in reversed(by_priority):
        named = (mask != 0) & (mask != BODY)
        result[named] = mask[named]
    return result


def checked_mask(mask: Volume | Path | str) -> Volume:
    """Return a label map as uint8, on its own grid, every id known.

    Raises:
        MaisiError: the file cannot be read, the values are no label ids or have no meaning, or all are 0.
    """
    name = "The mask" if isinstance(mask, Volume) else str(mask)
    volume = mask if isinstance(mask, Volume) else read_labels(Path(mask))
    ids = np.unique(volume.array)
    if ids.dtype.kind not in "iub" and not np.array_equal(ids, np.rint(ids)):
        raise MaisiError(f"{name} holds fractions, so it is no label map; give one with whole numbers.")
    unknown = [int(i) for i in ids if int(i) not in KNOWN_IDS]
    if unknown:
        raise MaisiError(f"{name} holds ids without a meaning: {_some(unknown)}; map them to those of `maisi labels`.")
    if not ids.any():
        raise MaisiError(f"{name} is empty (all 0); give a label map with at least the body ({BODY}) in it.")
    return volume.with_array(volume.array.astype(np.uint8))


def _some(ids: list[int], most: int = 10) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(str(i) for i in ids[:most]) + more
