"""2.5D Frechet distance between sets of CT volumes: 2D features of axial, sagittal and coronal slices.

The paper's tables 2 and 3 give one distance for each plane and their average. Only distances with the same
features, slices and numbers of volumes can be compared: the estimate has a bias that shrinks with the number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import nn

from maisi.config import Config
from maisi.data.preprocess import HU_MIN, crop_or_pad, resample, window_ct
from maisi.device import resolve_device
from maisi.errors import MaisiError
from maisi.evaluation.feature_weights import FeatureWeights
from maisi.evaluation.features import (
    VIEWS,
    SliceFeatureName,
    SliceFeatures,
    SliceView,
    load_slice_features,
    slice_features,
)
from maisi.networks.inception import SMALLEST_SIDE
from maisi.volume import Volume

Float64 = NDArray[np.float64]

PLANES: Mapping[str, int] = MappingProxyType({"axial": 2, "sagittal": 0, "coronal": 1})
"""Plane -> axis of a RAS+ volume that its slices are stacked along."""


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of feature vectors: parts computed anywhere add up (`+`) to those of the whole.

    Attributes:
        count: number of vectors.
        mean: float64 (D,).
        scatter: float64 (D, D), the sum of outer products of deviations from the mean.
    """

    count: int
    mean: Float64
    scatter: Float64

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Moments:
        """Take the moments of feature vectors (N, D), N at least 1."""
        values = features.astype(np.float64)
        mean = values.mean(axis=0)
        deviations = values - mean
        return cls(len(values), mean, deviations.T @ deviations)

    def __add__(self, other: Moments) -> Moments:
        """Merge two disjoint sets (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(step, step) * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), scatter)

    @property
    def covariance(self) -> Float64:
        """The unbiased covariance, (D, D).

        Raises:
            MaisiError: there are fewer than two vectors.
        """
        if self.count < 2:
            raise MaisiError(f"{self.count} feature vector has no covariance; give at least 2.")
        return self.scatter / (self.count - 1)

    @property
    def full_rank(self) -> bool:
        """Whether there are enough vectors for a covariance that could be inverted."""
        return self.count > len(self.mean)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the squared Frechet distance of the Gaussians with these moments.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with covariances A and B. Where A = F F^T, the trace of
    the root is that of (F^T B F)^(1/2): symmetric and positive semi-definite, so its eigenvalues are real,
    and the result is exact even with fewer vectors than dimensions, where A B has no stable matrix root.

    Raises:
        MaisiError: a side has fewer than two vectors.
    """
    if a.count > b.count:
        a, b = b, a
    first, second = a.covariance, b.covariance
    root = _root_factor(first, rank=min(a.count - 1, len(a.mean)))
    overlap = np.linalg.eigvalsh(root.T @ second @ root)
    trace = np.sqrt(np.clip(overlap, 0.0, None)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(first) + np.trace(second) - 2 * trace
    return max(0.0, float(distance))


def _root_factor(covariance: Float64, rank: int) -> Float64:
    """F (D, rank) with F F^T = covariance; directions beyond the rank hold rounding errors only."""
    values, vectors = np.linalg.eigh(covariance)
    kept = slice(len(values) - rank, None)
    factor: Float64 = vectors[:, kept] * np.sqrt(np.clip(values[kept], 0.0, None))
    return factor


class FidConfig(Config):
    """What the distance looks at.

    Attributes:
        features: name of the 2D extractor (`maisi.evaluation.features`).
        feature_weights: its file, for extractors that others published.
        centre_share: share of the slices of each axis that is used, around the middle: the ends of a scan
            hold less anatomy.
        spacing_mm: common spacing that volumes are resampled to; None takes them as they are.
        size: common size that they are then cropped or padded (with air) to; None takes them as they are.
        side: pixels of the square that the extractor sees; None for what it is meant for (`features.VIEWS`).
        batch_size: slices at a time.
        device: where the extractor runs, one of `maisi.device.DEVICES`.
    """

    features: SliceFeatureName = "efficientnet-lite0"
    feature_weights: FeatureWeights | None = None
    centre_share: float = Field(default=0.5, gt=0, le=1)
    spacing_mm: tuple[float, float, float] | None = None
    size: tuple[int, int, int] | None = None
    side: int | None = Field(default=None, ge=32)
    batch_size: int = Field(default=16, ge=1)
    device: str = "cpu"

    @model_validator(mode="after")
    def _large_enough(self) -> FidConfig:
        if self.features == "inception" and self.side is not None and self.side < SMALLEST_SIDE:
            raise ValueError(f"features 'inception' need a side of {SMALLEST_SIDE} pixels at least, not {self.side}")
        return self

    @property
    def view(self) -> SliceView:
        """How the extractor sees slices."""
        view = VIEWS[self.features]
        return view if self.side is None else replace(view, side=self.side)


@dataclass(frozen=True)
class PlaneMoments:
    """Moments of a set of volumes, plane by plane; sets of different volumes add up (`+`)."""

    volumes: int
    planes: Mapping[str, Moments]

    def __add__(self, other: PlaneMoments) -> PlaneMoments:
        planes = {plane: moments + other.planes[plane] for plane, moments in self.planes.items()}
        return PlaneMoments(self.volumes + other.volumes, planes)


@dataclass(frozen=True)
class FidScore:
    """Distances of the three planes.

    Attributes:
        axial: squared Frechet distance of axial slices' features; so for `sagittal`, `coronal`.
        full_rank: whether each set had more slices in each plane than features. If not, the distance is still
            that of the estimated Gaussians, but their covariances are estimated from too little: compare it
            only with distances from as many volumes.
    """

    axial: float
    sagittal: float
    coronal: float
    full_rank: bool

    @property
    def average(self) -> float:
        """The mean of the three planes, as in the paper's tables."""
        return (self.axial + self.sagittal + self.coronal) / 3


class SliceFid:
    """Computes moments of volumes and the distances between them."""

    def __init__(self, config: FidConfig | None = None, features: SliceFeatures | None = None) -> None:
        """Load the extractor that `config` names, unless another one is handed in.

        Raises:
            MaisiError: its package, its weights or the device are missing.
        """
        self.config = config or FidConfig()
        self.features = features or load_slice_features(self.config.features, self.config.feature_weights)
        self.device = resolve_device(self.config.device)
        if isinstance(self.features, nn.Module):
            self.features.to(self.device)

    def describe(self, ct: Volume) -> dict[str, NDArray[np.float32]]:
        """Return the feature vectors (slices, D) of the central slices of each plane of a CT in HU."""
        values = window_ct(on_common_grid(ct, self.config).array)
        return {plane: self._plane(values, axis) for plane, axis in PLANES.items()}

    def moments(self, volumes: Iterable[Volume]) -> PlaneMoments:
        """Return the moments of CTs in HU; one volume at a time is held.

        Raises:
            MaisiError: there are no volumes.
        """
        return pooled(self.describe(volume) for volume in volumes)

    def _plane(self, values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        stack = np.moveaxis(values, axis, 0)
        count = max(1, round(self.config.centre_share * len(stack)))
        start = (len(stack) - count) // 2
        slices, config = stack[start : start + count], self.config
        return slice_features(slices, self.features, config.view, config.batch_size, self.device)


def on_common_grid(ct: Volume, config: FidConfig) -> Volume:
    """Bring a CT to RAS+ and to the spacing and size of `config`, where it names them; what is padded is air."""
    ct = ct.to_ras()
    if config.spacing_mm is not None:
        ct = resample(ct, config.spacing_mm)
    return ct if config.size is None else crop_or_pad(ct, config.size, value=HU_MIN)


def pooled(descriptions: Iterable[Mapping[str, NDArray[np.float32]]]) -> PlaneMoments:
    """Turn feature vectors of volumes (`SliceFid.describe`) into the moments of the set.

    Raises:
        MaisiError: there are none.
    """
    parts = (PlaneMoments(1, {p: Moments.of(f) for p, f in one.items()}) for one in descriptions)
    first = next(parts, None)
    if first is None:
        raise MaisiError("There are no volumes to take moments of; give at least 2.")
    return reduce(add, parts, first)


def fid(a: PlaneMoments, b: PlaneMoments) -> FidScore:
    """Return the distances between two sets of volumes.

    Raises:
        MaisiError: a set has fewer than 2 volumes: slices of one volume say nothing about how volumes vary.
    """
    if min(a.volumes, b.volumes) < 2:
        raise MaisiError(f"A Frechet distance needs 2 volumes on each side, not {a.volumes} and {b.volumes}; add some.")
    scores = {plane: frechet_distance(a.planes[plane], b.planes[plane]) for plane in PLANES}
    full_rank = all(m.full_rank for side in (a, b) for m in side.planes.values())
    return FidScore(scores["axial"], scores["sagittal"], scores["coronal"], full_rank)
