"""Metadata alone: what is written places the image as it was given, for us and for readers of scale and translation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.io.ome import attributes_of, label_names, level_path, place_of, stored_turn

HERE = Path("a.zarr")
SHAPE = (5, 6, 7)


def written(affine: np.ndarray, names: dict[int, str] | None = None):
    """Attributes as they come back from a file, and the array's shape."""
    turn = stored_turn(SHAPE, affine)
    return json.loads(json.dumps(attributes_of(turn, affine, {"synthetic": True}, names or {}))), turn.shape[::-1]


def straight(order, signs) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.array(signs) * (1.5, 2.0, 3.0))[:, list(order)]
    affine[:3, 3] = (10.5, -20, 300)
    return affine


@settings(derandomize=True, deadline=None, max_examples=60)
@given(order=st.permutations(range(3)), signs=st.tuples(*[st.sampled_from([-1, 1])] * 3))
def test_both_ways_of_telling_the_place_agree_where_no_axis_is_oblique(order, signs):
    affine = straight(order, signs)
    attributes, shape = written(affine)
    given = place_of(HERE, attributes, shape)
    np.testing.assert_array_equal(given.affine, affine)
    assert given.complete
    assert tuple(shape[axis] for axis in given.axes) == SHAPE
    del attributes["maisi"]
    told = place_of(HERE, attributes, shape)
    assert (told.axes, told.complete) == ((2, 1, 0), False)
    for corner in np.ndindex(2, 2, 2):
        voxel = np.array(corner) * (np.array(SHAPE) - 1)
        at = np.zeros(3)  # the same voxel in the array
        for i in range(3):
            at[given.axes[i]] = SHAPE[i] - 1 - voxel[i] if given.flipped[i] else voxel[i]
        np.testing.assert_allclose(told.affine @ [*at[list(told.axes)], 1], affine @ [*voxel, 1])


def test_an_oblique_affine_comes_back_to_the_last_bit():
    affine = straight((0, 1, 2), (1, 1, 1))
    affine[:3, :3] = affine[:3, :3] @ [[np.cos(0.3), -np.sin(0.3), 0.1], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]]
    attributes, shape = written(affine)
    np.testing.assert_array_equal(place_of(HERE, attributes, shape).affine, affine)
    scale, translation = (
        s[s["type"]] for s in attributes["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    )
    np.testing.assert_allclose(scale[::-1], np.linalg.norm(affine[:3, :3], axis=0))
    corner = affine @ [SHAPE[0] - 1, SHAPE[1] - 1, 0, 1]  # what the turn to LPS makes the first voxel
    np.testing.assert_allclose(translation[::-1], corner[:3] * [-1, -1, 1])


def test_our_affine_is_believed_only_while_it_agrees():
    attributes, shape = written(straight((2, 0, 1), (-1, 1, 1)))
    attributes["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"] = [6.0, 4.0, 3.0]
    place = place_of(HERE, attributes, shape)
    np.testing.assert_allclose(np.diag(place.affine), [-3, -4, 6, 1])
    assert not place.complete


def test_what_the_specification_asks_for():
    attributes, _ = written(np.eye(4), {5: "kidney", 2: "spleen"})
    (image,) = attributes["multiscales"]
    assert image["version"] == attributes["image-label"]["version"] == "0.4"
    assert level_path(attributes) == "0"
    assert [axis["type"] for axis in image["axes"]] == ["space"] * 3
    assert [step["type"] for step in image["datasets"][0]["coordinateTransformations"]] == ["scale", "translation"]
    rows = attributes["image-label"]["colors"]
    assert [row["label-value"] for row in rows] == [2, 5]
    assert all(len(row["rgba"]) == 4 and all(0 <= n <= 255 for n in row["rgba"]) for row in rows)
    assert label_names(attributes) == {2: "spleen", 5: "kidney"}
    assert "image-label" not in written(np.eye(4))[0]


@pytest.mark.parametrize(
    "label",
    [None, {}, {"properties": None}, {"properties": [{}]}, {"properties": [{"label-value": "x", "name": "y"}]}, [7]],
)
def test_labels_without_names_or_with_damaged_ones(label):
    assert label_names({"image-label": label}) == {}
    assert label_names({"ome": {"image-label": label}}) == {}
    assert label_names({}) == {}


def test_names_of_others():
    rows = [{"label-value": 1, "name": "liver"}, {"label-value": 2, "name": 7}]
    assert label_names({"ome": {"image-label": {"properties": rows}}}) == {1: "liver"}
