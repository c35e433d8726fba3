"""The released networks as configurations: what each `.pt` file of the release becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from maisi.config import Config
from maisi.networks.autoencoder import MASK_AUTOENCODER, AutoencoderConfig
from maisi.networks.controlnet import ControlNetConfig
from maisi.networks.unet import MASK_UNET, UNetConfig


@dataclass(frozen=True)
class Preset:
    """One released network.

    Attributes:
        network: what it is, a word of `maisi.weights.load.NETWORKS`.
        config: its sizes and inputs.
        official_file: name of its file in the release.
    """

    network: str
    config: Config
    official_file: str


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "autoencoder": Preset("autoencoder", AutoencoderConfig(), "autoencoder_v1.pt"),
        "diffusion_ddpm": Preset("unet", UNetConfig(region_input=True, spacing_input=True), "diff_unet_3d_ddpm-ct.pt"),
        "diffusion_rflow": Preset(
            "unet",
            UNetConfig(
                spacing_input=True,
                num_modalities=128,
                residual_resampling=True,
                attention_out_projection=True,
            ),
            "diff_unet_3d_rflow-ct.pt",
        ),
        "controlnet_ddpm": Preset("controlnet", ControlNetConfig(), "controlnet_3d_ddpm-ct.pt"),
        "controlnet_rflow": Preset(
            "controlnet",
            ControlNetConfig(num_modalities=128, residual_resampling=True, attention_out_projection=True),
            "controlnet_3d_rflow-ct.pt",
        ),
        "mask_autoencoder": Preset(
            "autoencoder",
            MASK_AUTOENCODER,
            "mask_generation_autoencoder.pt",
        ),
        "mask_diffusion": Preset(
            "unet",
            MASK_UNET,
            "mask_generation_diffusion_unet.pt",
        ),
    }
)
"""By short name."""
