"""`maisi mask import`, `maisi export` and `maisi labels --slicer` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from maisi import cli
from maisi.anatomy import label_names
from maisi.data.phantom import phantom
from maisi.io.nifti import read_label_names, read_labels, write_volume
from maisi.io.record import write_record
from maisi.request import Request


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ct.nii.gz and seg.nii.gz, whose classes are the chest's with names of its own."""
    ct, labels = phantom((60, 44, 30), (7.0, 7.0, 9.0), ("chest",), seed=0)
    write_volume(tmp_path / "ct.nii.gz", ct)
    theirs = np.where(labels.array == 115, 7, 0) + np.where(labels.array == 6, 9, 0)
    names = {7: "Herz", 9: "Aorta"}
    write_volume(tmp_path / "seg.nii.gz", labels.with_array(theirs.astype(np.uint8)), names=names)
    (tmp_path / "table.json").write_text(json.dumps({"herz": "heart", "9": {"id": 150, "name": "big artery"}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    return cli.run(list(words))


def test_a_mask_is_imported_with_a_table_of_names(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("mask", "import", "seg.nii.gz", "--ct", "ct.nii.gz", "--from", "table.json", "-o", "m.nii.gz", "--report")
        == 0
    )
    shown = capsys.readouterr().out
    assert "big artery" in shown
    assert "2 classes of table.json" in shown
    assert read_label_names(files / "m.nii.gz") == {115: "heart", 150: "big artery", 200: "body"}
    seg, mask = read_labels(files / "seg.nii.gz").array, read_labels(files / "m.nii.gz").array
    np.testing.assert_array_equal(mask == 115, seg == 7)
    report = json.loads((files / "m.json").read_text())
    assert report["body"] == "ct"
    assert {entry["id"] for entry in report["structures"]} == {115, 150, 200}


def test_each_input_may_have_its_own_vocabulary(files: Path) -> None:
    write_volume(files / "two.nii.gz", read_labels(files / "seg.nii.gz"))
    more = ("--from", "table.json", "--from", "maisi")
    assert run("mask", "import", "seg.nii.gz", "two.nii.gz", *more, "-o", "m.nii") == 0
    assert 9 not in np.unique(read_labels(files / "m.nii").array)


def test_a_mask_is_brought_to_a_spacing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--ct", "ct.nii.gz", "--from", "table.json", "--spacing", "3.5,7,9")
    assert run("mask", "import", "seg.nii.gz", *more, "-o", "m.nii.gz") == 0
    assert "120 x 44 x 30 voxels of 3.5 x 7 x 9 mm" in capsys.readouterr().out
    assert read_labels(files / "m.nii.gz").shape == (120, 44, 30)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seg.nii.gz", "--from", "table.json", "--spacing", "3,0,3", "-o", "m.nii.gz"], "spacing"),
        (["seg.nii.gz", "--from", "vista", "-o", "m.nii.gz"], "Unknown label vocabulary"),
        (["seg.nii.gz", "--from", "none.json", "-o", "m.nii.gz"], "Cannot read none.json"),
        (["seg.nii.gz", "--from", "bad.json", "-o", "m.nii.gz"], "no JSON"),
        (["seg.nii.gz", "--from", "maisi", "--from", "maisi", "-o", "m.nii.gz"], "2 times --from"),
        (["seg.nii.gz", "--from", "maisi", "-o", "ct.nii.gz"], "exists"),
        (["seg.nii.gz", "--from", "maisi", "-o", "m.png"], "give a name that ends so"),
        (["nothing.nii.gz", "--from", "maisi", "-o", "m.nii.gz"], "Cannot read nothing"),
        (["ct.nii.gz", "--from", "maisi", "-o", "m.nii.gz"], "ct.nii.gz holds"),
        (["seg.nii.gz", "--ct", "seg.nii.gz", "--from", "table.json", "-o", "m.nii.gz"], "not in HU"),
    ],
)
def test_wrong_input_is_one_sentence_and_no_file(
    files: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    (files / "bad.json").write_text("{")
    before = sorted(files.iterdir())
    assert run("mask", "import", *words) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1
    assert sorted(files.iterdir()) == before


def test_pairs_are_exported(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, labels = phantom((60, 44, 30), (7.0, 7.0, 9.0), ("chest",), seed=0)
    item = files / "run" / "0000"
    item.mkdir(parents=True)
    write_volume(item / "image.nii.gz", labels.with_array(labels.array.astype(np.int16)))
    write_volume(item / "labels.nii.gz", labels)
    request = Request.parse(region="chest")
    write_record(item / "record.json", request, item=0, seed=0, weights_sha256={}, timings_s={})
    assert run("export", "run", "--to", "nnunet", "-o", "out", "--keep", 'heart, "left lung upper lobe",6') == 0
    captured = capsys.readouterr()
    assert "1 pairs, 3 labels" in captured.out
    assert "DatasetNNN_Name" in captured.err
    index = json.loads((files / "out/dataset.json").read_text())
    assert index["labels"] == {"background": 0, "heart": 1, "left lung upper lobe": 2, "aorta": 3}
    assert run("export", "run", "--to", "nnunet", "-o", "out") == 2
    assert run("export", "run", "--to", "msd", "-o", "more", "--keep", "hart") == 2
    assert "did you mean 'heart'" in capsys.readouterr().err
    assert not (files / "more").exists()


def test_the_vocabulary_as_a_color_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("labels", "--slicer") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(label_names(range(256)))
    assert lines[3].startswith("1 liver ")
