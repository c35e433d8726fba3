"""The networks of HA-GAN (Sun et al. 2022): trunk G^A, branches G^L and G^H, encoders E^H and E^G, discriminators.

An image is made in two sizes. G^A turns a latent vector into features at a quarter of the axes; G^L makes the small
image of them, G^H the full one. G^H may be given a stretch of the features' rows along Z alone, which is how the memory
of training is kept small. Images are in [-1, 1].

Differs from the published networks in one thing: G^H normalises each voxel over its channels, not the map over its
voxels. So it makes of a stretch what it makes of the whole, but for `REACH` voxels next to a cut, where a convolution
finds zeros in place of its neighbours; a group norm would see other statistics in training than at inference.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from maisi.config import Config
from maisi.layers.convolution import conv3

SCALE = 4
"""The full image has this many times the small one's voxels along each axis."""

REACH = 4
"""Voxels of the full image next to a cut that G^H makes otherwise than of the whole."""

SLOPE = 0.2
"""Of LeakyReLU below zero."""

Triple = tuple[int, int, int]


class HaganConfig(Config):
    """Sizes of the networks.

    Attributes:
        latent: length of the latent vector.
        trunk: channels of G^A from its smallest map up; each after the first doubles the axes.
        high: channels of G^H after each of its two doublings; E^H mirrors them.
        critic: channels of the full image's discriminator, each of which halves the axes. The small image's
            discriminator leaves the first two out.
        stretch: voxels along Z of the full image that a training step sees.
        norm_groups: groups of the group norms.
    """

    latent: PositiveInt = 1024
    trunk: tuple[PositiveInt, ...] = (512, 512, 256, 128, 64)
    high: tuple[PositiveInt, PositiveInt] = (32, 16)
    critic: tuple[PositiveInt, ...] = (16, 32, 64, 128, 256)
    stretch: PositiveInt = 32
    norm_groups: PositiveInt = 8

    @model_validator(mode="after")
    def _check(self) -> HaganConfig:
        if not self.trunk or len(self.critic) < 3:
            raise ValueError("trunk needs at least one entry, and critic three")
        if any(c % self.norm_groups for c in (*self.trunk, *self.high)):
            raise ValueError(f"every entry of trunk and high must be a multiple of norm_groups ({self.norm_groups})")
        if self.stretch % SCALE or self.stretch <= 2 * REACH:
            raise ValueError(f"stretch must be a multiple of {SCALE} above {2 * REACH}")
        return self

    @property
    def size_multiple(self) -> int:
        """Axes of the full image must be multiples of this."""
        return int(SCALE * 2 ** (len(self.trunk) - 1))

    @property
    def rows(self) -> int:
        """Rows of features that a stretch of the image is made of."""
        return self.stretch // SCALE


class VoxelNorm(nn.Module):
    """Divide each voxel's channels by their root mean square (Karras et al. 2018), times a learned factor each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`B C X Y Z` -> the same."""
        size = x.float().square().mean(1, keepdim=True).add(1e-6).rsqrt().to(x.dtype)
        return x * size * self.weight.to(x.dtype)[:, None, None, None]


class Generator(nn.Module):
    """G^A, G^L and G^H."""

    def __init__(self, config: HaganConfig, size: Triple) -> None:
        """Take the sizes, and the full image's voxels: multiples of `config.size_multiple`."""
        super().__init__()
        self.config = config
        x, y, z = (n // config.size_multiple for n in size)
        self.base = (config.trunk[0], x, y, z)
        self.seed = nn.Linear(config.latent, math.prod(self.base))
        self.start = _activated(config.trunk[0], config.trunk[0], nn.GroupNorm(config.norm_groups, config.trunk[0]))
        self.trunk = nn.ModuleList(
            _activated(wide, narrow, nn.GroupNorm(config.norm_groups, narrow))
            for wide, narrow in pairwise(config.trunk)
        )
        width = config.trunk[-1]
        self.small = nn.Sequential(_activated(width, width, nn.GroupNorm(config.norm_groups, width)), conv3(width, 1))
        widths = (width, *config.high)
        self.full = nn.ModuleList(_activated(a, b, VoxelNorm(b)) for a, b in pairwise(widths))
        self.out = conv3(config.high[-1], 1)

    def features(self, latent: Tensor) -> Tensor:
        """G^A: `B latent` -> `B C X/4 Y/4 Z/4`."""
        x: Tensor = self.start(self.seed(latent).unflatten(1, self.base))
        for block in self.trunk:
            x = block(_doubled(x))
        return x

    def small_image(self, features: Tensor) -> Tensor:
        """G^L: all features -> `B 1 X/4 Y/4 Z/4`."""
        return torch.tanh(self.small(features))

    def full_image(self, features: Tensor) -> Tensor:
        """G^H: features, or a stretch of their rows -> `B 1 X Y Z` of these."""
        for block in self.full:
            features = block(_doubled(features))
        return torch.tanh(self.out(features))

    def forward(self, latent: Tensor) -> Tensor:
        """The whole full image, as at inference."""
        return self.full_image(self.features(latent))


class Encoder(nn.Module):
    """E^H and E^G, the way back: from an image's stretches to features, from features to a latent vector."""

    def __init__(self, config: HaganConfig, size: Triple) -> None:
        super().__init__()
        groups = config.norm_groups
        near, far = config.high[1], config.high[0]
        self.stem = nn.Sequential(conv3(1, near), nn.LeakyReLU(SLOPE))
        widths = (near, far, config.trunk[-1])
        self.down = nn.Sequential(*(_activated(a, b, nn.GroupNorm(groups, b), 2) for a, b in pairwise(widths)))
        upward = config.trunk[::-1]
        self.deeper = nn.Sequential(*(_activated(a, b, nn.GroupNorm(groups, b), 2) for a, b in pairwise(upward)))
        base = config.trunk[0] * math.prod(n // config.size_multiple for n in size)
        self.latent = nn.Linear(base, config.latent)

    def features(self, stretch: Tensor) -> Tensor:
        """E^H: a stretch of an image, `B 1 X Y Z` -> `B C X/4 Y/4 Z/4`."""
        features: Tensor = self.down(self.stem(stretch))
        return features

    def forward(self, features: Tensor) -> Tensor:
        """E^G: the features of a whole image -> `B latent`."""
        latent: Tensor = self.latent(self.deeper(features).flatten(1))
        return latent


class Critic(nn.Module):
    """D^L and D^H: a score for the small image, and one for a stretch of the full one, which is told its place."""

    def __init__(self, config: HaganConfig, size: Triple) -> None:
        super().__init__()
        x, y, z = size
        self.small = _Judge(config.critic[2:], (x // SCALE, y // SCALE, z // SCALE), told=0)
        self.full = _Judge(config.critic, (x, y, config.stretch), told=1)

    def forward(self, small: Tensor, stretch: Tensor, place: float) -> Tensor:
        """Logits of being real, `B 2`; `place` in [0, 1] says where along Z the stretch lies."""
        told = torch.full((len(stretch), 1), place, device=stretch.device)
        return torch.cat([self.small(small, None), self.full(stretch, told)], 1)


class _Judge(nn.Module):
    """Halving convolutions under spectral norm, then two linear layers."""

    def __init__(self, channels: tuple[int, ...], size: Triple, told: int) -> None:
        super().__init__()
        convolutions: list[nn.Module] = []
        for a, b in pairwise((1, *channels)):
            convolutions += [spectral_norm(conv3(a, b, stride=2)), nn.LeakyReLU(SLOPE)]
            size = (-(-size[0] // 2), -(-size[1] // 2), -(-size[2] // 2))
        self.convolutions = nn.Sequential(*convolutions)
        width = channels[-1]
        self.gather = spectral_norm(nn.Linear(width * math.prod(size), width))
        self.score = spectral_norm(nn.Linear(width + told, 1))

    def forward(self, x: Tensor, told: Tensor | None) -> Tensor:
        h = F.leaky_relu(self.gather(self.convolutions(x).flatten(1)), SLOPE)
        score: Tensor = self.score(h if told is None else torch.cat([h, told.to(h.dtype)], 1))
        return score


def _activated(in_channels: int, out_channels: int, norm: nn.Module, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv3(in_channels, out_channels, stride), norm, nn.LeakyReLU(SLOPE))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
