from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from maisi.layers import winograd
from maisi.layers.blocks import Conv3d, conv3

SIZES = st.tuples(*[st.integers(3, 13)] * 3)


def case(size: tuple[int, int, int], channels: int, out: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, *size, generator=g)
    return x, torch.randn(out, channels, 3, 3, 3, generator=g) / (27 * channels) ** 0.5, torch.randn(out, generator=g)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def rounding(x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, ...]) -> float:
    """What the sums may be off by: some units of the last place of the products that went into them."""
    return 16 * 2.0**-24 * float(F.conv3d(x.abs().double(), weight.abs().double(), padding=padding).max())


@settings(max_examples=40, deadline=None)
@given(
    SIZES, st.integers(1, 5), st.integers(1, 4), st.tuples(*[st.integers(0, 1)] * 3), st.booleans(), st.integers(0, 99)
)
def test_it_is_the_convolution_by_its_definition(size, channels, out, padding, last, seed) -> None:
    x, weight, bias = case(size, channels, out, seed)
    x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
    exact = F.conv3d(x.double(), weight.double(), padding=padding)
    found = winograd.convolved(x, weight, None, padding)
    assert found.shape == exact.shape
    assert float((found - exact).abs().max()) < rounding(x, weight, padding)
    torch.testing.assert_close(winograd.convolved(x, weight, bias, padding), found + bias[:, None, None, None])


@pytest.mark.parametrize("share", [1, 1 << 14, 1 << 17])
def test_the_block_does_not_matter(share, monkeypatch) -> None:
    x, weight, bias = case((9, 14, 11), 3, 5)
    whole = winograd.convolved(x, weight, bias, (1, 1, 1))
    monkeypatch.setattr(winograd, "_share_bytes", lambda weight: share)
    assert (
        torch.equal(winograd.convolved(x, weight, bias, (1, 1, 1)), whole)
        or off(winograd.convolved(x, weight, bias, (1, 1, 1)), whole) < 1e-6
    )


def test_inputs_are_left_alone() -> None:
    x, weight, bias = case((8, 8, 8), 2, 2)
    before = x.clone()
    winograd.convolved(x, weight, bias, (1, 1, 1))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("size", "channels", "dtype", "stride", "wanted"),
    [
        ((16, 16, 16), 128, torch.float32, 1, True),
        ((15, 17, 16), 128, torch.float32, 1, True),
        ((16, 16, 16), 64, torch.float32, 1, False),
        ((16, 16, 16), 128, torch.bfloat16, 1, False),
        ((16, 16, 16), 128, torch.float32, 2, False),
        ((12, 12, 12), 128, torch.float32, 1, False),
        ((1, 64, 64), 128, torch.float32, 1, False),
    ],
)
def test_where_it_is_used(size, channels, dtype, stride, wanted) -> None:
    x = torch.empty(1, channels, *size, dtype=dtype, device="meta")
    weight = torch.empty(128, channels, 3, 3, 3, dtype=dtype, device="meta")
    assert winograd.suits(x, weight, (stride,) * 3, (1, 1, 1)) is wanted


def test_layers_go_this_way_in_inference_alone(monkeypatch) -> None:
    asked = []
    real = winograd.convolved
    monkeypatch.setattr(winograd, "convolved", lambda *a: asked.append(1) or real(*a))
    layer = conv3(128, 128)
    assert isinstance(layer, Conv3d)
    x = torch.randn(1, 128, 16, 16, 16)
    trained = layer(x)
    assert not asked
    with torch.inference_mode():
        assert off(layer(x), trained) < 3e-6
    assert asked
    trained.sum().backward()
    assert layer.weight.grad is not None
