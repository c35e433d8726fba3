"""Convolutions of `B C X Y Z` maps, by the quickest way that there is on CPUs. Mathematics only.

Elsewhere, and where gradients are wanted, they are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.layers import winograd


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` by `convolved`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolved(input, weight, bias, self.stride, [int(n) for n in self.padding])


def conv3(in_channels: int, out_channels: int, stride: int = 1, padding: int = 1) -> nn.Conv3d:
    """3 x 3 x 3 convolution that keeps the size at stride 1."""
    return Conv3d(in_channels, out_channels, kernel_size=3, stride=stride, padding=padding)


def conv1(in_channels: int, out_channels: int) -> nn.Conv3d:
    """Convolution of each voxel for itself."""
    return Conv3d(in_channels, out_channels, kernel_size=1)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`F.conv3d`; a map that has another precision than the weights is taken in theirs.

    On CPUs in float32, where no gradient is wanted:

    - where each voxel is for itself and the map is channels-last, it is a matrix product, which takes a tenth of the
      time;
    - to one channel it is a product and shifted sums (`_to_one_channel`), which take a third of the time;
    - with 3 x 3 x 3 taps on a large map it takes half the products (`maisi.layers.winograd`);
    - a single small map goes to oneDNN, where PyTorch would give it to a kernel that takes up to five times as long
      and copies channels-last weights for it: a step of a small U-Net took 2.5 times as long so. With gradients it is
      left to that kernel, to which the backward pass goes whatever the forward pass took.
    """
    if _goes_to_one_channel(x, weight, stride, padding):
        return _to_one_channel(x, weight, bias, padding)
    if x.dtype != weight.dtype and not _is_autocast(x):
        x = x.to(weight.dtype)
    if _is_product(x, weight, stride, padding):
        return _product(x.permute(0, 2, 3, 4, 1), weight.flatten(1), bias).permute(0, 4, 1, 2, 3)
    if winograd.pays(x, weight, stride, padding):
        return winograd.convolved(x, weight, bias, padding)
    if _left_to_slow_kernel(x, weight):
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def _product(voxels: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; where nothing is trained the bias is added in place: PyTorch would write it everywhere first."""
    if bias is None or torch.is_grad_enabled():
        return F.linear(voxels, matrix, bias)
    return F.linear(voxels, matrix).add_(bias)


def _is_product(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    alone = set(weight.shape[2:]) == set(stride) == {1} and not any(padding)
    return (
        alone
        and x.dtype == torch.float32
        and x.device.type != "cuda"
        and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def _goes_to_one_channel(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    return (
        tuple(weight.shape[2:]) == (3, 3, 3)
        and weight.shape[0] == 1
        and weight.dtype == torch.float32
        and set(stride) == {1}
        and set(padding) <= {0, 1}
        and x.device.type in ("cpu", "meta")
        and not torch.is_grad_enabled()
        and not _is_autocast(x)
        and min(x.shape[2:]) >= winograd.TAPS
    )


def _to_one_channel(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """What each voxel gives to its 27 neighbours is one product; row by row of X, which stays in a cache.

    A map in another precision is turned into the weights' there, not whole.
    """
    size = [n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)]
    made = torch.zeros((len(x), 1, *size), dtype=weight.dtype, device=x.device)
    if x.is_meta:
        return made
    taps = weight[0].flip(2, 3).permute(1, 2, 3, 0).flatten(0, 2)
    planes = torch.empty((3, x.shape[3] + 2, x.shape[4] + 2), dtype=weight.dtype)
    first = [2 - n for n in padding[1:]]
    for source, result in zip(x, made[:, 0], strict=True):
        for row in range(source.shape[1]):
            voxels = source[:, row].permute(1, 2, 0).flatten(0, 1).to(weight.dtype)
            given = torch.mm(taps, voxels.T).view(3, 3, 3, *source.shape[2:])
            planes.zero_()
            for tap in range(9):  # one by one: F.fold takes ten times as long
                y, z = divmod(tap, 3)
                planes[:, y : y + source.shape[2], z : z + source.shape[3]] += given[:, y, z]
            for tap, plane in enumerate(planes[:, first[0] : first[0] + size[1], first[1] : first[1] + size[2]]):
                to = row - tap + padding[0]
                if 0 <= to < size[0]:
                    result[to] += plane
    return made if bias is None else made.add_(bias)


def _is_autocast(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def _left_to_slow_kernel(x: Tensor, weight: Tensor) -> bool:
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not _is_autocast(x)
    there = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return is_small(x, weight) and plain and not trained and there


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch keeps a float32 map from oneDNN on CPUs; it looks at channels, X and Y, not at Z."""
    return len(x) == 1 and 1 < weight.shape[2] <= 3 and x.shape[1] * x.shape[2] * x.shape[3] <= 20480
