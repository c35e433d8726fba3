"""What a training must remember: exponential moving averages, optimizers, and the checkpoint file. Knows no stage.

A checkpoint is one safetensors file: tensors named `model.*`, `ema.*` and `optimizer.*`, everything else as JSON in its
metadata. Randomness needs no entry: every draw of a step comes from a generator seeded with the run's seed and the
step (`step_generator`), so the step is the whole position in data and noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maisi.errors import MaisiError
from maisi.io.files import atomic_path, make_folder

CHECKPOINT_PATTERN = "step-*.safetensors"


def step_generator(seed: int, step: int, stream: int) -> torch.Generator:
    """Generator of one step and one purpose (`stream`), the same whatever ran before."""
    state = np.random.SeedSequence((seed, step, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def step_rng(seed: int, step: int, stream: int) -> np.random.Generator:
    """As `step_generator`, for numpy."""
    return np.random.default_rng(np.random.SeedSequence((seed, step, stream)))


class ExponentialMovingAverage:
    """Running average of a module's parameters; the decay grows from 0 to `decay`, so early noise is forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's values after step number `step` (0, 1, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        values = module.state_dict()
        torch._foreach_lerp_([self.values[name] for name in values], list(values.values()), 1 - decay)


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint file: tensors by name, and what is said in words."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start with `prefix`, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten the optimizer's state to `index.field` -> tensor."""
    return {
        f"{index}.{field}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, fields in optimizer.state_dict()["state"].items()
        for field, value in fields.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; the parameter groups stay those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, fields in optimizer.state.items():  # files know no layout; steps are quickest in the weights' own
        for field, value in fields.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                fields[field] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write `step-XXXXXXXX.safetensors` atomically and delete all but the newest `keep`."""
    make_folder(folder)
    path = folder / f"step-{step:08d}.safetensors"
    # A copy in memory of its own for each name: safetensors refuses tensors that share storage.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in checkpoint.tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"facts": json.dumps(dict(checkpoint.facts))})
    for old in sorted(folder.glob(CHECKPOINT_PATTERN))[:-keep]:
        old.unlink()
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, if there is one."""
    return max(folder.glob(CHECKPOINT_PATTERN), default=None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        MaisiError: the file is not a checkpoint or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError):
        raise MaisiError(
            f"{path} is not a checkpoint of maisi or is damaged; delete it to go on from the one before."
        ) from None
