"""Do two ways differ on the same patients? Wilcoxon's signed-rank test, and Holm's correction. Knows no image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def wilcoxon_p(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Return the two-sided p of the signed-rank test on pairs (Wilcoxon, 1945); pairs without a difference drop out.

    Returns:
        0 to 1; 1 where no pair differs; None with fewer than two pairs.
    """
    from scipy.stats import wilcoxon

    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if len(change) < 2:
        return None
    change = change[change != 0]
    if len(change) == 0:
        return 1.0
    return float(wilcoxon(change).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for their number (Holm, 1979), in the order given; None is no test and stays so.

    The smallest is multiplied by the number of tests, the next by one less, and so on; none is smaller than one before
    it in that order, and none is above 1.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[place] = largest
    return corrected
