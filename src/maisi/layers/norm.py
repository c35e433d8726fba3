"""Group norm, and SiLU after it, by kernels of our own where they are quicker. Mathematics only.

On CUDA PyTorch's group norm takes a channels-last map through several passes and another layout: with SiLU it took
eight times as long as the convolution after it. The kernels (`maisi.layers.kernels`) read the map twice and write it
once.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Of the maps that the kernels take; they compute in float32."""


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with its parameters and names, which can do the SiLU after it.

    By the kernels a map keeps its precision, under autocast too, where PyTorch's norm turns it to float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`B C X Y Z` -> the same, normed."""
        return self._by_kernels(x, silu=False) if self.affine and usable(x) else super().forward(x)

    def activated(self, x: Tensor) -> Tensor:
        """`B C X Y Z` -> the same, normed, then SiLU."""
        if self.affine and usable(x):
            return self._by_kernels(x, silu=True)
        return F.silu(self(x), inplace=not torch.is_grad_enabled())

    def _by_kernels(self, x: Tensor, silu: bool) -> Tensor:
        made = _Normed.apply(x, self.weight, self.bias, self.num_groups, self.eps, silu)  # type: ignore[no-untyped-call]
        return cast(Tensor, made)


class _Normed(torch.autograd.Function):
    """Norm and SiLU by the kernels; the backward pass keeps the input alone and computes the rest anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        from maisi.layers import kernels

        coefficients, found = kernels.statistics(x, groups, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, coefficients, found)
        ctx.silu = silu
        return kernels.applied(x, coefficients, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from maisi.layers import kernels

        x, weight, bias, coefficients, found = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        inner, slopes = kernels.gradients(
            x, gradient, weight, coefficients, found, ctx.silu, wants_input=ctx.needs_input_grad[0]
        )
        return inner, slopes[1].to(weight.dtype), slopes[0].to(bias.dtype), None, None, None


def usable(x: Tensor) -> bool:
    """Whether the kernels take a map: on CUDA, in a precision they know, dense in channels-last order; with Triton."""
    return (
        x.device.type == "cuda"
        and x.dtype in DTYPES
        and x.dim() == 5
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and _work_on(x.device)
    )


def laid_out(x: Tensor) -> Tensor:
    """Make a part that was cut from a channels-last map on CUDA dense, as the kernels want it; others stay as they are.

    A new tensor is not counted in any forecast: write the result to it where it is as large.
    """
    cut = x.device.type == "cuda" and x.dim() == 5 and x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last_3d) if cut else x


@cache
def _work_on(device: torch.device) -> bool:
    """Whether Triton is there and can make a kernel: it needs a C compiler, and a GPU that is not too old."""
    try:
        from maisi.layers import kernels
    except ImportError:
        return False
    try:
        kernels.channel_moments(torch.zeros(1, 8, 1, 1, 1, device=device))
    except Exception as error:
        warnings.warn(f"Triton makes no kernels here, so group norms are slow: {error}", stacklevel=2)
        return False
    return True
