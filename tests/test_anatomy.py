import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maisi import anatomy
from maisi.errors import MaisiError

CONSECUTIVE = st.sets(st.sampled_from(anatomy.REGIONS), min_size=1)


def test_released_vocabulary_is_whole():
    ids = [label.id for label in anatomy.LABELS]
    assert ids == [*sorted(set(ids) - {200}), 200]
    assert set(ids) == {*range(1, 133), 200}
    assert sum(label.free for label in anatomy.LABELS) == 8


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("liver", 1),
        ("Left Kidney", 14),
        ("kidney_left", 14),
        ("vertebrae_L5", 33),
        ("rib-right-12", 86),
        ("vertebrae S1", 127),
        ("airway", 132),
        ("body", 200),
        ("background", 0),
        ("bone unnamed", anatomy.UNNAMED_BONE),
        ("left parotid gland", 134),
        ("target volume", 139),
    ],
)
def test_label_id_accepts_the_ways_people_write(name, id):
    assert anatomy.label_id(name) == id


def test_names_and_ids_are_inverse():
    for label in anatomy.LABELS + anatomy.EXTENSION:
        assert anatomy.label_id(label.name) == label.id
        assert anatomy.label_name(label.id) == label.name


def test_wrong_names_get_the_nearest():
    with pytest.raises(MaisiError, match=r"'livr' \(did you mean 'liver'\?\)"):
        anatomy.label_id("livr")
    with pytest.raises(MaisiError, match="did you mean 'left kidney'"):
        anatomy.label_id("left_kidny")
    with pytest.raises(MaisiError, match="141 has no name"):
        anatomy.label_name(141)


def test_every_id_is_either_known_or_free():
    assert set(range(256)) == anatomy.KNOWN_IDS | anatomy.FREE_IDS
    assert not anatomy.KNOWN_IDS & anatomy.FREE_IDS
    assert {0, 1, 133, 140, 200} <= anatomy.KNOWN_IDS
    assert {2, 16, 18, 20, 21, 129, 130, 131, 141, 199, 201, 255} <= anatomy.FREE_IDS


def test_sides_are_those_of_the_names():
    sides = {label.id: label.side for label in anatomy.LABELS + anatomy.EXTENSION}
    assert (sides[5], sides[14], sides[1], sides[134]) == ("right", "left", "", "left")
    assert sum(side == "left" for side in sides.values()) == sum(side == "right" for side in sides.values())


def test_groups_hold_what_their_names_say():
    assert all("lung" in anatomy.label_name(i) and "lobe" in anatomy.label_name(i) for i in anatomy.LUNGS)
    bones = ("vertebrae", "rib", "humerus", "scapula", "clavicula", "femur", "hip", "sacrum", "skull", "sternum")
    named = {label.id for label in anatomy.LABELS if any(bone in label.name.split() for bone in bones)}
    assert set(anatomy.SKELETON) == named
    assert set(anatomy.ANY_BONE) - named == {anatomy.UNNAMED_BONE, anatomy.MANDIBLE}
    assert anatomy.label_name(anatomy.MANDIBLE) == "mandible"
    assert anatomy.label_name(anatomy.BODY) == "body"


def test_tumors_have_hosts_that_are_organs():
    assert {anatomy.label_name(i) for i in anatomy.TUMORS} == {
        "lung tumor",
        "pancreatic tumor",
        "hepatic tumor",
        "colon cancer primaries",
        "bone lesion",
        "kidney tumor",
    }
    hosts = {anatomy.label_name(t): {anatomy.label_name(h) for h in hs} for t, hs in anatomy.TUMORS.items()}
    assert hosts["hepatic tumor"] == {"liver"}
    assert hosts["pancreatic tumor"] == {"pancreas"}
    assert hosts["colon cancer primaries"] == {"colon"}
    assert "sternum" in hosts["bone lesion"]
    assert not set(anatomy.TUMORS) & {host for hs in anatomy.TUMORS.values() for host in hs}


@pytest.mark.parametrize(
    ("name", "region"),
    [
        ("head", "head-neck"),
        ("Head_and_Neck", "head-neck"),
        ("head-neck", "head-neck"),
        ("THORAX", "chest"),
        ("abdomen", "abdomen"),
        ("pelvis", "lower-body"),
        ("lower body", "lower-body"),
        ("legs", "lower-body"),
    ],
)
def test_region_names(name, region):
    assert anatomy.parse_region(name) == region


def test_unknown_region_lists_those_that_exist():
    with pytest.raises(MaisiError, match=r"'abdomn' \(did you mean 'abdomen'\?\); choose from head-neck, chest"):
        anatomy.parse_region("abdomn")


@given(CONSECUTIVE)
def test_regions_present_are_contiguous_and_in_order(regions):
    ids = [anatomy.REGION_MARKERS[region][-1] for region in regions]
    order = [anatomy.REGIONS.index(region) for region in regions]
    present = anatomy.regions_present([0, 200, 6, *ids])
    assert present == anatomy.REGIONS[min(order) : max(order) + 1]


def test_regions_of_nothing_are_unknown():
    assert anatomy.regions_present([0, 200, 6]) == ()


def test_region_markers_of_released_ids():
    released = {r: {i for i in ids if i <= 132} for r, ids in anatomy.REGION_MARKERS.items()}
    assert released == {
        "head-neck": {22, 120},
        "chest": {28, 29, 30, 31, 32},
        "abdomen": {1, 2, 3, 4, 5, 14},
        "lower-body": {93, 94},
    }


def test_modalities():
    assert anatomy.MODALITIES["ct"] == 1
    assert anatomy.parse_modality("MRI-T1") == "mri_t1"
    with pytest.raises(MaisiError, match="did you mean 'mri'"):
        anatomy.parse_modality("mr")


def test_words_need_no_torch():
    code = (
        "import sys, json, maisi.anatomy, maisi.conditions, maisi.request, maisi.volume;"
        "print(json.dumps([m for m in ('torch', 'scipy', 'nibabel', 'matplotlib') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("name", ["lungs", "lung", "Lungs"])
def test_lungs_are_their_lobes(name) -> None:
    assert anatomy.named_sides(name) == anatomy.LUNGS
