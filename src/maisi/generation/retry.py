"""Made again until it passes: the quality check of a generated item, within bounds. Imports no torch.

An item with a mask whose report does not pass is made again from other noise, as often as the request allows, and the
best is kept. Without a mask there is nothing that other noise would have to follow: it is judged once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from maisi.data.quality import QualityRanges, QualityReport, judge
from maisi.generation.output import Item


def best_of(make: Callable[[int], Item], retries: int, ranges: QualityRanges | None = None) -> Item:
    """Make an item, judge it, and make it anew where that is of use.

    Args:
        make: attempt, from 0 -> the item made so; the attempt decides the noise.
        retries: attempts after the first, at most.
        ranges: what passes; None: the carried ranges.

    Returns:
        The first item that passes, or the one with the best score, the earliest of equals. Its details have its report
        as 'quality', with the attempts made and the number of the one kept; its timings are its own, and how long the
        judging took.
    """
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
    quality = {**report.as_json(), "attempts": attempt, "kept": kept}
    timings = {**item.timings_s, "quality": judging}
    return replace(item, timings_s=timings, details={**item.details, "quality": quality})
