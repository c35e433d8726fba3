from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.errors import MaisiError
from maisi.evaluation.precision_recall import precision_recall, radii


def sample(count, seed=0, size=4):
    return np.random.default_rng(seed).normal(size=(count, size))


def by_loops(points, others, neighbours):
    """Share of points that lie in a ball of the others."""
    inside = 0
    for point in points:
        for i, centre in enumerate(others):
            reach = sorted(np.linalg.norm(centre - o) for j, o in enumerate(others) if j != i)[neighbours - 1]
            if np.linalg.norm(point - centre) <= reach:
                inside += 1
                break
    return inside / len(points)


def test_identical_sets_cover_each_other_and_distant_ones_do_not() -> None:
    x = sample(20)
    same = precision_recall(x, x)
    assert (same.precision, same.recall) == (1.0, 1.0)
    apart = precision_recall(x, x + 100)
    assert (apart.precision, apart.recall) == (0.0, 0.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(5, 12), st.integers(5, 12), st.integers(1, 4), st.integers(0, 99))
def test_both_are_those_of_the_definition(made, real, neighbours, seed) -> None:
    a, b = sample(made, seed), 1.3 * sample(real, seed + 100) + 0.4
    found = precision_recall(a, b, neighbours)
    assert found.precision == by_loops(a, b, neighbours)
    assert found.recall == by_loops(b, a, neighbours)


def test_a_mode_that_is_not_generated_costs_recall_alone() -> None:
    real = np.concatenate([sample(20), sample(20, 1) + 50])
    found = precision_recall(real[:20] + 0.01, real)
    assert found.precision == 1.0
    assert found.recall == 0.5


def test_twins_do_not_count_as_oneself() -> None:
    np.testing.assert_allclose(radii(np.array([[0.0], [0.0], [3.0]]), 1), [0, 0, 3])


def test_too_few_are_refused() -> None:
    with pytest.raises(MaisiError, match="4 volumes on each side"):
        precision_recall(sample(3), sample(9))
