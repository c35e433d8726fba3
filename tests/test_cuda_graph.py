"""Recorded computations give what they give when called as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from maisi.cuda_graph import CudaGraphs
from maisi.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(channels=(32, 64), num_res_blocks=(1, 1), attention_levels=(False, True), norm_groups=8)


def test_without_a_gpu_the_function_is_called_each_time() -> None:
    calls = []

    def doubled(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    function = CudaGraphs(doubled)
    for n in (1, 2, 1, 1):
        torch.testing.assert_close(function(torch.ones(n)), torch.full((n,), 2.0))
    assert len(calls) == 4


@dataclass
class OnCuda:
    """As much of a tensor on CUDA as recording looks at before it clones."""

    value: float
    shape: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32
    device: ClassVar[torch.device] = torch.device("cuda")

    def clone(self) -> OnCuda:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it.")


def test_what_cannot_be_recorded_is_called_and_said_once(recwarn: pytest.WarningsRecorder) -> None:
    function = CudaGraphs(lambda x: 2 * x.value)  # type: ignore[attr-defined]
    with torch.inference_mode():
        assert [function(OnCuda(n)) for n in (1.0, 2.0, 3.0, 4.0)] == [2.0, 4.0, 6.0, 8.0]  # type: ignore[arg-type]
    (warning,) = recwarn
    assert str(warning.message).endswith("CUDA out of memory. Tried to allocate 2 GiB.")


def test_a_training_step_that_cannot_be_recorded_is_not_made_twice() -> None:
    function = CudaGraphs(lambda x: x.value)  # type: ignore[attr-defined]
    function._seen.add((((1,), torch.float32),))  # type: ignore[arg-type]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        function(OnCuda(1.0))  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_denoiser_recorded_for_two_sizes_gives_what_it_gives_unrecorded() -> None:
    torch.manual_seed(0)
    net = UNet(CONFIG).cuda().to(torch.bfloat16).to(memory_format=torch.channels_last_3d).requires_grad_(False)  # type: ignore[call-overload]
    for parameter in net.parameters():
        parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
    recorded = CudaGraphs(net)
    with torch.inference_mode():
        for turn in range(4):
            for size in (16, 24):
                x = torch.randn(1, 4, size, 16, 16, device="cuda", dtype=torch.bfloat16)
                x = x.contiguous(memory_format=torch.channels_last_3d)
                times = torch.full((1,), 100.0 * (turn + 1), device="cuda")
                torch.testing.assert_close(recorded(x, times), net(x, times), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_training_steps_recorded_and_not_recorded_learn_the_same() -> None:
    losses = []
    for record in (True, False):
        torch.manual_seed(0)
        net = UNet(CONFIG).cuda().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

        def learn(x: Tensor, times: Tensor, net: UNet = net) -> Tensor:
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter.grad.zero_()
            with torch.autocast("cuda", torch.bfloat16):
                loss = (net(x, times).float() - x).square().mean()
            loss.backward()
            return loss.detach()

        step = CudaGraphs(learn) if record else learn
        generator = torch.Generator("cuda").manual_seed(1)
        made = []
        for _ in range(8):
            x = torch.randn(2, 4, 16, 16, 16, device="cuda", generator=generator)
            made.append(float(step(x.contiguous(memory_format=torch.channels_last_3d), torch.ones(2, device="cuda"))))
            optimizer.step()
        losses.append(made)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
