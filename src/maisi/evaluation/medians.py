"""Are the structures of generated images as dense as those of real ones? Median HU of each label against real ranges.

What a median is and what ranges are is said by `data.quality` and `data.quality_learning`. Knows no network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from maisi.data.quality import StructureRange, carried_ranges, medians
from maisi.data.quality_learning import PRIOR_CASES, median_ranges
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.result import Result
from maisi.evaluation.volumes import Entry

Medians = Mapping[str, float]
"""Structure -> median HU in one image."""

Progress = Callable[[str, int, int], None]

COLUMNS = ("structure", "real range", "real cases", "generated cases", "within", "lowest", "middle", "highest")

REACH = 2.0
"""The picture shows that many widths of the range beyond its ends."""


def measure(
    images: Sequence[Entry],
    kind: str,
    cache: Cache,
    progress: Progress | None = None,
    smallest_ml: float | None = None,
) -> dict[str, Medians]:
    """Return name of each image that has labels -> the median HU of its structures.

    Args:
        images: CTs.
        kind: what the set is called.
        cache: keeps the medians.
        progress: told the stage, images done, images in all.
        smallest_ml: organs of which the label map has less are left out; as the carried ranges say if left out.

    Raises:
        MaisiError: none has labels, or one can't be read.
    """
    labelled = [image for image in images if image.has_labels]
    if not labelled:
        raise MaisiError(f"None of the {len(images)} {kind} images has labels; give images with label maps.")
    smallest_ml = carried_ranges().smallest_ml if smallest_ml is None else smallest_ml
    found = {}
    for done, image in enumerate(labelled):
        key = ["medians", image.hash, smallest_ml]
        found[image.name] = cache.json(key, partial(_medians, image, smallest_ml))
        if progress:
            progress(f"measure {kind}", done + 1, len(labelled))
    return found


def _medians(image: Entry, smallest_ml: float) -> Medians:
    ct, labels = image.pair()
    assert labels is not None
    if labels.array.min() < 0 or labels.array.max() > 255:
        raise MaisiError(f"The label map of {image.name} holds ids beyond 0 to 255; give one in maisi's ids.")
    return medians(ct, labels.with_array(labels.array.astype(np.uint8)), smallest_ml)


def learned(real: Mapping[str, Medians]) -> dict[str, StructureRange]:
    """Turn what `measure` told of real cases into ranges."""
    names = dict.fromkeys(name for one in real.values() for name in one)
    return median_ranges({name: [one[name] for one in real.values() if name in one] for name in names})


def summed_up(
    generated: Mapping[str, Medians], ranges: Mapping[str, StructureRange], settings: Mapping[str, Any]
) -> Result:
    """Compare what `measure` told of generated images with ranges, structure by structure.

    Raises:
        MaisiError: no structure of the images has a range.
    """
    shown = dict.fromkeys(name for one in generated.values() for name in one)
    items = [_item(name, {case: one[name] for case, one in generated.items() if name in one}, ranges) for name in shown]
    judged = [item for item in items if item["within"] is not None]
    if not judged:
        raise MaisiError("No structure of the generated images is known from real cases; give more cases.")
    cases = sum(item["generated cases"] for item in judged)
    summary: dict[str, float | None] = {
        "share within": sum(item["within"] * item["generated cases"] for item in judged) / cases,
        **{f"{item['structure']}, within": item["within"] for item in judged},
    }
    notes = [
        "Median HU inside each structure, without its outermost voxels (of the major organs with them), against the "
        "range of real cases."
    ]
    open_ = [item["structure"] for item in items if item["within"] is None]
    if open_:
        notes.append(f"No range, for want of {PRIOR_CASES} real cases: {', '.join(open_)}.")
    return Result("medians", summary, items, settings, COLUMNS, tuple(notes))


def _item(name: str, found: Mapping[str, float], ranges: Mapping[str, StructureRange]) -> dict[str, Any]:
    normal = ranges.get(name)
    values = list(found.values())
    outside = [] if normal is None else [case for case, hu in found.items() if not normal.low <= hu <= normal.high]
    return {
        "structure": name,
        "real range": None if normal is None else f"{normal.low:.0f} to {normal.high:.0f} HU",
        "low": None if normal is None else normal.low,
        "high": None if normal is None else normal.high,
        "real cases": None if normal is None else normal.cases,
        "generated cases": len(values),
        "within": None if normal is None else 1 - len(outside) / len(values),
        "lowest": min(values),
        "middle": float(np.median(values)),
        "highest": max(values),
        "outside": outside,
        "values": values,
    }


def draw(figure: Any, result: Result) -> None:
    """Draw where each image's median lies in its structure's range, whatever the range's width in HU."""
    rows = [item for item in result.items if item["within"] is not None]
    figure.set_size_inches(8, max(3.0, 1.4 + 0.3 * len(rows)))
    axis = figure.add_subplot()
    axis.axvspan(0, 1, color="0.88", label="range of real cases")
    for place, item in enumerate(rows):
        width = (item["high"] - item["low"]) or 1.0
        where = np.clip((np.array(item["values"]) - item["low"]) / width, -REACH, 1 + REACH)
        colors = np.where((where >= 0) & (where <= 1), "tab:blue", "tab:red")
        axis.scatter(where, np.full(len(where), place), s=14, c=colors, alpha=0.6, linewidths=0)
    names = [f"{item['structure']} ({item['real range']}, {item['within']:.0%} within)" for item in rows]
    axis.set_yticks(np.arange(len(rows)), names, fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks([0, 1], ["low end", "high end"])
    axis.set(xlim=(-REACH - 0.1, 1 + REACH + 0.1), title="Median HU of generated structures")
