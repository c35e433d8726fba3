from __future__ import annotations

import numpy as np
import pytest

from maisi.errors import MaisiError
from maisi.evaluation.cache import MARKER, Cache, cache_for


def test_an_answer_is_computed_once_for_each_key(tmp_path) -> None:
    cache, calls = Cache(tmp_path / "kept"), []

    def compute() -> dict[str, int]:
        calls.append(1)
        return {"n": len(calls)}

    assert cache.json(["a", 1], compute) == {"n": 1}
    assert Cache(tmp_path / "kept").json(["a", 1], compute) == {"n": 1}
    assert cache.json(["a", 2], compute) == {"n": 2}
    values = {"x": np.arange(3), "y": np.eye(2, dtype=np.float32)}
    assert not cache.arrays_path("k").exists()
    cache.arrays("k", lambda: values)
    assert cache.arrays_path("k").exists()
    for name, array in cache.arrays("k", lambda: pytest.fail("computed again")).items():
        np.testing.assert_array_equal(array, values[name])


def test_keys_depend_on_every_part_and_on_nothing_else(tmp_path) -> None:
    cache = Cache(tmp_path / "kept")
    path = cache.arrays_path
    assert path(["a", {"x": 1, "y": (2, 3)}]) == path(["a", {"y": [2, 3], "x": 1}])
    assert len({path(["a", 1]), path(["a", 2]), path(["b", 1]), path(["a", 1, None])}) == 4


def test_another_version_of_the_package_has_answers_of_its_own(tmp_path, monkeypatch) -> None:
    cache = Cache(tmp_path / "kept")
    assert cache.json("k", lambda: 1) == 1
    monkeypatch.setattr("maisi.__version__", "0.0.0")
    assert cache.json("k", lambda: 2) == 2


def test_a_failure_leaves_no_answer(tmp_path) -> None:
    cache = Cache(tmp_path / "kept")
    with pytest.raises(ZeroDivisionError):
        cache.json("k", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.arrays("k", lambda: 1 / 0)
    assert [path.name for path in cache.folder.iterdir()] == [MARKER]
    assert cache.json("k", lambda: 7) == 7


def test_the_default_cache_goes_in_the_end_and_only_then(tmp_path) -> None:
    def interrupted() -> None:
        with cache_for(tmp_path / "out", None) as cache:
            cache.json("k", lambda: 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with cache_for(tmp_path / "out", None) as cache:
        assert cache.json("k", lambda: 2) == 1
    assert list(tmp_path.iterdir()) == []
    with cache_for(tmp_path / "out", tmp_path / "named"):
        pass
    assert (tmp_path / "named").is_dir()


def test_nobodys_folder_becomes_a_cache(tmp_path) -> None:
    (tmp_path / "out.cache").mkdir()
    (tmp_path / "out.cache" / "thesis.txt").write_text("dear")
    with pytest.raises(MaisiError, match="no cache"), cache_for(tmp_path / "out", None):
        pass
    assert (tmp_path / "out.cache" / "thesis.txt").exists()
    (tmp_path / "file").touch()
    with pytest.raises(MaisiError, match="name another folder"), cache_for(tmp_path / "out", tmp_path / "file"):
        pass
    with pytest.raises(MaisiError, match="does not exist"), cache_for(tmp_path / "out", tmp_path / "no" / "where"):
        pass
