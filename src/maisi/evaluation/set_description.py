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

from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.fid import PLANES, FidConfig, SliceFid, on_common_grid
from maisi.evaluation.volumes import Entry
from maisi.volume import Volume


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


def describe(entry: Entry, config: FidConfig, cache: Cache) -> Path | str:
    """Describe one volume into the cache and return the path; where it can't be read, the sentence that says so."""
    try:
        key = ["slices", config.model_dump(mode="json", exclude={"batch_size"}), entry.hash]
        path = cache.arrays_path(key)
        stored = None if path.exists() else entry.ct()
    except MaisiError as error:
        return str(error)
    if stored is not None:
        cache.arrays(key, partial(_described_arrays, stored, _judge(config)))
    return path


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


def read_set(entries: Sequence[Entry], answers: Sequence[Path | str]) -> VolumeSet:
    """The volumes of which `describe` told a path."""
    kept = [(entry, answer) for entry, answer in zip(entries, answers, strict=True) if isinstance(answer, Path)]
    return VolumeSet(tuple(entry for entry, _ in kept), tuple(Description.read(path) for _, path in kept))


@lru_cache(maxsize=1)
def _judge(config: FidConfig) -> SliceFid:
    return SliceFid(config)
