"""Rectified flow (Liu et al. 2022): straight lines from data to noise, larger volumes at noisier times."""

from __future__ import annotations

import math
from typing import Literal

import pydantic
import torch
from torch import Tensor

from maisi.diffusion.process import Process, check_steps, registered


@registered
class RectifiedFlow(Process):
    """x_t = (1 - t) x_0 + t noise with t = timestep / num_train_timesteps; the network predicts x_0 - noise.

    Attributes:
        timestep_transform: bend the times towards noise for volumes larger than `base_voxels`,
            t' = r t / (1 + (r - 1) t) with r = transform_scale * (latent voxels / base_voxels)^(1/3), in
            training and in sampling alike.
        transform_scale: 1.0 is what the released models ran with. (Their configuration says `scale: 1.4`, a
            parameter of another way to draw times that is off there.)
        base_voxels: latent voxels at which the transform does nothing (at scale 1).
        reference_rounding: sample with the reference's rounding: timesteps stored as float16, and a step ends
            at the whole timestep below the one where the next begins, so they add up to slightly more than 1.
            Off, every step ends where the next begins. On only to repeat the reference's numbers ("euler").
    """

    kind: Literal["rectified_flow"] = "rectified_flow"
    timestep_transform: bool = True
    transform_scale: float = pydantic.Field(default=1.0, gt=0, allow_inf_nan=False)
    base_voxels: int = pydantic.Field(default=32**3, ge=1)
    reference_rounding: bool = False

    @property
    def solvers(self) -> tuple[str, ...]:
        """The default is "euler", as released; rounded steps suit no other."""
        return ("euler",) if self.reference_rounding else ("euler", "heun", "dpm++", "ddim", "ancestral")

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - t, t), float64 on the CPU."""
        t = times.detach().cpu().double() / self.num_train_timesteps
        return 1 - t, t

    def draw_times(self, count: int, latent_voxels: int, generator: torch.Generator) -> Tensor:
        """Uniform t, transformed for the size: float32 timesteps (count,)."""
        t = torch.rand((count,), generator=generator, device=generator.device)
        return self._transform(t, latent_voxels) * self.num_train_timesteps

    def sampling_times(self, steps: int, latent_voxels: int, even_log_snr: bool = False) -> Tensor:
        """t = 1, 1 - 1/steps, ..., 1/steps, transformed for the size: float32 timesteps (steps,).

        `even_log_snr` changes nothing: pure noise has no finite log(alpha / sigma).

        Raises:
            MaisiError: fewer steps than 1.
        """
        check_steps(steps)
        t = 1 - torch.arange(steps, dtype=torch.float64) / steps
        times = (self._transform(t, latent_voxels) * self.num_train_timesteps).float()
        return times.half().float() if self.reference_rounding else times

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The velocity towards the data, x0 - noise."""
        return x0 - noise

    def estimate(self, x_t: Tensor, prediction: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, noise) = (x_t + t v, x_t - (1 - t) v)."""
        alpha, sigma = self.levels_like(x_t, times)
        velocity = prediction.to(x_t.dtype)
        return x_t + sigma * velocity, x_t - alpha * velocity

    def step_ends(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), float64, where each step ends; on whole timesteps under `reference_rounding`."""
        return super().step_ends(times.floor() if self.reference_rounding else times)

    def _transform(self, t: Tensor, latent_voxels: int) -> Tensor:
        """t' = r t / (1 + (r - 1) t) of t in [0, 1]."""
        if not self.timestep_transform:
            return t
        r = self.transform_scale * math.cbrt(latent_voxels / self.base_voxels)
        return t * r / (1 + t * (r - 1))
