from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maisi.data.manifest import Case, CaseList, read_cases, write_cases
from maisi.errors import MaisiError


def case_list(patients: int, each: int = 1) -> CaseList:
    return CaseList(
        cases=tuple(
            Case(id=f"c{p}-{i}", patient=f"p{p}", image=Path(f"/data/p{p}-{i}.nii.gz"))
            for p in range(patients)
            for i in range(each)
        )
    )


def written(folder: Path, cases: list[dict[str, Any]]) -> Path:
    path = folder / "cases.json"
    path.write_text(json.dumps({"cases": cases}), encoding="utf-8")
    return path


@given(st.integers(2, 30), st.integers(0, 5), st.floats(0.05, 0.6))
def test_no_patient_stands_on_both_sides_and_no_side_is_empty(patients: int, seed: int, share: float) -> None:
    cases = case_list(patients, each=3)
    split = cases.split(share, seed)
    sides = {case.patient: set() for case in cases.cases}
    for case in cases.cases:
        sides[case.patient].add(split[case.id])
    assert all(len(side) == 1 for side in sides.values())
    assert set(split.values()) == {"train", "validation"}


def test_the_share_is_about_what_was_asked_for() -> None:
    split = case_list(400).split(0.2, seed=1)
    assert 50 < sum(side == "validation" for side in split.values()) < 110


def test_order_and_later_cases_move_nobody() -> None:
    small, large = case_list(60), case_list(90)
    before, after = small.split(0.2, 3), large.split(0.2, 3)
    assert before == {id: after[id] for id in before}
    assert CaseList(cases=small.cases[::-1]).split(0.2, 3) == before
    assert before != small.split(0.2, 4)


def test_a_single_patient_trains() -> None:
    assert set(case_list(1).split(0.5).values()) == {"train"}


def test_paths_are_relative_to_the_list(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "a.nii.gz").touch()
    row = {"id": "a", "patient": "a", "image": "ct/a.nii.gz", "regions": ["thorax"], "modality": "ct"}
    cases = read_cases(written(tmp_path, [row]))
    assert cases.cases[0].image == tmp_path / "ct" / "a.nii.gz"
    assert cases.cases[0].regions == ("chest",)


def test_written_lists_are_read_back_and_can_be_moved(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for name in ("a.nii.gz", "a-labels.nii.gz"):
        (first / name).touch()
    case = Case(
        id="a", patient="p", image=first / "a.nii.gz", labels=first / "a-labels.nii.gz", vocabulary="openkbp", weight=2
    )
    write_cases(first / "cases.json", CaseList(cases=(case,)))
    assert read_cases(first / "cases.json").cases == (case,)
    first.rename(second)
    assert read_cases(second / "cases.json").cases[0].labels == second / "a-labels.nii.gz"


def test_missing_files_are_named(tmp_path: Path) -> None:
    rows = [{"id": f"c{i}", "patient": "p", "image": f"no{i}.nii.gz"} for i in range(7)]
    with pytest.raises(MaisiError, match=r"no0.nii.gz.*and 2 more"):
        read_cases(written(tmp_path, rows))


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"id": "a", "patient": "p", "image": "x.nii.gz", "vocab": "openkbp"}, "unknown key.*vocab"),
        ({"id": "a", "patient": "p"}, "image"),
        ({"id": "a", "patient": "p", "image": "x.nii.gz", "vocabulary": "other"}, "totalsegmentator"),
        ({"id": "a", "patient": "p", "image": "x.nii.gz", "regions": ["chst"]}, "chest"),
        ({"id": "a", "patient": "p", "image": "x.nii.gz", "modality": "xray"}, "modality"),
        ({"id": "../a", "patient": "p", "image": "x.nii.gz"}, "id"),
    ],
)
def test_wrong_rows_are_explained(tmp_path: Path, row: dict[str, Any], word: str) -> None:
    with pytest.raises(MaisiError, match=word):
        read_cases(written(tmp_path, [row]))


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaisiError, match="no cases"):
        read_cases(written(tmp_path, []))


def test_double_ids_are_refused(tmp_path: Path) -> None:
    row = {"id": "a", "patient": "p", "image": "x.nii.gz"}
    with pytest.raises(MaisiError, match="twice"):
        read_cases(written(tmp_path, [row, row]))


def test_no_list_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(MaisiError, match="Cannot read"):
        read_cases(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(MaisiError, match="not JSON"):
        read_cases(tmp_path / "bad.json")


def test_an_impossible_share_is_refused() -> None:
    with pytest.raises(MaisiError, match="share"):
        case_list(3).split(1.0)
