import numpy as np
import pytest

from maisi.anatomy import BODY, UNNAMED_BONE, label_id
from maisi.data.agreement import dice_by_group, joint_counts
from maisi.errors import MaisiError


def two_maps(seed=0):
    rng = np.random.default_rng(seed)
    a = rng.choice([0, 1, 5, 28, 32, 133, 200], size=(20, 15, 10)).astype(np.uint8)
    b = np.where(rng.random(a.shape) < 0.7, a, rng.choice([0, 1, 29, 200], size=a.shape)).astype(np.uint8)
    return a, b


def dice_of_sets(a, b, ids):
    first = {tuple(i) for i in np.argwhere(np.isin(a, list(ids)))}
    second = {tuple(i) for i in np.argwhere(np.isin(b, list(ids)))}
    return 2 * len(first & second) / (len(first) + len(second))


def test_dice_of_each_label_is_that_of_voxel_sets():
    a, b = two_maps()
    found = dice_by_group(joint_counts(a, b), {str(id): {id} for id in (1, 5, 28, 29, 32, 133, 200)})
    for id, value in found.items():
        assert value == pytest.approx(dice_of_sets(a, b, {int(id)}))


def test_dice_of_groups_is_that_of_voxel_sets():
    a, b = two_maps(1)
    found = dice_by_group(joint_counts(a, b))
    assert found["lungs"] == pytest.approx(dice_of_sets(a, b, range(28, 33)))
    assert found["skeleton"] == pytest.approx(dice_of_sets(a, b, {133}))
    assert found["body"] == pytest.approx(dice_of_sets(a, b, range(1, 256)))


def test_two_boxes_that_overlap_by_half():
    a, b = np.zeros((2, 8, 4, 4), np.uint8)
    a[0:4], b[2:6] = 1, 1
    assert dice_by_group(joint_counts(a, b), {"box": {1}}) == {"box": 0.5}


def test_names_of_parts_do_not_matter_within_a_group():
    vertebra, lobe = label_id("vertebrae L1"), 30
    a = np.array([[[vertebra, lobe, BODY, 0]]], np.uint8)
    b = np.array([[[UNNAMED_BONE, 28, 7, 0]]], np.uint8)
    assert dice_by_group(joint_counts(a, b)) == {"lungs": 1.0, "skeleton": 1.0, "body": 1.0}
    assert dice_by_group(joint_counts(a, b), {"L1": {vertebra}}) == {"L1": 0.0}


def test_absent_in_both_is_none_and_absent_in_one_is_zero():
    a, b = np.zeros((2, 3, 3, 3), np.uint8)
    assert dice_by_group(joint_counts(a, b)) == {"lungs": None, "skeleton": None, "body": None}
    a[0] = 28
    assert dice_by_group(joint_counts(a, b))["lungs"] == 0.0


def test_counts_of_parts_add_up():
    a, b = two_maps(2)
    parts = joint_counts(a[:7], b[:7]) + joint_counts(a[7:], b[7:])
    np.testing.assert_array_equal(parts, joint_counts(a, b))


def test_dice_does_not_depend_on_the_order():
    a, b = two_maps(3)
    assert dice_by_group(joint_counts(a, b)) == dice_by_group(joint_counts(b, a))


@pytest.mark.parametrize("bad", [np.full((2, 2, 2), 1.5), np.full((2, 2, 2), 256), np.full((2, 2, 2), -1)])
def test_values_that_are_no_labels_are_refused(bad):
    with pytest.raises(MaisiError, match="whole numbers"):
        joint_counts(bad, bad)


def test_different_grids_are_refused():
    with pytest.raises(MaisiError, match="one grid"):
        joint_counts(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8))
