"""Is a CT what its label map says? Measures against ranges, one finding each. Knows no file but JSON, and no network.

The rule of the paper comes first: the median HU of each major organ lies in the range known from real data. Others ask
for texture, for air around the body, for tumours that stand out from their host, for structures that rules find again,
and, of images without a label map too, for numbers that are HU and for planes without seams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from maisi.anatomy import ANY_BONE, BODY, KNOWN_IDS, LUNGS, TUMORS, label_id, label_name
from maisi.config import Config, parse_config
from maisi.data.agreement import STRUCTURES
from maisi.data.preprocess import HU_MAX, STORED_HU, padding_of, robust_deviation
from maisi.data.quality_measures import agreement, label_medians, seam, select, stray_share
from maisi.data.tumor_texture import contrasts
from maisi.errors import MaisiError
from maisi.volume import Array, Volume

ORGANS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "liver": (label_id("liver"),),
        "spleen": (label_id("spleen"),),
        "pancreas": (label_id("pancreas"),),
        "kidney": (label_id("right kidney"), label_id("left kidney")),
        "lung": LUNGS,
        "bone": ANY_BONE,
        "brain": (label_id("brain"),),
    }
)
"""The major organs whose HU are judged -> their ids; the bones that only maisi names are bone too."""

NAMES = {
    "not finite": "share of values that are no number",
    "not HU": f"share of values outside {STORED_HU[0]} to {STORED_HU[1]} HU",
    "saturated": f"share of {HU_MAX:g} HU and more",
    "seam": "seam across {}",
    "median": "{}: median HU",
    "spread": "{}: spread in HU",
    "stray": "share of the air around the body that is none",
    "contrast": "{}: HU over its host",
    "dice": "{}: Dice of rules and label map",
}
"""Kind of a finding -> what it is called; the braces stand for what it is of."""

OVERSHOOT_HU, FEW_SHARE = 300.0, 0.001
"""Up to this share values a little below what scanners measure are overshoot, those above metal."""

WORST = 10.0
"""A finding counts no more than this in the score, however far out it lies."""


class OrganRange(Config):
    """Median HU of an organ in real cases.

    Attributes:
        percentile_0_5: of the cases' medians.
        percentile_99_5: so.
        sigma_6_low: lower end of a band six standard deviations wide around their mean.
        sigma_6_high: its upper end.
        at_most: where given, the upper end of what is normal whatever the cases say.
        spread: robust standard deviation inside the organ, from flat to noise, HU.
        cases: how many cases the numbers are from; None: not told.
    """

    percentile_0_5: float
    percentile_99_5: float
    sigma_6_low: float
    sigma_6_high: float
    at_most: float | None = None
    spread: tuple[float, float]
    cases: int | None = None

    @property
    def low(self) -> float:
        """The lowest median that is normal."""
        return min(self.sigma_6_low, self.percentile_0_5)

    @property
    def high(self) -> float:
        """The highest."""
        return max(self.sigma_6_high, self.percentile_99_5) if self.at_most is None else self.at_most


class ContrastRange(Config):
    """Median HU of a tumour less that of its host around it: from `low` to `high`, and `smallest` at least in size."""

    low: float
    high: float
    smallest: float = 0.0
    cases: int | None = None


class StructureRange(Config):
    """Median HU of one label in real cases: from `low` to `high`, in so many cases."""

    low: float
    high: float
    cases: int | None = None


class QualityRanges(Config):
    """What passes. The defaults beside organs and tumours are rules; `maisi quality learn` loosens them by need.

    Attributes:
        source: where the numbers are from.
        organs: key of `ORGANS` -> range.
        tumors: name of a tumour -> contrast with its host.
        structures: name of any other label -> its median HU; only `maisi quality learn` knows such.
        smallest_ml: organs of which the label map has less are not judged.
        stray_share: of the voxels outside the body, how many may be no air.
        seam: how many times as far as its neighbours a plane may jump.
        saturated_share: how many voxels may have the highest HU that networks make, or more.
        agreement: structure -> smallest Dice of what rules find in the image with the label map.
        agreement_ml: structures of which the label map has less are not looked for.
    """

    source: str
    organs: dict[str, OrganRange]
    tumors: dict[str, ContrastRange] = Field(default_factory=dict)
    structures: dict[str, StructureRange] = Field(default_factory=dict)
    smallest_ml: float = Field(default=1.0, ge=0)
    stray_share: float = Field(default=0.2, ge=0, le=1)
    seam: float = Field(default=3.0, gt=0)
    saturated_share: float = Field(default=0.02, ge=0, le=1)
    agreement: dict[str, float] = Field(default_factory=lambda: {"lungs": 0.8, "skeleton": 0.4, "body": 0.9})
    agreement_ml: float = Field(default=500.0, ge=0)

    @field_validator("organs")
    @classmethod
    def _known_organs(cls, organs: dict[str, OrganRange]) -> dict[str, OrganRange]:
        return _known(organs, list(ORGANS))

    @field_validator("tumors")
    @classmethod
    def _known_tumors(cls, tumors: dict[str, ContrastRange]) -> dict[str, ContrastRange]:
        return _known(tumors, [label_name(id) for id in TUMORS])

    @field_validator("structures")
    @classmethod
    def _known_labels(cls, structures: dict[str, StructureRange]) -> dict[str, StructureRange]:
        try:
            return {label_name(label_id(name)): normal for name, normal in structures.items()}
        except MaisiError as error:
            raise ValueError(str(error).rstrip(".")) from None

    @field_validator("agreement")
    @classmethod
    def _known_structures(cls, limits: dict[str, float]) -> dict[str, float]:
        return _known(limits, list(STRUCTURES))

    @model_validator(mode="after")
    def _in_order(self) -> QualityRanges:
        for name, entry in (self.organs | self.tumors | self.structures).items():
            if not entry.low <= entry.high:
                raise ValueError(f"the range of '{name}' ends below its start")
        return self

    @property
    def medians(self) -> dict[str, StructureRange]:
        """Median HU that is normal, of organs and structures alike."""
        organs = {name: StructureRange(low=o.low, high=o.high, cases=o.cases) for name, o in self.organs.items()}
        return organs | self.structures

    def contrast(self, tumor: str, hu: float) -> Finding:
        """What these ranges say of a tumour (a key of `tumors`) that stands out by so many HU."""
        normal = self.tumors[tumor]
        return Finding("contrast", tumor, hu, normal.low, normal.high, smallest=normal.smallest)


@lru_cache
def carried_ranges() -> QualityRanges:
    """Return the ranges that the package carries: HU of the paper's training data, and rules."""
    text = resources.files("maisi.data").joinpath("organ_hu_ranges.json").read_text(encoding="utf-8")
    return QualityRanges.model_validate_json(text)


def read_ranges(path: Path) -> QualityRanges:
    """Read ranges from JSON, as `maisi quality learn` writes them.

    Raises:
        MaisiError: no such file, not JSON, unknown keys or wrong values.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MaisiError(f"Cannot read {path}: {error.strerror}; give ranges made by 'maisi quality learn'.") from None
    except ValueError as error:  # bytes that are no text are a ValueError too
        raise MaisiError(f"{path} is not JSON ({error}); correct it there.") from None
    return parse_config(QualityRanges, values, str(path))


@dataclass(frozen=True)
class Finding:
    """One number against its range.

    Attributes:
        kind: key of `NAMES`.
        of: the organ, tumour, structure or axis that it is of; '' for the image as a whole.
        value: the number.
        low: the least that passes; None: no lower end.
        high: the most that passes; None: no upper end.
        detail: what else is known of it, such as where.
        smallest: the least size that passes, whatever the sign.
    """

    kind: str
    of: str
    value: float
    low: float | None = None
    high: float | None = None
    detail: str = ""
    smallest: float = 0.0

    @property
    def name(self) -> str:
        """What was measured, such as 'liver: median HU'."""
        return NAMES[self.kind].format(self.of)

    @property
    def passed(self) -> bool:
        """Whether the value lies in the range."""
        return self.violation == 0

    @property
    def violation(self) -> float:
        """How far outside the range the value lies, in units of the range (of its one end): 0 is in."""
        ends = [end for end in (self.low, self.high) if end is not None]
        unit = (max(ends) - min(ends) if len(ends) == 2 else abs(ends[0]) if ends else 0) or 1.0
        below = 0.0 if self.low is None else self.low - self.value
        above = 0.0 if self.high is None else self.value - self.high
        return max(below, above, self.smallest - abs(self.value), 0.0) / unit

    @property
    def range(self) -> str:
        """The range in words."""
        low, high = (None if end is None else f"{end:.4g}" for end in (self.low, self.high))
        text = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
        return text + (f", {self.smallest:.4g} off 0" if self.smallest else "")

    @property
    def sentence(self) -> str:
        """The finding as one sentence."""
        where = f" ({self.detail})" if self.detail else ""
        verdict = "as it should be" if self.passed else "but should not be"
        return f"{self.name[0].upper()}{self.name[1:]} is {self.value:.4g}{where}, {verdict}: {self.range}."


@dataclass(frozen=True)
class QualityReport:
    """All findings on one image."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Those that did not pass."""
        return tuple(finding for finding in self.findings if not finding.passed)

    @property
    def passed(self) -> bool:
        """Whether all did."""
        return not self.failed

    @property
    def score(self) -> float:
        """Less is better, and 0 is passed: each finding that failed counts 1 and how far it is out, 10 at most."""
        return sum(min(1 + finding.violation, WORST) for finding in self.failed)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        keys = ("kind", "of", "value", "low", "high", "passed", "sentence")
        rows = [{key: _plain(getattr(finding, key)) for key in keys} for finding in self.findings]
        return {"passed": self.passed, "score": round(self.score, 4), "findings": rows}


def check(image: Volume, labels: Volume, ranges: QualityRanges | None = None) -> QualityReport:
    """Judge a CT by its label map, after a look at whether the two can be compared.

    Args:
        image: HU, any orientation.
        labels: maisi's ids, on the same grid, in any orientation of its own.
        ranges: what passes; None: the carried ones.

    Raises:
        MaisiError: the grids differ, the label map is empty, or the values of the image are no HU.
    """
    image, labels = image.to_ras(), labels.to_ras()
    _require_comparable(image, labels)
    return judge(image, labels, ranges)


def judge(
    image: Volume, labels: Volume | None, ranges: QualityRanges | None = None, in_hu: bool = True
) -> QualityReport:
    """Judge an image as it is, good or bad, by its label map if it has one.

    Args:
        image: any orientation.
        labels: maisi's ids on the same grid, or None: then only what needs none is looked at.
        ranges: what passes; None: the carried ones.
        in_hu: whether the values are HU; if not (MR), only what holds for any values is looked at.
    """
    ranges = ranges or carried_ranges()
    ras = image.to_ras()
    finite = np.isfinite(ras.array)
    findings = [Finding("not finite", "", 1 - float(finite.mean()), high=0.0)]
    if not finite.all():
        ras = ras.with_array(np.where(finite, ras.array, STORED_HU[0]).astype(ras.array.dtype))
    findings += _value_findings(ras.array, ranges) if in_hu else []
    findings += _seam_findings(ras.array, ranges, in_hu)
    if labels is not None and in_hu:
        mask = labels.to_ras()
        mask = mask.with_array(mask.array.astype(np.uint8))
        findings += [
            *_organ_findings(ras, mask, ranges),
            *_structure_findings(ras, mask, ranges),
            *_air_findings(ras, mask, ranges),
            *_tumor_findings(ras, mask, ranges),
            *_agreement_findings(ras, mask, ranges),
        ]
    return QualityReport(tuple(findings))


def _value_findings(hu: Array, ranges: QualityRanges) -> Iterator[Finding]:
    """Are the values those of a CT?

    Scanners pad with less than they can measure, metal is beyond it, and edges that were resampled overshoot.
    """
    low, high = STORED_HU
    far = 0.0 if padding_of(hu) is not None else float((hu < low - OVERSHOOT_HU).mean())
    few = (float(((hu < low) & (hu >= low - OVERSHOOT_HU)).mean()), float((hu > high).mean()))
    outside = far + sum(share for share in few if share > FEW_SHARE)
    yield Finding("not HU", "", outside, high=0.0)
    yield Finding("saturated", "", float((hu >= HU_MAX).mean()), high=ranges.saturated_share)


def _seam_findings(array: Array, ranges: QualityRanges, in_hu: bool) -> Iterator[Finding]:
    """Does the image jump at a plane?"""
    for axis, name in enumerate("XYZ"):
        ratio, place = seam(array, axis) if in_hu else seam(array, axis, air_below=None)
        yield Finding("seam", name, ratio, high=ranges.seam, detail=f"before plane {place}")


def _organ_findings(image: Volume, labels: Volume, ranges: QualityRanges) -> Iterator[Finding]:
    """The paper's rule, and the texture of each organ."""
    for name, normal in ranges.organs.items():
        values = _organ_values(image, labels, name, ranges.smallest_ml)
        if values is None:
            continue
        yield Finding("median", name, float(np.median(values)), normal.low, normal.high)
        yield Finding("spread", name, robust_deviation(values), *normal.spread)


def _structure_findings(image: Volume, labels: Volume, ranges: QualityRanges) -> Iterator[Finding]:
    """The same rule for every label of which the ranges know real cases."""
    found = label_medians(image, labels, ranges.smallest_ml) if ranges.structures else {}
    for name, normal in ranges.structures.items():
        median = found.get(label_id(name))
        if median is not None:
            yield Finding("median", name, median, normal.low, normal.high)


def _air_findings(image: Volume, labels: Volume, ranges: QualityRanges) -> Iterator[Finding]:
    """Is there air where the label map has nothing?"""
    if _has_body(labels):
        share = stray_share(image, labels.array > 0)
        yield Finding("stray", "", share, high=ranges.stray_share)


def _tumor_findings(image: Volume, labels: Volume, ranges: QualityRanges) -> Iterator[Finding]:
    """Do tumours stand out from their hosts?"""
    for name in ranges.tumors:
        measured = contrasts(image.array, labels.array, label_id(name), image.spacing_mm)
        if measured:
            worst = max((ranges.contrast(name, one.hu) for one in measured), key=lambda found: found.violation)
            yield worst if len(measured) == 1 else replace(worst, detail=f"the worst of {len(measured)}")


def _agreement_findings(image: Volume, labels: Volume, ranges: QualityRanges) -> Iterator[Finding]:
    """Do rules find in the image what the label map has?"""
    wanted = [name for name in ranges.agreement if _is_looked_for(labels, name, ranges.agreement_ml)]
    found = agreement(image, labels) if wanted else {}
    for name in wanted:
        yield Finding("dice", name, found.get(name, 0.0), low=ranges.agreement[name])


def medians(image: Volume, labels: Volume, smallest_ml: float) -> dict[str, float]:
    """Return the median HU of each organ of `ORGANS`, and of each label that is neither of these nor a tumour.

    Args:
        image: HU, RAS+.
        labels: uint8, on the same grid; ids that the vocabulary does not know are left out.
        smallest_ml: what the label map has less of is left out.
    """
    organs = {name: _organ_values(image, labels, name, smallest_ml) for name in ORGANS}
    found = {name: float(np.median(values)) for name, values in organs.items() if values is not None}
    return found | structure_medians(image, labels, smallest_ml)


def structure_medians(image: Volume, labels: Volume, smallest_ml: float) -> dict[str, float]:
    """As `medians`, without the organs."""
    found = label_medians(image, labels, smallest_ml)
    known = {id: label_name(id) for id in found if id in KNOWN_IDS and id not in TUMORS}
    return {name: found[id] for id, name in known.items() if name not in ORGANS}


def _organ_values(image: Volume, labels: Volume, organ: str, smallest_ml: float) -> Array | None:
    """Return the HU of an organ's voxels; None where the label map has none or less than `smallest_ml` of it."""
    values: Array = image.array[select(labels.array, ORGANS[organ])]
    return values if values.size and _ml(values.size, image) >= smallest_ml else None


def _has_body(labels: Volume) -> bool:
    """Say whether a label map has the body's envelope, so that 0 means air."""
    return bool((labels.array == BODY).any())


def _is_looked_for(labels: Volume, structure: str, smallest_ml: float) -> bool:
    """Say whether a label map has enough of a structure of `agreement.STRUCTURES`; the body needs its envelope too."""
    if structure == "body" and not _has_body(labels):
        return False
    size = int(np.count_nonzero(select(labels.array, STRUCTURES[structure])))
    return size > 0 and _ml(size, labels) >= smallest_ml


def _ml(voxels: int, volume: Volume) -> float:
    return voxels * float(np.prod(volume.spacing_mm)) / 1000


def _require_comparable(image: Volume, labels: Volume) -> None:
    """Refuse a pair that no finding would be true of.

    Raises:
        MaisiError: so.
    """
    if not image.same_grid(labels, tolerance_mm=0.5):
        raise MaisiError(
            f"The image ({image.grid}) and the label map ({labels.grid}) lie on different grids; "
            "resample the label map to the image first."
        )
    ids = np.unique(labels.array)
    if ids[0] < 0 or ids[-1] > 255 or not np.array_equal(ids, np.rint(ids)):
        raise MaisiError(
            "The label map holds values other than ids from 0 to 255; give one in the ids of `maisi labels`."
        )
    body = labels.array > 0
    if not body.any():
        raise MaisiError("The label map is empty (all 0); give the one that belongs to the image.")
    values = image.array[np.isfinite(image.array)]
    if not values.size:
        raise MaisiError("The image holds no number; give a CT in HU.")
    low, high = float(values.min()), float(values.max())
    inside = image.array[body]
    inside = inside[np.isfinite(inside)]
    middle = float(np.median(inside)) if inside.size else 0.0
    if -2 <= low < high <= 2 or middle > 500 or (not body.all() and low > -200):
        raise MaisiError(
            f"The image's values ({low:.4g} to {high:.4g}, {middle:.4g} in the middle of the body) are no HU; "
            "give a CT with air at -1000 and water at 0."
        )


def _known(entries: dict[str, Any], names: list[str]) -> dict[str, Any]:
    unknown = sorted(entries.keys() - set(names))
    if unknown:
        raise ValueError(f"nothing is called '{unknown[0]}'; choose from {', '.join(names)}")
    return entries


def _plain(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
