"""Label maps of one grid to train the mask networks on: boxes of prepared cases, or phantoms. Knows no network.

A map depends on the settings, the seed and its number alone. The trunk is never mirrored (its organs have a side); maps
of the head and neck alone may be, when a batch is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from maisi.config import Config
from maisi.data.anatomy_sizes import SIZED
from maisi.data.mask_deform import DeformationRanges, deform, draw_deformation
from maisi.data.phantom import REGION_SPAN_MM, phantom_labels
from maisi.data.prepared import PreparedCase, PreparedFolder, Split
from maisi.data.preprocess import resample_to_grid
from maisi.data.tumor_masks import grow_tumors
from maisi.data.views import PlannedView, ViewConfig, mirrored, plan_view, region_extents
from maisi.errors import MaisiError
from maisi.tumors import KINDS, TumorWish
from maisi.volume import Volume

Labels = NDArray[np.uint8]

CACHE_BYTES = 2 * 2**30
"""Maps are kept in memory up to this much."""

VALIDATION_SEED = 10**6
"""Phantoms from this seed on are kept out of training."""


class MaskMapsConfig(Config):
    """What the maps show and where they come from.

    Attributes:
        size: voxels; a multiple of the compression times the mask U-Net's factor.
        spacing_mm: of the voxels.
        views: boxes drawn from each prepared case, at places of their own where the case is larger than the box.
        bent: whether the views of a training case after its first are of the case bent, each otherwise.
        phantoms: how many bodies of simple shapes are trained on, beside the cases or alone.
        validation_phantoms: how many more are kept out.
        phantom_regions: what phantoms show, each kind equally often; the box is centred on it.
        phantom_tumours: share of phantoms with a tumour in an organ that can have one.
        mirror: whether maps of the head and neck alone are mirrored half of the time.
    """

    size: tuple[PositiveInt, PositiveInt, PositiveInt] = (256, 256, 256)
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.5, 1.5, 1.5)
    views: PositiveInt = 1
    bent: bool = False
    phantoms: int = Field(default=0, ge=0, lt=VALIDATION_SEED)
    validation_phantoms: int = Field(default=8, ge=1)
    phantom_regions: tuple[tuple[str, ...], ...] = (("head-neck",), ("chest",), ("abdomen",), ("lower-body",))
    phantom_tumours: float = Field(default=0.5, ge=0, le=1)
    mirror: bool = False

    @model_validator(mode="after")
    def _check(self) -> MaskMapsConfig:
        unknown = sorted({name for names in self.phantom_regions for name in names} - REGION_SPAN_MM.keys())
        if unknown or not self.phantom_regions:
            raise ValueError(f"phantom_regions must name regions out of {', '.join(REGION_SPAN_MM)}, not {unknown}")
        return self


_MIRRORED = ("head-neck",)
"""All that may be in what is mirrored."""


@dataclass(frozen=True)
class MaskMap:
    """Labels (X, Y, Z) uint8 on the grid, the regions they show, and whether they may be mirrored: no trunk's may."""

    labels: Labels
    regions: tuple[str, ...]
    mirrors: bool


class MaskMaps:
    """The maps of one split, by number: those of prepared cases first, then phantoms."""

    def __init__(self, config: MaskMapsConfig, data: Path | None, split: Split, seed: int) -> None:
        """Count the maps.

        Raises:
            MaisiError: there are none.
        """
        self.config, self.seed, self.split = config, seed, split
        self.folder = None if data is None else PreparedFolder(data)
        cases = () if self.folder is None else self.folder.cases(split)
        copies = config.views if split == "train" else 1
        self.boxes = [(case, copy) for case in cases if case.labels is not None for copy in range(copies)]
        self.phantoms = config.phantoms if split == "train" or not config.phantoms else config.validation_phantoms
        if not len(self):
            raise MaisiError(f"There are no {split} label maps; name a prepared folder with labels, or phantoms.")
        self._kept = lru_cache(maxsize=max(1, CACHE_BYTES // math.prod(config.size)))(self._made)

    def __len__(self) -> int:
        return len(self.boxes) + self.phantoms

    def __getitem__(self, number: int) -> MaskMap:
        """Return a map; it is made when it is first asked for."""
        return self._kept(number)

    def mirrored(self, map: MaskMap, wanted: bool) -> Labels:
        """Return the labels, mirrored left to right if that is `wanted`, allowed, and the map may be."""
        return mirrored(map.labels) if wanted and self.config.mirror and map.mirrors else map.labels

    def _made(self, number: int) -> MaskMap:
        if number < len(self.boxes):
            return self._box(*self.boxes[number])
        return self._phantom(number - len(self.boxes))

    def _box(self, case: PreparedCase, copy: int) -> MaskMap:
        assert self.folder is not None
        whole = Volume(np.asarray(self.folder.labels(case)), np.array(case.affine))
        if self.config.bent and copy:
            rng = np.random.default_rng([self.seed, copy, *case.id.encode(), 1])
            whole = deform(whole, draw_deformation(rng, DeformationRanges(), whole))
        plan = self._plan(case, copy, whole)
        like = Volume(np.broadcast_to(np.uint8(0), self.config.size), plan.grid)
        labels = resample_to_grid(whole, like, order=0, fill=0).array
        # a box of a trunk may show too little of the chest to be told of it, and yet its heart
        return MaskMap(labels, plan.row.regions, case.regions == _MIRRORED)

    def _plan(self, case: PreparedCase, copy: int, whole: Volume) -> PlannedView:
        """A box whose place is drawn."""
        x, y, z = self.config.spacing_mm
        if not x == y == z:
            raise MaisiError(f"Boxes of prepared cases have cubic voxels, not {x} x {y} x {z} mm; change spacing_mm.")
        kind = ViewConfig(size=self.config.size, spacing_mm=(x, x))
        rng = np.random.default_rng([self.seed, copy, *case.id.encode()])
        extents = region_extents(whole.array, whole.affine, case.regions)
        return plan_view(case, kind, extents, rng, "")

    def _phantom(self, number: int) -> MaskMap:
        config = self.config
        seed = number if self.split == "train" else VALIDATION_SEED + number
        regions = config.phantom_regions[number % len(config.phantom_regions)]
        drawn = phantom_labels(config.size, config.spacing_mm, regions, seed)
        rng = np.random.default_rng([self.seed, seed])
        labels = with_tumour(drawn, rng) if rng.random() < config.phantom_tumours else drawn
        return MaskMap(labels.array, regions, regions == _MIRRORED)


def with_tumour(labels: Volume, rng: np.random.Generator) -> Volume:
    """Grow one tumour of a kind that has a host in a label map and a channel in the released generator."""
    possible = [kind for kind in KINDS.values() if kind.id in SIZED and np.isin(labels.array, kind.hosts).any()]
    chance = rng.random()
    if not possible:
        return labels
    wish = TumorWish(kind=possible[int(chance * len(possible))].name)
    try:
        return grow_tumors(labels, [wish], rng)[0]
    except MaisiError:  # the host is too thin on this grid
        return labels
