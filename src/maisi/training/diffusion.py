"""The diffusion stage: train the U-Net on cached latents with its conditions (paper, section 3.2, equation 3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from maisi.config import Config
from maisi.device import resolve_device
from maisi.diffusion.ddpm import DDPM
from maisi.diffusion.process import Process
from maisi.diffusion.rectified_flow import RectifiedFlow
from maisi.diffusion.sampler import sample
from maisi.networks.autoencoder import Autoencoder
from maisi.networks.unet import UNet, UNetConfig
from maisi.training.latents import LatentBatch, LatentBatchConfig, LatentSource
from maisi.training.loop import LoopConfig
from maisi.training.losses import weighted_l1
from maisi.training.optimizer import OptimizerConfig, Trainee
from maisi.training.pictures import three_planes
from maisi.training.state import Checkpoint, step_generator
from maisi.weights.load import load_network, save_network


class DiffusionRun(Config):
    """A complete training of the diffusion U-Net.

    Attributes:
        data: folder of cached latents (`maisi prepare --autoencoder`).
        autoencoder: weights that decode the validation pictures; none leaves the pictures out.
        init: weights to start from; none starts at random.
        validation_batches: batches over which the validation loss is averaged, always the same ones.
        sample_steps: steps of the validation pictures.
    """

    data: Path
    loop: LoopConfig
    autoencoder: Path | None = None
    init: Path | None = None
    model: UNetConfig = UNetConfig()
    process: RectifiedFlow | DDPM = Field(default=RectifiedFlow(), discriminator="kind")
    batches: LatentBatchConfig = LatentBatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, schedule="polynomial")
    validation_batches: int = Field(default=8, ge=1)
    sample_steps: int = Field(default=20, ge=1)


def soften_conditions(unet: UNet) -> None:
    """Divide the first weights of region and spacing embeddings by 100.

    These inputs come multiplied by 100 (released convention); at random initial weights they would drown the time.
    """
    with torch.no_grad():
        for name in ("top_region_embed", "bottom_region_embed", "spacing_embed"):
            embedding = getattr(unet, name, None)
            if embedding is not None:
                embedding[0].weight.mul_(0.01)


class DiffusionStage:
    """See `maisi.training.loop.Stage`."""

    def __init__(self, run: DiffusionRun) -> None:
        self.run = run
        self.device = resolve_device(run.loop.device)
        self.process: Process = run.process
        self.source = LatentSource(run.data, "train", run.batches, run.loop.seed)
        self.held_out = LatentSource(
            run.data, "validation", run.batches.model_copy(update={"drop_regions": 0.0}), run.loop.seed
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.loop.seed)
            model = _initial(run)
        self.model: nn.Module = model.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.trainee = Trainee("unet", self.model, run.optimizer, run.loop.steps)
        self.averaged = UNet(model.config).to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def batch(self, step: int) -> list[LatentBatch]:
        """One entry for each accumulated batch."""
        count = self.run.optimizer.accumulate
        return [self.source.batch(step * count + i) for i in range(count)]

    def update(self, batch: list[LatentBatch], step: int) -> Mapping[str, float]:
        """One optimizer step."""
        total = 0.0
        for part, item in enumerate(batch):
            generator = step_generator(self.run.loop.seed, step * len(batch) + part, stream=2)
            loss = self._loss(self.model, item.to(self.device), generator) / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return {"loss": total, "gradient": self.trainee.apply(step)}

    def _loss(self, model: nn.Module, batch: LatentBatch, generator: torch.Generator) -> Tensor:
        z = batch.z
        times = self.process.draw_times(len(z), z[0, 0].numel(), generator).to(self.device)
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        noisy, target = self.process.perturb(z, noise, times)
        noisy = noisy.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.loop.precision == "bf16"):
            prediction = model(noisy, times, **batch.conditions)
        return weighted_l1(prediction.float(), target)

    @torch.no_grad()
    def validate(self, step: int) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
        """Loss of the averaged weights on held-out latents, at the same times and noise every time, and a sample."""
        model = self.averaged
        model.load_state_dict(self.trainee.ema.values)
        losses = []
        for index in range(self.run.validation_batches):
            generator = step_generator(self.run.loop.seed, index, stream=3)
            losses.append(float(self._loss(model, self.held_out.batch(index).to(self.device), generator)))
        pictures = {} if self.run.autoencoder is None else {"sample": self._sample(model)}
        return {"loss": sum(losses) / len(losses)}, pictures

    def _sample(self, model: nn.Module) -> Tensor:
        """Two volumes from fixed noise and the conditions of held-out views of two sizes or regions."""
        decoder = load_network(self.run.autoencoder, device=str(self.device))  # type: ignore[arg-type]
        assert isinstance(decoder, Autoencoder)
        rows = []
        for index in range(2):
            batch = self.held_out.batch(index).to(self.device)
            conditions = {name: value[:1] for name, value in batch.conditions.items()}
            noise = torch.randn(batch.z[:1].shape, generator=step_generator(0, index, stream=4)).to(self.device)
            z = sample(
                self.process,
                lambda x, t, c=conditions: model(x, t, **c),  # type: ignore[misc]
                noise,
                steps=self.run.sample_steps,
                solver="ddim",
            )
            rows.append(three_planes(decoder.decode(z / self.held_out.folder.scale_factor)[0, 0].clamp(0, 1)))
        return torch.cat(rows, 1)

    def checkpoint(self) -> Checkpoint:
        """The U-Net and its optimizer."""
        return Checkpoint(self.trainee.tensors(), {})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `checkpoint`."""
        self.trainee.restore(dict(checkpoint.tensors))

    def export(self, folder: Path) -> None:
        """Write `unet.safetensors` with the averaged weights, the process and the scale factor."""
        import json

        self.averaged.load_state_dict(self.trainee.ema.values)
        metadata: dict[str, Any] = {
            "maisi.scale_factor": repr(self.source.folder.scale_factor),
            "maisi.process": json.dumps(self.process.config()),
        }
        save_network(folder / "unet.safetensors", self.averaged, metadata=metadata)


def _initial(run: DiffusionRun) -> UNet:
    if run.init is not None:
        loaded = load_network(run.init)
        assert isinstance(loaded, UNet)
        return loaded
    unet = UNet(run.model)
    soften_conditions(unet)
    return unet
