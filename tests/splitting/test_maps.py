"""How rows are cut, and how they come back from a disk."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maisi.errors import MaisiError
from maisi.splitting.maps import OnDisk, cuts


@given(start=st.integers(0, 50), rows=st.integers(1, 300), parts=st.integers(1, 400), together=st.integers(1, 5))
def test_stretches_are_even_and_cover_all_rows(start: int, rows: int, parts: int, together: int) -> None:
    made = cuts(start, start + rows, parts, together)
    sizes = [end - first for first, end in made]
    assert made[0][0] == start
    assert made[-1][1] == start + rows
    assert all(before[1] == after[0] for before, after in pairwise(made))
    assert len(made) == min(parts, rows)
    assert min(sizes) >= 1
    if rows < together * len(made):
        assert max(sizes) - min(sizes) <= 1
    else:
        assert all(size % together == 0 for size in sizes[:-1])
        assert max(sizes) <= rows / len(made) + 2 * together


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dim", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_from_disk_in_the_layout_of_networks(
    samples: int, dim: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    x = torch.randn(samples, 3, 5, 6, 7).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    part = OnDisk(x, dim, tmp_path)
    for start, stop in ((0, 5), (2, 3), (3, 5)):
        rows = part.rows(start, stop, torch.device("cpu"))
        assert torch.equal(rows, x.narrow(dim, start, stop - start))
        # joined maps stay channels-last only where PyTorch sees it in the strides of each
        assert torch.cat([rows, rows], dim).is_contiguous(memory_format=torch.channels_last_3d)
    part.drop()
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    part = OnDisk(torch.zeros(1, 2, 3, 4, 5), 2, tmp_path)
    part.path.write_bytes(b"0" * 100)
    with pytest.raises(MaisiError, match="was cut short; start again"):
        part.rows(1, 3, torch.device("cpu"))
