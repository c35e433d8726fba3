"""Kernels for CUDA devices, in Triton: group norm with SiLU, trilinear doubling. Mathematics only.

Maps are `B C X Y Z`, dense in channels-last order, so memory is `B N C` with N = X * Y * Z and C fastest. All
statistics are float32. Maps may have more than 2**31 values: a program's place is counted in 64 bits, steps inside its
block in 32.

This module imports Triton when it is imported, which a machine may not have: import it inside functions, after
`maisi.layers.norm.usable` has said yes. It knows no module, no gradient and nothing of which maps fit it.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

# mypy sees Triton on some machines only, and its language has no types anywhere
# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,misc"

BLOCK = 4096
"""Values that a program has in its registers at a time."""

PROGRAMS = 1000
"""Programs that share a sum: enough to fill a large GPU, and few enough that adding up their results costs nothing."""

FINISHING = 1024
"""Values of partial sums that are added at a time."""

SUMMING_WARPS = 8
"""Of a program that sums: each value of its block has two sums in registers, and four warps have too few of them."""


@triton.jit(do_not_specialize=["N", "K", "length"])
def _moments(
    x: tl.tensor,
    partial: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    K: tl.tensor,
    length: tl.tensor,
    BN: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Sum and sum of squares of what a stretch of `length` voxels differs by from the map's first voxel: (B, K, 2, C).

    Differences, for where the mean is far from zero the squares themselves cancel.
    """
    k, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    there = c < C
    n = tl.arange(0, BN)
    reference = tl.load(x + b * N * C + c, mask=there, other=0).to(tl.float32)
    voxel = k * length
    at = x + (b * N + voxel) * C  # one place that moves and steps that stay: places of all values would take registers
    steps = n[:, None] * C + c[None, :]
    first = tl.zeros([BN, BC], tl.float32)
    second = tl.zeros([BN, BC], tl.float32)
    step = 0
    while step < length:  # `range` of a number given to a kernel is not for Triton's interpreter with newer NumPy
        inside = (voxel + step + n < N)[:, None] & there[None, :]
        value = tl.load(at + steps, mask=inside, other=0).to(tl.float32)
        difference = tl.where(inside, value - reference[None, :], 0.0)
        first += difference
        second += difference * difference
        at += BN * C
        step += BN
    into = partial + (b * K + k) * 2 * C + c
    tl.store(into, tl.sum(first, 0), mask=there)
    tl.store(into + C, tl.sum(second, 0), mask=there)


@triton.jit
def _total(
    partial: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    there: tl.tensor,
    K: tl.tensor,
    C: tl.tensor,
    BK: tl.constexpr,
    BC: tl.constexpr,
) -> tl.tensor:
    """Both sums of some channels, over all stretches."""
    k = tl.arange(0, BK)
    first = tl.zeros([BK, BC], tl.float32)
    second = tl.zeros([BK, BC], tl.float32)
    start = 0
    while start < K:
        inside = (start + k < K)[:, None] & there[None, :]
        at = partial + (b * K + start + k)[:, None] * (2 * C) + c[None, :]
        first += tl.load(at, mask=inside, other=0.0)
        second += tl.load(at + C, mask=inside, other=0.0)
        start += BK
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=["N", "K"])
def _finish(
    x: tl.tensor,
    partial: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    coefficients: tl.tensor,
    groups: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    C: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    BK: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """From `_moments` to each group's mean and 1 / deviation (B, 2, G) and each channel's scale and shift (B, 2, C)."""
    b, g, G = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i = tl.arange(0, BC)
    there, c = i < width, g * width + i
    first, second = _total(partial, b, c, there, K, C, BK, BC)
    count = tl.cast(N, tl.float32)
    reference = tl.load(x + b * N * C + c, mask=there, other=0).to(tl.float32)
    means = reference + first / count
    deviations = tl.maximum(second - first * (first / count), 0.0)
    mean = tl.sum(tl.where(there, means, 0.0), 0) / width
    between = tl.where(there, means - mean, 0.0)
    variance = (tl.sum(deviations, 0) / count + tl.sum(between * between, 0)) / width
    rstd = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(weight + c, mask=there, other=0).to(tl.float32) * rstd
    shift = tl.load(bias + c, mask=there, other=0).to(tl.float32) - mean * scale
    tl.store(groups + b * 2 * G + g, mean)
    tl.store(groups + b * 2 * G + G + g, rstd)
    tl.store(coefficients + b * 2 * C + c, scale, mask=there)
    tl.store(coefficients + b * 2 * C + C + c, shift, mask=there)


@triton.jit(do_not_specialize=["N"])
def _apply(
    x: tl.tensor,
    y: tl.tensor,
    coefficients: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    SILU: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Scale and shift each channel, then SiLU; `y` may be `x`."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    there = c < C
    scale = tl.load(coefficients + b * 2 * C + c, mask=there, other=0.0)
    shift = tl.load(coefficients + b * 2 * C + C + c, mask=there, other=0.0)
    n = tl.arange(0, BN)
    voxel = tl.program_id(0) * BN
    inside = (voxel + n < N)[:, None] & there[None, :]
    start = (b * N + voxel) * C
    steps = n[:, None] * C + c[None, :]
    value = tl.load(x + start + steps, mask=inside, other=0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(y + start + steps, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _before_silu(
    gradient: tl.tensor, value: tl.tensor, scale: tl.tensor, shift: tl.tensor, SILU: tl.constexpr
) -> tl.tensor:
    """Take the gradient of the output back through SiLU; float32."""
    if SILU:
        normed = value * scale + shift
        gate = tl.sigmoid(normed)
        gradient = gradient * gate * (1.0 + normed * (1.0 - gate))
    return gradient


@triton.jit(do_not_specialize=["N", "K", "length"])
def _gradient_sums(
    x: tl.tensor,
    gradient: tl.tensor,
    coefficients: tl.tensor,
    groups: tl.tensor,
    partial: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    K: tl.tensor,
    width: tl.tensor,
    length: tl.tensor,
    SILU: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Sum of the norm's output gradient, and of it times the normed input, of a stretch of voxels: (B, K, 2, C)."""
    k, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    there, G = c < C, C // width
    scale = tl.load(coefficients + b * 2 * C + c, mask=there, other=0.0)[None, :]
    shift = tl.load(coefficients + b * 2 * C + C + c, mask=there, other=0.0)[None, :]
    mean = tl.load(groups + b * 2 * G + c // width, mask=there, other=0.0)[None, :]
    rstd = tl.load(groups + b * 2 * G + G + c // width, mask=there, other=0.0)
    n = tl.arange(0, BN)
    voxel = k * length
    start = (b * N + voxel) * C
    steps = n[:, None] * C + c[None, :]
    from_x, from_gradient = x + start, gradient + start
    first = tl.zeros([BN, BC], tl.float32)
    second = tl.zeros([BN, BC], tl.float32)
    step = 0
    while step < length:
        inside = (voxel + step + n < N)[:, None] & there[None, :]
        value = tl.load(from_x + steps, mask=inside, other=0).to(tl.float32)
        outer = tl.load(from_gradient + steps, mask=inside, other=0).to(tl.float32)  # zero outside, so all of it is
        inner = _before_silu(outer, value, scale, shift, SILU)
        first += inner
        second += inner * (value - mean)
        from_x += BN * C
        from_gradient += BN * C
        step += BN
    into = partial + (b * K + k) * 2 * C + c
    tl.store(into, tl.sum(first, 0), mask=there)
    tl.store(into + C, tl.sum(second, 0) * rstd, mask=there)


@triton.jit(do_not_specialize=["N", "K"])
def _finish_gradient(
    partial: tl.tensor,
    weight: tl.tensor,
    groups: tl.tensor,
    slopes: tl.tensor,
    terms: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    C: tl.tensor,
    width: tl.tensor,
    BK: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """From `_gradient_sums` to gradients of bias and weight of each sample (B, 2, C), and (B, 2, G) for the input.

    With those, k0 and k1, the gradient of the input is `scale * gradient + (x - mean) * k1 + k0`.
    """
    b, g, G = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i = tl.arange(0, BC)
    there, c = i < width, g * width + i
    first, second = _total(partial, b, c, there, K, C, BK, BC)
    tl.store(slopes + b * 2 * C + c, first, mask=there)
    tl.store(slopes + b * 2 * C + C + c, second, mask=there)
    factor = tl.load(weight + c, mask=there, other=0).to(tl.float32)
    rstd = tl.load(groups + b * 2 * G + G + g)
    count = tl.cast(N, tl.float32) * width
    tl.store(terms + b * 2 * G + g, -rstd * tl.sum(factor * first, 0) / count)
    tl.store(terms + b * 2 * G + G + g, -rstd * rstd * tl.sum(factor * second, 0) / count)


@triton.jit(do_not_specialize=["N"])
def _input_gradient(
    x: tl.tensor,
    gradient: tl.tensor,
    y: tl.tensor,
    coefficients: tl.tensor,
    groups: tl.tensor,
    terms: tl.tensor,
    N: tl.tensor,
    C: tl.tensor,
    width: tl.tensor,
    SILU: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """See `_finish_gradient`."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    there, G = c < C, C // width
    group = b * 2 * G + c // width
    scale = tl.load(coefficients + b * 2 * C + c, mask=there, other=0.0)[None, :]
    shift = tl.load(coefficients + b * 2 * C + C + c, mask=there, other=0.0)[None, :]
    mean = tl.load(groups + group, mask=there, other=0.0)[None, :]
    k0 = tl.load(terms + group, mask=there, other=0.0)[None, :]
    k1 = tl.load(terms + group + G, mask=there, other=0.0)[None, :]
    n = tl.arange(0, BN)
    voxel = tl.program_id(0) * BN
    inside = (voxel + n < N)[:, None] & there[None, :]
    start = (b * N + voxel) * C
    steps = n[:, None] * C + c[None, :]
    value = tl.load(x + start + steps, mask=inside, other=0).to(tl.float32)
    outer = tl.load(gradient + start + steps, mask=inside, other=0).to(tl.float32)
    inner = _before_silu(outer, value, scale, shift, SILU)
    made = scale * inner + (value - mean) * k1 + k0
    tl.store(y + start + steps, made.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["X", "Y", "Z"])
def _double(
    x: tl.tensor,
    y: tl.tensor,
    X: tl.tensor,
    Y: tl.tensor,
    Z: tl.tensor,
    C: tl.tensor,
    BN: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """A stretch along Z of the doubled map: 3/4 of the voxel it lies in and 1/4 of the nearest other, on each axis."""
    line = tl.program_id(0)  # of the result, all lines of all samples
    to_y, rest = line % (2 * Y), line // (2 * Y)
    to_x, b = rest % (2 * X), rest // (2 * X)
    to_z = tl.program_id(1) * BN + tl.arange(0, BN)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    inside = (to_z < 2 * Z)[:, None] & (c < C)[None, :]
    near_x, near_y, near_z = to_x // 2, to_y // 2, to_z // 2
    far_x = tl.minimum(tl.maximum(near_x + to_x % 2 * 2 - 1, 0), X - 1)
    far_y = tl.minimum(tl.maximum(near_y + to_y % 2 * 2 - 1, 0), Y - 1)
    far_z = tl.minimum(tl.maximum(near_z + to_z % 2 * 2 - 1, 0), Z - 1)
    near = near_z[:, None] * C + c[None, :]
    far = far_z[:, None] * C + c[None, :]
    value = 0.5625 * _between(x + ((b * X + near_x) * Y + near_y).to(tl.int64) * Z * C, near, far, inside)
    value += 0.1875 * _between(x + ((b * X + near_x) * Y + far_y).to(tl.int64) * Z * C, near, far, inside)
    value += 0.1875 * _between(x + ((b * X + far_x) * Y + near_y).to(tl.int64) * Z * C, near, far, inside)
    value += 0.0625 * _between(x + ((b * X + far_x) * Y + far_y).to(tl.int64) * Z * C, near, far, inside)
    into = y + line.to(tl.int64) * 2 * Z * C + to_z[:, None] * C + c[None, :]
    tl.store(into, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _between(line: tl.tensor, near: tl.tensor, far: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """3/4 of one voxel and 1/4 of another of a line."""
    one = tl.load(line + near, mask=inside, other=0).to(tl.float32)
    other = tl.load(line + far, mask=inside, other=0).to(tl.float32)
    return 0.75 * one + 0.25 * other


@lru_cache(maxsize=4096)
def _tile(channels: int) -> tuple[int, int, int]:
    """Voxels and channels of a program's block, and how many blocks cover all channels."""
    divisor = channels & -channels
    # whole blocks where they are wide enough to be read well; else some of a block's lanes have no channel
    block = min(divisor if divisor >= 32 else triton.next_power_of_2(channels), 128)
    return BLOCK // block, block, -(-channels // block)


@lru_cache(maxsize=4096)
def _stretches(batch: int, voxels: int, channels: int) -> tuple[int, int]:
    """How many stretches the voxels of a sample are cut into for summing, and how long they are."""
    step, _, blocks = _tile(channels)
    count = max(1, min(-(-voxels // step), PROGRAMS // (batch * blocks)))
    length = -(-voxels // (count * step)) * step
    return -(-voxels // length), length


@lru_cache(maxsize=4096)
def _group_tile(width: int) -> tuple[int, int]:
    """Stretches and channels that are added up at a time, for groups of `width` channels."""
    block = triton.next_power_of_2(width)
    return max(1, FINISHING // block), block


def _at(x: Tensor) -> AbstractContextManager[Any]:
    """Triton starts a kernel on the current device, whatever its tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _voxels(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last_3d)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _summed(x: Tensor) -> Tensor:
    batch, channels = x.shape[:2]
    voxels = _voxels(x)
    count, length = _stretches(batch, voxels, channels)
    step, block, blocks = _tile(channels)
    partial = _floats(x, batch, count, 2, channels)
    _moments[(count, batch, blocks)](
        *(x, partial, voxels, channels, count, length, step, block), num_warps=SUMMING_WARPS
    )
    return partial


def statistics(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What a group norm does to a map: scale and shift of each channel (B, 2, C), mean and 1 / deviation (B, 2, G)."""
    batch, channels = x.shape[:2]
    width = channels // groups
    with _at(x):
        partial = _summed(x)
        coefficients, found = _floats(x, batch, 2, channels), _floats(x, batch, 2, groups)
        _finish[(batch, groups)](
            *(x, partial, weight, bias, coefficients, found),
            *(_voxels(x), partial.shape[1], channels, width, eps, *_group_tile(width)),
        )
    return coefficients, found


def applied(
    x: Tensor, coefficients: Tensor, silu: bool, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Scale and shift (B, 2, C float32) the channels of a map, then SiLU; to `out`, or anew in `dtype` or its own."""
    batch, channels = x.shape[:2]
    voxels = _voxels(x)
    step, block, blocks = _tile(channels)
    y = _like(x, dtype) if out is None else out
    with _at(x):
        _apply[(-(-voxels // step), batch, blocks)](x, y, coefficients, voxels, channels, silu, step, block)
    return y


def gradients(
    x: Tensor, gradient: Tensor, weight: Tensor, coefficients: Tensor, groups: Tensor, silu: bool, wants_input: bool
) -> tuple[Tensor | None, Tensor]:
    """Backward pass of norm and SiLU.

    Args:
        gradient: of the output, in the layout of `x`.
        coefficients: of `statistics`, as are `groups`.

    Returns:
        The gradient of the input, if it is wanted; those of bias and weight (2, C) float32.
    """
    batch, channels = x.shape[:2]
    voxels, width = _voxels(x), channels // groups.shape[2]
    count, length = _stretches(batch, voxels, channels)
    step, block, blocks = _tile(channels)
    partial, slopes = _floats(x, batch, count, 2, channels), _floats(x, batch, 2, channels)
    terms = _floats(x, batch, 2, groups.shape[2])
    inner: Tensor | None = None
    with _at(x):
        _gradient_sums[(count, batch, blocks)](
            *(x, gradient, coefficients, groups, partial, voxels, channels, count, width, length, silu, step, block),
            num_warps=SUMMING_WARPS,
        )
        _finish_gradient[(batch, groups.shape[2])](
            *(partial, weight, groups, slopes, terms, voxels, count, channels, width, *_group_tile(width))
        )
        if wants_input:
            inner = _like(x)
            _input_gradient[(-(-voxels // step), batch, blocks)](
                *(x, gradient, inner, coefficients, groups, terms, voxels, channels, width, silu, step, block)
            )
    return inner, slopes[0] if batch == 1 else slopes.sum(0)


def doubled(x: Tensor) -> Tensor:
    """Double each axis, as `F.interpolate(x, scale_factor=2.0, mode="trilinear")` does; without gradient."""
    batch, channels, *size = x.shape
    y = torch.empty(
        (batch, channels, *(2 * n for n in size)),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last_3d,
    )
    step, block, blocks = _tile(channels)
    step = min(step, triton.next_power_of_2(2 * size[2]))
    with _at(x):
        grid = (batch * 4 * size[0] * size[1], -(-2 * size[2] // step), blocks)
        _double[grid](x, y, *size, channels, step, block)
    return y


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel, (B, C) float64."""
    with _at(x):
        first, second = _summed(x).double().sum(1).unbind(1)
    part = first / _voxels(x)
    return x[:, :, 0, 0, 0].double() + part, (second - first * part).clamp_(min=0.0)


def scaled(
    x: Tensor, scale: Tensor, shift: Tensor, silu: bool, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """`x * scale + shift` for (B, C) scales and shifts, then SiLU; see `applied`."""
    return applied(x, torch.stack([scale.float(), shift.float()], 1), silu, dtype, out)
