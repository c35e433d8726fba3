"""The ten anatomy sizes that the mask generator is told: named, checked, measured. Knows no network.

A size is 0 to 1, or -1 for a structure that is absent. Sizes measured here are volumes inside the map relative to the
largest of that structure among the training maps; what the released network's sizes are relative to is not published.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maisi.anatomy import TUMORS, label_id, label_name
from maisi.config import Config, parse_config
from maisi.errors import MaisiError

SIZED: tuple[int, ...] = (10, 1, 12, 4, 62, 23, 24, 26, 27, 128)
"""Ids in the order of the released network's input: gallbladder, liver, stomach, pancreas, colon, then tumours."""

TRAINING_KEY = "maisi.masks"
"""Entry of a mask diffusion network's file that holds `MaskTraining`, as JSON."""

ABSENT = -1.0
MIDDLE_SIZE = 0.5
NEAREST_CASES = 5
"""What is not asked for is taken from one of this many training cases, those most like what is asked for."""

_ALIASES = {"hepatic tumour": 26, "liver tumor": 26, "liver tumour": 26, "lung tumour": 23, "pancreatic tumour": 24}
_ALIASES |= {"pancreas tumor": 24, "pancreas tumour": 24, "colon cancer": 27, "colon tumor": 27, "colon tumour": 27}

Sizes = tuple[float, ...]
"""Ten numbers in the order of `SIZED`."""


class MaskCase(Config):
    """What a training map showed: its regions and its ten sizes."""

    regions: tuple[str, ...]
    sizes: Annotated[Sizes, Field(min_length=len(SIZED), max_length=len(SIZED))]


class MaskTraining(Config):
    """What a mask diffusion network was trained on; stands in its file.

    Attributes:
        size: voxels of the maps. The defaults are those of the released network.
        spacing_mm: of the maps.
        largest_ml: volume that is size 1 of each of `SIZED`; 0 where no training map has the structure.
        cases: regions and sizes of training maps.
    """

    size: tuple[int, int, int] = (256, 256, 256)
    spacing_mm: tuple[float, float, float] = (1.5, 1.5, 1.5)
    largest_ml: Sizes = ()
    cases: tuple[MaskCase, ...] = ()


def training_of(metadata: Mapping[str, str], source: str) -> MaskTraining:
    """Return what a network's file says that it was trained on; without an entry it is the released network.

    Raises:
        MaisiError: the entry is damaged.
    """
    try:
        values = json.loads(metadata.get(TRAINING_KEY, "{}"))
    except ValueError:
        raise MaisiError(f"{source} has damaged metadata; get a fresh copy.") from None
    return parse_config(MaskTraining, values, source)


def parse_sizes(texts: Iterable[str]) -> dict[int, float]:
    """Turn 'liver=0.6' or 'hepatic tumor=-1' into id -> size.

    Raises:
        MaisiError: another form, a structure without a size, a number out of range, one named twice, or more than
            one tumour.
    """
    wanted: dict[int, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        id = _sized_id(name)
        size = _number(number, text)
        if id in wanted:
            raise MaisiError(f"The size of '{label_name(id)}' is given twice; give it once.")
        wanted[id] = size
    tumors = [label_name(id) for id, size in wanted.items() if id in TUMORS and size >= 0]
    if len(tumors) > 1:
        raise MaisiError(f"Sizes of several tumours are given ({', '.join(tumors)}); a map has at most one.")
    return wanted


def measure_ml(labels: NDArray[np.uint8], spacing_mm: Sequence[float]) -> Sizes:
    """Return the volumes of `SIZED` in a label map (X, Y, Z), in ml."""
    counts = np.bincount(labels.ravel(), minlength=256)
    return tuple(float(counts[id]) * math.prod(spacing_mm) / 1000 for id in SIZED)


def relative_sizes(volumes_ml: Sequence[float], largest_ml: Sequence[float]) -> Sizes:
    """Volumes to sizes: 0 to 1 of the largest, -1 where there is nothing."""
    pairs = zip(volumes_ml, largest_ml, strict=True)
    return tuple(min(volume / most, 1.0) if volume > 0 and most > 0 else ABSENT for volume, most in pairs)


def complete_sizes(
    wanted: Mapping[int, float], regions: Sequence[str], cases: Sequence[MaskCase], rng: np.random.Generator
) -> Sizes:
    """Fill in the sizes that nobody asked for, as one of the training cases most like the wish has them.

    Cases of the same regions are preferred. Where no case is known, organs get `MIDDLE_SIZE` in maps of the abdomen or
    of no given region, and are absent elsewhere. Tumours are never filled in.
    """
    choice = float(rng.random())
    alike = [case for case in cases if case.regions == tuple(regions)] or list(cases)
    if not alike:
        organ = MIDDLE_SIZE if not regions or "abdomen" in regions else ABSENT
        return tuple(wanted.get(id, ABSENT if id in TUMORS else organ) for id in SIZED)
    asked = [(place, wanted[id]) for place, id in enumerate(SIZED) if id in wanted and id not in TUMORS]
    alike.sort(key=lambda case: sum(abs(case.sizes[place] - size) for place, size in asked))
    if asked:
        alike = alike[:NEAREST_CASES]
    model = alike[int(choice * len(alike))]
    filled = (ABSENT if id in TUMORS else size for id, size in zip(SIZED, model.sizes, strict=True))
    return tuple(wanted.get(id, size) for id, size in zip(SIZED, filled, strict=True))


def named_sizes(sizes: Sequence[float]) -> dict[str, float]:
    """Return ten sizes by the names of their structures."""
    return {label_name(id): round(float(size), 4) for id, size in zip(SIZED, sizes, strict=True)}


def context(sizes: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """Return the network's input for B volumes: float32 (B, 1, 10), one token each."""
    return np.asarray(sizes, dtype=np.float32)[:, None, :]


def _sized_id(name: str) -> int:
    known = ", ".join(label_name(id) for id in SIZED)
    key = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    try:
        id = _ALIASES[key] if key in _ALIASES else label_id(key)
    except MaisiError:
        near = difflib.get_close_matches(key, [*(label_name(id) for id in SIZED), *_ALIASES], n=1)
        guess = f" (did you mean '{near[0]}'?)" if near else ""
        raise MaisiError(f"'{name}' has no anatomy size{guess}; choose from {known}.") from None
    if id not in SIZED:
        raise MaisiError(f"'{name}' has no anatomy size; choose from {known}.")
    return id


def _number(text: str, whole: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not (0 <= size <= 1 or size == ABSENT):
        raise MaisiError(f"'{whole}' is no anatomy size; give a name and 0 to 1, or -1 for absent, such as liver=0.6.")
    return size
