"""Classifier-free guidance as a wrapper around two denoisers. Knows no process and no network."""

from __future__ import annotations

import math

from torch import Tensor

from maisi.diffusion.sampler import Denoiser
from maisi.errors import MaisiError


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """A denoiser that goes `scale` times further from the unconditional prediction: c + scale (c - u).

    Scale 0 is the conditional denoiser alone: the unconditional one is never called. Between -1 and 0 lies what is
    between the two predictions.

    Raises:
        MaisiError: the scale is below -1 or not finite.
    """
    if not math.isfinite(scale) or scale < -1:
        raise MaisiError(f"A guidance scale of {scale} has no meaning; give 0 (off) or a positive number.")
    if scale == 0:
        return conditional

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        wanted = conditional(x, times)
        return wanted + scale * (wanted - unconditional(x, times))

    return denoise
