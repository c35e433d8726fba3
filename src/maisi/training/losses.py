"""Losses of all stages. Every function takes tensors and returns a scalar tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from maisi.training.perceptual import Features


def perceptual(features: Features, output: Tensor, target: Tensor, positions: Tensor) -> Tensor:
    """Distance of 2D features on slices of all three planes (2.5D).

    Args:
        features: 2D feature extractor; see `maisi.training.perceptual`.
        output: `B 1 X Y Z`, about [0, 1].
        target: the same shape.
        positions: (slices,) in [0, 1): which slices of each axis.

    At each depth features are scaled to unit length along channels and their squared difference is averaged.
    """
    pairs = zip(slices(output, positions), slices(target, positions), strict=True)
    total = output.new_zeros(())
    for a, b in pairs:
        with torch.no_grad():
            wanted = features(b)
        depths = [(_unit(x) - _unit(y)).square().sum(1).mean() for x, y in zip(features(a), wanted, strict=True)]
        total = total + torch.stack(depths).mean()
    return total / 3


def slices(volume: Tensor, positions: Tensor) -> list[Tensor]:
    """Slices across X, Y and Z at relative `positions`: three tensors `B*slices 1 H W`."""
    result = []
    for axis in (2, 3, 4):
        index = (positions * volume.shape[axis]).long().to(volume.device)
        chosen = volume.index_select(axis, index).movedim(axis, 1)
        result.append(chosen.flatten(0, 1))
    return result


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-6)


def classification(logits: Tensor, classes: Tensor, dice_weight: float) -> dict[str, Tensor]:
    """Cross-entropy, and Dice averaged over the classes that are there, so that small ones count as large ones do.

    Args:
        logits: `B C X Y Z`.
        classes: index of each voxel's class, `B X Y Z`.
        dice_weight: factor of the Dice term.
    """
    classes = classes.long()
    chances = logits.softmax(1)
    true = chances.gather(1, classes[:, None]).flatten(0, 3)
    # by rows: millions of voxels added one by one would be rounded away in float32
    rows = classes.flatten(0, 2)
    zeros = logits.new_zeros(len(rows), logits.shape[1])
    shared = zeros.scatter_add(1, rows, true).sum(0)
    counts = zeros.scatter_add(1, rows, torch.ones_like(true)).sum(0)
    dice = 2 * shared / (chances.sum((0, 2, 3, 4)) + counts).clamp(min=1e-6)
    return {"cross_entropy": F.cross_entropy(logits, classes), "dice": dice_weight * (1 - dice[counts > 0].mean())}


def adversarial(scores: Tensor, real: bool) -> Tensor:
    """Least-squares adversarial loss: patch scores should be 1 for real, 0 for made."""
    return F.mse_loss(scores, torch.full_like(scores, float(real)))


def weighted_mean(difference: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of differences; `weight` (`B 1 X Y Z`) multiplies voxels, as for the labels of a ControlNet."""
    return (difference if weight is None else difference * weight).mean()


@torch.no_grad()
def channel_weights(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """How much an error in each latent channel changes the image.

    Where a channel holds what a block is on average and the others its details, most of what one sees is the first
    channel's, and a loss that takes all alike hardly looks at it. Half a mean weight is added to all, since details
    that change little are seen nevertheless.

    Args:
        decode: latents to images.
        z: some latents as `decode` takes them, `B C X Y Z`.

    Returns:
        `1 C 1 1 1`, mean 1.
    """
    image = decode(z).float()
    generator = torch.Generator().manual_seed(0)
    changes = []
    for channel in range(z.shape[1]):
        moved = z.clone()
        error = torch.randn(z[:, channel].shape, generator=generator).to(z)
        moved[:, channel] += 0.1 * z.std() * error
        changes.append((decode(moved).float() - image).square().mean())
    change = torch.stack(changes)
    return ((change / change.mean() + 0.5) / 1.5).view(1, -1, 1, 1, 1)


def region_contrastive(with_region: Tensor, without_region: Tensor, region: Tensor, bound: float) -> Tensor:
    """Outputs with and without a lesion in the mask must differ inside it and agree outside.

    Args:
        with_region: prediction for the mask with the lesion, `B C X Y Z`.
        without_region: prediction for the mask whose lesion is replaced by its host, detached from the graph.
        region: 1 inside the lesion, `B 1 X Y Z`, at latent resolution.
        bound: a difference larger than this inside the lesion earns nothing more.
    """
    difference = (with_region - without_region).abs().mean(1, keepdim=True)
    inside = (difference.clamp(max=bound) * region).sum() / region.sum().clamp(min=1)
    outside = (difference * (1 - region)).sum() / (1 - region).sum().clamp(min=1)
    return outside - inside
