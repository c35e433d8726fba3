from __future__ import annotations

import numpy as np
import pytest

from maisi import cli
from maisi.data.phantom import phantom_labels
from maisi.io.nifti import read_label_names, read_labels, write_volume


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
