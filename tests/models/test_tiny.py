"""What the carried model makes of structures that its few trunks hardly taught it."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from maisi.anatomy import label_id
from maisi.data.label_maps import apply_map, label_table
from maisi.data.quality import carried_ranges
from maisi.generation.inpaint import inpaint
from maisi.generation.pipeline import load
from maisi.io.nifti import read_labels, read_volume
from maisi.volume import Volume

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


def trunk(real_data: Path) -> tuple[Volume, Volume]:
    """A real abdomen and its label map; training has seen it, and no other with organs."""
    folder = real_data / "totalsegmentator"
    ct, theirs = read_volume(folder / "abdomen_pelvis_ct.nii.gz"), read_labels(folder / "abdomen_pelvis_labels.nii.gz")
    named = apply_map(theirs.array, label_table("totalsegmentator"))
    return ct, theirs.with_array(np.where(named, named, np.where(ct.array > -300, np.uint8(200), np.uint8(0))))


def test_a_tumour_in_a_real_liver_is_even_and_darker_and_can_be_taken_out(tiny, real_data: Path):
    """Painted as the ControlNet alone would, its middle has 200 HU within a rim of -80."""
    ct, labels = trunk(real_data)
    liver = np.median(ct.array[labels.array == label_id("liver")])
    painted = inpaint(ct, labels, tumor="liver:25mm", seed=0, model=tiny)
    assert painted.labels is not None
    tumor = painted.labels.array == label_id("hepatic tumor")
    depth = ndimage.distance_transform_edt(tumor, sampling=labels.spacing_mm)
    parts = [tumor & (depth > low) & (depth <= low + 3) for low in (0, 3, 6, 9)]

    def medians(image: np.ndarray) -> np.ndarray:
        return np.array([np.median(image[part]) for part in parts])

    assert painted.details["contrast_as_usual"]
    assert (np.abs(medians(painted.image.array) - liver + 50) < 60).all()
    healthy = inpaint(painted.image, painted.labels, tumor="none", seed=0, model=tiny)
    assert (np.abs(medians(healthy.image.array) - liver) < 60).all()


@pytest.mark.parametrize(
    ("wish", "seed"),
    [("liver:40mm", 5), ("kidney:20mm", 5), ("kidney:30mm", 4), ("pancreas:12mm", 1), ("colon:20mm", 0)],
)
def test_tumours_in_soft_organs_have_their_contrast_and_neither_air_nor_bone(tiny, real_data: Path, wish, seed):
    """With noise as strong as elsewhere, large ones have both: the U-Net has hardly seen what is around them."""
    ct, labels = trunk(real_data)
    painted = inpaint(ct, labels, tumor=wish, seed=seed, model=tiny)
    assert painted.labels is not None
    assert painted.details["contrast_as_usual"]
    tumor = ndimage.binary_erosion(painted.labels.array != labels.array)
    low, high = np.percentile(painted.image.array[tumor], (2, 98))
    assert -200 < low < high < 200
