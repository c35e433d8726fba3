from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import ndimage

from maisi.anatomy import ANY_BONE, BODY, KNOWN_IDS, LUNGS, REGION_MARKERS, REGIONS, label_id
from maisi.data.phantom import phantom
from maisi.data.regions import ids_in, regions_of
from maisi.errors import MaisiError
from maisi.volume import Volume

WHOLE = (96, 56, 128), (5.5, 5.5, 9.0)

HU_RANGES = {  # of the quality check: organs' medians in real CT
    "liver": ((1,), -22, 162),
    "spleen": ((3,), -43, 184),
    "pancreas": ((4,), -57, 150),
    "kidneys": ((5, 14), -131, 268),
    "lungs": (LUNGS, -1089, -367),
    "brain": ((22,), -305, 370),
    "bone": (ANY_BONE, 71, 1000),
}


def centre_of(labels: Volume, name: str) -> np.ndarray:
    places = np.argwhere(labels.array == label_id(name)).mean(0)
    return labels.affine[:3, :3] @ places + labels.affine[:3, 3]


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_shows_its_markers(region: str) -> None:
    _, labels = phantom((80, 80, 64), (5, 5, 4), (region,), seed=1)
    assert set(ids_in(labels.array)) & set(REGION_MARKERS[region])
    assert region in regions_of(labels.array)


def test_the_whole_body_has_more_than_a_hundred_structures_of_the_released_vocabulary() -> None:
    _, labels = phantom(*WHOLE, seed=0)
    ids = set(ids_in(labels.array))
    assert len(ids) > 100
    assert ids <= {id for id in KNOWN_IDS if id <= 132 or id == BODY}
    assert regions_of(labels.array) == REGIONS


@pytest.mark.parametrize("seed", range(4))
def test_organs_have_the_hu_of_real_ones(seed: int) -> None:
    image, labels = phantom((80, 56, 120), (5.5, 5.5, 8.0), ("head-neck", "chest", "abdomen"), seed)
    for name, (ids, low, high) in HU_RANGES.items():
        median = np.median(image.array[np.isin(labels.array, ids)])
        assert low <= median <= high, name


def test_left_is_left_and_up_is_up() -> None:
    _, labels = phantom(*WHOLE, seed=3)
    for pair in ("kidney", "femur", "lung upper lobe", "humerus", "rib 5"):
        assert centre_of(labels, f"left {pair}")[0] < 0 < centre_of(labels, f"right {pair}")[0]
    assert centre_of(labels, "spleen")[0] < centre_of(labels, "stomach")[0] < centre_of(labels, "liver")[0]
    heights = [centre_of(labels, name)[2] for name in ("brain", "heart", "liver", "bladder")]
    assert heights == sorted(heights, reverse=True)
    assert centre_of(labels, "sternum")[1] > centre_of(labels, "heart")[1] > centre_of(labels, "spinal cord")[1]
    spine = [centre_of(labels, f"vertebrae {name}")[2] for name in ("C3", "T1", "T12", "L1", "L5")]
    assert spine == sorted(spine, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_liver_and_spleen_lie_within_the_ribs(seed: int) -> None:
    """None of them is nearer to the skin, in its slice, than nearly all that there is of ribs."""
    labels = phantom((100, 70, 44), (4, 4, 6), ("chest", "abdomen"), seed)[1].array
    slices = [ndimage.distance_transform_edt(labels[:, :, z] > 0, sampling=4) for z in range(labels.shape[2])]
    depth = np.stack(slices, axis=-1)
    ribs = np.isin(labels, [label_id(f"{side} rib {n}") for side in ("left", "right") for n in range(1, 13)])
    for organ in ("liver", "spleen"):
        assert depth[labels == label_id(organ)].min() > np.percentile(depth[ribs], 2)


def test_the_same_seed_gives_the_same_body_and_another_a_different_one() -> None:
    first, again, other = (phantom((40, 40, 40), (8, 8, 8), ("chest",), seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first[0].array, again[0].array)
    np.testing.assert_array_equal(first[1].array, again[1].array)
    assert np.mean(first[1].array != other[1].array) > 0.03


def test_grids_of_other_spacing_and_region_show_the_same_body() -> None:
    _, coarse = phantom((33, 33, 33), (10, 10, 8), ("chest",), seed=2)
    _, fine = phantom((65, 65, 65), (5, 5, 4), ("chest",), seed=2)
    assert np.mean(coarse.array == fine.array[::2, ::2, ::2]) > 0.999
    _, lower = phantom((33, 33, 65), (10, 10, 8), ("chest", "abdomen"), seed=2)
    for name in ("heart", "left lung lower lobe"):
        np.testing.assert_allclose(centre_of(coarse, name)[:2], centre_of(lower, name)[:2], atol=6)


def test_image_and_labels_agree_on_where_the_body_is() -> None:
    image, labels = phantom((64, 64, 64), (6, 6, 4), ("abdomen",), seed=0)
    assert image.same_grid(labels)
    assert (image.array.dtype, labels.array.dtype) == (np.int16, np.uint8)
    assert np.percentile(image.array[labels.array == 0], 99) < -800
    assert np.median(image.array[labels.array == BODY]) > -150
    assert np.mean(image.array[labels.array > 0] < -900) < 0.05


@pytest.mark.parametrize("size", [(1, 1, 1), (7, 40, 3), (16, 16, 90)])
def test_any_size_will_do(size: tuple[int, int, int]) -> None:
    image, labels = phantom(size, (3.1, 2.0, 5.0), (), seed=1)
    assert image.shape == labels.shape == size
    np.testing.assert_allclose(image.spacing_mm, (3.1, 2.0, 5.0))


def test_it_is_quick() -> None:
    start = time.process_time()
    phantom((128, 128, 128), (3, 3, 3), ("chest",), seed=0)
    assert time.process_time() - start < 3


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(MaisiError, match="chest"):
        phantom((8, 8, 8), (1, 1, 1), ("chst",))
    with pytest.raises(MaisiError, match="positive"):
        phantom((8, 0, 8), (1, 1, 1))
    with pytest.raises(MaisiError, match="positive"):
        phantom((8, 8, 8), (1, -1, 1))
