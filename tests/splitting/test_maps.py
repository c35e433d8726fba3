"""How rows are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from maisi.splitting.maps import TOGETHER, cuts


@given(start=st.integers(0, 50), rows=st.integers(1, 300), parts=st.integers(1, 400))
def test_stretches_are_even_and_cover_all_rows(start: int, rows: int, parts: int) -> None:
    made = cuts(start, start + rows, parts)
    sizes = [end - first for first, end in made]
    assert made[0][0] == start
    assert made[-1][1] == start + rows
    assert all(before[1] == after[0] for before, after in pairwise(made))
    assert len(made) == min(parts, rows)
    assert min(sizes) >= 1
    if rows < TOGETHER * len(made):
        assert max(sizes) - min(sizes) <= 1
    else:
        assert all(size % TOGETHER == 0 for size in sizes[:-1])
        assert max(sizes) <= rows / len(made) + 2 * TOGETHER
