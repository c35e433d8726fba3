from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maisi.anatomy import TUMORS
from maisi.errors import MaisiError
from maisi.tumors import DIAMETER_RANGE_MM, KINDS, MOST_TUMORS, TumorWish, kind_of, parse_kind, parse_tumor

SIZES = st.integers(int(DIAMETER_RANGE_MM[0]), int(DIAMETER_RANGE_MM[1]))
WISHES = st.builds(
    TumorWish,
    kind=st.sampled_from(sorted(KINDS)),
    diameter_mm=st.none() | st.tuples(SIZES, SIZES).map(lambda pair: tuple(map(float, sorted(pair)))),
    count=st.integers(1, MOST_TUMORS),
    centre_mm=st.none() | st.tuples(*[st.integers(-500, 500).map(float)] * 3),
)


def test_every_tumour_label_has_a_kind_and_every_kind_hosts() -> None:
    assert {kind.id for kind in KINDS.values()} == set(TUMORS)
    for id in TUMORS:
        kind = kind_of(id)
        assert kind.hosts == TUMORS[id]
        assert kind.diameter_mm[0] < kind.diameter_mm[1]
        assert all((look.contrast_hu is None) != (look.hu is None) for look in kind.looks)


@given(WISHES)
def test_a_wish_spelled_out_is_read_back(wish) -> None:
    assert parse_tumor(str(wish)) == wish


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("liver", TumorWish(kind="liver")),
        ("liver:25mm", TumorWish(kind="liver", diameter_mm=(25, 25))),
        (" Liver : 25 ", TumorWish(kind="liver", diameter_mm=(25, 25))),
        ("lung:8-15mm x3", TumorWish(kind="lung", diameter_mm=(8, 15), count=3)),
        ("hepatic tumor:7.5mm", TumorWish(kind="liver", diameter_mm=(7.5, 7.5))),
        ("bone@10,-20,40.5", TumorWish(kind="bone", centre_mm=(10, -20, 40.5))),
    ],
)
def test_spellings(text, wish) -> None:
    assert parse_tumor(text) == wish


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("livr:25mm", "did you mean 'liver'"),
        ("brain", "choose from liver, pancreas, lung, colon, bone, kidney"),
        ("liver:1mm", "from 2 to 200 mm"),
        ("liver:30-20mm", "the smaller first"),
        ("liver:5mmx99", "from 1 to 20"),
        ("liver@1,2", "as X,Y,Z in mm"),
        ("25mm", "write it like"),
        ("", "write it like"),
    ],
)
def test_bad_wishes_are_refused_in_a_sentence(text, sentence) -> None:
    with pytest.raises(MaisiError, match=sentence):
        parse_tumor(text)


def test_kinds_are_found_by_label_too() -> None:
    assert parse_kind("bone_lesion").name == "bone"
