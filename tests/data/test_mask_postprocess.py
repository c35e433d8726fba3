"""Cleaned maps: properties that hold for any map, and each rule on a map made for it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from maisi.anatomy import TUMORS
from maisi.data.mask_postprocess import SEVERAL_PARTS, clean, resample_smooth
from maisi.data.phantom import phantom
from maisi.volume import Volume

IDS = (0, 0, 200, 200, 1, 26, 6, 28, 23)


@st.composite
def maps(draw: st.DrawFn) -> np.ndarray:
    """Boxes thrown over each other, then speckle: many parts, holes and contacts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = np.zeros((11, 10, 9), np.uint8)
    for _ in range(draw(st.integers(0, 12))):
        low = rng.integers(0, 8, 3)
        x, y, z = (slice(a, a + rng.integers(1, 7)) for a in low)
        labels[x, y, z] = rng.choice(IDS)
    speckled = rng.random(labels.shape) < draw(st.sampled_from([0.0, 0.05, 0.3]))
    labels[speckled] = rng.choice(IDS, int(speckled.sum()))
    return labels


def parts(mask: np.ndarray) -> list[int]:
    found, count = ndimage.label(mask, np.ones((3, 3, 3)))
    return sorted(np.bincount(found.ravel())[1:].tolist()) if count else []


@settings(max_examples=120, deadline=None)
@given(maps())
def test_properties(labels: np.ndarray) -> None:
    given_map = labels.copy()
    made = clean(labels)
    assert (labels == given_map).all()
    assert set(np.unique(made)) <= set(np.unique(labels)) | {0}
    assert (clean(made) == made).all()
    for id in set(np.unique(made).tolist()) - {0, 200}:
        sizes = parts(made == id)
        assert sizes[0] >= 0.05 * sizes[-1]
        assert id in SEVERAL_PARTS or len(sizes) == 1
    body = parts(made > 0)
    assert not body or body[0] >= 0.05 * body[-1]
    for tumour, hosts in TUMORS.items():
        near = ndimage.binary_dilation(np.isin(made, hosts), np.ones((3, 3, 3)))
        found, count = ndimage.label(made == tumour, np.ones((3, 3, 3)))
        assert all(near[found == part].any() for part in range(1, count + 1))


def test_rules() -> None:
    labels = np.zeros((30, 30, 12), np.uint8)
    labels[2:28, 2:28] = 200
    labels[4:16, 4:16, 2:10] = 1
    labels[8, 8, 5] = 200  # a hole in the liver
    labels[9, 9, 5] = 26  # a tumour in it
    labels[22:26, 22:26, 4:6] = 1  # another liver
    labels[24, 5, 6] = 26  # a tumour far from it
    labels[20:24, 4:8, 2:10] = 6
    labels[20:24, 12:16, 2:8] = 6  # a vessel may be in two parts
    labels[20, 24, 3] = 6  # but not in a crumb
    labels[10:12, 20:22, 6] = 0  # air inside the body
    labels[0, 0, 0] = 200  # a crumb outside it
    made = clean(labels)
    wanted = labels.copy()
    wanted[8, 8, 5] = 1
    wanted[22:26, 22:26, 4:6] = 200
    wanted[24, 5, 6] = wanted[20, 24, 3] = 200
    wanted[10:12, 20:22, 6] = 200
    wanted[0, 0, 0] = 0
    assert (made == wanted).all()


def test_gap_between_arm_and_trunk_stays() -> None:
    labels = np.zeros((20, 20, 4), np.uint8)
    labels[1:19, 1:19] = 200
    labels[5:15, 5:15] = 0
    assert (clean(labels) == labels).all()


def test_a_whole_body_hardly_changes() -> None:
    labels = phantom((48, 36, 48), (8, 8, 8), ("chest",), 3)[1].array
    made = clean(labels)
    assert (made != labels).mean() < 0.02
    assert set(np.unique(labels)) - set(np.unique(made)) == set()


def test_smooth_resampling_keeps_place_and_volume() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
    labels = np.full((24, 24, 24), 200, np.uint8)
    labels[np.square(grid - 11.5).sum(0) < 64] = 1
    made = resample_smooth(Volume.from_spacing(labels, (6, 6, 6)), (2, 2, 2))
    assert made.shape == (72, 72, 72)
    assert set(np.unique(made.array)) == {1, 200}
    places = np.argwhere(made.array == 1)
    np.testing.assert_allclose(places.mean(0), 35.5, atol=0.1)
    # the ball, not the blocks it was made of, whose corners stand out further
    radius = np.linalg.norm(places - 35.5, axis=1).max() / 3
    assert radius < 8.3 < np.sqrt(np.square(np.argwhere(labels == 1) - 11.5).sum(1)).max() + 0.87
    assert abs(len(places) / 27 / (labels == 1).sum() - 1) < 0.05
