"""Does training with generated pairs help a segmenter? Folds by patient, arms that differ in the added cases alone.

The study of the paper's Fig. 6: a segmenter is trained on real cases, and on the same with generated ones added, and
judged on real patients that neither it nor the added cases were made of. Every arm takes the same number of steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from maisi.config import Config
from maisi.data.agreement import dice_by_group, joint_counts
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.paired_tests import holm, wilcoxon_p
from maisi.evaluation.result import Result, Row
from maisi.evaluation.segmentation_cases import Incomplete, Structures, complete
from maisi.evaluation.segmenters import Segmenter
from maisi.evaluation.sources import Origin
from maisi.evaluation.surface_dice import surface_dice
from maisi.evaluation.trainer import Lesson, Report, Trainer, require_enough
from maisi.evaluation.volumes import Entry

REAL = "real"
MEASURES = ("dice", "surface dice")
MEAN = "mean"
"""Stands beside the structures: the mean over those that a patient has."""

COMPARISON = "comparison"
_SIGNIFICANT = 0.05


class StudyConfig(Config):
    """How a study is made.

    Attributes:
        folds: parts that the patients are dealt to; each is the test set once.
        counts: numbers of real training patients, each a study of its own; () is all there are.
        tolerance_mm: of the surface Dice.
        added_share: of the training patches that come from the added cases, however many there are; None draws each
            case as often as any other.
        incomplete: what was done about cases whose labels lack a structure, see `segmentation_cases.complete`.
        seed: of folds and of the choice of patients.
    """

    folds: int = Field(default=5, ge=2)
    counts: tuple[int, ...] = ()
    tolerance_mm: float = Field(default=2.0, ge=0)
    added_share: float | None = Field(default=0.5, gt=0, lt=1)
    incomplete: Incomplete = "leave-out"
    seed: int = Field(default=0, ge=0)

    @field_validator("counts")
    @classmethod
    def _ascending(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if any(count < 1 for count in counts):
            raise ValueError("a number of real patients below 1 is not possible")
        return tuple(sorted(set(counts)))


@dataclass(frozen=True)
class Added:
    """What an arm adds to the real cases.

    Attributes:
        name: 'pairs' or 'inpainted'.
        entries: generated cases.
        origins: where each comes from.
    """

    name: str
    entries: tuple[Entry, ...]
    origins: tuple[Origin, ...]

    def only(self, names: Collection[str]) -> Added:
        """Those entries alone that have these names."""
        both = [(e, o) for e, o in zip(self.entries, self.origins, strict=True) if e.name in names]
        return Added(self.name, tuple(e for e, _ in both), tuple(o for _, o in both))


@dataclass(frozen=True)
class Run:
    """One training and its test.

    Attributes:
        fold: from 0.
        count: of real training patients; None is all of the fold.
        arm: `REAL`, or 'real + ' and what is added.
        real: training cases.
        added: training cases.
        left_out: how many of the arm's cases are made of patients of the test.
        test: cases.
    """

    fold: int
    count: int | None
    arm: str
    real: tuple[Entry, ...]
    added: tuple[Entry, ...]
    left_out: int
    test: tuple[Entry, ...]

    @property
    def label(self) -> str:
        """Arm and number of real patients, for people."""
        return f"{self.arm}, {self.patients} patients"

    @property
    def patients(self) -> int | str:
        """The number of real training patients that was asked for."""
        return "all" if self.count is None else self.count


def patient_folds(patients: Iterable[str], folds: int, seed: int) -> dict[str, int]:
    """Deal patients to folds in an order drawn by the seed: patient -> fold; sizes differ by one at most.

    Raises:
        MaisiError: there are fewer patients than folds.
    """
    names = sorted(set(patients))
    if len(names) < folds:
        raise MaisiError(
            f"{len(names)} patient(s) cannot be dealt to {folds} folds; give more real cases, or fewer --folds."
        )
    order = np.random.default_rng([seed, 0]).permutation(len(names))
    return {names[place]: rank % folds for rank, place in enumerate(order)}


def plan(real: Sequence[Entry], added: Sequence[Added], config: StudyConfig, tested: Sequence[Entry] = ()) -> list[Run]:
    """List all trainings: fold by fold, for each number of patients first the real arm, then the others.

    The patients of a smaller number are among those of a larger one.

    Args:
        real: cases to train on, and to test on where `tested` is empty.
        added: what the further arms add.
        config: how.
        tested: cases of patients that are never trained on; each fold tests a part of them and draws its training
            patients anew.

    Raises:
        MaisiError: too few patients, or an arm is left with nothing to add.
    """
    fold_of = patient_folds((entry.patient for entry in tested or real), config.folds, config.seed)
    runs: list[Run] = []
    for fold in range(config.folds):
        test = tuple(entry for entry in tested or real if fold_of[entry.patient] == fold)
        training = _training_patients(real, fold_of, fold, config.seed, apart=bool(tested))
        for count in config.counts or (None,):
            if (count or 1) > len(training):
                raise MaisiError(
                    f"{count or 'All'} real training patients are asked for, and fold {fold + 1} has {len(training)}; "
                    "give smaller numbers to --real-count, or more real cases."
                )
            chosen = set(training[:count])
            own = tuple(entry for entry in real if entry.patient in chosen)
            runs.append(Run(fold, count, REAL, own, (), 0, test))
            runs += [_with_added(runs[-1], one) for one in added]
    return runs


def _training_patients(
    real: Sequence[Entry], fold_of: Mapping[str, int], fold: int, seed: int, apart: bool
) -> list[str]:
    """Patients that a fold may train on, in the order in which they are taken."""
    names = sorted({entry.patient for entry in real} - (fold_of.keys() if apart else set()))
    order = np.random.default_rng([seed, 1, fold] if apart else [seed, 1]).permutation(len(names))
    return [names[place] for place in order if fold_of.get(names[place]) != fold]


def _with_added(run: Run, added: Added) -> Run:
    tested = {entry.patient for entry in run.test}
    kept = tuple(
        entry for entry, origin in zip(added.entries, added.origins, strict=True) if not origin.patients & tested
    )
    if not kept:
        raise MaisiError(
            f"All {len(added.entries)} {added.name} are made of patients of test fold {run.fold + 1}; give more."
        )
    left_out = len(added.entries) - len(kept)
    return Run(run.fold, run.count, f"{REAL} + {added.name}", run.real, kept, left_out, run.test)


def run_study(
    real: Sequence[Entry],
    added: Sequence[Added],
    structures: Structures,
    config: StudyConfig,
    trainer: Trainer,
    cache: Cache,
    settings: Mapping[str, Any],
    report: Report | None = None,
    tested: Sequence[Entry] = (),
) -> Result:
    """Train and test every arm of every fold, and compare; finished ones come from the cache.

    Args:
        real: cases with patients.
        added: what the further arms add.
        structures: to find.
        config: how.
        trainer: of each arm's segmenters.
        cache: keeps cases, segmenters and what they found.
        settings: what the record says beside `config`.
        report: told how far it is.
        tested: see `plan`.

    Raises:
        MaisiError: as `plan`, `complete` and the trainer, or a file cannot be read.
    """
    real, notes = complete(real, structures, cache, REAL, config.incomplete)
    if tested:
        tested, more = complete(tested, structures, cache, "tested", config.incomplete)
        notes += more
    whole = []
    for one in added:
        entries, more = complete(one.entries, structures, cache, "added", config.incomplete)
        whole.append(one.only({entry.name for entry in entries}))
        notes += more
    runs = plan(real, whole, config, tested)
    return _run(runs, whole, structures, config, trainer, cache, settings, report).with_notes(*notes)


def _run(
    runs: Sequence[Run],
    added: Sequence[Added],
    structures: Structures,
    config: StudyConfig,
    trainer: Trainer,
    cache: Cache,
    settings: Mapping[str, Any],
    report: Report | None,
) -> Result:
    for run in runs:
        require_enough(trainer, len(run.real) + len(run.added), f"Fold {run.fold + 1} ({run.label})")
    learned_from = {entry.image: entry for run in runs for entry in (*run.real, *run.added)}
    prepared = trainer.prepare(list(learned_from.values()), structures, cache, report)
    rows: list[Row] = []
    for number, run in enumerate(runs, 1):
        told = partial(_told, report, f"{number}/{len(runs)}, fold {run.fold + 1}, {run.label}") if report else None
        segmenter = trainer.trained(_lesson(run, structures, config), cache, told)
        rows += judged(run, segmenter, structures, config, cache, told)
    compared = comparison(rows, structures)
    return Result(
        "study",
        _summary(compared, {entry.patient for run in runs for entry in (*run.real, *run.test)}),
        rows,
        {
            **settings,
            "structures": list(structures),
            **config.model_dump(mode="json"),
            "trainer": trainer.name,
            "segmenter": dict(trainer.settings),
        },
        columns=("case", "fold", "arm", "patients", *(f"{name}, dice" for name in structures)),
        notes=(*_notes(runs, added, config, trainer), *trainer.cautions(structures), *prepared),
        tables={COMPARISON: compared},
    )


def _told(report: Report, label: str, stage: str, done: int, total: int) -> None:
    report(f"{label}: {stage}", done, total)


def _lesson(run: Run, structures: Structures, config: StudyConfig) -> Lesson:
    """What one run's segmenter learns from: so much of its patches come from added cases, however many there are."""
    entries = (*run.real, *run.added)
    if config.added_share is None:
        return Lesson(entries, structures)
    share = config.added_share if run.added else 0.0
    weights = [(1 - share) / len(run.real)] * len(run.real) + [share / max(1, len(run.added))] * len(run.added)
    return Lesson(entries, structures, tuple(weights))


def judged(
    run: Run,
    segmenter: Segmenter,
    structures: Structures,
    config: StudyConfig,
    cache: Cache,
    report: Report | None = None,
) -> list[Row]:
    """Return a row for each test case: Dice and surface Dice of each structure that its labels hold."""
    rows: list[Row] = []
    for done, entry in enumerate(run.test, 1):
        ids = {name: sorted(ids) for name, ids in structures.items()}
        key = ["study", entry.hash, segmenter.name, config.tolerance_mm, ids]
        found = cache.json(key, partial(_found, entry, segmenter, structures, config.tolerance_mm))
        about = {"case": entry.name, "patient": entry.patient, "fold": run.fold + 1, "arm": run.arm}
        rows.append({**about, "patients": run.patients, **found})
        if report:
            report("test", done, len(run.test))
    return rows


def _found(entry: Entry, segmenter: Segmenter, structures: Structures, tolerance_mm: float) -> dict[str, float | None]:
    ct, labels = entry.pair()
    assert labels is not None
    found = segmenter(ct).array
    dice = dice_by_group(joint_counts(labels.array, found), structures)
    values: dict[str, float | None] = {}
    for name, ids in structures.items():
        asked = np.isin(labels.array, sorted(ids))
        if not asked.any():
            values |= {f"{name}, dice": None, f"{name}, surface dice": None}
            continue
        there = np.isin(found, sorted(ids))
        surface = surface_dice(asked, there, ct.spacing_mm, tolerance_mm)
        values |= {f"{name}, dice": dice[name], f"{name}, surface dice": surface}
    return values


def comparison(rows: Sequence[Row], structures: Iterable[str]) -> list[Row]:
    """Compare each further arm with the real one, patient by patient.

    Returns:
        A row for each measure, number of real patients, arm, and structure (`MEAN` among them): means over the test
        patients, the relative improvement in percent, p of Wilcoxon's test, and p corrected by Holm over all rows of
        the measure.
    """
    names = (*structures, MEAN)
    compared: list[Row] = []
    for measure in MEASURES:
        family: list[dict[str, Any]] = []
        for count in dict.fromkeys(row["patients"] for row in rows):
            arms = _by_arm([row for row in rows if row["patients"] == count], names, measure)
            for arm in list(arms)[1:]:
                about = {"measure": measure, "patients": count, "arm": arm}
                family += [{**about, "structure": name, **_compared(arms[REAL], arms[arm], name)} for name in names]
        # the mean of a single structure is that structure, so its row is no test of its own
        tests = [row for row in family if row["structure"] != MEAN] if len(names) == 2 else family
        corrected = holm([row["p"] for row in tests])
        repeated = [p for p in corrected for _ in range(len(family) // len(tests))] if tests else []
        compared += [{**row, "p, Holm": p} for row, p in zip(family, repeated, strict=True)]
    return compared


Values = Mapping[str, Mapping[str, float]]
"""Structure -> test patient -> mean over the patient's cases."""


def _by_arm(rows: Sequence[Row], names: Sequence[str], measure: str) -> dict[str, Values]:
    """The values of each arm, the real one first."""
    arms: dict[str, dict[str, dict[str, list[float]]]] = {REAL: {}}
    for row in rows:
        values = {name: row.get(f"{name}, {measure}") for name in names if name != MEAN}
        there = {name: value for name, value in values.items() if value is not None}
        own = arms.setdefault(row["arm"], {})
        for name, value in {**there, **({MEAN: float(np.mean(list(there.values())))} if there else {})}.items():
            own.setdefault(name, {}).setdefault(row["patient"], []).append(value)
    return {
        arm: {name: {who: float(np.mean(v)) for who, v in whose.items()} for name, whose in own.items()}
        for arm, own in arms.items()
    }


def _compared(real: Values, other: Values, name: str) -> Row:
    patients = sorted(real.get(name, {}))
    before, after = ([values[name][who] for who in patients] for values in (real, other))
    means = [float(np.mean(values)) if values else None for values in (before, after)]
    gain = 100 * (means[1] - means[0]) / means[0] if means[0] and means[1] is not None else None
    return {
        "test patients": len(patients),
        REAL: means[0],
        "with added": means[1],
        "improvement, %": gain,
        "p": wilcoxon_p(before, after),
    }


def _summary(compared: Sequence[Row], patients: Iterable[str]) -> dict[str, float | None]:
    """The mean over structures of each arm, with the improvement and its corrected p."""
    summary: dict[str, float | None] = {"real patients": len(set(patients))}
    for row in (row for row in compared if row["structure"] == MEAN):
        of = f"{row['measure']}, {{}}, {row['patients']} patients"
        summary[of.format(REAL)] = row[REAL]
        summary[of.format(row["arm"])] = row["with added"]
        summary[of.format(f"{row['arm']}, improvement in %")] = row["improvement, %"]
        summary[of.format(f"{row['arm']}, p (Holm)")] = row["p, Holm"]
    return summary


def _notes(runs: Sequence[Run], added: Sequence[Added], config: StudyConfig, trainer: Trainer) -> list[str]:
    mixed = "real and added cases are trained on together, each as often as any other."
    if config.added_share is not None:
        mixed = f"with added cases {config.added_share:.0%} of the patches come from these."
    notes = [
        f"Every arm takes the same {trainer.effort}; {mixed}",
        "p is that of Wilcoxon's signed-rank test on the means of the test patients, corrected by Holm over all rows "
        "of its measure; a patient's structure that the labels lack is left out.",
        "Added cases may be made of training patients beyond the number given, and what generated them may have been "
        "trained on patients of the test: nobody but you knows; study patients that the model's training kept out.",
    ]
    for one in added:
        own = [run for run in runs if run.arm == f"{REAL} + {one.name}" and run.count == runs[0].count]
        left_out = ", ".join(str(run.left_out) for run in own)
        notes.append(
            f"Of {len(one.entries)} {one.name}, those made of patients of the test fold are left out of its training: "
            f"{left_out} in folds 1 to {len(own)}."
        )
        unknown = sum(not origin.recorded for origin in one.origins)
        if unknown:
            notes.append(
                f"Of {unknown} {one.name} no record says what they were made of, so none could be left out for that; "
                "name their patients with --sources if they are among the real ones."
            )
    return notes


def draw(figure: Any, result: Result) -> None:
    """Draw the Dice of each arm by structure, and below it the relative improvement; a star where p (Holm) < 0.05."""
    rows = [row for row in result.tables[COMPARISON] if row["measure"] == MEASURES[0]]
    counts = list(dict.fromkeys(row["patients"] for row in rows))
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    figure.set_size_inches(max(6.0, (1.0 + 0.8 * len(structures)) * len(counts) + 1.5), 6.5)
    axes = figure.subplots(2, len(counts), sharey="row", squeeze=False)
    for column, count in enumerate(counts):
        there = [row for row in rows if row["patients"] == count]
        _draw_count(axes[0][column], axes[1][column], there, structures)
        axes[0][column].set_title(f"{count} real training patients")
    axes[0][0].set(ylabel="Dice", ylim=(0, 1))
    axes[1][0].set_ylabel(f"improvement, %  (* p < {_SIGNIFICANT:g})")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(labels))


_COLORS = ("tab:orange", "tab:blue")
_BARS_WIDTH = 0.8


def _draw_count(above: Any, below: Any, rows: Sequence[Row], structures: Sequence[str]) -> None:
    """One number of real patients: bars of Dice above, of improvement below."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    width, places = _BARS_WIDTH / (len(arms) + 1), np.arange(len(structures))
    first = [row[REAL] or 0.0 for row in rows if row["arm"] == arms[0]]
    above.bar(places - _BARS_WIDTH / 2 + width / 2, first, width, color="0.6", label=REAL)
    for number, (arm, color) in enumerate(zip(arms, _COLORS, strict=False), 1):
        own = [row for row in rows if row["arm"] == arm]
        at = places - _BARS_WIDTH / 2 + width * (number + 0.5)
        above.bar(at, [row["with added"] or 0.0 for row in own], width, color=color, label=arm)
        below.bar(at, [row["improvement, %"] or 0.0 for row in own], width, color=color)
        for place, row in zip(at, own, strict=True):
            gain = row["improvement, %"]
            star = "*" if row["p, Holm"] is not None and row["p, Holm"] < _SIGNIFICANT else ""
            said = "n/a" if gain is None else f"{gain:+.1f}{star}"
            point, offset = (place, gain or 0.0), (0, 2 if (gain or 0) >= 0 else -9)
            below.annotate(said, point, offset, textcoords="offset points", ha="center", fontsize=7)
    for axis in (above, below):
        axis.set_xticks(places, structures, rotation=30, ha="right", fontsize=8)
    below.axhline(0, color="0.3", linewidth=0.8)
    below.margins(y=0.15)
