import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maisi.errors import MaisiError
from maisi.request import MAX_VOXELS, Request, item_seed


def test_defaults():
    request = Request.parse()
    assert request.model_dump(mode="json") == {
        "region": [],
        "size": None,
        "spacing": None,
        "seed": 0,
        "count": 1,
        "mask": None,
        "structure": [],
        "tumor": [],
        "anatomy_size": {},
        "keep": [],
        "library": None,
        "image": None,
        "removal": False,
        "by": "network",
        "model": "tiny",
        "steps": None,
        "modality": "ct",
        "guidance": 0.0,
        "mask_guidance": None,
        "self_guidance": None,
        "temperature": None,
        "strengthen": {},
        "fov": "given",
        "solver": None,
        "retries": 2,
        "ranges": None,
    }


@pytest.mark.parametrize("size", ["128,96,64", "128x96x64", "128 96 64", (128, 96, 64), [128.0, 96, "64"]])
def test_sizes_of_every_door(size):
    assert Request.parse(size=size).size == (128, 96, 64)


@pytest.mark.parametrize("region", ["thorax,abdomen", ["abdomen", "chest"], ("chest+abdomen",), "abdomen;chest"])
def test_regions_of_every_door(region):
    assert Request.parse(region=region).region == ("chest", "abdomen")


def test_numpy_values_are_accepted():
    request = Request.parse(size=np.array([8, 8, 8]), spacing=np.array([1.5, 1.5, 2.0], dtype=np.float32))
    assert request.size == (8, 8, 8)
    assert request.spacing == (1.5, 1.5, 2.0)


def test_json_there_and_back():
    request = Request.parse(region="head", size="8,8,8", spacing="1,1,1", seed=5, mask="labels.nii.gz")
    assert request.mask == Path("labels.nii.gz")
    assert Request.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "0,8,8"}, "size: 0,8,8 is not a size in voxels; give X, Y, Z as three whole numbers"),
        ({"size": (-8, 8, 8)}, "is not a size in voxels"),
        ({"size": (8, 8)}, "is not a size in voxels"),
        ({"size": 8}, "is not a size in voxels"),
        ({"size": "8,8,a"}, "'8,8,a' is not a size in voxels"),
        ({"size": (8.5, 8, 8)}, "is not a size in voxels"),
        ({"size": (8, 8, 1025)}, "from 1 to 1024"),
        ({"size": (1024, 1024, 1024)}, "1074 million voxels; stay within 403 million"),
        ({"spacing": (0.29, 1, 1)}, "0.29,1,1 is not a usable spacing; give X, Y, Z in mm, each from 0.3 to 10"),
        ({"spacing": (1, 1, 10.1)}, "not a usable spacing"),
        ({"spacing": "nan,1,1"}, "is not a spacing"),
        ({"spacing": (1, math.inf, 1)}, "is not a spacing"),
        ({"region": "chst"}, r"Unknown region 'chst' \(did you mean 'chest'\?\); choose from head-neck"),
        ({"region": [3]}, "Unknown region '3'"),
        ({"seed": -1}, "'seed' is -1"),
        ({"seed": 2**63}, "'seed' is 9223372036854775808"),
        ({"count": 0}, "'count' is 0"),
        ({"steps": 0}, "'steps' is 0"),
        ({"guidance": -1}, "'guidance' is -1"),
        ({"guidance": math.nan}, "'guidance' is nan"),
        ({"modality": "pet"}, "Unknown modality 'pet'"),
        ({"fov": "auto"}, "name at least one region"),
        ({"fov": "auto", "mask": "a.nii.gz"}, "which are the mask's here"),
        ({"mask": "a.nii.gz", "library": "maps"}, "none is looked for in a library"),
        ({"fov": "wide"}, "should be 'given' or 'auto'"),
        ({"sedd": 1}, r"unknown key 'sedd' \(did you mean 'seed'\?\)"),
    ],
)
def test_bad_values_get_one_sentence(values, message):
    with pytest.raises(MaisiError, match=message) as caught:
        Request.parse(**values)
    assert str(caught.value).startswith("The request: ")
    assert "\n" not in str(caught.value)


def test_every_fault_is_named_at_once():
    with pytest.raises(MaisiError, match=r"region: .*size: .*'count'"):
        Request.parse(region="x", size="1", count=-1)


def test_largest_size():
    assert math.prod(Request.parse(size=(1024, 512, 768)).size or ()) == MAX_VOXELS


def test_a_request_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Request.parse().seed = 3


def test_item_seeds_are_fixed_for_ever():
    assert item_seed(0, 0) == 7896617691693857887
    assert item_seed(0, 1) == 2918264622725855778


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_item_seeds_are_seeds(seed, item):
    value = item_seed(seed, item)
    assert 0 <= value < 2**63
    assert value == item_seed(seed, item)
    assert value not in (item_seed(seed, item + 1), item_seed((seed + 1) % 2**63, item))


def test_items_are_numbered_from_0() -> None:
    with pytest.raises(MaisiError, match="There is no item -1"):
        item_seed(0, -1)


def test_structures_tumours_and_sizes_are_read_in_any_spelling() -> None:
    request = Request.parse(
        structure=["Liver", "kidney_left"],
        tumor=["liver:25mm", "bone"],
        anatomy_size=["kidney=1.2", "pancreas=0.7"],
        keep='liver,"hepatic tumor"'.replace('"', ""),
    )
    assert request.structure == ("liver", "left kidney")
    assert [str(wish) for wish in request.tumor] == ["liver:25mm", "bone"]
    assert request.anatomy_size == {"left kidney": 1.2, "right kidney": 1.2, "pancreas": 0.7}
    assert request.keep == ("liver", "hepatic tumor")
    assert Request.parse(**request.model_dump(mode="json")) == request


@pytest.mark.parametrize("none", ["none", ["none"], ("none",)])
def test_no_tumour_at_all_means_removal(none) -> None:
    request = Request.parse(tumor=none)
    assert (request.tumor, request.removal) == ((), True)


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        ({"structure": "livr"}, "did you mean 'liver'"),
        ({"tumor": ["liver:25mm", "none"]}, "No tumour is called 'none'"),
        ({"tumor": "liver:900mm"}, "from 2 to 200 mm"),
        ({"anatomy_size": ["liver"]}, r"write it as pancreas=0\.7"),
        ({"anatomy_size": ["liver=nan"]}, r"from 0\.3 to 2"),
        ({"strengthen": ["mandible"]}, r"no strength of a structure; write it as spinal cord=3"),
        ({"strengthen": ["mandible=-1"]}, "from 0 to 100"),
        ({"strengthen": ["kidney=1", "left kidney=1"]}, "two strengths"),
        ({"strengthen": {"mandibel": 1.0}}, "did you mean 'mandible'"),
        ({"anatomy_size": ["kidney=1", "left kidney=1"]}, "two sizes"),
        ({"anatomy_size": ["body=1"]}, "name an organ"),
        ({"anatomy_size": ["liver=9"]}, r"from 0\.3 to 2"),
        ({"anatomy_size": {"livr": 1.0}}, "No label is called 'livr'"),
        ({"keep": ["hepatic tumour of mine"]}, "No label is called"),
        ({"retries": 11}, "less than or equal to 10"),
        ({"by": "magic"}, "'network' or 'rules'"),
    ],
)
def test_bad_wishes_for_anatomy_are_refused(wishes, sentence) -> None:
    with pytest.raises(MaisiError, match=sentence):
        Request.parse(**wishes)
