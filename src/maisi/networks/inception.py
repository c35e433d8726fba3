"""Inception-v3 (Szegedy et al. 2016) up to its last pooling: what Frechet distances of images usually look through.

Two published files hold it, under the same names: the network of the original FID, ported from TensorFlow (it ends in
1008 classes), and torchvision's (1000 classes). They differ in their weights, and in two poolings that no shape tells:
TensorFlow's averages leave out the padding, and the last block of the original FID's takes a maximum where every other
takes an average. Published FIDs are those of the former. Names of tensors are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.config import Config
from maisi.layers.frozen import FrozenBatchNorm2d

EPS = 0.001
"""Of the batch norms."""

SMALLEST_SIDE = 75
"""Pixels below which nothing is left of an image."""


class InceptionConfig(Config):
    """Which of the published networks it is.

    Attributes:
        variant: 'fid' pools as the original FID's, 'torchvision' as torchvision's.
    """

    variant: Literal["fid", "torchvision"] = "fid"


@dataclass(frozen=True)
class _Conv:
    """A convolution, norm and ReLU; at stride 1 it keeps the size."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1

    @property
    def padding(self) -> tuple[int, int]:
        down, across = self.kernel
        return (down // 2, across // 2) if self.stride == 1 else (0, 0)


_Fork = tuple[_Conv, ...]
"""Convolutions of one map, joined along channels."""

_Pool = Literal["mean", "last", "halve"]


@dataclass(frozen=True)
class _Block:
    """Paths beside each other, joined along channels; the last of them pools.

    Attributes:
        paths: forks one after the other.
        pooled: channels of the convolution `branch_pool` after pooling; None for a block that halves the map.
        pool: 'last' is a mean as well, but for the original FID's network.
    """

    paths: tuple[tuple[_Fork, ...], ...]
    pooled: int | None
    pool: _Pool = "mean"


def _path(*steps: _Conv | _Fork) -> tuple[_Fork, ...]:
    return tuple(step if isinstance(step, tuple) else (step,) for step in steps)


def _block_a(pooled: int) -> _Block:
    double = (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3)))
    five = (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5)))
    return _Block((_path(_Conv("branch1x1", 64)), _path(*five), _path(*double)), pooled)


def _block_c(width: int) -> _Block:
    seven = (
        _Conv("branch7x7_1", width),
        _Conv("branch7x7_2", width, (1, 7)),
        _Conv("branch7x7_3", 192, (7, 1)),
    )
    double = (
        _Conv("branch7x7dbl_1", width),
        _Conv("branch7x7dbl_2", width, (7, 1)),
        _Conv("branch7x7dbl_3", width, (1, 7)),
        _Conv("branch7x7dbl_4", width, (7, 1)),
        _Conv("branch7x7dbl_5", 192, (1, 7)),
    )
    return _Block((_path(_Conv("branch1x1", 192)), _path(*seven), _path(*double)), 192)


def _block_e(pool: _Pool) -> _Block:
    fork = (_Conv("branch3x3_2a", 384, (1, 3)), _Conv("branch3x3_2b", 384, (3, 1)))
    double_fork = (_Conv("branch3x3dbl_3a", 384, (1, 3)), _Conv("branch3x3dbl_3b", 384, (3, 1)))
    double = (_Conv("branch3x3dbl_1", 448), _Conv("branch3x3dbl_2", 384, (3, 3)), double_fork)
    paths = (_path(_Conv("branch1x1", 320)), _path(_Conv("branch3x3_1", 384), fork), _path(*double))
    return _Block(paths, 192, pool)


_BLOCK_B = _Block(
    (
        _path(_Conv("branch3x3", 384, (3, 3), 2)),
        _path(_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3), 2)),
    ),
    None,
    "halve",
)
_BLOCK_D = _Block(
    (
        _path(_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), 2)),
        _path(
            _Conv("branch7x7x3_1", 192),
            _Conv("branch7x7x3_2", 192, (1, 7)),
            _Conv("branch7x7x3_3", 192, (7, 1)),
            _Conv("branch7x7x3_4", 192, (3, 3), 2),
        ),
    ),
    None,
    "halve",
)
_BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("last"),
}


class Inception(nn.Module):
    """Inception-v3 without its classifiers."""

    def __init__(self, config: InceptionConfig) -> None:
        super().__init__()
        self.config = config
        self.Conv2d_1a_3x3 = _Unit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _Unit(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = _Unit(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = _Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _Unit(80, 192, (3, 3))
        width = 192
        for name, block in _BLOCKS.items():
            mixed = _Mixed(width, block, as_fid=config.variant == "fid")
            self.add_module(name, mixed)
            width = mixed.out_channels

    def forward(self, images: Tensor) -> Tensor:
        """Grey images `N 1 H W` in [0, 1], a side `SMALLEST_SIDE` at least -> maps `N 2048 h w` (of 299, 8 x 8)."""
        x = (2 * images - 1).expand(-1, 3, -1, -1)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return x


class _Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = FrozenBatchNorm2d(channels, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """A block of `_BLOCKS`."""

    def __init__(self, in_channels: int, block: _Block, as_fid: bool) -> None:
        super().__init__()
        self.block, self.as_fid = block, as_fid
        self.out_channels = block.pooled or in_channels
        for path in block.paths:
            width = in_channels
            for fork in path:
                for conv in fork:
                    self.add_module(conv.name, _Unit(width, conv.channels, conv.kernel, conv.stride, conv.padding))
                width = sum(conv.channels for conv in fork)
            self.out_channels += width
        if block.pooled:
            self.branch_pool = _Unit(in_channels, block.pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for path in self.block.paths:
            y = x
            for fork in path:
                y = torch.cat([cast(Tensor, self.get_submodule(conv.name)(y)) for conv in fork], 1)
            found.append(y)
        return torch.cat([*found, self._pooled(x)], 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.block.pool == "halve":
            return F.max_pool2d(x, 3, 2)
        if self.block.pool == "last" and self.as_fid:
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=not self.as_fid)
        return cast(Tensor, self.branch_pool(pooled))
