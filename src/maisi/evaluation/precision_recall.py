"""Improved precision and recall (Kynkaanniemi et al. 2019): fidelity and coverage apart. Knows no image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from maisi.errors import MaisiError

NEIGHBOURS = 3


@dataclass(frozen=True)
class PrecisionRecall:
    """Which vectors lie among those of the other set: in a ball around one of its vectors.

    Attributes:
        generated_inside: of each generated vector, whether it lies among the real ones.
        real_inside: of each real vector, whether it lies among the generated ones.
    """

    generated_inside: NDArray[np.bool_]
    real_inside: NDArray[np.bool_]

    @property
    def precision(self) -> float:
        """Share of generated vectors that look real, 0 to 1."""
        return float(self.generated_inside.mean())

    @property
    def recall(self) -> float:
        """Share of real vectors that the generated ones cover, 0 to 1."""
        return float(self.real_inside.mean())


def precision_recall(generated: NDArray[Any], real: NDArray[Any], neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Compare two sets of vectors (N, D) and (M, D).

    The ball around a vector reaches to its nearest neighbour of that number (`neighbours`) in its own set.

    Raises:
        MaisiError: a set has no more vectors than `neighbours`.
    """
    if min(len(generated), len(real)) <= neighbours:
        raise MaisiError(
            f"Precision and recall with {neighbours} neighbours need {neighbours + 1} volumes on each side, "
            f"not {len(generated)} and {len(real)}; add some."
        )
    made, true = generated.astype(np.float64), real.astype(np.float64)
    between = cdist(made, true)
    near_real = between <= radii(true, neighbours)[None]
    near_made = between <= radii(made, neighbours)[:, None]
    return PrecisionRecall(np.logical_or.reduce(near_real, axis=1), np.logical_or.reduce(near_made, axis=0))


def radii(vectors: NDArray[np.float64], neighbours: int) -> NDArray[np.float64]:
    """Distance of each vector (N, D) to its neighbour of that number in the set, itself not counted."""
    distances = cdist(vectors, vectors)
    np.fill_diagonal(distances, -1)  # itself first, whatever twins it has
    found: NDArray[np.float64] = np.partition(distances, neighbours, axis=1)[:, neighbours]
    return found
