from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.data.phantom import phantom
from maisi.data.preprocess import (
    crop_or_pad,
    hu_fault,
    pad_to_multiple,
    padding_of,
    resample,
    resample_to_grid,
    unwindow_ct,
    window_ct,
    window_mr,
)
from maisi.errors import MaisiError
from maisi.volume import Volume

sizes = st.tuples(*[st.integers(1, 24)] * 3)
spacings = st.tuples(*[st.floats(0.5, 5.0)] * 3)


def ramp(shape: tuple[int, int, int], affine: np.ndarray) -> Volume:
    """Values that are linear in world coordinates: any exact linear resampling keeps them."""
    index = np.stack([*np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), np.ones(shape)])
    world = np.tensordot(affine[:3], index, 1)
    return Volume((world[0] + 2 * world[1] - 3 * world[2]).astype(np.float32), affine)


def extent_corners(volume: Volume) -> np.ndarray:
    """World positions of the outer edges (voxels as boxes)."""
    ends = np.array([[-0.5] * 3, [n - 0.5 for n in volume.shape]])
    return ends @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def oblique_affine() -> np.ndarray:
    c, s = np.cos(0.3), np.sin(0.3)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * [1.5, 2.0, 2.5]
    affine[:3, 3] = [-20, 4, 7]
    return affine


def test_ct_window_maps_1000_hu_each_way_and_clips() -> None:
    hu = np.array([-2000, -1000, 0, 1000, 21551], np.int16)
    assert window_ct(hu).tolist() == [0, 0, 0.5, 1, 1]
    assert window_ct(hu).dtype == np.float32


@given(st.integers(-1000, 1000))
def test_ct_window_and_back_is_exact_on_whole_hu(hu: int) -> None:
    assert unwindow_ct(window_ct(np.array([hu], np.int16)))[0] == hu


def test_unwindowing_clips_what_a_decoder_overshoots() -> None:
    assert unwindow_ct(np.array([-0.2, 1.3], np.float32)).tolist() == [-1000, 1000]


def test_mr_window_puts_its_percentiles_at_0_and_1_and_does_not_clip() -> None:
    values = np.random.default_rng(0).gamma(2.0, 100.0, (20, 20, 20))
    scaled = window_mr(values)
    assert scaled.min() == 0
    assert np.isclose(np.percentile(scaled, 99.5), 1)
    assert scaled.max() > 1


def test_mr_without_contrast_is_refused() -> None:
    with pytest.raises(MaisiError, match="contrast"):
        window_mr(np.zeros((4, 4, 4)))


@settings(deadline=None)
@given(sizes, spacings)
def test_resampling_to_a_size_keeps_the_extent(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    volume = Volume.from_spacing(np.zeros((9, 8, 7), np.float32), spacing, (3.0, -2.0, 5.0))
    result = resample(volume, size=size)
    assert result.shape == size
    np.testing.assert_allclose(extent_corners(result), extent_corners(volume), atol=1e-9)


@given(spacings)
def test_resampling_to_a_spacing_gives_it_exactly_and_keeps_the_centre(spacing: tuple[float, float, float]) -> None:
    volume = Volume(np.zeros((9, 8, 7), np.float32), oblique_affine())
    result = resample(volume, spacing)
    np.testing.assert_allclose(result.spacing_mm, spacing)
    np.testing.assert_allclose(extent_corners(result).mean(0), extent_corners(volume).mean(0), atol=1e-9)


@pytest.mark.parametrize("spacing", [(0.7, 1.0, 1.1), (2.0, 3.0, 2.6)])
def test_resampling_a_linear_ramp_is_exact_inside(spacing: tuple[float, float, float]) -> None:
    volume = ramp((20, 18, 16), np.diag([1.0, 1.5, 1.3, 1.0]))
    result = resample(volume, spacing)
    expected = ramp(result.shape, result.affine)
    inner = (slice(4, -4),) * 3
    np.testing.assert_allclose(result.array[inner], expected.array[inner], atol=1e-3)


def test_going_coarser_averages_instead_of_aliasing() -> None:
    stripes = np.tile([0.0, 100.0], 32)[:, None, None] * np.ones((1, 8, 8), np.float32)
    coarse = resample(Volume.from_spacing(stripes.astype(np.float32), (1, 1, 1)), (4.0, 1.0, 1.0))
    np.testing.assert_allclose(coarse.array[1:-1], 50, atol=1)


def test_nearest_resampling_makes_no_new_ids() -> None:
    labels = np.random.default_rng(0).choice(np.array([0, 3, 200], np.uint8), (12, 13, 14))
    result = resample(Volume.from_spacing(labels, (1, 1, 1)), (0.6, 1.7, 2.2), order=0)
    assert result.array.dtype == np.uint8
    assert set(np.unique(result.array)) <= {0, 3, 200}


@pytest.mark.parametrize("order", [0, 1])
def test_moving_onto_the_grid_of_another_orientation_is_exact(order: int) -> None:
    ras = Volume.from_spacing(np.random.default_rng(0).normal(size=(7, 8, 9)), (1.0, 2.0, 3.0))
    flipped = Volume(ras.array[::-1, :, ::-1].transpose(2, 0, 1).copy(), _flipped_affine(ras))
    assert flipped.to_ras().same_grid(ras)
    np.testing.assert_allclose(resample_to_grid(flipped, ras, order=order).array, ras.array, atol=1e-6)
    np.testing.assert_allclose(resample_to_grid(ras, flipped, order=order).array, flipped.array, atol=1e-6)


def _flipped_affine(ras: Volume) -> np.ndarray:
    nx, _, nz = ras.shape
    return ras.affine @ np.array([[0, -1, 0, nx - 1], [0, 0, 1, 0], [-1, 0, 0, nz - 1], [0, 0, 0, 1.0]])


def test_an_oblique_grid_shows_the_same_world() -> None:
    volume = ramp((30, 28, 26), oblique_affine())
    like = Volume.from_spacing(np.zeros((8, 8, 8), np.float32), (1.2, 1.2, 1.2), (-4.0, 40.0, 25.0))
    result = resample_to_grid(volume, like)
    np.testing.assert_allclose(result.array, ramp(like.shape, like.affine).array, atol=1e-2)


@pytest.mark.parametrize("degrees", [0, 5])
def test_the_outermost_half_voxel_is_kept_on_oblique_grids_too(degrees: float) -> None:
    ct = Volume.from_spacing(np.full((40, 40, 6), 40, np.int16), (2, 2, 5))
    angle, affine = np.deg2rad(degrees), 2 * np.eye(4)
    affine[:2, :2] = 2 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine[3, 3] = 1
    affine[:3, 3] = -affine[:3, :3] @ ((np.array((20, 20, 17)) - 1) / 2)  # 34 mm across a slab of 30
    like = Volume(np.zeros((20, 20, 17), np.uint8), affine)
    image = resample_to_grid(ct, like, order=1, fill=-1000).array
    labels = resample_to_grid(ct.with_array(np.full(ct.shape, 200, np.uint8)), like, order=0, fill=0).array
    assert image[10, 10].tolist() == [-1000, *[40] * 15, -1000]
    assert labels[10, 10].tolist() == [0, *[200] * 15, 0]


@given(sizes, sizes)
def test_what_was_padded_is_cropped_back(have: tuple[int, int, int], more: tuple[int, int, int]) -> None:
    volume = Volume(np.arange(np.prod(have), dtype=np.int32).reshape(have), oblique_affine())
    wider = crop_or_pad(volume, (have[0] + more[0], have[1] + more[1], have[2] + more[2]))
    back = crop_or_pad(wider, have)
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, volume.affine)


def test_outside_is_air_in_ct_and_nothing_in_masks() -> None:
    like = Volume.from_spacing(np.zeros((9, 9, 9)), (1, 1, 1))
    ct = Volume.from_spacing(np.full((3, 3, 3), 40, np.int16), (1, 1, 1))
    ct.array[0, 0, 0] = -1000
    mask = ct.with_array(np.full((3, 3, 3), 7, np.uint8))
    assert resample_to_grid(ct, like).array[0, 0, 0] == -1000
    assert resample_to_grid(mask, like, order=0).array[0, 0, 0] == 0
    assert resample_to_grid(mask, like, order=0).array[4, 4, 4] == 7


@given(sizes, sizes)
def test_cropping_and_padding_move_no_voxel_in_the_world(
    have: tuple[int, int, int], wanted: tuple[int, int, int]
) -> None:
    array = np.arange(1, np.prod(have) + 1, dtype=np.int32).reshape(have)
    volume = Volume(array, oblique_affine())
    result = crop_or_pad(volume, wanted, value=0)
    assert result.shape == wanted
    shift = np.linalg.inv(volume.affine) @ result.affine
    kept = np.argwhere(result.array > 0)
    assert len(kept) == np.prod(np.minimum(have, wanted))
    places = np.rint(kept + shift[:3, 3]).astype(int)
    np.testing.assert_array_equal(array[tuple(places.T)], result.array[tuple(kept.T)])


@given(sizes, st.integers(1, 16))
def test_padding_to_a_multiple_can_be_undone(size: tuple[int, int, int], multiple: int) -> None:
    array = np.random.default_rng(0).normal(size=(2, *size))
    padded, index = pad_to_multiple(array, multiple, value=-1)
    assert all(n % multiple == 0 for n in padded.shape[1:])
    np.testing.assert_array_equal(padded[index], array)
    assert padded.sum() == pytest.approx(array.sum() - (padded.size - array.size))


@pytest.mark.parametrize("spacing", [(0.0, 1, 1), (-1.0, 1, 1), (float("nan"), 1, 1), (1e-4, 1, 1)])
def test_impossible_spacings_are_refused(spacing: tuple[float, float, float]) -> None:
    with pytest.raises(MaisiError, match="spacing"):
        resample(Volume.from_spacing(np.zeros((4, 4, 4)), (1, 1, 1)), spacing)


def test_impossible_sizes_are_refused() -> None:
    volume = Volume.from_spacing(np.zeros((4, 4, 4)), (1, 1, 1))
    with pytest.raises(MaisiError, match="size"):
        resample(volume, size=(0, 4, 4))
    with pytest.raises(MaisiError, match="size"):
        crop_or_pad(volume, (4, -1, 4))


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    """A body with lungs in air, with noise."""
    image, _ = phantom((84, 60, 72), (5.0, 5.0, 5.0), ("chest",), seed=1)
    return image.array


@pytest.mark.parametrize("padding", [None, -1024, -2000, -3024, -32768])
@pytest.mark.parametrize("part", [slice(None), slice(30, 60)])
@pytest.mark.parametrize(
    ("values", "word"),
    [
        (lambda hu: hu, None),
        (lambda hu: hu + 1024, "offset by 1024"),
        (lambda hu: hu + 1024 - 180 * (np.arange(hu.size).reshape(hu.shape) % 997 == 0), "offset by 1024"),
        (lambda hu: hu + 1000, "offset by 1024"),
        (lambda hu: hu / 1000, "scaled"),
        (lambda hu: np.clip((hu + 160) / 400, 0, 1) * 255, "grey values"),
        (lambda hu: np.where(hu < -500, 80, 400 + hu * 0.5), "many are above 300"),
    ],
)
def test_values_that_are_no_hu_are_seen_whatever_pads_them(scan, values, word, part, padding) -> None:
    array = np.asarray(values(scan.astype(float)))[part]
    if padding is not None:
        array[:, :12] = padding
    fault = hu_fault(array)
    assert fault is None if word is None else re.search(word, str(fault)), fault


def test_a_crop_without_air_is_hu_and_one_that_is_offset_is_not(scan) -> None:
    brain = np.random.default_rng(0).normal(35, 12, (20, 20, 20))
    bone = np.where(np.arange(20) < 5, 700, brain)
    fat = np.where(np.arange(20) < 4, -100, brain)
    for crop in (brain, bone, fat):
        assert hu_fault(crop) is None
    for crop in (bone, fat):
        assert "offset by 1024" in str(hu_fault(crop + 1024))
    assert hu_fault(np.full((8, 8, 8), -1024)) is None
    assert hu_fault(np.full((8, 8, 8), 1000)) is None


def test_padding_is_one_lowest_value_that_nobody_measures(scan) -> None:
    assert padding_of(scan) is None
    noisy = np.where(np.arange(scan.size).reshape(scan.shape) % 5000 == 0, -1060, scan)
    assert padding_of(noisy) is None
    padded = scan.copy()
    padded[:, :12] = -3024
    assert (padding_of(padded) == (padded == -3024)).all()


def test_a_small_body_in_much_air_is_told_to_be_offset(scan) -> None:
    wide = np.full((200, 160, 80), -1000, np.int16)
    wide[60:144, 50:110, 4:76] = scan
    for padded in (wide, np.where(np.arange(80) < 30, -1024, wide)):
        assert hu_fault(padded) is None
        assert "offset by 1024" in str(hu_fault(padded + 1024))


def test_a_heart_full_of_contrast_medium_is_hu() -> None:
    rng = np.random.default_rng(0)
    blood, muscle, fat = rng.normal(460, 40, 30_000), rng.normal(120, 30, 15_000), rng.normal(-60, 30, 3_000)
    crop = np.concatenate([blood, muscle, fat, np.full(100, -800)])
    rng.shuffle(crop)
    assert hu_fault(crop[:48_000].reshape(40, 40, 30)) is None
