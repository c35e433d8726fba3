from __future__ import annotations

import re

import pytest

from maisi.errors import MaisiError
from maisi.generation.memory import decoding_bytes, encoding_bytes, require_memory


def test_estimates_lie_above_what_was_measured() -> None:
    """Peaks measured on a CPU, in bytes per voxel."""
    assert 453 < decoding_bytes((16, 32, 64), 4, 1) < 1.5 * 453
    assert 1505 < decoding_bytes((64, 128, 256), 4, 1) < 1.5 * 1505
    assert 669 < decoding_bytes((64, 128, 256), 2, 1) < 1.6 * 669
    assert 192 < encoding_bytes((16, 32, 64), 4, 1) < 1.7 * 192
    assert 897 < encoding_bytes((64, 128, 256), 4, 1) < 1.5 * 897


def test_the_size_that_is_proposed_fits() -> None:
    def needed(size):
        return decoding_bytes((16, 32, 64), 4, size[0] * size[1] * size[2])

    size, free = (512, 384, 256), 4_000_000_000
    require_memory(free, free, size, 16, "Generating")
    with pytest.raises(MaisiError, match=r"Generating 512,384,256 voxels takes about .* GB and 4\.0 GB") as error:
        require_memory(needed(size), free, size, 16, "Generating")
    proposed = [int(n) for n in re.search(r"size of (\d+),(\d+),(\d+) would fit", str(error.value)).groups()]
    assert needed(proposed) <= free
    assert needed(proposed) > free / 2
    assert all(n % 16 == 0 for n in proposed)


def test_nothing_is_proposed_where_nothing_fits() -> None:
    with pytest.raises(MaisiError, match="free some memory"):
        require_memory(10**9, 10, (64, 64, 64), 16, "Decoding")
