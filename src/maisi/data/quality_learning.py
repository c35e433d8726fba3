"""Ranges for the quality check out of one's own cases, few or many. Knows no network.

A case tells one number of each kind, and `data.quality` measures it. What many cases say stands as they say it; what
few say is held near the ranges that the package carries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maisi.data.manifest import Case, read_cases
from maisi.data.prepare import label_map
from maisi.data.prepared import PreparedCase, PreparedFolder, Split
from maisi.data.preprocess import STORED_HU, hu_fault
from maisi.data.quality import (
    ORGANS,
    ContrastRange,
    OrganRange,
    QualityRanges,
    StructureRange,
    carried_ranges,
    check,
    structure_medians,
)
from maisi.errors import MaisiError
from maisi.io.nifti import read_volume
from maisi.volume import Volume

Pair = tuple[Volume, Volume]
Values = dict[tuple[str, str], list[float]]

PRIOR_CASES = 10
"""The carried standard deviation weighs as much as that of so many cases: with one case it decides, with 100 hardly.

Labels of which nothing is carried have a range where so many cases show them.
"""

SPREAD_FACTOR = 2.0
"""Texture may be so many times weaker than the weakest seen, and stronger than the strongest."""

LIMIT_FACTOR = 1.25
"""Where the cases need a looser limit than the carried one, it lies so far beyond them."""


def pairs_of(
    source: Path, progress: Callable[[int, int], None] | None = None, split: Split | None = None
) -> Iterator[Pair]:
    """Yield CT and label map of each case of a prepared folder, or of a case list, RAS+.

    Cases of a list are labelled as `maisi prepare` does: given labels over rule-based ones. Cases that are no CT, and
    cases of a folder without labels, are left out.

    Args:
        source: folder or JSON file.
        progress: called with (cases done, cases in all).
        split: which cases; None: all.

    Raises:
        MaisiError: it is neither, or a file of it cannot be read.
    """
    makers: list[Callable[[], Pair]]
    if source.is_dir():
        folder = PreparedFolder(source)
        cases = folder.index.cases if split is None else folder.cases(split)
        labelled = [case for case in cases if case.is_ct and case.labels is not None]
        makers = [partial(_prepared_pair, folder, case) for case in labelled]
    else:
        given = read_cases(source)
        listed = [case for case in given.cases if split in (None, case.split)]
        makers = [partial(_listed_pair, case, given.custom_labels) for case in listed if case.modality.startswith("ct")]
    for done, make in enumerate(makers):
        yield make()
        if progress:
            progress(done + 1, len(makers))


def learn(pairs: Iterable[Pair], source: str, least: int = 1) -> QualityRanges:
    """Measure cases and return the ranges in which they lie.

    Args:
        pairs: CT in HU and label map of each case.
        source: what to write into the ranges about their origin.
        least: organs and tumours that fewer cases show keep the carried range, so that no number tells of a few people.

    Raises:
        MaisiError: there is no case, or image and label map of one don't go together.
    """
    values: Values = defaultdict(list)
    carried = carried_ranges()
    for image, labels in pairs:
        for finding in check(image, labels).findings:
            values[finding.kind, finding.of].append(finding.value)
        for name, median in structure_medians(image.to_ras(), labels.to_ras(), carried.smallest_ml).items():
            values["median", name].append(median)
    if not values:
        raise MaisiError(f"{source} holds no CT with a label map; give cases with both.")
    seen = {of: told for (kind, of), told in sorted(values.items()) if kind == "median" and of not in ORGANS}
    return QualityRanges(
        source=source,
        organs={name: _organ(values, name, known, least) for name, known in carried.organs.items()},
        tumors={name: _tumor(values["contrast", name], known, least) for name, known in carried.tumors.items()},
        structures=median_ranges({name: told for name, told in seen.items() if len(told) >= least}),
        stray_share=min(1.0, _looser(values["stray", ""], carried.stray_share)),
        seam=_looser([value for axis in "XYZ" for value in values["seam", axis]], carried.seam),
        saturated_share=min(1.0, _looser(values["saturated", ""], carried.saturated_share)),
        agreement={name: _lower(values["dice", name], limit) for name, limit in carried.agreement.items()},
    )


def _organ(values: Values, name: str, known: OrganRange, least: int) -> OrganRange:
    medians, spreads = values["median", name], values["spread", name]
    if len(medians) < max(least, 1):
        return known.model_copy(update={"cases": 0})
    flattest, noisiest = np.percentile(spreads, (0.5, 99.5))
    return _organ_range(medians, known, (_short(flattest / SPREAD_FACTOR), _short(noisiest * SPREAD_FACTOR)))


def _organ_range(medians: Sequence[float], known: OrganRange, spread: tuple[float, float]) -> OrganRange:
    low, high = _six_sigma(medians, known.sigma_6_high - known.sigma_6_low)
    first, last = np.percentile(medians, (0.5, 99.5))
    return OrganRange(
        percentile_0_5=_short(first),
        percentile_99_5=_short(last),
        sigma_6_low=_short(low),
        sigma_6_high=_short(high),
        at_most=known.at_most,
        spread=spread,
        cases=len(medians),
    )


def median_ranges(found: Mapping[str, Sequence[float]]) -> dict[str, StructureRange]:
    """Turn medians in real cases, as `quality.medians` tells them, into the ranges in which they lie.

    Organs are held near the carried ranges; what else is seen in fewer than `PRIOR_CASES` has none.
    """
    carried, ranges = carried_ranges().organs, {}
    for name, told in found.items():
        if name in carried and told:
            organ = _organ_range(told, carried[name], carried[name].spread)
            ranges[name] = StructureRange(low=organ.low, high=organ.high, cases=organ.cases)
        elif len(told) >= PRIOR_CASES:
            low, high = _six_sigma(told, None)
            first, last = np.percentile(told, (0.5, 99.5))
            ranges[name] = StructureRange(low=_short(min(low, first)), high=_short(max(high, last)), cases=len(told))
    return ranges


def _tumor(contrasts: Sequence[float], known: ContrastRange, least: int) -> ContrastRange:
    if len(contrasts) < max(least, 1):
        return known.model_copy(update={"cases": 0})
    low, high = _six_sigma(contrasts, known.high - known.low)
    first, last = np.percentile(contrasts, (0.5, 99.5))
    size = min(known.smallest, float(np.percentile(np.abs(contrasts), 0.5)))
    return ContrastRange(
        low=_short(min(low, first)), high=_short(max(high, last)), smallest=_short(size), cases=len(contrasts)
    )


def _six_sigma(values: Sequence[float], known_width: float | None) -> tuple[float, float]:
    """Band of six standard deviations around the mean, within what a CT can hold.

    The variance is pooled with that of a carried band, `known_width` wide, as if `PRIOR_CASES` had shown it.
    """
    mean = float(np.mean(values))
    known, count = (0.0, 0) if known_width is None else (PRIOR_CASES * (known_width / 6) ** 2, PRIOR_CASES)
    deviation = np.sqrt((known + np.sum((np.array(values) - mean) ** 2)) / (count + len(values) - 1))
    return max(mean - 3 * float(deviation), STORED_HU[0]), min(mean + 3 * float(deviation), STORED_HU[1])


def _looser(values: Sequence[float], limit: float) -> float:
    """An upper limit that the values keep, not below the carried one."""
    return _short(max(limit, LIMIT_FACTOR * np.percentile(values, 99.5))) if values else limit


def _lower(values: Sequence[float], limit: float) -> float:
    """A lower limit (of a Dice: what counts is its distance from 1) that the values keep, not above the carried one."""
    return _short(max(0.0, min(limit, 1 - LIMIT_FACTOR * (1 - np.percentile(values, 0.5))))) if values else limit


def _short(value: Any) -> float:
    return round(float(value), 3)


def _prepared_pair(folder: PreparedFolder, case: PreparedCase) -> Pair:
    affine = np.array(case.affine)
    return Volume(np.array(folder.image(case)), affine), Volume(np.array(folder.labels(case)), affine)


def _listed_pair(case: Case, custom: Mapping[int, str]) -> Pair:
    image = read_volume(case.image).to_ras()
    if fault := hu_fault(image.array):
        raise MaisiError(f"Case {case.id} does not hold HU: {fault}.")
    image = image.with_array(np.clip(np.rint(image.array), *STORED_HU).astype(np.int16))
    return image, image.with_array(label_map(case, image, custom))
