"""The volume compression network (paper, section 3.1): a 3D VAE with 4x4x4 compression; released with 4 channels.

One module serves CT and MR images (1 channel in and out) and label maps (8 bits in, 125 classes out); the difference is
`AutoencoderConfig`. The discriminator and the losses live with the training; nothing here knows a device or a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from pydantic import model_validator
from torch import Tensor, nn

from maisi.config import Config
from maisi.layers.blocks import Downsample, ResidualBlock, Upsample, Upsampling
from maisi.layers.convolution import conv1, conv3
from maisi.layers.norm import GroupNorm


class AutoencoderConfig(Config):
    """Sizes of an autoencoder; the defaults are the released CT/MR autoencoder (20.9 M parameters).

    Attributes:
        channels: feature channels of each level; each level after the first halves the axes.
        num_res_blocks: residual blocks of each level.
        upsampling: how the decoder doubles the axes.
    """

    in_channels: int = 1
    out_channels: int = 1
    latent_channels: int = 4
    channels: tuple[int, ...] = (64, 128, 256)
    num_res_blocks: tuple[int, ...] = (2, 2, 2)
    norm_groups: int = 32
    norm_eps: float = 1e-6
    upsampling: Upsampling = "trilinear"

    @model_validator(mode="after")
    def _check(self) -> AutoencoderConfig:
        if len(self.channels) != len(self.num_res_blocks):
            raise ValueError("channels and num_res_blocks need one entry for each level")
        if any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"every entry of channels must be a multiple of norm_groups ({self.norm_groups})")
        return self

    @property
    def compression(self) -> int:
        """Voxels of the image for each voxel of the latent, along one axis."""
        return int(2 ** (len(self.channels) - 1))


MASK_AUTOENCODER = AutoencoderConfig(
    in_channels=8,
    out_channels=125,
    channels=(32, 64, 128),
    num_res_blocks=(1, 2, 2),
    upsampling="transposed",
)
"""The released autoencoder of label maps: bits of ids in, a score for each class out."""


@dataclass(frozen=True)
class LatentDistribution:
    """Diagonal Gaussian over latents, `B C X/4 Y/4 Z/4`."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw mean + std * noise, float32: the noise comes from the CPU, so it is the same for every device."""
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean.device)
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, summed over a sample's latent values, averaged over the batch."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.flatten(1).sum(1).mean()


class Encoder(nn.Module):
    """Convolution, then for each level its residual blocks and (but for the last) a downsampling; norm; convolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        groups, eps = config.norm_groups, config.norm_eps
        blocks: list[nn.Module] = [conv3(config.in_channels, config.channels[0])]
        width = config.channels[0]
        for level, (channels, count) in enumerate(zip(config.channels, config.num_res_blocks, strict=True)):
            for _ in range(count):
                blocks.append(ResidualBlock(width, channels, groups, eps))
                width = channels
            if level < len(config.channels) - 1:
                blocks.append(Downsample(width))
        blocks.append(GroupNorm(groups, width, eps))
        blocks.append(conv3(width, config.latent_channels))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """`B in X Y Z` -> `B latent X/4 Y/4 Z/4`."""
        for block in self.blocks:
            x = block(x)
        return x


class Decoder(nn.Module):
    """The encoder's mirror image: from the deepest level up, an upsampling between the levels."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        groups, eps = config.norm_groups, config.norm_eps
        width = config.channels[-1]
        blocks: list[nn.Module] = [conv3(config.latent_channels, width)]
        for level in reversed(range(len(config.channels))):
            for _ in range(config.num_res_blocks[level]):
                blocks.append(ResidualBlock(width, config.channels[level], groups, eps))
                width = config.channels[level]
            if level > 0:
                blocks.append(Upsample(width, config.upsampling))
        blocks.append(GroupNorm(groups, width, eps))
        blocks.append(conv3(width, config.out_channels))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, z: Tensor) -> Tensor:
        """`B latent X/4 Y/4 Z/4` -> `B out X Y Z`."""
        for block in self.blocks:
            z = block(z)
        return z


class Autoencoder(nn.Module):
    """Encoder to a Gaussian over latents, decoder back to the image. Axes must be multiples of `compression`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        latent = config.latent_channels
        self.quant_conv_mu = conv1(latent, latent)
        self.quant_conv_log_sigma = conv1(latent, latent)
        self.post_quant_conv = conv1(latent, latent)

    def encode(self, x: Tensor) -> LatentDistribution:
        """Image in [0, 1] (or label bits), `B in X Y Z` -> distribution over latents."""
        h = self.encoder(x)
        log_variance = self.quant_conv_log_sigma(h).clamp(-30.0, 20.0)
        return LatentDistribution(self.quant_conv_mu(h), log_variance)

    def decode(self, z: Tensor) -> Tensor:
        """Latents `B latent X/4 Y/4 Z/4` -> image in [0, 1] (or class scores), `B out X Y Z`; not clipped."""
        return cast(Tensor, self.decoder(self.post_quant_conv(z)))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, LatentDistribution]:
        """Reconstruct `x` through one latent sample; return the reconstruction and the distribution."""
        latent = self.encode(x)
        return self.decode(latent.sample(generator)), latent
