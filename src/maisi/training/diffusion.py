"""The diffusion stage: train the U-Net on cached latents with its conditions (paper, section 3.2, equation 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maisi.networks.unet import UNet, UNetConfig
from maisi.training.denoising import DenoisingRun, DenoisingStage, NoiseRun, latent_sources
from maisi.training.initial import load_initial
from maisi.training.latents import LatentBatch
from maisi.training.losses import weighted_mean


class DiffusionRun(DenoisingRun):
    """A complete training of the diffusion U-Net, told regions and spacing unless `model` says otherwise."""

    model: UNetConfig = UNetConfig(region_input=True, spacing_input=True)


def soften_conditions(unet: UNet) -> None:
    """Divide the first weights of region and spacing embeddings by 100.

    These inputs come multiplied by 100 (released convention); at random initial weights they would drown the time.
    """
    with torch.no_grad():
        for name in ("top_region_embed", "bottom_region_embed", "spacing_embed"):
            embedding = getattr(unet, name, None)
            if embedding is not None:
                embedding[0].weight.mul_(0.01)


class UNetStage(DenoisingStage):
    """A stage whose network is the U-Net itself."""

    def predict(self, network: nn.Module, x: Tensor, times: Tensor, batch: LatentBatch) -> Tensor:
        """The U-Net's prediction."""
        with self.autocast():
            prediction: Tensor = network(x.contiguous(memory_format=self.layout), times, **batch.conditions)
        return prediction.float()

    def losses(
        self, network: nn.Module, noisy: Tensor, times: Tensor, target: Tensor, batch: LatentBatch
    ) -> dict[str, Tensor]:
        """The mean difference between prediction and target."""
        return {"loss": weighted_mean(self.difference(self.predict(network, noisy, times, batch), target))}


class DiffusionStage(UNetStage):
    """See `maisi.training.loop.Stage`."""

    part = "unet"

    def __init__(self, run: DiffusionRun) -> None:
        unet = initial_unet(run, run.model)
        super().__init__(
            run, unet, UNet(unet.config), latent_sources(run, with_labels=False), run.autoencoder, run.loss
        )


def initial_unet(run: NoiseRun, config: UNetConfig) -> UNet:
    """Load the U-Net that a run starts from, or make a new one whose weights follow from its seed.

    Raises:
        MaisiError: as `load_initial`.
    """
    if run.init is not None:
        loaded = load_initial(run.init, "unet", run)
        assert isinstance(loaded, UNet)
        return loaded
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.loop.seed)
        unet = UNet(config)
    soften_conditions(unet)
    return unet
