from __future__ import annotations

import numpy as np
import pytest

from maisi.anatomy import REGIONS, TUMORS
from maisi.data.mask_library import build
from maisi.data.mask_sources import find_mask, phantom_boxes, phantom_mask, regions_of_structure
from maisi.data.phantom import phantom_labels
from maisi.errors import MaisiError
from maisi.io.nifti import write_volume

WITHIN = {"head-neck": (22, 57), "chest": (115, 28, 32), "abdomen": (1, 5, 14), "lower-body": (93, 94, 15)}


def test_regions_follow_from_where_the_phantom_has_a_structure() -> None:
    assert regions_of_structure(22) == ("head-neck",)
    assert "abdomen" in regions_of_structure(1)
    assert regions_of_structure(15) == ("lower-body",)
    assert regions_of_structure(121)[0] == "head-neck"
    assert regions_of_structure(138) == ()


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_structures_asked_for_are_there(region, seed) -> None:
    ids = WITHIN[region]
    for regions in ((), (region,)):
        mask, said = find_mask(regions, ids, (), (56, 44, 40), (8, 8, 8), seed)
        assert mask.shape == (56, 44, 40)
        assert set(ids) <= set(np.unique(mask.array))
        assert said.startswith("phantom")


def test_a_small_view_is_centred_on_its_structure() -> None:
    mask = phantom_mask((), (4,), (48, 40, 32), (4, 4, 4), 0).array
    middle = np.argwhere(mask == 4).mean(axis=0)
    assert (np.abs(middle - [23.5, 19.5, 15.5]) < 8).all()
    wide = phantom_mask((), (1,), (140, 110, 50), (4, 4, 4), 0).array
    filled = np.argwhere(wide)
    assert abs((filled[:, 0].min() + filled[:, 0].max()) / 2 - 69.5) < 6  # the body, not the liver, in the middle


@pytest.mark.parametrize("tumor", sorted(TUMORS))
def test_every_tumor_finds_a_host(tumor) -> None:
    mask, _ = find_mask((), (), [TUMORS[tumor]], (40, 40, 40), (8, 8, 8), 3)
    assert np.isin(mask.array, TUMORS[tumor]).any()


def test_the_same_seed_gives_the_same_mask_and_another_a_different_one() -> None:
    masks = [find_mask(("abdomen",), (1,), (), (40, 30, 20), (8, 8, 8), seed)[0].array for seed in (0, 0, 1)]
    assert masks[0].tobytes() == masks[1].tobytes() != masks[2].tobytes()


def test_boxes_hold_the_structures() -> None:
    labels = phantom_labels((100, 80, 60), (4, 4, 4), ("abdomen",), seed=2)
    places = labels.affine[:3, 3] + 4 * np.argwhere(labels.array == 3)
    low, high = phantom_boxes(2)[3]
    assert (places >= low - 4).all()
    assert (places <= high + 4).all()


@pytest.mark.parametrize(
    ("structures", "word"), [((138,), "no mandible"), ((22, 93), "cannot show brain, left femur together")]
)
def test_what_the_phantom_cannot_show(structures, word) -> None:
    with pytest.raises(MaisiError, match=word):
        find_mask((), structures, (), (32, 32, 32), (4, 4, 4), 0)


def test_the_library_comes_first_and_the_phantom_after(tmp_path) -> None:
    labels = phantom_labels((80, 60, 60), (5, 5, 5), ("abdomen",), seed=7)
    labels.array[labels.array == 3] = 139  # a structure that no phantom has
    write_volume(tmp_path / "a.nii.gz", labels)
    build([tmp_path / "a.nii.gz"], tmp_path / "library")
    args = ((40, 30, 20), (10, 10, 10), 0, tmp_path / "library")
    mask, said = find_mask(("abdomen",), (139,), [TUMORS[26]], *args)
    assert said.startswith("library, mask 0001")
    assert {139, 1} <= set(np.unique(mask.array))
    mask, said = find_mask((), (3,), (), *args)
    assert said.startswith("phantom")
    assert "None of the 1 masks has the structure 'spleen'" in said
    assert (mask.array == 3).any()
    mask, said = find_mask((), (), [TUMORS[26]], *args)
    assert mask.spacing_mm == (10, 10, 10)
    with pytest.raises(MaisiError, match="no mask library"):
        find_mask((), (1,), (), (40, 30, 20), (10, 10, 10), 0, tmp_path)


def test_the_models_maps_come_second_and_only_for_what_begins_where_they_do(tmp_path) -> None:
    labels = phantom_labels((48, 40, 48), (8, 8, 8), ("head-neck", "chest"), seed=7)
    write_volume(tmp_path / "a.nii.gz", labels)
    carried = tmp_path / "carried"
    build([tmp_path / "a.nii.gz"], carried)
    grid = ((40, 32, 32), (8, 8, 8), 0)

    def source(regions, structures, library=None) -> str:
        return find_mask(regions, structures, (), *grid, library, carried)[1]

    brain, lung, liver = (22,), (28,), (1,)
    assert source(("head-neck",), ()).startswith("the model's library, mask 0001")
    assert source((), brain).startswith("the model's library")  # what is to be shown tells the region
    for regions, structures in ((("chest",), ()), ((), lung), (("head-neck",), liver), (("abdomen",), ())):
        assert source(regions, structures).startswith("phantom")
    mine = tmp_path / "mine"
    write_volume(tmp_path / "b.nii.gz", phantom_labels((48, 40, 48), (8, 8, 8), ("abdomen",), seed=7))
    build([tmp_path / "b.nii.gz"], mine)
    assert source(("abdomen",), (), mine).startswith("library, mask 0001")
    said = source((), brain, mine)
    assert said.startswith("the model's library")
    assert "structure 'brain'" in said  # and why not the user's
