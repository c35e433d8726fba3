from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maisi.anatomy import ANY_BONE, BODY, UNNAMED_BONE
from maisi.data.phantom import phantom
from maisi.data.preprocess import resample, resample_to_grid
from maisi.data.segmentation import AIRWAY, LEFT_LUNG, RIGHT_LUNG, envelope, segment, with_organs
from maisi.io.nifti import read_labels, read_volume
from maisi.volume import Volume

LEFT_LOBES, RIGHT_LOBES, TRACHEA_AND_AIRWAY = (28, 29), (30, 31, 32), (57, 132)


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * np.count_nonzero(found & truth) / max(1, np.count_nonzero(found) + np.count_nonzero(truth)))


@pytest.fixture(scope="module")
def chest() -> tuple[Volume, Volume]:
    return phantom((88, 60, 66), (5.0, 5.0, 5.0), ("chest",), seed=1)


@pytest.fixture(scope="module")
def chest_found(chest: tuple[Volume, Volume]) -> np.ndarray:
    return segment(chest[0]).array


def test_a_chest(chest: tuple[Volume, Volume], chest_found: np.ndarray) -> None:
    truth = chest[1].array
    assert dice(chest_found > 0, truth > 0) > 0.98
    assert dice(chest_found == LEFT_LUNG, np.isin(truth, LEFT_LOBES)) > 0.95
    assert dice(chest_found == RIGHT_LUNG, np.isin(truth, RIGHT_LOBES)) > 0.95
    assert dice(chest_found == AIRWAY, np.isin(truth, TRACHEA_AND_AIRWAY)) > 0.75
    assert dice(chest_found == UNNAMED_BONE, np.isin(truth, ANY_BONE)) > 0.85
    assert set(np.unique(chest_found)) <= {0, LEFT_LUNG, RIGHT_LUNG, AIRWAY, UNNAMED_BONE, BODY}


def test_a_head_and_neck_has_airway_and_bone_but_no_lung() -> None:
    image, labels = phantom((60, 66, 72), (4.0, 4.0, 4.0), ("head-neck",), seed=1)
    found, truth = segment(image).array, labels.array
    assert dice(found > 0, truth > 0) > 0.98
    assert dice(found == AIRWAY, np.isin(truth, TRACHEA_AND_AIRWAY)) > 0.75
    assert dice(found == UNNAMED_BONE, np.isin(truth, ANY_BONE)) > 0.8
    assert np.count_nonzero(np.isin(found, (LEFT_LUNG, RIGHT_LUNG))) <= np.count_nonzero((truth >= 28) & (truth <= 32))


def test_bowel_gas_is_neither_lung_nor_airway() -> None:
    image, labels = phantom((88, 60, 52), (5.0, 5.0, 5.0), ("abdomen", "lower-body"), seed=2)
    colon_and_stomach = np.isin(labels.array, (12, 62)) & (image.array < -700)
    assert np.count_nonzero(colon_and_stomach) > 100
    assert np.mean(segment(image).array[colon_and_stomach] == BODY) > 0.95


@pytest.mark.parametrize(("order", "flips"), [((2, 0, 1), (0, 2)), ((1, 0, 2), (1,))])
def test_orientation_does_not_matter(
    chest: tuple[Volume, Volume], chest_found: np.ndarray, order: tuple[int, int, int], flips: tuple[int, ...]
) -> None:
    image = chest[0]
    affine = image.affine.copy()
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (image.shape[axis] - 1)
        affine[:3, axis] *= -1
    affine[:3, :3] = affine[:3, order]
    turned = Volume(np.flip(image.array, flips).transpose(order), affine)
    assert turned.to_ras().same_grid(image)
    np.testing.assert_array_equal(segment(turned).array, np.flip(chest_found, flips).transpose(order))


def test_a_table_that_touches_the_back_is_left_out(chest: tuple[Volume, Volume], chest_found: np.ndarray) -> None:
    image = chest[0]
    back = int(np.argmax((chest_found > 0).any(axis=(0, 2))))
    with_table = image.array.copy()
    table = (slice(10, -10), slice(back - 1, back + 1), slice(None))
    with_table[table] = np.maximum(with_table[table], 300)
    found = segment(image.with_array(with_table)).array
    assert dice(found > 0, chest_found > 0) > 0.98
    assert np.mean(found[10:30, back - 1, :] == 0) > 0.9


def test_a_strip_about_a_cord_is_body_where_the_labels_know_the_cord() -> None:
    """A neck of which all but a strip was cut away in the lower half, a cable beside it, and a label drawn in air."""
    x, y = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
    ct = Volume.from_spacing(np.full((40, 40, 40), -1000, np.int16), (3.0, 3.0, 3.0))
    labels = ct.with_array(np.zeros(ct.shape, np.uint8))
    ct.array[np.hypot(x - 20, y - 20) < 16, 20:] = 40
    strip, cord = np.hypot(x - 20, y - 20) < 2.4, np.hypot(x - 20, y - 20) < 1.5
    ct.array[strip, :20] = 30
    ct.array[np.hypot(x - 34, y - 20) < 2, :20] = 50
    body = envelope(ct).array
    assert not body[:, :, :16].any()
    labels.array[cord] = 121
    labels.array[4:9, 4:9, 4:9] = 5  # in air
    labels.array[0:34, 19:22, 30] = 6  # a little of it beyond the skin
    found = with_organs(ct, body, labels.array)
    np.testing.assert_array_equal(found[:, :, :16], np.repeat(strip[:, :, None], 16, axis=2))
    np.testing.assert_array_equal(found[:, :, 22:], body[:, :, 22:])
    turned = Volume(ct.array.transpose(2, 0, 1), ct.affine[:, [2, 0, 1, 3]])
    other = with_organs(turned, body.transpose(2, 0, 1), labels.array.transpose(2, 0, 1))
    np.testing.assert_array_equal(other.transpose(1, 2, 0), found)
    assert with_organs(ct, body, np.where(labels.array == 121, 139, labels.array).astype(np.uint8)) is body


def test_a_lung_without_its_chest_wall_is_still_body(chest: tuple[Volume, Volume], chest_found: np.ndarray) -> None:
    image, labels = chest
    edge = int(np.flatnonzero(np.isin(labels.array, LEFT_LOBES).any(axis=(1, 2)))[0]) + 4
    cut = Volume(image.array[edge:].copy(), image.affine)
    found, truth = segment(cut).array, np.isin(labels.array[edge:], LEFT_LOBES)
    assert dice(found == LEFT_LUNG, truth) > 0.8


def test_contrast_medium_in_the_heart_is_no_bone(chest: tuple[Volume, Volume]) -> None:
    image, labels = chest
    heart_and_aorta = np.isin(labels.array, (6, 115))
    bright = image.array.copy()
    bright[heart_and_aorta] += 380 - np.int16(np.median(bright[heart_and_aorta]))
    found = segment(image.with_array(bright)).array
    assert np.mean(found[heart_and_aorta] == UNNAMED_BONE) < 0.1
    assert dice(found == UNNAMED_BONE, np.isin(labels.array, ANY_BONE)) > 0.8


@pytest.mark.parametrize("mm", [1.5, 3.0, 4.5])
def test_trabeculae_tell_thick_bone_from_blood(mm: float) -> None:
    shape = tuple(round(n / mm) for n in (240, 180, 60))
    x, y, _ = np.indices(shape) * mm
    trabeculae = resample(
        Volume.from_spacing(np.random.default_rng(0).normal(0, 150, (60, 45, 15)), (4.0, 4.0, 4.0)), (mm,) * 3
    ).array
    noise = np.random.default_rng(1).normal(0, 12, shape)
    ct = np.where(np.hypot(x - 120, (y - 90) * 1.4) < 110, 40.0, -1000.0)
    blood, bone = np.hypot(x - 70, y - 90) < 20, np.hypot(x - 170, y - 90) < 20
    ct = np.where(blood | bone, 380, ct) + noise + np.where(bone, trabeculae[tuple(map(slice, shape))], 0)
    found = segment(Volume.from_spacing(ct.astype(np.int16), (mm,) * 3)).array
    assert np.mean(found[blood] == BODY) > 0.95
    assert np.mean(found[bone] == UNNAMED_BONE) > 0.9


def test_metal_is_no_bone(chest: tuple[Volume, Volume]) -> None:
    image = chest[0]
    place = tuple(slice(n // 2 - 1, n // 2 + 2) for n in image.shape)
    array = image.array.copy()
    array[place] = 3071
    assert not (segment(image.with_array(array)).array[place] == UNNAMED_BONE).any()


def test_fine_scans_keep_their_grid() -> None:
    image, labels = phantom((150, 120, 20), (1.0, 1.0, 3.0), ("head-neck",), seed=0)
    found = segment(image)
    assert found.same_grid(image)
    assert dice(found.array > 0, labels.array > 0) > 0.97


@pytest.mark.parametrize(("step", "count"), [(0.4, 54), (0.625, 102)])
def test_thin_sections_have_a_body_to_the_last(step: float, count: int) -> None:
    x, y = np.meshgrid(np.arange(60), np.arange(60), indexing="ij")
    section = np.where(np.hypot(x - 30, y - 30) < 24, 40, -1000).astype(np.int16)
    ct = Volume.from_spacing(np.repeat(section[:, :, None], count, axis=2), (3.0, 3.0, step))
    for body in (segment(ct).array > 0, envelope(ct).array):
        areas = body.sum(axis=(0, 1))
        assert areas.min() == areas.max() > 1500


def test_air_alone_is_nobody() -> None:
    empty = Volume.from_spacing(np.full((12, 12, 12), -1000, np.int16), (3, 3, 3))
    assert not segment(empty).array.any()


@pytest.mark.realdata
def test_bones_and_lungs_of_a_real_abdomen_agree_with_a_trained_segmenter(real_data: Path) -> None:
    from maisi.data.label_maps import apply_map, label_table

    folder = real_data / "totalsegmentator"
    found = segment(read_volume(folder / "abdomen_pelvis_ct.nii.gz")).array
    truth = apply_map(read_labels(folder / "abdomen_pelvis_labels.nii.gz").array, label_table("totalsegmentator"))
    assert dice(found == UNNAMED_BONE, np.isin(truth, ANY_BONE)) > 0.7
    assert dice(np.isin(found, (LEFT_LUNG, RIGHT_LUNG)), np.isin(truth, (*LEFT_LOBES, *RIGHT_LOBES))) > 0.7


@pytest.mark.realdata
def test_the_skeleton_of_a_real_chest_is_the_same_in_coarse_voxels(real_data: Path) -> None:
    ct = read_volume(real_data / "torso" / "nlst_149872_ct.nii.gz").to_ras()
    coarse = resample(ct, (3.0, 3.0, 3.0), order=1)
    fine = resample_to_grid(segment(ct), coarse, order=0)
    assert dice(segment(coarse).array == UNNAMED_BONE, fine.array == UNNAMED_BONE) > 0.85


@pytest.mark.parametrize("scale", [0.55, 0.65, 1.0])
def test_lungs_of_children_are_lungs(chest: tuple[Volume, Volume], scale: float) -> None:
    image, labels = (Volume(v.array, v.affine @ np.diag([scale, scale, scale, 1])) for v in chest)
    made = segment(image).array
    assert dice(np.isin(made, (LEFT_LUNG, RIGHT_LUNG)), np.isin(labels.array, LEFT_LOBES + RIGHT_LOBES)) > 0.93
    assert np.count_nonzero(made == AIRWAY) < 0.1 * np.count_nonzero(np.isin(made, (LEFT_LUNG, RIGHT_LUNG)))


@pytest.mark.parametrize("padding", [-2000, -3024, -32768])
def test_what_pads_a_scan_does_not_matter(padding: int) -> None:
    image, _ = phantom((160, 110, 24), (2.2, 2.2, 5.0), ("chest",), seed=1)
    fine = resample(image, (1.2, 1.2, 5.0))
    x, y, _ = np.indices(fine.shape)
    middle = np.array(fine.shape) / 2
    outside = (x - middle[0]) ** 2 + (y - middle[1]) ** 2 > (0.48 * fine.shape[1]) ** 2
    first, second = (
        fine.with_array(np.where(outside, value, fine.array).astype(np.int16)) for value in (-1024, padding)
    )
    assert np.array_equal(segment(first).array, segment(second).array)
    assert np.array_equal(envelope(first).array, envelope(second).array)
