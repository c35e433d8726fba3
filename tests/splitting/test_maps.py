"""How rows are cut, and how they come back from a disk."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from threading import Event, Timer

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maisi.errors import MaisiError
from maisi.splitting.maps import OnDisk, Writer, cuts


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
    part = OnDisk(x, dim, tmp_path, Writer())
    for start, stop in ((0, 5), (2, 3), (3, 5)):
        rows = part.rows(start, stop, torch.device("cpu"))
        assert torch.equal(rows, x.narrow(dim, start, stop - start))
        # joined maps stay channels-last only where PyTorch sees it in the strides of each
        assert torch.cat([rows, rows], dim).is_contiguous(memory_format=torch.channels_last_3d)
    part.drop()
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    part = OnDisk(torch.zeros(1, 2, 3, 4, 5), 2, tmp_path, Writer())
    part.rows(0, 1, torch.device("cpu"))  # it is written then
    part.path.write_bytes(b"0" * 100)
    with pytest.raises(MaisiError, match="was cut short; start again"):
        part.rows(1, 3, torch.device("cpu"))


def test_parts_are_written_one_at_a_time_and_a_failure_is_told_by_the_next_part_and_by_its_own_rows(
    tmp_path: Path,
) -> None:
    writer, going, x = Writer(), Event(), torch.zeros(1, 2, 3, 4, 5)

    def fails() -> None:
        going.wait(10)
        raise MaisiError("the disk is full")

    writer.write(fails)
    Timer(0.2, going.set).start()
    with pytest.raises(MaisiError, match="the disk is full"):
        OnDisk(x, 2, tmp_path, writer)
    assert going.is_set()  # the second waited for the first
    assert not list(tmp_path.iterdir())
    folder = tmp_path / "gone"
    folder.mkdir()
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        part = OnDisk(x, 2, folder, Writer())
        for _ in range(2):
            with pytest.raises(MaisiError, match=f"Cannot write {folder}"):
                part.rows(0, 1, torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_of_one_channel_waits_on_disk_too(
    dtype: torch.dtype, memory_format: torch.memory_format, tmp_path: Path
) -> None:
    for samples in (1, 2):
        for dim in (2, 3, 4):
            x = torch.randn(samples, 1, 5, 1, 7).to(dtype).contiguous(memory_format=memory_format)
            part = OnDisk(x, dim, tmp_path, Writer())
            stop = x.shape[dim]
            rows = part.rows(stop // 2, stop, torch.device("cpu"))
            assert torch.equal(rows, x.narrow(dim, stop // 2, stop - stop // 2))
