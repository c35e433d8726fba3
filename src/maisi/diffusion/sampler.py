"""From noise to data: one loop over any `Process`, and the solvers that make its steps.

Every solver sees a step as a move from one level (alpha, sigma) to a cleaner one and asks for the data and
the noise that x_t consists of. So each serves every process, and DDIM on a rectified flow *is* Euler's rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maisi.diffusion.process import Process
from maisi.errors import MaisiError

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t, timesteps (B,)) -> prediction
Estimate = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (x_t, timestep) -> (x0, noise)
Draw = Callable[[], Tensor]  # fresh standard normal noise for the whole batch
AfterStep = Callable[[Tensor, Tensor], Tensor]


class Level(NamedTuple):
    """A noise level: x_t = alpha x0 + sigma noise."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """Half the log of the signal-to-noise ratio, lambda = log(alpha / sigma)."""
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


@dataclass(frozen=True)
class Step:
    """One step: from level `start` (timestep `time`) to `end`, where `next_time` follows, or None in data."""

    time: float
    start: Level
    end: Level
    next_time: float | None


Advance = Callable[[Tensor, Step], Tensor]


@torch.no_grad()
def sample(
    process: Process,
    denoise: Denoiser,
    noise: Tensor,
    *,
    steps: int,
    solver: str | None = None,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Turn standard normal noise into data, without gradients.

    Args:
        process: what `denoise` was trained with.
        denoise: (x_t (B C X Y Z), timesteps float32 (B,)) -> prediction as `x_t`.
        noise: B C X Y Z, standard normal; half precision is raised to float32.
        steps: how many steps ("heun" asks the denoiser twice in each but the last).
        solver: a name out of `process.solvers`, by default the first.
        eta: for "ddim": 0 deterministic, 1 as random as "ancestral".
        generators: one for each batch item, for the solvers that draw noise; an item's result depends on its
            own generator alone, not on the rest of the batch.
        temperature: all noise, `noise` and what is drawn, is multiplied by it.
        progress: called with (steps done, steps) after each step.
        after_step: called after each step but the last with x and the timesteps (B,) it has reached; returns
            the x to go on with (inpainting puts the known part back here).

    Returns:
        The data, shaped as `noise`.

    Raises:
        MaisiError: the solver is unknown to the process, or steps or eta are out of range.
    """
    solver = _checked_solver(process, solver, eta)
    walk = list(plan(process, steps, math.prod(noise.shape[2:]), even_log_snr=solver == "dpm++"))
    x = temperature * noise.to(torch.promote_types(noise.dtype, torch.float32))
    draw = _drawer(x, generators, temperature, required=solver == "ancestral" or eta > 0)
    advance = _SOLVERS[solver](_estimator(process, denoise), draw, eta)
    for done, step in enumerate(walk, start=1):
        x = advance(x, step)
        if after_step is not None and step.next_time is not None:
            x = after_step(x, _batch_times(x, step.next_time))
        if progress is not None:
            progress(done, steps)
    return x


def plan(process: Process, steps: int, latent_voxels: int, even_log_snr: bool = False) -> Iterator[Step]:
    """The steps of a walk from noise to data."""
    times = process.sampling_times(steps, latent_voxels, even_log_snr)
    starts = zip(*(level.tolist() for level in process.levels(times)), strict=True)
    ends = zip(*(level.tolist() for level in process.step_ends(times)), strict=True)
    following = [*times[1:].tolist(), None]
    for time, start, end, next_time in zip(times.tolist(), starts, ends, following, strict=True):
        yield Step(time, Level(*start), Level(*end), next_time)


def _ddim(estimate: Estimate, draw: Draw, eta: float) -> Advance:
    """DDIM (Song et al. 2021, eq. 12 and 16) for any (alpha, sigma); eta 1 draws from the posterior."""

    def advance(x: Tensor, step: Step) -> Tensor:
        x0, noise = estimate(x, step.time)
        fresh = eta * _posterior_deviation(step.start, step.end)
        kept = math.sqrt(max(step.end.sigma**2 - fresh**2, 0.0))
        x = step.end.alpha * x0 + kept * noise
        return x + fresh * draw() if fresh > 0 else x

    return advance


def _ancestral(estimate: Estimate, draw: Draw, eta: float) -> Advance:
    """Draw from the posterior q(x_s | x_t, x0) (Ho et al. 2020, eq. 6 and 7), for strides of any length."""
    return _ddim(estimate, draw, 1.0)


def _posterior_deviation(start: Level, end: Level) -> float:
    """Standard deviation of q(x_end | x_start, x0)."""
    added = start.sigma**2 - (start.alpha / end.alpha * end.sigma) ** 2
    return end.sigma / start.sigma * math.sqrt(max(added, 0.0))


def _heun(estimate: Estimate, draw: Draw, eta: float) -> Advance:
    """Heun's rule for dx = x0 d(alpha) + noise d(sigma): the trapezium over both ends, second order.

    On a rectified flow this averages the velocities. The last step is a plain one: at the data there is no
    noise to estimate.
    """

    def advance(x: Tensor, step: Step) -> Tensor:
        x0, noise = estimate(x, step.time)
        predicted = step.end.alpha * x0 + step.end.sigma * noise
        if step.next_time is None:
            return predicted
        x0_end, noise_end = estimate(predicted, step.next_time)
        d_alpha, d_sigma = step.end.alpha - step.start.alpha, step.end.sigma - step.start.sigma
        return x + d_alpha / 2 * (x0 + x0_end) + d_sigma / 2 * (noise + noise_end)

    return advance


def _dpm_solver(estimate: Estimate, draw: Draw, eta: float) -> Advance:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): two-step, second order in lambda, predicts the data.

    First order for the first step (no past yet) and for the one that ends in data (lambda is infinite there).
    """
    past: tuple[float, Tensor] | None = None

    def advance(x: Tensor, step: Step) -> Tensor:
        nonlocal past
        x0, _ = estimate(x, step.time)
        ahead = x0 if past is None else x0 + _extrapolation(past[0], step) * (x0 - past[1])
        past = step.start.log_snr, x0
        shrink = step.end.sigma / step.start.sigma
        return shrink * x + (step.end.alpha - step.start.alpha * shrink) * ahead

    return advance


def _extrapolation(past_log_snr: float, step: Step) -> float:
    """1 / (2 r), r the last step over this one in lambda; 0 where either of them is infinitely long."""
    if step.end.sigma == 0:
        return 0.0
    return (step.end.log_snr - step.start.log_snr) / (step.start.log_snr - past_log_snr) / 2


_SOLVERS: dict[str, Callable[[Estimate, Draw, float], Advance]] = {
    "ancestral": _ancestral,
    "ddim": _ddim,
    "euler": _ddim,
    "heun": _heun,
    "dpm++": _dpm_solver,
}


def require_sampling(process: Process, solver: str | None, steps: int | None) -> None:
    """Look at a solver and a number of steps before anything is loaded; None stands for the usual ones.

    Raises:
        MaisiError: the process has no such solver, or not so many steps.
    """
    if solver is not None and solver not in process.solvers:
        known = ", ".join(process.solvers)
        raise MaisiError(f"{solver!r} is no solver for {process.name}; choose one of {known}.")
    if steps is not None:
        process.sampling_times(steps, 1)


def _checked_solver(process: Process, solver: str | None, eta: float) -> str:
    require_sampling(process, solver, None)
    solver = process.solvers[0] if solver is None else solver
    if not 0 <= eta <= 1:
        raise MaisiError(f"An eta of {eta} is out of range; give 0 (deterministic) to 1.")
    if eta > 0 and solver != "ddim":
        raise MaisiError(f"eta belongs to the solver ddim, not to {solver}; leave it out or choose ddim.")
    return solver


def _estimator(process: Process, denoise: Denoiser) -> Estimate:
    def estimate(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        times = _batch_times(x, time)
        return process.estimate(x, denoise(x, times), times)

    return estimate


def _batch_times(x: Tensor, time: float) -> Tensor:
    return torch.full((x.shape[0],), time, dtype=torch.float32, device=x.device)


def _drawer(x: Tensor, generators: Sequence[torch.Generator] | None, temperature: float, required: bool) -> Draw:
    """Noise shaped as `x` (B ...), each item from its own generator, so that batches do not matter."""
    sources = [] if generators is None else list(generators)
    if required and len(sources) != x.shape[0]:
        raise ValueError(f"{len(sources)} generators for a batch of {x.shape[0]}: give one for each item")

    def draw() -> Tensor:
        items = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in sources]
        return temperature * torch.stack([item.to(x.device) for item in items])

    return draw
