"""Label ids to channels and back: the released table against a second copy of its rule, tables of one's own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from maisi.anatomy import LABELS
from maisi.data.mask_codes import METADATA_KEY, MaskCodes, codes_of, released_codes
from maisi.errors import MaisiError


def test_released_table_goes_there_and_back() -> None:
    codes = released_codes()
    ids = np.array(codes.ids, np.uint8)
    assert (codes.channels(ids) == np.arange(125)).all()
    assert (codes.labels(np.arange(125)) == ids).all()
    # the channels are the vocabulary in order, without its other dummies and the two kidney cysts; 129 is dummy6
    left_out = {label.id for label in LABELS if label.free and label.id != 129} | {116, 117}
    assert codes.ids == (0, *sorted({label.id for label in LABELS} - left_out))
    assert [codes.ids[channel] for channel in codes.nameless] == [129]


def test_coarse_keeps_the_kind() -> None:
    codes = MaskCodes((0, 1, 91, 133, 200))
    labels = np.array([0, 1, 33, 91, 63, 6, 200, 138], np.uint8)
    assert codes.coarse(labels).tolist() == [0, 1, 133, 91, 133, 200, 200, 133]
    assert MaskCodes((0, 1)).coarse(labels).tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    with pytest.raises(MaisiError, match=r"\[6, 33, 63, 138\]"):
        codes.channels(labels)


@pytest.mark.parametrize("ids", [(1, 2), (0, 1, 1), (0, 256), (0, -1)])
def test_bad_tables_are_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(MaisiError, match="each id once"):
        MaskCodes(ids)


def test_table_of_a_file() -> None:
    assert codes_of({}, 125, "f") == released_codes()
    assert codes_of({METADATA_KEY: json.dumps([0, 200])}, 2, "f").ids == (0, 200)
    for metadata, channels in (
        ({}, 3),
        ({METADATA_KEY: "[0, 200]"}, 3),
        ({METADATA_KEY: "["}, 2),
        ({METADATA_KEY: "1"}, 2),
    ):
        with pytest.raises(MaisiError, match="f "):
            codes_of(metadata, channels, "f")
