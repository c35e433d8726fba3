"""Sizes: read from words, measured on maps, completed from training cases."""

from __future__ import annotations

import numpy as np
import pytest

from maisi.anatomy import TUMORS, label_name
from maisi.data.anatomy_sizes import (
    ABSENT,
    SIZED,
    TRAINING_KEY,
    MaskCase,
    MaskTraining,
    complete_sizes,
    context,
    measure_ml,
    named_sizes,
    parse_sizes,
    relative_sizes,
    training_of,
)
from maisi.errors import MaisiError


def case(region: str, **sizes: float) -> MaskCase:
    return MaskCase(regions=(region,), sizes=tuple(sizes.get(label_name(id).replace(" ", "_"), ABSENT) for id in SIZED))


def test_order_is_the_released_one() -> None:
    names = ["gallbladder", "liver", "stomach", "pancreas", "colon", "lung tumor", "pancreatic tumor", "hepatic tumor"]
    assert [label_name(id) for id in SIZED] == [*names, "colon cancer primaries", "bone lesion"]
    assert set(SIZED[5:]) == {id for id in TUMORS if id <= 132}  # the kidney's is maisi's own


def test_sizes_in_words() -> None:
    assert parse_sizes(["pancreas=0.7", "Hepatic_Tumour=0.3", "colon=-1"]) == {4: 0.7, 26: 0.3, 62: -1}
    assert parse_sizes(["hepatic tumor=0.3", "bone lesion=-1"]) == {26: 0.3, 128: -1}


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (["liver"], "liver=0.6"),
        (["liver=big"], "no anatomy size"),
        (["liver=1.2"], "0 to 1"),
        (["liver=-0.5"], "0 to 1"),
        (["liver=nan"], "0 to 1"),
        (["spleen=0.5"], "'spleen' has no anatomy size; choose from gallbladder"),
        (["pancras=0.5"], "did you mean 'pancreas'"),
        (["liver=0.5", "liver=0.6"], "twice"),
        (["lung tumor=0.1", "bone lesion=0.1"], "at most one"),
    ],
)
def test_what_is_refused(texts: list[str], match: str) -> None:
    with pytest.raises(MaisiError, match=match):
        parse_sizes(texts)


def test_measured_in_ml_and_relative_to_the_largest() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[:5, :4, :5] = 1
    labels[0, 9, 0] = 26
    volumes = measure_ml(labels, (10, 10, 5))
    assert dict(zip(SIZED, volumes, strict=True)) == {id: {1: 50.0, 26: 0.5}.get(id, 0.0) for id in SIZED}
    largest = measure_ml(labels, (10, 10, 20))
    sizes = relative_sizes(volumes, largest)
    assert named_sizes(sizes) == {label_name(id): 0.25 if id in (1, 26) else ABSENT for id in SIZED}
    assert relative_sizes(largest, volumes)[1] == 1.0
    assert relative_sizes(volumes, (0.0,) * 10) == (ABSENT,) * 10
    assert context([sizes, sizes]).shape == (2, 1, 10)


def test_what_is_not_asked_for_comes_from_a_like_case() -> None:
    cases = [
        case("chest", liver=0.1),
        *(case("abdomen", liver=i / 20, colon=i / 40, bone_lesion=0.2) for i in range(20)),
    ]
    rng = np.random.default_rng
    made = [complete_sizes({1: 0.9}, ("abdomen",), cases, rng(i)) for i in range(40)]
    assert {sizes[1] for sizes in made} == {0.9}
    assert {sizes[4] for sizes in made} == {i / 40 for i in (16, 17, 18, 19)} | {15 / 40} - {0.0}  # five nearest
    assert {sizes[9] for sizes in made} == {ABSENT}  # tumours only where asked for
    assert complete_sizes({128: 0.4}, ("chest",), cases, rng(0))[9] == 0.4
    assert complete_sizes({}, ("chest",), cases, rng(0))[1] == 0.1
    assert complete_sizes({1: 0.7}, (), [], rng(0)) == (0.5, 0.7, 0.5, 0.5, 0.5, *[ABSENT] * 5)
    assert complete_sizes({23: 0.7}, ("chest",), [], rng(0)) == (*[ABSENT] * 5, 0.7, *[ABSENT] * 4)


def test_training_of_a_file() -> None:
    training = MaskTraining(size=(64, 48, 64), largest_ml=(1.0,) * 10, cases=(case("chest"),))
    assert training_of({TRAINING_KEY: training.model_dump_json()}, "f") == training
    assert training_of({}, "f").size == (256, 256, 256)
    for text in ("{", '{"sizes": 1}', "3"):
        with pytest.raises(MaisiError, match="f"):
            training_of({TRAINING_KEY: text}, "f")
