"""DDPM, the paper's process: discrete timesteps, scaled-linear betas, noise prediction (Ho et al. 2020)."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import pydantic
import torch
from torch import Tensor

from maisi.diffusion.process import Process, check_steps, registered


@registered
class DDPM(Process):
    """alpha^2 = prod(1 - beta), sigma^2 = 1 - alpha^2; the network predicts the noise.

    The betas are linear in their square roots from `beta_start` to `beta_end`. Timesteps are whole numbers,
    0 to num_train_timesteps - 1; timestep 0 already carries a little noise (sigma 0.039), so a sampler's last
    step goes from there to the data. Estimates are not clipped: latents have no fixed range.
    """

    kind: Literal["ddpm"] = "ddpm"
    beta_start: float = pydantic.Field(default=0.0015, gt=0, lt=1)
    beta_end: float = pydantic.Field(default=0.0195, gt=0, lt=1)

    @property
    def solvers(self) -> tuple[str, ...]:
        """The default is "ancestral", as published."""
        return ("ancestral", "ddim", "dpm++", "heun")

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

    def sampling_times(self, steps: int, latent_voxels: int, even_log_snr: bool = False) -> Tensor:
        """Whole timesteps from the last to 0, whatever the size: float32 (steps,).

        Raises:
            MaisiError: fewer steps than 1, or more than there are timesteps.
        """
        check_steps(steps, self.num_train_timesteps)
        if even_log_snr:
            return self._even_log_snr_times(steps).float()
        return torch.linspace(self.num_train_timesteps - 1, 0, steps).round()

    def _even_log_snr_times(self, steps: int) -> Tensor:
        """The timesteps nearest to even spacing in log(alpha / sigma), no timestep twice: int64 (steps,)."""
        alpha, sigma = _schedule(self.num_train_timesteps, self.beta_start, self.beta_end)
        log_snr = torch.log(alpha / sigma)
        wanted = torch.linspace(float(log_snr[-1]), float(log_snr[0]), steps, dtype=torch.float64)
        times, order = (wanted[:, None] - log_snr).abs().argmin(dim=1), torch.arange(steps)
        # near the data there are too few timesteps for that: push the earlier ones up, to the top at most
        distinct = (times + order).flip(0).cummax(0).values.flip(0) - order
        return torch.minimum(distinct, self.num_train_timesteps - 1 - order)

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
