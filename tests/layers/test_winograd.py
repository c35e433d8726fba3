"""Convolution with fewer products: the values of the plain one, and only where it belongs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from maisi.layers import winograd
from maisi.layers.convolution import conv3


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(4, 11), st.integers(1, 9), st.integers(1, 9)),
    padding=st.tuples(*[st.integers(0, 1)] * 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    samples=st.integers(1, 2),
    columns=st.integers(1, 4),
    last=st.booleans(),
)
def test_values_are_those_of_the_plain_convolution(
    size: tuple[int, int, int],
    padding: tuple[int, int, int],
    channels: tuple[int, int],
    samples: int,
    columns: int,
    last: bool,
) -> None:
    if any(n + 2 * p < 3 for n, p in zip(size, padding, strict=True)):
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels[0], *size, generator=generator)
    weight, bias = torch.randn(*channels[::-1], 3, 3, 3, generator=generator), torch.randn(channels[1])
    true = F.conv3d(x.double(), weight.double(), bias.double(), padding=padding)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        wide = size[2] * channels[0] + (size[2] + 2 * padding[2] - 2) * channels[1]
        patch.setattr(winograd, "BLOCK_BYTES", columns * 6 * 4 * wide)  # blocks of so many columns
        made = winograd.convolved(x, weight, bias, padding)
        bare = winograd.convolved(x, weight, None, padding)
    assert made.shape == true.shape
    assert made.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(made.double(), true, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bare + bias.reshape(-1, 1, 1, 1), made, rtol=1e-5, atol=1e-4)


def large(gradient: bool = False, channels: int = 32, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a convolution of 8 x 64 x 64 voxels is computed so."""
    x, weight = torch.zeros(1, channels, 8, 64, 64, dtype=dtype), torch.zeros(channels, channels, 3, 3, 3, dtype=dtype)
    with torch.set_grad_enabled(gradient):
        return winograd.pays(x, weight, (1, 1, 1), (1, 1, 1))


def test_only_large_maps_in_float32_without_gradients() -> None:
    assert large()
    assert not large(gradient=True)
    assert not large(channels=8)
    assert not large(dtype=torch.bfloat16)
    x, weight = torch.zeros(1, 32, 8, 64, 64), torch.zeros(32, 32, 3, 3, 3)
    with torch.no_grad():
        assert not winograd.pays(x, weight, (2, 2, 2), (1, 1, 1))
        assert not winograd.pays(x[:, :, :3], weight, (1, 1, 1), (0, 1, 1))
        assert not winograd.pays(x.to("meta"), weight.to("meta"), (1, 1, 1), (1, 1, 1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not winograd.pays(x, weight, (1, 1, 1), (1, 1, 1))


def test_a_layer_takes_it_and_sees_when_its_weights_change() -> None:
    torch.manual_seed(0)
    conv, x = conv3(32, 32), torch.randn(1, 32, 8, 64, 64)
    with torch.no_grad():
        before = conv(x)
        true = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        torch.testing.assert_close(before.double(), true, rtol=1e-5, atol=1e-5)
        assert not torch.equal(before, F.conv3d(x, conv.weight, conv.bias, padding=1)), "not computed so"
        conv.weight.mul_(2)
        torch.testing.assert_close(
            conv(x) - conv.bias.reshape(-1, 1, 1, 1), 2 * (before - conv.bias.reshape(-1, 1, 1, 1))
        )
