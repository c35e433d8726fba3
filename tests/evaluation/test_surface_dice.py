from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.evaluation.surface_dice import surface_dice


def _cube(shift: int = 0, side: int = 10, size: int = 24) -> np.ndarray:
    mask = np.zeros((size, size, size), bool)
    mask[4 + shift : 4 + shift + side, 4 : 4 + side, 4 : 4 + side] = True
    return mask


def test_the_same_surface_is_one_and_an_absent_one_is_zero() -> None:
    empty = np.zeros_like(_cube())
    assert surface_dice(_cube(), _cube(), (1, 1, 1), 0) == 1
    assert surface_dice(_cube(), empty, (1, 1, 1), 5) == 0
    assert surface_dice(empty, empty, (1, 1, 1), 5) is None


@pytest.mark.parametrize("spacing", [1.0, 2.5])
def test_a_shifted_cube_has_a_closed_form(spacing) -> None:
    # each of the 9 layers that both have shares a ring: ring on ring in 7, a face's rim on a ring in 2
    surface, shared = 10**3 - 8**3, 9 * (10**2 - 8**2)
    found = surface_dice(_cube(), _cube(1), (spacing, 1, 1), 0)
    assert found == pytest.approx(shared / surface)
    assert surface_dice(_cube(), _cube(1), (spacing, 1, 1), spacing) == 1
    # a tolerance below the shift reaches more only where it reaches neighbours along y or z, at 1 mm
    beside = spacing - 0.1 >= 1.0
    assert (surface_dice(_cube(), _cube(1), (spacing, 1, 1), spacing - 0.1) > found) == beside


@given(st.integers(0, 4), st.floats(0, 6), st.tuples(*[st.floats(0.5, 3)] * 3))
@settings(max_examples=25, deadline=None)
def test_symmetric_and_growing_with_the_tolerance(shift, tolerance, spacing) -> None:
    a, b = _cube(), _cube(shift, 8)
    one, other = (surface_dice(*pair, spacing, tolerance) for pair in ((a, b), (b, a)))
    assert one == pytest.approx(other)
    assert 0 <= one <= surface_dice(a, b, spacing, tolerance + 1) <= 1


def test_as_monai_counts_it() -> None:
    torch, metrics = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    from scipy import ndimage

    rng = np.random.default_rng(3)
    a, b = (ndimage.gaussian_filter(rng.standard_normal((20, 18, 16)), 2.5) > 0 for _ in range(2))
    spacing = (1.0, 1.5, 2.5)
    for tolerance in (0.0, 1.0, 2.5):
        theirs = metrics.compute_surface_dice(
            torch.tensor(a)[None, None].float(), torch.tensor(b)[None, None].float(), [tolerance],
            include_background=True, spacing=spacing,
        )  # fmt: skip
        assert surface_dice(a, b, spacing, tolerance) == pytest.approx(float(theirs), abs=1e-6)
