from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from maisi import cli
from maisi.data.phantom import phantom, phantom_labels
from maisi.io.nifti import read_label_names, read_labels, write_volume
from maisi.volume import Volume


@pytest.fixture
def masks(tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    labels = phantom_labels((60, 48, 40), (7, 7, 7), ("abdomen",), 1)
    labels.array[28:31, 22:25, 18:21] = 26
    write_volume(folder / "a.nii.gz", labels)
    return folder


def run(*arguments: object) -> int:
    return cli.run([str(a) for a in ("mask", *arguments)])


def test_a_library_is_built_and_searched(masks, tmp_path, capsys) -> None:
    out = tmp_path / "library"
    assert run("library", "build", masks, "-o", out, "--note", "phantoms") == 0
    wish = ("--region", "abdomen", "--structure", "kidney", "--tumor", "liver", "--size", "60,48,40")
    assert run("library", "search", out, *wish, "--spacing", "7,7,7") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("0001; ")
    assert "hepatic tumor" in line
    assert run("library", "search", out, "--structure", "mandible") == 2
    assert "None of the 1 masks has the structure 'mandible'" in capsys.readouterr().err
    assert run("library", "build", masks, "-o", out) == 2


def test_a_mask_is_deformed(masks, tmp_path) -> None:
    change = ("--seed", 1, "--anatomy-size", "kidney=0.6", "--elastic", 6, "--rotate", 3, "--zoom", "1,1.1")
    for name in ("one", "two"):
        assert run("deform", masks / "a.nii.gz", "-o", tmp_path / f"{name}.nii.gz", *change) == 0
    one, two, old = (read_labels(p) for p in (tmp_path / "one.nii.gz", tmp_path / "two.nii.gz", masks / "a.nii.gz"))
    assert one.same_grid(old)
    np.testing.assert_array_equal(one.array, two.array)
    assert 0.5 < np.isin(one.array, (5, 14)).sum() / np.isin(old.array, (5, 14)).sum() < 0.85


def test_tumours_get_other_shapes(masks, tmp_path) -> None:
    old = read_labels(masks / "a.nii.gz")
    old.array[26:32, 20:26, 17:22] = 26
    write_volume(tmp_path / "old.nii.gz", old)
    still = ("--elastic", 0, "--rotate", 0, "--zoom", "1,1")
    for name, more in (("same", ()), ("moved", ("--tumors",))):
        assert run("deform", tmp_path / "old.nii.gz", "-o", tmp_path / f"{name}.nii.gz", *still, *more) == 0
    same, moved = (read_labels(tmp_path / f"{name}.nii.gz").array for name in ("same", "moved"))
    np.testing.assert_array_equal(same, old.array)
    assert (moved == 26).sum() >= 0.8 * (old.array == 26).sum()
    assert not np.array_equal(moved, old.array)
    assert np.isin(old.array[moved == 26], (1, 26)).all()
    assert read_label_names(tmp_path / "moved.nii.gz")[26] == "hepatic tumor"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("--anatomy-size", "pancreas=3"), "0.3 to 2"),
        (("--anatomy-size", "brain=1.1"), "holds no 'brain'"),
        (("--rotate", "90"), "0 to 30"),
        (("--zoom", "1"), "0.95,1.05"),
    ],
)
def test_a_change_that_cannot_be_made(masks, tmp_path, capsys, change, word) -> None:
    assert run("deform", masks / "a.nii.gz", "-o", tmp_path / "b.nii.gz", *change) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "b.nii.gz").exists()


@pytest.mark.parametrize(
    ("wish", "word"),
    [
        (("--tumor", "spleen"), "No tumour is called 'spleen'"),
        (("--size", "8,8,8"), "--spacing"),
        (("--structure", "livr"), "liver"),
    ],
)
def test_a_search_that_says_nothing(masks, tmp_path, capsys, wish, word) -> None:
    run("library", "build", masks, "-o", tmp_path / "library")
    assert run("library", "search", tmp_path / "library", *wish) == 2
    assert word in capsys.readouterr().err


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A label map in TotalSegmentator's ids, which says so."""
    labels = phantom_labels((40, 32, 24), (9, 9, 9), ("abdomen",), seed=1)
    theirs = {1: 5, 3: 1, 14: 3}  # liver, spleen, a kidney
    array = np.select([labels.array == ours for ours in theirs], list(theirs.values()), 0).astype(np.uint8)
    path = tmp_path / "masks" / "foreign.nii.gz"
    path.parent.mkdir()
    write_volume(path, labels.with_array(array), names={5: "liver", 1: "spleen", 3: "kidney_left"})
    return path


def test_label_maps_of_others_are_told_by_every_command(foreign: Path, tmp_path: Path, capsys) -> None:
    labels = read_labels(foreign)
    image = tmp_path / "ct.nii.gz"
    write_volume(image, labels.with_array(np.where(labels.array > 0, 40, -1000).astype(np.int16)), synthetic=False)
    cases = tmp_path / "cases.json"
    case = {"id": "a", "patient": "p", "image": str(image), "labels": str(foreign), "split": "train"}
    cases.write_text(json.dumps({"cases": [case]}))
    for command in (
        ["mask", "library", "build", str(foreign.parent), "-o", str(tmp_path / "library")],
        ["mask", "deform", str(foreign), "-o", str(tmp_path / "deformed.nii.gz")],
        ["quality", "check", str(image), str(foreign)],
        ["quality", "learn", str(cases), "-o", str(tmp_path / "ranges.json")],
        ["prepare", str(cases), "-o", str(tmp_path / "prepared")],
        ["inpaint", str(image), "--labels", str(foreign), "--tumor", "liver:20mm", "-o", str(tmp_path / "out")],
    ):
        before = sorted(tmp_path.rglob("*"))
        code = cli.run(command)
        error = capsys.readouterr().err
        assert code == 2, (command, error)
        assert "names its classes as totalsegmentator does, not maisi" in error, (command, error)
        if command[0] != "prepare":
            assert sorted(tmp_path.rglob("*")) == before


def test_prepare_refuses_labels_on_the_wrong_side(tmp_path: Path, capsys) -> None:
    image, labels = phantom((40, 32, 24), (9, 9, 9), ("abdomen",), seed=1)
    mirrored = labels.with_array(np.ascontiguousarray(labels.array[::-1]))
    write_volume(tmp_path / "ct.nii.gz", image)
    write_volume(tmp_path / "labels.nii.gz", mirrored)
    case = {"id": "a", "patient": "p", "image": "ct.nii.gz", "labels": "labels.nii.gz", "split": "train"}
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [case]}))
    assert cli.run(["prepare", str(tmp_path / "cases.json"), "-o", str(tmp_path / "prepared")]) == 2
    assert "Case a: The mask" in capsys.readouterr().err


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path, capsys, monkeypatch) -> None:
    image, _ = phantom((24, 20, 16), (16, 16, 16), ("chest",), seed=1)
    write_volume(tmp_path / "ct.nii.gz", image)
    (tmp_path / "annexed.nii.gz").symlink_to(tmp_path / "nowhere")
    assert cli.run(["segment", str(tmp_path / "ct.nii.gz"), "-o", str(tmp_path / "annexed.nii.gz")]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert (tmp_path / "annexed.nii.gz").is_symlink()
    monkeypatch.setattr("os.access", lambda *_: False)
    assert cli.run(["segment", str(tmp_path / "none.nii.gz"), "-o", str(tmp_path / "new.nii.gz")]) == 2
    assert "is not writable" in capsys.readouterr().err


def test_segmenting_nobody_is_refused(tmp_path: Path, capsys) -> None:
    empty = Volume.from_spacing(np.full((20, 20, 10), -1024, np.int16), (4, 4, 4))
    write_volume(tmp_path / "air.nii.gz", empty)
    assert cli.run(["segment", str(tmp_path / "air.nii.gz"), "-o", str(tmp_path / "labels.nii.gz")]) == 2
    assert "No body is found" in capsys.readouterr().err
    assert not (tmp_path / "labels.nii.gz").exists()
