"""DDPM, the paper's process: discrete timesteps, scaled-linear betas, noise prediction (Ho et al. 2020)."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from maisi.diffusion.process import Process, check_steps, registered


@registered
class DDPM(Process):
    """alpha^2 = prod(1 - beta), sigma^2 = 1 - alpha^2; the network predicts the noise.

    The betas are linear in their square roots from `beta_start` to `beta_end`. Timesteps are whole numbers from
    0 to num_train_timesteps - 1; timestep 0 already carries a little noise (sigma 0.039), so a sampler's last
    step goes from there to the data. Estimates are not clipped: latents have no fixed range.
    """

    solvers: ClassVar[tuple[str, ...]] = ("ancestral", "ddim", "dpm++", "heun")

    kind: Literal["ddpm"] = "ddpm"
    beta_start: float = pydantic.Field(default=0.0015, gt=0, lt=1)
    beta_end: float = pydantic.Field(default=0.0195, gt=0, lt=1)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of whole timesteps, float64 on the CPU; ValueError outside the schedule."""
        index = times.detach().cpu().round().long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.num_train_timesteps:
            raise ValueError(f"timesteps must lie in 0 .. {self.num_train_timesteps - 1}")
        alpha, sigma = _schedule(self.num_train_timesteps, self.beta_start, self.beta_end)
        return alpha[index], sigma[index]

    def draw_times(self, count: int, latent_voxels: int, generator: torch.Generator) -> Tensor:
        """Uniform whole timesteps, whatever the size: float32 (count,)."""
        end, device = self.num_train_timesteps, generator.device
        return torch.randint(end, (count,), generator=generator, device=device).float()

    def sampling_times(self, steps: int, latent_voxels: int) -> Tensor:
        """Whole timesteps spread evenly from the last to 0, whatever the size: float32 (steps,).

        Raises:
            MaisiError: fewer steps than 1, or more than there are timesteps.
        """
        check_steps(steps, self.num_train_timesteps)
        return torch.linspace(self.num_train_timesteps - 1, 0, steps).round()

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The noise (epsilon of eq. 3 and 4)."""
        return noise

    def estimate(self, x_t: Tensor, prediction: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, noise): the noise is the prediction itself, x0 = (x_t - sigma noise) / alpha."""
        alpha, sigma = self.levels_like(x_t, times)
        noise = prediction.to(x_t.dtype)
        return (x_t - sigma * noise) / alpha, noise


@lru_cache(maxsize=8)
def _schedule(count: int, beta_start: float, beta_end: float) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of every timestep, float64; expm1 keeps the digits of a small sigma."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, count, dtype=torch.float64) ** 2
    log_alpha_squared = torch.log1p(-betas).cumsum(0)
    return torch.exp(log_alpha_squared / 2), torch.sqrt(-torch.expm1(log_alpha_squared))
