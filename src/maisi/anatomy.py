"""The anatomy the models speak of: label ids, regions, tumours and their hosts, modalities. Knows no array.

The ids are those of the released MAISI weights (`anatomy_labels.json`, "released"). Ids 133 to 140, which
that vocabulary leaves free, are maisi's own ("extension"): only models that say so know them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from maisi.errors import MaisiError

BACKGROUND = 0
BODY = 200
"""Every voxel of the body that no named structure claims."""

UNNAMED_BONE = 133
"""Bone that is found by its HU alone, so nobody knows which it is: the skeleton of rule-based masks."""

MANDIBLE = 138

TARGET_VOLUME = 139
"""Where a radiotherapy is aimed at: no anatomy, so it speaks only where nothing else does."""

REGIONS = ("head-neck", "chest", "abdomen", "lower-body")
"""Body regions from top to bottom; their order is that of the one-hot vectors."""


@dataclass(frozen=True)
class Label:
    """One entry of the vocabulary.

    Attributes:
        id: 1 to 255, the value in a label map.
        name: lower case English, unique.
    """

    id: int
    name: str

    @property
    def free(self) -> bool:
        """Whether the id has a place in the released vocabulary but no meaning (dummyN)."""
        return self.name.startswith("dummy")

    @property
    def side(self) -> str:
        """'left' or 'right' (the patient's), or '' for a structure that is not one of a pair."""
        return next((word for word in self.name.split() if word in ("left", "right")), "")


_TABLE = json.loads(resources.files("maisi").joinpath("anatomy_labels.json").read_text(encoding="utf-8"))

LABELS: tuple[Label, ...] = tuple(Label(id, name) for name, id in _TABLE["released"].items())
"""The released vocabulary: ids 1 to 132 (dummies among them) and 200."""

EXTENSION: tuple[Label, ...] = tuple(Label(id, name) for name, id in _TABLE["extension"].items())
"""maisi's own labels, 133 to 140; not in the vocabulary of the released weights."""

MODALITIES: Mapping[str, int] = MappingProxyType(_TABLE["modalities"])
"""Modality -> index into the class embedding of the U-Net."""

KNOWN_IDS = frozenset({BACKGROUND} | {label.id for label in LABELS + EXTENSION if not label.free})
"""Ids that a label map may hold: named structures, the extension, the body and the background."""

FREE_IDS = frozenset(range(256)) - KNOWN_IDS
"""Ids that mean nothing: a user may give them to structures of their own when training."""

CUSTOM_IDS = frozenset(range(133, 256)) & FREE_IDS
"""Ids that a user's own classes may take: above the released vocabulary, and not taken by the extension."""

LUNGS: tuple[int, ...] = tuple(range(28, 33))
"""The five lobes."""

SKELETON: tuple[int, ...] = (*range(33, 57), *range(63, 98), 120, 122, 127)
"""The bones of the released vocabulary: vertebrae, ribs, limbs, girdles, skull, sternum."""

ANY_BONE: tuple[int, ...] = (*SKELETON, UNNAMED_BONE, MANDIBLE)
"""`SKELETON` and the bones of the extension."""

TUMORS: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {23: LUNGS, 24: (4,), 26: (1,), 27: (62,), 128: ANY_BONE, 140: (5, 14)}
)
"""Tumour id -> ids of the organs it grows in."""

REGION_MARKERS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "head-neck": (22, 120, 134, 135, 136, 137, MANDIBLE),
        "chest": LUNGS,
        "abdomen": (1, 2, 3, 4, 5, 14),
        "lower-body": (93, 94),
    }
)
"""Region -> ids whose presence shows that a volume covers it: the released markers (2 among them, though
a free id) and, for the head and neck, the extension's structures, which no released mask holds."""

_REGION_ALIASES = {
    "head": "head-neck",
    "neck": "head-neck",
    "head and neck": "head-neck",
    "brain": "head-neck",
    "thorax": "chest",
    "lung": "chest",
    "lungs": "chest",
    "belly": "abdomen",
    "abdominal": "abdomen",
    "lower": "lower-body",
    "pelvis": "lower-body",
    "hips": "lower-body",
    "leg": "lower-body",
    "legs": "lower-body",
}

_NAMES = {BACKGROUND: "background"} | {label.id: label.name for label in LABELS + EXTENSION}


def _words(name: str) -> str:
    """Lower case with '-', '_' and ',' as spaces: the form in which names are compared."""
    return " ".join(name.lower().translate(str.maketrans("-_,", "   ")).split())


def name_key(name: str) -> str:
    """Return the form in which names are compared: case, '-', '_', ',' and the order of the words don't matter."""
    return " ".join(sorted(_words(name).split()))


_IDS = {name_key(name): id for id, name in _NAMES.items()}


def label_name(id: int) -> str:
    """Return the name of a label id (0 is 'background').

    Raises:
        MaisiError: the id has no name.
    """
    if id not in _NAMES:
        raise MaisiError(f"Label id {id} has no name; `maisi labels` lists those that have.")
    return _NAMES[id]


def custom_labels(labels: Mapping[int, str]) -> dict[int, str]:
    """Check names of a user's own classes, id -> name.

    Raises:
        MaisiError: an id that has a meaning already, or a name that is taken or empty.
    """
    for id, name in labels.items():
        if id not in CUSTOM_IDS:
            raise MaisiError(f"Id {id} cannot be given to a class of your own; choose from 141 to 199 or 201 to 255.")
        if not name.strip() or name_key(name) in _IDS:
            raise MaisiError(f"The class of id {id} is called '{name}', which is empty or taken; give it another name.")
    return dict(labels)


def label_names(ids: Iterable[int]) -> dict[int, str]:
    """Return id -> name of those `ids` that mean something (`KNOWN_IDS`), the background left out."""
    return {id: _NAMES[id] for id in sorted(ids) if id in KNOWN_IDS and id != BACKGROUND}


def label_id(name: str) -> int:
    """Return the id of a label name; case, '-', '_' and the order of the words don't matter ('kidney_left').

    Raises:
        MaisiError: nothing has that name; the message tells the nearest that exists.
    """
    key = name_key(name)
    if key not in _IDS:
        raise MaisiError(f"No label is called '{name}'{_nearest(name, _NAMES.values())}; see `maisi labels`.")
    return _IDS[key]


def opposite(name: str) -> str:
    """Return a structure's name with left and right exchanged ('left rib 1' -> 'right rib 1'), word by word."""
    other = {"left": "right", "right": "left"}
    return " ".join(other.get(word, word) for word in name_key(name).split())


OPPOSITE: Mapping[int, int] = MappingProxyType(
    {
        label.id: _IDS[name_key(opposite(label.name))]
        for label in LABELS + EXTENSION
        if name_key(opposite(label.name)) in _IDS and label.side
    }
)
"""Id of a paired structure -> id of the one on the other side."""

LINGULA: Mapping[int, int] = MappingProxyType({31: 28})
"""The middle lobe of the right lung -> what is in its place on the left, a part of the upper lobe."""


def named_sides(name: str) -> tuple[int, ...]:
    """Return the ids that a name means: its own, or those of its left and right where only these exist ('kidney').

    'lungs' and 'lung' mean their lobes.

    Raises:
        MaisiError: nothing has that name.
    """
    if name_key(name) in ("lungs", "lung"):
        return LUNGS
    try:
        return (label_id(name),)
    except MaisiError:
        pair = [_IDS.get(name_key(f"{side} {name}")) for side in ("left", "right")]
        if None in pair:
            raise
        return tuple(id for id in pair if id is not None)


def parse_region(name: str) -> str:
    """Return the member of `REGIONS` that `name` means; aliases such as 'thorax' or 'head_and_neck' will do.

    Raises:
        MaisiError: no region is called so; the message lists the regions and the nearest name.
    """
    known = {_words(region): region for region in REGIONS} | _REGION_ALIASES
    key = _words(name)
    if key not in known:
        near = _nearest(name, known)
        raise MaisiError(f"Unknown region '{name}'{near}; choose from {', '.join(REGIONS)}.")
    return known[key]


def sort_regions(names: Iterable[str]) -> tuple[str, ...]:
    """Return the regions that `names` mean, each once, from top to bottom."""
    return tuple(sorted({parse_region(name) for name in names}, key=REGIONS.index))


def regions_present(ids: Iterable[int]) -> tuple[str, ...]:
    """Return the regions that a label map with these ids covers, from top to bottom, without a gap.

    A map with the brain and the liver covers the chest too, whether lungs are labelled or not.
    """
    present = set(ids)
    found = [i for i, region in enumerate(REGIONS) if present.intersection(REGION_MARKERS[region])]
    return REGIONS[found[0] : found[-1] + 1] if found else ()


def modality_name(modality: str) -> str:
    """Return 'CT' or 'MRI', as a member of `MODALITIES` is called in short."""
    return "CT" if modality.startswith("ct") else "MRI"


def parse_modality(name: str) -> str:
    """Return the member of `MODALITIES` that `name` means; case, '-' and ' ' don't matter.

    Raises:
        MaisiError: no modality is called so.
    """
    known = {_words(modality): modality for modality in MODALITIES}
    key = _words(name)
    if key not in known:
        near = _nearest(name, known.values())
        raise MaisiError(f"Unknown modality '{name}'{near}; choose from {', '.join(MODALITIES)}.")
    return known[key]


def _nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the `known` names is nearest, as a clause behind the wrong name; '' if none is near."""
    near = difflib.get_close_matches(_words(name), list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
