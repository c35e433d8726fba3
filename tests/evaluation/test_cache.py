from __future__ import annotations

import numpy as np
import pytest

from maisi.errors import MaisiError
from maisi.evaluation.cache import cache_folder, cached_arrays, cached_json, key_of


def test_keys_depend_on_every_part_and_on_nothing_else() -> None:
    assert key_of("a", {"x": 1, "y": (2, 3)}) == key_of("a", {"y": [2, 3], "x": 1})
    assert len({key_of("a", 1), key_of("a", 2), key_of("b", 1), key_of("a", 1, None)}) == 4


def test_what_is_there_is_not_computed_again(tmp_path) -> None:
    def never():
        raise AssertionError("computed again")

    assert cached_json(tmp_path / "a.json", lambda: {"x": 0.1}) == {"x": 0.1} == cached_json(tmp_path / "a.json", never)
    arrays = cached_arrays(tmp_path / "a.npz", lambda: {"x": np.arange(3)})
    np.testing.assert_array_equal(arrays["x"], cached_arrays(tmp_path / "a.npz", never)["x"])
    with pytest.raises(AssertionError):
        cached_arrays(tmp_path / "b.npz", never)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.npz"}


def test_the_folder_lies_beside_the_output(tmp_path) -> None:
    assert cache_folder(tmp_path / "out") == tmp_path / "out.cache"
    assert cache_folder(tmp_path / "out", tmp_path / "kept" / "here").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(MaisiError, match="another folder"):
        cache_folder(tmp_path / "out", tmp_path / "file")
