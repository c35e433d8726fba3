from __future__ import annotations

import numpy as np
import pytest

from maisi.evaluation.halves import compare_with_halves, halves, smallest_half


def test_halves_have_no_patient_in_common() -> None:
    patients = ["a", "b", "a", "c", "d", "d", "e"]
    for seed in range(5):
        first, second = halves(patients, np.random.default_rng(seed))
        assert sorted(first + second) == list(range(7))
        assert not {patients[i] for i in first} & {patients[i] for i in second}
    assert smallest_half(["a", "a", "b"], 4) == 1
    assert smallest_half(list("abcd"), 4) == 2


def by_means(a, b):
    return {"gap": abs(a - b)}


def compared(made, real, seed=0):
    return compare_with_halves(made, real, [str(i) for i in range(len(real))], np.mean, by_means, 4, seed)


def test_distances_are_those_of_sets_of_one_size() -> None:
    real, made = [0.0, 1.0, 2.0, 3.0, 4.0], [10.0, 12.0, 14.0]
    found = compared(made, real)
    assert found.count == 2
    for number, way in enumerate(found.ways):
        rng = np.random.default_rng(number)
        first, second = halves([str(i) for i in range(5)], rng)
        a, b = (np.mean([real[i] for i in half[:2]]) for half in (first, second))
        m = np.mean([made[i] for i in rng.permutation(3)[:2]])
        assert way.real_to_real["gap"] == pytest.approx(abs(a - b))
        assert way.made_to_real["gap"] == pytest.approx((m - a + m - b) / 2)
    assert found.made_to_real("gap") == pytest.approx(np.mean([w.made_to_real["gap"] for w in found.ways]))


def test_all_ways_have_as_many_volumes() -> None:
    patients = ["a", "a", "a", "b", "c", "c", "d"]
    counts = []

    def count_of(some):
        counts.append(len(some))
        return float(np.sum(some))

    found = compare_with_halves([1.0] * 9, [float(n) for n in range(7)], patients, count_of, by_means, 6)
    assert set(counts) == {found.count} == {smallest_half(patients, 6)}


def test_a_ratio_needs_a_unit() -> None:
    same = compared([5.0, 5.0], [1.0] * 4)
    assert same.ratio("gap") is None
    assert same.ratio_range("gap") is None
    other = compared([50.0, 60.0], [0.0, 1.0, 3.0, 7.0])
    low, high = other.ratio_range("gap")
    assert low <= other.ratio("gap") <= high


def test_the_seed_decides() -> None:
    real, made = list(np.arange(8.0)), list(np.arange(20.0, 30))
    assert compared(made, real) == compared(made, real)
    assert compared(made, real) != compared(made, real, seed=1)
