"""Patches depend on seed and step alone and keep the image's values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.data.prepared import PreparedFolder
from maisi.errors import MaisiError
from maisi.training.patches import PatchConfig, PatchSource


def source(folder: Path, **settings_: object) -> PatchSource:
    config = PatchConfig.model_validate({"size": (12, 16, 8), "batch_size": 2, **settings_})
    return PatchSource(PreparedFolder(folder), "train", config, seed=1)


def test_a_step_is_a_step_whatever_came_before(prepared: Path) -> None:
    one, two = source(prepared), source(prepared)
    one.batch(0)
    assert torch.equal(one.batch(7), two.batch(7))
    assert not torch.equal(one.batch(7), one.batch(8))


@settings(max_examples=20, deadline=None)
@given(low=st.floats(0.4, 1.0), factor=st.floats(1.0, 4.0), transpose=st.booleans(), step=st.integers(0, 99))
def test_shape_and_range(prepared: Path, low: float, factor: float, transpose: bool, step: int) -> None:
    batch = source(prepared, zoom=(low, low * factor), transpose=transpose).batch(step)
    assert batch.shape == (2, 1, 12, 16, 8)
    assert 0 <= float(batch.min()) <= float(batch.max()) <= 1


def test_patch_larger_than_the_image_is_padded_with_air(prepared: Path) -> None:
    batch = source(prepared, size=(64, 64, 64), zoom=(1.0, 1.0)).batch(0)
    assert float(batch[:, :, :4].max()) == 0
    assert float(batch.max()) > 0.5


def test_no_cases_is_said(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(MaisiError, match="no readable index"):
        PreparedFolder(tmp_path)


def test_cubic_voxels_of_the_size_asked_for(prepared: Path) -> None:
    """At 8 mm a patch of 8 voxels shows more of the body than at 4 mm, and steps from voxel to voxel are larger."""
    fine, coarse = (source(prepared, size=(16, 16, 16), spacing_mm=(s, s), candidates=4) for s in (4.0, 8.0))
    steps = [torch.stack([p.batch(i) for i in range(8)]).diff(dim=-1).abs().mean() for p in (fine, coarse)]
    assert steps[1] > steps[0]


def test_candidates_prefer_contrast(prepared: Path) -> None:
    spreads = []
    for candidates in (1, 6):
        patches = source(prepared, size=(16, 16, 16), candidates=candidates)
        spreads.append(torch.stack([patches.batch(i).flatten(1).std(1) for i in range(20)]).mean())
    assert spreads[1] > spreads[0]
