"""A set of generated CTs judged against a set of real ones: 2.5D FID, MMD, precision and recall, diversity.

FID looks at slices. MMD, precision and recall look at volumes, one vector each (the mean features of its slices, plane
after plane), since slices of one volume are no independent draws and each other's nearest neighbours. Beside every
distance stands the same between halves of the real set. Knows no file format.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

import maisi
from maisi.config import Config
from maisi.data.preprocess import window_ct
from maisi.device import keep_freed_memory
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.fid import PLANES, FidConfig, FidScore, PlaneMoments, fid, on_common_grid, pooled
from maisi.evaluation.halves import Halvings, compare_with_halves, smallest_half
from maisi.evaluation.mmd import Kernel, mmd
from maisi.evaluation.ms_ssim import ms_ssim, scales_for
from maisi.evaluation.precision_recall import NEIGHBOURS, PrecisionRecall, precision_recall
from maisi.evaluation.result import Result
from maisi.evaluation.set_description import Description, VolumeSet, describe, read_set
from maisi.evaluation.volumes import Entry, Found, skipped

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

Metric = Literal["fid", "mmd", "ms-ssim", "precision-recall"]
METRICS: tuple[Metric, ...] = ("fid", "mmd", "ms-ssim", "precision-recall")
SETS = ("generated", "real")
_COVERAGE = ("precision", "recall")
COLUMNS = ("volume", "set", "size", "spacing_mm", "slices", "inside_other")


_Summary = tuple[PlaneMoments | None, NDArray[np.float64]]
"""What distances need to know of a set: moments, where FID is asked for, and one vector for each volume."""


class SetConfig(Config):
    """How two sets are compared.

    Attributes:
        fid: what is seen of a volume; its spacing and size hold for MS-SSIM too.
        metrics: some of `METRICS`.
        kernel: of MMD.
        neighbours: of precision and recall.
        pairs: of volumes in each set whose similarity is averaged, at most.
        ways: to halve the real set.
        seed: of pairs and halves.
    """

    fid: FidConfig = FidConfig()
    metrics: tuple[Metric, ...] = Field(METRICS, min_length=1)
    kernel: Kernel = "polynomial"
    neighbours: int = Field(default=NEIGHBOURS, ge=1)
    pairs: int = Field(default=20, ge=1)
    ways: int = Field(default=5, ge=1)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class SetStudy:
    """Compares two sets.

    Attributes:
        config: how.
        cache: keeps described volumes and pairs.
        workers: processes that describe volumes; their number decides the time alone.
    """

    config: SetConfig
    cache: Cache
    workers: int = 1

    def run(
        self, generated: Found, real: Found, skip_unreadable: bool = False, report: Report | None = None
    ) -> tuple[Result, Callable[[Any], None]]:
        """Compare, and return the result with what draws its figure.

        Raises:
            MaisiError: a volume can't be read (unless `skip_unreadable`), or a side has fewer than 2 volumes.
        """
        report = report or _silent
        made, true, notes = self._described(generated, real, skip_unreadable, report)
        halvings, more = self._halved(made, true)
        inside = self._precision_recall(made, true)
        summary: dict[str, float | None] = {"generated": len(made.entries), "real": len(true.entries)}
        summary |= self._distances(made, true, halvings)
        if "precision-recall" in self.config.metrics:
            summary |= {"precision": inside.precision, "recall": inside.recall} if inside else dict.fromkeys(_COVERAGE)
        if "ms-ssim" in self.config.metrics:
            summary |= {f"ms_ssim_{n}": self._likeness(n, side, report) for n, side in _by_name(made, true).items()}
        notes = (*generated.notes, *real.notes, *notes, *more, *self._notes(made, true, inside))
        settings = {
            **self.config.model_dump(mode="json"),
            "slices_seen": asdict(self.config.fid.view),
            "maisi": maisi.__version__,
        }
        result = Result("fid", summary, _rows(made, true, inside), settings, COLUMNS, notes)
        return result, partial(_draw, result, made.vectors, true.vectors)

    def _described(
        self, generated: Found, real: Found, skip: bool, report: Report
    ) -> tuple[VolumeSet, VolumeSet, tuple[str, ...]]:
        """Describe both sets, and say which volumes could not be read."""
        for name, found in (("generated", generated), ("real", real)):
            _require_two(len(found.entries), name)
        entries = [*generated.entries, *real.entries]
        answers: list[Path | str] = []
        for answer in self._answers(entries):
            answers.append(answer)
            report("volumes", len(answers), len(entries))
        faults = [answer for answer in answers if isinstance(answer, str)]
        notes = skipped(faults, len(answers) - len(faults), skip)
        cut = len(generated.entries)
        made = read_set(generated.entries, answers[:cut])
        true = read_set(real.entries, answers[cut:])
        for name, side in _by_name(made, true).items():
            _require_two(len(side.entries), name)
        return made, true, notes

    def _answers(self, entries: Sequence[Entry]) -> Iterator[Path | str]:
        """What `describe` says of each, in order, from this process or several."""
        task = partial(describe, config=self.config.fid, cache=self.cache)
        if self.workers == 1:
            yield from map(task, entries)
            return
        threads = max(1, torch.get_num_threads() // self.workers)
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(self.workers, len(entries)), _prepare_worker, (threads,)) as pool:
            yield from pool.imap(task, entries)

    def _halved(self, made: VolumeSet, real: VolumeSet) -> tuple[Halvings | None, list[str]]:
        """Distances between halves of the real set, or why there are none."""
        wanted = [name for name in ("fid", "mmd") if name in self.config.metrics]
        patients = [entry.patient for entry in real.entries]
        if not wanted:
            return None, []
        if smallest_half(patients, self.config.ways, self.config.seed) < 2:
            have = f"{len(patients)} volumes of {len(set(patients))} patient(s)"
            return None, [f"Halves of the real set need 4 volumes, 2 without a patient of the others, not {have}."]

        def summarised(some: Sequence[Description]) -> _Summary:
            moments = pooled(one.features() for one in some) if "fid" in wanted else None
            return moments, np.stack([one.vector for one in some])

        def distances(a: _Summary, b: _Summary) -> dict[str, float]:
            found = {} if a[0] is None or b[0] is None else _planes(fid(a[0], b[0]))
            return found | ({"mmd": mmd(a[1], b[1], self.config.kernel)} if "mmd" in wanted else {})

        sets = made.descriptions, real.descriptions
        found = compare_with_halves(*sets, patients, summarised, distances, self.config.ways, self.config.seed)
        return found, [
            f"Halves: {found.count} volumes a side in each of {self.config.ways} way(s) to halve the real set."
        ]

    def _distances(self, made: VolumeSet, real: VolumeSet, halvings: Halvings | None) -> dict[str, float | None]:
        summary: dict[str, float | None] = {}
        if "fid" in self.config.metrics:
            score = fid(*(pooled(one.features() for one in side.descriptions) for side in (made, real)))
            summary |= _planes(score)
            summary |= dict.fromkeys(("fid_same_count", "fid_real_halves", "fid_ratio"))
            if halvings:
                summary |= _against_halves(halvings)
        if "mmd" in self.config.metrics:
            summary["mmd"] = mmd(made.vectors, real.vectors, self.config.kernel)
            summary["mmd_real_halves"] = halvings.real_to_real("mmd") if halvings else None
        return summary

    def _precision_recall(self, made: VolumeSet, real: VolumeSet) -> PrecisionRecall | None:
        enough = min(len(made.entries), len(real.entries)) > self.config.neighbours
        if "precision-recall" not in self.config.metrics or not enough:
            return None
        return precision_recall(made.vectors, real.vectors, self.config.neighbours)

    def _likeness(self, name: str, side: VolumeSet, report: Report) -> float | None:
        """Mean MS-SSIM of random pairs of a set: the higher, the less diverse."""
        if side.shape is None or not scales_for(side.shape):
            return None
        pairs = chosen_pairs(len(side.entries), self.config.pairs, self.config.seed)
        values = []
        for done, (i, j) in enumerate(pairs):
            values.append(self._pair(side.entries[i], side.entries[j]))
            report(f"MS-SSIM {name}", done + 1, len(pairs))
        return float(np.mean(values))

    def _pair(self, a: Entry, b: Entry) -> float:
        def compute() -> float:
            first, second = (window_ct(on_common_grid(entry.ct(), self.config.fid).array) for entry in (a, b))
            return ms_ssim(first, second)

        grid = self.config.fid.model_dump(mode="json", include={"spacing_mm", "size"})
        return float(self.cache.json(["ms-ssim", grid, a.hash, b.hash], compute))

    def _notes(self, made: VolumeSet, real: VolumeSet, inside: PrecisionRecall | None) -> Iterator[str]:
        sides = _by_name(made, real)
        weights = self.config.fid.feature_weights
        features = f"'{self.config.fid.features}'" + (f": {weights}" if weights else "")
        yield f"Only distances with the same features ({features}), slices and counts compare."
        for name, side in sides.items():
            yield from _grid_notes(name, side, self.config.fid)
        if self.config.fid.spacing_mm is None and _spacings(made) != _spacings(real):
            yield "The sets differ in spacing and were not resampled; give --spacing to see one scale."
        if "fid" in self.config.metrics:
            yield from _count_notes(sides)
        if "precision-recall" in self.config.metrics and inside is None:
            yield f"Precision and recall need {self.config.neighbours + 1} volumes on each side."
        if "ms-ssim" in self.config.metrics:
            yield from _scale_notes(sides)


def chosen_pairs(count: int, most: int, seed: int) -> list[tuple[int, int]]:
    """At most `most` different pairs of `count` things, drawn without repetition from `seed`."""
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    order = np.random.default_rng([seed, count]).permutation(len(pairs))[:most]
    return [pairs[number] for number in sorted(order)]


def _prepare_worker(threads: int) -> None:
    """What a process of its own needs before it looks at volumes."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def _by_name(made: VolumeSet, real: VolumeSet) -> dict[str, VolumeSet]:
    return dict(zip(SETS, (made, real), strict=True))


def _planes(score: FidScore) -> dict[str, float]:
    return {"fid": score.average, **{f"fid_{plane}": float(getattr(score, plane)) for plane in PLANES}}


def _silent(stage: str, done: int, total: int) -> None:
    """Where nobody wants to know."""


def _require_two(count: int, name: str) -> None:
    if count < 2:
        raise MaisiError(f"The {name} set has {count} volume; a distribution needs 2 at least, so add some.")


def _against_halves(halvings: Halvings) -> dict[str, float | None]:
    low, high = halvings.ratio_range("fid") or (None, None)
    return {
        "fid_same_count": halvings.made_to_real("fid"),
        "fid_real_halves": halvings.real_to_real("fid"),
        "fid_ratio": halvings.ratio("fid"),
        "fid_ratio_low": low,
        "fid_ratio_high": high,
        **{f"fid_same_count_{plane}": halvings.made_to_real(f"fid_{plane}") for plane in PLANES},
        **{f"fid_real_halves_{plane}": halvings.real_to_real(f"fid_{plane}") for plane in PLANES},
    }


def _count_notes(sides: Mapping[str, VolumeSet]) -> Iterator[str]:
    """How many volumes a covariance of full rank would need, where there are fewer."""
    for name, side in sides.items():
        counts = {plane: sum(one.slices[plane] for one in side.descriptions) for plane in PLANES}
        plane = min(counts, key=lambda p: counts[p])
        slices, size = counts[plane], len(side.descriptions[0].vector) // len(PLANES)
        if slices <= size:
            needed = math.ceil((size + 1) * len(side.descriptions) / slices)
            yield (
                f"The {name} set has {slices} {plane} slices for covariances of {size} features; about {needed} "
                "volumes would fill them, so compare this FID only with others of as many."
            )


def _scale_notes(sides: Mapping[str, VolumeSet]) -> Iterator[str]:
    for name, side in sides.items():
        scales = scales_for(side.shape) if side.shape else 0
        if scales:
            yield f"MS-SSIM of the {name} set: {scales} scale(s)."
        else:
            yield f"MS-SSIM needs {name} volumes of one size, 11 voxels an axis at least; give --spacing and --size."


def _grid_notes(name: str, side: VolumeSet, config: FidConfig) -> Iterator[str]:
    count = len(side.descriptions)
    turned = sum(one.turned for one in side.descriptions)
    if turned:
        yield f"{turned} of {count} {name} volumes are not stored as RAS+; their axes were reordered."
    wanted = config.spacing_mm
    moved = 0 if wanted is None else sum(not np.allclose(one.stored_spacing_mm, wanted) for one in side.descriptions)
    if moved:
        stored = Counter(one.spacing_text for one in side.descriptions).most_common(3)
        some = ", ".join(f"{text} mm ({n})" for text, n in stored)
        yield f"{moved} of {count} {name} volumes were resampled to {wanted} mm; most stored spacings: {some}."


def _spacings(side: VolumeSet) -> set[str]:
    return {one.spacing_text for one in side.descriptions}


def _rows(made: VolumeSet, real: VolumeSet, inside: PrecisionRecall | None) -> list[dict[str, Any]]:
    flags = [None, None] if inside is None else [inside.generated_inside, inside.real_inside]
    rows = []
    for name, side, found in zip(SETS, (made, real), flags, strict=True):
        for number, (entry, one) in enumerate(zip(side.entries, side.descriptions, strict=True)):
            rows.append(
                {
                    "volume": entry.name,
                    "set": name,
                    "size": "x".join(map(str, one.stored_shape)),
                    "spacing_mm": one.spacing_text,
                    "slices": sum(one.slices.values()),
                    "inside_other": None if found is None else bool(found[number]),
                }
            )
    return rows


def _draw(result: Result, made: NDArray[np.float64], real: NDArray[np.float64], figure: Any) -> None:
    """Draw the distances of each plane, and every volume's features on their two main axes."""
    left, right = figure.subplots(1, 2)
    summary = result.summary
    series = {"generated to real": "fid", "as many, to halves": "fid_same_count", "real to real": "fid_real_halves"}
    shown = {label: [summary.get(f"{key}_{plane}") for plane in PLANES] for label, key in series.items()}
    shown = {label: values for label, values in shown.items() if None not in values}
    for number, (label, values) in enumerate(shown.items()):
        left.bar(np.arange(3) + 0.27 * number, values, 0.25, label=label)
    if shown:
        left.set_xticks(np.arange(3) + 0.135 * (len(shown) - 1), PLANES)
        left.legend(fontsize=8)
        left.set_ylabel("Frechet distance")
    else:
        left.set_axis_off()
    both = np.concatenate([made, real])
    axes = np.linalg.svd(both - both.mean(axis=0), full_matrices=False)[2][:2]
    for label, vectors in {"real": real, "generated": made}.items():
        places = (vectors - both.mean(axis=0)) @ axes.T
        right.scatter(places[:, 0], places[:, 1], s=16, alpha=0.7, label=f"{label} ({len(vectors)})")
    right.set(title="volumes by features (two main axes)", xticks=[], yticks=[])
    right.legend(fontsize=8)
