"""A perceptual distance of two CTs in the manner of LPIPS (Zhang et al. 2018), on slices of three planes.

Feature maps are scaled to unit length along their channels, and their squared differences averaged over each map and
summed over the depths. That is LPIPS with all learned weights at 1 and the features handed in, so its numbers can be
compared with those from the same features only, not with published LPIPS.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from maisi.data.preprocess import window_ct
from maisi.errors import MaisiError
from maisi.training.perceptual import Features
from maisi.volume import Array

SLICES = 16
"""Of each plane, evenly spread."""

SMALLEST_SIDE = 32
"""Pixels; smaller slices are padded with air, since deep features need some."""

_TINY = 1e-10


@torch.no_grad()
def perceptual_distance(original_hu: Array, made_hu: Array, features: Features, slices: int = SLICES) -> float:
    """Return the mean distance of two CTs in HU of one shape (X, Y, Z): 0 for equal ones, lower is closer.

    Args:
        original_hu: the original; HU are clipped to the window of the networks.
        made_hu: its reconstruction.
        features: maps of 2D images, `maisi.training.perceptual`.
        slices: of each plane.

    Raises:
        MaisiError: shapes differ.
    """
    if original_hu.shape != made_hu.shape:
        raise MaisiError(
            f"Volumes of {original_hu.shape} and {made_hu.shape} can't be compared; bring them to one grid."
        )
    distances = [
        map_distance(features(_image(original_hu, axis, place)), features(_image(made_hu, axis, place)))
        for axis in range(3)
        for place in _places(original_hu.shape[axis], slices)
    ]
    return float(np.mean(distances))


def map_distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the distance of one image's feature maps `1 C H W` to those of another."""
    return sum(float((_unit(x) - _unit(y)).square().sum(1).mean()) for x, y in zip(a, b, strict=True))


def _unit(maps: Tensor) -> Tensor:
    return maps / (maps.square().sum(1, keepdim=True).sqrt() + _TINY)


def _places(count: int, slices: int) -> NDArray[np.int64]:
    """Middles of `slices` equal parts of an axis, each once."""
    wanted = min(slices, count)
    return np.floor((np.arange(wanted) + 0.5) * count / wanted).astype(np.int64)


def _image(hu: Array, axis: int, place: int) -> Tensor:
    image = torch.from_numpy(window_ct(np.take(hu, place, axis)))[None, None]
    down, across = (max(0, SMALLEST_SIDE - n) for n in image.shape[2:])
    return F.pad(image, (0, across, 0, down))
