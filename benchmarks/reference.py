"""The reference's networks (MONAI's, as released or small), with random weights, saved for both sides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maisi.weights.convert import convert

AUTOENCODER = {"num_channels": (64, 128, 256), "num_res_blocks": (2, 2, 2), "attention_levels": (False,) * 3}
SMALL_AUTOENCODER = {"num_channels": (32, 32), "num_res_blocks": (1, 1), "attention_levels": (False,) * 2}

TRUNK: dict[str, Any] = {
    "num_channels": (64, 128, 256, 512),
    "num_res_blocks": (2, 2, 2, 2),
    "attention_levels": (False, False, True, True),
}
SMALL_TRUNK = {"num_channels": (32, 64), "num_res_blocks": (1, 1), "attention_levels": (False, True)}
REGIONS = {"include_top_region_index_input": True, "include_bottom_region_index_input": True}
FLOW = {"num_class_embeds": 128, "resblock_updown": True, "include_fc": True}

CONTAINERS = {"unet": "unet_state_dict", "controlnet": "controlnet_state_dict"}


def autoencoder(small: bool, splits: int = 1) -> nn.Module:
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    return AutoencoderKlMaisi(
        **(SMALL_AUTOENCODER if small else AUTOENCODER), spatial_dims=3, in_channels=1, out_channels=1,
        latent_channels=4, norm_num_groups=32, norm_eps=1e-6, with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False, num_splits=splits, dim_split=0, norm_float16=False, save_mem=True,
    ).eval()  # fmt: skip


def _trunk(small: bool) -> dict[str, Any]:
    sizes = SMALL_TRUNK if small else TRUNK
    rest = {"norm_num_groups": 32, "norm_eps": 1e-6, "num_head_channels": 32, "use_flash_attention": False}
    return {**sizes, **rest, "spatial_dims": 3, "in_channels": 4}


def unet(small: bool, flow: bool = False) -> nn.Module:
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

    inputs = FLOW if flow else REGIONS
    return DiffusionModelUNetMaisi(**_trunk(small), **inputs, out_channels=4, include_spacing_input=True).eval()


def controlnet(small: bool) -> nn.Module:
    from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi

    return ControlNetMaisi(
        **_trunk(small),
        conditioning_embedding_in_channels=8,
        conditioning_embedding_num_channels=(8, 32, 64),
        use_checkpointing=False,
    ).eval()


@torch.no_grad()
def save(net: nn.Module, name: str, folder: Path) -> None:
    """Give every tensor random values of a moderate size; write NAME.pt and, converted, NAME.safetensors."""
    generator = torch.Generator().manual_seed(0)
    for tensor in net.state_dict().values():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise / math.sqrt(math.prod(tensor.shape[1:])) if tensor.ndim > 1 else 1 + 0.1 * noise)
    state: Any = net.state_dict()
    if name in CONTAINERS:
        state = {CONTAINERS[name]: state, "scale_factor": torch.tensor(1.0)}
    torch.save(state, folder / f"{name}.pt")
    convert(folder / f"{name}.pt", folder / f"{name}.safetensors")


def load(net: nn.Module, name: str, folder: Path, device: torch.device) -> nn.Module:
    """Put the weights that `save` wrote into a fresh network."""
    state = torch.load(folder / f"{name}.pt", weights_only=True)
    net.load_state_dict(state[CONTAINERS[name]] if name in CONTAINERS else state)
    return net.to(device)
