"""Masks of other segmenters into maisi's ids, several masks into one, and the check of a mask in our ids.

A table is a JSON file beside this module: `{"note", "map": {"class name": {"id": theirs, "to": ours}},
"dropped": {"class name": {"id": theirs, "reason": why}}}`. Every class of the foreign vocabulary stands in one of
the two. A user's table is shorter, see `custom_vocabulary`.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import BACKGROUND, BODY, CUSTOM_IDS, KNOWN_IDS, TARGET_VOLUME, TUMORS, label_id, label_name, name_key
from maisi.errors import MaisiError
from maisi.io.nifti import read_labels
from maisi.volume import Volume

Array = NDArray[Any]
Mask = NDArray[np.uint8]

VOCABULARIES = ("maisi", "totalsegmentator", "vista3d", "openkbp")
"""Vocabularies a mask may come in; "maisi" is this package's own."""

_CHUNK = 1 << 22
_LARGEST_LUT = 1 << 16
_SHOWN = 5


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a mask mean.

    Attributes:
        name: one of `VOCABULARIES`, or how messages call a user's table.
        to: their id -> our id; 0 is 0, and a class that is dropped goes to 0.
        names: their id -> their name, where known.
        dropped: their id -> why it has no place here.
        custom: our id -> name of the classes that this vocabulary adds to ours, on `CUSTOM_IDS`.
    """

    name: str
    to: Mapping[int, int]
    names: Mapping[int, str] = field(default_factory=dict)
    dropped: Mapping[int, str] = field(default_factory=dict)
    custom: Mapping[int, str] = field(default_factory=dict)

    def name_of(self, theirs: int) -> str:
        """Return the class as messages call it: name and id."""
        return f"{self.names[theirs]} ({theirs})" if theirs in self.names else str(theirs)


@lru_cache
def vocabulary(name: str) -> Vocabulary:
    """Return one of `VOCABULARIES`.

    Raises:
        MaisiError: no such vocabulary.
    """
    if name not in VOCABULARIES:
        raise MaisiError(f"Unknown label vocabulary '{name}'; choose from {', '.join(VOCABULARIES)}.")
    if name == "maisi":
        ids = sorted(KNOWN_IDS)
        return Vocabulary(name, _frozen({id: id for id in ids}), _frozen({id: label_name(id) for id in ids}))
    text = resources.files("maisi.data").joinpath(f"{name}_labels.json").read_text(encoding="utf-8")
    table = json.loads(text)
    mapped, dropped = table["map"], table["dropped"]
    names = {int(entry["id"]): key for key, entry in (mapped | dropped).items()}
    to = {int(entry["id"]): int(entry["to"]) for entry in mapped.values()}
    reasons = {int(entry["id"]): str(entry["reason"]) for entry in dropped.values()}
    return Vocabulary(name, _frozen({0: 0} | to | dict.fromkeys(reasons, 0)), _frozen(names), _frozen(reasons))


def label_table(name: str) -> Mapping[int, int]:
    """Return their id -> our id for one of `VOCABULARIES`; 0 is 0; a class that is dropped goes to 0.

    Raises:
        MaisiError: no such vocabulary.
    """
    return vocabulary(name).to


def custom_vocabulary(
    table: Any, name: str, names: Mapping[int, str] | None = None, by_name: bool = False
) -> Vocabulary:
    """Make a vocabulary of a user's table, as JSON gives it.

    Args:
        table: `{their id or name: our id or name}`, where a class that maisi does not have is written
            `{"id": one of CUSTOM_IDS, "name": its name}`; under the key "dropped" `{their id or name: reason}`.
        name: of the table, for messages.
        names: their id -> name as the mask's file has it; without it the table must use ids.
        by_name: whether keys are names, even those that look like ids, and those that the mask lacks are passed over:
            one table for the files of many patients, who have different structures.

    Raises:
        MaisiError: a class that cannot be found, an id or a name that is taken, or another form.
    """
    if not isinstance(table, dict) or not isinstance(table.get("dropped", {}), dict):
        raise MaisiError(f'{name} is no table; write {{"their id or name": our id or name, "dropped": {{...}}}}.')
    known = dict(names or {})
    custom: dict[int, str] = {}
    to = {0: 0}
    reasons = {}
    entries = {key: value for key, value in table.items() if key != "dropped"}
    if by_name:
        held = {name_key(called) for called in known.values()}
        entries = {key: value for key, value in entries.items() if name_key(key) in held}
        table = {"dropped": {key: why for key, why in table.get("dropped", {}).items() if name_key(key) in held}}
    for key, value in entries.items():
        theirs = _their_id(key, name, known, to, by_name)
        to[theirs] = _our_id(key, value, name, custom)
    for key, reason in table.get("dropped", {}).items():
        theirs = _their_id(key, name, known, to, by_name)
        to[theirs], reasons[theirs] = BACKGROUND, str(reason)
    return Vocabulary(name, _frozen(to), _frozen(known), _frozen(reasons), _frozen(custom))


def named_vocabulary(name: str, names: Mapping[int, str], holder: str) -> Vocabulary:
    """As `vocabulary`, for a mask whose ids mean nothing by themselves, but are named: what DICOM holds.

    Args:
        name: one of `VOCABULARIES`.
        names: their id -> their name.
        holder: what holds them, for messages.

    Raises:
        MaisiError: no such vocabulary, or one that lacks some of the names.
    """
    known = vocabulary(name)
    by_name = {name_key(called): id for id, called in known.names.items()}
    lacking = [called for called in names.values() if name_key(called) not in by_name]
    if lacking:
        some = ", ".join(f"'{called}'" for called in lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
        raise MaisiError(
            f"{holder} holds structures that {name} does not know ({some}); use --from TABLE.json that maps or drops "
            "each by its name."
        )
    theirs = {id: by_name[name_key(called)] for id, called in names.items()}
    return Vocabulary(
        name,
        _frozen({0: 0} | {id: known.to[there] for id, there in theirs.items()}),
        _frozen(dict(names)),
        _frozen({id: known.dropped[there] for id, there in theirs.items() if there in known.dropped}),
    )


def apply_map(labels: Array, table: Mapping[int, int]) -> Mask:
    """Translate a label array by a table (see `label_table`) into uint8 of the same shape.

    Raises:
        MaisiError: an id of the array is not in the table; nothing is dropped silently.
    """
    present = ids_in(labels)
    unknown = [id for id in present if id not in table]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise MaisiError(
            f"The mask holds ids {unknown[:_SHOWN]}{more} that its vocabulary lacks; name the right vocabulary."
        )
    return translated(labels, {id: table[id] for id in present})


def translated(labels: Array, table: Mapping[int, int]) -> Mask:
    """Replace each id by `table[id]` (0 to 255), as uint8 of the same shape; every id must be in the table."""
    keys = np.array(sorted(table), dtype=np.int64)
    values = np.array([table[int(key)] for key in keys], dtype=np.uint8)
    flat = np.empty(labels.size, np.uint8)
    low = int(keys[0]) if keys.size else 0
    lut = np.zeros(int(keys[-1]) - low + 1, np.uint8) if keys.size and keys[-1] - low < _LARGEST_LUT else None
    if lut is not None:
        lut[keys - low] = values
    start = 0
    for chunk in _chunks(labels):
        ours = values[np.searchsorted(keys, chunk)] if lut is None else lut[chunk.astype(np.intp) - low]
        flat[start : start + len(chunk)] = ours
        start += len(chunk)
    return flat.reshape(labels.shape, order=_order(labels))


def counts(labels: Mask) -> NDArray[np.int64]:
    """Count the voxels of each id, (256,), of a uint8 array of any shape, in little memory."""
    total = np.zeros(256, np.int64)
    for chunk in _chunks(labels):
        total += np.bincount(chunk, minlength=256)
    return total


def ids_in(labels: Array) -> tuple[int, ...]:
    """Return the ids that an integer array of any size holds, ascending, in little memory."""
    if labels.dtype == np.uint8:
        return tuple(int(id) for id in np.flatnonzero(counts(labels)))
    found: set[int] = set()
    for chunk in _chunks(labels):
        found |= {int(id) for id in np.unique(chunk)}
    return tuple(sorted(found))


def merge(by_priority: Sequence[Array], body: Array | None = None) -> Mask:
    """Lay masks over each other: tumour over organ over target volume over body, then earlier over later.

    A target volume is no anatomy: it speaks only where nothing else does.

    Args:
        by_priority: masks in maisi's ids, all of one shape, the most trusted first: organs of a careful
            segmenter, then rule-based ones. A 200 in them claims a voxel only where nothing else does.
        body: where not 0, the envelope (as bool, or a mask in which any label means body): what no mask claims
            there is 200.

    Raises:
        ValueError: no masks, or of different shapes.
    """
    if not by_priority or len({mask.shape for mask in by_priority}) != 1:
        raise ValueError("merge needs at least one mask, and all of the same shape")
    result = np.array(by_priority[0], dtype=np.uint8)
    if len(by_priority) > 1:
        rank = translated(result, _RANKS)
        for mask in by_priority[1:]:
            theirs = translated(mask, _RANKS)
            higher = theirs > rank
            np.copyto(result, mask, where=higher, casting="unsafe")
            np.copyto(rank, theirs, where=higher)
    if body is not None:
        np.copyto(result, np.uint8(BODY), where=(result == BACKGROUND) & (body != 0))
    return result


def checked_mask(mask: Volume | Path | str, custom: Container[int] = (), source: str = "") -> Volume:
    """Return a label map as uint8, on its own grid, every id known: to the vocabulary, or as a `custom` one.

    `source` names it in messages; a file has its own name.

    Raises:
        MaisiError: the file cannot be read, the values are no label ids or have no meaning, or all are 0.
    """
    name = source or ("The mask" if isinstance(mask, Volume) else str(mask))
    volume = mask if isinstance(mask, Volume) else read_labels(Path(mask))
    ids = np.unique(volume.array)
    if ids.dtype.kind not in "iub" and not np.array_equal(ids, np.rint(ids)):
        raise MaisiError(f"{name} holds fractions, so it is no label map; give one with whole numbers.")
    unknown = [int(i) for i in ids if int(i) not in KNOWN_IDS and int(i) not in custom]
    if unknown:
        raise MaisiError(f"{name} holds ids without a meaning: {_some(unknown)}; map them to those of `maisi labels`.")
    if not ids.any():
        raise MaisiError(f"{name} is empty (all 0); give a label map with at least the body ({BODY}) in it.")
    return volume.with_array(volume.array.astype(np.uint8))


def _some(ids: list[int], most: int = 10) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(str(i) for i in ids[:most]) + more


def rest_of(labels: Array) -> int:
    """What a voxel becomes that loses its structure: body, in a map that knows where the body is; else nothing.

    A little body in a map that has none would make air of all around it.
    """
    return BODY if (labels == BODY).any() else BACKGROUND


def rank(ours: int) -> int:
    """Whose word counts for more where structures overlap: tumours, organs, target volumes, the body, nothing."""
    return _RANKS[ours]


_RANKS = dict.fromkeys(range(256), 3) | dict.fromkeys(TUMORS, 4) | {TARGET_VOLUME: 2, BODY: 1, BACKGROUND: 0}
"""Our id -> whose word counts for more, when masks are merged."""


def _chunks(labels: Array) -> Iterator[Array]:
    """Yield all values, some at a time, in the order of `_order`."""
    flat = labels.reshape(-1, order=_order(labels))
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]


def _order(labels: Array) -> Literal["C", "F"]:
    """Order in which an array is read without a copy, where there is one: volumes read from files are Fortran's."""
    return "C" if labels.flags.c_contiguous else "F"


def _frozen(table: dict[int, Any]) -> Mapping[int, Any]:
    return MappingProxyType(dict(sorted(table.items())))


def _their_id(key: str, table: str, names: Mapping[int, str], taken: Mapping[int, int], by_name: bool = False) -> int:
    """Return the id that a key of a user's table means; 0 and a class that stands there twice are refused."""
    if key.strip().lstrip("-").isdigit() and not by_name:
        theirs = int(key)
    else:
        same = [id for id, name in names.items() if name_key(name) == name_key(key)]
        if not same:
            known = f"its file names {', '.join(list(names.values())[:5])}, ..." if names else "its file names none"
            raise MaisiError(f"{table}: the mask has no class '{key}' ({known}); write the class as its id.")
        theirs = same[0]
    if theirs in taken:
        raise MaisiError(f"{table}: class {key} is background, or stands there twice; leave it out once.")
    return theirs


def _our_id(key: str, value: Any, table: str, custom: dict[int, str]) -> int:
    """Return the id that a value of a user's table means; a class that is new is added to `custom`."""
    try:
        if isinstance(value, dict):
            return _custom_id(value, custom)
        ours = label_id(value) if isinstance(value, str) else value
    except MaisiError as error:
        raise MaisiError(f"{table}, class {key}: {error}") from None
    if isinstance(ours, bool) or not isinstance(ours, int) or ours not in KNOWN_IDS:
        new = '{"id": 150, "name": "..."}'
        raise MaisiError(f"{table}, class {key}: {value} is no id of `maisi labels`; a new class is written as {new}.")
    if ours == BACKGROUND:
        raise MaisiError(f'{table}, class {key}: what is left out stands under "dropped", with a reason.')
    return ours


def _custom_id(value: Mapping[str, Any], custom: dict[int, str]) -> int:
    ours, name = value.get("id"), value.get("name")
    if set(value) != {"id", "name"} or isinstance(ours, bool) or not isinstance(ours, int) or not isinstance(name, str):
        raise MaisiError('A new class has an "id" and a "name" and nothing else; write {"id": 150, "name": "..."}.')
    if ours not in CUSTOM_IDS:
        raise MaisiError(f"Id {ours} cannot be given to a new class; choose from 141 to 199 or 201 to 255.")
    if not name.strip() or not name.isprintable():
        raise MaisiError(f"Id {ours} has no name that can be printed; give it one.")
    others = {name_key(label_name(id)): id for id in KNOWN_IDS} | {name_key(n): i for i, n in custom.items()}
    if others.get(name_key(name), ours) != ours:
        raise MaisiError(f"The name '{name}' has the id {others[name_key(name)]} already; use that id or another name.")
    if custom.get(ours, name) != name:
        raise MaisiError(f"Id {ours} is called both '{custom[ours]}' and '{name}'; give each class its own id.")
    custom[ours] = name
    return ours
