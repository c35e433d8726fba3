from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from maisi.evaluation.bootstrap import mean_interval


def test_the_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, 3.0, 40)
    found = mean_interval(values, draws=20000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", random_state=1)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.05)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.05)


def test_the_seed_decides_and_nothing_else() -> None:
    values = list(np.random.default_rng(1).normal(size=15))
    assert mean_interval(values, 3) == mean_interval(iter(values), 3)
    assert mean_interval(values, 3) != mean_interval(values, 4)


def test_missing_values_are_passed_over() -> None:
    found = mean_interval([None, 2.0, 4.0, None])
    assert (found.mean, found.count) == (3.0, 2)
    assert mean_interval([None, 2.0]).named("x") == {"x": 2.0, "x_low": None, "x_high": None}
    assert mean_interval([]).mean is None
