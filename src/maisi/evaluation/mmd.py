"""Maximum mean discrepancy of two sets of feature vectors, unbiased (Gretton et al. 2012, eq. 3). Knows no image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist

from maisi.errors import MaisiError

Floats = NDArray[np.float64]
Kernel = Literal["polynomial", "rbf"]


def mmd(x: NDArray[Any], y: NDArray[Any], kernel: Kernel = "polynomial") -> float:
    """Return the squared discrepancy of two samples; about 0, and at times below, for two of one distribution.

    Args:
        x: (N, D), N at least 2.
        y: (M, D), M at least 2.
        kernel: 'polynomial': (x . y / D + 1)^3, as the kernel inception distance has it; 'rbf': see `rbf`.

    Raises:
        MaisiError: a sample has fewer than 2 vectors.
    """
    if min(len(x), len(y)) < 2:
        raise MaisiError(f"A discrepancy needs 2 volumes on each side, not {len(x)} and {len(y)}; add some.")
    a, b = x.astype(np.float64), y.astype(np.float64)
    of = _KERNELS[kernel](a, b)
    n, m = len(a), len(b)
    within_a, within_b = of(a, a), of(b, b)
    first = (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
    second = (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(first + second - 2 * of(a, b).mean())


def polynomial(a: Floats, b: Floats) -> Floats:
    """The cubic kernel of all pairs, (N, M)."""
    values: Floats = (a @ b.T / a.shape[1] + 1) ** 3
    return values


def rbf(a: Floats, b: Floats, width: float) -> Floats:
    """exp(-|a - b|^2 / (2 width^2)) of all pairs, (N, M)."""
    values: Floats = np.exp(cdist(a, b, "sqeuclidean") / (-2 * width**2))
    return values


def median_width(a: Floats, b: Floats) -> float:
    """The median distance of two of all vectors; 1 where they are all the same."""
    return float(np.median(pdist(np.concatenate([a, b])))) or 1.0


def _rbf_for(a: Floats, b: Floats) -> Callable[[Floats, Floats], Floats]:
    width = median_width(a, b)
    return lambda x, y: rbf(x, y, width)


_KERNELS: Mapping[str, Callable[[Floats, Floats], Callable[[Floats, Floats], Floats]]] = MappingProxyType(
    {"polynomial": lambda a, b: polynomial, "rbf": _rbf_for}
)
"""Kernel -> what makes it for two samples."""
