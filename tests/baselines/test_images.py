"""What the baselines see: whole boxes on one grid, of one split, the same at every call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maisi.baselines.images import GridConfig, GridImages, shown, signed, to_hu
from maisi.errors import MaisiError


@given(st.lists(st.integers(-1000, 1000), min_size=8, max_size=8))
def test_hu_there_and_back(values: list[int]) -> None:
    hu = np.array(values, np.int16).reshape(2, 2, 2)
    assert signed(hu).shape == (1, 2, 2, 2)
    np.testing.assert_array_equal(to_hu(signed(hu)), hu)


def test_ends_of_the_range() -> None:
    hu = np.array([[[-1024, -1000, 0, 1000, 3071]]], np.int16)
    assert signed(hu).flatten().tolist() == [-1, -1, 0, 1, 1]
    assert shown(torch.tensor([-3.0, -1, 0, 1, 2])).tolist() == [0, 0, 0.5, 1, 1]


def test_boxes_are_of_their_split_and_stay(prepared: Path) -> None:
    grid = GridConfig(size=(16, 16, 32), spacing_mm=8.0, views=2)
    train, held_out = (GridImages(prepared, split, grid, 5) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (4, 1)
    assert train[0].shape == (16, 16, 32)
    # water in the middle, air around the case, which ends 4 mm before the box does
    assert abs(int(train[0][8, 8, 16]) - 40) <= 1
    assert (train[0][0] == -1000).all()
    # as much water as there is in the case, on voxels eight times as large
    water = (held_out[0].astype(float) + 1000).sum() / 1040
    real = (np.load(prepared / "p2.npy") > 0).sum() / 8
    assert water == pytest.approx(real, rel=0.02)
    again = GridImages(prepared, "train", grid, 5)
    torch.testing.assert_close(again.batch(7, 3), train.batch(7, 3), rtol=0, atol=0)
    assert not torch.equal(train.batch(7, 3), train.batch(8, 3))


def test_no_cases_is_a_sentence(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"cases": []}')
    with pytest.raises(MaisiError, match="no train CTs"):
        GridImages(tmp_path, "train", GridConfig(), 0)
