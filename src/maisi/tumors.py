"""Kinds of tumours and what someone may wish of one: 'liver:25mm', 'lung:8-15mm x3', 'bone@10,-20,40'. Knows no array.

The kinds are one table, `tumors.json`: which label a tumour has, how large it usually is, what it looks like in CT. Its
hosts stand in `anatomy.TUMORS`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from types import MappingProxyType

from pydantic import Field, model_validator

from maisi.anatomy import TUMORS, label_name
from maisi.config import Config
from maisi.errors import MaisiError

Range = tuple[float, float]
DIAMETER_RANGE_MM = (2.0, 200.0)
MOST_TUMORS = 20


class Look(Config):
    """One way in which a kind of tumour shows in CT. Ranges are drawn from evenly.

    Attributes:
        name: such as "lytic".
        contrast_hu: mean of the tumour minus mean of its host.
        hu: mean of the tumour itself, for hosts that are mostly air; in place of `contrast_hu`.
        texture_hu: standard deviation of its inhomogeneity.
        share: how often the kind looks like this, relative to its other looks.
    """

    name: str
    contrast_hu: Range | None = None
    hu: Range | None = None
    texture_hu: float = Field(ge=0)
    share: float = Field(default=1.0, gt=0)


class TumorKind(Config):
    """One kind of tumour.

    Attributes:
        name: the word that asks for it.
        id: its label.
        diameter_mm: smallest and largest usual equivalent diameter.
        elongation: largest ratio of the longest to the shortest axis.
        roughness: 0 draws ellipsoids, 0.3 clearly irregular outlines; the range drawn from.
        apart: whether its hosts end where the next begins, as bones do at a joint; else it grows across.
        looks: see `Look`.
    """

    name: str
    id: int
    diameter_mm: Range
    elongation: float = Field(ge=1)
    roughness: Range
    apart: bool = False
    looks: tuple[Look, ...] = Field(min_length=1)

    @property
    def hosts(self) -> tuple[int, ...]:
        """Ids of the organs it grows in."""
        return TUMORS[self.id]


def _read() -> dict[str, TumorKind]:
    rows = json.loads(resources.files("maisi").joinpath("tumors.json").read_text(encoding="utf-8"))["kinds"]
    return {row["name"]: TumorKind.model_validate(row) for row in rows}


KINDS: Mapping[str, TumorKind] = MappingProxyType(_read())
"""Every kind, by name."""


class TumorWish(Config):
    """Tumours of one kind, as asked for.

    Attributes:
        kind: a key of `KINDS`.
        diameter_mm: smallest and largest equivalent diameter (of the ball with the tumour's volume); None is as usual.
        count: how many.
        centre_mm: world position (RAS+) near which they grow; None leaves it to chance.
    """

    kind: str
    diameter_mm: Range | None = None
    count: int = Field(default=1, ge=1, le=MOST_TUMORS)
    centre_mm: tuple[float, float, float] | None = None

    @model_validator(mode="after")
    def _possible(self) -> TumorWish:
        if self.kind not in KINDS:
            raise ValueError(f"there is no kind of tumour '{self.kind}'; choose from {', '.join(KINDS)}")
        if self.diameter_mm is not None and (fault := _diameter_fault(self.diameter_mm)):
            raise ValueError(fault)
        if self.centre_mm is not None and not all(map(math.isfinite, self.centre_mm)):
            raise ValueError("the place of a tumour is three finite numbers")
        return self

    def __str__(self) -> str:
        """Spell it as `parse_tumor` reads it."""
        text = self.kind
        if self.diameter_mm is not None:
            low, high = self.diameter_mm
            text += f":{low:g}mm" if low == high else f":{low:g}-{high:g}mm"
        if self.count > 1:
            text += f"x{self.count}"
        return text if self.centre_mm is None else f"{text}@" + ",".join(f"{v:g}" for v in self.centre_mm)


_NUMBER = r"\d+(?:\.\d+)?"
_WISH = re.compile(
    rf"\s*(?P<kind>[a-z][a-z _-]*?)\s*"
    rf"(?::\s*(?P<low>{_NUMBER})(?:\s*-\s*(?P<high>{_NUMBER}))?\s*(?:mm)?)?\s*"
    rf"(?:x\s*(?P<count>\d+))?\s*"
    rf"(?:@\s*(?P<centre>[-+\d.,\s]+))?\s*",
    re.IGNORECASE,
)


def parse_tumor(text: str) -> TumorWish:
    """Read a wish: `KIND[:DIAMETERmm | :LOW-HIGHmm][xCOUNT][@X,Y,Z]`; the kind may be a tumour's label name too.

    Raises:
        MaisiError: it is spelled otherwise, or the kind, a size, a number or a place is impossible.
    """
    match = _WISH.fullmatch(text)
    if match is None:
        raise MaisiError(
            f"'{text}' asks for no tumour; write it like liver:25mm, lung:8-15mmx3 or bone:20mm@10,-20,40."
        )
    kind = parse_kind(match["kind"])
    diameter = None
    if match["low"] is not None:
        diameter = (float(match["low"]), float(match["high"] or match["low"]))
        if fault := _diameter_fault(diameter):
            raise MaisiError(f"'{text}': {fault}.")
    count = int(match["count"] or 1)
    if not 1 <= count <= MOST_TUMORS:
        raise MaisiError(f"'{text}': give a number of tumours from 1 to {MOST_TUMORS}.")
    return TumorWish(kind=kind.name, diameter_mm=diameter, count=count, centre_mm=_place(text, match["centre"]))


def _diameter_fault(diameter_mm: Range) -> str:
    """Why a range of diameters cannot be asked for; "" where it can."""
    low, high = DIAMETER_RANGE_MM
    if low <= diameter_mm[0] <= diameter_mm[1] <= high:
        return ""
    return f"give a diameter from {low:g} to {high:g} mm, or a range with the smaller first"


def parse_tumors(wishes: Iterable[str | TumorWish]) -> tuple[TumorWish, ...]:
    """Read several wishes, one a string."""
    return tuple(wish if isinstance(wish, TumorWish) else parse_tumor(wish) for wish in wishes)


def parse_kind(name: str) -> TumorKind:
    """Find a kind by its name or by the name of its label.

    Raises:
        MaisiError: there is none.
    """
    key = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    by_label = {label_name(kind.id): kind for kind in KINDS.values()}
    found = KINDS.get(key) or by_label.get(key)
    if found is None:
        near = difflib.get_close_matches(key, [*KINDS, *by_label], n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise MaisiError(f"No tumour is called '{name}'{hint}; choose from {', '.join(KINDS)}.")
    return found


def kind_of(id: int) -> TumorKind:
    """The kind whose label is `id`."""
    return next(kind for kind in KINDS.values() if kind.id == id)


def _place(text: str, centre: str | None) -> tuple[float, float, float] | None:
    if centre is None:
        return None
    try:
        x, y, z = (float(part) for part in centre.split(","))
    except ValueError:
        raise MaisiError(f"'{text}': give the place as X,Y,Z in mm of the world, such as @10,-20,40.") from None
    if not all(math.isfinite(v) for v in (x, y, z)):
        raise MaisiError(f"'{text}': give the place as X,Y,Z in mm of the world, such as @10,-20,40.")
    return (x, y, z)
