"""2D slices to feature vectors for Frechet distances: what makes extractors pluggable, and four of them.

A slice is CT windowed from [-1000, 1000] HU to [0, 1] (air is 0), its one channel repeated where a network wants three.
How it is brought to an extractor is part of what is published, so each has a view of its own (`VIEWS`):

- `efficientnet-lite0` (ImageNet, from the package index) and `gradients` (no weights): padded with air to a square, so
  that the aspect stays, and resized to 224 pixels.
- `inception`, with the weights of the original FID, as pytorch-fid uses them, or torchvision's: padded to a square,
  resized to 299 pixels by plain bilinear interpolation, mapped to [-1, 1]. Square slices are seen as by pytorch-fid.
- `radimagenet`, as the reference's FID sees slices: neither padded nor resized; intensities of a volume's slices of one
  plane mapped together from their least and greatest to [0, 1], less ImageNet's mean in the order blue, green, red.

The last two are given a file of weights that `maisi weights convert` made of a published one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.evaluation.feature_weights import SLICE_NETWORKS, FeatureWeights, require_weights
from maisi.training.perceptual import EfficientNetFeatures, FeatureName, GradientFeatures
from maisi.weights.load import load_network

SliceFeatures = Callable[[Tensor], Tensor]
"""Images `N 1 H W` in [0, 1] -> feature vectors `N D`."""

SliceFeatureName = Literal[FeatureName, "inception", "radimagenet"]

SIDE = 224


@dataclass(frozen=True)
class SliceView:
    """How slices are brought to an extractor.

    Attributes:
        side: pixels of the square that they are padded (with air) and resized to, bilinearly; None leaves them alone.
        antialias: whether a pixel of a smaller image is a mean of all that it stands for.
        stretched: whether the intensities of a volume's slices of one plane are mapped, together, to [0, 1].
    """

    side: int | None = SIDE
    antialias: bool = True
    stretched: bool = False


VIEWS: Mapping[SliceFeatureName, SliceView] = MappingProxyType(
    {
        "efficientnet-lite0": SliceView(),
        "gradients": SliceView(),
        "inception": SliceView(299, antialias=False),
        "radimagenet": SliceView(None, stretched=True),
    }
)


class PooledEfficientNet(nn.Module):
    """The 1280 features before the classifier of efficientnet-lite0 (ImageNet), averaged over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = EfficientNetFeatures()
        # depthwise convolutions are faster in this layout
        self.backbone.network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """`N 1 H W` in [0, 1] -> `N 1280`."""
        x = ((images.expand(-1, 3, -1, -1) - self.backbone.mean) / self.backbone.std).contiguous(
            memory_format=torch.channels_last
        )
        return cast(Tensor, self.backbone.network.extract_features(x)).mean((2, 3))


class PooledGradients(nn.Module):
    """Mean and standard deviation of intensity and derivatives at three scales: 18 numbers, no weights.

    Coarse, but it works without any package and tells noise from smoothness.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps = GradientFeatures()

    def forward(self, images: Tensor) -> Tensor:
        """`N 1 H W` in [0, 1] -> `N 18`."""
        maps = self.maps(images)
        return torch.cat([value for m in maps for value in (m.mean((2, 3)), m.std((2, 3)))], 1)


class PooledMaps(nn.Module):
    """A published network's last maps, averaged over the image: 2048 features."""

    def __init__(self, weights: FeatureWeights) -> None:
        super().__init__()
        network: Any = load_network(weights.path, network=weights.network).requires_grad_(False)
        # up to a quarter faster on CPUs
        self.network: nn.Module = network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """`N 1 H W` in [0, 1] -> `N 2048`."""
        return cast(Tensor, self.network(images)).mean((2, 3))


def load_slice_features(name: SliceFeatureName, weights: FeatureWeights | None = None) -> SliceFeatures:
    """Make a feature extractor by name, with a file of weights for those of `SLICE_NETWORKS`.

    Raises:
        MaisiError: its package is not installed, or its weights are missing or those of another.
    """
    require_weights(name, weights, SLICE_NETWORKS)
    if weights is not None:
        return PooledMaps(weights)
    return PooledEfficientNet() if name == "efficientnet-lite0" else PooledGradients()


_VIEW = SliceView()


@torch.no_grad()
def slice_features(
    slices: NDArray[np.float32],
    features: SliceFeatures,
    view: SliceView = _VIEW,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Describe each slice of a stack by a vector.

    Args:
        slices: (N, H, W) in [0, 1], of one plane of one volume.
        features: the extractor.
        view: how it sees them.
        batch_size: slices at a time; memory grows with it, the result does not change.
        device: where the extractor is.

    Returns:
        float32 (N, D).
    """
    if view.stretched:
        least, greatest = float(slices.min()), float(slices.max())
        slices = (slices - np.float32(least)) / np.float32(max(greatest - least, _FLAT))
    seen = _seen(slices, view, batch_size)
    return np.concatenate([features(batch.to(device)).float().cpu().numpy() for batch in seen])


_FLAT = 1e-10
"""Keeps a stack without any contrast from being divided by 0."""


def _seen(slices: NDArray[np.float32], view: SliceView, batch_size: int) -> Iterable[Tensor]:
    _, height, width = slices.shape
    longest = max(height, width)
    left, top = (longest - width) // 2, (longest - height) // 2
    margins = (left, longest - width - left, top, longest - height - top)
    for start in range(0, len(slices), batch_size):
        batch = torch.from_numpy(np.ascontiguousarray(slices[start : start + batch_size]))[:, None]
        if view.side is not None:
            square = F.pad(batch, margins)
            batch = F.interpolate(square, (view.side, view.side), mode="bilinear", antialias=view.antialias)
        yield batch
