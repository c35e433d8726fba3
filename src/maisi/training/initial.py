"""Weights that a training starts from: loaded from a file, whose configuration is then the run's."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from maisi.config import Config
from maisi.errors import MaisiError
from maisi.weights.load import load_network


def load_initial(path: Path, network: str, run: Config) -> nn.Module:
    """Load the network of `init`, ready to train.

    Args:
        path: the file.
        network: what it holds (a key of `weights.load.network_types`).
        run: whose `model`, where it is given at all, must be the file's.

    Raises:
        MaisiError: the run asks for another network than the file holds; as `load_network`.
    """
    module = load_network(path, network=network)
    require_model(path, module, run)
    return module.train()


def require_model(path: Path, module: nn.Module, run: Config) -> None:
    """Refuse a run whose `model` is given and is not that of the weights it starts from.

    Raises:
        MaisiError: so.
    """
    if "model" in run.model_fields_set and getattr(run, "model") != module.config:  # noqa: B009
        raise MaisiError(
            f"init starts from {path}, which is another network than 'model' describes; leave 'model' out, or init."
        )
