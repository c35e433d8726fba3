"""2D slices to feature vectors for Frechet distances: what makes extractors pluggable, and two of them.

A slice is CT windowed from [-1000, 1000] HU to [0, 1] (air is 0). It is padded with air to a square, so that
its aspect stays, and resized to `SIDE` pixels (bilinear), the size the ImageNet network was trained at; the
one channel is repeated to three and normalised as ImageNet was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.training.perceptual import EfficientNetFeatures, FeatureName, GradientFeatures

SliceFeatures = Callable[[Tensor], Tensor]
"""Square images `N 1 H H` in [0, 1] -> feature vectors `N D`."""

SIDE = 224


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


def load_slice_features(name: FeatureName) -> SliceFeatures:
    """Make a feature extractor by name.

    Raises:
        MaisiError: its package is not installed.
    """
    return PooledEfficientNet() if name == "efficientnet-lite0" else PooledGradients()


@torch.no_grad()
def slice_features(
    slices: NDArray[np.float32], features: SliceFeatures, side: int = SIDE, batch_size: int = 16
) -> NDArray[np.float32]:
    """Describe each slice of a stack by a vector.

    Args:
        slices: (N, H, W) in [0, 1].
        features: the extractor.
        side: pixels of the square it sees.
        batch_size: slices at a time; memory grows with it, the result does not change.

    Returns:
        float32 (N, D).
    """
    return np.concatenate([features(batch).float().numpy() for batch in _squares(slices, side, batch_size)])


def _squares(slices: NDArray[np.float32], side: int, batch_size: int) -> Iterable[Tensor]:
    _, height, width = slices.shape
    longest = max(height, width)
    left, top = (longest - width) // 2, (longest - height) // 2
    margins = (left, longest - width - left, top, longest - height - top)
    for start in range(0, len(slices), batch_size):
        batch = torch.from_numpy(np.ascontiguousarray(slices[start : start + batch_size]))[:, None]
        yield F.interpolate(F.pad(batch, margins), (side, side), mode="bilinear", antialias=True)
