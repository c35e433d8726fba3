"""What is kept of the volumes of a set: features of their slices in files, and the few numbers that go round.

Knows no distance. `describe` is what worker processes run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import maisi
from maisi.errors import MaisiError
from maisi.evaluation.cache import cached_arrays, key_of
from maisi.evaluation.fid import PLANES, FidConfig, SliceFid, on_common_grid
from maisi.evaluation.volumes import Entry
from maisi.volume import Volume
from maisi.weights.load import sha256

_KEPT = ".npz"


@dataclass(frozen=True)
class Description:
    """What is kept of one volume; its slices' features stay in a file.

    Attributes:
        path: of the features, plane -> float32 (slices, D).
        vector: float64 (3 D,), mean features of each plane's slices, one plane after the other.
        slices: number of slices, plane by plane.
        shape: of the common grid.
        stored_shape: of the file, in RAS+ order.
        stored_spacing_mm: so.
        turned: whether the file's axes are not RAS+.
    """

    path: Path
    vector: NDArray[np.float64]
    slices: Mapping[str, int]
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    stored_spacing_mm: tuple[float, ...]
    turned: bool

    @classmethod
    def read(cls, path: Path) -> Description:
        """Read what `describe` kept."""
        with np.load(path, allow_pickle=False) as stored:
            features = {plane: stored[plane] for plane in PLANES}
            shapes = tuple(stored["shape"].tolist()), tuple(stored["stored_shape"].tolist())
            spacing_mm = tuple(stored["stored_spacing_mm"].tolist())
            turned = bool(stored["turned"])
        vector = np.concatenate([features[plane].mean(axis=0, dtype=np.float64) for plane in PLANES])
        return cls(path, vector, {plane: len(f) for plane, f in features.items()}, *shapes, spacing_mm, turned)

    def features(self) -> dict[str, NDArray[np.float32]]:
        """Read the features of the slices."""
        with np.load(self.path, allow_pickle=False) as stored:
            return {plane: stored[plane] for plane in PLANES}

    @property
    def spacing_text(self) -> str:
        """The stored spacing, short."""
        return "x".join(f"{mm:.4g}" for mm in self.stored_spacing_mm)


@dataclass(frozen=True)
class VolumeSet:
    """The described volumes of one side, in the order of their entries."""

    entries: tuple[Entry, ...]
    descriptions: tuple[Description, ...]

    @property
    def vectors(self) -> NDArray[np.float64]:
        """One row for each volume."""
        return np.stack([description.vector for description in self.descriptions])

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of all volumes on the common grid, or None where they differ."""
        shapes = {description.shape for description in self.descriptions}
        return next(iter(shapes)) if len(shapes) == 1 else None


def describe(entry: Entry, config: FidConfig, cache: Path) -> str:
    """Describe one volume into the cache and return the path; where it can't be read, the sentence that says so."""
    try:
        settings = config.model_dump(mode="json", exclude={"batch_size"})
        key = key_of("slices", maisi.__version__, settings, sha256(entry.image), entry.affine)
        path = cache / f"{key}{_KEPT}"
        stored = None if path.exists() else entry.ct()
    except MaisiError as error:
        return str(error)
    if stored is not None:
        cached_arrays(path, partial(_described_arrays, stored, _judge(config)))
    return str(path)


def _described_arrays(stored: Volume, judge: SliceFid) -> dict[str, NDArray[Any]]:
    """What `Description.read` reads, of a CT in HU as it was stored."""
    ras = stored.to_ras()
    ct = on_common_grid(ras, judge.config)
    facts = {"shape": ct.shape, "stored_shape": ras.shape, "stored_spacing_mm": ras.spacing_mm}
    turned = not np.allclose(stored.affine, ras.affine)
    return {
        **judge.describe(ct),
        **{name: np.array(value) for name, value in facts.items()},
        "turned": np.array(turned),
    }


def is_path(answer: str) -> bool:
    """Whether `describe` told where a volume is kept, and not why it can't be read."""
    return answer.endswith(_KEPT)


def read_set(entries: Sequence[Entry], answers: Sequence[str]) -> VolumeSet:
    """The volumes of which `describe` told a path."""
    kept = [(entry, Path(answer)) for entry, answer in zip(entries, answers, strict=True) if is_path(answer)]
    return VolumeSet(tuple(entry for entry, _ in kept), tuple(Description.read(path) for _, path in kept))


@lru_cache(maxsize=1)
def _judge(config: FidConfig) -> SliceFid:
    return SliceFid(config)
