"""`maisi cohort` as a user types it."""

from __future__ import annotations

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maisi import cli
from maisi.data.phantom import phantom
from maisi.generation import maker, pipeline
from maisi.generation.cohort import begin_cohort
from maisi.io.nifti import read_volume, write_volume


def run(*arguments: object) -> int:
    return cli.run([*map(str, arguments)])


@pytest.fixture
def table(tmp_path: Path, model_folder: Path) -> Path:
    """A plain row, two items that follow a mask, and a CT that is painted into."""
    image, labels = phantom((32, 32, 16), (10.0, 10.0, 10.0), ("chest",), seed=1)
    write_volume(tmp_path / "ct.nii.gz", image)
    write_volume(tmp_path / "labels.nii.gz", labels)
    rows = [
        "case,region,size,spacing,mask,image,tumor,by,count,retries,model,steps",
        f'plain,chest,"32,32,16","10,10,10",,,,,,,{model_folder},2',
        f"pairs,,,,labels.nii.gz,,,,2,0,{model_folder},2",
        "painted,,,,labels.nii.gz,ct.nii.gz,lung:60mm,rules,,0,tiny,",
    ]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "table.csv"


def items(out: Path) -> list[dict[str, str]]:
    with (out / "items.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_what_the_other_commands_make(table, tmp_path, model_folder, capsys) -> None:
    out = tmp_path / "out"
    assert run("cohort", "make", table, "-o", out, "--device", "cpu") == 0
    assert f"{out}: 4 item(s) of 3 rows" in capsys.readouterr().out
    assert [row["folder"] for row in items(out)] == ["plain/0000", "pairs/0000", "pairs/0001", "painted/0000"]
    with Image.open(out / "overview.png") as overview:
        assert overview.width == 4 * 300
    model = ("--model", model_folder, "--steps", 2, "--device", "cpu")
    grid = ("--region", "chest", "--size", "32,32,16", "--spacing", "10,10,10", "--seed", 0)
    masked = ("--mask", tmp_path / "labels.nii.gz", "--seed", 1, "-n", 2, "--retries", 0)
    rules = ("--labels", tmp_path / "labels.nii.gz", "--tumor", "lung:60mm", "--by", "rules", "--seed", 2)
    assert run("generate", *grid, *model, "-o", tmp_path / "plain") == 0
    assert run("generate", *masked, *model, "-o", tmp_path / "pairs") == 0
    assert run("inpaint", tmp_path / "ct.nii.gz", *rules, "--retries", 0, "-o", tmp_path / "painted") == 0
    for row in items(out):
        one, other = (read_volume(place / row["folder"] / "image.nii.gz") for place in (out, tmp_path))
        np.testing.assert_array_equal(one.array, other.array)


def test_parts_make_the_whole_and_a_folder_is_gone_on_with(table, tmp_path, monkeypatch, capsys) -> None:
    loaded = []
    whole = pipeline.Model.__init__
    monkeypatch.setattr(pipeline.Model, "__init__", lambda self, *a, **k: (loaded.append(1), whole(self, *a, **k))[1])
    assert run("cohort", "make", table, "-o", tmp_path / "whole", "--device", "cpu") == 0
    assert len(loaded) == 1
    for part in ("2/2", "1/2"):
        assert run("cohort", "make", table, "-o", tmp_path / "parts", "--part", part, "--device", "cpu") == 0
    assert len(loaded) == 3
    assert (tmp_path / "parts" / "items.csv").read_bytes() == (tmp_path / "whole" / "items.csv").read_bytes()
    capsys.readouterr()
    assert run("cohort", "make", table, "-o", tmp_path / "parts", "--device", "cpu") == 0
    assert len(loaded) == 3
    made = {path.relative_to(tmp_path / "parts"): path.stat().st_mtime for path in tmp_path.glob("parts/*/0*/*")}
    table.write_text(table.read_text() + 'more,chest,"32,32,16","10,10,10",,,,,,,' + f"{table.parent / 'models'},2\n")
    table.write_text(table.read_text().replace(f"{table.parent / 'models'},2", "tiny,1"))
    assert run("cohort", "make", table, "-o", tmp_path / "parts", "--device", "cpu") == 0
    assert len(items(tmp_path / "parts")) == 5
    assert all((tmp_path / "parts" / path).stat().st_mtime == time for path, time in made.items())
    assert (tmp_path / "parts" / "cohort.csv").read_bytes() == table.read_bytes()


def test_what_one_row_cannot_get_the_others_do(table, tmp_path, capsys) -> None:
    table.write_text(table.read_text().replace("lung:60mm", "liver:190mm"))
    out = tmp_path / "out"
    assert run("cohort", "make", table, "-o", out, "--device", "cpu") == 2
    told = capsys.readouterr()
    assert "Note: painted: " in told.err
    assert "1 of 3 rows could not be made" in told.err
    assert [row["case"] for row in items(out)] == ["plain", "pairs", "pairs"]
    assert not (out / "painted").exists()


def test_faults_of_the_table_come_before_any_work(table, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    good = table.read_text()
    for old, new, message in (
        ("chest,", "chestt,", "row 1 (plain)"),
        ("steps\n", "stops\n", "did you mean 'steps'?"),
        (",tiny,", ",tinny,", "tinny"),
        ("ct.nii.gz", "none.nii.gz", "row 3 (painted): There is no"),
        ("painted,", "items.csv,", "'items.csv' is no name for a folder"),
        ("by,count", "by,by", "two columns called 'by'"),
    ):
        table.write_text(good.replace(old, new))
        assert run("cohort", "make", table, "-o", out) == 2
        assert message in capsys.readouterr().err
    table.write_text(good)
    for words, message in (
        (("--part", "3/2"), "--part 3/2 is none"),
        (("--part", "a"), "--part a is none"),
        (("--device", "gpu"), "gpu"),
        (("--precision", "half"), "half"),
    ):
        assert run("cohort", "make", table, "-o", out, *words) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    assert run("cohort", "make", table, "-o", out) == 2
    assert "is no cohort's folder" in capsys.readouterr().err
    (out / "cohort.csv").write_text("of somebody else")
    assert run("cohort", "make", table, "-o", out) == 2
    assert (out / "cohort.csv").read_text() == "of somebody else"
    capsys.readouterr()
    assert run("cohort", "make", table, "-o", tmp_path / "no" / "out") == 2
    assert "does not exist; make it first" in capsys.readouterr().err


def test_a_row_that_was_changed_is_refused_and_the_table_says_what_was_made(table, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert run("cohort", "make", table, "-o", out, "--part", "3/3") == 0
    table.write_text(table.read_text().replace("lung:60mm", "lung:50mm"))
    assert run("cohort", "make", table, "-o", out, "--part", "3/3") == 2
    assert "was not made by this request" in capsys.readouterr().err
    assert [row["tumors"] for row in items(out)] == ["lung:60mm"]


def test_memory_that_runs_out_in_one_row_does_not_end_the_others(table, tmp_path, monkeypatch, capsys) -> None:
    whole = maker.Maker.prepare

    def prepare(self, request):
        if request.mask is None:
            raise MemoryError
        return whole(self, request)

    monkeypatch.setattr(maker.Maker, "prepare", prepare)
    assert run("cohort", "make", table, "-o", tmp_path / "out", "--device", "cpu") == 2
    assert "Note: plain: " in capsys.readouterr().err
    assert [row["case"] for row in items(tmp_path / "out")] == ["pairs", "pairs", "painted"]


def test_parts_begin_together(table, tmp_path) -> None:
    for _ in range(20):
        out = tmp_path / "out"
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(begin_cohort, [out] * 4, [table] * 4))
        assert (out / "cohort.csv").read_bytes() == table.read_bytes()
        shutil.rmtree(out)


def test_the_way_to_the_table_does_not_matter(table, tmp_path, monkeypatch, model_folder) -> None:
    shutil.copytree(model_folder, tmp_path / "net")
    table.write_text(table.read_text().replace(str(model_folder), "net"))
    assert run("cohort", "make", table, "-o", tmp_path / "out", "--part", "1/3", "--device", "cpu") == 0
    monkeypatch.chdir(tmp_path)
    assert run("cohort", "make", "table.csv", "-o", "out", "--part", "1/3", "--device", "cpu") == 0


def test_damaged_records_are_told(table, tmp_path) -> None:
    out = tmp_path / "out"
    assert run("cohort", "make", table, "-o", out, "--part", "1/3", "--device", "cpu") == 0
    (out / "plain" / "0000" / "record.json").write_text("[]")
    (out / "plain" / "0000" / "preview.png").write_bytes(b"no picture")
    assert run("cohort", "make", table, "-o", out, "--part", "1/3", "--device", "cpu") == 0
    assert "record.json is damaged" in items(out)[0]["faults"]


def test_draw(tmp_path, capsys) -> None:
    assert run("cohort", "draw", "--example") == 0
    (tmp_path / "spec.yaml").write_text(capsys.readouterr().out)
    for name in ("a.csv", "b.csv"):
        assert run("cohort", "draw", tmp_path / "spec.yaml", "-o", tmp_path / name) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert f"{tmp_path / 'b.csv'}: 8 rows" in capsys.readouterr().out
    for words, message in (
        ((tmp_path / "spec.yaml", "-o", tmp_path / "a.csv"), "exists"),
        ((tmp_path / "spec.yaml",), "start from what `maisi cohort draw --example` prints"),
        ((tmp_path / "none.yaml", "-o", tmp_path / "c.csv"), "Cannot read"),
        ((tmp_path / "spec.yaml", "-o", tmp_path / "c.txt"), "writes .csv"),
    ):
        assert run("cohort", "draw", *words) == 2
        assert message in capsys.readouterr().err


def test_items_of_a_cohort_are_exported(table, tmp_path) -> None:
    assert run("cohort", "make", table, "-o", tmp_path / "out", "--part", "2/3", "--device", "cpu") == 0
    for place, name in (("out/pairs", "row"), ("out", "all")):
        assert run("export", tmp_path / place, "--to", "monai", "-o", tmp_path / name) == 0
        assert len(json.loads((tmp_path / name / "datalist.json").read_text())["training"]) == 2
    (tmp_path / "out" / "items.csv").unlink()
    assert run("export", tmp_path / "out", "--to", "monai", "-o", tmp_path / "none") == 2


def test_where_the_tumours_are_is_a_table(table, tmp_path) -> None:
    out = tmp_path / "out"
    assert run("cohort", "make", table, "-o", out, "--device", "cpu") == 0
    with (out / "tumors.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    labels = read_volume(out / "painted/0000/labels.nii.gz")
    inside = np.argwhere(labels.array == 23)
    centre = labels.affine[:3, :3] @ inside.mean(axis=0) + labels.affine[:3, 3]
    assert [float(row[f"{axis}_mm"]) for axis in "xyz"] == pytest.approx(centre, abs=0.01)
    assert (row["case"], row["folder"], row["kind"], row["label"]) == ("painted", "painted/0000", "lung", "23")
    assert float(row["volume_ml"]) == pytest.approx(len(inside) * 1.0, rel=1e-3)  # voxels of 1 ml
    assert float(row["asked_mm"]) == 60


def test_rows_that_get_no_label_map_beside_others_that_do_are_told(tmp_path, capsys) -> None:
    spec = "count: 4\nseed: 0\ncolumns:\n  region: chest\n  size: 32,32,16\n  spacing: 10\n"
    (tmp_path / "some.yaml").write_text(spec + '  tumor: {choice: ["", "lung:60mm"]}\n')
    assert run("cohort", "draw", tmp_path / "some.yaml", "-o", tmp_path / "some.csv") == 0
    assert "ask for no structure, tumour or mask" in capsys.readouterr().err
    (tmp_path / "all.yaml").write_text(spec + '  structure: heart\n  tumor: {choice: ["", "lung:60mm"]}\n')
    assert run("cohort", "draw", tmp_path / "all.yaml", "-o", tmp_path / "all.csv") == 0
    assert "ask for no structure" not in capsys.readouterr().err
