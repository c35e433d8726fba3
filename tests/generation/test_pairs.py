"""Pairs with what was asked for in them: structures, tumours, sizes of organs; and what is written of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from maisi.anatomy import BODY, label_id
from maisi.data.phantom import phantom
from maisi.data.tumor_masks import equivalent_diameter_mm
from maisi.errors import MaisiError
from maisi.generation.job import make_job
from maisi.generation.pipeline import load
from maisi.request import Request

GRID = {"size": (64, 48, 32), "spacing": (6.0, 6.0, 8.0)}
LIVER = {"region": ("abdomen",), "structure": ("liver",), "tumor": "liver:40mm", **GRID, "retries": 0}


def test_structures_and_tumours_are_found_a_mask_without_one(model) -> None:
    one, two = model.generate_many(2, **LIVER)
    for item in (one, two):
        assert item.image.same_grid(item.labels)
        assert item.image.shape == GRID["size"]
        voxels = int((item.labels.array == 26).sum())
        assert equivalent_diameter_mm(voxels, item.labels.spacing_mm) == pytest.approx(40, rel=0.1)
        assert (item.labels.array == 1).any()
        assert "phantom" in item.details["mask_source"].lower()
        assert item.details["tumors"][0]["asked_mm"] == 40
    assert not np.array_equal(one.labels.array, two.labels.array)


def test_an_item_is_the_same_whatever_was_made_beside_it(model) -> None:
    among = list(model.generate_many(3, **LIVER, seed=5))[2]
    alone = model.generate(**LIVER, seed=5, item=2)
    assert np.array_equal(among.labels.array, alone.labels.array)
    assert np.array_equal(among.image.array, alone.image.array)


def test_tumours_grow_in_a_mask_that_is_given(model, chest_labels) -> None:
    healthy = chest_labels.with_array(np.where(chest_labels.array == 23, 28, chest_labels.array).astype(np.uint8))
    item = model.generate(mask=healthy, tumor="lung:30mm", retries=0)
    new = item.labels.array != healthy.array
    assert (item.labels.array[new] == 23).all()
    assert np.isin(healthy.array[new], (28, 32)).all()
    assert item.details["mask_source"] == ""


def test_there_is_air_where_the_mask_has_no_body(model, chest_labels) -> None:
    item = model.generate(mask=chest_labels, retries=0)
    assert (item.image.array[chest_labels.array == 0] == -1000).all()
    bodiless = chest_labels.with_array(np.where(chest_labels.array == BODY, 0, chest_labels.array).astype(np.uint8))
    free = model.generate(mask=bodiless, retries=0)
    assert not (free.image.array[bodiless.array == 0] == -1000).all()


def test_the_labels_written_are_those_to_keep_and_the_image_is_no_other(model, chest_labels) -> None:
    whole = model.generate(mask=chest_labels, retries=0)
    kept = model.generate(mask=chest_labels, retries=0, keep=("lung tumor", "left lung upper lobe"))
    assert np.array_equal(kept.image.array, whole.image.array)
    wanted = np.where(np.isin(whole.labels.array, (23, 28)), whole.labels.array, 0)
    assert np.array_equal(kept.labels.array, wanted)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_organs_get_the_size_asked_for(model, factor) -> None:
    labels = phantom((64, 56, 40), (5.0, 5.0, 6.0), ("abdomen",), 0)[1]
    job = make_job(Request.parse(anatomy_size={"liver": factor}), model.folder.config, labels)
    liver = label_id("liver")
    changed = job.of_item(0).labels
    assert changed is not None
    assert (changed.array == liver).sum() == pytest.approx(factor * (labels.array == liver).sum(), rel=0.03)
    assert np.array_equal(changed.array > 0, labels.array > 0)


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        ({"tumor": "liver:190mm", "region": "abdomen"}, "ask for at most"),
        ({"structure": ["brain", "bladder"]}, "brain"),
        ({"structure": "kidney tumor"}, "kidney tumor"),
    ],
)
def test_what_cannot_be_had_is_refused_before_any_network(model, wishes, sentence) -> None:
    with pytest.raises(MaisiError, match=sentence):
        make_job(Request.parse(**wishes, **GRID), model.folder.config)


def test_a_model_that_follows_no_masks_grows_no_tumours(model_folder, tmp_path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "plain")
    values = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**values, "controlnet": None}))
    plain = load(folder, device="cpu")
    with pytest.raises(MaisiError, match="follows no masks"):
        plain.generate(**LIVER)
