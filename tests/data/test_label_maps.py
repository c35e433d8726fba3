from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest

from maisi.anatomy import BODY, KNOWN_IDS, label_id, label_name
from maisi.data.label_maps import VOCABULARIES, apply_map, checked_mask, label_table, merge
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
