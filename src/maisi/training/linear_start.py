"""Start an autoencoder of 4x4x4 compression as block PCA, so that training begins above where it else would end.

A block of 4 x 4 x 4 voxels becomes its first principal components, and these become a block again. Strided and
transposed convolutions hold this exactly: two halvings gather the 64 voxels of a block in 64 channels, each tap of a
transposed convolution goes to one voxel of eight. Residual blocks start as their shortcuts. Group norms would divide by
what each image has; one channel of +C and one of -C in a group make them divide by nearly a constant, and a channel
that holds the sum of the others, negated, keeps the mean at zero. Channels that this does not use start at random.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from maisi.layers.blocks import Downsample, ResidualBlock, Upsample
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig

BLOCK = 4
VOXELS = BLOCK**3
LARGE_INSIDE, LARGE_OUTSIDE = 16.0, 8.0
"""C before the latents and before the image: large beside what the data holds there."""

LOG_VARIANCE = -9.0
"""Of the latents: next to no noise."""

PHASES = tuple((p >> 2 & 1, p >> 1 & 1, p & 1) for p in range(8))
"""Where each of eight voxels lies in its block of 2 x 2 x 2."""


def require_components(config: AutoencoderConfig) -> None:
    """Check that an autoencoder can hold block PCA.

    Raises:
        ValueError: says what it lacks.
    """
    groups, widths = config.norm_groups, config.channels
    if len(widths) != 3 or config.upsampling != "transposed" or config.in_channels * config.out_channels != 1:
        raise ValueError(
            "a start as components takes three levels, 'upsampling: transposed' and one channel in and out"
        )
    if VOXELS % groups or min(config.num_res_blocks) < 1:
        raise ValueError(
            f"a start as components takes norm_groups that divide {VOXELS} and a residual block on each level"
        )
    least = (4 * groups, VOXELS, VOXELS + 3 * groups)
    if any(have < need for have, need in zip(widths, least, strict=True)) or len(set(widths)) < 3:
        raise ValueError(f"a start as components takes channels of at least {least}, all different, not {widths}")
    if config.latent_channels > VOXELS:
        raise ValueError(f"a block has {VOXELS} components, so latent_channels can be {VOXELS} at most")


def principal_components(images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of blocks of `B 1 X Y Z`: standard deviations (64), components in columns (64, 64), and the mean voxel."""
    batch, _, *size = images.shape
    cut = [part for n in size for part in (n // BLOCK, BLOCK)]
    rows = images.reshape(batch, *cut).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, VOXELS)
    mean = float(rows.mean())
    centred = (rows - mean).double()
    variance, components = torch.linalg.eigh(centred.T @ centred / len(centred))
    return variance.flip(0).clamp_min(1e-12).sqrt().float(), components.flip(1).float(), mean


@torch.no_grad()
def start_as_components(model: Autoencoder, images: Tensor, power: float = 0.5) -> None:
    """Set the weights.

    Args:
        model: see `require_components`.
        images: `B 1 X Y Z` in [0, 1] to find the components from, on the model's device; axes are multiples of 4.
        power: a latent channel's spread is its component's to this power (0: all alike), the first's is 1.

    Raises:
        ValueError: the model cannot hold it.
    """
    require_components(model.config)
    spread, components, mean = principal_components(images)
    scale = (spread / spread[0]) ** power / spread
    shape = (VOXELS, BLOCK, BLOCK, BLOCK)
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        if isinstance(block, ResidualBlock):
            _clear(block.conv2)
    _start_encoder(model, (components * scale).T.reshape(shape).to(images.device), mean)
    for conv in (model.quant_conv_mu, model.post_quant_conv, model.quant_conv_log_sigma):
        _clear(conv)
    for channel in range(model.config.latent_channels):
        _pass(model.quant_conv_mu, channel, channel)
        _pass(model.post_quant_conv, channel, channel)
    _bias(model.quant_conv_log_sigma).fill_(LOG_VARIANCE)
    _start_decoder(model, (components / scale).T.reshape(shape).to(images.device), mean)


def _start_encoder(model: Autoencoder, components: Tensor, mean: float) -> None:
    """Voxels to components in two halvings; these to the last norm's groups, the first of them on to the latents."""
    config, blocks = model.config, list(model.encoder.blocks)
    first, last, norm = cast(nn.Conv3d, blocks[0]), cast(nn.Conv3d, blocks[-1]), cast(nn.GroupNorm, blocks[-2])
    fine, coarse = (block.conv for block in blocks if isinstance(block, Downsample))
    to_middle, to_deepest = _projections(blocks)
    _pass(first, 0, 0)
    _bias(first)[0] = -mean
    for p, (x, y, z) in enumerate(PHASES):
        _clear(fine, p)
        fine.weight[p, 0, x, y, z] = 1
        _pass(to_middle, p, p)
    _clear(coarse)
    for x, y, z in PHASES:
        for q, (i, j, k) in enumerate(PHASES):
            coarse.weight[:VOXELS, q, x, y, z] = components[:, 2 * x + i, 2 * y + j, 2 * z + k]

    per_group, held = config.channels[-1] // config.norm_groups, VOXELS // config.norm_groups
    _clear(to_deepest)
    _clear(last)
    norm.weight.zero_()
    constants = _bias(_last_residual(blocks).conv2)
    for component in range(VOXELS):
        start = component % config.norm_groups * per_group
        channel = start + component // config.norm_groups
        to_deepest.weight[channel, component] = 1
        to_deepest.weight[start + held, component] = -1
        norm.weight[channel] = LARGE_INSIDE * math.sqrt(2 / per_group)
        if component < config.latent_channels:
            last.weight[component, channel, 1, 1, 1] = 1
    for start in range(0, config.channels[-1], per_group):
        constants[start + held + 1], constants[start + held + 2] = LARGE_INSIDE, -LARGE_INSIDE


def _start_decoder(model: Autoencoder, components: Tensor, mean: float) -> None:
    """Latents to voxels in two doublings."""
    config, blocks = model.config, list(model.decoder.blocks)
    first, last, norm = cast(nn.Conv3d, blocks[0]), cast(nn.Conv3d, blocks[-1]), cast(nn.GroupNorm, blocks[-2])
    coarse, fine = (cast(nn.ConvTranspose3d, block.conv) for block in blocks if isinstance(block, Upsample))
    to_middle, to_finest = _projections(blocks)
    latents = config.latent_channels
    for component in range(latents):
        _pass(first, component, component)
    # tap 1 of a transposed convolution (kernel 3, stride 2, padding 1) reaches a block's first voxel, tap 2 its second
    fine.weight[:, 0], _bias(fine)[0] = 0, 0
    for q, (i, j, k) in enumerate(PHASES):
        coarse.weight[:, q], _bias(coarse)[q] = 0, 0
        for x, y, z in PHASES:
            values = components[:latents, 2 * x + i, 2 * y + j, 2 * z + k]
            coarse.weight[:latents, q, 1 + x, 1 + y, 1 + z] = values
        _pass(to_middle, q, q)
        fine.weight[q, 0, 1 + i, 1 + j, 1 + k] = 1

    per_group = config.channels[0] // config.norm_groups
    for channel in range(per_group):
        _pass(to_finest, channel, 0, {0: 1.0, 3: -1.0}.get(channel, 0.0))
    constants = _bias(_last_residual(blocks).conv2)
    constants[1], constants[2] = LARGE_OUTSIDE, -LARGE_OUTSIDE
    norm.weight[:per_group] = 0
    norm.weight[0] = LARGE_OUTSIDE * math.sqrt(2 / per_group)
    _clear(last)
    last.weight[0, 0, 1, 1, 1] = 1
    _bias(last).fill_(mean)


def _projections(blocks: list[nn.Module]) -> list[nn.Conv3d]:
    """The shortcuts of residual blocks that change the number of channels, in order."""
    shortcuts = [block.shortcut for block in blocks if isinstance(block, ResidualBlock)]
    return [shortcut for shortcut in shortcuts if isinstance(shortcut, nn.Conv3d)]


def _last_residual(blocks: list[nn.Module]) -> ResidualBlock:
    return [block for block in blocks if isinstance(block, ResidualBlock)][-1]


def _bias(conv: nn.Module) -> Tensor:
    return cast(Tensor, conv.bias)


def _clear(conv: nn.Conv3d, row: int | slice = slice(None)) -> None:
    """Set weights and biases of an output channel, or of all, to 0."""
    conv.weight[row], _bias(conv)[row] = 0, 0


def _pass(conv: nn.Conv3d, row: int, column: int, factor: float = 1.0) -> None:
    """Let an output channel be an input channel times a factor."""
    _clear(conv, row)
    x, y, z = (n // 2 for n in conv.kernel_size)
    conv.weight[row, column, x, y, z] = factor
