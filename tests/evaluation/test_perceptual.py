from __future__ import annotations

import numpy as np
import pytest
import torch

from maisi.errors import MaisiError
from maisi.evaluation.perceptual import _places, between, map_distance, perceptual_distance
from maisi.training.perceptual import load_features

FEATURES = load_features("gradients")


def hu(seed=0, shape=(34, 36, 40)):
    return np.random.default_rng(seed).normal(0, 200, shape).astype(np.int16)


def test_equal_volumes_are_no_distance_apart_and_more_noise_is_farther() -> None:
    a = hu()
    distances = [
        perceptual_distance(a, a + (level * hu(1)).astype(np.int16), between(FEATURES), 4) for level in (0, 0.2, 1)
    ]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_a_distance_of_maps_by_hand() -> None:
    """Unit vectors at right angles differ by 2; opposite ones by 4; the length does not matter."""
    a = torch.tensor([[1.0, 5.0], [0.0, 0.0]])[None, :, None]
    b = torch.tensor([[0.0, 2.0], [3.0, 0.0]])[None, :, None]
    assert map_distance([a], [b]) == pytest.approx(1.0)
    assert map_distance([a, a], [b, -a]) == pytest.approx(1.0 + 4.0)


def test_it_is_the_mean_over_slices_of_three_planes() -> None:
    a, b = hu(shape=(32, 32, 32)), hu(1, shape=(32, 32, 32))
    found = perceptual_distance(a, b, between(lambda image: [image, 2 * image]), slices=2)
    # with one channel the unit vectors are the signs: 0 HU apart is air to air
    values = []
    for axis in range(3):
        for place in (8, 24):
            x, y = (np.take(v, place, axis) > -1000 for v in (a, b))
            values.append(2 * np.mean(x != y))
    assert found == pytest.approx(np.mean(values), abs=1e-6)


def test_slices_are_spread_and_never_twice() -> None:
    assert _places(10, 2).tolist() == [2, 7]
    assert _places(3, 16).tolist() == [0, 1, 2]


def test_small_slices_are_padded_for_deep_features() -> None:
    seen = []
    perceptual_distance(
        hu(shape=(8, 9, 40)), hu(shape=(8, 9, 40)), between(lambda image: [seen.append(image.shape) or image]), 1
    )
    assert {shape[2:] for shape in seen} == {(32, 40), (32, 32)}


def test_other_shapes_are_refused() -> None:
    with pytest.raises(MaisiError, match="one grid"):
        perceptual_distance(hu(), hu(shape=(34, 36, 41)), between(FEATURES))
