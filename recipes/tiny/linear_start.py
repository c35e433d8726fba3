"""Start an autoencoder of 4x4x4 compression as block PCA, so that training begins above where it else would end.

A block of 4 x 4 x 4 voxels becomes its first principal components, and these become a block again. Strided and
transposed convolutions hold this exactly: two halvings gather the 64 voxels of a block in 64 channels, each tap of a
transposed convolution goes to one voxel of eight. Residual blocks start as their shortcuts. Group norms would divide by
what each image has; one channel of +C and one of -C in a group make them divide by nearly a constant, and a channel
that holds the sum of the others, negated, keeps the mean at zero. Channels that this does not use start at random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from maisi.layers.blocks import Downsample, ResidualBlock, Upsample
from maisi.networks.autoencoder import Autoencoder

BLOCK = 4
VOXELS = BLOCK**3
LARGE_INSIDE, LARGE_OUTSIDE = 16.0, 8.0
"""C before the latents and before the image: large beside what the data holds there."""

PHASES = tuple((p >> 2 & 1, p >> 1 & 1, p & 1) for p in range(8))
"""Where each of eight voxels lies in its block of 2 x 2 x 2."""


def principal_components(images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of blocks of `B 1 n n n`: standard deviations (64), components in columns (64, 64), and the mean voxel."""
    batch, _, *size = images.shape
    cut = [part for n in size for part in (n // BLOCK, BLOCK)]
    rows = images.reshape(batch, *cut).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, VOXELS)
    mean = float(rows.mean())
    centred = (rows - mean).double()
    variance, components = torch.linalg.eigh(centred.T @ centred / len(centred))
    return variance.flip(0).clamp_min(1e-12).sqrt().float(), components.flip(1).float(), mean


@torch.no_grad()
def start_as_pca(model: Autoencoder, images: Tensor, power: float = 0.5) -> None:
    """Set the weights.

    Args:
        model: three levels of at least 8, 64 and 11 * norm_groups channels, 4 of the first to a group; transposed
            upsampling.
        images: `B 1 n n n` in [0, 1] to find the components from; n a multiple of 4.
        power: a latent channel's spread is its component's to this power (0: all alike), the first's is 1.
    """
    config = model.config
    groups, latents = config.norm_groups, config.latent_channels
    assert len(config.channels) == 3
    assert config.upsampling == "transposed"
    spread, components, mean = principal_components(images)
    scale = (spread / spread[0]) ** power / spread
    into = (components * scale).T.reshape(VOXELS, BLOCK, BLOCK, BLOCK).to(images.device)
    out_of = (components / scale).T.reshape(VOXELS, BLOCK, BLOCK, BLOCK).to(images.device)
    encoder, decoder = list(model.encoder.blocks), list(model.decoder.blocks)
    for block in residual_blocks(encoder) + residual_blocks(decoder):
        cleared(block.conv2)

    # voxels to 64 components, in two halvings
    fine, coarse = (block.conv for block in encoder if isinstance(block, Downsample))
    passed(encoder[0], 0, 0)
    encoder[0].bias[0] = -mean  # type: ignore[index]
    for p, phase in enumerate(PHASES):
        fine.weight[p], fine.bias[p] = 0, 0  # type: ignore[index]
        fine.weight[(p, 0, *phase)] = 1
    widening = [block.shortcut for block in residual_blocks(encoder) if isinstance(block.shortcut, nn.Conv3d)]
    for p in range(8):
        passed(widening[0], p, p)
    cleared(coarse)
    for outer in PHASES:
        for q, inner in enumerate(PHASES):
            x, y, z = (2 * a + b for a, b in zip(outer, inner, strict=True))
            coarse.weight[(slice(0, VOXELS), q, *outer)] = into[:, x, y, z]

    # components dealt out to the groups of the last norm, then the first of them to the latents
    per_group, held = config.channels[-1] // groups, VOXELS // groups
    cleared(widening[1])
    norm, last = encoder[-2], encoder[-1]
    cleared(last)
    norm.weight.zero_()  # type: ignore[operator]
    bias = residual_blocks(encoder)[-1].conv2.bias
    assert bias is not None
    for component in range(VOXELS):
        first = component % groups * per_group
        channel = first + component // groups
        widening[1].weight[channel, component] = 1
        widening[1].weight[first + held, component] = -1
        norm.weight[channel] = LARGE_INSIDE * math.sqrt(2 / per_group)  # type: ignore[index, operator]
        if component < latents:
            last.weight[component, channel, 1, 1, 1] = 1  # type: ignore[index]
    for first in range(0, config.channels[-1], per_group):
        bias[first + held + 1], bias[first + held + 2] = LARGE_INSIDE, -LARGE_INSIDE
    for conv in (model.quant_conv_mu, model.post_quant_conv):
        cleared(conv)
        conv.weight[range(latents), range(latents)] = 1
    cleared(model.quant_conv_log_sigma)
    assert model.quant_conv_log_sigma.bias is not None
    model.quant_conv_log_sigma.bias.fill_(-9.0)

    # latents to voxels, in two doublings
    coarse, fine = (block.conv for block in decoder if isinstance(block, Upsample))  # type: ignore[assignment]
    for component in range(latents):
        passed(decoder[0], component, component)
    for q, inner in enumerate(PHASES):
        coarse.weight[:, q], coarse.bias[q] = 0, 0  # type: ignore[index]
        for outer in PHASES:
            x, y, z = (2 * a + b for a, b in zip(outer, inner, strict=True))
            coarse.weight[(slice(0, latents), q, *taps(outer))] = out_of[:latents, x, y, z]
    narrowing = [block.shortcut for block in residual_blocks(decoder) if isinstance(block.shortcut, nn.Conv3d)]
    for q in range(8):
        passed(narrowing[0], q, q)
    fine.weight[:, 0], fine.bias[0] = 0, 0  # type: ignore[index]
    for q, inner in enumerate(PHASES):
        fine.weight[(q, 0, *taps(inner))] = 1
    passed(narrowing[1], 0, 0)
    for channel, factor in ((1, 0.0), (2, 0.0), (3, -1.0)):
        passed(narrowing[1], channel, 0, factor)
    bias = residual_blocks(decoder)[-1].conv2.bias
    assert bias is not None
    bias[1], bias[2] = LARGE_OUTSIDE, -LARGE_OUTSIDE
    norm, last = decoder[-2], decoder[-1]
    norm.weight[:4] = 0  # type: ignore[index, operator]
    norm.weight[0] = LARGE_OUTSIDE * math.sqrt(2 / 4)  # type: ignore[index, operator]
    cleared(last)
    last.bias.fill_(mean)  # type: ignore[operator, union-attr]
    last.weight[0, 0, 1, 1, 1] = 1  # type: ignore[index]


def taps(phase: tuple[int, int, int]) -> tuple[int, ...]:
    """Tap of a transposed convolution (kernel 3, stride 2, padding 1) that reaches this voxel from its own block."""
    return tuple(1 + p for p in phase)


def residual_blocks(blocks: list[nn.Module]) -> list[ResidualBlock]:
    """Those that are residual blocks."""
    return [block for block in blocks if isinstance(block, ResidualBlock)]


def cleared(conv: nn.Module) -> None:
    """Set all weights and biases to 0."""
    for parameter in conv.parameters():
        parameter.zero_()


def passed(conv: nn.Module, row: int, column: int, factor: float = 1.0) -> None:
    """Let an output channel be an input channel times a factor."""
    assert isinstance(conv, nn.Conv3d)
    assert conv.bias is not None
    conv.weight[row], conv.bias[row] = 0, 0
    conv.weight[(row, column, *(n // 2 for n in conv.kernel_size))] = factor
