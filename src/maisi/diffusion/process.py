"""The contract of a diffusion process: a path from data to Gaussian noise. Knows no network and no solver.

At timestep t a noisy sample is x_t = alpha(t) x_0 + sigma(t) noise. A process says what alpha and sigma are,
what the network has to predict, which timesteps to train on and which to visit when sampling. Trainers and
samplers use these verbs alone and never ask which process they hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic
import torch
from torch import Tensor

from maisi.config import Config, parse_config
from maisi.errors import MaisiError


class Process(Config, ABC):
    """A diffusion process; also its own configuration (frozen, strict, round-trips to JSON).

    Attributes:
        kind: the word that names the process in a configuration.
        num_train_timesteps: timesteps given to the network lie in [0, this]; the released networks use 1000.
    """

    kind: str
    num_train_timesteps: int = pydantic.Field(default=1000, ge=1)

    @property
    def name(self) -> str:
        """The process's name, the same as `kind`."""
        return self.kind

    def same_path(self, other: Process) -> bool:
        """Whether both mean the same by a noisy sample and its timestep; how often times are visited may differ."""
        times = torch.arange(self.num_train_timesteps)
        return (self.kind, self.num_train_timesteps) == (other.kind, other.num_train_timesteps) and all(
            torch.equal(mine, theirs) for mine, theirs in zip(self.levels(times), other.levels(times), strict=True)
        )

    @property
    @abstractmethod
    def solvers(self) -> tuple[str, ...]:
        """Names of the solvers in `maisi.diffusion.sampler` that suit it; the first is the default."""

    def config(self) -> dict[str, Any]:
        """Every setting as JSON values, with "kind"; `process_from_config` takes it back."""
        return self.model_dump(mode="json")

    @abstractmethod
    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of timesteps of any shape, in float64 on the CPU: the exact schedule."""

    @abstractmethod
    def draw_times(self, count: int, latent_voxels: int, generator: torch.Generator) -> Tensor:
        """Timesteps to train on: float32 (count,) on the generator's device.

        `latent_voxels` is the product of the latent's spatial sizes; a process may aim at noisier times for
        larger volumes.
        """

    @abstractmethod
    def sampling_times(self, steps: int, latent_voxels: int, even_log_snr: bool = False) -> Tensor:
        """Timesteps at which a sampler asks the network: float32 (steps,), descending.

        The last step leads from the last of them to the data. They are spread evenly over the timesteps as in
        the reference, or with `even_log_snr` evenly in log(alpha / sigma), which multistep solvers need to be
        accurate in few steps; a process where that is infinite at pure noise keeps its own.

        Raises:
            MaisiError: the process cannot be sampled in that many steps.
        """

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """What the network must predict from x_t; shaped as `x0`."""

    @abstractmethod
    def estimate(self, x_t: Tensor, prediction: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, noise) as the network's prediction at `x_t` (B ...) and `times` (B,) implies them.

        The two always satisfy x_t = alpha x0 + sigma noise.
        """

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of timesteps, float32, on the timesteps' device."""
        alpha, sigma = self.levels(times)
        return alpha.to(times.device, torch.float32), sigma.to(times.device, torch.float32)

    def perturb(self, x0: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, target) of data and noise (B ...) at `times` (B,).

        In the paper's eq. 3 and 4 these are z_t and, for DDPM, epsilon.
        """
        alpha, sigma = self.levels_like(x0, times)
        return alpha * x0 + sigma * noise, self.target(x0, noise)

    def step_ends(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), float64, where each step over `times` (steps,) ends; the last ends in data."""
        alpha, sigma = self.levels(times[1:])
        return torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)])

    def levels_like(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of `times` (B,), ready to multiply `x` (B ...): shape, dtype and device fit."""
        alpha, sigma = self.levels(times)
        shape = (-1, *[1] * (x.ndim - 1))
        return alpha.reshape(shape).to(x.device, x.dtype), sigma.reshape(shape).to(x.device, x.dtype)


ProcessT = TypeVar("ProcessT", bound=Process)
_KINDS: dict[str, type[Process]] = {}


def registered(cls: type[ProcessT]) -> type[ProcessT]:
    """Class decorator: make a process known to `process_from_config` under its `kind`."""
    _KINDS[cls.model_fields["kind"].default] = cls
    return cls


def process_from_config(values: Mapping[str, Any], source: str = "process") -> Process:
    """Build the process that `values` describes; `source` names their origin in messages.

    Raises:
        MaisiError: "kind" is missing or unknown, or another setting is wrong.
    """
    cls = _KINDS.get(str(values.get("kind")))
    if cls is None:
        known = ", ".join(sorted(_KINDS))
        raise MaisiError(f"{source}: kind {values.get('kind')!r} is no diffusion process; choose one of {known}.")
    return parse_config(cls, dict(values), source)


def check_steps(steps: int, most: int | None = None) -> None:
    """Raise a `MaisiError` unless 1 <= steps (<= `most`)."""
    if steps < 1 or (most is not None and steps > most):
        allowed = "at least 1" if most is None else f"1 to {most}"
        raise MaisiError(f"Sampling in {steps} steps is not possible; give a number of steps of {allowed}.")
