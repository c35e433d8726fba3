"""The ControlNet stage: the U-Net frozen, its copy learns to follow label maps (paper, section 3.3, equation 4).

Latents are scaled as the U-Net knows them, whichever views they are of.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.anatomy import TUMORS
from maisi.data.tumor_examples import inpainting_region
from maisi.data.views import LatentFolder
from maisi.device import placed
from maisi.diffusion.process import Process, process_from_config
from maisi.errors import MaisiError
from maisi.networks.controlnet import ControlNet, ControlNetConfig, ToldAs, inpainting_mask, with_image_input
from maisi.networks.unet import TrunkConfig, UNet
from maisi.training.denoising import DenoisingRun, DenoisingStage, latent_sources
from maisi.training.latents import LatentBatch, mask_tensor
from maisi.training.losses import region_contrastive, weighted_mean
from maisi.training.pictures import label_planes
from maisi.training.state import step_rng
from maisi.weights.assemble import process_of, require_trunk
from maisi.weights.load import CUSTOM_LABELS_KEY, load_network, read_header


class ControlNetRun(DenoisingRun):
    """A complete training of the ControlNet; it starts as a copy of the U-Net's encoder unless `init` names weights.

    Attributes:
        unet: trained U-Net; it stays frozen.
        mask_encoder_channels: widths of the mask encoder; none takes the released ones.
        told_as: see `ControlNetConfig`; none takes what `init` has, or tells all ids as themselves.
        weighted_labels: ids whose voxels count `label_weight` times in the loss (the paper: tumours, x100).
        contrastive_weight: of the region-contrastive loss; 0 is off. It acts where label maps have tumours.
        contrastive_bound: a difference beyond it inside a tumour earns nothing more.
        inpainting: share of the items that are told the image around a region, which they are to paint; the network
            then inpaints as well as it follows masks. Needs views with `keep_image`.
    """

    unet: Path
    mask_encoder_channels: tuple[int, ...] | None = None
    told_as: ToldAs | None = None
    weighted_labels: tuple[int, ...] = tuple(TUMORS)
    label_weight: float = Field(default=100.0, ge=1)
    contrastive_weight: float = Field(default=0.01, ge=0)
    contrastive_bound: float = Field(default=2.0, gt=0)
    inpainting: float = Field(default=0.0, ge=0, le=1)


def without_tumours(labels: Tensor) -> Tensor:
    """Replace each tumour by its (first) host organ; any shape, uint8."""
    result = labels.clone()
    for tumour, hosts in TUMORS.items():
        result[labels == tumour] = hosts[0]
    return result


class ControlNetStage(DenoisingStage):
    """See `maisi.training.loop.Stage`."""

    part = "controlnet"

    def __init__(self, run: ControlNetRun) -> None:
        self.run = run
        header = read_header(run.unet)
        _require_process(run, process_from_config(process_of(header), str(run.unet)))
        unet = load_network(run.unet, network="unet")
        assert isinstance(unet, UNet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.loop.seed)
            control = _initial(run, unet)
        sources = latent_sources(run, with_labels=True, scale_factor=header.scale_factor)
        super().__init__(run, control, ControlNet(control.config), sources, run.autoencoder, run.loss)
        self.image_channels = control.config.image_channels
        self.told = torch.from_numpy(control.config.told_table()).to(self.device)
        self.unet = placed(unet.requires_grad_(False), self.device, self.layout)

    def predict(self, network: nn.Module, x: Tensor, times: Tensor, batch: LatentBatch) -> Tensor:
        """The U-Net's prediction under the control of `network`."""
        assert batch.labels is not None
        return self._controlled(network, x, times, batch, batch.labels)

    def batch(self, step: int) -> list[LatentBatch]:
        """As `DenoisingStage.batch`, with what is to be painted."""
        batches = super().batch(step)
        return [self._with_regions(b, step_rng(self.seed, step * len(batches) + i, 5)) for i, b in enumerate(batches)]

    def _with_regions(self, batch: LatentBatch, rng: np.random.Generator) -> LatentBatch:
        """Draw the regions of the items that inpaint; the others' is everything."""
        if not self.run.inpainting:
            return batch
        if batch.image is None or batch.labels is None:
            raise MaisiError(
                f"{self.run.data} keeps no images; inpainting needs views prepared with 'keep_image: true'."
            )
        regions = [
            inpainting_region(labels.numpy(), rng)
            if rng.random() < self.run.inpainting
            else np.ones(labels.shape, bool)
            for labels in batch.labels
        ]
        return replace(batch, region=torch.from_numpy(np.stack(regions))[:, None])

    def _controlled(self, network: nn.Module, x: Tensor, times: Tensor, batch: LatentBatch, labels: Tensor) -> Tensor:
        bits = mask_tensor(self.told[labels.to(self.device).long()])
        if self.image_channels:
            bits = inpainting_mask(bits, batch.image, batch.region)
        bits = bits.contiguous(memory_format=self.layout)
        with self.autocast():
            x = x.contiguous(memory_format=self.layout)
            residuals = network(x, times, bits, modality=batch.conditions["modality"])
            prediction: Tensor = self.unet(x, times, residuals=residuals, **batch.conditions)
        return prediction.float()

    def losses(
        self, network: nn.Module, noisy: Tensor, times: Tensor, target: Tensor, batch: LatentBatch
    ) -> dict[str, Tensor]:
        """Label-weighted mean difference, and the region-contrastive term where there are tumours."""
        assert batch.labels is not None
        prediction = self.predict(network, noisy, times, batch)
        difference = self.difference(prediction, target)
        terms = {"loss": weighted_mean(difference, self._weight(batch.labels, noisy.shape[2:]))}
        region = _at_latent_size(batch.labels, tuple(TUMORS), noisy.shape[2:])
        if self.run.contrastive_weight and region.any():
            with torch.no_grad():
                other = self._controlled(network, noisy, times, batch, without_tumours(batch.labels))
            contrast = region_contrastive(prediction, other, region, self.run.contrastive_bound)
            terms["contrastive"] = self.run.contrastive_weight * contrast
        return terms

    def _weight(self, labels: Tensor, size: torch.Size) -> Tensor | None:
        """Voxel weights at latent resolution, or None where no chosen label is there."""
        chosen = _at_latent_size(labels, self.run.weighted_labels, size)
        return 1 + (self.run.label_weight - 1) * chosen if chosen.any() else None

    def validation_terms(self, batch: LatentBatch, index: int) -> dict[str, float]:
        """Beside the loss, that of the U-Net alone: what the mask (and the image around a region) is worth."""
        batch = self._with_regions(batch, step_rng(self.seed, index, 6))
        alone = _NoControl().to(self.device)
        without = self.perturbed_losses(alone, batch, index, stream=3)["loss"]
        return {**super().validation_terms(batch, index), "loss_without_mask": float(without)}

    def metadata(self) -> dict[str, str]:
        """As the other stages', and the user's own classes."""
        own = LatentFolder(self.run.data).index.custom_labels
        return {**super().metadata(), **({CUSTOM_LABELS_KEY: json.dumps(own)} if own else {})}

    def rows_above(self, batch: LatentBatch) -> list[Tensor]:
        """The mask above what was made of it."""
        assert batch.labels is not None
        return [label_planes(batch.labels[0])]


class _NoControl(nn.Module):
    """In the place of a ControlNet: nothing to add."""

    def forward(self, *inputs: Tensor, modality: Tensor | None = None) -> None:
        """Return no residuals."""


def _at_latent_size(labels: Tensor, ids: tuple[int, ...], size: torch.Size) -> Tensor:
    """1 where a latent voxel holds any of `ids`, `B 1 X/4 Y/4 Z/4`."""
    chosen = torch.isin(labels, torch.tensor(ids, device=labels.device, dtype=labels.dtype))
    return F.adaptive_max_pool3d(chosen[:, None].float(), tuple(size))


def _require_process(run: ControlNetRun, known: Process) -> None:
    """Refuse a process that is not the U-Net's; how often which times are visited may differ where it is said.

    Raises:
        MaisiError: so.
    """
    said = "process" in run.model_fields_set
    if not (run.process.same_path(known) if said else run.process == known):
        raise MaisiError(
            f"{run.unet} was trained with another process than the run names; write 'process: "
            f"{json.dumps(known.config())}' into it."
        )


def _initial(run: ControlNetRun, unet: UNet) -> ControlNet:
    if run.init is not None:
        loaded = load_network(run.init, network="controlnet")
        assert isinstance(loaded, ControlNet)
        require_trunk(loaded.config, unet.config, run.init, run.unet)
        if run.mask_encoder_channels not in (None, loaded.config.mask_encoder_channels):
            raise MaisiError(f"{run.init} has another mask encoder than mask_encoder_channels; leave one of them out.")
        widen = bool(run.inpainting) and not loaded.config.image_channels
        loaded = with_image_input(loaded) if widen else loaded
        if run.told_as is not None:
            loaded.config = loaded.config.model_copy(update={"told_as": run.told_as})
        return loaded.train()
    shared = {name: getattr(unet.config, name) for name in TrunkConfig.model_fields}
    shared["image_channels"] = 2 if run.inpainting else 0
    if run.mask_encoder_channels is not None:
        shared["mask_encoder_channels"] = run.mask_encoder_channels
    if run.told_as is not None:
        shared["told_as"] = run.told_as
    return ControlNet.from_unet(unet, ControlNetConfig(**shared)).train()
