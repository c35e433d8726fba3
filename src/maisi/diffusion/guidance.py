"""Guidance, classifier-free or away from a weaker self, as wrappers around denoisers. Knows no process, no network."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from maisi.diffusion.sampler import Denoiser
from maisi.errors import MaisiError

NOISIER = 1.5
"""How many times as noisy a weaker self takes its input to be; measured with `tiny`, see docs/log.md."""

NOISIEST_SHARE = 0.9
"""Above this share of the noisiest timestep there is no weaker self: measured so too, and it saves its run."""

Weaker = Callable[[Tensor, Tensor], Tensor | None]
"""As a `Denoiser`, but None where there is nothing to go away from."""


def guided(conditional: Denoiser, *others: tuple[Weaker, float]) -> Denoiser:
    """A denoiser that goes further from less conditional predictions, of each its scale: c + sum of scale (c - u).

    One with scale 0 is never called. Between -1 and 0 lies what is between the two predictions, below it what is beyond
    the other one.

    Raises:
        MaisiError: a scale is not finite.
    """
    for _, scale in others:
        if not math.isfinite(scale):
            raise MaisiError(f"A guidance scale of {scale} has no meaning; give a number, 0 for none.")
    asked = [(other, scale) for other, scale in others if scale]
    if not asked:
        return conditional

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        wanted = conditional(x, times)
        predictions = ((other(x, times), scale) for other, scale in asked)
        return sum((scale * (wanted - less) for less, scale in predictions if less is not None), wanted)

    return denoise


def noisier(denoise: Denoiser, noisiest: float) -> Weaker:
    """A weaker self of a denoiser: told `NOISIER` times the timestep, at most `noisiest`, it sees less in its input.

    Going away from it sharpens what the denoiser knows without a condition (self-guidance: Li et al. 2024, "Boosting
    flow and diffusion generation on their own"), but not above `NOISIEST_SHARE`, where there is little to see (limited
    intervals: Kynkaanniemi et al. 2024).
    """

    def weaker(x: Tensor, times: Tensor) -> Tensor | None:
        more = (NOISIER * times).clamp(max=noisiest)
        told = torch.where(times > NOISIEST_SHARE * noisiest, times, more)
        return None if torch.equal(told, times) else denoise(x, told)

    return weaker
