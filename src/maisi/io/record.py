"""`record.json`: what made an item, so that it can be made again. Imports no torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import maisi
from maisi.io.files import write_json
from maisi.request import Request

_PACKAGES = ("torch", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of maisi, Python and the packages numbers depend on ('absent' if not there)."""
    found = {"maisi": maisi.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def write_record(
    path: Path,
    request: Request,
    *,
    item: int,
    seed: int,
    weights_sha256: Mapping[str, str],
    timings_s: Mapping[str, float],
    peak_memory_bytes: int | None = None,
    details: Mapping[str, Any] | None = None,
    synthetic: bool = True,
) -> None:
    """Write the record of one item as JSON, atomically; it says `"synthetic": true`, or else `"painted": true`.

    Args:
        path: file to make.
        request: the order, as it was validated.
        item: number of the item within the request, from 0.
        seed: `request.item_seed` of the item.
        weights_sha256: file name of each network used -> hash of its weights.
        timings_s: stage -> seconds.
        peak_memory_bytes: the largest memory in use, where known.
        details: further entries that JSON can hold (size, solver, warnings); none repeats a name above.
        synthetic: whether nobody's body is shown; else tissue was painted into a given CT.

    Raises:
        MaisiError: the place cannot be written to.
    """
    record: dict[str, Any] = {
        "synthetic": synthetic,
        "painted": not synthetic,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": request.model_dump(mode="json"),
        "item": item,
        "seed": seed,
        "weights_sha256": dict(weights_sha256),
        "timings_s": {stage: round(seconds, 3) for stage, seconds in timings_s.items()},
        "peak_memory_bytes": peak_memory_bytes,
        "versions": versions(),
    }
    repeated = record.keys() & (details or {}).keys()
    if repeated:
        raise ValueError(f"details repeat {sorted(repeated)}")
    write_json(path, record | dict(details or {}))
