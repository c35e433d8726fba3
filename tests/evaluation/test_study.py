from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import BRIGHT, write_item

from maisi.cli import run
from maisi.errors import MaisiError
from maisi.evaluation.result import Result
from maisi.evaluation.sources import Origin
from maisi.evaluation.volumes import Entry

pytest.importorskip("monai")
from maisi.evaluation.study import (
    COMPARISON,
    MEAN,
    REAL,
    Added,
    StudyConfig,
    comparison,
    draw,
    patient_folds,
    plan,
)


def _entry(name: str, patient: str) -> Entry:
    return Entry(name, patient, image=None, labels=None)


@given(st.integers(2, 6), st.lists(st.integers(1, 3), min_size=6, max_size=25), st.integers(0, 5), st.data())
@settings(deadline=None, max_examples=50)
def test_no_patient_is_in_training_and_test(folds, scans, seed, data) -> None:
    real = [_entry(f"c{p}_{i}", f"p{p}") for p, count in enumerate(scans) for i in range(count)]
    patients = sorted({entry.patient for entry in real})
    made_of = data.draw(st.lists(st.sampled_from([None, *patients]), min_size=1, max_size=12))
    pairs = Added(
        "pairs",
        (*(_entry(f"g{i}", f"g{i}") for i in range(len(made_of))), _entry("free", "free")),
        (*(Origin(frozenset({p} - {None}), p is not None) for p in made_of), Origin(frozenset(), True)),
    )
    counts = (1, len(patients) - -(-len(patients) // folds))
    runs = plan(real, [pairs], StudyConfig(folds=folds, counts=counts, seed=seed))
    assert [(r.fold, r.arm) for r in runs] == [
        (f, a) for f in range(folds) for _ in sorted(set(counts)) for a in (REAL, "real + pairs")
    ]
    origin = {entry.name: one.patients for entry, one in zip(pairs.entries, pairs.origins, strict=True)}
    tested = []
    for one in runs:
        test = {entry.patient for entry in one.test}
        trained = {entry.patient for entry in one.real}
        assert not test & trained
        assert len(trained) == one.count
        assert sum(entry.patient in trained for entry in real) == len(one.real)
        assert all(not origin[entry.name] & test for entry in one.added)
        assert one.left_out == (sum(bool(p & test) for p in origin.values()) if one.arm != REAL else 0)
        tested += [entry.name for entry in one.test] if one.arm == REAL and one.count == 1 else []
    assert sorted(tested) == sorted(entry.name for entry in real)
    for small, large in ((a, b) for a in runs for b in runs if a.fold == b.fold and a.count <= b.count):
        assert {entry.name for entry in small.real} <= {entry.name for entry in large.real}


@given(st.integers(2, 4), st.integers(4, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_patients_of_a_split_of_their_own_are_never_trained_on(folds, tested, trained, shared, seed) -> None:
    test = [_entry(f"t{n}_{scan}", f"t{n}") for n in range(tested) for scan in range(1 + n % 2)]
    real = [_entry(f"r{n}", f"r{n}") for n in range(trained)] + test[:shared]
    origins = (Origin(frozenset({"t0"}), True), Origin(frozenset(), True))
    pairs = Added("pairs", (_entry("g", "g"), _entry("h", "h")), origins)
    counts = (1, trained)
    runs = plan(real, [pairs], StudyConfig(folds=folds, counts=counts, seed=seed), test)
    assert {run.count for run in runs} == set(counts)
    for one in runs:
        assert len(one.real) == one.count
        assert not {entry.patient for entry in one.real} & {entry.patient for entry in test}
        if one.arm != REAL:
            assert one.left_out == any(entry.patient == "t0" for entry in one.test)
    once = [entry.name for run in runs for entry in run.test if (run.arm, run.count) == (REAL, 1)]
    assert sorted(once) == sorted(entry.name for entry in test)
    with pytest.raises(MaisiError, match=f"{trained + 1} real training patients are asked for, and fold 1 has"):
        plan(real, [], StudyConfig(folds=folds, counts=(trained + 1,)), test)
    with pytest.raises(MaisiError, match="All real training patients are asked for, and fold 1 has 0"):
        plan(test, [], StudyConfig(folds=folds), test)


def test_each_fold_draws_its_training_patients_anew() -> None:
    test = [_entry(f"t{n}", f"t{n}") for n in range(5)]
    real = [_entry(f"r{n:02}", f"r{n:02}") for n in range(40)]
    runs = plan(real, [], StudyConfig(folds=5, counts=(10,)), test)
    assert len({frozenset(entry.name for entry in run.real) for run in runs}) == 5


def test_folds_are_even_and_need_patients() -> None:
    sizes = [list(patient_folds(map(str, range(23)), 5, 1).values()).count(fold) for fold in range(5)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]
    with pytest.raises(MaisiError, match="4 patient"):
        patient_folds("abcd", 5, 0)
    real = [_entry(name, name) for name in "abcdef"]
    with pytest.raises(MaisiError, match="5 real training patients are asked for, and fold 1 has 4"):
        plan(real, [], StudyConfig(folds=3, counts=(5,)))
    mine = Added("pairs", (_entry("g", "g"),), (Origin(frozenset("abcdef"), True),))
    with pytest.raises(MaisiError, match="All 1 pairs are made of patients of test fold 1"):
        plan(real, [mine], StudyConfig(folds=3))


def test_comparison_by_hand() -> None:
    def row(case, patient, arm, a, b):
        about = {"case": case, "patient": patient, "arm": arm, "patients": "all"}
        return {**about, "a, dice": a, "b, dice": b, "a, surface dice": a, "b, surface dice": b}

    rows = [
        *(row("1", "p", REAL, 0.4, 0.6), row("2", "p", REAL, 0.6, None), row("3", "q", REAL, 0.8, 0.2)),
        *(
            row("1", "p", "real + x", 0.5, 0.6),
            row("2", "p", "real + x", 0.7, None),
            row("3", "q", "real + x", 0.8, 0.4),
        ),
    ]
    found = {(r["measure"], r["structure"]): r for r in comparison(rows, ("a", "b"))}
    assert len(found) == 6
    a, b, mean = (found["dice", name] for name in ("a", "b", MEAN))
    assert (a[REAL], a["with added"]) == (pytest.approx((0.5 + 0.8) / 2), pytest.approx((0.6 + 0.8) / 2))
    assert a["improvement, %"] == pytest.approx(100 * 0.05 / 0.65)
    assert (b["test patients"], b["improvement, %"]) == (2, pytest.approx(25))
    # the first patient's two cases: (0.4 + 0.6) / 2 and 0.6, so 0.55
    assert mean[REAL] == pytest.approx((0.55 + 0.5) / 2)
    assert a["p"] == 1.0  # one pair differs, and its sign says nothing
    assert all(r["p"] <= r["p, Holm"] <= 1 for r in found.values())


def _rows_of(gains):
    for patient, gain in enumerate(gains):
        for arm, value in ((REAL, 0.1), ("real + x", 0.1 + gain)):
            about = {"case": str(patient), "patient": str(patient), "arm": arm, "patients": "all"}
            yield {**about, "a, dice": value, "a, surface dice": value}


def test_the_mean_of_one_structure_is_no_second_test() -> None:
    found = comparison(list(_rows_of([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])), ("a",))
    assert [row["structure"] for row in found] == ["a", MEAN] * 2
    assert [row["p, Holm"] for row in found] == [row["p"] for row in found] == [pytest.approx(2 / 2**6)] * 4


def test_the_figure_gives_no_number_where_there_is_none() -> None:
    from matplotlib.figure import Figure

    rows = [{**row, "a, dice": 0.0 if row["arm"] == REAL else 0.3} for row in _rows_of([0.1, 0.2])]
    figure = Figure()
    draw(figure, Result("study", {}, rows, {}, tables={COMPARISON: comparison(rows, ("a",))}))
    assert {text.get_text() for text in figure.axes[1].texts} == {"n/a"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for number in range(4):
        write_item(root / "real" / f"pt{number}", number)
    write_item(root / "real" / "slab", 9, ids=(BRIGHT,))
    for number in range(3):
        write_item(root / "pairs" / f"{number:04d}", 50 + number, {"mask": f"masks/pt{number}.nii.gz"})
    write_item(root / "painted" / "0000", 60, {"library": "x"}, spacing_mm=(4.0, 3.0, 3.0))
    return root


def _words(sets, output, *more):
    words = ["evaluate", "study", str(sets / "real"), "--pairs", str(sets / "pairs")]
    how = ["--structure", "mandible,brainstem", "--folds", "2", "--steps", "4", "--patch", "16,16,16", "--batch", "1"]
    return [*words, *how, "--spacing", "3,3,3", "--device", "cpu", "--precision", "fp32", *more, "-o", str(output)]


def test_the_command_interrupted_or_not(sets, tmp_path, monkeypatch, capsys) -> None:
    more = ("--inpainted", str(sets / "painted"), "--real-count", "1")
    assert run(_words(sets, tmp_path / "whole", *more)) == 0
    out = capsys.readouterr().out
    assert "dice, real + pairs, improvement in %, 1 patients" in out
    values = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert len(values["items"]) == 4 * 3  # each complete patient once in each arm
    assert {row["case"] for row in values["items"]} == {f"pt{n}" for n in range(4)}
    assert len(values["tables"]["comparison"]) == 2 * 2 * 3
    notes = " ".join(values["notes"])
    for said in ("the same 4 steps", "1 real case(s) lack", "Of 1 inpainted no record says", "resampled to 3 x 3 x 3"):
        assert said in notes
    assert sum(int(n) for n in notes.split("left out of its training: ")[1].split(" in ")[0].split(", ")) == 3
    assert (tmp_path / "whole" / "figure.png").stat().st_size > 5000
    assert "## comparison" in (tmp_path / "whole" / "table.md").read_text()

    from maisi.evaluation import study

    calls, judged = [], study.judged

    def fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judged(*args)

    monkeypatch.setattr(study, "judged", fails)
    assert run(_words(sets, tmp_path / "parts", *more)) == 130
    assert (tmp_path / "parts.cache").is_dir()
    assert not (tmp_path / "parts").exists()
    trained = []
    monkeypatch.setattr("maisi.evaluation.trained_segmenter.train", _counted(trained))
    assert run(_words(sets, tmp_path / "parts", *more)) == 0
    assert len(trained) == 3
    assert (tmp_path / "parts" / "result.json").read_text() == (tmp_path / "whole" / "result.json").read_text()
    assert not (tmp_path / "parts.cache").exists()


def test_the_command_tests_a_split_of_its_own(sets, tmp_path, capsys) -> None:
    cases = [
        {
            "id": f"pt{number}",
            "patient": f"pt{number}",
            "image": str(sets / "real" / f"pt{number}" / "image.nii.gz"),
            "labels": str(sets / "real" / f"pt{number}" / "labels.nii.gz"),
            "split": "train" if number < 2 else "validation",
        }
        for number in range(4)
    ]
    (tmp_path / "cases.json").write_text(json.dumps({"cases": cases}))
    words = _words(sets, tmp_path / "out", "--split", "train", "--test-split", "validation", "--real-count", "1,2")
    words[2] = str(tmp_path / "cases.json")
    assert run(words) == 0
    capsys.readouterr()
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {row["case"] for row in values["items"]} == {"pt2", "pt3"}
    assert len(values["items"]) == 2 * 2 * 2
    assert values["summary"]["real patients"] == 4
    assert values["settings"]["test split"] == "validation"
    words[-1] = str(tmp_path / "none")
    words[words.index("--split") + 1] = "validation"
    assert run(words) == 2
    assert "1 real training patients are asked for, and fold 1 has 0" in capsys.readouterr().err


def _counted(calls):
    from maisi.evaluation.trained_segmenter import train

    def counted(*args):
        calls.append(1)
        return train(*args)

    return counted


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--folds", "6"], "5 patient(s) cannot be dealt to 6 folds"),
        (["--real-count", "9"], "give smaller numbers to --real-count"),
        (["--real-count", "few"], "write it as 20,60,120"),
        (["--structure", "larynx"], "No label map of the 5 real cases has larynx"),
        (["--patch", "20,20,20"], "give multiples of 8"),
        (["--share", "1.5"], "added_share"),
        (["--spacing", "0,1,1"], "is not usable"),
        (["--device", "abacus"], "Unknown device"),
    ],
)
def test_refusals(sets, tmp_path, capsys, more, said) -> None:
    assert run(_words(sets, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    # what the label maps hold is in the cache by then, and stays there
    assert [path.name for path in tmp_path.iterdir()] == (["out.cache"] if "label map" in said else [])


def test_pairs_on_two_grids_are_refused(sets, tmp_path, capsys) -> None:
    import shutil

    shutil.copytree(sets / "pairs", tmp_path / "pairs")
    shutil.copy(sets / "painted" / "0000" / "labels.nii.gz", tmp_path / "pairs" / "0001" / "labels.nii.gz")
    words = _words(sets, tmp_path / "out")
    words[words.index("--pairs") + 1] = str(tmp_path / "pairs")
    assert run(words) == 2
    assert "lie on different grids" in capsys.readouterr().err
    assert run(["evaluate", "study", str(sets / "real"), "--structure", "mandible", "-o", str(tmp_path / "out")]) == 2
    assert "give --pairs or --inpainted" in capsys.readouterr().err
