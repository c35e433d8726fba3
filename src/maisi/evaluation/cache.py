"""Answers kept in a folder under the hash of what decides them: an interrupted evaluation goes on. Knows no measure."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import maisi
from maisi.errors import MaisiError
from maisi.io.files import atomic_path, new_folder, write_json

MARKER = "maisi-cache.json"
"""Tells a cache from a folder that is somebody's."""


class Cache:
    """Values by key. A key is any JSON value that names all that decides the answer; the version of maisi joins it.

    It may be sent to worker processes: it knows a path and no more.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder, or make it.

        Raises:
            MaisiError: it is there and no cache, or cannot be made.
        """
        if not folder.exists():
            with new_folder(folder) as part:
                write_json(part / MARKER, {"made_by": "maisi evaluate"})
        if not (folder / MARKER).is_file():
            raise MaisiError(f"{folder} exists and is no cache of maisi; name another folder with --cache.")
        self.folder = folder

    def json(self, key: Any, compute: Callable[[], Any]) -> Any:
        """JSON values: read if they are there, else computed and written."""
        path = self._path(key, ".json")
        if not path.exists():
            write_json(path, compute())
        return json.loads(path.read_text(encoding="utf-8"))

    def arrays(self, key: Any, compute: Callable[[], Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """Arrays by name, in the same way."""
        path = self.arrays_path(key)
        if not path.exists():
            with atomic_path(path) as part, part.open("wb") as file:
                values: dict[str, Any] = dict(compute())
                np.savez(file, **values)
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)

    def arrays_path(self, key: Any) -> Path:
        """The file (.npz) that `arrays` keeps them in; it need not be there yet."""
        return self._path(key, ".npz")

    def path(self, key: Any, make: Callable[[Path], Any]) -> Path:
        """A file or folder that `make` writes, whole or not at all, at the path it is given."""
        path = self._path(key, "")
        if not path.exists():
            make(path)
        return path

    def _path(self, key: Any, ending: str) -> Path:
        text = json.dumps([maisi.__version__, key], sort_keys=True)
        return self.folder / (hashlib.sha256(text.encode()).hexdigest()[:24] + ending)


@contextmanager
def cache_for(output: Path, named: Path | None) -> Iterator[Cache]:
    """Open the cache of an evaluation: the folder `named`, which stays, or `OUTPUT.cache`, which goes in the end.

    After an error or an interruption a cache with answers stays, and the next run with the same output goes on from it.

    Raises:
        MaisiError: as `Cache`.
    """
    cache = Cache(named or output.with_name(f"{output.name}.cache"))
    done = False
    try:
        yield cache
        done = True
    finally:
        empty = {path.name for path in cache.folder.iterdir()} == {MARKER}
        if named is None and (done or empty):
            shutil.rmtree(cache.folder, ignore_errors=True)
