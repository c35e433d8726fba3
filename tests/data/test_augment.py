from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.data.augment import SpatialRanges, apply, draw

SHAPE = (20, 22, 18)
EVERYTHING = SpatialRanges(
    flip=(0.5, 0.5, 0.5),
    rotate_degrees=(15, 15, 30),
    zoom=(0.8, 1.3),
    zoom_axes=(0.1, 0.1, 0.1),
    elastic_mm=4,
    elastic_grid_mm=8,
    size=(16, 16, 16),
)


def blocks() -> np.ndarray:
    """Labels in blocks, so that edges are where interpolation could differ."""
    return np.random.default_rng(0).integers(0, 255, (5, 6, 5)).repeat(4, 0).repeat(4, 1).repeat(4, 2)[:20, :22, :18]


@given(st.integers(0, 2**32), st.tuples(st.floats(1, 3), st.floats(1, 3), st.floats(1, 3)))
@settings(deadline=None, max_examples=40)
def test_image_and_mask_move_identically(seed: int, spacing: tuple[float, float, float]) -> None:
    labels = blocks()
    parameters = draw(np.random.default_rng(seed), EVERYTHING, SHAPE, spacing)
    image = apply(labels.astype(np.float32), parameters, order=0, fill=0)
    mask = apply(labels.astype(np.uint8), parameters, order=0)
    np.testing.assert_array_equal(image, mask)


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_linear_and_nearest_agree_where_the_image_is_smooth(seed: int) -> None:
    x, y, z = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in SHAPE], indexing="ij")
    ramp = 100 + 2 * x + y + 3 * z
    parameters = draw(np.random.default_rng(seed), EVERYTHING, SHAPE)
    linear, nearest = (apply(ramp, parameters, order, fill=0) for order in (1, 0))
    both = (linear > 0) & (nearest > 0)
    assert both.mean() > 0.3
    assert np.abs(linear - nearest)[both].max() <= 3.01  # half a voxel along each axis


def test_the_same_seed_draws_the_same_and_another_differs() -> None:
    image = blocks().astype(np.float32)
    results = [apply(image, draw(np.random.default_rng(s), EVERYTHING, SHAPE), 1) for s in (7, 7, 8)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_switching_one_change_off_leaves_the_other_draws_alone() -> None:
    with_elastic = draw(np.random.default_rng(3), EVERYTHING, SHAPE)
    without = draw(np.random.default_rng(3), EVERYTHING.model_copy(update={"elastic_mm": 0}), SHAPE)
    np.testing.assert_array_equal(with_elastic.matrix, without.matrix)
    assert with_elastic.flip == without.flip
    assert without.displacement is None


def test_nothing_asked_nothing_done() -> None:
    image = blocks()
    parameters = draw(np.random.default_rng(0), SpatialRanges(), SHAPE)
    assert parameters.is_exact
    np.testing.assert_array_equal(apply(image, parameters, order=1), image)


def test_flips_are_exact_and_per_axis() -> None:
    image = blocks()
    parameters = draw(np.random.default_rng(0), SpatialRanges(flip=(1, 0, 1)), SHAPE)
    np.testing.assert_array_equal(apply(image, parameters, order=1), image[::-1, :, ::-1])


def test_crops_are_parts_of_the_input_at_many_places() -> None:
    index = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    ranges = SpatialRanges(size=(6, 7, 8))
    corners = set()
    for seed in range(60):
        cut = apply(index, draw(np.random.default_rng(seed), ranges, SHAPE), order=0)
        x, y, z = np.unravel_index(cut[0, 0, 0], SHAPE)
        np.testing.assert_array_equal(cut, index[x : x + 6, y : y + 7, z : z + 8])
        corners.add(int(x))
    assert {0, 14} <= corners


def test_a_larger_size_pads_evenly() -> None:
    mask = np.full((4, 4, 4), 9, np.uint8)
    padded = apply(mask, draw(np.random.default_rng(0), SpatialRanges(size=(8, 4, 6)), (4, 4, 4)), order=0)
    np.testing.assert_array_equal(padded[2:6, :, 1:5], mask)
    assert padded.sum() == mask.sum()


def test_zoom_makes_things_larger_and_voxels_smaller() -> None:
    image = np.zeros((24, 24, 24), np.float32)
    image[9:15, 9:15, 9:15] = 1
    parameters = draw(np.random.default_rng(0), SpatialRanges(zoom=(2, 2)), (24, 24, 24))
    parameters = replace(parameters, centre=np.full(3, 11.5))
    assert apply(image, parameters, 1).sum() == pytest.approx(8 * image.sum(), rel=0.1)
    assert parameters.spacing_mm((3.0, 3.0, 4.0)) == pytest.approx((1.5, 1.5, 2.0))


def test_a_turn_by_90_degrees_is_a_transposition() -> None:
    image = np.random.default_rng(0).normal(size=(9, 9, 5)).astype(np.float32)
    parameters = draw(np.random.default_rng(0), SpatialRanges(), image.shape)
    quarter = replace(parameters, matrix=np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]), centre=np.array([4, 4, 2.0]))
    np.testing.assert_allclose(apply(image, quarter, 1), np.rot90(image, -1), atol=1e-5)


def test_rotations_keep_volumes_in_the_world() -> None:
    spacing = (1.0, 1.0, 3.0)
    x, y, z = np.meshgrid(np.arange(40) - 19.5, np.arange(40) - 19.5, np.arange(20) - 9.5, indexing="ij")
    ball = (np.square(x) + np.square(y) + np.square(3 * z) < 14**2).astype(np.uint8)
    ranges = SpatialRanges(rotate_degrees=(40, 40, 40))
    changed = []
    for told in (spacing, (1.0, 1.0, 1.0)):
        parameters = draw(np.random.default_rng(5), ranges, ball.shape, told)
        turned = apply(ball, replace(parameters, centre=np.array([19.5, 19.5, 9.5])), order=0)
        changed.append(np.mean(turned != ball) / ball.mean())
    assert changed[0] < 0.15  # a ball stays a ball, but for its voxels
    assert changed[1] > 3 * changed[0]  # without the spacing it would be skewed


def test_the_elastic_field_is_bounded_and_moves_something() -> None:
    ranges = SpatialRanges(elastic_mm=3, elastic_grid_mm=10)
    x, y, z = np.meshgrid(*[np.arange(40, dtype=np.float32)] * 3, indexing="ij")
    parameters = draw(np.random.default_rng(0), ranges, (40, 40, 40))
    for axis in (x, y, z):
        shift = np.abs(apply(axis, parameters, 1, fill=0) - axis)[8:-8, 8:-8, 8:-8]
        assert 0.3 < shift.max() <= 3


def test_channels_move_together() -> None:
    image = blocks().astype(np.float32)
    parameters = draw(np.random.default_rng(1), EVERYTHING, SHAPE)
    both = apply(np.stack([image, 2 * image]), parameters, 1, fill=0)
    np.testing.assert_allclose(both[1], 2 * both[0], rtol=1e-5)


def test_parameters_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="fit"):
        apply(np.zeros((4, 4, 4)), draw(np.random.default_rng(0), SpatialRanges(), SHAPE), 1)
