from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from maisi.diffusion import DDPM, Denoiser, Process, RectifiedFlow


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, deviation^2), each value alone: the best denoiser and the flow's end are known."""

    mean: float = 0.7
    deviation: float = 0.5

    def denoiser(self, process: Process) -> Denoiser:
        def denoise(x: Tensor, times: Tensor) -> Tensor:
            alpha, sigma = process.levels_like(x, times)
            spread = alpha**2 * self.deviation**2 + sigma**2
            x0 = self.mean + alpha * self.deviation**2 / spread * (x - alpha * self.mean)
            noise = sigma / spread * (x - alpha * self.mean)
            return process.target(x0, noise)

        return denoise

    def solution(self, process: Process, noise: Tensor) -> Tensor:
        """The end of the probability flow: (x - alpha mean) / sqrt(alpha^2 s^2 + sigma^2) never changes."""
        alpha, sigma = (level.item() for level in process.levels(process.sampling_times(1, 1)))
        spread = (alpha**2 * self.deviation**2 + sigma**2) ** 0.5
        return self.mean + self.deviation * (noise - alpha * self.mean) / spread


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()


def fine_ddpm(timesteps: int = 64000) -> DDPM:
    """The same noise over time cut into more timesteps, so that whole timesteps don't limit the accuracy."""
    scale = 1000 / timesteps
    return DDPM(num_train_timesteps=timesteps, beta_start=0.0015 * scale, beta_end=0.0195 * scale)


@pytest.fixture(params=["ddpm", "rectified_flow"])
def process(request: pytest.FixtureRequest) -> Process:
    return {"ddpm": DDPM(), "rectified_flow": RectifiedFlow()}[request.param]


@pytest.fixture(params=["ddpm", "rectified_flow"])
def fine_process(request: pytest.FixtureRequest) -> Process:
    return {"ddpm": fine_ddpm(), "rectified_flow": RectifiedFlow(timestep_transform=False)}[request.param]


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Standard normal tensors in float64 by shape and seed."""

    def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    return draw
