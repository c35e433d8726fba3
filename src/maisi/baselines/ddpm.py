"""DDPM in image space (Ho et al. 2020): the package's U-Net on whole coarse CTs, no autoencoder, no conditions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from maisi.baselines.images import GridConfig, GridImages, shown
from maisi.baselines.trained import Progress, save_trained
from maisi.device import feature_layout, placed
from maisi.diffusion.ddpm import DDPM
from maisi.diffusion.sampler import sample
from maisi.errors import MaisiError
from maisi.networks.unet import UNet, UNetConfig
from maisi.training.denoising import Decode, NoiseRun
from maisi.training.diffusion import UNetStage, initial_unet
from maisi.training.latents import LatentBatch


class DdpmRun(NoiseRun):
    """A complete training of a DDPM on images.

    Attributes:
        data: prepared folder (`maisi prepare`).
        grid: what the network sees of a case, and makes.
        model: 1 channel in and out; it is told the time alone.
    """

    data: Path
    grid: GridConfig = GridConfig()
    process: DDPM = DDPM()
    model: UNetConfig = UNetConfig(in_channels=1, out_channels=1)
    batch_size: PositiveInt = 1

    @model_validator(mode="after")
    def _check(self) -> DdpmRun:
        model = self.model
        if (model.in_channels, model.out_channels) != (1, 1):
            raise ValueError("model.in_channels and model.out_channels must be 1: images have one channel")
        if model.region_input or model.spacing_input or model.num_modalities or model.context_channels:
            raise ValueError(
                "this baseline has no conditions; leave region, spacing, modality and context out of model"
            )
        self.grid.require_multiple(model.size_multiple)
        return self


class ImageBatches:
    """Images in the place of latents; see `maisi.training.denoising.BatchSource`."""

    scale_factor = 1.0

    def __init__(self, images: GridImages, batch_size: int) -> None:
        self.images, self.batch_size = images, batch_size

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int, int]]:
        """See `maisi.training.denoising.BatchSource`."""
        return ((1, *self.images.grid.size),)

    def batch(self, step: int) -> LatentBatch:
        """The batch of one step, told nothing."""
        return LatentBatch(self.images.batch(step, self.batch_size), {}, None)


class DdpmStage(UNetStage):
    """See `maisi.training.loop.Stage`."""

    part = "unet"

    def __init__(self, run: DdpmRun) -> None:
        self.run = run
        images = (GridImages(run.data, split, run.grid, run.loop.seed) for split in ("train", "validation"))
        train, held_out = (ImageBatches(found, run.batch_size) for found in images)
        unet = initial_unet(run, run.model)
        if unet.config != run.model:
            raise MaisiError(f"init starts from {run.init}, which is another network than 'model'; give 'model' as it.")
        super().__init__(run, unet, UNet(unet.config), (train, held_out))

    def decoder(self) -> Decode:
        """There is nothing to decode."""
        return shown

    def export(self, folder: Path) -> None:
        """Write the averaged weights with the run's settings."""
        save_trained(folder, "ddpm", self.trainee.ema.values, self.run)


class DdpmMaker:
    """See `maisi.baselines.trained.Maker`."""

    def __init__(self, run: DdpmRun, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.run, self.device, self.dtype = run, device, dtype
        self.layout = feature_layout(device, dtype)
        network = UNet(run.model)
        network.load_state_dict(dict(tensors))
        self.network = placed(network.eval(), device, self.layout, dtype)

    def make(self, generator: torch.Generator, steps: int | None, solver: str | None, progress: Progress) -> Tensor:
        """Denoise; `steps` and `solver` are as published where they are None: all timesteps, ancestral."""
        noise = torch.randn((1, 1, *self.run.grid.size), generator=generator).to(self.device)

        def denoise(x: Tensor, times: Tensor) -> Tensor:
            prediction: Tensor = self.network(x.to(self.dtype).contiguous(memory_format=self.layout), times)
            return prediction.float()

        steps = steps or self.run.process.num_train_timesteps
        values = sample(
            self.run.process, denoise, noise, steps=steps, solver=solver, generators=[generator], progress=progress
        )
        return values[0]


def check_sampling(run: DdpmRun, steps: int | None, solver: str | None) -> None:
    """Look at steps and solver before anything is loaded.

    Raises:
        MaisiError: the process has no such solver, or not so many steps.
    """
    if solver is not None and solver not in run.process.solvers:
        raise MaisiError(f"{solver!r} is no solver for DDPM; choose one of {', '.join(run.process.solvers)}.")
    if steps is not None:
        run.process.sampling_times(steps, 1)
