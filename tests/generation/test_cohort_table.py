"""Tables of requests: drawn, written and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from maisi.config import parse_config
from maisi.errors import MaisiError
from maisi.generation.cohort_table import (
    EXAMPLE,
    CohortSpec,
    draw_cohort,
    read_cohort,
    read_spec,
    table_text,
)
from maisi.request import Request


def drawn(count: int = 12, seed: int = 0, **columns) -> list[dict[str, str]]:
    spec = {"count": count, "seed": seed, "columns": {name.replace("__", "."): how for name, how in columns.items()}}
    return draw_cohort(parse_config(CohortSpec, spec, "spec"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_is_drawn_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(EXAMPLE)
    rows = draw_cohort(read_spec(tmp_path / "spec.yaml"))
    read = read_cohort(written(tmp_path, table_text(rows)))
    assert [row.case for row in read] == [f"case-{n:04d}" for n in range(8)]
    assert sum(bool(row.request.tumor) for row in read) == 4
    assert [row.request.size for row in read].count((96, 80, 96)) == 2
    assert len({row.request.seed for row in read}) == 8
    for row in read:
        x, y, z = row.request.spacing or ()
        assert x == y == z
        assert 3.5 <= x <= 4.5
        assert set(row.request.anatomy_size) == {"heart"}


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), seed=st.integers(0, 2**40), low=st.floats(0.5, 5), width=st.floats(0.1, 4))
def test_numbers_are_spread_evenly(count: int, seed: int, low: float, width: float) -> None:
    rows = drawn(count, seed, spacing={"uniform": [low, low + width]}, guidance={"log_uniform": [1, 100]})
    places = np.sort([(float(row["spacing"].split(",")[0]) - low) / width * count for row in rows])
    np.testing.assert_array_less(np.abs(places - np.arange(count) - 0.5), 0.5 + count * 2e-3 * (low + width) / width)
    logs = np.sort([np.log10(float(row["guidance"])) / 2 * count for row in rows])
    np.testing.assert_array_less(np.abs(logs - np.arange(count) - 0.5), 0.5 + count * 1e-3)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 60), seed=st.integers(0, 2**40), weights=st.lists(st.integers(0, 5), min_size=3, max_size=3)
)
def test_shares_are_exact_to_one_row(count: int, seed: int, weights: list[int]) -> None:
    if not sum(weights):
        return
    rows = drawn(count, seed, region={"choice": ["chest", "abdomen", "head-neck"], "weights": weights})
    for name, weight in zip(("chest", "abdomen", "head-neck"), weights, strict=True):
        share = sum(row["region"] == name for row in rows)
        assert abs(share - count * weight / sum(weights)) <= 1
        assert weight or not share


def test_normal_ones_follow_their_distribution() -> None:
    rows = drawn(400, 1, anatomy_size__liver={"normal": [1, 0.2], "within": [0.5, 1.3]})
    sizes = [float(row["anatomy_size.liver"]) for row in rows]
    expected = stats.truncnorm((0.5 - 1) / 0.2, (1.3 - 1) / 0.2, 1, 0.2)
    assert stats.kstest(sizes, expected.cdf).statistic < 0.01
    assert (min(sizes), max(sizes)) >= (0.5, 0.5)
    assert max(sizes) <= 1.3


def test_whole_numbers_and_columns_of_their_own() -> None:
    rows = drawn(6, 0, steps={"uniform": [5, 20], "whole": True}, region="chest")
    assert all(row["steps"].isdigit() for row in rows)
    more = drawn(6, 0, steps={"uniform": [5, 20], "whole": True}, region="chest", retries={"choice": [0, 1]})
    assert [row["steps"] for row in rows] == [row["steps"] for row in more]
    assert rows != drawn(6, 1, steps={"uniform": [5, 20], "whole": True}, region="chest")
    assert rows == drawn(6, 0, steps={"uniform": [5, 20], "whole": True}, region="chest")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"region": {"choice": ["chest"], "uniform": [1, 2]}}, "give one of choice, uniform"),
        ({"region": {}}, "give one of choice, uniform"),
        ({"region": {"choice": ["chest", "abdomen"], "weights": [1]}}, "a weight for each of the 2"),
        ({"region": {"choice": ["chest", "abdomen"], "weights": [0, 0]}}, "a weight for each of the 2"),
        ({"steps": {"uniform": [5, 1]}}, "5 to 1 is no range"),
        ({"region": {"choice": ["chest", "abdomen"], "weights": [1, float("inf")]}}, "are finite numbers"),
        ({"steps": {"log_uniform": [0, 1]}}, "numbers above 0"),
        ({"steps": {"normal": [5, 0]}}, "standard deviation"),
        ({"steps": {"uniform": [1, 5], "within": [1, 2]}}, "'within' bounds a normal one"),
        ({"steps": {"choice": [1, 2], "whole": True}}, "'whole' rounds"),
        ({"steps": {"unifrom": [1, 2]}}, r"unknown key .*unifrom"),
        ({"regoin": "chest"}, r"has a column 'regoin', which is none; did you mean 'region'\?"),
        ({"removal": True}, "has a column 'removal', which is none"),
        (
            {"anatomy_size": "liver=1"},
            "'anatomy_size', which is none; did you mean 'anatomy_size.liver'",
        ),
        ({"anatomy_size__livre": 1}, r"row 1 \(case-0000\): .*livre"),
        ({"region": "hed"}, r"row 1 \(case-0000\): .*And 7 more rows"),
        ({"case": "x"}, "two rows called 'x'"),
        ({"case": "../x"}, "'../x' is no name for a folder"),
    ],
)
def test_what_is_no_cohort(columns: dict, message: str) -> None:
    with pytest.raises(MaisiError, match=message):
        drawn(12, **columns)


def test_numbers_stay_what_they_are_and_within_their_range() -> None:
    rows = drawn(
        40,
        spacing=0.9765625,
        guidance={"choice": [2.718281828]},
        mask_guidance={"uniform": [0.30001, 0.30004]},
        anatomy_size__liver={"normal": [0, 1], "within": [0.8, 0.9]},
    )
    assert {row["spacing"] for row in rows} == {"0.9765625,0.9765625,0.9765625"}
    assert {row["guidance"] for row in rows} == {"2.718281828"}
    assert all(0.30001 <= float(row["mask_guidance"]) <= 0.30004 for row in rows)
    assert all(0.8 <= float(row["anatomy_size.liver"]) <= 0.9 for row in rows)


def test_remarks_are_not_read(tmp_path: Path) -> None:
    (row,) = read_cohort(written(tmp_path, "Case, region,#notes\na,chest,of last week\n"))
    assert (row.case, row.request.region) == ("a", ("chest",))


def test_rows_without_cells_are_none(tmp_path: Path) -> None:
    rows = read_cohort(written(tmp_path, "case,region\na,chest\n,\n,\n"))
    assert [row.case for row in rows] == ["a"]


def test_cells(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "tiny").mkdir()
    for name in ("m.nii.gz", "ct.nii.gz"):
        (tmp_path / name).touch()
    table = (
        "case,region,size,tumor,structure,keep,mask,image,model,anatomy_size.left kidney,fov,count\n"
        'a,"chest;abdomen","96,80,64",liver:20mm;lung:8-15mmx2,liver;spleen,"liver",m.nii.gz,,my-model,0.8,,3\n'
        "b,abdomen,,none,,,,ct.nii.gz,tiny,,,\n"
        ",thorax,,,,,,,,,auto,\n"
    )
    one, two, three = read_cohort(written(tmp_path, table))
    assert one.request == Request.parse(
        region=("chest", "abdomen"),
        size=(96, 80, 64),
        tumor=["liver:20mm", "lung:8-15mmx2"],
        structure=["liver", "spleen"],
        keep=["liver"],
        mask=tmp_path / "m.nii.gz",
        model=str(tmp_path / "my-model"),
        anatomy_size={"left kidney": 0.8},
        count=3,
    )
    assert two.request.model == "tiny"  # whatever folder has that name
    assert (two.request.removal, two.request.image, two.request.seed) == (True, tmp_path / "ct.nii.gz", 1)
    assert (three.case, three.request.fov, three.request.seed) == ("case-0002", "auto", 2)


def test_tables_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes("\ufeffcase;region;size\r\nä".encode()[:-2] + b"a;chest;96,80,64\r\n")
    (row,) = read_cohort(tmp_path / "table.csv")
    assert (row.case, row.request.size) == ("a", (96, 80, 64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("region,region\nchest,abdomen\n", "two columns called 'region'"),
        ("case,region\ncohort.csv,chest\n", "'cohort.csv' is no name"),
        ("region,mask\nchest,none.nii.gz\n", r"There is no .*none.nii.gz; correct the path of its mask"),
        ("case,region\n", "has no rows"),
        ("case,region\na,chest,more\n", "more or fewer cells"),
        ("case,region\na\n", "more or fewer cells"),
        ('case,region\na,"chest\n', "is no CSV"),
        ("case,region\na,chest\nA,abdomen\n", "two rows called 'A'"),
        ("case,region,steps\na,chest,many\n", r"row 1 \(a\): the request: .*steps"),
        ("case,region\na,chest\n.b,chest\n", r"row 2 \(.b\): '.b' is no name"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MaisiError, match=message):
        read_cohort(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MaisiError, match="Cannot read"):
        read_cohort(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"case,region\n\xff\xfe,chest\n")
    with pytest.raises(MaisiError, match="no text in UTF-8"):
        read_cohort(tmp_path / "a.csv")
