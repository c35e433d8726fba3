import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from maisi.errors import MaisiError
from maisi.evaluation.intensity import BIN_HU, BINS, HuHistogram, total_variation, wasserstein_hu


def samples(mean, seed, count=4000):
    return np.random.default_rng(seed).normal(mean, 120, count).astype(np.float32)


def test_wasserstein_is_that_of_scipy_on_the_bins():
    a, b = HuHistogram.of(samples(0, 0)), HuHistogram.of(samples(80, 1))
    centres = -1000 + BIN_HU * (np.arange(BINS) + 0.5)
    expected = wasserstein_distance(centres, centres, a.counts, b.counts)
    assert wasserstein_hu(a, b) == pytest.approx(expected, rel=1e-9)


def test_wasserstein_is_near_that_of_the_samples():
    a, b = samples(0, 0), samples(80, 1)
    binned = wasserstein_hu(HuHistogram.of(a), HuHistogram.of(b))
    assert binned == pytest.approx(wasserstein_distance(a, b), abs=BIN_HU)


def test_a_shift_by_whole_bins_is_the_distance():
    a = np.random.default_rng(2).integers(-500, 500, 3000)
    assert wasserstein_hu(HuHistogram.of(a), HuHistogram.of(a + 70)) == pytest.approx(70)


def test_total_variation_of_known_mixtures():
    tissue, bone = np.full(100, 40), np.full(100, 700)
    a = HuHistogram.of(np.concatenate([tissue, tissue[:50], bone[:50]]))
    b = HuHistogram.of(np.concatenate([tissue, bone]))
    assert total_variation(a, b) == pytest.approx(0.25)
    assert total_variation(HuHistogram.of(tissue), HuHistogram.of(bone)) == 1.0
    assert total_variation(a, a) == 0.0 == wasserstein_hu(a, a)


def test_the_number_of_voxels_does_not_matter():
    a, b = samples(0, 0), samples(80, 1)
    one, three = HuHistogram.of(b), HuHistogram.of(np.tile(b, 3))
    assert wasserstein_hu(HuHistogram.of(a), one) == pytest.approx(wasserstein_hu(HuHistogram.of(a), three))


def test_histograms_of_parts_add_up():
    values = samples(0, 5)
    whole, parts = HuHistogram.of(values), HuHistogram.of(values[:999]) + HuHistogram.of(values[999:])
    np.testing.assert_array_equal(whole.counts, parts.counts)


def test_bins_hold_their_lower_edge_and_ends_hold_the_rest():
    counts = HuHistogram.of(np.array([-3000, -1000, -991, -990, 989, 990, 1000, 3071], np.int16)).counts
    assert (counts[0], counts[1], counts[-2], counts[-1]) == (3, 1, 1, 3)
    assert counts.sum() == 8


def test_only_the_mask_counts():
    hu = np.zeros((4, 4, 4), np.int16)
    where = np.zeros(hu.shape, bool)
    hu[0], where[0] = 500, True
    assert HuHistogram.of(hu, where).counts[150] == 16 == HuHistogram.of(hu, where).counts.sum()


def test_an_empty_mask_is_explained():
    empty = HuHistogram.of(np.zeros((2, 2, 2)), np.zeros((2, 2, 2), bool))
    with pytest.raises(MaisiError, match="empty"):
        wasserstein_hu(empty, empty)
