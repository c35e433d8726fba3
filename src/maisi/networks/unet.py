"""The denoising network (paper, section 3.2): a 3D U-Net over latents, told the time and the conditions.

One class, driven by `UNetConfig`, is every diffusion U-Net of the release: DDPM, rectified flow and, with
attention to a context, the one for masks. Its encoder half is also the ControlNet's. Nothing here knows a
device, a file or a schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.config import Config
from maisi.layers.attention import SpatialAttention, SpatialTransformer, zeroed
from maisi.layers.blocks import Upsample, repeated
from maisi.layers.convolution import conv1, conv3
from maisi.layers.embeddings import embedding_mlp, timestep_embedding
from maisi.layers.norm import GroupNorm


class TrunkConfig(Config):
    """Sizes of a U-Net's encoder half, which a ControlNet shares; the defaults are the released DDPM one's.

    Attributes:
        channels: feature channels of each level; each level after the first halves the axes.
        num_res_blocks: residual blocks of each level.
        attention_levels: whether a level's residual blocks are each followed by attention.
        head_channels: channels of one attention head.
        residual_resampling: halve and double the axes inside residual blocks, not by single convolutions.
        attention_out_projection: a linear layer after self-attention.
        num_modalities: entries of the modality embedding; None for a network without that input.
    """

    in_channels: PositiveInt = 4
    channels: tuple[PositiveInt, ...] = (64, 128, 256, 512)
    num_res_blocks: tuple[PositiveInt, ...] = (2, 2, 2, 2)
    attention_levels: tuple[bool, ...] = (False, False, True, True)
    head_channels: PositiveInt = 32
    norm_groups: PositiveInt = 32
    norm_eps: float = 1e-6
    residual_resampling: bool = False
    attention_out_projection: bool = False
    num_modalities: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> TrunkConfig:
        levels = len(self.channels)
        if levels == 0 or len(self.num_res_blocks) != levels or len(self.attention_levels) != levels:
            raise ValueError("channels, num_res_blocks and attention_levels need one entry for each level")
        if self.channels[0] % 2:
            raise ValueError("the first entry of channels must be even")
        if any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"every entry of channels must be a multiple of norm_groups ({self.norm_groups})")
        attending = [c for c, on in zip(self.channels, self.attention_levels, strict=True) if on]
        if any(c % self.head_channels for c in (*attending, self.channels[-1])):
            raise ValueError(f"channels with attention must be multiples of head_channels ({self.head_channels})")
        return self

    @property
    def size_multiple(self) -> int:
        """Latent axes must be multiples of this."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of the encoder's outputs, in order: what the decoder and the zero convolutions take."""
        skips = [self.channels[0]]
        for level, width in enumerate(self.channels):
            last = level == len(self.channels) - 1
            skips += [width] * (self.num_res_blocks[level] + (0 if last else 1))
        return tuple(skips)


class UNetConfig(TrunkConfig):
    """Sizes and inputs of a U-Net.

    Attributes:
        region_input: top and bottom body region are inputs.
        spacing_input: the voxel spacing is an input.
        context_channels: width of the context tokens; None for a network without attention to a context.
        transformer_blocks: with a context, transformer blocks at each place of attention.
    """

    out_channels: PositiveInt = 4
    region_input: bool = False
    spacing_input: bool = False
    context_channels: PositiveInt | None = None
    transformer_blocks: PositiveInt = 1

    @property
    def embedding_width(self) -> int:
        """Width of time, region and spacing embeddings set side by side."""
        return self.time_width * (1 + 2 * self.region_input + self.spacing_input)


MASK_UNET = UNetConfig(context_channels=10, attention_out_projection=True)
"""The released denoising network of label maps: it is told ten anatomy sizes, as one token of a context."""


@dataclass(frozen=True)
class ControlResiduals:
    """What a ControlNet adds to a U-Net.

    Attributes:
        down: one tensor for each of the encoder's outputs, in their order and of their shapes.
        middle: for the middle block's output.
    """

    down: tuple[Tensor, ...]
    middle: Tensor

    def scaled(self, factor: float) -> ControlResiduals:
        """Weaken or strengthen the control."""
        return ControlResiduals(tuple(r * factor for r in self.down), self.middle * factor)


class ConditionedBlock(nn.Module):
    """Residual block that is told the embedding of time and conditions; can also halve or double the axes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_width: int,
        config: TrunkConfig,
        resample: Literal["none", "down", "up"] = "none",
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = GroupNorm(config.norm_groups, in_channels, config.norm_eps)
        self.conv1 = conv3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(embedding_width, out_channels)
        self.norm2 = GroupNorm(config.norm_groups, out_channels, config.norm_eps)
        self.conv2 = zeroed(conv3(out_channels, out_channels))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv1(in_channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`B Cin X Y Z`, `B E` -> `B Cout X Y Z` (axes halved or doubled if this block resamples)."""
        h = self.norm1.activated(x)
        x, h = self._resize(x), self._resize(h)
        h = self.conv1(h) + self.time_emb_proj(F.silu(embedding))[:, :, None, None, None]
        h = self.conv2(self.norm2.activated(h))
        out: Tensor = self.shortcut(x) + h
        return out

    def _resize(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            # PyTorch's CPU kernel for contiguous maps knows no bfloat16
            wide = x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x
            return F.avg_pool3d(wide, kernel_size=2).to(x.dtype)
        if self.resample == "up":
            return repeated(x)
        return x


class StridedDownsample(nn.Module):
    """Halve each axis by a stride-2 convolution, padded evenly (the autoencoder pads at the far end only)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`B C X Y Z` -> `B C X/2 Y/2 Z/2`."""
        out: Tensor = self.conv(x)
        return out


def attention(config: TrunkConfig, channels: int) -> SpatialAttention | SpatialTransformer:
    """Build the attention that `config` asks for at a level of `channels`."""
    sizes = (channels, config.head_channels, config.norm_groups, config.norm_eps)
    if isinstance(config, UNetConfig) and config.context_channels is not None:
        return SpatialTransformer(
            *sizes,
            context_channels=config.context_channels,
            num_blocks=config.transformer_blocks,
            out_projection=config.attention_out_projection,
        )
    return SpatialAttention(*sizes, out_projection=config.attention_out_projection)


class Level(nn.Module):
    """Residual blocks of one level, each followed by attention where the level has it."""

    def __init__(self, config: TrunkConfig, level: int, in_channels: tuple[int, ...], embedding_width: int) -> None:
        """Build one block for each entry of `in_channels`, the channels that come into it."""
        super().__init__()
        width = config.channels[level]
        self.resnets = nn.ModuleList(ConditionedBlock(c, width, embedding_width, config) for c in in_channels)
        if config.attention_levels[level]:
            self.attentions = nn.ModuleList(attention(config, width) for _ in in_channels)

    def block(self, index: int, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """Residual block `index` and its attention."""
        x = self.resnets[index](x, embedding)
        return self.attentions[index](x, context) if hasattr(self, "attentions") else x


class DownLevel(Level):
    """A level of the encoder; all but the deepest end with a downsampling."""

    def __init__(self, config: TrunkConfig, level: int, embedding_width: int) -> None:
        width = config.channels[level]
        first = config.channels[max(level - 1, 0)]
        super().__init__(config, level, (first, *[width] * (config.num_res_blocks[level] - 1)), embedding_width)
        self.downsampler: nn.Module | None = None
        if level < len(config.channels) - 1 and config.residual_resampling:
            self.downsampler = ConditionedBlock(width, width, embedding_width, config, resample="down")
        elif level < len(config.channels) - 1:
            self.downsampler = StridedDownsample(width)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> list[Tensor]:
        """Return every block's output and the downsampled one; the last of them goes to the next level."""
        outputs = []
        for index in range(len(self.resnets)):
            x = self.block(index, x, embedding, context)
            outputs.append(x)
        if self.downsampler is not None:
            outputs.append(resampled(self.downsampler, x, embedding))
        return outputs


class UpLevel(Level):
    """A level of the decoder; each block also takes the encoder's latest output not yet used."""

    def __init__(self, config: TrunkConfig, level: int, in_channels: tuple[int, ...], embedding_width: int) -> None:
        super().__init__(config, level, in_channels, embedding_width)
        width = config.channels[level]
        self.upsampler: nn.Module | None = None
        if level > 0 and config.residual_resampling:
            self.upsampler = ConditionedBlock(width, width, embedding_width, config, resample="up")
        elif level > 0:
            self.upsampler = Upsample(width, "nearest")

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor, context: Tensor | None) -> Tensor:
        """Take as many of `skips` from their end as there are blocks."""
        for index in range(len(self.resnets)):
            x = self.block(index, torch.cat([x, skips.pop()], dim=1), embedding, context)
        return x if self.upsampler is None else resampled(self.upsampler, x, embedding)


class Middle(nn.Module):
    """The deepest part: block, attention, block."""

    def __init__(self, config: TrunkConfig, embedding_width: int) -> None:
        super().__init__()
        width = config.channels[-1]
        self.resnet_1 = ConditionedBlock(width, width, embedding_width, config)
        self.attention = attention(config, width)
        self.resnet_2 = ConditionedBlock(width, width, embedding_width, config)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """`B C X Y Z` -> the same."""
        out: Tensor = self.resnet_2(self.attention(self.resnet_1(x, embedding), context), embedding)
        return out


class Trunk(nn.Module):
    """What U-Net and ControlNet share: time and modality, first convolution, encoder levels, middle."""

    def __init__(self, config: TrunkConfig, embedding_width: int) -> None:
        super().__init__()
        self.conv_in = conv3(config.in_channels, config.channels[0])
        self._first_channels = config.channels[0]
        self.time_embed = embedding_mlp(config.channels[0], config.time_width)
        if config.num_modalities is not None:
            self.modality_embedding = nn.Embedding(config.num_modalities, config.time_width)
        self.down_blocks = nn.ModuleList(
            DownLevel(config, level, embedding_width) for level in range(len(config.channels))
        )
        self.middle_block = Middle(config, embedding_width)
        self._size_multiple = config.size_multiple

    def embed_time(self, times: Tensor, modality: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Times (B,) and, where the network has that input, modality ids (B,) -> (B, time_width)."""
        embedding: Tensor = self.time_embed(timestep_embedding(times, self._first_channels).to(dtype))
        if hasattr(self, "modality_embedding"):
            embedding = embedding + self.modality_embedding(required(modality, "modality")).to(dtype)
        return embedding

    def encode(self, h: Tensor, embedding: Tensor, context: Tensor | None) -> list[Tensor]:
        """Run the levels on the first convolution's output `h`; return it and all their outputs, in order."""
        if any(n % self._size_multiple for n in h.shape[2:]):
            raise ValueError(f"size {tuple(h.shape[2:])} is not a multiple of {self._size_multiple}")
        skips = [h]
        for level in self.down_blocks:
            skips += level(skips[-1], embedding, context)
        return skips


class UNet(Trunk):
    """Predict, from a noisy latent and its time, what the diffusion process asks for."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config, config.embedding_width)
        self.config = config
        if config.region_input:
            self.top_region_embed = embedding_mlp(4, config.time_width)
            self.bottom_region_embed = embedding_mlp(4, config.time_width)
        if config.spacing_input:
            self.spacing_embed = embedding_mlp(3, config.time_width)
        self.up_blocks = nn.ModuleList(self._up_levels(config))
        norm = GroupNorm(config.norm_groups, config.channels[0], config.norm_eps)
        self.out = nn.Sequential(norm, nn.SiLU(), zeroed(conv3(config.channels[0], config.out_channels)))

    def forward(
        self,
        x: Tensor,
        times: Tensor,
        *,
        spacing: Tensor | None = None,
        top_region: Tensor | None = None,
        bottom_region: Tensor | None = None,
        modality: Tensor | None = None,
        context: Tensor | None = None,
        residuals: ControlResiduals | None = None,
    ) -> Tensor:
        """Predict noise or velocity.

        Args:
            x: noisy latent, `B C X Y Z`; axes multiples of `config.size_multiple`.
            times: (B,), in [0, 1000].
            spacing: (B, 3), mm x 100.
            top_region: (B, 4), one-hot x 100.
            bottom_region: (B, 4), one-hot x 100.
            modality: (B,) int64.
            context: (B, M, context_channels), the ten anatomy sizes (M = 1) of the mask network.
            residuals: a ControlNet's output.

        Spacing, regions and modality that this network has no input for are not used, so that every network
        can be handed the same conditions; those that it does have an input for must be there.

        Returns:
            `B C X Y Z`.

        Raises:
            ValueError: an input is missing, a network without a context is given one, or a size does not fit.
        """
        embedding = self._embed(x, times, spacing, top_region, bottom_region, modality)
        skips = self.encode(self.conv_in(x), embedding, context)
        if residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, residuals.down, strict=True)]
        # The last sum also enters the middle block: the released networks were trained that way.
        h = self.middle_block(skips[-1], embedding, context)
        if residuals is not None:
            h = h + residuals.middle
        for level in self.up_blocks:
            h = level(h, skips, embedding, context)
        norm, _, conv = self.out  # the norm does the SiLU too, where it can
        assert isinstance(norm, GroupNorm)
        out: Tensor = conv(norm.activated(h))
        return out

    def _embed(
        self,
        x: Tensor,
        times: Tensor,
        spacing: Tensor | None,
        top_region: Tensor | None,
        bottom_region: Tensor | None,
        modality: Tensor | None,
    ) -> Tensor:
        parts = [self.embed_time(times, modality, x.dtype)]
        if self.config.region_input:
            parts.append(self.top_region_embed(required(top_region, "top_region").to(x.dtype)))
            parts.append(self.bottom_region_embed(required(bottom_region, "bottom_region").to(x.dtype)))
        if self.config.spacing_input:
            parts.append(self.spacing_embed(required(spacing, "spacing").to(x.dtype)))
        return torch.cat(parts, dim=1)

    @staticmethod
    def _up_levels(config: UNetConfig) -> list[UpLevel]:
        skips = list(config.skip_channels)
        width = config.channels[-1]
        levels = []
        for level in reversed(range(len(config.channels))):
            in_channels = []
            for _ in range(config.num_res_blocks[level] + 1):
                in_channels.append(width + skips.pop())
                width = config.channels[level]
            levels.append(UpLevel(config, level, tuple(in_channels), config.embedding_width))
        return levels


def resampled(module: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    """Apply a down- or upsampling; only residual ones take the embedding."""
    out: Tensor = module(x, embedding) if isinstance(module, ConditionedBlock) else module(x)
    return out


def required(value: Tensor | None, name: str) -> Tensor:
    """Return `value`, which the network's configuration asks for."""
    if value is None:
        raise ValueError(f"this network needs the input '{name}'")
    return value
