from collections.abc import Callable

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from maisi.diffusion import DDPM, sample
from maisi.errors import MaisiError

SCHEDULE = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}


class Trailing(DDPM):
    """Times as MONAI's DDIM steps over them: it always moves by 1000 // steps, whatever times it lists."""

    def sampling_times(self, steps: int, latent_voxels: int, even_log_snr: bool = False) -> Tensor:
        return torch.arange(999, -1, -1000 // steps, dtype=torch.float32)


def test_the_schedule_equals_monai() -> None:
    alpha, sigma = DDPM().coefficients(torch.arange(1000.0))
    cumulative = DDPMScheduler(1000, **SCHEDULE).alphas_cumprod
    torch.testing.assert_close(alpha, cumulative.sqrt(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sigma, (1 - cumulative).sqrt(), rtol=0, atol=1e-6)


def test_noise_is_added_as_in_monai(normal: Callable[..., Tensor]) -> None:
    x0, noise = normal(6, 4, 3, 3, 3, dtype=torch.float32), normal(6, 4, 3, 3, 3, seed=1, dtype=torch.float32)
    times = torch.tensor([0.0, 1.0, 77.0, 500.0, 998.0, 999.0])
    ours, target = DDPM().perturb(x0, noise, times)
    theirs = DDPMScheduler(1000, **SCHEDULE).add_noise(x0, noise, times.long())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert target is noise


def test_sampling_times_equal_monai_for_every_number_of_steps() -> None:
    theirs = DDPMScheduler(1000, **SCHEDULE)
    for steps in range(1, 1001):
        theirs.set_timesteps(steps)
        assert torch.equal(DDPM().sampling_times(steps, 64), theirs.timesteps.float()), steps


def test_the_whole_ancestral_walk_equals_monai(gaussian, normal: Callable[..., Tensor]) -> None:
    denoise = gaussian.denoiser(DDPM())
    x = noise = normal(1, 4, 4, 3, 2, dtype=torch.float32)
    theirs, generator = DDPMScheduler(1000, **SCHEDULE), torch.Generator().manual_seed(5)
    theirs.set_timesteps(1000)
    for t in theirs.timesteps:
        x, _ = theirs.step(denoise(x, t[None].float()), int(t), x, generator)
    ours = sample(DDPM(), denoise, noise, steps=1000, generators=[torch.Generator().manual_seed(5)])
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "eta"), [(1000, 0.0), (1000, 0.5), (50, 0.0), (10, 0.0), (10, 1.0)])
def test_the_whole_ddim_walk_equals_monai(steps: int, eta: float, gaussian, normal: Callable[..., Tensor]) -> None:
    process = Trailing()
    denoise = gaussian.denoiser(process)
    x = noise = normal(1, 4, 4, 3, 2, dtype=torch.float32)
    theirs, generator = DDIMScheduler(1000, **SCHEDULE), torch.Generator().manual_seed(5)
    theirs.set_timesteps(steps)
    for t in process.sampling_times(steps, 24):
        x, _ = theirs.step(denoise(x, t[None]), int(t), x, eta, generator)
    generators = [torch.Generator().manual_seed(5)]
    ours = sample(process, denoise, noise, steps=steps, solver="ddim", eta=eta, generators=generators)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


def test_even_log_snr_times_are_even_where_timesteps_allow_it() -> None:
    process = DDPM()
    times = process.sampling_times(12, 64, even_log_snr=True)
    alpha, sigma = process.levels(times)
    gaps = torch.log(alpha / sigma).diff()
    assert times[0] == 999
    assert times[-1] == 0
    assert gaps.max() / gaps.min() < 1.5
    assert torch.equal(process.sampling_times(1000, 64, even_log_snr=True), process.sampling_times(1000, 64))


def test_training_times_are_uniform_whole_numbers() -> None:
    times = DDPM().draw_times(20000, 10**6, torch.Generator().manual_seed(0))
    assert torch.equal(times, times.round())
    assert times.min() == 0
    assert times.max() == 999
    assert times.mean().item() == pytest.approx(499.5, abs=10)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(MaisiError, match="1 to 1000"):
        DDPM().sampling_times(1001, 64)


@pytest.mark.parametrize("time", [-1.0, 1000.0])
def test_timesteps_outside_the_schedule_are_refused(time: float) -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 999"):
        DDPM().levels(torch.tensor([5.0, time]))
