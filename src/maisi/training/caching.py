"""Cache latents of a prepared folder with a trained autoencoder: the step between the first two stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from maisi.config import Config, read_yaml
from maisi.data.prepared import PreparedFolder
from maisi.data.views import LatentIndex, ViewConfig, cache_latents
from maisi.networks.autoencoder import Autoencoder
from maisi.training.loop import resolve_device
from maisi.weights.load import load_network, sha256


class CachingRun(Config):
    """What to cache.

    Attributes:
        data: prepared folder.
        autoencoder: trained weights.
        views: kinds of views; every case is seen in each of them.
        seed: of the views' places.
        device: as in training.
    """

    data: Path
    autoencoder: Path
    views: tuple[ViewConfig, ...] = Field(min_length=1)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


@torch.inference_mode()
def cache(path: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> LatentIndex:
    """Cache latents as the YAML file at `path` says (`CachingRun`); an interrupted run goes on where it was.

    Raises:
        MaisiError: the file has a wrong or unknown key, or the data or the weights cannot be used.
    """
    run = read_yaml(CachingRun, path)
    prepared = PreparedFolder(run.data)
    device = resolve_device(run.device)
    model = load_network(run.autoencoder, device, network="autoencoder")
    assert isinstance(model, Autoencoder)
    model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def encode(image: Tensor) -> tuple[Tensor, Tensor]:
        found = model.encode(image.to(device))
        return found.mean[0].float().cpu().contiguous(), found.log_variance[0].float().cpu().contiguous()

    return cache_latents(prepared, run.views, encode, sha256(run.autoencoder), out, run.seed, progress)
