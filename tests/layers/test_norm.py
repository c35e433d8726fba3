"""Our group norm is PyTorch's, and so are the kernels behind it, values and gradients.

The kernels' tests want a CUDA device (`-m gpu`). Where Triton is installed they also run on any CPU, in Triton's
interpreter, which is chosen before Triton is imported: in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.layers import norm
from maisi.layers.blocks import ResidualBlock, Upsample
from maisi.layers.norm import GroupNorm, laid_out, usable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LAST = torch.channels_last_3d

GROUPS = {8: 2, 24: 4, 64: 8, 192: 8}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}

on_a_gpu_only = pytest.mark.skipif(INTERPRETED, reason="wants the device itself, not Triton's interpreter")


def dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=LAST)


@pytest.fixture
def kernels_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(norm, "usable", dense)


def given(channels: int, batch: int, dtype: torch.dtype, size: tuple[int, int, int] = (7, 5, 9)) -> Tensor:
    """Far from zero, so that sums of squares would cancel."""
    torch.manual_seed(0)
    return (torch.randn(batch, channels, *size) * 2 + 30).to(DEVICE, dtype).contiguous(memory_format=LAST)


def shaken(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(DEVICE)


def error(made: Tensor, true: Tensor) -> float:
    return float((made.double() - true.double()).abs().max() / true.double().abs().max())


def gradients(run: Callable[..., Tensor], outer: Tensor, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves)
    made = run(*leaves)
    return [made.detach(), *torch.autograd.grad(made, leaves, outer.to(made.dtype))]


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels_fit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "batch"), [(8, 1), (8, 3), (24, 3), (64, 1), (192, 1)])
def test_kernels_give_values_and_gradients(channels: int, batch: int, silu: bool, dtype: torch.dtype) -> None:
    groups = GROUPS[channels]
    x, block = given(channels, batch, dtype), shaken(GroupNorm(groups, channels, 1e-6))
    outer = torch.randn(x.shape, device=DEVICE).to(dtype)  # not channels last: that is made up for

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = norm._Normed.apply(x, weight, bias, groups, 1e-6, silu)
        assert dense(y)
        assert y.dtype == dtype
        return y

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.group_norm(x, groups, weight, bias, 1e-6)
        return F.silu(y) if silu else y

    leaves = (x, block.weight, block.bias)
    true = gradients(theirs, outer.double(), *(leaf.double() for leaf in leaves))
    for made, expected in zip(gradients(ours, outer, *leaves), true, strict=True):
        # what the mean takes away from inputs around 30 is rounded at 30
        assert error(made, expected) < (10 if dtype == torch.float32 else 1) * TOLERANCE[dtype]
    with torch.inference_mode():
        assert error(block.activated(x) if silu else block(x), true[0]) < 10 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels_fit")
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 2, 3), (70, 3, 5)])
def test_any_size_and_weights_of_the_same_precision(size: tuple[int, int, int]) -> None:
    x, block = given(24, 2, torch.bfloat16, size), shaken(GroupNorm(4, 24, 1e-6)).bfloat16()
    x = (x - 30).contiguous(memory_format=LAST)
    y = block.activated(x)
    y.sum().backward()
    assert block.weight.grad.dtype == block.bias.grad.dtype == torch.bfloat16
    expected = F.silu(F.group_norm(x.double(), 4, block.weight.double(), block.bias.double(), 1e-6))
    assert error(y.detach(), expected.detach()) < 0.01


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels_fit")
def test_input_that_wants_no_gradient_gets_none() -> None:
    x, block = given(8, 1, torch.float32), shaken(GroupNorm(2, 8))
    block(x).square().sum().backward()
    twin = nn.GroupNorm(2, 8).to(DEVICE)
    twin.load_state_dict(block.state_dict())
    twin(x.contiguous()).square().sum().backward()  # channels last, PyTorch 2.13 crashes here on CPUs
    assert error(block.weight.grad, twin.weight.grad) < 1e-4
    assert x.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 4, 5), (1, 1, 1), (1, 2, 40)])
@pytest.mark.parametrize(("channels", "batch"), [(8, 3), (24, 1), (192, 1)])
def test_kernel_doubles(channels: int, batch: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    from maisi.layers import kernels

    x = given(channels, batch, dtype, size)
    made = kernels.doubled(x)
    assert dense(made)
    assert made.dtype == dtype
    assert error(made, F.interpolate(x.double(), scale_factor=2.0, mode="trilinear")) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "batch"), [(8, 3), (24, 1), (192, 1)])
def test_kernel_measures_and_scales_channels(channels: int, batch: int, dtype: torch.dtype) -> None:
    from maisi.layers import kernels

    x = given(channels, batch, dtype)
    mean, deviations = kernels.channel_moments(x)
    variance, true = torch.var_mean(x.double(), dim=(2, 3, 4), correction=0)
    assert mean.dtype == deviations.dtype == torch.float64
    assert error(mean, true) < 1e-6
    assert error(deviations, variance * x[0, 0].numel()) < 1e-5
    scale, shift = torch.randn(2, batch, channels, device=DEVICE, dtype=torch.float64)
    expected = x.double() * scale[..., None, None, None] + shift[..., None, None, None]
    made = kernels.scaled(x, scale, shift, True, torch.float32)
    assert made.dtype == torch.float32
    assert error(made, F.silu(expected)) < 1e-5
    assert error(kernels.scaled(x, scale, shift, False, out=x), expected) < TOLERANCE[dtype]
    assert error(x, expected) < TOLERANCE[dtype], "the result was to go there"


@on_a_gpu_only
@pytest.mark.gpu
def test_on_a_gpu_the_kernels_are_taken_and_keep_the_precision() -> None:
    x, block = given(64, 1, torch.bfloat16), shaken(GroupNorm(8, 64))
    assert usable(x)
    assert not usable(x.contiguous())
    assert not usable(x.double())
    cut = x.narrow(4, 1, 3)
    assert not usable(cut)
    assert usable(laid_out(cut))
    with torch.autocast("cuda", torch.bfloat16):
        assert block(x).dtype == block.activated(x).dtype == torch.bfloat16
        assert nn.GroupNorm(8, 64).cuda()(x).dtype == torch.float32, "PyTorch no longer widens: no need to say so"


@on_a_gpu_only
@pytest.mark.gpu
def test_maps_of_more_than_two_to_the_31_values() -> None:
    from maisi.layers import kernels

    x = torch.zeros(1, 8, 1025, 512, 512, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=LAST)
    x[:, :, -1] = torch.arange(8, device="cuda", dtype=torch.bfloat16)[None, :, None, None]
    ones = torch.ones(1, 8, device="cuda")
    made = kernels.scaled(x, ones, ones, False, out=x)
    assert torch.equal(made[0, :, -1, -1, -1], torch.arange(1, 9, device="cuda", dtype=torch.bfloat16))
    mean, _ = kernels.channel_moments(x)
    torch.testing.assert_close(mean[0], 1 + torch.arange(8, device="cuda").double() / 1025, rtol=1e-5, atol=0)
    last = kernels.doubled(x[:, :, :, :128, :128].contiguous(memory_format=LAST))[0, :, -1, -1, -1]
    assert torch.equal(last, torch.arange(1, 9, device="cuda", dtype=torch.bfloat16))


@on_a_gpu_only
@pytest.mark.gpu
def test_blocks_on_a_gpu_are_those_on_a_cpu() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(ResidualBlock(16, 32, 8, 1e-6), Upsample(32, "trilinear"))
    x = torch.randn(2, 16, 6, 5, 7)
    with torch.inference_mode():
        expected = block(x)
        moved = block.to("cuda", memory_format=LAST)
        made = moved(x.cuda().contiguous(memory_format=LAST))
    assert error(made.cpu(), expected) < 2e-3, "convolutions may use TF32"


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed, nor its interpreter")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_kernels_it_is_pytorchs(layout: torch.memory_format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = GroupNorm(4, 8, 1e-6).to(dtype), nn.GroupNorm(4, 8, 1e-6).to(dtype)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 3, 4, 5, dtype=dtype).contiguous(memory_format=layout)
    assert not usable(x)
    assert laid_out(x) is x
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.activated(x), F.silu(theirs(x)))


def test_parameters_have_the_names_of_pytorchs() -> None:
    ours, theirs = GroupNorm(4, 8), nn.GroupNorm(4, 8)
    assert isinstance(ours, nn.GroupNorm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    bare = GroupNorm(4, 8, affine=False)
    x = torch.randn(1, 8, 2, 2, 2)
    assert torch.equal(bare(x), nn.GroupNorm(4, 8, affine=False)(x))


def test_without_cuda_triton_is_not_imported() -> None:
    code = (
        "import sys, torch; from maisi.layers.blocks import ResidualBlock; "
        "x = torch.randn(1, 8, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d).requires_grad_(); "
        "before = 'triton' in sys.modules; ResidualBlock(8, 8, 4, 1e-6)(x).sum().backward(); "
        "sys.exit('maisi.layers.kernels' in sys.modules or ('triton' in sys.modules) != before)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
