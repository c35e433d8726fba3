"""Views of prepared cases, encoded and kept for the training of diffusion: where data and autoencoder meet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import Field

from maisi.config import Config, read_yaml
from maisi.data.prepared import PreparedFolder
from maisi.data.views import LatentIndex, ViewConfig, cache_latents
from maisi.generation.codec import encode_tensor, load_autoencoder
from maisi.io.files import sha256


class ViewsFile(Config):
    """What the YAML file of `maisi prepare --views` holds.

    Attributes:
        views: kinds of views; each is drawn of every case that it suits.
        seed: of sizes, places and turns.
    """

    views: tuple[ViewConfig, ...] = Field(min_length=1)
    seed: int = Field(default=0, ge=0)


def cache(
    prepared: PreparedFolder,
    views: Path,
    autoencoder: Path,
    out: Path,
    device: str = "auto",
    precision: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> LatentIndex:
    """Draw the views that a YAML file asks for, encode them, and write them to `out` with an index.

    Raises:
        MaisiError: the file has a wrong or unknown key, or is not there; as `load_autoencoder`.
    """
    wanted = read_yaml(ViewsFile, views)
    encode = partial(encode_tensor, load_autoencoder(autoencoder, device, precision))
    return cache_latents(prepared, wanted.views, encode, sha256(autoencoder), out, wanted.seed, progress)
