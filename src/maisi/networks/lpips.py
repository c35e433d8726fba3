"""LPIPS (Zhang et al. 2018), version 0.1: a distance of images, learned on top of an ImageNet network.

Feature maps of both images are scaled to unit length along their channels; their squared differences, weighted channel
by channel by a learned head, are averaged over each map and summed over the depths. Names of a trunk's tensors are
torchvision's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.config import Config

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What images in [-1, 1] are normalised by."""

_TINY = 1e-10


class LpipsConfig(Config):
    """Which of the published distances it is.

    Attributes:
        variant: its trunk.
    """

    variant: Literal["alexnet", "vgg16", "squeezenet1_1"] = "alexnet"


@dataclass(frozen=True)
class _Conv:
    """A convolution; a ReLU follows it."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class _Pool:
    """Takes maxima, at stride 2."""

    kernel: int
    ceil: bool = False


@dataclass(frozen=True)
class _Fire:
    """SqueezeNet's block: few channels, then `expanded` of 1 x 1 and as many of 3 x 3 convolutions."""

    squeezed: int
    expanded: int


@dataclass(frozen=True)
class _Trunk:
    """Layers, and those (counted as torchvision does, ReLUs too) whose maps are compared."""

    layers: tuple[_Conv | _Pool | _Fire, ...]
    seen: tuple[int, ...]


_HALF, _SQUEEZED = _Pool(2), _Pool(3, ceil=True)
_TRUNKS: Mapping[str, _Trunk] = MappingProxyType(
    {
        "alexnet": _Trunk(
            (_Conv(64, 11, 4, 2), _Pool(3), _Conv(192, 5, 1, 2), _Pool(3), _Conv(384), _Conv(256), _Conv(256)),
            (1, 4, 7, 9, 11),
        ),
        "vgg16": _Trunk(
            (
                *(_Conv(64),) * 2,
                _HALF,
                *(_Conv(128),) * 2,
                _HALF,
                *(_Conv(256),) * 3,
                _HALF,
                *(_Conv(512),) * 3,
                _HALF,
                *(_Conv(512),) * 3,
            ),
            (3, 8, 15, 22, 29),
        ),
        "squeezenet1_1": _Trunk(
            (
                _Conv(64, 3, 2, 0),
                _SQUEEZED,
                *(_Fire(16, 64),) * 2,
                _SQUEEZED,
                *(_Fire(32, 128),) * 2,
                _SQUEEZED,
                *(_Fire(48, 192),) * 2,
                *(_Fire(64, 256),) * 2,
            ),
            (1, 4, 7, 9, 10, 11, 12),
        ),
    }
)


class Lpips(nn.Module):
    """A trunk, and a head for each of its depths that are compared."""

    def __init__(self, config: LpipsConfig) -> None:
        super().__init__()
        self.config = config
        trunk = _TRUNKS[config.variant]
        made = list(_made(trunk))
        self.features = nn.Sequential(*(layer for layer, _ in made))
        self.heads = nn.ModuleList(nn.Conv2d(made[place][1], 1, 1, bias=False) for place in trunk.seen)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Grey images `N 1 H W` in [0, 1], H and W at least 32 -> distances `N`: 0 for equal ones."""
        pairs = zip(self._maps(a), self._maps(b), self.heads, strict=True)
        parts = [head((unit_length(x) - unit_length(y)).square()).mean((1, 2, 3)) for x, y, head in pairs]
        return torch.stack(parts).sum(0)

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        shift, scale = (images.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        x = ((2 * images - 1).expand(-1, 3, -1, -1) - shift) / scale
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in _TRUNKS[self.config.variant].seen:
                yield x


def unit_length(maps: Tensor) -> Tensor:
    """Scale maps `N C H W` so that their channels, taken as a vector, have length 1."""
    return maps / (maps.square().sum(1, keepdim=True).sqrt() + _TINY)


class _Expand(nn.Module):
    """See `_Fire`."""

    def __init__(self, in_channels: int, fire: _Fire) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, fire.squeezed, 1)
        self.expand1x1 = nn.Conv2d(fire.squeezed, fire.expanded, 1)
        self.expand3x3 = nn.Conv2d(fire.squeezed, fire.expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([cast(Tensor, self.expand1x1(x)), cast(Tensor, self.expand3x3(x))], 1))


def _made(trunk: _Trunk) -> Iterator[tuple[nn.Module, int]]:
    """The modules of a trunk, with the channels that leave each."""
    width = 3
    for layer in trunk.layers:
        if isinstance(layer, _Pool):
            yield nn.MaxPool2d(layer.kernel, 2, ceil_mode=layer.ceil), width
        elif isinstance(layer, _Fire):
            before, width = width, 2 * layer.expanded
            yield _Expand(before, layer), width
        else:
            before, width = width, layer.channels
            yield nn.Conv2d(before, width, layer.kernel, layer.stride, layer.padding), width
            yield nn.ReLU(), width
