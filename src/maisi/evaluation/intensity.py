"""Are the HU right? Distances between HU histograms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.data.preprocess import HU_MAX, HU_MIN
from maisi.errors import MaisiError

Array = NDArray[Any]
Mask = NDArray[np.bool_]

BIN_HU = 10.0
BINS = round((HU_MAX - HU_MIN) / BIN_HU)


@dataclass(frozen=True)
class HuHistogram:
    """Voxel counts in bins of 10 HU over [-1000, 1000]; what lies beyond counts in the outermost bins.

    Histograms of several volumes add up (`+`).
    """

    counts: NDArray[np.int64]

    @classmethod
    def of(cls, hu: Array, where: Mask | None = None) -> HuHistogram:
        """Count the voxels of `hu` (any shape), only those in the mask `where` if there is one."""
        values = hu if where is None else hu[where]
        index = np.floor((values.astype(np.float32) - HU_MIN) / BIN_HU).astype(np.int64)
        return cls(np.bincount(np.clip(index, 0, BINS - 1).ravel(), minlength=BINS))

    def __add__(self, other: HuHistogram) -> HuHistogram:
        return HuHistogram(self.counts + other.counts)

    def shares(self) -> NDArray[np.float64]:
        """Return the counts as shares of all voxels.

        Raises:
            MaisiError: nothing was counted.
        """
        total = self.counts.sum()
        if not total:
            raise MaisiError("The histogram is empty: no voxel lies in the mask; give a volume with a body in it.")
        return self.counts / float(total)


def wasserstein_hu(a: HuHistogram, b: HuHistogram) -> float:
    """Return the Wasserstein-1 distance in HU: how far, on average, intensities must move to match."""
    gap = np.cumsum(a.shares()) - np.cumsum(b.shares())
    return float(np.abs(gap[:-1]).sum() * BIN_HU)


def total_variation(a: HuHistogram, b: HuHistogram) -> float:
    """Return the total variation distance: the share of voxels (0 to 1) whose bin would have to change."""
    return float(np.abs(a.shares() - b.shares()).sum() / 2)
