import math
import tracemalloc

import numpy as np
import pytest
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from maisi.errors import MaisiError
from maisi.evaluation.reconstruction import (
    compare,
    compare_structures,
    grid_hu,
    mean_absolute_error,
    mirror_hu,
    psnr,
    ssim,
)

SIZES = [(40, 23, 17), (11, 12, 13), (16, 33, 20)]


def pair(shape, noise=0.1, seed=0):
    """A smooth volume in [0, 1] and the same with noise."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(0, 3, n) for n in shape], indexing="ij")
    original = (np.sin(grid[0]) * np.cos(grid[1] + grid[2]) + 1) / 2
    made = np.clip(original + noise * rng.normal(size=shape), 0, 1)
    return original.astype(np.float32), made.astype(np.float32)


@pytest.mark.parametrize("shape", SIZES)
def test_uniform_ssim_is_that_of_skimage(shape):
    a, b = pair(shape)
    expected = structural_similarity(a.astype(float), b.astype(float), win_size=7, data_range=1.0)
    assert ssim(a, b, "uniform") == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", SIZES)
def test_gaussian_ssim_is_that_of_skimage(shape):
    a, b = pair(shape)
    expected = structural_similarity(
        a.astype(float),
        b.astype(float),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(a, b, "gaussian") == pytest.approx(expected, abs=1e-9)


def test_data_range_scales_out():
    a, b = pair(SIZES[0])
    assert ssim(a * 50, b * 50, data_range=50.0) == pytest.approx(ssim(a, b), abs=1e-6)
    assert psnr(a * 50, b * 50, data_range=50.0) == pytest.approx(psnr(a, b), abs=1e-4)


def test_psnr_is_that_of_skimage_and_of_a_known_error():
    a, b = pair(SIZES[0])
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-4)
    assert mean_squared_error(a, b) == pytest.approx(10 ** (-psnr(a, b) / 10), rel=1e-5)
    flat = np.zeros((9, 9, 9), np.float32)
    assert psnr(flat, flat + np.float32(0.1)) == pytest.approx(20.0, abs=1e-5)


def test_equal_volumes_are_perfect():
    a, _ = pair(SIZES[0])
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)
    assert mean_absolute_error(a, a) == 0


def test_more_noise_is_worse_in_every_measure():
    results = [compare(*(1000 * (2 * v - 1) for v in pair(SIZES[0], noise))) for noise in (0.02, 0.1, 0.3)]
    assert [r.psnr_db for r in results] == sorted((r.psnr_db for r in results), reverse=True)
    assert [r.ssim for r in results] == sorted((r.ssim for r in results), reverse=True)
    assert [r.mae_hu for r in results] == sorted(r.mae_hu for r in results)


@pytest.mark.parametrize("shift", [25, -25])
def test_errors_are_in_hu_inside_the_window(shift: int):
    rng = np.random.default_rng(3)
    hu = rng.integers(-900, 900, (20, 10, 9)).astype(np.int16)
    found = compare(hu, hu + np.int16(shift))
    assert found.mae_hu == pytest.approx(25, abs=1e-3)
    assert found.bias_hu == pytest.approx(shift, abs=1e-3)


def test_a_pattern_that_repeats_is_found_and_nothing_else():
    rng = np.random.default_rng(4)
    hu = rng.integers(-90, 140, (37, 30, 22)).astype(np.int16)
    hu[:9] = -1000
    pattern = rng.integers(-12, 13, (4, 4, 4)).astype(np.int16)
    made = hu + np.tile(pattern, (10, 8, 6))[:37, :30, :22]
    made[:9] = 300
    assert grid_hu(hu, made) == pytest.approx(pattern.std(), abs=1e-6)
    assert grid_hu(hu, made + 7) == pytest.approx(pattern.std(), abs=1e-6)
    noise = rng.normal(0, 12, hu.shape)
    assert grid_hu(hu, hu + noise) == pytest.approx(12 / np.sqrt((hu > -1000).sum() / 64), rel=0.3)
    ramp = np.linspace(-40, 40, 37)[:, None, None] + np.zeros(hu.shape)
    assert grid_hu(hu, hu + ramp) < 3
    assert grid_hu(hu[:9], made[:9]) is None
    assert compare(hu, made).grid_hu == grid_hu(hu, made)


def test_what_the_window_clips_is_no_error():
    hu = np.full((8, 8, 8), -1000, np.int16)
    hu[4:] = 3071
    made = np.clip(hu, -1024, 1000)
    made[:4] = -1024
    assert compare(hu, made).psnr_db == math.inf


def test_faults_are_explained():
    with pytest.raises(MaisiError, match="one grid"):
        compare(np.zeros((8, 8, 8)), np.zeros((8, 8, 9)))
    with pytest.raises(MaisiError, match="SSIM needs 7 voxels"):
        ssim(np.zeros((8, 8, 6)), np.zeros((8, 8, 6)))
    with pytest.raises(MaisiError, match="SSIM needs 11 voxels"):
        ssim(np.zeros((8, 8, 8)), np.zeros((8, 8, 8)), "gaussian")


def test_structures_are_measured_by_their_own_voxels():
    rng = np.random.default_rng(5)
    hu = rng.integers(-1500, 1500, (37, 10, 9)).astype(np.int16)
    made = (hu + rng.normal(0, 50, hu.shape)).astype(np.int16)
    labels = rng.integers(0, 5, hu.shape).astype(np.uint8)
    found = compare_structures(hu, made, labels, {"one": [1], "pair": [2, 4], "absent": [9]})
    assert set(found) == {"one", "pair"}
    for name, where in {"one": labels == 1, "pair": (labels == 2) | (labels == 4)}.items():
        a, b = (np.clip(v[where].astype(float), -1000, 1000) for v in (hu, made))
        assert found[name].voxels == where.sum()
        assert found[name].mae_hu == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
        assert found[name].bias_hu == pytest.approx((b - a).mean(), abs=1e-3)
        assert found[name].psnr_db == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2000), abs=1e-4)
    assert compare_structures(hu, hu, labels, {"one": [1]})["one"].psnr_db == math.inf
    with pytest.raises(MaisiError, match="one grid"):
        compare_structures(hu, made, labels[1:], {"one": [1]})


def peak_of(shape):
    hu = np.zeros(shape, np.int16)
    tracemalloc.start()
    compare(hu, hu)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_grows_by_the_windowed_copies_alone():
    shorter, longer = (64, 64, 64), (192, 64, 64)
    growth = (peak_of(longer) - peak_of(shorter)) / (128 * 64 * 64)
    assert growth < 20  # bytes a voxel; whole-volume float64 SSIM maps would take over 80


def test_what_depends_on_the_side_is_found() -> None:
    rng = np.random.default_rng(0)
    hu = np.where(rng.random((41, 12, 10)) < 0.5, 40, -1000).astype(np.int16)
    made, mirrored = hu.copy(), hu[:40].copy()
    assert mirror_hu(hu, made, mirrored) == 0
    made[30:] += 25  # what it makes of one side alone
    mirrored[30:] -= 15
    soft = hu[:40] == 40
    assert mirror_hu(hu, made, mirrored) == pytest.approx(40 * soft[30:].sum() / soft.sum(), rel=1e-5)
    assert mirror_hu(np.full_like(hu, -1000), made, mirrored) is None
