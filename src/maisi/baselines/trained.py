"""The file of a trained baseline, one for every method: weights, the method's name, the run's settings.

Knows no method: `maisi.baselines.methods` has the table of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from maisi.config import Config
from maisi.errors import MaisiError
from maisi.weights.tensor_file import read_tensor_header, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE = "baseline.safetensors"
_METHOD, _RUN = "maisi.baseline", "maisi.run"

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


class Maker(Protocol):
    """A trained baseline, ready to make volumes."""

    def make(self, generator: torch.Generator, steps: int | None, solver: str | None, progress: Progress) -> Tensor:
        """One volume `1 X Y Z` in [-1, 1], which depends on the generator's seed alone."""


def save_trained(folder: Path, method: str, tensors: Mapping[str, Tensor], run: Config) -> None:
    """Write `FILE` into a run's folder, atomically."""
    write_tensors(folder / FILE, tensors, {_METHOD: method, _RUN: run.model_dump_json()})


def trained_in(folder: Path) -> tuple[str, dict[str, Any]]:
    """Name of the method and settings of the run, not yet validated; no tensor is read.

    Raises:
        MaisiError: the folder holds no trained baseline.
    """
    path = folder / FILE
    if not path.is_file():
        raise MaisiError(
            f"{folder} holds no {FILE}; train one with 'maisi baseline train METHOD RUN.yaml -o {folder}'."
        )
    metadata = read_tensor_header(path).metadata
    try:
        settings = json.loads(metadata[_RUN])
        return metadata[_METHOD], dict(settings)
    except (KeyError, ValueError, TypeError):
        raise MaisiError(f"{path} is no baseline that maisi trained; give the folder of one.") from None
