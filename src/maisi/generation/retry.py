"""Made again until it passes: the quality check of a generated item, within bounds. Imports no torch.

An item with a mask whose report does not pass is made again from other noise, as often as the request allows, and the
best is kept. Without a mask there is nothing that other noise would have to follow: it is judged once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from maisi.data.quality import QualityRanges, QualityReport, carried_ranges, judge, read_ranges
from maisi.generation.output import Item
from maisi.weights.registry import ModelFolder


def ranges_of(folder: ModelFolder) -> QualityRanges:
    """Return the ranges that a model's images are judged by: its own, or those that the package carries.

    Raises:
        MaisiError: its file is not what `model.json` says, or holds no ranges.
    """
    path = folder.ranges()
    return carried_ranges() if path is None else read_ranges(path)


def best_of(make: Callable[[int], Item], retries: int, ranges: QualityRanges | None = None) -> Item:
    """Make an item, judge it, and make it anew where that is of use.

    Args:
        make: attempt, from 0 -> the item made so; the attempt decides the noise.
        retries: attempts after the first, at most.
        ranges: what passes; None: the carried ranges.

    Returns:
        The first item that passes, or the one with the best score, the earliest of equals. Its details have its report
        as 'quality', with the attempts made, the number of the one kept and where the ranges are from; its timings are
        its own, and how long the judging took.
    """
    ranges = ranges or carried_ranges()
    best: tuple[Item, QualityReport, int] | None = None
    judging = 0.0
    attempt = 0
    while True:
        item = make(attempt)
        started = time.perf_counter()
        in_hu = item.request.modality.startswith("ct")
        report = judge(item.image, item.labels, ranges, in_hu)
        judging += time.perf_counter() - started
        if best is None or report.score < best[1].score:
            best = (item, report, attempt)
        attempt += 1
        if report.passed or item.labels is None or attempt > retries:
            break
    item, report, kept = best
    quality = {**report.as_json(), "attempts": attempt, "kept": kept, "ranges": ranges.source}
    timings = {**item.timings_s, "quality": judging}
    return replace(item, timings_s=timings, details={**item.details, "quality": quality})
