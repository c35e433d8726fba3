from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maisi.evaluation.paired_tests import holm, wilcoxon_p


def test_holm_by_hand() -> None:
    # in order: 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below the one before), 0.9
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.5, None, 0.6]) == [1.0, None, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni(p_values) -> None:
    for p, corrected in zip(p_values, holm(p_values), strict=True):
        assert p <= corrected <= min(1.0, p * len(p_values)) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(holm(p_values), float)[order]) >= 0).all()


def test_wilcoxon_by_counting_all_signs() -> None:
    change = np.array([0.1, 0.25, -0.05, 0.4, 0.3, 0.02])
    ranks = np.argsort(np.argsort(np.abs(change))) + 1
    positive = ranks[change > 0].sum()
    total = ranks.sum()
    sums = [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=6)]
    extreme = np.mean([min(s, total - s) <= min(positive, total - positive) for s in sums])
    before = np.array([0.5, 0.6, 0.7, 0.2, 0.1, 0.9])
    assert wilcoxon_p(before, before + change) == pytest.approx(extreme)


def test_wilcoxon_where_nothing_differs_or_nothing_is_paired() -> None:
    assert wilcoxon_p([0.5, 0.6], [0.5, 0.6]) == 1.0
    assert wilcoxon_p([0.5], [0.6]) is None
