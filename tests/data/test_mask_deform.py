from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from maisi.anatomy import ANY_BONE, label_id
from maisi.data.mask_deform import (
    GRADIENT_LIMIT,
    Deformation,
    DeformationRanges,
    deform,
    draw_deformation,
    scale_organ,
    scale_organs,
)
from maisi.data.phantom import phantom, phantom_labels
from maisi.errors import MaisiError
from maisi.request import ORGAN_SIZE_RANGE
from maisi.volume import Volume

NONE = DeformationRanges(rotate_degrees=0, zoom=(1, 1), shear=0, elastic_mm=0)
PIECE = np.ones((3, 3, 3))
ranges = st.builds(
    DeformationRanges,
    rotate_degrees=st.floats(0, 30),
    zoom=st.tuples(st.floats(0.7, 1), st.floats(1, 1.4)),
    shear=st.floats(0, 0.2),
    elastic_mm=st.floats(0, 25),
    elastic_grid_mm=st.floats(5, 200),
)


@pytest.fixture(scope="module")
def abdomen() -> Volume:
    return phantom_labels((120, 90, 70), (3.2, 3.2, 4), ("abdomen",), seed=3)


def drawn(volume: Volume, bounds: DeformationRanges, seed: int = 0) -> Deformation:
    return draw_deformation(np.random.default_rng(seed), bounds, volume)


@settings(max_examples=40, deadline=None)
@given(bounds=ranges, seed=st.integers(0, 2**32))
def test_no_draw_folds(bounds, seed) -> None:
    volume = Volume.from_spacing(np.zeros((40, 30, 20), np.uint8), (7, 9, 12))
    deformation = drawn(volume, bounds, seed)
    assert deformation.steepness() <= GRADIENT_LIMIT + 1e-9
    # a second way: the positions along each axis, read from ramps, have a Jacobian of one sign everywhere
    ramps = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float64) for n in volume.shape], indexing="ij")) + 1000
    inside = (slice(12, -12), slice(8, -8), slice(6, -6))
    places = np.stack([deform(volume.with_array(ramp), deformation, order=1).array for ramp in ramps])
    jacobian = np.stack([np.stack(np.gradient(place)) for place in places])[:, :, *inside]
    clipped = np.any([(p <= 1000) | (p >= 999 + n) for p, n in zip(places, volume.shape, strict=True)], axis=0)
    free = ~ndimage.binary_dilation(clipped, iterations=2)[inside]
    assert (np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))[free] > 0).all()


@settings(max_examples=15, deadline=None)
@given(bounds=ranges, seed=st.integers(0, 2**32))
def test_ids_are_never_invented_and_an_image_follows(bounds, seed) -> None:
    generator = np.random.default_rng(1)
    ids = generator.choice(np.array([0, 1, 4, 200], np.uint8), (9, 8, 7)).repeat(3, 0).repeat(3, 1)
    volume = Volume.from_spacing(ids, (2, 2.5, 4))
    deformation = drawn(volume, bounds, seed)
    moved = deform(volume, deformation)
    assert set(np.unique(moved.array)) <= {0, 1, 4, 200}
    assert moved.array.dtype == np.uint8
    assert moved.same_grid(volume)
    # one field for all: moving each label alone gives the same partition, so an interface stays one
    for id in (0, 1, 4, 200):
        alone = deform(volume.with_array((ids == id).astype(np.uint8)), deformation)
        np.testing.assert_array_equal(alone.array == 1, moved.array == id)


def test_label_and_image_stay_together(abdomen) -> None:
    ct, labels = phantom((64, 48, 40), (6, 6, 6), ("abdomen",), seed=3)
    deformation = drawn(labels, DeformationRanges(rotate_degrees=10, elastic_mm=8))
    image, mask = deform(ct, deformation, order=1), deform(labels, deformation)
    assert image.array.dtype == np.int16
    assert (mask.array != labels.array).mean() > 0.05
    bone = np.isin(mask.array, ANY_BONE)
    assert image.array[bone].mean() > image.array[mask.array == 200].mean() + 100
    assert (image.array[ndimage.binary_erosion(mask.array == 0, iterations=2)] < -800).mean() > 0.999


def test_nothing_asked_changes_nothing(abdomen) -> None:
    deformation = drawn(abdomen, NONE)
    np.testing.assert_array_equal(deform(abdomen, deformation).array, abdomen.array)


def test_same_seed_same_bytes(abdomen) -> None:
    def digest(seed: int) -> str:
        return hashlib.sha256(deform(abdomen, drawn(abdomen, DeformationRanges(), seed)).array.tobytes()).hexdigest()

    assert digest(0) == digest(0) != digest(1)


def test_a_turn_is_a_turn_in_mm() -> None:
    """A ball off centre moves on its circle, whatever the voxels; zoom scales its volume."""
    volume = Volume.from_spacing(np.zeros((80, 60, 40), np.uint8), (2, 3, 4))
    x, y, z = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip((80, 60, 40), (2, 3, 4), strict=True)],
                          indexing="ij")  # fmt: skip
    ball = volume.with_array(((x - 40) ** 2 + y**2 + z**2 < 15**2).astype(np.uint8))
    angle, zoom = np.radians(20), 1.2
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    moved = deform(ball, Deformation(turn.T / zoom, np.zeros((3, 2, 2, 2)), (160.0, 180.0, 160.0))).array == 1
    middle = [x[moved].mean(), y[moved].mean(), z[moved].mean()]
    np.testing.assert_allclose(middle, zoom * turn @ [40, 0, 0], atol=0.7)
    assert moved.sum() / ball.array.sum() == pytest.approx(zoom**3, rel=0.05)


def test_orientation_plays_no_part(abdomen) -> None:
    flipped = Volume(np.transpose(abdomen.array[::-1], (2, 0, 1)), abdomen.affine @ np.array(
        [[0, -1, 0, abdomen.shape[0] - 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]]))  # fmt: skip
    np.testing.assert_array_equal(flipped.to_ras().array, abdomen.array)
    a, b = (deform(v, drawn(v, DeformationRanges(), 5)) for v in (abdomen, flipped))
    assert b.same_grid(flipped)
    np.testing.assert_array_equal(b.to_ras().array, a.array)


def test_a_draw_serves_other_voxels_of_the_same_view_and_no_other_view(abdomen) -> None:
    coarse = phantom_labels((60, 45, 35), (6.4, 6.4, 8), ("abdomen",), seed=3)
    fine = deform(abdomen, drawn(coarse, DeformationRanges(), 2))
    np.testing.assert_array_equal(fine.array, deform(abdomen, drawn(abdomen, DeformationRanges(), 2)).array)
    with pytest.raises(MaisiError, match="field of view"):
        deform(Volume.from_spacing(np.zeros((5, 5, 5)), (1, 1, 1)), drawn(abdomen, DeformationRanges()))


@pytest.mark.parametrize(
    "values",
    [{"rotate_degrees": 31}, {"elastic_mm": -1}, {"zoom": (1.1, 0.9)}, {"zoom": (0.5, 1)}, {"shear": float("nan")}],
)
def test_bounds_out_of_range_are_refused(values) -> None:
    with pytest.raises(MaisiError):
        DeformationRanges(**values)


def test_a_fold_is_refused() -> None:
    points = np.zeros((3, 3, 3, 3))
    points[0, 1, 1, 1] = 40
    with pytest.raises(MaisiError, match="folds"):
        Deformation(np.eye(3), points, (100.0, 100.0, 100.0))
    with pytest.raises(MaisiError, match="mirrors"):
        Deformation(np.diag([-1.0, 1, 1]), np.zeros((3, 2, 2, 2)), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["liver", "pancreas", "spleen", "aorta", "stomach"])
@pytest.mark.parametrize("factor", [0.3, 0.8, 1.4, 2.0])
def test_a_structure_gets_its_volume_and_the_rest_stays_sound(abdomen, name, factor) -> None:
    id, old = label_id(name), abdomen.array
    new = scale_organ(old, abdomen.spacing_mm, id, factor)
    assert (new == id).sum() / (old == id).sum() == pytest.approx(factor, rel=0.005)
    assert ndimage.label(new == id, PIECE)[1] <= ndimage.label(old == id, PIECE)[1]
    np.testing.assert_array_equal(new == 0, old == 0)
    for bone in ANY_BONE:
        np.testing.assert_array_equal(new == bone, old == bone)
    assert set(np.unique(new)) == set(np.unique(old))
    before, after = (np.bincount(a.ravel(), minlength=256) for a in (old, new))
    others = np.flatnonzero(before)[2:]
    others = others[(others != id) & (others != 200)]
    assert (after[others] >= 0.75 * before[others]).all()
    if factor < 1:
        assert (np.isin(new[new != old], [200])).all()
    else:
        assert (new[old == id] == id).all()


def test_a_neighbour_is_pushed_not_eaten() -> None:
    labels = np.full((60, 60, 60), 200, np.uint8)
    x, y, z = np.ogrid[:60, :60, :60]
    labels[(x - 20) ** 2 + (y - 30) ** 2 + (z - 30) ** 2 < 100] = 1
    labels[32:36, 25:35, 25:35] = 10
    new = scale_organ(labels, (1, 1, 1), 1, 2.0)
    assert np.nonzero(new == 10)[0].mean() > np.nonzero(labels == 10)[0].mean() + 0.5
    assert (new == 10).sum() >= 0.75 * (labels == 10).sum()


def test_no_room_says_what_fits() -> None:
    labels = np.full((20, 20, 20), 120, np.uint8)
    labels[5:15, 5:15, 5:15] = 22
    labels[15, 5:15, 5:15] = 200
    with pytest.raises(MaisiError, match=r"largest factor here is 1\.10"):
        scale_organ(labels, (1, 1, 1), 22, 2.0)


def test_an_absent_structure_is_refused_before_anything_changes(abdomen) -> None:
    with pytest.raises(MaisiError, match="brain"):
        scale_organs(abdomen, {1: 1.2, 22: 1.2})
    with pytest.raises(MaisiError, match="range"):
        scale_organs(abdomen, {1: ORGAN_SIZE_RANGE[1] + 0.1})
    both = scale_organs(abdomen, {5: 0.5, 14: 0.5}).array
    for id in (5, 14):
        assert (both == id).sum() / (abdomen.array == id).sum() == pytest.approx(0.5, abs=0.01)
