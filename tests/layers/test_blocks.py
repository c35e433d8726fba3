"""Doubling a map's size: what is repeated, and kernels that do it at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from maisi.layers.blocks import Upsample, doubling_kernel, folded_kernel, repeated


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_repeated_voxels_are_nearest_interpolation(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 1, 5).contiguous(memory_format=layout)
    made = repeated(x)
    assert torch.equal(made, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert made.is_contiguous(memory_format=layout)


def test_a_kernel_is_folded_once_and_anew_when_its_weights_change() -> None:
    up = Upsample(8, "nearest").requires_grad_(False)
    weight = up.conv.weight
    assert isinstance(weight, torch.Tensor)
    first = doubling_kernel(weight)
    assert doubling_kernel(weight) is first
    assert torch.equal(first, folded_kernel(weight))
    weight.mul_(2)
    assert torch.equal(doubling_kernel(weight), folded_kernel(weight))
    up.requires_grad_(True)
    x = torch.randn(1, 8, 3, 3, 3)
    up(x).sum().backward()
    assert weight.grad is not None, "weights in training are folded where the gradient sees it"
