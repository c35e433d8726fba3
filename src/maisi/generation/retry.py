"""Made again until it passes: the quality check of a generated item, within bounds. Imports no torch.

An item with a mask whose report does not pass is made again from other noise, as often as the request allows, and the
best is kept; where a tumour lacks the contrast of its kind, from the same noise with the guidance that mends it.
After each attempt that fails the label map guides half as much: that exaggerates what a model knows little of.
Without a mask there is nothing that other noise would have to follow: it is judged once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from maisi.anatomy import TUMORS
from maisi.data.label_maps import ids_in
from maisi.data.quality import QualityRanges, QualityReport, carried_ranges, judge, read_ranges
from maisi.generation.output import Item
from maisi.generation.tumor_contrast import Contrasts, Setting
from maisi.weights.registry import ModelFolder


def ranges_of(folder: ModelFolder) -> QualityRanges:
    """Return the ranges that a model's images are judged by: its own, or those that the package carries.

    Raises:
        MaisiError: its file is not what `model.json` says, or holds no ranges.
    """
    path = folder.ranges()
    return carried_ranges() if path is None else read_ranges(path)


def best_of(
    make: Callable[[Setting], Item],
    retries: int,
    ranges: QualityRanges | None = None,
    guidance: float = 0.0,
    mask_guidance: float = 0.0,
    halving: bool = True,
) -> Item:
    """Make an item, judge it, and make it anew where that is of use.

    Args:
        make: makes the item with what an attempt is given.
        retries: attempts after the first, at most.
        ranges: what passes; None: the carried ranges.
        guidance: of the first attempt.
        mask_guidance: of the first attempt.
        halving: whether a failed attempt halves it.

    Returns:
        The first item that passes, its tumours with the contrast of their kind, or the one with the best score, the
        earliest of equals. Its details have its report as 'quality', with the attempts made, the number of the one kept
        and where the ranges are from, and its tumours' contrasts; its timings are its own, and how long the judging
        took.
    """
    ranges = ranges or carried_ranges()
    setting = Setting(guidance, mask_guidance=mask_guidance)
    attempts: list[_Judged] = []
    judging = 0.0
    while True:
        item = make(setting)
        started = time.perf_counter()
        attempts.append(_Judged.of(item, setting, ranges))
        judging += time.perf_counter() - started
        if attempts[-1].passed or item.labels is None or len(attempts) > retries:
            break
        setting = attempts[-1].contrasts.next(setting)
        if halving and not attempts[-1].report.passed:
            setting = replace(setting, mask_guidance=setting.mask_guidance / 2)
    kept = min(range(len(attempts)), key=lambda number: attempts[number].score)
    best = attempts[kept]
    quality = {**best.report.as_json(), "attempts": len(attempts), "kept": kept, "ranges": ranges.source}
    details = {**best.item.details, "quality": quality, **best.contrasts.as_details(best.made_with)}
    return replace(best.item, timings_s={**best.item.timings_s, "quality": judging}, details=details)


def count_attempts(progress: Callable[[str, int, int], None]) -> Iterator[Callable[[str, int, int], None]]:
    """What each attempt tells its progress to: after the first its stages say which attempt it is."""
    yield progress
    for number in count(2):
        yield lambda stage, done, total, number=number: progress(f"{stage}, attempt {number}", done, total)  # type: ignore[misc]


@dataclass(frozen=True)
class _Judged:
    """An attempt with what was found in it."""

    item: Item
    made_with: Setting
    report: QualityReport
    contrasts: Contrasts

    @classmethod
    def of(cls, item: Item, made_with: Setting, ranges: QualityRanges) -> _Judged:
        in_hu = item.request.modality.startswith("ct")
        report = judge(item.image, item.labels, ranges, in_hu)
        if item.labels is None or not in_hu:
            return cls(item, made_with, report, Contrasts({}, 0.0, 1.0))
        tumors = TUMORS.keys() & ids_in(item.labels.array)
        return cls(item, made_with, report, Contrasts.of(item.image, item.labels, tumors))

    @property
    def score(self) -> float:
        return self.report.score + self.contrasts.shortfall

    @property
    def passed(self) -> bool:
        return self.report.passed and self.contrasts.shortfall == 0
