"""Prepared CTs on one grid, as the baselines see them: whole, in [-1, 1], told nothing. Knows no network.

What a step sees depends on seed and step alone.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from maisi.config import Config
from maisi.data.prepared import PreparedFolder, Split
from maisi.data.preprocess import HU_MIN, resample_to_grid, unwindow_ct, window_ct
from maisi.data.views import ViewConfig, plan_view
from maisi.errors import MaisiError
from maisi.request import SPACING_RANGE_MM
from maisi.training.state import step_rng
from maisi.volume import Volume

CACHE_BYTES = 2 * 2**30
"""Boxes are kept in memory up to this much."""


class GridConfig(Config):
    """The grid that all volumes of a baseline have.

    Attributes:
        size: voxels along X, Y, Z.
        spacing_mm: side of the cubic voxels.
        views: boxes laid into each case, at places of their own where the case is larger than the box.
        mirror: mirror half of the boxes of cases of the head and neck alone left to right.
    """

    size: tuple[PositiveInt, PositiveInt, PositiveInt] = (128, 128, 128)
    spacing_mm: float = Field(default=4.0, ge=SPACING_RANGE_MM[0], le=SPACING_RANGE_MM[1])
    views: PositiveInt = 1
    mirror: bool = False

    def require_multiple(self, multiple: int) -> None:
        """Raise a ValueError unless every axis is a multiple of what the networks need."""
        if any(n % multiple for n in self.size):
            raise ValueError(f"grid.size is {self.size}, but these networks need multiples of {multiple}")


class GridImages:
    """The boxes of one split, by number."""

    def __init__(self, data: Path, split: Split, grid: GridConfig, seed: int) -> None:
        """Open a prepared folder.

        Raises:
            MaisiError: it has no CT of that split.
        """
        self.folder, self.grid, self.seed = PreparedFolder(data), grid, seed
        copies = grid.views if split == "train" else 1
        cases = [case for case in self.folder.cases(split) if case.is_ct]
        if not cases:
            raise MaisiError(f"{data} has no {split} CTs; prepare more patients or another split.")
        self.boxes = [(case, copy) for case in cases for copy in range(copies)]
        weights = np.array([case.weight for case, _ in self.boxes])
        self.chances = weights / weights.sum()
        self._kept = lru_cache(maxsize=max(1, CACHE_BYTES // (2 * math.prod(grid.size))))(self._made)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, number: int) -> NDArray[np.int16]:
        """A box in HU (X, Y, Z), air outside the case; it is cut when it is first asked for."""
        return self._kept(number)

    def batch(self, step: int, count: int) -> Tensor:
        """The batch of one step, `B 1 X Y Z` float32 in [-1, 1]."""
        chosen = step_rng(self.seed, step, stream=0).choice(len(self), count, p=self.chances)
        return torch.stack([signed(self[int(number)]) for number in chosen])

    def _made(self, number: int) -> NDArray[np.int16]:
        case, copy = self.boxes[number]
        spacing = self.grid.spacing_mm
        kind = ViewConfig(size=self.grid.size, spacing_mm=(spacing, spacing), mirror=self.grid.mirror)
        plan = plan_view(case, kind, {}, np.random.default_rng([self.seed, copy, *case.id.encode()]), "")
        whole = Volume(np.asarray(self.folder.image(case)), np.array(case.affine))
        like = Volume(np.broadcast_to(np.uint8(0), self.grid.size), plan.grid)
        seen = resample_to_grid(whole, like, order=1, fill=HU_MIN).array
        return np.ascontiguousarray(seen[::-1] if plan.mirrored else seen)


def signed(hu: NDArray[np.int16]) -> Tensor:
    """HU of any shape -> [-1, 1] float32, with an axis of one channel before it."""
    return torch.from_numpy(window_ct(hu))[None] * 2 - 1


def to_hu(values: Tensor) -> NDArray[np.int16]:
    """Inverse of `signed`: [-1, 1], `1 X Y Z` -> int16 HU (X, Y, Z); values beyond are clipped."""
    return unwindow_ct(shown(values)[0].float().cpu().numpy())


def shown(values: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clipped, as pictures want it."""
    return ((values + 1) / 2).clamp(0, 1)
