"""How sure a mean over volumes is: bootstrap intervals. Knows no measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; all None where there is no value, the ends None where there is only one.

    Attributes:
        mean: of the values.
        low: lower end of the interval in which the mean lies with probability `LEVEL`.
        high: its upper end.
        count: number of values.
    """

    mean: float | None
    low: float | None
    high: float | None
    count: int

    def named(self, name: str) -> dict[str, float | None]:
        """As numbers of a summary: `name`, `name_low`, `name_high`."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def mean_interval(values: Iterable[float | None], seed: int = 0, draws: int = DRAWS) -> Interval:
    """Return the mean and its percentile bootstrap interval (Efron 1979), drawn from `seed`; None is passed over."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return Interval(None, None, None, 0)
    if len(known) == 1:
        return Interval(float(known[0]), None, None, 1)
    picks = np.random.default_rng([seed, len(known)]).integers(len(known), size=(draws, len(known)))
    low, high = np.quantile(known[picks].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(known.mean()), float(low), float(high), len(known))
