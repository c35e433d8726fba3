"""Convolutions by another kernel than PyTorch's choice: the same values, and only where that kernel belongs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maisi.layers.convolution import conv1, conv3, convolved


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0)])
@pytest.mark.parametrize("size", [(4, 5, 6), (30, 40, 5)])
def test_values_are_those_of_pytorch(
    layout: torch.memory_format, stride: int, padding: int, size: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    conv = conv3(24, 8, stride, padding).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(1, 24, *size).contiguous(memory_format=layout)
    true = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), stride, padding)
    with torch.inference_mode():
        made = conv(x)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), true, rtol=1e-5, atol=1e-5)


def kernels(conv: nn.Module, x: torch.Tensor) -> set[str]:
    with torch.profiler.profile() as seen:
        conv(x)
    return {event.key for event in seen.key_averages()}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_a_small_map_is_not_left_to_the_slow_kernel() -> None:
    conv, x = conv3(16, 16), torch.randn(1, 16, 6, 6, 6)
    with torch.inference_mode():
        ours, theirs = kernels(conv, x), kernels(nn.Conv3d(16, 16, 3, padding=1), x)
    assert "aten::slow_conv3d_forward" not in ours
    assert "aten::slow_conv3d_forward" in theirs, "PyTorch no longer does this: `convolved` can go"


def test_training_autocast_and_forecasts_are_left_alone() -> None:
    conv = conv3(4, 4)
    x = torch.randn(1, 4, 3, 3, 3)
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    weight = torch.empty(4, 4, 3, 3, 3, device="meta")
    assert convolved(x.to("meta"), weight, None, (1, 1, 1), (1, 1, 1)).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_convolution_of_single_voxels_is_a_product(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv, twin = conv1(12, 20).to(dtype), nn.Conv3d(12, 20, 1).to(dtype)
    twin.load_state_dict(conv.state_dict())
    x = torch.randn(2, 12, 5, 6, 7).to(dtype).contiguous(memory_format=layout).requires_grad_()
    y = x.detach().clone().requires_grad_()
    made, true = conv(x), twin(y)
    torch.testing.assert_close(made, true, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert made.is_contiguous(memory_format=layout)
    made.float().square().sum().backward()
    true.float().square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(conv.weight.grad, twin.weight.grad, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("padding", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_one_channel(dtype: torch.dtype, padding: tuple[int, int, int], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 7, 4).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(1, 6, 3, 3, 3), torch.randn(1)
    true = F.conv3d(x.double(), weight.double(), bias.double(), padding=padding)
    with torch.inference_mode():
        made = convolved(x, weight, bias, (1, 1, 1), padding)
        shape = convolved(x.to("meta"), weight.to("meta"), None, (1, 1, 1), padding).shape
    assert made.dtype == torch.float32
    assert shape == made.shape
    torch.testing.assert_close(made.double(), true, rtol=1e-5, atol=1e-5)
