"""Residual and resampling blocks of the autoencoder. Mathematics only: no files, devices or splitting.

All feature maps are `B C X Y Z`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from maisi.layers.convolution import conv1, conv3
from maisi.layers.norm import GroupNorm, usable

FEW_VOXELS = 128
"""Of a map on a CPU, up to which doubling and then convolving is quicker than one transposed convolution."""

Upsampling = Literal["trilinear", "nearest", "transposed"]


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the (projected) input."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, norm_eps)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, norm_eps)
        self.conv2 = conv3(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`B Cin X Y Z` -> `B Cout X Y Z`."""
        h = self.conv1(self.norm1.activated(x))
        h = self.conv2(self.norm2.activated(h))
        return torch.as_tensor(self.shortcut(x) + h)


class Downsample(nn.Module):
    """Halve each axis (rounding down): one zero voxel at the far end, then a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """`B C X Y Z` -> `B C X//2 Y//2 Z//2`."""
        return torch.as_tensor(self.conv(F.pad(x, (0, 1) * 3)))


class Upsample(nn.Module):
    """Double each axis.

    `trilinear` (the released CT autoencoder, as its reference network computes it) and `nearest` interpolate and then
    convolve; `transposed` (the released mask autoencoder) is one transposed convolution.
    """

    def __init__(self, channels: int, mode: Upsampling) -> None:
        super().__init__()
        self.mode = mode
        if mode == "transposed":
            self.conv: nn.Conv3d | nn.ConvTranspose3d = nn.ConvTranspose3d(
                channels, channels, 3, stride=2, padding=1, output_padding=1
            )
        else:
            self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`B C X Y Z` -> `B C 2X 2Y 2Z`."""
        if self.mode == "nearest" and (x.device.type != "cpu" or x[0, 0].numel() > FEW_VOXELS):
            kernel = doubling_kernel(self.conv.weight)
            return F.conv_transpose3d(x, kernel, self.conv.bias, stride=2, padding=1)
        if self.mode == "nearest":
            x = repeated(x)
        if self.mode == "trilinear":
            x = doubled(x)
        return torch.as_tensor(self.conv(x))


def repeated(x: Tensor) -> Tensor:
    """Double each axis by repeating every voxel, as nearest interpolation does; a channels-last map in one copy."""
    if not x.is_contiguous(memory_format=torch.channels_last_3d):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    batch, channels, *size = x.shape
    voxels = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None]
    double = [2 * n for n in size]
    twice = voxels.expand(batch, *(n for axis in size for n in (axis, 2)), channels)
    return twice.reshape(batch, *double, channels).permute(0, 4, 1, 2, 3)


def doubled(x: Tensor) -> Tensor:
    """Interpolate trilinearly to twice the size; where no gradient is wanted, by a kernel of our own if it fits."""
    if usable(x) and not (torch.is_grad_enabled() and x.requires_grad):
        from maisi.layers import kernels

        return kernels.doubled(x)
    if x.is_meta and not torch.is_grad_enabled():  # PyTorch takes 9 ms to find out the result's shape
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if last else torch.contiguous_format
        doubled_size = (*x.shape[:2], *(2 * n for n in x.shape[2:]))
        return torch.empty(doubled_size, dtype=x.dtype, device=x.device, memory_format=layout)
    return F.interpolate(x, scale_factor=2.0, mode="trilinear")


_FOLDED: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()


def doubling_kernel(weight: Tensor) -> Tensor:
    """`folded_kernel`, of frozen weights once: folding 512 x 512 channels takes as long as using them on 8^3 voxels."""
    if weight.requires_grad or weight.is_inference():
        return folded_kernel(weight)
    version, kernel = _FOLDED.get(weight, (-1, weight))
    if kernel.is_inference() and not torch.is_inference_mode_enabled():  # autograd could not keep it
        version = -1
    if version != weight._version or kernel.device != weight.device or kernel.dtype != weight.dtype:
        kernel = folded_kernel(weight.detach()).contiguous(memory_format=torch.channels_last_3d)
        _FOLDED[weight] = weight._version, kernel
    return kernel


def folded_kernel(weight: Tensor) -> Tensor:
    """Turn a 3 x 3 x 3 kernel after nearest doubling into the kernel of one transposed convolution without it.

    Neighbouring taps that fall on the same small voxel add up: `out in 3 3 3` -> `in out 4 4 4`, to be used with stride
    2 and padding 1. Eight products for each voxel instead of 27, the same values at the borders too, and no doubled
    map in memory.
    """
    for axis in (2, 3, 4):
        first, middle, last = weight.unbind(axis)
        weight = torch.stack([last, last + middle, middle + first, first], axis)
    return weight.transpose(0, 1)
