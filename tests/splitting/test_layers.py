"""Layers of cut maps on CUDA: other kernels than on a CPU, the same values. What is split is in `test_execution`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from maisi.layers.blocks import Upsample, Upsampling
from maisi.layers.convolution import conv1, conv3
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting import autoencoder as split
from maisi.splitting.execution import Execution, upsampled
from maisi.splitting.layers import Convolved, Moments, TransposedConvolved, doubles, mixed, widened
from maisi.splitting.maps import Whole


def test_frozen_kernels_kept_in_inference_mode_serve_gradients_too() -> None:
    layer = Upsample(8, "nearest").requires_grad_(False)
    x = torch.randn(1, 8, 6, 6, 6)
    with torch.inference_mode():
        before = layer(x)
    x.requires_grad_(True)
    after = layer(x)
    after.sum().backward()
    torch.testing.assert_close(after.detach(), before.clone())
    assert x.grad is not None


def test_a_device_without_float64_leaves_that_to_the_cpu() -> None:
    class There:
        """A tensor of a device that nobody has here."""

        device = SimpleNamespace(type="mps")

        def cpu(self) -> torch.Tensor:
            return torch.ones(2)

    assert doubles(There()).dtype == torch.float64  # type: ignore[arg-type]
    assert doubles(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64


CPU = torch.device("cpu")


def test_a_narrow_convolution_in_float16_keeps_eleven_bits() -> None:
    torch.manual_seed(0)
    conv, x = conv3(16, 1).bfloat16(), torch.randn(1, 16, 5, 6, 7).bfloat16()
    true = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    half, weight, bias = widened(x, conv.weight.detach(), conv.bias.detach())
    assert half.dtype == weight.dtype == bias.dtype == torch.float16
    made = F.conv3d(half.float(), weight.float(), bias.float(), padding=1)
    assert made.shape == (1, 8, 5, 6, 7)
    assert float(made[:, 1:].abs().max()) == 0
    torch.testing.assert_close(made[:, :1].half().double(), true, rtol=0.001, atol=0.0005)


@pytest.mark.parametrize(
    ("weights", "result", "channels", "halved"),
    [
        (torch.bfloat16, torch.float32, 1, True),
        (torch.float32, torch.float32, 1, False),
        (torch.bfloat16, None, 1, False),
        (torch.bfloat16, torch.float32, 8, False),
    ],
)
def test_only_narrow_results_of_coarse_weights_are_halved(
    weights: torch.dtype, result: torch.dtype | None, channels: int, halved: bool
) -> None:
    source = Whole(torch.zeros(1, 4, 3, 3, 3), 0)
    assert Convolved(source, conv3(4, channels).to(weights), dtype=result)._may_be_halved() == halved


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_on_a_gpu(dtype: torch.dtype, parts: int, axis: int) -> None:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(channels=(32, 64), num_res_blocks=(1, 1), norm_groups=8))
    z = torch.randn(1, 4, 6, 5, 7)
    with torch.inference_mode():
        expected = model.decode(z)
        moved = model.to("cuda", dtype, memory_format=torch.channels_last_3d)
        latent = z.to("cuda", dtype).contiguous(memory_format=torch.channels_last_3d)
        made = split.decode(moved, latent, Execution(parts, (torch.device("cuda"),)), axis).cpu()
    assert made.dtype == torch.float32
    assert float((made - expected).norm() / expected.norm()) < (0.03 if dtype == torch.bfloat16 else 2e-3)
    assert len(made.unique()) > 0.5 * made.numel() or dtype == torch.bfloat16


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moments_are_those_of_float64_also_far_from_zero(
    dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maisi.splitting.layers.LEAST_SUMMED", 25)  # several stretches, the last one shorter
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 11, 7, 9, generator=generator) + torch.tensor([0.0, 50.0, -300.0])[:, None, None, None]
    x = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
    found = Moments.of(x)
    variance, mean = torch.var_mean(x.detach().double(), dim=(2, 3, 4), correction=0)
    assert found.count == 11 * 7 * 9
    torch.testing.assert_close(found.mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.deviations / found.count, variance, rtol=1e-5, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(Moments.of(x).deviations, found.deviations, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found.deviations.sum(), x)
    true = 2 * (x.detach().double() - mean[:, :, None, None, None])
    torch.testing.assert_close(gradient.double(), true, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["trilinear", "nearest", "transposed"])
def test_an_upsampling_takes_up_the_convolution_of_single_voxels_after_it(kind: Upsampling) -> None:
    torch.manual_seed(0)
    up, conv = Upsample(6, kind).double(), conv1(6, 3).double()
    x = torch.randn(2, 6, 5, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = conv(up(x))
        made = mixed(upsampled(up, Whole(x, 0)), conv)
        assert made.rows(0, 10, CPU).shape == expected.shape
        for start, stop in ((0, 10), (3, 4), (7, 10)):
            assert torch.allclose(made.rows(start, stop, CPU), expected[:, :, start:stop], rtol=1e-12, atol=1e-12)
        assert isinstance(made, Convolved | TransposedConvolved)
        assert made.conv.out_channels == 3
        assert up.conv.out_channels == 6  # the network's own is as it was
