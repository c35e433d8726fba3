"""The ControlNet stage: the U-Net frozen, its copy learns to follow label maps (paper, section 3.3, equation 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.anatomy import TUMORS
from maisi.config import Config
from maisi.device import resolve_device
from maisi.diffusion.ddpm import DDPM
from maisi.diffusion.process import Process
from maisi.diffusion.rectified_flow import RectifiedFlow
from maisi.diffusion.sampler import sample
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder
from maisi.networks.controlnet import ControlNet, ControlNetConfig
from maisi.networks.unet import UNet
from maisi.training.latents import LatentBatch, LatentBatchConfig, LatentSource, mask_tensor
from maisi.training.loop import LoopConfig
from maisi.training.losses import region_contrastive, weighted_l1
from maisi.training.optimizer import OptimizerConfig, Trainee
from maisi.training.pictures import label_planes, three_planes
from maisi.training.state import Checkpoint, step_generator
from maisi.weights.load import load_network, save_network


class ControlNetRun(Config):
    """A complete training of the ControlNet.

    Attributes:
        data: folder of cached latents with labels.
        unet: trained U-Net; it stays frozen.
        autoencoder: weights that decode the validation pictures; none leaves the pictures out.
        init: ControlNet weights to start from; none starts as a copy of the U-Net's encoder.
        mask_encoder_channels: widths of the mask encoder; none takes the released ones.
        weighted_labels: ids whose voxels count `label_weight` times in the loss (the paper: tumours, x100).
        contrastive_weight: of the region-contrastive loss; 0 is off. It needs tumours in the label maps.
        contrastive_bound: a difference beyond it inside a tumour earns nothing more.
    """

    data: Path
    unet: Path
    loop: LoopConfig
    autoencoder: Path | None = None
    init: Path | None = None
    mask_encoder_channels: tuple[int, ...] | None = None
    process: RectifiedFlow | DDPM = Field(default=RectifiedFlow(), discriminator="kind")
    batches: LatentBatchConfig = LatentBatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, schedule="polynomial")
    weighted_labels: tuple[int, ...] = tuple(TUMORS)
    label_weight: float = Field(default=100.0, ge=1)
    contrastive_weight: float = Field(default=0.01, ge=0)
    contrastive_bound: float = Field(default=2.0, gt=0)
    validation_batches: int = Field(default=8, ge=1)
    sample_steps: int = Field(default=20, ge=1)


def without_tumours(labels: Tensor) -> Tensor:
    """Replace each tumour by its (first) host organ; any shape, uint8."""
    result = labels.clone()
    for tumour, hosts in TUMORS.items():
        result[labels == tumour] = hosts[0]
    return result


class ControlNetStage:
    """See `maisi.training.loop.Stage`."""

    def __init__(self, run: ControlNetRun) -> None:
        self.run = run
        self.device = resolve_device(run.loop.device)
        self.process: Process = run.process
        self.source = LatentSource(run.data, "train", run.batches, run.loop.seed, with_labels=True)
        self.held_out = LatentSource(
            run.data,
            "validation",
            run.batches.model_copy(update={"drop_regions": 0.0}),
            run.loop.seed,
            with_labels=True,
        )
        unet = load_network(run.unet, device=str(self.device))
        if not isinstance(unet, UNet):
            raise MaisiError(f"{run.unet} is not a U-Net; name the weights that the diffusion stage wrote.")
        layout = torch.channels_last_3d
        self.unet: nn.Module = unet.requires_grad_(False).to(memory_format=layout)  # type: ignore[call-overload]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.loop.seed)
            control = _initial(run, unet)
        self.control: nn.Module = control.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.trainee = Trainee("controlnet", self.control, run.optimizer, run.loop.steps)
        self.averaged = ControlNet(control.config).to(self.device, memory_format=layout)  # type: ignore[call-overload]

    def batch(self, step: int) -> list[LatentBatch]:
        """One entry for each accumulated batch."""
        count = self.run.optimizer.accumulate
        return [self.source.batch(step * count + i) for i in range(count)]

    def update(self, batch: list[LatentBatch], step: int) -> Mapping[str, float]:
        """One optimizer step."""
        sums: dict[str, float] = {}
        for part, item in enumerate(batch):
            generator = step_generator(self.run.loop.seed, step * len(batch) + part, stream=2)
            terms = self._losses(self.control, item.to(self.device), generator)
            (torch.stack(list(terms.values())).sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batch)
        return {**sums, "gradient": self.trainee.apply(step)}

    def _losses(self, control: nn.Module, batch: LatentBatch, generator: torch.Generator) -> dict[str, Tensor]:
        z, labels = batch.z, batch.labels
        assert labels is not None
        times = self.process.draw_times(len(z), z[0, 0].numel(), generator).to(self.device)
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        noisy, target = self.process.perturb(z, noise, times)
        prediction = self._predict(control, noisy, times, batch.conditions, labels)
        terms = {"loss": weighted_l1(prediction, target, self._weight(labels, z.shape[2:]))}
        region = self._tumour_region(labels, z.shape[2:])
        if self.run.contrastive_weight and region.any():
            with torch.no_grad():
                other = self._predict(control, noisy, times, batch.conditions, without_tumours(labels))
            contrast = region_contrastive(prediction, other, region, self.run.contrastive_bound)
            terms["contrastive"] = self.run.contrastive_weight * contrast
        return terms

    def _predict(
        self, control: nn.Module, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], labels: Tensor
    ) -> Tensor:
        bits = mask_tensor(labels).to(self.device)
        layout = torch.channels_last_3d
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.loop.precision == "bf16"):
            x = noisy.contiguous(memory_format=layout)
            residuals = control(x, times, bits.contiguous(memory_format=layout), modality=conditions["modality"])
            prediction: Tensor = self.unet(x, times, residuals=residuals, **conditions)
        return prediction.float()

    def _weight(self, labels: Tensor, size: torch.Size) -> Tensor | None:
        """Voxel weights at latent resolution; a latent voxel counts more if any of its voxels does."""
        if not self.run.weighted_labels:
            return None
        chosen = torch.isin(labels, torch.tensor(self.run.weighted_labels, device=labels.device, dtype=labels.dtype))
        if not chosen.any():
            return None
        share = F.adaptive_max_pool3d(chosen[:, None].float(), tuple(size))
        return 1 + (self.run.label_weight - 1) * share

    def _tumour_region(self, labels: Tensor, size: torch.Size) -> Tensor:
        tumours = torch.isin(labels, torch.tensor(tuple(TUMORS), device=labels.device, dtype=labels.dtype))
        return F.adaptive_max_pool3d(tumours[:, None].float(), tuple(size))

    @torch.no_grad()
    def validate(self, step: int) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
        """Loss with and without the ControlNet on held-out latents, and a sample beside its mask."""
        control = self.averaged
        control.load_state_dict(self.trainee.ema.values)
        with_mask, without = [], []
        for index in range(self.run.validation_batches):
            batch = self.held_out.batch(index).to(self.device)
            generator = step_generator(self.run.loop.seed, index, stream=3)
            with_mask.append(float(self._losses(control, batch, generator)["loss"]))
            generator = step_generator(self.run.loop.seed, index, stream=3)
            without.append(self._loss_alone(batch, generator))
        metrics = {"loss": sum(with_mask) / len(with_mask), "loss_without": sum(without) / len(without)}
        return metrics, {} if self.run.autoencoder is None else {"sample": self._sample(control)}

    def _loss_alone(self, batch: LatentBatch, generator: torch.Generator) -> float:
        z, labels = batch.z, batch.labels
        assert labels is not None
        times = self.process.draw_times(len(z), z[0, 0].numel(), generator).to(self.device)
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        noisy, target = self.process.perturb(z, noise, times)
        prediction = self.unet(noisy, times, **batch.conditions)
        return float(weighted_l1(prediction, target, self._weight(labels, z.shape[2:])))

    def _sample(self, control: nn.Module) -> Tensor:
        """Two held-out masks and what is generated for them."""
        decoder = load_network(self.run.autoencoder, device=str(self.device))  # type: ignore[arg-type]
        assert isinstance(decoder, Autoencoder)
        rows = []
        for index in range(2):
            batch = self.held_out.batch(index).to(self.device)
            assert batch.labels is not None
            conditions = {name: value[:1] for name, value in batch.conditions.items()}
            labels = batch.labels[:1]
            noise = torch.randn(batch.z[:1].shape, generator=step_generator(0, index, stream=4)).to(self.device)
            z = sample(
                self.process,
                lambda x, t, c=conditions, m=labels: self._predict(control, x, t, c, m),  # type: ignore[misc]
                noise,
                steps=self.run.sample_steps,
                solver="ddim",
            )
            image = decoder.decode(z / self.held_out.folder.scale_factor)[0, 0].clamp(0, 1)
            rows += [label_planes(labels[0]), three_planes(image)]
        width = max(row.shape[2] for row in rows)
        return torch.cat([F.pad(row, (0, width - row.shape[2])) for row in rows], 1)

    def checkpoint(self) -> Checkpoint:
        """The ControlNet and its optimizer; the U-Net is named by the configuration."""
        return Checkpoint(self.trainee.tensors(), {})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `checkpoint`."""
        self.trainee.restore(dict(checkpoint.tensors))

    def export(self, folder: Path) -> None:
        """Write `controlnet.safetensors` with the averaged weights."""
        self.averaged.load_state_dict(self.trainee.ema.values)
        metadata = {
            "maisi.scale_factor": repr(self.source.folder.scale_factor),
            "maisi.process": json.dumps(self.process.config()),
        }
        save_network(folder / "controlnet.safetensors", self.averaged, metadata=metadata)


def _initial(run: ControlNetRun, unet: UNet) -> ControlNet:
    if run.init is not None:
        loaded = load_network(run.init)
        if not isinstance(loaded, ControlNet):
            raise MaisiError(f"{run.init} is not a ControlNet; name one or leave init out.")
        return loaded
    shared = {name: getattr(unet.config, name) for name in ControlNetConfig.model_fields if hasattr(unet.config, name)}
    if run.mask_encoder_channels is not None:
        shared["mask_encoder_channels"] = run.mask_encoder_channels
    return ControlNet.from_unet(unet, ControlNetConfig(**shared))
