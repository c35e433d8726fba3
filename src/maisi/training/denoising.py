"""What the diffusion stages and the ControlNet's share: latents in, one network trained on perturbed ones.

Knows the process and the data, not what the network is nor what else it is told.
"""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from maisi.config import Config
from maisi.device import feature_layout, placed, resolve_device
from maisi.diffusion.ddpm import DDPM
from maisi.diffusion.process import Process
from maisi.diffusion.rectified_flow import RectifiedFlow
from maisi.diffusion.sampler import sample
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder
from maisi.splitting.autoencoder import decode
from maisi.splitting.plan import coding_plan
from maisi.training.latents import LatentBatch, LatentBatchConfig, LatentSource
from maisi.training.loop import LoopConfig
from maisi.training.losses import channel_weights
from maisi.training.optimizer import OptimizerConfig, Trainee
from maisi.training.pictures import three_planes
from maisi.training.state import Checkpoint, step_generator
from maisi.weights.load import load_network, save_network

LossKind = Literal["l1", "l2", "image"]


class NoiseRun(Config):
    """Settings of a stage that trains a denoising network, wherever its latents come from.

    Attributes:
        init: weights to start from; none starts afresh.
        validation_batches: batches over which the validation loss is averaged, always the same ones.
        sample_steps: steps of the validation pictures.
    """

    loop: LoopConfig
    init: Path | None = None
    process: RectifiedFlow | DDPM = Field(default=RectifiedFlow(), discriminator="kind")
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, schedule="polynomial")
    validation_batches: int = Field(default=8, ge=1)
    sample_steps: int = Field(default=20, ge=1)


class DenoisingRun(NoiseRun):
    """Settings of a stage that trains on cached latents.

    Attributes:
        data: folder of cached latents (`maisi prepare --views`).
        autoencoder: weights that decode the validation pictures; none leaves the pictures out.
        loss: difference of prediction and target: absolute (`l1`, as the released models), squared (`l2`), or squared
            with each latent channel weighted by how much it changes the image (`image`, which needs `autoencoder`; see
            `losses.channel_weights`).
    """

    data: Path
    autoencoder: Path | None = None
    batches: LatentBatchConfig = LatentBatchConfig()
    loss: LossKind = "l1"

    @model_validator(mode="after")
    def _check(self) -> DenoisingRun:
        if self.loss == "image" and self.autoencoder is None:
            raise ValueError("the loss 'image' weights channels by what the autoencoder makes of them; name one")
        return self


class BatchSource(Protocol):
    """Where batches come from; `scale_factor` is what its latents were multiplied by."""

    scale_factor: float

    @property
    def latent_shapes(self) -> Collection[Shape]:
        """`C X/4 Y/4 Z/4` of all latents that may come."""

    def batch(self, step: int) -> LatentBatch:
        """The batch of one step, which depends on the step alone."""


Shape = tuple[int, int, int, int]

Sources = tuple[BatchSource, BatchSource]
"""For training, and held out from it."""

Decode = Callable[[Tensor], Tensor]
"""From latents without their scale factor, `1 C X/4 Y/4 Z/4`, to what is shown, `1 C X Y Z`."""


def latent_sources(run: DenoisingRun, with_labels: bool, scale_factor: float | None = None) -> Sources:
    """Open the cached latents of a run; held-out ones are always told their regions. See `LatentSource`."""
    told = run.batches.model_copy(update={"drop_regions": 0.0})
    return (
        LatentSource(run.data, "train", run.batches, run.loop.seed, with_labels, scale_factor),
        LatentSource(run.data, "validation", told, run.loop.seed, with_labels, scale_factor),
    )


def _decode(autoencoder: Autoencoder, device: torch.device, latents: Tensor) -> Tensor:
    """Latents `B C X/4 Y/4 Z/4` to images, one by one, in as many parts as the memory that is free now asks for."""
    x, y, z = (n * autoencoder.config.compression for n in latents.shape[2:])
    plan = coding_plan(autoencoder.config, "decode", (x, y, z), device, torch.float32)
    images = [decode(autoencoder, one, plan.execution(device), plan.axis) for one in latents[:, None]]
    return torch.cat(images)


class DenoisingStage(ABC):
    """See `maisi.training.loop.Stage`. `part` names the trained network in checkpoints and files."""

    part: str

    def __init__(
        self,
        run: NoiseRun,
        network: nn.Module,
        averaged: nn.Module,
        sources: Sources,
        autoencoder: Path | None = None,
        loss: LossKind = "l1",
    ) -> None:
        """Take the network to train, another one of its kind for the averaged weights, and what decodes pictures."""
        self.settings = run
        self.seed = run.loop.seed
        self.device = resolve_device(run.loop.device)
        self.layout = feature_layout(self.device, run.loop.dtype)
        self.process: Process = run.process
        self.autoencoder_file = autoencoder
        self.source, self.held_out = sources
        self.network = placed(network, self.device, self.layout)
        self.averaged = placed(averaged, self.device, self.layout)
        self._require_fit()
        self.trainee = Trainee(self.part, self.network, run.optimizer, run.loop.steps)
        self.loss = loss
        self.channel_weights = self._channel_weights() if loss == "image" else None

    def _require_fit(self) -> None:
        """Refuse latents that the network cannot take: a step would broadcast them, or end in PyTorch's words.

        Raises:
            MaisiError: so.
        """
        config: Any = self.network.config
        ends = {config.in_channels, getattr(config, "out_channels", config.in_channels)}
        for shape in {*self.source.latent_shapes, *self.held_out.latent_shapes}:
            channels, *size = shape
            if ends != {channels}:
                raise MaisiError(
                    f"The latents have {channels} channels; give model.in_channels and out_channels that number, or "
                    "other latents."
                )
            if any(n % config.size_multiple for n in size):
                raise MaisiError(
                    f"Latents of {' x '.join(map(str, size))} do not halve {len(config.channels) - 1} times; give "
                    f"sizes whose latents are multiples of {config.size_multiple}, or fewer levels."
                )

    @abstractmethod
    def predict(self, network: nn.Module, x: Tensor, times: Tensor, batch: LatentBatch) -> Tensor:
        """What the trained `network` (and others) make of noisy latents `x`, told the batch's conditions."""

    @abstractmethod
    def losses(
        self, network: nn.Module, noisy: Tensor, times: Tensor, target: Tensor, batch: LatentBatch
    ) -> dict[str, Tensor]:
        """Terms whose sum is minimised."""

    def difference(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What the loss is the mean of, `B C X Y Z`."""
        if self.loss == "l1":
            return (prediction - target).abs()
        squared = (prediction - target).square()
        return squared if self.channel_weights is None else squared * self.channel_weights

    def _channel_weights(self) -> Tensor:
        decode = self.decoder()
        assert decode is not None
        return channel_weights(decode, self.held_out.batch(0).z.to(self.device) / self.held_out.scale_factor)

    def batch(self, step: int) -> list[LatentBatch]:
        """One entry for each accumulated batch."""
        count = self.settings.optimizer.accumulate
        return [self.source.batch(step * count + i) for i in range(count)]

    def update(self, batch: list[LatentBatch], step: int) -> Mapping[str, float]:
        """Make one optimizer step."""
        sums: dict[str, float] = {}
        for part, item in enumerate(batch):
            terms = self.perturbed_losses(self.network, item, step * len(batch) + part, stream=2)
            (torch.stack(list(terms.values())).sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batch)
        return {**sums, "gradient": self.trainee.apply(step)}

    def perturbed_losses(self, network: nn.Module, batch: LatentBatch, step: int, stream: int) -> dict[str, Tensor]:
        """Draw times and noise for a batch and compute the terms of the loss."""
        batch = batch.to(self.device)
        generator = step_generator(self.seed, step, stream)
        z = batch.z
        times = self.process.draw_times(len(z), z[0, 0].numel(), generator).to(self.device)
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        noisy, target = self.process.perturb(z, noise, times)
        return self.losses(network, noisy, times, target, batch)

    def autocast(self) -> torch.autocast:
        """The precision asked for."""
        return self.settings.loop.autocast(self.device)

    @torch.no_grad()
    def validate(self, step: int) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
        """Losses of the averaged weights on held-out latents, at the same times and noise every time; samples."""
        self.averaged.load_state_dict(self.trainee.ema.values)
        sums: dict[str, float] = {}
        for index in range(self.settings.validation_batches):
            for name, value in self.validation_terms(self.held_out.batch(index), index).items():
                sums[name] = sums.get(name, 0.0) + value / self.settings.validation_batches
        decode = self.decoder()
        if decode is None:
            return sums, {}
        try:
            return sums, {"sample": self._samples(decode)}
        except MaisiError as error:  # too little memory for pictures is no reason to stop
            warnings.warn(f"No validation pictures: {error}", stacklevel=1)
            return sums, {}

    def validation_terms(self, batch: LatentBatch, index: int) -> dict[str, float]:
        """What validation averages over batches."""
        terms = self.perturbed_losses(self.averaged, batch, index, stream=3)
        return {name: float(value) for name, value in terms.items()}

    def decoder(self) -> Decode | None:
        """What turns latents into pictures; None where there is nothing for that."""
        if self.autoencoder_file is None:
            return None
        autoencoder = load_network(self.autoencoder_file, self.device, network="autoencoder")
        assert isinstance(autoencoder, Autoencoder)
        return partial(_decode, autoencoder, self.device)

    def _samples(self, decode: Decode) -> Tensor:
        """Pictures for the conditions of two held-out views."""
        rows: list[Tensor] = []
        for index in range(2):
            batch = self.held_out.batch(index).first().to(self.device)
            noise = torch.randn(batch.z.shape, generator=step_generator(0, index, stream=4)).to(self.device)

            def denoise(x: Tensor, times: Tensor, batch: LatentBatch = batch) -> Tensor:
                return self.predict(self.averaged, x, times, batch)

            z = sample(self.process, denoise, noise, steps=self.settings.sample_steps, solver="ddim")
            rows += [*self.rows_above(batch), self.picture(decode(z / self.held_out.scale_factor))]
        width = max(row.shape[2] for row in rows)
        return torch.cat([nn.functional.pad(row, (0, width - row.shape[2])) for row in rows], 1)

    def picture(self, decoded: Tensor) -> Tensor:
        """A row of pictures of what the autoencoder gave out, `1 C X Y Z`."""
        return three_planes(decoded[0, 0].clamp(0, 1))

    def rows_above(self, batch: LatentBatch) -> list[Tensor]:
        """Pictures to show above a sample."""
        return []

    def checkpoint(self) -> Checkpoint:
        """The network and its optimizer."""
        return Checkpoint(self.trainee.tensors(), {})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `checkpoint`."""
        self.trainee.restore(dict(checkpoint.tensors))

    def export(self, folder: Path) -> None:
        """Write `PART.safetensors` with the averaged weights, the process and the scale factor."""
        self.averaged.load_state_dict(self.trainee.ema.values)
        save_network(folder / f"{self.part}.safetensors", self.averaged, metadata=self.metadata())

    def metadata(self) -> dict[str, str]:
        """What the network's file says beside its configuration."""
        return {
            "maisi.scale_factor": repr(self.source.scale_factor),
            "maisi.process": json.dumps(self.process.config()),
        }
