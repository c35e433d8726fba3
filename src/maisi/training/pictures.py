"""Pictures for the training log. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SOFT_TISSUE = (0.42, 0.62)
"""-160 to 240 HU in the network's [0, 1]."""


def three_planes(volume: Tensor, height: int = 160, window: tuple[float, float] = SOFT_TISSUE) -> Tensor:
    """Middle axial, coronal and sagittal slice of a RAS volume `X Y Z` in [0, 1], side by side: `3 height W`."""
    x, y, z = volume.shape
    planes = [volume[:, :, z // 2], volume[:, y // 2, :], volume[x // 2, :, :]]
    # Rows run from anterior or superior down; columns from the patient's right, as radiologists look at them.
    row = [_fit(plane.T.flip(0), height) for plane in planes]
    low, high = window
    picture = ((torch.cat(row, 1) - low) / (high - low)).clamp(0, 1)
    return picture[None].expand(3, -1, -1).cpu()


def label_planes(labels: Tensor, height: int = 160) -> Tensor:
    """As `three_planes` for a label map `X Y Z` uint8, each id in a grey of its own: `3 height W`."""
    shade = ((labels.long() * 73) % 255 + 60).float() / 315 * (labels > 0)
    return three_planes(shade, height, window=(0.0, 1.0))


def _fit(plane: Tensor, height: int) -> Tensor:
    width = max(1, round(plane.shape[1] * height / plane.shape[0]))
    return F.interpolate(plane[None, None].float(), size=(height, width), mode="bilinear")[0, 0]
