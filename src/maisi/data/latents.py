"""The file of one encoded volume: mean and log-variance of its latents, and its place in the world.

Samples are not stored: they are drawn anew at each training step from mean and log-variance. Format: safetensors
with the tensors `mean` and `log_variance`, float32, `C X/4 Y/4 Z/4` (C is 4 in the released autoencoder); metadata as
JSON strings under `maisi.` keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.errors import MaisiError
from maisi.io.files import atomic_path

Float32 = NDArray[np.float32]

KIND = "latent"


@dataclass(frozen=True)
class Latent:
    """One encoded volume.

    Attributes:
        mean: float32 `C X/4 Y/4 Z/4`, not multiplied by any scale factor.
        log_variance: of the same shape.
        affine: (4, 4), voxel to world in mm of the *image* (RAS+), whose first voxel the latents start at.
        size: voxels of the image before it was padded to what the networks need.
        modality: how intensities were mapped before encoding.
        notes: anything else worth keeping, such as the hash of the autoencoder.
    """

    mean: Float32
    log_variance: Float32
    affine: NDArray[np.float64]
    size: tuple[int, int, int]
    modality: str = "ct"
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check shapes and types.

        Raises:
            ValueError: not two float32 arrays of one 4D shape, or not a finite 4 x 4 affine.
        """
        if self.mean.ndim != 4 or self.mean.shape != self.log_variance.shape:
            raise ValueError(f"mean {self.mean.shape} and log-variance {self.log_variance.shape} need one 4D shape")
        if self.mean.dtype != np.float32 or self.log_variance.dtype != np.float32:
            raise ValueError(f"latents are float32, not {self.mean.dtype} and {self.log_variance.dtype}")
        if np.shape(self.affine) != (4, 4) or not np.isfinite(self.affine).all():
            raise ValueError("the affine of a latent is a finite 4 x 4 matrix")

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Spacing of the image (not of the latents)."""
        x, y, z = np.linalg.norm(np.asarray(self.affine)[:3, :3], axis=0)
        return (float(x), float(y), float(z))


def save_latent(path: Path, latent: Latent) -> None:
    """Write a latent as safetensors, atomically; the same latent gives the same bytes.

    Raises:
        MaisiError: the place cannot be written to.
    """
    from safetensors.numpy import save

    facts = {
        "affine": np.asarray(latent.affine, np.float64).tolist(),
        "size": list(latent.size),
        "spacing_mm": list(latent.spacing_mm),
        "modality": latent.modality,
        "notes": dict(sorted(latent.notes.items())),
    }
    metadata = {"maisi.kind": KIND} | {f"maisi.{key}": json.dumps(value) for key, value in facts.items()}
    tensors = {"mean": latent.mean, "log_variance": latent.log_variance}
    data = save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata)
    with atomic_path(path) as part:
        part.write_bytes(_sorted_header(data))


def load_latent(path: Path) -> Latent:
    """Read a latent that `save_latent` wrote.

    Raises:
        MaisiError: no such file, not safetensors, cut short, or without the tensors and the affine of a latent.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise MaisiError(f"Cannot read {path}: {error.strerror or error}; give the path of a latent.") from None
    except SafetensorError as error:
        raise MaisiError(f"{path} is not a whole safetensors file ({error}); encode the image again.") from None
    try:
        return _latent(tensors, {key: json.loads(metadata[f"maisi.{key}"]) for key in _KEYS})
    except (KeyError, ValueError, TypeError) as error:
        raise MaisiError(f"{path} is not a latent of maisi ({error}); make one with `maisi encode`.") from None


_KEYS = ("affine", "size", "modality", "notes")


def _latent(tensors: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> Latent:
    x, y, z = (int(n) for n in facts["size"])
    affine = np.array(facts["affine"], dtype=np.float64)
    return Latent(tensors["mean"], tensors["log_variance"], affine, (x, y, z), facts["modality"], facts["notes"])


def _sorted_header(data: bytes) -> bytes:
    """Put the header's keys in order: the library writes metadata in an order that changes from run to run."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
