from __future__ import annotations

import json
import re
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maisi.anatomy import (
    BODY,
    EXTENSION,
    KNOWN_IDS,
    LABELS,
    OPPOSITE,
    TARGET_VOLUME,
    TUMORS,
    UNNAMED_BONE,
    label_id,
    label_name,
)
from maisi.data.label_maps import (
    VOCABULARIES,
    apply_map,
    checked_mask,
    custom_vocabulary,
    ids_in,
    label_table,
    merge,
    translated,
    vocabulary,
)
from maisi.errors import MaisiError
from maisi.volume import Volume


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_tables_lead_to_ids_that_have_a_name(vocabulary: str) -> None:
    assert set(label_table(vocabulary).values()) <= KNOWN_IDS
    assert label_table(vocabulary)[0] == 0


def test_every_totalsegmentator_class_has_a_place_and_its_own() -> None:
    table = label_table("totalsegmentator")
    assert set(table) == set(range(118))
    targets = [ours for theirs, ours in table.items() if theirs]
    assert len(set(targets)) == 117


def test_totalsegmentator_names_agree_with_ours_word_by_word() -> None:
    text = resources.files("maisi.data").joinpath("totalsegmentator_labels.json").read_text(encoding="utf-8")
    same = {"urinary bladder": "bladder"}
    for name, entry in json.loads(text)["map"].items():
        words = same.get(name.replace("_", " "), name.replace("_", " "))
        assert sorted(words.lower().split()) == sorted(label_name(entry["to"]).lower().split())


def test_openkbp_keeps_the_sides() -> None:
    table = label_table("openkbp")
    assert table[3] == label_id("right parotid gland")
    assert table[4] == label_id("left parotid gland")
    assert table[8] == table[9] == table[10] == label_id("target volume")


def test_a_map_is_applied_voxel_by_voxel() -> None:
    labels = np.array([[[0, 5], [90, 5]]], np.int16)
    mapped = apply_map(labels, label_table("totalsegmentator"))
    assert mapped.dtype == np.uint8
    assert mapped.tolist() == [[[0, 1], [22, 1]]]


def test_ids_without_a_meaning_are_named_not_dropped() -> None:
    with pytest.raises(MaisiError, match="118"):
        apply_map(np.array([[[118]]]), label_table("totalsegmentator"))


def test_an_unknown_vocabulary_lists_those_that_exist() -> None:
    with pytest.raises(MaisiError, match="totalsegmentator"):
        label_table("nosuch")


def test_merging_lets_the_first_speak_and_the_body_last() -> None:
    organs = np.array([1, 0, 0, 0, 200], np.uint8)
    rules = np.array([133, 133, 200, 0, 28], np.uint8)
    envelope = np.array([0, 0, 0, 1, 0], np.uint8)
    merged = merge([organs, rules], body=envelope)
    assert merged.tolist() == [1, 133, BODY, BODY, 28]


def test_masks_of_different_shapes_do_not_merge() -> None:
    with pytest.raises(ValueError, match="shape"):
        merge([np.zeros((2, 2, 2)), np.zeros((3, 2, 2))])


def test_whole_reals_become_labels() -> None:
    mask = checked_mask(Volume.from_spacing(np.full((2, 3, 4), 28.0), (1, 1, 1)))
    assert mask.array.dtype == np.uint8
    assert (mask.array == 28).all()


@pytest.mark.parametrize(
    ("values", "word"),
    [([0, 250, 16], "16, 250"), ([-1, 200], "-1"), ([300, 1], "300"), ([0, 0], "empty"), ([0.5, 1], "fractions")],
)
def test_values_without_a_meaning_are_refused(values, word) -> None:
    with pytest.raises(MaisiError, match=word):
        checked_mask(Volume.from_spacing(np.array(values).reshape(-1, 1, 1), (1, 1, 1)))


def test_every_class_of_every_vocabulary_is_mapped_or_dropped_with_a_reason() -> None:
    sizes = {"totalsegmentator": 117, "vista3d": 132, "openkbp": 10}
    for name, size in sizes.items():
        words = vocabulary(name)
        classes = set(words.to) - {0}
        assert classes == set(range(1, size + 1))
        assert set(words.names) == classes
        assert {id for id in classes if words.to[id] == 0} == set(words.dropped)
        assert all(len(reason) > 10 for reason in words.dropped.values())


def test_vista3d_shares_the_ids_that_have_a_name_here() -> None:
    words = vocabulary("vista3d")
    for label in LABELS:
        if label.id <= 132 and not label.free:
            assert words.to[label.id] == label.id
            assert words.names[label.id] == label.name
    assert words.to[21] == UNNAMED_BONE
    assert words.to[130] == label_id("hepatic tumor")
    assert set(words.dropped) == {2, 16, 18, 20, 129}


def test_opposite_sides_are_each_others_opposite() -> None:
    assert all(OPPOSITE[OPPOSITE[id]] == id != OPPOSITE[id] for id in OPPOSITE)
    paired = {label.id for label in (*LABELS, *EXTENSION) if label.side}
    alone = {label_name(id) for id in paired - set(OPPOSITE)}
    assert alone == {"right lung middle lobe", "left atrial appendage"}


# ---- tables of users ---------------------------------------------------------------------------------------------

PAROTID = {"id": 150, "name": "salivary gland"}


def test_a_users_table_takes_ids_and_names_on_both_sides() -> None:
    table = {"7": 1, "Spleen": "spleen", "3": PAROTID, "dropped": {"12": "the couch"}}
    words = custom_vocabulary(table, "t.json", {9: "spleen", 7: "Leber"})
    assert dict(words.to) == {0: 0, 7: 1, 9: 3, 3: 150, 12: 0}
    assert dict(words.custom) == {150: "salivary gland"}
    assert dict(words.dropped) == {12: "the couch"}
    assert words.name_of(7) == "Leber (7)"
    assert words.name_of(12) == "12"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([], "no table"),
        ({"dropped": []}, "no table"),
        ({"spleen": 3}, "no class 'spleen'"),
        ({"1": "splen"}, "did you mean 'spleen'"),
        ({"1": 2}, "no id of `maisi labels`"),
        ({"1": True}, "no id of `maisi labels`"),
        ({"1": 1.0}, "no id of `maisi labels`"),
        ({"1": 0}, '"dropped"'),
        ({"0": 1}, "background"),
        ({"1": 3, "01": 4}, "twice"),
        ({"1": 3, "dropped": {"1": "no"}}, "twice"),
        ({"1": {"id": 150}}, '"id" and a "name"'),
        ({"1": {"id": 138, "name": "tongue"}}, "cannot be given"),
        ({"1": {"id": 200, "name": "tongue"}}, "cannot be given"),
        ({"1": {"id": 2, "name": "tongue"}}, "cannot be given"),
        ({"1": {"id": 256, "name": "tongue"}}, "cannot be given"),
        ({"1": {"id": 150, "name": "Liver"}}, "has the id 1 already"),
        ({"1": {"id": 150, "name": " "}}, "printed"),
        ({"1": {"id": 150, "name": "a"}, "2": {"id": 150, "name": "b"}}, "called both"),
        ({"1": {"id": 150, "name": "a"}, "2": {"id": 151, "name": "a"}}, "has the id 150 already"),
    ],
)
def test_a_wrong_table_is_refused_in_a_sentence(table: object, says: str) -> None:
    with pytest.raises(MaisiError, match=re.escape(says)):
        custom_vocabulary(table, "t.json")


# ---- large arrays in pieces --------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data())
def test_translation_is_that_of_single_voxels_in_any_memory_order(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([np.uint8, np.int16, np.int32, np.int64]))
    numbers = st.integers(0, 255) if kind == np.uint8 else st.integers(-300, 300)
    if kind == np.int64:
        numbers = st.integers(-(2**40), 2**40)
    array = data.draw(hnp.arrays(kind, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=numbers))
    if data.draw(st.booleans()):
        array = np.asfortranarray(array)
    array = array[:: data.draw(st.sampled_from([1, 2, -1]))]
    table = {int(id): data.draw(st.integers(0, 255)) for id in np.unique(array)}
    expected = np.vectorize(table.get, otypes=[np.uint8])(array)
    np.testing.assert_array_equal(translated(array, table), expected)
    assert ids_in(array) == tuple(sorted(table))


# ---- merging -----------------------------------------------------------------------------------------------------

LABELS_OF_A_VOXEL = st.sampled_from([0, 1, 3, 23, 26, 139, 150, 200])


@settings(derandomize=True, deadline=None, max_examples=80)
@given(columns=st.lists(st.lists(LABELS_OF_A_VOXEL, min_size=3, max_size=3), min_size=1, max_size=9), data=st.data())
def test_merging_keeps_the_stated_priority_voxel_by_voxel(columns: list[list[int]], data: st.DataObject) -> None:
    layers = [np.array(layer, np.uint8) for layer in zip(*columns, strict=True)]
    body = np.array([data.draw(st.booleans()) for _ in columns])
    merged = merge(layers, body)
    for voxel, inside, result in zip(columns, body, merged, strict=True):
        tumors = [id for id in voxel if id in TUMORS]
        organs = [id for id in voxel if id not in (0, BODY, TARGET_VOLUME)]
        rest = [id for id in voxel if id == TARGET_VOLUME]
        skin = [BODY] if inside or BODY in voxel else [0]
        assert result == (tumors + organs + rest + skin)[0]


def test_merging_leaves_its_inputs_alone() -> None:
    layers = [np.array([0, 1], np.uint8), np.array([3, 26], np.uint8)]
    assert merge(layers, np.array([1, 1])).tolist() == [3, 26]
    assert [layer.tolist() for layer in layers] == [[0, 1], [3, 26]]
