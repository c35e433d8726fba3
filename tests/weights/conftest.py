"""Reference networks at small sizes, saved in the released layout, with everything needed to run both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

WIDTHS = (32, 64, 64)
TRUNK: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 4,
    "num_res_blocks": (1, 2, 1),
    "attention_levels": (False, True, True),
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "num_head_channels": 32,
    "use_flash_attention": False,
}
FLOW = {"num_class_embeds": 128, "resblock_updown": True, "include_fc": True}


@dataclass
class Reference:
    """A reference network and its inputs under the reference's names and under ours."""

    net: nn.Module
    theirs: Callable[[nn.Module, dict[str, Any]], tuple[Tensor, ...]]
    ours: Callable[[nn.Module, dict[str, Any]], tuple[Tensor, ...]]
    inputs: dict[str, Any]
    container: str | None = None
    scale_factor: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        state = self.net.state_dict()
        content: dict[str, Any] = state if self.container is None else {self.container: state, **self.extra}
        if self.scale_factor is not None:
            content["scale_factor"] = torch.tensor(self.scale_factor)
        torch.save(content, path)
        return path


def randomise(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give every tensor random values of a size that keeps activations moderate, also those that start at zero."""
    with torch.no_grad():
        for tensor in net.state_dict().values():
            noise = torch.randn(tensor.shape, generator=generator)
            fan_in = math.prod(tensor.shape[1:])
            tensor.copy_(noise / math.sqrt(fan_in) if tensor.ndim > 1 else 1 + 0.3 * noise)
    return net.eval()


def autoencoder(g: torch.Generator, **sizes: Any) -> Reference:
    net = AutoencoderKlMaisi(
        spatial_dims=3,
        latent_channels=4,
        num_channels=WIDTHS,
        attention_levels=(False, False, False),
        norm_num_groups=32,
        norm_eps=1e-6,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        num_splits=1,
        dim_split=1,
        norm_float16=False,
        save_mem=False,
        **sizes,
    )
    inputs = {
        "x": torch.rand(1, sizes["in_channels"], 8, 16, 8, generator=g),
        "z": torch.randn(1, 4, 4, 2, 4, generator=g),
    }

    def theirs(net: nn.Module, i: dict[str, Any]) -> tuple[Tensor, ...]:
        mean, sigma = net.encode(i["x"])
        return mean, sigma, net.decode(i["z"])

    def ours(net: nn.Module, i: dict[str, Any]) -> tuple[Tensor, ...]:
        latent = net.encode(i["x"])
        return latent.mean, torch.exp(0.5 * latent.log_variance), net.decode(i["z"])

    return Reference(randomise(net, g), theirs, ours, inputs)


SKIPS = ((32, 1), (32, 1), (32, 2), (64, 2), (64, 2), (64, 4), (64, 4))
"""Channels of the encoder's outputs and by how much their axes are divided."""


def unet(g: torch.Generator, names: dict[str, str], net: nn.Module, scale_factor: float) -> Reference:
    size = (4, 8, 4)
    everything = {
        "spacing": 100 * torch.rand(2, 3, generator=g),
        "top_region": 100 * torch.eye(4)[:2],
        "bottom_region": 100 * torch.eye(4)[2:],
        "modality": torch.tensor([1, 9]),
        "context": torch.randn(2, 1, 10, generator=g),
    }
    inputs = {ours: everything[ours] for ours in names}
    inputs["x"] = torch.randn(2, 4, *size, generator=g)
    inputs["times"] = torch.tensor([3.25, 871.0])
    shapes = [(2, c, *(n // d for n in size)) for c, d in SKIPS]
    inputs["down"] = tuple(torch.randn(s, generator=g) for s in shapes)
    inputs["middle"] = torch.randn(shapes[-1], generator=g)

    def theirs(net: nn.Module, i: dict[str, Any]) -> tuple[Tensor, ...]:
        conditions = {their: i[our] for our, their in names.items()}
        down = tuple(r.clone() for r in i["down"])
        out = net(
            i["x"],
            i["times"],
            down_block_additional_residuals=down,
            mid_block_additional_residual=i["middle"].clone(),
            **conditions,
        )
        return (out,)

    def ours(net: nn.Module, i: dict[str, Any]) -> tuple[Tensor, ...]:
        from maisi.networks.unet import ControlResiduals

        residuals = ControlResiduals(i["down"], i["middle"])
        return (net(i["x"], i["times"], residuals=residuals, **{our: i[our] for our in names}),)

    return Reference(randomise(net, g), theirs, ours, inputs, "unet_state_dict", scale_factor, {"epoch": 7})


def mask_unet(g: torch.Generator) -> Reference:
    """The mask network; MAISI never controls it, and its reference class adds residuals in another way."""
    net = DiffusionModelUNet(
        **TRUNK, out_channels=4, channels=WIDTHS, with_conditioning=True, cross_attention_dim=10, include_fc=True
    )
    reference = unet(g, {"context": "context"}, net, 1.0055984258651733)
    del reference.inputs["down"], reference.inputs["middle"]
    reference.theirs = lambda net, i: (net(i["x"], i["times"], context=i["context"]),)
    reference.ours = lambda net, i: (net(i["x"], i["times"], context=i["context"]),)
    return reference


def controlnet(g: torch.Generator, **variant: Any) -> Reference:
    net = ControlNetMaisi(
        **TRUNK,
        num_channels=WIDTHS,
        conditioning_embedding_in_channels=8,
        conditioning_embedding_num_channels=(8, 32, 64),
        use_checkpointing=False,
        **variant,
    )
    inputs: dict[str, Any] = {
        "x": torch.randn(2, 4, 4, 8, 4, generator=g),
        "times": torch.tensor([3.25, 871.0]),
        "mask": torch.randint(0, 2, (2, 8, 16, 32, 16), generator=g).float(),
    }
    if "num_class_embeds" in variant:
        inputs["modality"] = torch.tensor([1, 9])

    def theirs(net: nn.Module, i: dict[str, Any]) -> tuple[Tensor, ...]:
        down, middle = net(i["x"], i["times"], controlnet_cond=i["mask"], class_labels=i.get("modality"))
        return (*down, middle)

    def ours(net: nn.Module, i: dict[str, Any]) -> tuple[Tensor, ...]:
        residuals = net(i["x"], i["times"], i["mask"], modality=i.get("modality"))
        return (*residuals.down, residuals.middle)

    return Reference(randomise(net, g), theirs, ours, inputs, "controlnet_state_dict")


def diffusion_ddpm(g: torch.Generator) -> Reference:
    net = DiffusionModelUNetMaisi(
        **TRUNK,
        out_channels=4,
        num_channels=WIDTHS,
        include_top_region_index_input=True,
        include_bottom_region_index_input=True,
        include_spacing_input=True,
    )
    names = {
        "spacing": "spacing_tensor",
        "top_region": "top_region_index_tensor",
        "bottom_region": "bottom_region_index_tensor",
    }
    return unet(g, names, net, 0.9)


def diffusion_rflow(g: torch.Generator) -> Reference:
    net = DiffusionModelUNetMaisi(**TRUNK, **FLOW, out_channels=4, num_channels=WIDTHS, include_spacing_input=True)
    return unet(g, {"spacing": "spacing_tensor", "modality": "class_labels"}, net, 1.1)


REFERENCES: dict[str, Callable[[torch.Generator], Reference]] = {
    "autoencoder": lambda g: autoencoder(g, in_channels=1, out_channels=1, num_res_blocks=(2, 1, 2)),
    "diffusion_ddpm": diffusion_ddpm,
    "diffusion_rflow": diffusion_rflow,
    "controlnet_ddpm": controlnet,
    "controlnet_rflow": lambda g: controlnet(g, **FLOW),
    "mask_autoencoder": lambda g: autoencoder(
        g, in_channels=8, out_channels=125, num_res_blocks=(1, 2, 2), use_convtranspose=True
    ),
    "mask_diffusion": mask_unet,
}


@pytest.fixture(scope="session")
def references() -> dict[str, Callable[[torch.Generator], Reference]]:
    """What makes each of the seven."""
    return REFERENCES


@pytest.fixture(params=list(REFERENCES))
def reference(request: pytest.FixtureRequest) -> Reference:
    """Each of the seven released networks, at a small size, with random weights."""
    return REFERENCES[request.param](torch.Generator().manual_seed(5))


@pytest.fixture
def small_ddpm() -> Reference:
    """The small DDPM U-Net alone."""
    return diffusion_ddpm(torch.Generator().manual_seed(6))
