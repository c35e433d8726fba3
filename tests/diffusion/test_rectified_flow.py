import math
from collections.abc import Callable

import pytest
import torch
from monai.networks.schedulers import RFlowScheduler
from monai.networks.schedulers.rectified_flow import timestep_transform
from torch import Tensor

from maisi.diffusion import RectifiedFlow, sample

SIZES = [(16, 16, 16), (32, 32, 32), (64, 64, 32), (128, 128, 32), (48, 40, 36), (128, 128, 192)]


def released() -> RFlowScheduler:
    """The scheduler as the released configuration builds it."""
    return RFlowScheduler(
        num_train_timesteps=1000,
        use_discrete_timesteps=False,
        use_timestep_transform=True,
        sample_method="uniform",
        scale=1.4,
    )


def test_noise_is_added_as_in_monai(normal: Callable[..., Tensor]) -> None:
    x0, noise = normal(4, 4, 3, 3, 3, dtype=torch.float32), normal(4, 4, 3, 3, 3, seed=1, dtype=torch.float32)
    times = torch.tensor([0.0, 33.3, 812.5, 1000.0])
    ours, target = RectifiedFlow().perturb(x0, noise, times)
    torch.testing.assert_close(ours, released().add_noise(x0, noise, times), rtol=0, atol=1e-6)
    assert torch.equal(target, x0 - noise)


@pytest.mark.parametrize("size", SIZES)
def test_training_times_equal_monai(size: tuple[int, int, int]) -> None:
    ours = RectifiedFlow().draw_times(50, math.prod(size), torch.Generator().manual_seed(3))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = released().sample_timesteps(torch.empty(50, 1, *size))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [1, 7, 30, 50])
def test_sampling_times_equal_monai(size: tuple[int, int, int], steps: int) -> None:
    voxels, theirs = math.prod(size), released()
    theirs.set_timesteps(steps, input_img_size_numel=torch.tensor(voxels))
    rounded = RectifiedFlow(reference_rounding=True).sampling_times(steps, voxels)
    assert torch.equal(rounded, theirs.timesteps.float())
    exact = RectifiedFlow().sampling_times(steps, voxels)
    unrounded = [timestep_transform((1 - i / steps) * 1000, voxels) for i in range(steps)]
    torch.testing.assert_close(exact, torch.tensor(unrounded), rtol=1e-6, atol=0)


def test_the_scale_bends_times_further_and_can_be_switched_off() -> None:
    voxels = 64**3
    plain = RectifiedFlow(timestep_transform=False).sampling_times(4, voxels)
    assert plain.tolist() == [1000, 750, 500, 250]
    assert RectifiedFlow().sampling_times(4, 32**3).tolist() == plain.tolist()
    bent = RectifiedFlow(transform_scale=1.4).sampling_times(2, voxels)[1].item() / 1000
    assert bent == pytest.approx(2.8 * 0.5 / (1 + 1.8 * 0.5))


def reference_walk(scheduler: RFlowScheduler, denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """Sample as the reference's inference does: each step is told the time of the next."""
    times = scheduler.timesteps
    for t, following in zip(times, torch.cat([times[1:], times.new_zeros(1)]), strict=True):
        x, _ = scheduler.step(denoise(x, t[None].float()), t, x, following)
    return x


@pytest.mark.parametrize("size", SIZES[:3] + SIZES[4:5])
@pytest.mark.parametrize("steps", [3, 30])
def test_the_whole_released_walk_equals_monai(
    size: tuple[int, int, int], steps: int, gaussian, normal: Callable[..., Tensor]
) -> None:
    process, theirs = RectifiedFlow(reference_rounding=True), released()
    noise = normal(1, 1, *size, dtype=torch.float32)
    denoise = gaussian.denoiser(process)
    theirs.set_timesteps(steps, input_img_size_numel=math.prod(size))
    ours = sample(process, denoise, noise, steps=steps)
    torch.testing.assert_close(ours, reference_walk(theirs, denoise, noise), rtol=0, atol=1e-5)


def test_without_rounding_the_walk_equals_monai_where_monai_has_whole_times(
    gaussian, normal: Callable[..., Tensor]
) -> None:
    process = RectifiedFlow(timestep_transform=False)
    noise, denoise = normal(1, 4, 4, 3, 2, dtype=torch.float32), gaussian.denoiser(process)
    theirs = RFlowScheduler(use_discrete_timesteps=False)
    theirs.set_timesteps(25)
    ours = sample(process, denoise, noise, steps=25, solver="euler")
    torch.testing.assert_close(ours, reference_walk(theirs, denoise, noise), rtol=0, atol=1e-5)


def test_reference_rounding_overshoots_and_exact_steps_do_not() -> None:
    """With velocity 1 everywhere the walk's length is the sum of its steps."""
    lengths = [
        sample(process, lambda x, t: torch.ones_like(x), torch.zeros(1, 1, 64, 64, 64), steps=30).mean().item()
        for process in (RectifiedFlow(), RectifiedFlow(reference_rounding=True))
    ]
    assert lengths[0] == pytest.approx(1, abs=1e-5)
    assert 1.001 < lengths[1] < 1.03
