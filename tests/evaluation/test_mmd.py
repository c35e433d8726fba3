from __future__ import annotations

import numpy as np
import pytest

from maisi.errors import MaisiError
from maisi.evaluation.mmd import median_width, mmd, polynomial, rbf


def sample(count, size=3, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size)) + shift


def by_loops(x, y, kernel):
    """The unbiased estimate, written as its three sums."""

    def within(z):
        return np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    return within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_polynomial_discrepancy_is_that_of_the_sums() -> None:
    x, y = sample(6), sample(4, shift=0.5, seed=1)
    assert mmd(x, y) == pytest.approx(by_loops(x, y, lambda a, b: (a @ b / 3 + 1) ** 3), rel=1e-10)


def test_rbf_discrepancy_is_that_of_the_sums() -> None:
    x, y = sample(6), sample(4, shift=0.5, seed=1)
    both = np.concatenate([x, y])
    width = np.median([np.linalg.norm(both[i] - both[j]) for i in range(10) for j in range(i)])
    assert median_width(x, y) == pytest.approx(width)
    expected = by_loops(x, y, lambda a, b: np.exp(-((a - b) ** 2).sum() / (2 * width**2)))
    assert mmd(x, y, "rbf") == pytest.approx(expected, rel=1e-10)


def test_rbf_discrepancy_of_gaussians_has_a_closed_form() -> None:
    """N(0, 1) and N(m, 1) with width s: 2 s / sqrt(s^2 + 2) (1 - exp(-m^2 / (2 (s^2 + 2))))."""
    x, y = sample(1200, 1), sample(1200, 1, shift=1.5, seed=1)
    s = median_width(x, y)
    expected = 2 * s / np.sqrt(s**2 + 2) * (1 - np.exp(-(1.5**2) / (2 * (s**2 + 2))))
    assert mmd(x, y, "rbf") == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
def test_samples_of_one_distribution_are_no_distance_apart(kernel) -> None:
    estimates = [mmd(sample(40, seed=n), sample(40, seed=100 + n), kernel) for n in range(40)]
    apart = mmd(sample(40), sample(40, shift=1.0, seed=1), kernel)
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates)) < 3 * error < 0.1 * apart
    assert min(estimates) < 0  # unbiased: it errs to both sides


def test_kernels_of_known_vectors() -> None:
    a, b = np.array([[1.0, 0.0]]), np.array([[2.0, 5.0]])
    assert polynomial(a, b) == pytest.approx(8.0)
    assert rbf(a, a, 2.0) == pytest.approx(1.0)


def test_one_volume_is_too_few() -> None:
    with pytest.raises(MaisiError, match="2 volumes"):
        mmd(sample(1), sample(5))
