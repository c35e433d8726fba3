import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy.spatial.transform import Rotation

from maisi.errors import MaisiError
from maisi.volume import Volume

SIGNED_AXES = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def rotation(x, y, z):
    """Rotate by x, y, z radians around the axes, one after the other."""
    turn = np.eye(3)
    for angle, (a, b) in zip((x, y, z), ((1, 2), (0, 2), (0, 1)), strict=True):
        step = np.eye(3)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


@st.composite
def volumes(draw):
    """Volumes of different values, stored in any axis order, tilted by up to 0.3 radians around each axis."""
    shape = draw(st.tuples(*[st.integers(1, 4)] * 3))
    order, signs = draw(st.sampled_from(SIGNED_AXES))
    tilt = rotation(*draw(st.tuples(*[st.floats(-0.3, 0.3)] * 3)))
    spacing = np.array(draw(st.tuples(*[st.floats(0.3, 6)] * 3)))
    affine = np.eye(4)
    affine[:3, :3] = (tilt @ (np.eye(3)[:, list(order)] * signs)) * spacing
    affine[:3, 3] = draw(st.tuples(*[st.floats(-500, 500)] * 3))
    return Volume(np.arange(np.prod(shape)).reshape(shape), affine)


def places(volume):
    """World position in mm of each value."""
    index = np.indices(volume.shape).reshape(3, -1)
    world = volume.affine[:3, :3] @ index + volume.affine[:3, 3:]
    return {int(v): world[:, i] for i, v in enumerate(volume.array.reshape(-1))}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(volumes())
def test_to_ras_moves_no_value(volume):
    ras = volume.to_ras()
    before, after = places(volume), places(ras)
    assert before.keys() == after.keys()
    assert all(np.allclose(before[v], after[v], atol=1e-6) for v in before)
    assert (np.diag(ras.affine)[:3] > 0).all()
    assert sorted(ras.spacing_mm) == pytest.approx(sorted(volume.spacing_mm))
    assert ras.array.flags.c_contiguous
    again = ras.to_ras()
    np.testing.assert_array_equal(again.array, ras.array)
    np.testing.assert_allclose(again.affine, ras.affine)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(volumes())
def test_to_ras_agrees_with_nibabel(volume):
    orientation = io_orientation(volume.affine)
    expected = apply_orientation(volume.array, orientation)
    ras = volume.to_ras()
    np.testing.assert_array_equal(ras.array, expected)
    np.testing.assert_allclose(ras.affine, volume.affine @ inv_ornt_aff(orientation, volume.shape), atol=1e-9)


def test_from_spacing_is_centred():
    volume = Volume.from_spacing(np.zeros((3, 4, 5)), (1.0, 2.0, 3.0))
    assert volume.spacing_mm == (1.0, 2.0, 3.0)
    np.testing.assert_allclose(volume.affine @ [1, 1.5, 2, 1], [0, 0, 0, 1])
    placed = Volume.from_spacing(np.zeros((3, 4, 5)), (1, 2, 3), origin_mm=(7, 8, 9))
    np.testing.assert_allclose(placed.affine[:3, 3], [7, 8, 9])


def test_same_grid_measures_at_the_corners():
    volume = Volume.from_spacing(np.zeros((100, 100, 100)), (1.0, 1.0, 1.0))
    moved = Volume(volume.array, volume.affine + np.diag([1e-4, 0, 0, 0]))
    assert volume.same_grid(volume.with_array(np.ones((100, 100, 100))))
    assert not volume.same_grid(moved)
    assert volume.same_grid(moved, tolerance_mm=0.1)
    assert not volume.same_grid(Volume(np.zeros((100, 100, 99)), volume.affine))


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((2, 2)), np.eye(4), "has 3 axes, this one has 2"),
        (np.zeros((2, 2, 2, 2)), np.eye(4), "has 3 axes, this one has 4"),
        (np.zeros((2, 0, 2)), np.eye(4), "is empty"),
        (np.zeros((2, 2, 2)), np.eye(3), "not a finite 4 x 4 matrix"),
        (np.zeros((2, 2, 2)), np.full((4, 4), np.nan), "not a finite 4 x 4 matrix"),
        (np.zeros((2, 2, 2)), np.diag([1.0, 0, 1, 1]), "singular"),
        (np.zeros((2, 2, 2)), np.diag([1.0, 1, 1, 2]), "last row"),
        (np.zeros((2, 2, 2)), np.eye(4)[[0, 0, 2, 3]], "singular"),
    ],
)
def test_bad_volumes(array, affine, message):
    with pytest.raises(MaisiError, match=message):
        Volume(array, affine)


def test_with_array_keeps_the_shape():
    volume = Volume.from_spacing(np.zeros((2, 3, 4)), (1, 1, 1))
    assert volume.with_array(np.ones((2, 3, 4))).array.max() == 1
    with pytest.raises(ValueError, match="differs"):
        volume.with_array(np.ones((2, 3, 5)))


def test_it_is_shown_without_its_voxels() -> None:
    shown = repr(Volume.from_spacing(np.zeros((5, 6, 7), np.int16), (1.0, 2.0, 2.5)))
    assert shown == "Volume(5 x 6 x 7 int16, 1 x 2 x 2.5 mm)"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_axes_are_named_each_once(seed: int) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(random_state=seed).as_matrix() @ np.diag([1.0, 2.0, 3.0])
    axes = Volume(np.zeros((2, 3, 4)), affine).axes
    assert sorted({"L": "R", "P": "A", "I": "S"}.get(letter, letter) for letter in axes) == ["A", "R", "S"]
    assert Volume(np.zeros((2, 3, 4)), np.diag([-1.0, -1.0, 1.0, 1.0])).axes == "LPS"
    permuted = np.array([[0, 0, 2.0, 0], [-1, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]])
    assert Volume(np.zeros((2, 3, 4)), permuted).axes == "PSR"
