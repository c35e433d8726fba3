"""Training the autoencoder on patches that do not fit into memory whole: the setting, and the coding that it means.

The gradients are the unsplit ones up to rounding: for the same gradient of the output float32 gives within 1e-5 of what
float64 does, by the largest of each tensor, and is nearer to it than a whole step on CPUs, whose group norms PyTorch
sums less exactly. Discriminator and perceptual loss see the joined output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from maisi.config import Config
from maisi.device import feature_layout, parse_memory
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig, LatentDistribution
from maisi.splitting import autoencoder as split
from maisi.splitting.execution import Execution
from maisi.splitting.forecast import forecast, scratch_of
from maisi.splitting.plan import gib

Shape = tuple[int, int, int, int, int]

PARTS = (2, 4, 8, 16)
"""Numbers of parts that are tried; a forecast of 16 takes ten seconds, and more of them save little."""

FIXED_BYTES = 3 * 2**27
"""What backward kernels and the allocator take beyond the tensors: on patches of 48^3 a CPU took more than was counted
by 0.13 GiB whole, 0.12 in 8 parts along Z and 0.11 with recompute; along X 0.19 and up to 0.45. How it grows with the
patch has not been measured."""


class SplittingConfig(Config):
    """How the autoencoder's feature maps are cut, for less memory and more time; what is learned is the same.

    Attributes:
        parts: parts of each map; 1 is whole. What lies between two stored maps is computed anew in the backward pass.
        axis: the cut axis: 0, 1 or 2 for X, Y or Z. Along Z is best on CPUs: what PyTorch takes for a small map, and
            leaves to a slow kernel, is told by X and Y.
        recompute: store half as many maps, computing the others anew too.
        memory: in place of parts and recompute, what the autoencoder may take in a step beside weights, optimizers and
            the losses' networks, such as "6GiB"; the quickest way that fits is taken.
    """

    parts: int = Field(default=1, ge=1)
    axis: Literal[0, 1, 2] = 2
    recompute: bool = False
    memory: str | None = None

    @model_validator(mode="after")
    def _check(self) -> SplittingConfig:
        if self.memory is not None:
            try:
                parse_memory(self.memory)
            except MaisiError as error:
                raise ValueError(str(error)) from None
            if self.parts > 1 or self.recompute:
                raise ValueError("memory decides parts and recompute; give one or the other")
        if self.recompute and self.parts == 1:
            raise ValueError("recompute needs parts of 2 or more")
        return self


@dataclass(frozen=True)
class Coding:
    """How an autoencoder encodes and decodes under autograd: whole, or on cut maps.

    Attributes:
        axis: the cut axis.
        execution: None is whole.
    """

    axis: int = 0
    execution: Execution | None = None

    def encode(self, autoencoder: Autoencoder, image: Tensor) -> LatentDistribution:
        """As `Autoencoder.encode`."""
        if self.execution is None:
            return autoencoder.encode(image)
        return split.encode(autoencoder, image, self.execution, self.axis)

    def decode(self, autoencoder: Autoencoder, latent: Tensor) -> Tensor:
        """As `Autoencoder.decode`."""
        if self.execution is None:
            return autoencoder.decode(latent)
        return split.decode(autoencoder, latent, self.execution, self.axis)


def coding_for(
    config: SplittingConfig, model: AutoencoderConfig, shape: Shape, device: torch.device, dtype: torch.dtype
) -> Coding:
    """What a setting means for batches of `shape`, `B C X Y Z`.

    Raises:
        MaisiError: no way of splitting keeps to the memory given; says what the smallest takes.
    """
    if config.memory is None:
        return _coding(config.axis, config.parts, config.recompute, device)
    budget, smallest = parse_memory(config.memory), 0
    ways = [(1, False), *((parts, recompute) for recompute in (False, True) for parts in PARTS)]
    rows = shape[2 + config.axis] // model.compression
    for parts, recompute in ways:
        if parts > rows:
            continue
        coding = _coding(config.axis, parts, recompute, device)
        taken = step_bytes(model, shape, coding, device, dtype)
        if taken <= budget:
            return coding
        smallest = min(smallest or taken, taken)
    raise MaisiError(
        f"A step on {' x '.join(map(str, shape[2:]))} voxels takes the autoencoder at least {gib(smallest)}, and "
        f"splitting.memory is {config.memory}; give more, or smaller patches or batches."
    )


@lru_cache(maxsize=64)
def step_bytes(model: AutoencoderConfig, shape: Shape, coding: Coding, device: torch.device, dtype: torch.dtype) -> int:
    """Forecast of what encoding and decoding, forward and backward, take beside the weights."""
    nowhere = torch.device("meta")
    with nowhere:
        autoencoder = Autoencoder(model).to(dtype)
        image = torch.empty(shape, dtype=dtype).contiguous(memory_format=feature_layout(device, dtype))
    there = coding
    if coding.execution is not None:
        there = replace(coding, execution=replace(coding.execution, devices=(nowhere,)))

    def run() -> None:
        latent = there.encode(autoencoder, image)
        output = there.decode(autoencoder, (latent.mean + latent.log_variance).to(dtype))
        output.sum().backward()  # type: ignore[no-untyped-call]

    return FIXED_BYTES + forecast(run, scratch_of(device))


def _coding(axis: int, parts: int, recompute: bool, device: torch.device) -> Coding:
    if parts == 1:
        return Coding(axis)
    return Coding(axis, Execution(parts, (device,), recompute="inner" if recompute else "none"))
