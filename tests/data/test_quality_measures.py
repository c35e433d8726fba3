from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from maisi.anatomy import LUNGS, UNNAMED_BONE
from maisi.data.phantom import phantom
from maisi.data.preprocess import robust_deviation
from maisi.data.quality_measures import (
    agreement,
    plane_jumps,
    seam,
    select,
    stray_share,
)
from maisi.errors import MaisiError
from maisi.volume import Volume


@pytest.fixture(scope="module")
def chest() -> tuple[Volume, Volume]:
    return phantom((72, 56, 48), (5.0, 5.0, 5.0), ("chest",), seed=1)


def body_in_air():
    hu = np.full((20, 20, 20), -1000, np.int16)
    hu[5:15, 5:15, 5:15] = 40
    return hu, hu > -500


def test_stray_share_counts_what_stands_in_the_air():
    hu, body = body_in_air()
    assert stray_share(Volume.from_spacing(hu, (2, 2, 2)), body) == 0
    hu[0, :, :] = -300
    outside = 20**3 - 12**3
    assert stray_share(Volume.from_spacing(hu, (2, 2, 2)), body) == pytest.approx(400 / outside)


def test_the_blurred_surface_is_not_stray():
    hu, body = body_in_air()
    hu[4, 5:15, 5:15] = -600
    volume = Volume.from_spacing(hu, (2, 2, 2))
    assert stray_share(volume, body) == 0
    assert stray_share(volume, body, margin_voxels=0) == pytest.approx(100 / (20**3 - 10**3))


def test_a_body_that_fills_the_volume_leaves_no_stray():
    hu = np.full((5, 5, 5), 40, np.int16)
    assert stray_share(Volume.from_spacing(hu, (1, 1, 1)), hu > 0) == 0


def test_a_mask_of_another_grid_is_refused():
    volume = Volume.from_spacing(np.zeros((5, 5, 5)), (1, 1, 1))
    with pytest.raises(MaisiError, match="one grid"):
        stray_share(volume, np.zeros((5, 5, 4), bool))


def test_select_is_isin() -> None:
    labels = np.random.default_rng(0).integers(0, 256, (7, 6, 5)).astype(np.uint8)
    assert np.array_equal(select(labels, LUNGS), np.isin(labels, LUNGS))


def test_robust_deviation_of_normal_values_is_their_deviation_whatever_a_few_do() -> None:
    values = np.random.default_rng(0).normal(40, 12, 50_000)
    values[:500] = 3000
    assert robust_deviation(values) == pytest.approx(12, rel=0.03)
    assert robust_deviation(np.full(10, 7)) == 0


def noisy_block(shape=(24, 28, 32), seed=0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(40, 10, shape)
    return np.rint(ndimage.gaussian_filter(noise, 0.5)).astype(np.int16)


def test_plane_jumps_against_a_plain_loop() -> None:
    image = noisy_block()
    for axis in range(3):
        planes = np.moveaxis(image.astype(float), axis, 0)
        plain = [np.percentile(np.abs(planes[i + 1] - planes[i]), 25) for i in range(len(planes) - 1)]
        np.testing.assert_allclose(plane_jumps(image, axis), plain, rtol=1e-5)


def test_air_and_planes_with_hardly_any_tissue_make_no_jump() -> None:
    image = np.full((20, 12, 12), -1000, np.int16)
    image[5:15] = 40
    image[2, 0, 0] = image[3, 0, 0] = 300
    jumps = plane_jumps(image, 0)
    assert np.isnan(jumps[:5]).all()
    assert (jumps[5:14] == 0).all()
    assert plane_jumps(image, 0, air_below=None).max() == 1040


@given(axis=st.integers(0, 2), place=st.floats(0.2, 0.8), step=st.sampled_from([-90, 90, 200]), seed=st.integers(0, 50))
def test_a_planted_seam_is_found_where_it_is(axis, place, step, seed) -> None:
    image = noisy_block(seed=seed)
    at = round(place * image.shape[axis])
    behind = tuple(slice(at, None) if a == axis else slice(None) for a in range(3))
    image[behind] += step
    ratio, found = seam(image, axis)
    assert (found, ratio > 3) == (at, True)
    assert all(seam(image, other)[0] < 2 for other in range(3) if other != axis)


@pytest.mark.parametrize("region", ["head-neck", "chest", "abdomen"])  # the legs' fat begins at a plane: a seam
def test_a_phantom_has_no_seam_until_one_is_put_in(region) -> None:
    image = phantom((72, 56, 48), (5.0, 5.0, 5.0), (region,), seed=1)[0].array
    assert max(seam(image, axis)[0] for axis in range(3)) < 3
    image = image.copy()
    image[:, :, 24:][image[:, :, 24:] > -900] += 100
    assert seam(image, 2)[0] > 3


def test_volumes_too_thin_for_neighbours_have_no_seam() -> None:
    assert seam(np.zeros((3, 9, 9), np.int16), 0) == (0.0, 0)


def nodule(value: int, spacing: float = 2.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ball of 8 mm in a lung of -800, its place, and the distance from it in mm."""
    grid = np.indices((30, 30, 30)) - 14.5
    distance = np.sqrt((grid**2).sum(axis=0)) * spacing
    labels = np.where(distance < 8, 23, 28).astype(np.uint8)
    return np.where(labels == 23, value, -800).astype(np.int16), labels, distance


def test_agreement_of_a_phantom_and_of_its_mirror_image(chest) -> None:
    image, labels = chest
    right = agreement(image, labels)
    assert right["lungs"] > 0.9
    assert right["body"] > 0.95
    assert right["skeleton"] > 0.6
    moved = labels.with_array(np.roll(labels.array, 12, axis=2))
    wrong = agreement(image, moved)
    assert wrong["lungs"] < 0.8
    assert wrong["skeleton"] < 0.4
    bare = agreement(image.with_array(np.full_like(image.array, -1000)), labels)
    assert bare == {"lungs": 0.0, "skeleton": 0.0, "body": 0.0}
    assert UNNAMED_BONE not in labels.array
