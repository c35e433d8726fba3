from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from maisi.errors import MaisiError
from maisi.generation import output
from maisi.generation.output import Item, destination, faults_of
from maisi.io.files import new_folder
from maisi.io.nifti import read_labels, read_volume
from maisi.request import Request
from maisi.volume import Volume

ORDER = {"request": {"seed": 1}}


@pytest.fixture
def item(chest_labels) -> Item:
    image = chest_labels.with_array(chest_labels.array.astype(np.int16) - 100)
    request = Request.parse(region="chest", seed=4)
    return Item(image, chest_labels, request, number=2, seed=9, details={"regions": ["chest"], "steps": 2})


def test_an_item_is_four_files(item, tmp_path) -> None:
    folder = item.save(tmp_path / "0002")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["image.nii.gz", "labels.nii.gz", "preview.png", "record.json"]
    image = read_volume(folder / "image.nii.gz")
    assert image.array.dtype == np.int16
    assert np.array_equal(image.array, item.image.array)
    assert image.same_grid(item.image)
    assert np.array_equal(read_labels(folder / "labels.nii.gz").array, item.labels.array)
    record = json.loads((folder / "record.json").read_text())
    assert (record["synthetic"], record["item"], record["seed"], record["steps"]) == (True, 2, 9, 2)
    assert record["request"]["region"] == ["chest"]


def test_what_was_painted_into_a_ct_is_not_called_synthetic(item, tmp_path) -> None:
    for synthetic, said in ((True, b"synthetic CT made by maisi"), (False, b"CT with tissue painted into it by maisi")):
        folder = replace(item, synthetic=synthetic).save(tmp_path / str(synthetic))
        record = json.loads((folder / "record.json").read_text())
        assert (record["synthetic"], record["painted"]) == (synthetic, not synthetic)
        for name in ("image.nii.gz", "labels.nii.gz"):
            data = gzip.decompress((folder / name).read_bytes())
            assert said in data[:348]
            assert f'"synthetic": {str(synthetic).lower()}'.encode() in data
    mr = replace(item, request=item.request.model_copy(update={"modality": "mri_t1"})).save(tmp_path / "mr")
    assert b"synthetic MRI made by maisi" in gzip.decompress((mr / "image.nii.gz").read_bytes())[:348]


def test_an_item_without_a_mask_has_no_labels(item, tmp_path) -> None:
    bare = Item(item.image, None, item.request, number=0, seed=1)
    assert not (bare.save(tmp_path / "x") / "labels.nii.gz").exists()


def test_a_failure_leaves_nothing(item, tmp_path, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "write_record", broken)
    with pytest.raises(KeyboardInterrupt):
        item.save(tmp_path / "0002")
    assert list(tmp_path.iterdir()) == []


def test_looking_at_a_destination_writes_nothing(tmp_path) -> None:
    place = destination(tmp_path / "out", ORDER, range(3, 5))
    assert place.missing == (3, 4)
    assert place.item_folder(3).name == "0003"
    assert list(tmp_path.iterdir()) == []


def test_the_same_order_is_gone_on_with(tmp_path) -> None:
    folder = tmp_path / "out"
    with destination(folder, ORDER, range(3)).begun():
        pass
    (folder / "0001").mkdir()
    (folder / "0002.part-abcd").mkdir()
    again = destination(folder, ORDER, range(3))
    assert again.missing == (0, 2)
    with again.begun():
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["0001", "request.json"]


def test_two_commands_do_not_write_to_one_folder(tmp_path) -> None:
    folder = tmp_path / "out"
    first, second = destination(folder, ORDER, range(3)), destination(folder, ORDER, range(3))
    with first.begun():
        (folder / "0000.part-abcd").mkdir()
        (folder / "request.json.part-abcd").write_text("{")
        with pytest.raises(MaisiError, match="Another command is writing"), second.begun():
            pass
        assert (folder / "0000.part-abcd").is_dir()
    with second.begun():
        assert not list(folder.glob("*.part-*"))


def test_a_folder_that_was_made_meanwhile_is_no_trace(tmp_path) -> None:
    with pytest.raises(MaisiError, match="made by another command"), new_folder(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_differs_is_named(tmp_path) -> None:
    with destination(tmp_path / "out", ORDER, range(1)).begun():
        pass
    other = {**ORDER, "mask_sha256": "a", "first": 7, "request": {**ORDER["request"], "seed": 9}}
    with pytest.raises(MaisiError, match=r"\(they differ in mask_sha256, seed\)"):
        destination(tmp_path / "out", other, range(1))


def test_more_items_and_other_names_of_files_are_gone_on_with(tmp_path) -> None:
    order = {"request": {"seed": 1, "count": 2, "mask": "a.nii.gz"}, "mask_sha256": "same", "first": 0}
    with destination(tmp_path / "out", order, range(2)).begun():
        (tmp_path / "out" / "0000").mkdir()
    more = {"request": {"seed": 1, "count": 5, "mask": "../a.nii.gz"}, "mask_sha256": "same", "first": 0}
    place = destination(tmp_path / "out", more, range(5))
    assert place.missing == (1, 2, 3, 4)
    with place.begun():
        assert json.loads((tmp_path / "out" / "request.json").read_text()) == more


def test_records_say_what_is_wrong() -> None:
    finding = {"kind": "median", "of": "liver", "sentence": "Liver: too dark."}
    quality = {"passed": False, "findings": [{**finding, "passed": False}, {**finding, "passed": True}]}
    record = {"quality": quality, "contrast_as_usual": False, "contrast_hu": {"26": 40.6}}
    assert faults_of(record) == [
        "Liver: too dark.",
        "A tumour's contrast to its host is not that of its kind (hepatic tumor +41 HU).",
    ]
    assert faults_of({"quality": {"passed": True, "findings": []}, "contrast_as_usual": True}) == []
    assert faults_of({"missing": ["liver"]}) == ["There is no liver, which was asked for."]
    assert faults_of({}) == []


@pytest.mark.parametrize("held", ["nothing", "another order", "rubbish", "a file"])
def test_anything_else_is_refused_and_kept(tmp_path, held) -> None:
    folder = tmp_path / "out"
    if held == "a file":
        folder.write_text("mine")
    else:
        folder.mkdir()
    if held == "another order":
        (folder / "request.json").write_text('{"request": {"seed": 2}}')
    if held == "rubbish":
        (folder / "request.json").write_text("{")
    with pytest.raises(MaisiError, match="exists and was not made by this request"):
        destination(folder, ORDER, range(1))
    assert folder.exists()


def test_a_missing_parent_is_refused(tmp_path) -> None:
    with pytest.raises(MaisiError, match="does not exist"):
        destination(tmp_path / "a" / "out", ORDER, range(1))


def test_a_title_tells_what_the_picture_shows(item, tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("maisi.io.preview.preview", lambda *args, title, **kw: seen.append(title))
    item.save(tmp_path / "x")
    assert seen == ["Synthetic: chest; 34 x 26 x 20 voxels of 8 x 9 x 10 mm; seed 4, item 2"]
    assert isinstance(item.image, Volume)


def test_an_item_is_saved_below_folders_that_are_not_there_yet(item, tmp_path) -> None:
    assert (item.save(tmp_path / "results" / "run1" / "0") / "image.nii.gz").is_file()
