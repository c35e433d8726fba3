"""Embeddings of the denoising networks' scalar and vector inputs. Mathematics only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def timestep_embedding(times: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of timesteps (Ho et al. 2020): the cosines, then the sines.

    Args:
        times: shape (B,), in [0, 1000]; need not be whole numbers.
        width: even number of values for each timestep.
        max_period: the slowest wave's period is 2 pi times this.

    Returns:
        (B, width) float32.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=times.device) * (-math.log(max_period) / half))
    angles = times.float()[:, None] * rates[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def embedding_mlp(in_width: int, out_width: int) -> nn.Sequential:
    """Linear, SiLU, Linear: (B, in_width) -> (B, out_width)."""
    return nn.Sequential(nn.Linear(in_width, out_width), nn.SiLU(), nn.Linear(out_width, out_width))
