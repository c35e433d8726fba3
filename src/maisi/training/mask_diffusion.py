"""The mask diffusion stage: the U-Net learns latents of label maps, told ten anatomy sizes, regions and spacing.

All training maps are encoded once, when the stage begins, and their latents kept in memory: half a byte for each voxel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from maisi.conditions import Conditions
from maisi.data.anatomy_sizes import (
    SIZED,
    TRAINING_KEY,
    MaskCase,
    MaskTraining,
    Sizes,
    context,
    measure_ml,
    relative_sizes,
)
from maisi.data.mask_codes import MaskCodes
from maisi.data.mask_maps import Labels, MaskMaps, MaskMapsConfig
from maisi.device import resolve_device
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, LatentDistribution
from maisi.networks.unet import MASK_UNET, UNet, UNetConfig
from maisi.training.denoising import NoiseRun
from maisi.training.diffusion import UNetStage, initial_unet
from maisi.training.latents import LatentBatch, condition_tensors, mask_tensor
from maisi.training.mask_autoencoder import load_mask_autoencoder
from maisi.training.pictures import label_planes
from maisi.training.state import step_generator, step_rng

MOST_CASES = 512
"""Training maps whose regions and sizes are kept in the network's file."""


class MaskDiffusionRun(NoiseRun):
    """A complete training of the mask diffusion U-Net.

    Attributes:
        autoencoder: trained mask autoencoder; it stays as it is.
        data: prepared folder (`maisi prepare`); none trains on the phantoms of `maps` alone.
        coarsen: ids that the autoencoder has no channel for count as bone or body, as when it was trained; off, they
            are an error.
        drop_regions: share of items whose regions are hidden.
    """

    autoencoder: Path
    data: Path | None = None
    coarsen: bool = False
    maps: MaskMapsConfig = MaskMapsConfig()
    model: UNetConfig = MASK_UNET
    batch_size: int = Field(default=1, ge=1)
    drop_regions: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> MaskDiffusionRun:
        if self.model.context_channels != len(SIZED):
            raise ValueError(f"model.context_channels must be {len(SIZED)}, one for each anatomy size")
        return self


@dataclass(frozen=True)
class MaskLatent:
    """A label map as the U-Net sees it: latent `C X/4 Y/4 Z/4`, regions, and sizes in ml."""

    latent: LatentDistribution
    regions: tuple[str, ...]
    volumes_ml: Sizes


class MaskLatents:
    """Batches of encoded label maps; see `maisi.training.denoising.BatchSource`."""

    def __init__(
        self, latents: list[MaskLatent], training: MaskTraining, scale_factor: float, run: MaskDiffusionRun, hide: float
    ) -> None:
        """Take latents, what sizes are relative to, and the share of items whose regions are hidden."""
        self.latents, self.training, self.scale_factor = latents, training, scale_factor
        self.batch_size, self.seed, self.hide = run.batch_size, run.loop.seed, hide

    @property
    def latent_shapes(self) -> frozenset[tuple[int, int, int, int]]:
        """See `maisi.training.denoising.BatchSource`."""
        return frozenset((c, x, y, z) for c, x, y, z in (item.latent.mean.shape for item in self.latents))

    def batch(self, step: int) -> LatentBatch:
        """The batch of one step."""
        rng = step_rng(self.seed, step, stream=0)
        chosen = [self.latents[int(i)] for i in rng.integers(len(self.latents), size=self.batch_size)]
        hidden = rng.random(self.batch_size) < self.hide
        generator = step_generator(self.seed, step, stream=1)
        z = [item.latent.sample(generator) for item in chosen]
        told = [
            Conditions(self.training.spacing_mm, () if hide else item.regions)
            for item, hide in zip(chosen, hidden, strict=True)
        ]
        sizes = [relative_sizes(item.volumes_ml, self.training.largest_ml) for item in chosen]
        conditions = {**condition_tensors(told), "context": torch.from_numpy(context(sizes))}
        return LatentBatch(torch.stack(z) * self.scale_factor, conditions, None)


class MaskDiffusionStage(UNetStage):
    """See `maisi.training.loop.Stage`."""

    part = "mask_unet"

    def __init__(self, run: MaskDiffusionRun) -> None:
        autoencoder, self.codes = load_mask_autoencoder(run.autoencoder)
        multiple = autoencoder.config.compression * run.model.size_multiple
        if any(n % multiple for n in run.maps.size):
            raise MaisiError(
                f"maps.size is {run.maps.size}, but these networks need multiples of {multiple}; change it."
            )
        autoencoder.to(resolve_device(run.loop.device))
        train, held_out = (
            list(_encoded(autoencoder, self.codes, MaskMaps(run.maps, run.data, split, run.loop.seed), run))
            for split in ("train", "validation")
        )
        self.training = _training(run, train)
        scale = 1 / float(torch.stack([item.latent.mean for item in train]).double().std())
        sources = (
            MaskLatents(train, self.training, scale, run, run.drop_regions),
            MaskLatents(held_out, self.training, scale, run, 0.0),
        )
        unet = initial_unet(run, run.model)
        super().__init__(run, unet, UNet(unet.config), sources, run.autoencoder)

    def picture(self, decoded: Tensor) -> Tensor:
        """A label map made of class scores."""
        return label_planes(torch.from_numpy(self.codes.labels(decoded[0].argmax(0).cpu().numpy())))

    def metadata(self) -> dict[str, str]:
        """Beside the rest: the maps' grid, their largest volumes, their sizes."""
        return {**super().metadata(), TRAINING_KEY: self.training.model_dump_json()}


@torch.no_grad()
def _encoded(autoencoder: Autoencoder, codes: MaskCodes, maps: MaskMaps, run: MaskDiffusionRun) -> Iterator[MaskLatent]:
    device = next(autoencoder.parameters()).device
    for number in range(len(maps)):
        map = maps[number]
        for labels in _variants(maps, number):
            listed = codes.coarse(labels) if run.coarsen else labels
            codes.channels(listed)  # an id without a channel is an error here, in words
            found = autoencoder.encode(mask_tensor(torch.from_numpy(listed)[None]).to(device))
            volumes = measure_ml(labels, run.maps.spacing_mm)
            latent = LatentDistribution(found.mean[0].cpu(), found.log_variance[0].cpu())
            yield MaskLatent(latent, map.regions, volumes)


def _variants(maps: MaskMaps, number: int) -> list[Labels]:
    """The map, and its mirror image where that is wanted and allowed."""
    map = maps[number]
    mirrored = maps.mirrored(map, wanted=maps.split == "train")
    return [map.labels] if mirrored is map.labels else [map.labels, mirrored]


def _training(run: MaskDiffusionRun, latents: list[MaskLatent]) -> MaskTraining:
    largest: Sizes = tuple(float(n) for n in np.max([item.volumes_ml for item in latents], axis=0))
    cases = [
        MaskCase(regions=item.regions, sizes=tuple(round(s, 4) for s in relative_sizes(item.volumes_ml, largest)))
        for item in latents[:: -(-len(latents) // MOST_CASES)]
    ]
    return MaskTraining(size=run.maps.size, spacing_mm=run.maps.spacing_mm, largest_ml=largest, cases=tuple(cases))
