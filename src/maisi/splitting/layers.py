"""The layers of the autoencoder on cut feature maps, exact: halos for convolutions, joint statistics for norms.

Each class here is a map that is computed from others when rows of it are asked for. Nothing is approximated: what a
convolution lacks at a part's edge it asks its neighbour for, and a group norm uses the mean and variance of the whole
map. Knows no file, no plan and no process.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from maisi.layers.blocks import doubled, doubling_kernel
from maisi.layers.convolution import convolved
from maisi.layers.norm import laid_out, usable
from maisi.splitting.maps import FeatureMap

_COPIES: MutableMapping[Tensor, dict[torch.device, Tensor]] = WeakTensorKeyDictionary()

LEAST_SUMMED, MOST_SUMMED, STRETCHES = 2**8, 2**13, 2**6
"""Voxels that float32 adds up, and stretches of them that float64 adds up: the error grows with the root of the
first and falls with the root of the second."""

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Devices that have no float64: Apple's GPUs."""

TENSOR_CORE_CHANNELS = 8
"""Channels of a result below which cuDNN has no quick convolution."""


def on(parameter: Tensor, device: torch.device) -> Tensor:
    """A parameter on a device, copied there once."""
    if parameter.device == device or parameter.requires_grad:
        return parameter.to(device)
    copies = _COPIES.setdefault(parameter, {})
    copy_there = copies.get(device)
    if copy_there is None or (copy_there.is_inference() and not torch.is_inference_mode_enabled()):
        copies[device] = copy_there = parameter.to(device)
    return copy_there


def doubles(x: Tensor) -> Tensor:
    """As float64: on the CPU where the device has none."""
    return (x.cpu() if x.device.type in WITHOUT_FLOAT64 else x).double()


@dataclass(frozen=True)
class Moments:
    """Statistics of the channels of some rows: values each channel has, mean and sum of squared deviations (B, C)."""

    count: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of all rows of a tensor, in float32 (float64 for float64), on its device or where that has float64."""
        if usable(x) and not torch.is_grad_enabled():
            from maisi.layers import kernels

            return cls(x[0, 0].numel(), *kernels.channel_moments(x))
        if x.is_meta and not torch.is_grad_enabled():  # a forecast; the pieces below take little, if none is kept
            unknown = torch.empty(x.shape[:2], dtype=torch.float64, device=x.device)
            return cls(x[0, 0].numel(), unknown, unknown)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        summed = min(max(x[0, 0].numel() // STRETCHES, LEAST_SUMMED), MOST_SUMMED)
        if x.dtype != wide:  # its own rounding is coarser
            summed = MOST_SUMMED
        rows, columns = (max(1, summed // place.numel()) for place in (x[0, 0, 0], x[0, 0, 0, 0]))
        counted = x[:, :, :rows, :columns] if x.is_meta else x  # in a forecast one piece stands for all
        pieces = [piece for stretch in torch.split(counted, rows, 2) for piece in torch.split(stretch, columns, 3)]
        found = [_statistics(piece.to(wide)) for piece in pieces]
        if x.is_meta:
            return cls(x[0, 0].numel(), *found[0])
        mean, variance = (doubles(torch.stack(each)) for each in zip(*found, strict=True))
        sizes = [float(piece[0, 0].numel()) for piece in pieces]
        count = torch.tensor(sizes, device=mean.device, dtype=torch.float64).reshape(-1, 1, 1)
        joint = (mean * count).sum(0) / count.sum()
        deviations = ((variance + (mean - joint).square()) * count).sum(0)
        return cls(x[0, 0].numel(), joint, deviations)

    def merged(self, other: Moments) -> Moments:
        """Of both together (Chan et al. 1979)."""
        count = self.count + other.count
        if self.mean.is_meta:
            return Moments(count, self.mean, self.deviations)
        mean, deviations = other.mean.to(self.mean.device), other.deviations.to(self.mean.device)
        difference = mean - self.mean
        return Moments(
            count,
            self.mean + difference * (other.count / count),
            self.deviations + deviations + difference.square() * (self.count * other.count / count),
        )


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel (B, C).

    On CPUs by the kernel of batch norm, the quickest that PyTorch has for channels-last maps; it has no gradient.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        # of differences from the first voxel: where the mean is far from zero, gradients would lose digits
        reference = x[:, :, :1, :1, :1].detach()
        variance, mean = torch.var_mean(x - reference, (2, 3, 4), correction=0)
        return doubles(mean) + doubles(reference.flatten(1)), variance
    if len(x) == 1:
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean[None], variance[None]
    each = [torch.batch_norm_update_stats(sample[None], None, None, 0.0) for sample in x]
    mean, variance = (torch.stack(values) for values in zip(*each, strict=True))
    return mean, variance


class Activation:
    """Group norm with the statistics of the whole map, then SiLU."""

    def __init__(self, norm: nn.GroupNorm, moments: Moments, silu: bool = True) -> None:
        batch, channels = moments.mean.shape
        mean = _grouped(moments.mean, norm.num_groups)
        spread = _grouped(moments.deviations, norm.num_groups) / moments.count
        joint = mean.mean(2, keepdim=True)
        variance = (spread + (mean - joint).square()).mean(2, keepdim=True)
        self.norm, self.silu = norm, silu
        self.mean = joint.expand_as(mean).reshape(batch, channels)
        self.variance = variance.expand_as(mean).reshape(batch, channels)

    def __call__(self, x: Tensor, wish: torch.dtype | None = None) -> Tensor:
        """`B C X Y Z` -> a new tensor in the same precision, or in the one wished for where that costs nothing."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, variance = self.mean.to(wide).to(x.device), self.variance.to(wide).to(x.device)
        weight, bias = on(self.norm.weight, x.device).to(wide), on(self.norm.bias, x.device).to(wide)
        dense = x if torch.is_grad_enabled() else laid_out(x)
        if usable(dense) and not torch.is_grad_enabled():
            from maisi.layers import kernels

            scale = weight * torch.rsqrt(variance + self.norm.eps)
            # a copy that was made to be dense takes the result
            out = None if dense is x or wish not in (None, x.dtype) else dense
            return kernels.scaled(dense, scale, bias - mean * scale, self.silu, wish, out)
        if not torch.is_grad_enabled() and len(x) == 1:
            # with fixed statistics a group norm is a batch norm, whose kernel rounds once and needs no scratch
            y = _normed(x, mean[0], variance[0], weight, bias, self.norm.eps)
        else:
            scale = weight * torch.rsqrt(variance + self.norm.eps)
            shift = bias - mean * scale
            shape = (*scale.shape, 1, 1, 1)
            y = torch.addcmul(shift.reshape(shape), x, scale.reshape(shape)).to(x.dtype)
        return F.silu(y, inplace=not torch.is_grad_enabled()) if self.silu else y


def _normed(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Batch norm with fixed statistics; of a map without data its place alone, which PyTorch takes a while to find."""
    return torch.empty_like(x) if x.is_meta else F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)


class Activated(FeatureMap):
    """A map after norm and SiLU."""

    def __init__(self, base: FeatureMap, activation: Activation) -> None:
        self.base, self.activation = base, activation
        self.axis, self.size = base.axis, base.size

    def rows(self, start: int, stop: int, device: torch.device, wish: torch.dtype | None = None) -> Tensor:
        """Those of the base, activated; for `wish` see `Activation`."""
        return self.activation(self.base.rows(start, stop, device), wish)

    def release(self, before: int) -> None:
        """Pass it on."""
        self.base.release(before)


class Convolved(FeatureMap):
    """A map after a convolution; `far_pad` zeros are added at the end of every axis first."""

    def __init__(self, base: FeatureMap, conv: nn.Conv3d, far_pad: int = 0, dtype: torch.dtype | None = None) -> None:
        self.base, self.conv, self.far_pad, self.dtype = base, conv, far_pad, dtype
        self.axis = base.axis
        self.kernel, self.stride = conv.kernel_size[self.axis], conv.stride[self.axis]
        self.padding = int(conv.padding[self.axis])
        self.size = (base.size + far_pad + 2 * self.padding - self.kernel) // self.stride + 1

    def _reach(self, start: int, stop: int) -> tuple[int, int]:
        """Rows of the base for those of the output; may lie outside it."""
        return start * self.stride - self.padding, (stop - 1) * self.stride - self.padding + self.kernel

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Halo rows come from the base; zeros stand for what lies outside it."""
        first, end = self._reach(start, stop)
        halved = device.type == "cuda" and self._may_be_halved()
        inside = max(first, 0), min(end, self.base.size)
        if halved and isinstance(self.base, Activated):
            x = self.base.rows(*inside, device, torch.float16)
        else:
            x = self.base.rows(*inside, device)
        before, after = max(0, -first), max(0, end - self.base.size)
        assert self.conv.bias is not None
        weight, bias = on(self.conv.weight, device), on(self.conv.bias, device)
        if halved:
            x, weight, bias = widened(x, weight, bias)
        elif self.dtype is not None:
            weight, bias = weight.to(self.dtype), bias.to(self.dtype)
        padding = [int(n) for n in self.conv.padding]
        padding[self.axis] = before if before == after else 0
        ends = [(0, self.far_pad)] * 3
        ends[self.axis] = (0, 0) if before == after else (before, after)
        if any(ends_of_axis != (0, 0) for ends_of_axis in ends):
            x = F.pad(x, [n for pair in reversed(ends) for n in pair])
        y = convolved(x, weight, bias, self.conv.stride, padding)
        return y[:, : self.conv.out_channels].to(self.dtype) if halved else y

    def _may_be_halved(self) -> bool:
        """Whether only the result is asked for in float32, of weights and maps that have 8 bits, and it is narrow."""
        coarse = self.dtype == torch.float32 and self.conv.weight.dtype == torch.bfloat16
        return coarse and self.conv.out_channels < TENSOR_CORE_CHANNELS

    def release(self, before: int) -> None:
        """Rows below the reach of `before` are done with."""
        self.base.release(self._reach(before, before + 1)[0])


class TransposedConvolved(FeatureMap):
    """A map after a transposed convolution that doubles its axes: with a kernel of 3, or a folded one of 4."""

    def __init__(self, base: FeatureMap, conv: nn.Conv3d | nn.ConvTranspose3d, folded: bool) -> None:
        self.base, self.conv, self.folded = base, conv, folded
        self.axis, self.size = base.axis, 2 * base.size
        self.kernel = 4 if folded else 3

    def _reach(self, start: int, stop: int) -> tuple[int, int]:
        """Output row o takes from base rows i with o = 2 i - 1 + k, 0 <= k < kernel."""
        return -((self.kernel - 2 - start) // 2), stop // 2 + 1

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Padded along the cut axis too, it gives rows 2 first and on; without, oneDNN takes three times as long."""
        first, end = self._reach(start, stop)
        first, end = max(first, 0), min(end, self.base.size)
        x = self.base.rows(first, end, device)
        assert self.conv.bias is not None
        weight, bias = on(self.conv.weight, device), on(self.conv.bias, device)
        weight = doubling_kernel(weight) if self.folded else weight
        y = F.conv_transpose3d(x, weight, bias, stride=2, padding=1, output_padding=0 if self.folded else 1)
        return y.narrow(self.dim, start - 2 * first, stop - start)

    def release(self, before: int) -> None:
        """Rows below the reach of `before` are done with."""
        self.base.release(self._reach(before, before + 1)[0])


def mixed(x: FeatureMap, conv: nn.Conv3d) -> FeatureMap:
    """A map after a 1 x 1 x 1 convolution; where a convolution makes the map, one in place of both.

    The map itself is not made then, and of the result's channels there are fewer. With gradients the two stay two.
    """
    if torch.is_grad_enabled() or not isinstance(x, Convolved | TransposedConvolved):
        return Convolved(x, conv)
    transposed = isinstance(x.conv, nn.ConvTranspose3d)
    assert x.conv.bias is not None
    assert conv.bias is not None
    values = (x.conv.weight, x.conv.bias, conv.weight.flatten(1), conv.bias)
    weight, bias, matrix, added = (doubles(value) for value in values)
    weight = torch.einsum("po,ioxyz->ipxyz" if transposed else "po,oixyz->pixyz", matrix, weight)
    both = copy(x.conv)
    both._parameters = {
        "weight": nn.Parameter(weight.to(conv.weight.dtype).to(conv.weight), requires_grad=False),
        "bias": nn.Parameter((matrix @ bias + added).to(conv.bias.dtype).to(conv.bias), requires_grad=False),
    }
    both.out_channels = conv.out_channels
    made = copy(x)
    made.conv = both
    return made


class Doubled(FeatureMap):
    """A map interpolated trilinearly to twice its size."""

    def __init__(self, base: FeatureMap) -> None:
        self.base = base
        self.axis, self.size = base.axis, 2 * base.size

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """One row more than needed on each side, whose own edges are then cut off."""
        first, end = max((start - 1) // 2, 0), min(stop // 2 + 1, self.base.size)
        x = doubled(laid_out(self.base.rows(first, end, device)))
        return x.narrow(self.dim, start - 2 * first, stop - start)

    def release(self, before: int) -> None:
        """Rows below the reach of `before` are done with."""
        self.base.release((before - 1) // 2)


class Sum(FeatureMap):
    """Two maps added; `shared`: both come from one map, of which the first needs the rows of the second and more."""

    def __init__(self, first: FeatureMap, second: FeatureMap, shared: bool) -> None:
        self.first, self.second, self.shared = first, second, shared
        self.axis, self.size = first.axis, first.size

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Both, added; the first is computed, so it may be written to."""
        x, y = self.first.rows(start, stop, device), self.second.rows(start, stop, device)
        return x + y if torch.is_grad_enabled() else x.add_(y)

    def release(self, before: int) -> None:
        """Pass it on."""
        self.first.release(before)
        if not self.shared:
            self.second.release(before)


def widened(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a convolution to few channels into one to eight in float16, of which the first are the result.

    CUDA's float32 convolution to one channel took more than a minute for 256^3 voxels. Float16 keeps 11 bits of the
    result, 0.0005 of a value; bfloat16 would keep 8. Forecasts count the float32 map, which takes more.
    """
    missing = TENSOR_CORE_CHANNELS - len(weight)
    layout = torch.channels_last_3d
    weight = F.pad(weight.half(), (0, 0) * 4 + (0, missing)).contiguous(memory_format=layout)
    return x.half(), weight, F.pad(bias.half(), (0, missing))


def _grouped(values: Tensor, groups: int) -> Tensor:
    """(B, C) -> (B, groups, C / groups)."""
    return values.reshape(len(values), groups, -1)
