"""A perceptual distance of two CTs in the manner of LPIPS (Zhang et al. 2018), on slices of three planes.

With features handed in, their maps are scaled to unit length along their channels, and the squared differences averaged
over each map and summed over the depths: LPIPS with all learned weights at 1, whose numbers can be compared with those
from the same features only. `lpips` is the published distance, with its learned weights from a converted file;
`radimagenet` compares the last maps of that network, as MONAI's `PerceptualLoss` of the same name does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from maisi.data.preprocess import window_ct
from maisi.errors import MaisiError
from maisi.evaluation.feature_weights import IMAGE_NETWORKS, FeatureWeights, require_weights
from maisi.networks.lpips import unit_length
from maisi.training.perceptual import FeatureName, Features, load_features
from maisi.volume import Array
from maisi.weights.load import load_network

ImageDistance = Callable[[Tensor, Tensor], float]
"""Two images `1 1 H W` in [0, 1] -> how far they are apart, 0 for equal ones."""

PerceptualName = Literal[FeatureName, "lpips", "radimagenet"]

SLICES = 16
"""Of each plane, evenly spread."""

SMALLEST_SIDE = 32
"""Pixels; smaller slices are padded with air, since deep features need some."""


def load_distance(name: PerceptualName, weights: FeatureWeights | None = None) -> ImageDistance:
    """Make a distance by name, with a file of weights for those of `IMAGE_NETWORKS`.

    Raises:
        MaisiError: its package is not installed, or its weights are missing or those of another.
    """
    require_weights(name, weights, IMAGE_NETWORKS)
    if weights is None:
        return between(load_features(cast(FeatureName, name)))
    network = load_network(weights.path, network=weights.network).requires_grad_(False)
    return between(lambda image: [network(image)]) if name == "radimagenet" else lambda a, b: float(network(a, b))


def between(features: Features) -> ImageDistance:
    """The distance of two images' feature maps, without learned weights."""
    return lambda a, b: map_distance(features(a), features(b))


@torch.no_grad()
def perceptual_distance(original_hu: Array, made_hu: Array, distance: ImageDistance, slices: int = SLICES) -> float:
    """Return the mean distance of two CTs in HU of one shape (X, Y, Z): 0 for equal ones, lower is closer.

    Args:
        original_hu: the original; HU are clipped to the window of the networks.
        made_hu: its reconstruction.
        distance: of 2D images.
        slices: of each plane.

    Raises:
        MaisiError: shapes differ.
    """
    if original_hu.shape != made_hu.shape:
        raise MaisiError(
            f"Volumes of {original_hu.shape} and {made_hu.shape} can't be compared; bring them to one grid."
        )
    distances = [
        distance(_image(original_hu, axis, place), _image(made_hu, axis, place))
        for axis in range(3)
        for place in _places(original_hu.shape[axis], slices)
    ]
    return float(np.mean(distances))


def map_distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the distance of one image's feature maps `1 C H W` to those of another."""
    return sum(float((unit_length(x) - unit_length(y)).square().sum(1).mean()) for x, y in zip(a, b, strict=True))


def _places(count: int, slices: int) -> NDArray[np.int64]:
    """Middles of `slices` equal parts of an axis, each once."""
    wanted = min(slices, count)
    return np.floor((np.arange(wanted) + 0.5) * count / wanted).astype(np.int64)


def _image(hu: Array, axis: int, place: int) -> Tensor:
    image = torch.from_numpy(window_ct(np.take(hu, place, axis)))[None, None]
    down, across = (max(0, SMALLEST_SIDE - n) for n in image.shape[2:])
    return F.pad(image, (0, across, 0, down))
