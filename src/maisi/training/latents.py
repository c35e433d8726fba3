"""Batches of cached latents, their conditions and label maps. What a step sees depends on seed and step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from maisi.conditions import MASK_BITS, Conditions, stack
from maisi.config import Config
from maisi.data.prepared import Split
from maisi.data.views import LatentFolder, LatentView
from maisi.errors import MaisiError
from maisi.networks.autoencoder import LatentDistribution
from maisi.training.state import step_generator, step_rng


class LatentBatchConfig(Config):
    """How batches are drawn.

    Attributes:
        drop_regions: share of items whose regions are hidden, so that the network also learns to do without.
        weights: how often cases of a group (the first region of a view) are drawn, relative to their number.
        max_voxels: views with more image voxels are left out: coarse ones first teach quickly where things are.
    """

    batch_size: int = Field(default=1, ge=1)
    drop_regions: float = Field(default=0.1, ge=0, le=1)
    weights: Mapping[str, float] = {}
    max_voxels: int | None = None


@dataclass(frozen=True)
class LatentBatch:
    """One batch.

    Attributes:
        z: latents drawn from their distributions, times the scale factor, `B C X/4 Y/4 Z/4`.
        conditions: keyword arguments of the U-Net: `spacing` (B, 3), `top_region` (B, 4), `bottom_region`
            (B, 4), `modality` (B,).
        labels: label maps `B X Y Z` uint8, where they were asked for.
        image: the images `B 1 X Y Z` float32 in [0, 1], where labels were asked for and all views keep theirs.
        region: 1 where an item is to be inpainted, `B 1 X Y Z`; None, or all 1: everywhere.
    """

    z: Tensor
    conditions: dict[str, Tensor]
    labels: Tensor | None
    image: Tensor | None = None
    region: Tensor | None = None

    def first(self) -> LatentBatch:
        """The first item alone."""
        conditions = {name: value[:1] for name, value in self.conditions.items()}
        rest = (None if t is None else t[:1] for t in (self.labels, self.image, self.region))
        return LatentBatch(self.z[:1], conditions, *rest)

    def to(self, device: torch.device) -> LatentBatch:
        """Move everything."""
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        rest = (None if t is None else t.to(device) for t in (self.labels, self.image, self.region))
        return LatentBatch(self.z.to(device), conditions, *rest)


def condition_tensors(conditions: list[Conditions]) -> dict[str, Tensor]:
    """Keyword arguments of the U-Net for a batch."""
    arrays = stack(conditions)
    return {
        "spacing": torch.from_numpy(arrays.spacing),
        "top_region": torch.from_numpy(arrays.top_region),
        "bottom_region": torch.from_numpy(arrays.bottom_region),
        "modality": torch.from_numpy(arrays.modality),
    }


def mask_tensor(labels: Tensor) -> Tensor:
    """Label maps `B X Y Z` uint8 -> `B 8 X Y Z` float32 bits, the least significant first, where the labels are."""
    bits = torch.arange(MASK_BITS, dtype=torch.uint8, device=labels.device)
    return ((labels[:, None] >> bits[:, None, None, None]) & 1).float()


class LatentSource:
    """Draws batches. All items of a batch have one size: the size is drawn first, then the items of that size."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        config: LatentBatchConfig,
        seed: int,
        with_labels: bool = False,
        scale_factor: float | None = None,
    ) -> None:
        """Open a folder; `scale_factor` is the one to use in place of the folder's own."""
        self.folder = LatentFolder(folder)
        self.scale_factor = self.folder.scale_factor if scale_factor is None else scale_factor
        self.config, self.seed, self.with_labels = config, seed, with_labels
        self.groups: dict[tuple[int, ...], list[LatentView]] = {}
        for view in self.folder.views(split):
            if config.max_voxels is not None and math.prod(view.shape) > config.max_voxels:
                continue
            self.groups.setdefault(view.shape, []).append(view)
        if not self.groups:
            raise MaisiError(f"{folder} has no {split} latents (of at most max_voxels); prepare more patients.")
        self.sizes = sorted(self.groups)
        self._chances = {size: self._chances_of(self.groups[size]) for size in self.sizes}
        totals = np.array([sum(self._weight(v) for v in self.groups[size]) for size in self.sizes])
        self._size_chances = totals / totals.sum()

    @property
    def latent_shapes(self) -> frozenset[tuple[int, int, int, int]]:
        """`C X/4 Y/4 Z/4` of all latents: the channels and the compression are those of the first."""
        size = self.sizes[0]
        channels, *small = self.folder.load(self.groups[size][0], with_labels=False).mean.shape
        factor = size[0] // small[0]
        return frozenset((channels, x // factor, y // factor, z // factor) for x, y, z in self.sizes)

    def _weight(self, view: LatentView) -> float:
        return self.config.weights.get(view.regions[0] if view.regions else "", 1.0)

    def _chances_of(self, views: list[LatentView]) -> NDArray[np.float64]:
        weights = np.array([self._weight(view) for view in views], dtype=np.float64)
        chances: NDArray[np.float64] = weights / weights.sum()
        return chances

    def batch(self, step: int) -> LatentBatch:
        """The batch of one step."""
        rng = step_rng(self.seed, step, stream=0)
        size = self.sizes[int(rng.choice(len(self.sizes), p=self._size_chances))]
        views = self.groups[size]
        chosen = rng.choice(len(views), self.config.batch_size, p=self._chances[size])
        hidden = rng.random(self.config.batch_size) < self.config.drop_regions
        generator = step_generator(self.seed, step, stream=1)
        return self.collate([views[int(i)] for i in chosen], list(hidden), generator)

    def collate(self, views: list[LatentView], hidden: list[bool], generator: torch.Generator) -> LatentBatch:
        """Load `views` as one batch; the regions of `hidden` items are not told."""
        latents, labels, images, conditions = [], [], [], []
        for view, hide in zip(views, hidden, strict=True):
            stored = self.folder.load(view, with_labels=self.with_labels)
            latents.append(LatentDistribution(stored.mean, stored.log_variance).sample(generator) * self.scale_factor)
            conditions.append(Conditions(view.spacing_mm, () if hide else view.regions, view.modality))
            if stored.labels is not None:
                labels.append(stored.labels)
            if stored.image is not None:
                images.append(stored.image.float()[None])
        return LatentBatch(
            torch.stack(latents),
            condition_tensors(conditions),
            torch.stack(labels) if labels else None,
            torch.stack(images) if len(images) == len(views) else None,
        )
