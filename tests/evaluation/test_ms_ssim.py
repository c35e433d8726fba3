from __future__ import annotations

import numpy as np
import pytest
import torch

from maisi.errors import MaisiError
from maisi.evaluation.ms_ssim import WEIGHTS, ms_ssim, scales_for
from maisi.evaluation.reconstruction import ssim


def pair(shape, noise=0.1):
    rng = np.random.default_rng(0)
    grid = np.meshgrid(*[np.linspace(0, 6, n) for n in shape], indexing="ij")
    a = (np.sin(grid[0]) * np.cos(grid[1] + grid[2]) + 1) / 2
    return a.astype(np.float32), np.clip(a + noise * rng.normal(size=shape), 0, 1).astype(np.float32)


@pytest.mark.parametrize("shape", [(46, 44, 45), (24, 22, 30)])
def test_it_is_that_of_another_implementation(shape) -> None:
    metrics = pytest.importorskip("monai.metrics")
    a, b = pair(shape)
    scales = scales_for(shape)
    assert scales == {44: 3, 22: 2}[min(shape)]
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    theirs = metrics.MultiScaleSSIMMetric(3, data_range=1.0, kernel_size=11, kernel_sigma=1.5, weights=tuple(weights))
    expected = float(theirs(*(torch.from_numpy(v)[None, None] for v in (a, b))).item())
    assert ms_ssim(a, b) == pytest.approx(expected, abs=2e-4)


def test_one_scale_is_plain_ssim() -> None:
    a, b = pair((16, 15, 20))
    assert ms_ssim(a, b) == pytest.approx(ssim(a, b, "gaussian"), abs=1e-12)


def test_equal_volumes_are_alike_and_noise_makes_them_less_so() -> None:
    a, b = pair((24, 24, 24))
    _, c = pair((24, 24, 24), noise=0.4)
    assert ms_ssim(a, a) == pytest.approx(1.0)
    assert 0 < ms_ssim(a, c) < ms_ssim(a, b) < 1


def test_small_volumes_are_refused() -> None:
    assert scales_for((176, 200, 180)) == 5
    assert scales_for((10, 50, 50)) == 0
    with pytest.raises(MaisiError, match="11 voxels"):
        ms_ssim(np.zeros((10, 20, 20)), np.zeros((10, 20, 20)))
