"""Field of view: which sizes and spacings a model knows, and which to take for a region. Imports no torch.

A network that has seen 350 mm wide chests makes strange things of a box of 100 mm that is said to show a chest. So a
request is compared with what the model was trained on, and `complete` fills in what a request leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from maisi.anatomy import REGIONS
from maisi.errors import MaisiError
from maisi.request import SIZE_RANGE, SPACING_RANGE_MM
from maisi.weights.registry import FieldOfView, ModelConfig

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]

TOLERANCE = 1.25
"""A model is taken to know spacings and extents up to this factor beyond those of its table."""

COMMON = 0.8
"""A view is common if its share is this much of the commonest one's."""


@dataclass(frozen=True)
class Range:
    """An interval of numbers, ends included."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the value lies inside, give or take rounding."""
        return self.low * (1 - 1e-6) <= value <= self.high * (1 + 1e-6)

    def nearest(self, value: float) -> float:
        """The value itself, or the end next to it."""
        return min(max(value, self.low), self.high)

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}" if self.high < float("inf") else f"at least {self.low:.3g}"


@dataclass(frozen=True)
class Limits:
    """What a model knows of one kind of volume; each along X, Y, Z.

    Attributes:
        size: voxels; None where the size alone does not matter.
        size_step: sizes are multiples of this.
        spacing_mm: spacings.
        extent_mm: size times spacing.
        square: X and Y have the same size and spacing.
    """

    spacing_mm: tuple[Range, Range, Range]
    extent_mm: tuple[Range, Range, Range]
    size: tuple[Range, Range, Range] | None = None
    size_step: int = 1
    square: bool = False


def _median(share: float, size: Triple, spacing_mm: Spacing, *regions: str) -> FieldOfView:
    return FieldOfView(regions=regions, size=size, spacing_mm=spacing_mm, share=share / 100)


_HEAD, _CHEST, _ABDOMEN, _LOWER = REGIONS

RELEASED_VIEWS: tuple[FieldOfView, ...] = (
    _median(58.55, (512, 512, 128), (0.781, 0.781, 2.981), _CHEST, _ABDOMEN),
    _median(38.35, (512, 512, 128), (0.684, 0.684, 2.422), _CHEST),
    _median(1.42, (512, 512, 256), (0.793, 0.793, 1.826), _CHEST, _ABDOMEN, _LOWER),
    _median(0.61, (512, 512, 384), (0.839, 0.839, 0.728), _LOWER),
    _median(0.37, (512, 512, 384), (0.808, 0.808, 0.729), _ABDOMEN, _LOWER),
    _median(0.33, (512, 512, 384), (0.977, 0.977, 2.103), _HEAD, _CHEST, _ABDOMEN),
    _median(0.13, (512, 512, 128), (0.723, 0.723, 1.182), _ABDOMEN),
    _median(0.13, (512, 512, 384), (1.367, 1.367, 4.603), *REGIONS),
    _median(0.10, (512, 512, 128), (0.645, 0.645, 2.219), _HEAD, _CHEST),
)
"""Median size and spacing of the released models' training data, by region (the paper's data, published with them)."""

_UNBOUNDED = float("inf")


def released_limits(regions: Sequence[str]) -> Limits:
    """What the released models know: 256, 384 or 512 voxels (z: 128 to 768), 384 mm and more across the body."""
    across = Range(256.0 if tuple(regions) == (_HEAD,) else 384.0, _UNBOUNDED)
    return Limits(
        spacing_mm=(Range(0.5, 3.0), Range(0.5, 3.0), Range(0.5, 5.0)),
        extent_mm=(across, across, Range(0.0, _UNBOUNDED)),
        size=(Range(256, 512), Range(256, 512), Range(128, 768)),
        size_step=128,
        square=True,
    )


RELEASED_MODELS = ("ddpm-ct", "rflow-ct")
"""Names of models made of the released weights: their published limits apply, not those of the table alone."""


@dataclass(frozen=True)
class Adviser:
    """What one model knows."""

    views: tuple[FieldOfView, ...]
    released: bool = False

    @classmethod
    def of(cls, model: ModelConfig) -> Adviser:
        """Make the adviser of a model from its `model.json`."""
        released = model.name in RELEASED_MODELS
        return cls(model.field_of_view or (RELEASED_VIEWS if released else ()), released)

    def complete(
        self, regions: Sequence[str], size: Triple | None, spacing_mm: Spacing | None
    ) -> tuple[Triple, Spacing]:
        """Return size and spacing, with what is None filled in from a common view of the regions.

        Where one of them is given, the other keeps that view's extent in mm.

        Raises:
            MaisiError: something is open and the model has no table to fill it in from.
        """
        if size is not None and spacing_mm is not None:
            return size, spacing_mm
        extent, usual_size = self._usual(regions)
        if size is None and spacing_mm is not None:
            x, y, z = (int(min(max(1, round(e / s)), SIZE_RANGE[1])) for e, s in zip(extent, spacing_mm, strict=True))
            return (x, y, z), spacing_mm
        size = usual_size if size is None else size
        allowed = Range(*SPACING_RANGE_MM)
        a, b, c = (round(allowed.nearest(e / n), 3) for e, n in zip(extent, size, strict=True))
        return size, (a, b, c)

    def warnings(self, regions: Sequence[str], size: Triple, spacing_mm: Spacing) -> tuple[str, ...]:
        """Say, a sentence each, in what way a volume is unlike what the model has learned from; () if in none."""
        if not self.views:
            return ()
        found = list(_outside_regions(self.views, regions))
        limits = self._limits(regions)
        found += _outside(limits, size, spacing_mm)
        return tuple(found)

    def beyond(self, regions: Sequence[str], size: Triple, spacing_mm: Spacing) -> float:
        """How many times as far as the model knows a volume reaches, along the axis where that is most; at least 1."""
        if not self.views:
            return 1.0
        known = self._limits(regions).extent_mm
        return round(max(1.0, *(n * s / axis.high for n, s, axis in zip(size, spacing_mm, known, strict=True))), 3)

    def _usual(self, regions: Sequence[str]) -> tuple[Spacing, Triple]:
        """(extent in mm, size) of the finest of the common views of the regions, moved into the limits."""
        if not self.views:
            raise MaisiError("This model does not say which sizes it knows; give both size and spacing.")
        views = _matching(self.views, regions)
        common = COMMON * max(view.share for view in views)
        view = min((v for v in views if v.share >= common), key=lambda v: math.prod(v.spacing_mm))
        extents = zip(view.size, view.spacing_mm, self._limits(regions).extent_mm, strict=True)
        x, y, z = (known.nearest(n * s) for n, s, known in extents)
        return (x, y, z), view.size

    def _limits(self, regions: Sequence[str]) -> Limits:
        return released_limits(regions) if self.released else _hull(_matching(self.views, regions))


def _matching(views: Sequence[FieldOfView], regions: Sequence[str]) -> list[FieldOfView]:
    """Views of exactly these regions, or else those that have most of them in common and least beside them."""
    if not regions:
        return list(views)
    wanted = set(regions)

    def likeness(view: FieldOfView) -> float:
        return len(wanted & set(view.regions)) / len(wanted | set(view.regions))

    best = max(likeness(view) for view in views)
    return [view for view in views if likeness(view) == best]


def _hull(views: Iterable[FieldOfView]) -> Limits:
    """Everything between the views' spacings and extents, and `TOLERANCE` beyond."""
    known = list(views)

    def around(values: list[float]) -> Range:
        return Range(min(values) / TOLERANCE, max(values) * TOLERANCE)

    x, y, z = (around([v.spacing_mm[axis] for v in known]) for axis in range(3))
    a, b, c = (around([v.spacing_mm[axis] * v.size[axis] for v in known]) for axis in range(3))
    return Limits(spacing_mm=(x, y, z), extent_mm=(a, b, c))


def _outside_regions(views: Sequence[FieldOfView], regions: Sequence[str]) -> Iterable[str]:
    """Name the regions that no view shows."""
    known = {region for view in views for region in view.regions}
    missing = [region for region in regions if region not in known]
    if missing:
        there = ", ".join(region for region in REGIONS if region in known)
        yield f"The model has never seen {', '.join(missing)}; it knows {there}."


def _outside(limits: Limits, size: Triple, spacing_mm: Spacing) -> Iterable[str]:
    for axis, name in enumerate("XYZ"):
        extent = size[axis] * spacing_mm[axis]
        if not limits.spacing_mm[axis].holds(spacing_mm[axis]):
            yield f"Spacing {spacing_mm[axis]:g} mm along {name}: the model knows {limits.spacing_mm[axis]} mm."
        if not limits.extent_mm[axis].holds(extent):
            yield f"Field of view {extent:.0f} mm along {name}: the model knows {limits.extent_mm[axis]} mm."
        if limits.size and (not limits.size[axis].holds(size[axis]) or size[axis] % limits.size_step):
            step = f" in steps of {limits.size_step}"
            yield f"Size {size[axis]} along {name}: the model knows {limits.size[axis]}{step}."
    if limits.square and (size[0] != size[1] or spacing_mm[0] != spacing_mm[1]):
        yield "X and Y differ in size or spacing: the model knows only equal ones."
