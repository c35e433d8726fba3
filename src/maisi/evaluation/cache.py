"""Slow results kept in files, so that an interrupted evaluation goes on where it stopped. Knows no measure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.errors import MaisiError
from maisi.io.files import atomic_path, write_json

Arrays = Mapping[str, NDArray[Any]]


def key_of(*parts: Any) -> str:
    """Return a name for what depends on `parts` (JSON values) alone: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cache_folder(output: Path, cache: Path | None = None) -> Path:
    """Make and return the folder that intermediate results are kept in: `cache`, or one beside `output`.

    Raises:
        MaisiError: it can't be made.
    """
    folder = cache or output.with_name(f"{output.name}.cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaisiError(f"Cannot keep results in {folder}: {error.strerror}; name another folder.") from None
    return folder


def cached_json(path: Path, compute: Callable[[], Any]) -> Any:
    """JSON values kept at `path`, computed if they are not there yet."""
    if not path.exists():
        write_json(path, compute())
    return json.loads(path.read_text(encoding="utf-8"))


def cached_arrays(path: Path, compute: Callable[[], Arrays]) -> dict[str, NDArray[Any]]:
    """Arrays by name kept at `path` (.npz, no pickles), computed if they are not there yet."""
    if not path.exists():
        arrays: dict[str, Any] = dict(compute())
        with atomic_path(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)
