"""A network in training: its optimizer, learning-rate schedule, gradient clipping and moving average."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from maisi.config import Config
from maisi.errors import MaisiError
from maisi.training.muon import MuonAdam
from maisi.training.state import ExponentialMovingAverage, load_optimizer_tensors, optimizer_tensors

MOST_SKIPPED = 50
"""Steps in a row whose gradients may not be finite."""


class OptimizerConfig(Config):
    """The optimizer and what goes with it.

    Attributes:
        kind: `adam`, as in the paper, or `muon`, which learns faster per step (see `maisi.training.muon`).
        learning_rate: after the warm-up; the paper uses 1e-4 (autoencoder) and 1e-5 (diffusion, ControlNet).
        schedule: shape of the decay from there to `final_fraction` of it at the last step.
        clip: largest gradient norm; 0 does not clip.
        accumulate: batches whose gradients are averaged for one step.
    """

    kind: Literal["adam", "muon"] = "adam"
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "cosine", "polynomial"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(default=1.0, ge=0)
    accumulate: int = Field(default=1, ge=1)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0..steps-1."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        shape = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
            "polynomial": (1 - min(done, 1.0)) ** 2,
        }[self.schedule]
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * shape)


class Trainee:
    """A module with its optimizer and moving average. `name` prefixes its tensors in a checkpoint."""

    def __init__(self, name: str, module: nn.Module, config: OptimizerConfig, steps: int) -> None:
        self.name = name
        self.module = module
        self.config = config
        self.steps = steps
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if config.kind == "muon":
            self.optimizer = MuonAdam(module, config.learning_rate, config.betas)
        else:
            self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate, betas=config.betas)
        self.ema = ExponentialMovingAverage(module, config.ema_decay)
        self._skipped = 0

    def apply(self, step: int) -> float:
        """Use the gradients that are there for one optimizer step; return their norm before clipping.

        A step whose gradients are not finite is skipped, so that one bad batch cannot destroy the weights.

        Raises:
            MaisiError: so were those of `MOST_SKIPPED` steps in a row.
        """
        rate = self.config.rate(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        limit = self.config.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if math.isfinite(norm):
            self.optimizer.step()
            self.ema.update(self.module, step)
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if self._skipped == MOST_SKIPPED:
            raise MaisiError(
                f"Gradients of {MOST_SKIPPED} steps in a row are not finite (network '{self.name}', step {step + 1}); "
                "look for such numbers in the data, or begin anew with a smaller learning rate or precision fp32."
            )
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Everything to remember."""
        parts = {
            "model": self.module.state_dict(),
            "ema": self.ema.values,
            "optimizer": optimizer_tensors(self.optimizer),
        }
        return {f"{self.name}.{part}.{k}": v for part, values in parts.items() for k, v in values.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`."""

        def part(name: str) -> dict[str, Tensor]:
            prefix = f"{self.name}.{name}."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.module.load_state_dict(part("model"))
        for name, value in part("ema").items():
            self.ema.values[name].copy_(value)
        load_optimizer_tensors(self.optimizer, part("optimizer"))
