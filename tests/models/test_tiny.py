"""What the carried model makes of structures that its few trunks hardly taught it."""

import numpy as np
import pytest

from maisi.anatomy import label_id
from maisi.data.quality import carried_ranges
from maisi.generation.pipeline import load

SEEN_ONCE = ("liver", "spleen", "pancreas")
SOFT_HU = (-60.0, 170.0)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", precision="fp32")


@pytest.fixture(scope="module")
def pair(tiny):
    """A generated abdomen and the phantom's labels that it follows."""
    structures = ("liver", "pancreas", "stomach", "left iliac vena")
    grid = {"size": (64, 48, 40), "spacing": (6.0, 6.0, 6.0)}
    item = tiny.generate(region="abdomen", structure=structures, seed=0, retries=0, **grid)
    assert item.labels is not None
    return item.image.array, item.labels.array


@pytest.mark.parametrize("organ", SEEN_ONCE)
def test_organs_of_a_drawn_abdomen_have_their_density(pair, organ):
    image, labels = pair
    known = carried_ranges().organs[organ]
    assert known.low < np.median(image[labels == label_id(organ)]) < known.high


@pytest.mark.parametrize("structure", ["stomach", "aorta", "left iliac vena", "inferior vena cava"])
def test_vessels_and_bowel_of_a_drawn_abdomen_are_soft_tissue(pair, structure):
    image, labels = pair
    low, high = SOFT_HU
    assert low < np.median(image[labels == label_id(structure)]) < high


def test_a_brain_is_told_as_body_as_in_training(tiny):
    told = tiny.controlnet.config.told(np.array([label_id("brain"), label_id("body")]))
    assert set(told.tolist()) == {label_id("body")}
