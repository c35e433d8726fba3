from __future__ import annotations

import json

import pytest
from PIL import Image

from maisi.errors import MaisiError
from maisi.evaluation.result import Result, shown, write_result

RESULT = Result(
    name="fid",
    summary={"fid": 4.25, "mmd": None},
    items=({"case": "a|b", "fid": 1.0}, {"case": "c", "fid": 2.123456}),
    settings={"seed": 1},
    notes=("Two volumes were resampled.",),
)


def test_a_result_is_three_files(tmp_path) -> None:
    write_result(tmp_path / "out", RESULT, lambda figure: figure.add_subplot().plot([1, 2]))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"result.json", "table.md", "figure.png"}
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    assert values["summary"] == {"fid": 4.25, "mmd": None}
    assert values["items"][1]["fid"] == 2.123456
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| fid | 4.25 |" in table
    assert "| mmd | - |" in table
    assert "| a/b | 1 |" in table
    assert "| c | 2.123 |" in table
    assert table.endswith("Two volumes were resampled.\n")
    assert min(Image.open(tmp_path / "out" / "figure.png").size) > 300


def test_nothing_is_overwritten_and_nothing_left_half_made(tmp_path) -> None:
    def broken(figure) -> None:
        raise RuntimeError("no picture")

    with pytest.raises(RuntimeError):
        write_result(tmp_path / "out", RESULT, broken)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(MaisiError, match="exists"):
        write_result(tmp_path / "out", RESULT, lambda figure: None)


def test_the_columns_of_a_table_may_be_chosen() -> None:
    lines = Result("x", {}, RESULT.items, {}, columns=("fid",)).table().splitlines()
    assert "| 1 |" in lines
    assert not any("a/b" in line for line in lines)
    assert shown(3) == "3"


def test_an_interval_stands_beside_its_number() -> None:
    summary = {"psnr": 30.0, "psnr_low": 29.0, "psnr_high": 31.5, "x_low": 1.0, "y": 2.0, "y_low": None, "y_high": None}
    rows = Result("x", summary, (), {}).table().splitlines()[4:-1]
    assert rows == ["| psnr | 30 (29 to 31.5) |", "| x_low | 1 |", "| y | 2 |"]
