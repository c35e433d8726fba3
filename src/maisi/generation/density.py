"""How a structure gets the density of its kind: one attempt sets how far the next goes away from a map without it.

Away from what networks make with a label map that lacks a structure, its HU change about in proportion, and little else
does. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from maisi.anatomy import label_id
from maisi.data.quality import ORGANS, Finding, QualityReport
from maisi.generation.tumor_contrast import Setting

MOST = 2
"""Structures of one item that are corrected: each takes another run of the networks at each step."""

STRENGTH_RANGE = (-10.0, 10.0)
"""What an attempt may set a strength to."""

USUAL_HU, TRIAL = 12.0, 4.0
"""What the first step takes one unit of strength to do, and its longest. Cords of `tiny` move by 8 to 12 HU in voxels
of 4.5 mm and by 20 to 30 in 3 mm, where twice the step wanted is still within their range."""

_LEAST_HU = 3.0
_AIRY_HU = -150.0


@dataclass(frozen=True)
class Made:
    """An attempt: what it was made with, and what was found in it."""

    setting: Setting
    report: QualityReport


def corrected(attempts: Sequence[Made], fixed: Collection[int] = ()) -> dict[int, float] | None:
    """Strengths for another attempt from the noise of the last one, that bring medians an eighth into their ranges.

    The first step is a guess, the next ones are what the guess has shown.

    Args:
        attempts: so far, at least one.
        fixed: ids whose strength is not to be changed.

    Returns:
        Label id -> strength, as `Setting.strengthened`; None where the last attempt passed, where not only medians
        fail, or where none of them can be moved.
    """
    last = attempts[-1]
    if not last.report.failed or any(finding.kind != "median" for finding in last.report.failed):
        return None
    strengths = dict(last.setting.strengthened)
    moved = False
    for finding in sorted(last.report.failed, key=lambda finding: -finding.violation):
        ids = ids_of(finding.of)
        others = {_together(id) for id in strengths if id not in ids}
        if len(others) < MOST and not set(ids) & set(fixed):
            strength = _next(finding, ids[0], attempts)
            moved = moved or strength != strengths.get(ids[0], 0.0)
            strengths |= dict.fromkeys(ids, strength)
    return {id: strength for id, strength in strengths.items() if strength} if moved else None


def ids_of(name: str) -> tuple[int, ...]:
    """Ids of what the finding of a median is of: an organ's, or that of a label."""
    return ORGANS.get(name) or (label_id(name),)


def _together(id: int) -> tuple[int, ...]:
    """The ids that are moved with one."""
    return next((ids for ids in ORGANS.values() if id in ids), (id,))


def _next(finding: Finding, id: int, attempts: Sequence[Made]) -> float:
    """The strength that should bring one structure an eighth into its range; as it was where that is out of reach.

    Not to its middle: much strength changes what lies beside the structure, too.
    """
    setting = attempts[-1].setting
    assert finding.low is not None  # medians have ranges with two ends
    assert finding.high is not None
    inside = (finding.high - finding.low) / 8
    goal = min(max(finding.value, finding.low + inside), finding.high - inside)
    now = setting.strengthened.get(id, 0.0)
    slope = _slope(finding, id, attempts)
    if slope is None:
        usual = USUAL_HU if goal > _AIRY_HU else -USUAL_HU
        step = min(max((goal - finding.value) / usual, -TRIAL), TRIAL)
    elif abs(slope) < _LEAST_HU:
        return now
    else:
        step = (goal - finding.value) / slope
    low, high = STRENGTH_RANGE
    return round(min(max(now + step, low), high), 2)


def _slope(finding: Finding, id: int, attempts: Sequence[Made]) -> float | None:
    """HU for one unit of strength, from the last attempt and one like it but for that; None where there is none."""
    setting = attempts[-1].setting
    for made in reversed(attempts[:-1]):
        change = setting.strengthened.get(id, 0.0) - made.setting.strengthened.get(id, 0.0)
        alike = (made.setting.noise, made.setting.mask_guidance) == (setting.noise, setting.mask_guidance)
        if alike and change:
            values = _medians(made.report)
            return (finding.value - values[finding.of]) / change if finding.of in values else None
    return None


def _medians(report: QualityReport) -> Mapping[str, float]:
    return {finding.of: finding.value for finding in report.findings if finding.kind == "median"}
