"""Made again until it passes: the quality check of a generated item, within bounds. Imports no torch.

An item with a mask whose report does not pass is made again from other noise, as often as the request allows, and the
best is kept; where a tumour lacks the contrast of its kind, or nothing but medians of structures fails, from the same
noise with the guidance that mends it. After each other attempt that fails the label map guides half as much: that
exaggerates what a model knows little of.
Without a mask there is nothing that other noise would have to follow: it is judged once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from maisi.anatomy import TUMORS
from maisi.data.label_maps import ids_in
from maisi.data.quality import QualityRanges, carried_ranges, judge, read_ranges
from maisi.generation.density import Made, corrected
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
    first: Setting | None = None,
    halving: bool = True,
    fixed: Collection[int] = (),
) -> Item:
    """Make an item, judge it, and make it anew where that is of use.

    Args:
        make: makes the item with what an attempt is given.
        retries: attempts after the first, at most.
        ranges: what passes; None: the carried ranges.
        first: what the first attempt is made with; None: without guidance.
        halving: whether a failed attempt halves the guidance by the label map.
        fixed: ids of structures whose strength stays as it is.

    Returns:
        The first item that passes, its tumours with the contrast of their kind, or the one with the best score, the
        earliest of equals. Its details have its report as 'quality', with the attempts made, the number of the one kept
        and where the ranges are from, and its tumours' contrasts; its timings are its own, and how long the judging
        took.
    """
    ranges = ranges or carried_ranges()
    setting = first or Setting()
    attempts: list[_Judged] = []
    judging = 0.0
    while True:
        item = make(setting)
        started = time.perf_counter()
        attempts.append(_Judged.of(item, setting, ranges))
        judging += time.perf_counter() - started
        if attempts[-1].passed or item.labels is None or len(attempts) > retries:
            break
        setting = _next(attempts, halving, fixed)
    kept = min(range(len(attempts)), key=lambda number: attempts[number].score)
    best = attempts[kept]
    quality = {**best.report.as_json(), "attempts": len(attempts), "kept": kept, "ranges": ranges.source}
    details = {**best.item.details, "quality": quality, **best.contrasts.as_details(best.setting)}
    return replace(best.item, timings_s={**best.item.timings_s, "quality": judging}, details=details)


def count_attempts(progress: Callable[[str, int, int], None]) -> Iterator[Callable[[str, int, int], None]]:
    """What each attempt tells its progress to: after the first its stages say which attempt it is."""
    yield progress
    for number in count(2):
        yield lambda stage, done, total, number=number: progress(f"{stage}, attempt {number}", done, total)  # type: ignore[misc]


def _next(attempts: Sequence[_Judged], halving: bool, fixed: Collection[int]) -> Setting:
    """What another attempt is to be made with."""
    last = attempts[-1]
    setting = last.contrasts.next(last.setting, [(made.contrasts, made.setting) for made in attempts[:-1]])
    strengths = corrected(attempts, fixed)
    if strengths is not None:
        # other noise only where a tumour asks for it
        noise = last.setting.noise if last.contrasts.ratio == 1 else setting.noise
        return replace(setting, noise=noise, strengthened=strengths)
    if halving and not last.report.passed:
        return replace(setting, mask_guidance=setting.mask_guidance / 2)
    return setting


@dataclass(frozen=True)
class _Judged(Made):
    """An attempt with what was found in it."""

    item: Item
    contrasts: Contrasts

    @classmethod
    def of(cls, item: Item, setting: Setting, ranges: QualityRanges) -> _Judged:
        in_hu = item.request.modality.startswith("ct")
        report = judge(item.image, item.labels, ranges, in_hu)
        if item.labels is None or not in_hu:
            return cls(setting, report, item, Contrasts({}, 0.0, 1.0))
        tumors = TUMORS.keys() & ids_in(item.labels.array)
        return cls(setting, report, item, Contrasts.of(item.image, item.labels, tumors))

    @property
    def score(self) -> float:
        return self.report.score + self.contrasts.shortfall

    @property
    def passed(self) -> bool:
        return self.report.passed and self.contrasts.shortfall == 0
