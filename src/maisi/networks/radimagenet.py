"""ResNet-50 trained on RadImageNet (Mei et al. 2022), without a classifier: the features of the reference's FID.

Two published files hold such a network. The reference (and MONAI) reads weights that were carried over from Keras:
biases in all convolutions, halving in a block's first 1 x 1 convolution, and another epsilon. RadImageNet's authors
also give a PyTorch file, of another training, in torchvision's form: no biases, halving in the 3 x 3 convolution. The
halving is told by no shape, so a configuration says which it is. Names of tensors are torchvision's.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.config import Config
from maisi.layers.frozen import FrozenBatchNorm2d

EPS = {"keras": 1.001e-5, "torch": 1e-5}
"""Of the batch norms."""

_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Channels inside the blocks, and blocks; all stages but the first halve the map."""

_WIDENING = 4

_BGR_MEAN = (0.406, 0.456, 0.485)
"""ImageNet's mean of blue, green and red."""


class RadImageNetConfig(Config):
    """Which of the published networks it is.

    Attributes:
        variant: 'keras' for the weights carried over from Keras, 'torch' for the authors' PyTorch file.
    """

    variant: Literal["keras", "torch"] = "keras"


class RadImageNet(nn.Module):
    """ResNet-50 up to its last block."""

    def __init__(self, config: RadImageNetConfig) -> None:
        super().__init__()
        self.config = config
        keras = config.variant == "keras"
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=keras)
        self.bn1 = FrozenBatchNorm2d(64, EPS[config.variant])
        width = 64
        for index, (inner, count) in enumerate(_STAGES):
            blocks = []
            for number in range(count):
                stride = 2 if index and not number else 1
                blocks.append(_Bottleneck(width, inner, stride, config))
                width = _WIDENING * inner
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> Tensor:
        """Grey images `N 1 H W` in [0, 1] -> maps `N 2048 h w`, h = H/32 rounded up.

        Each network sees what it was trained on: blue, green, red less ImageNet's mean ('keras'), or [-1, 1] ('torch').
        """
        x = images.expand(-1, 3, -1, -1)
        x = x - x.new_tensor(_BGR_MEAN).view(1, 3, 1, 1) if self.config.variant == "keras" else 2 * x - 1
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for index in range(len(_STAGES)):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return x


class _Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution, plus the (projected) input."""

    def __init__(self, in_channels: int, inner: int, stride: int, config: RadImageNetConfig) -> None:
        super().__init__()
        keras = config.variant == "keras"
        conv = partial(nn.Conv2d, bias=keras)
        norm = partial(FrozenBatchNorm2d, eps=EPS[config.variant])
        first, second = (stride, 1) if keras else (1, stride)
        out_channels = _WIDENING * inner
        self.conv1, self.bn1 = conv(in_channels, inner, 1, first), norm(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, second, 1), norm(inner)
        self.conv3, self.bn3 = conv(inner, out_channels, 1), norm(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.downsample = nn.Sequential(conv(in_channels, out_channels, 1, stride), norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(torch.add(self.bn3(self.conv3(y)), self.downsample(x)))
