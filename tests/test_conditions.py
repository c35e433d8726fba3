import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maisi.conditions import Conditions, bits_mask, mask_bits, stack
from maisi.errors import MaisiError


def test_regions_are_sorted_and_named_properly():
    conditions = Conditions((1, 1, 2), regions=("abdomen", "thorax", "chest"))
    assert conditions.regions == ("chest", "abdomen")
    assert conditions == Conditions((1.0, 1.0, 2.0), regions=("chest", "abdomen"))


def test_vectors_are_times_100():
    conditions = Conditions((0.75, 0.75, 2.5), regions=("chest", "abdomen"))
    np.testing.assert_array_equal(conditions.top_region(), [0, 100, 0, 0])
    np.testing.assert_array_equal(conditions.bottom_region(), [0, 0, 100, 0])
    np.testing.assert_array_equal(conditions.spacing(), [75, 75, 250])
    assert {v.dtype for v in (conditions.top_region(), conditions.bottom_region(), conditions.spacing())} == {
        np.dtype(np.float32)
    }
    assert conditions.modality_id() == 1


def test_one_region_is_top_and_bottom():
    conditions = Conditions((1, 1, 1), regions=("lower-body",))
    np.testing.assert_array_equal(conditions.top_region(), [0, 0, 0, 100])
    np.testing.assert_array_equal(conditions.bottom_region(), conditions.top_region())


def test_unknown_regions_are_zeros():
    conditions = Conditions((1, 1, 1))
    assert not conditions.top_region().any()
    assert not conditions.bottom_region().any()


@pytest.mark.parametrize("spacing", [(0, 1, 1), (1, -1, 1), (1, 1, float("nan")), (1, 1), (1, 1, float("inf"))])
def test_bad_spacing(spacing):
    with pytest.raises(MaisiError, match="give three positive numbers"):
        Conditions(spacing)


def test_bad_names():
    with pytest.raises(MaisiError, match="Unknown region 'arm'"):
        Conditions((1, 1, 1), regions=("arm",))
    with pytest.raises(MaisiError, match="Unknown modality 'pet'"):
        Conditions((1, 1, 1), modality="pet")


def test_stack_keeps_the_order():
    first = Conditions((1, 1, 2), regions=("head-neck", "chest"))
    second = Conditions((3, 3, 3), modality="mri_t1")
    arrays = stack([first, second])
    np.testing.assert_array_equal(arrays.top_region, [[100, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(arrays.bottom_region, [[0, 100, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(arrays.spacing, [[100, 100, 200], [300, 300, 300]])
    np.testing.assert_array_equal(arrays.modality, [1, 9])
    assert arrays.modality.dtype == np.int64
    with pytest.raises(ValueError, match="no conditions"):
        stack([])


def test_bits_are_least_significant_first():
    bits = mask_bits(np.array([[[0, 1, 2, 200, 255]]], dtype=np.uint8))
    assert bits.shape == (8, 1, 1, 5)
    assert bits.dtype == np.float32
    np.testing.assert_array_equal(bits[:, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(bits[:, 0, 0, 2], [0, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(bits[:, 0, 0, 3], [0, 0, 0, 1, 0, 0, 1, 1])
    np.testing.assert_array_equal(bits.sum(axis=0)[0, 0], [0, 1, 1, 3, 8])


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)))
def test_bits_and_masks_are_inverse(labels):
    np.testing.assert_array_equal(bits_mask(mask_bits(labels)), labels)


@given(st.integers(0, 255), st.floats(-0.4, 0.4))
def test_bits_are_rounded(label, noise):
    bits = mask_bits(np.full((1, 1, 1), label, dtype=np.uint8)) + np.float32(noise)
    assert bits_mask(bits).item() == label


def test_masks_of_other_types_are_refused():
    with pytest.raises(ValueError, match="must be uint8"):
        mask_bits(np.zeros((1, 1, 1), dtype=np.int16))
    with pytest.raises(ValueError, match="8 bits, not 3"):
        bits_mask(np.zeros((3, 1, 1, 1)))
