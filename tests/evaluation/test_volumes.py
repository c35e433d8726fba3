from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from maisi.anatomy import BODY
from maisi.cli import run
from maisi.data.manifest import Case, CaseList, write_cases
from maisi.data.phantom import phantom
from maisi.data.prepare import prepare
from maisi.data.quality import carried_ranges
from maisi.errors import MaisiError
from maisi.evaluation.volumes import find_entries, readable
from maisi.io.nifti import read_header, write_volume
from maisi.volume import Volume

CT, LABELS = phantom((24, 20, 16), (14.0, 14.0, 14.0), ("chest",), seed=0)


def turned(volume):
    """The same volume with its axes in another order and one reversed."""
    array = np.transpose(volume.array, (2, 0, 1))[:, ::-1]
    affine = volume.affine[:, [2, 0, 1, 3]].copy()
    affine[:3, 3] += affine[:3, 1] * (array.shape[1] - 1)
    affine[:3, 1] *= -1
    return Volume(np.ascontiguousarray(array), affine)


@pytest.fixture
def folder(tmp_path):
    """a, b and their label maps, one of them turned; two generated items; a prepared folder of three cases."""
    for place in ("images", "labels", "items/0000", "items/0001", "prepared"):
        (tmp_path / place).mkdir(parents=True)
    write_volume(tmp_path / "images" / "a.nii.gz", CT)
    write_volume(tmp_path / "images" / "b_0000.nii", CT)
    (tmp_path / "images" / "notes.txt").write_text("no volume")
    write_volume(tmp_path / "labels" / "a.nii.gz", turned(LABELS))
    write_volume(tmp_path / "labels" / "b.nii.gz", LABELS)
    for item in ("0000", "0001"):
        write_volume(tmp_path / "items" / item / "image.nii.gz", CT)
    write_volume(tmp_path / "items" / "0000" / "labels.nii.gz", LABELS)
    rows = []
    for name, split, modality in (("p", "train", "ct"), ("q", "validation", "ct"), ("r", "validation", "mri")):
        np.save(tmp_path / "prepared" / f"{name}.npy", CT.array)
        np.save(tmp_path / "prepared" / f"{name}-labels.npy", LABELS.array)
        row = {"id": name, "patient": "z", "split": split, "image": f"{name}.npy", "labels": f"{name}-labels.npy"}
        row |= {"affine": CT.affine.tolist(), "spacing_mm": CT.spacing_mm, "shape": CT.shape, "modality": modality}
        rows.append(row)
    (tmp_path / "prepared" / "index.json").write_text(
        json.dumps({"version": 1, "cases": rows, "custom_labels": {"150": "my plate"}})
    )
    return tmp_path


def names(found):
    return [entry.name for entry in found.entries]


def test_files_and_folders_of_every_kind(folder) -> None:
    assert names(find_entries([folder / "images"])) == ["a", "b_0000"]
    assert names(find_entries([folder / "images" / "a.nii.gz", folder / "items"])) == ["a", "0000", "0001"]
    assert names(find_entries([folder / "items" / "0001"])) == ["0001"]
    found = find_entries([folder / "items"])
    assert [entry.labels is not None for entry in found.entries] == [True, False]
    assert [entry.patient for entry in found.entries] == ["0000", "0001"]


def test_splits_of_prepared_folders(folder) -> None:
    assert names(find_entries([folder / "prepared"])) == ["p", "q"]
    found = find_entries([folder / "prepared"], "validation")
    assert (names(found), found.entries[0].patient) == (["q"], "z")
    assert "1 case(s)" in found.notes[0]
    assert "not CT" in found.notes[0]
    ct, labels = found.entries[0].pair()
    np.testing.assert_array_equal(ct.array, CT.array)
    np.testing.assert_array_equal(labels.array, LABELS.array)


def test_generated_items_that_are_no_ct_or_unfinished_are_left_out(folder) -> None:
    for item, modality in (("0000", "ct"), ("0001", "mri"), ("0002.part-12", "ct")):
        place = folder / "items" / item
        place.mkdir(exist_ok=True)
        write_volume(place / "image.nii.gz", CT)
        (place / "record.json").write_text(json.dumps({"request": {"modality": modality}}))
    found = find_entries([folder / "items"])
    assert names(found) == ["0000"]
    assert found.notes[0].startswith("1 item(s)")
    write_volume(folder / "items" / "loose.nii.gz", CT)
    assert names(find_entries([folder / "items"])) == ["0000"]
    assert find_entries([folder / "items"]).notes[1].startswith("1 volume(s)")
    (folder / "items" / "loose.nii.gz").unlink()
    with pytest.raises(MaisiError, match="holds no CT"):
        find_entries([folder / "items" / "0001"])


@pytest.fixture
def listed(folder):
    """A list of c with foreign labels and an own class, d without labels, an MR; the CTs prepared as well."""
    foreign = np.zeros(LABELS.shape, np.uint8)
    foreign[8:16, 8:14, 4:12] = 1  # the spleen of TotalSegmentator
    own = np.zeros(LABELS.shape, np.uint8)
    own[2:4, 8:14, 4:12] = 150
    write_volume(folder / "spleen.nii.gz", turned(LABELS.with_array(foreign)))
    write_volume(folder / "own.nii.gz", LABELS.with_array(own))
    image = folder / "images" / "a.nii.gz"
    cases = CaseList(
        cases=(
            Case(id="c", patient="x", image=image, labels=folder / "spleen.nii.gz", vocabulary="totalsegmentator"),
            Case(id="d", patient="x", image=image, split="validation"),
            Case(id="e", patient="y", image=image, labels=folder / "own.nii.gz", split="train"),
            Case(id="m", patient="y", image=image, modality="mri"),
        ),
        custom_labels={150: "my plate"},
    )
    write_cases(folder / "cases.json", cases)
    prepare(cases.model_copy(update={"cases": cases.cases[:3]}), folder / "made")
    return folder


def test_case_lists_give_what_preparing_them_gives(listed) -> None:
    found = readable(find_entries([listed / "cases.json"]))
    assert [(e.name, e.patient, e.has_labels) for e in found.entries] == [
        ("c", "x", True),
        ("d", "x", True),
        ("e", "y", True),
    ]
    assert found.notes == (f"1 case(s) of {listed / 'cases.json'} are not CT and were left out.",)
    for entry, prepared in zip(found.entries, find_entries([listed / "made"]).entries, strict=True):
        ct, labels = entry.pair()
        cut, expected = prepared.pair()
        start = np.rint((cut.affine[:3, 3] - ct.affine[:3, 3]) / 14).astype(int)
        box = tuple(slice(s, s + n) for s, n in zip(start, cut.shape, strict=True))
        np.testing.assert_array_equal(ct.array[box], cut.array)
        np.testing.assert_array_equal(labels.array[box], expected.array)
        assert labels.array.max() >= BODY
        assert entry.label_names() == {150: "my plate"}
    assert (found.entries[2].pair()[1].array == 150).any()
    assert names(find_entries([listed / "cases.json"], "validation")) == ["d"]
    assert names(find_entries([listed / "cases.json"], "train")) == ["e"]


def test_lists_that_do_not_fit_are_refused(listed) -> None:
    write_volume(listed / "labels" / "d.nii.gz", LABELS)
    with pytest.raises(MaisiError, match="its own labels"):
        find_entries([listed / "cases.json"], "validation", listed / "labels")
    write_volume(listed / "own.nii.gz", Volume(LABELS.array, np.eye(4)))
    with pytest.raises(MaisiError, match="different grids"):
        readable(find_entries([listed / "cases.json"], "train"))
    (listed / "own.nii.gz").unlink()
    with pytest.raises(MaisiError, match=r"own\.nii\.gz"):
        find_entries([listed / "cases.json"])


def test_the_hash_is_of_what_is_read(folder, listed) -> None:
    first, second = find_entries([folder / "items"]).entries
    assert first.hash == find_entries([folder / "items" / "0000"]).entries[0].hash != second.hash
    entries = find_entries([listed / "cases.json"]).entries
    assert len({entry.hash for entry in entries}) == 3
    assert pickle.loads(pickle.dumps(entries[0])) == entries[0]
    text = (listed / "cases.json").read_text()
    (listed / "cases.json").write_text(text.replace("totalsegmentator", "maisi"))
    other = find_entries([listed / "cases.json"]).entries
    assert other[0].hash != entries[0].hash
    assert other[1].hash == entries[1].hash
    write_volume(folder / "items" / "0001" / "image.nii.gz", CT.with_array(CT.array + 1))
    assert find_entries([folder / "items"]).entries[1].hash != second.hash


def test_a_side_of_which_there_is_none(folder) -> None:
    index = json.loads((folder / "prepared" / "index.json").read_text())
    (folder / "prepared" / "index.json").write_text(json.dumps(index | {"cases": index["cases"][1:]}))
    with pytest.raises(MaisiError, match="holds no CT for train"):
        find_entries([folder / "prepared"], "train")


def test_label_maps_are_found_by_name_and_turned_to_their_image(folder) -> None:
    found = readable(find_entries([folder / "images"], labels=folder / "labels"))
    for entry in found.entries:
        ct, labels = entry.pair()
        np.testing.assert_array_equal(ct.array, CT.array)
        np.testing.assert_array_equal(labels.array, LABELS.array)


def test_names_of_own_classes_come_along(folder) -> None:
    assert find_entries([folder / "prepared"]).entries[0].label_names() == {150: "my plate"}
    write_volume(folder / "labels" / "a.nii.gz", LABELS, names={151: "their plate"})
    first, second = find_entries([folder / "images"], labels=folder / "labels").entries
    assert (first.label_names(), second.label_names()) == ({151: "their plate"}, {})
    assert find_entries([folder / "images"]).entries[0].label_names() == {}


def test_pairs_that_do_not_match_are_refused(folder) -> None:
    write_volume(folder / "labels" / "a.nii.gz", Volume(LABELS.array, np.eye(4)))
    with pytest.raises(MaisiError, match="different grids"):
        readable(find_entries([folder / "images"], labels=folder / "labels"))
    with pytest.raises(MaisiError, match="different grids"):
        find_entries([folder / "images"], labels=folder / "labels").entries[0].pair()
    (folder / "labels" / "a.nii.gz").unlink()
    with pytest.raises(MaisiError, match=r"no label map for 1 image\(s\) \(a\)"):
        find_entries([folder / "images"], labels=folder / "labels")
    write_volume(folder / "labels" / "q.nii.gz", LABELS)
    with pytest.raises(MaisiError, match="its own labels"):
        find_entries([folder / "prepared"], "validation", folder / "labels")


def test_unreadable_files_are_listed_and_skipped_only_when_asked(folder) -> None:
    for name in ("c", "d"):
        (folder / "images" / f"{name}.nii").write_bytes(b"nonsense")
    found = find_entries([folder / "images"])
    with pytest.raises(MaisiError, match=r"c\.nii.*d\.nii.*--skip-unreadable"):
        readable(found)
    left = readable(found, skip=True)
    assert names(left) == ["a", "b_0000"]
    assert [note.startswith("Left out: ") for note in left.notes] == [True, True]
    for path in (folder / "images").glob("[ab]*"):
        path.unlink()
    with pytest.raises(MaisiError, match="No volume could be read"):
        readable(find_entries([folder / "images"]), skip=True)


def test_twins_are_told_apart_by_their_folder(folder) -> None:
    shutil.copytree(folder / "images", folder / "more")
    shutil.copytree(folder / "items", folder / "again")
    found = find_entries([folder / "images", folder / "more", folder / "items", folder / "again"])
    expected = ["images/a", "images/b_0000", "more/a", "more/b_0000", "items/0000", "items/0001", "again/0000"]
    assert names(found)[:7] == expected
    assert found.entries[0].patient == "images/a"
    with pytest.raises(MaisiError, match="Two CTs"):
        find_entries([folder / "images", folder / "images"])


def test_what_is_no_ct_is_refused(folder) -> None:
    write_volume(folder / "images" / "a.nii.gz", CT.with_array((CT.array > 0).astype(np.int16)))
    with pytest.raises(MaisiError, match="no CT in HU"):
        find_entries([folder / "images"]).entries[0].ct()
    (folder / "empty").mkdir()
    with pytest.raises(MaisiError, match="holds no CT"):
        find_entries([folder / "empty"])
    with pytest.raises(MaisiError, match="does not exist"):
        find_entries([folder / "nowhere"])
    with pytest.raises(MaisiError, match="no split"):
        find_entries([folder / "images"], "test")
    (folder / "prepared" / "q.npy").write_bytes(b"nonsense")
    with pytest.raises(MaisiError, match="damaged"):
        readable(find_entries([folder / "prepared"], "validation"))


@pytest.mark.parametrize("damaged", ["image", "labels"])
def test_files_damaged_behind_a_good_header_are_listed_by_every_evaluation(tmp_path, capsys, damaged) -> None:
    image, labels = phantom((20, 18, 16), (16, 16, 16), ("chest",), seed=1)
    for name in ("a", "b", "c"):
        (tmp_path / "out" / name).mkdir(parents=True)
        write_volume(tmp_path / "out" / name / "image.nii.gz", image)
        write_volume(tmp_path / "out" / name / "labels.nii.gz", labels)
    for name in ("b", "c"):
        broken = tmp_path / "out" / name / f"{damaged}.nii.gz"
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size - 40])
        read_header(broken)
    found = find_entries([tmp_path / "out"])
    assert readable(found, headers_only=True) == found
    with pytest.raises(MaisiError, match=rf"(?s)b/{damaged}.nii.gz.*c/{damaged}.nii.gz.*--skip-unreadable"):
        readable(found)
    left = readable(found, skip=True)
    assert [entry.name for entry in left.entries] == ["a"]
    assert len(left.notes) == 2
    assert all(note.startswith("Left out: ") for note in left.notes)
    (tmp_path / "ranges.json").write_text(carried_ranges().model_dump_json())
    out = str(tmp_path / "out")
    ranges = str(tmp_path / "ranges.json")
    commands = {"memorisation": [out, out], "fidelity": [out], "medians": [out, "--ranges", ranges]}
    commands["reconstruction"] = [out]
    for command, words in commands.items():
        assert run(["evaluate", command, *words, "-o", str(tmp_path / command)]) == 2
        told = capsys.readouterr().err
        assert "--skip-unreadable" in told
        assert f"b/{damaged}.nii.gz" in told
        assert f"c/{damaged}.nii.gz" in told
        assert not (tmp_path / command).exists()
    words = ["evaluate", "medians", *commands["medians"], "--skip-unreadable", "-o", str(tmp_path / "kept")]
    assert run(words) == 0
    notes = json.loads((tmp_path / "kept" / "result.json").read_text())["notes"]
    assert sum(note.startswith("Left out: ") for note in notes) == 2


def test_a_zarr_in_a_folder_counts_as_one_volume(folder) -> None:
    pytest.importorskip("zarr")
    write_volume(folder / "images" / "c.ome.zarr", turned(CT))
    write_volume(folder / "labels" / "c.zarr", LABELS)
    found = find_entries([folder / "images"], labels=folder / "labels")
    assert names(found) == ["a", "b_0000", "c"]
    assert names(readable(found)) == ["a", "b_0000", "c"]
    ct, labels = found.entries[2].pair()
    np.testing.assert_array_equal(ct.array, CT.array)
    np.testing.assert_array_equal(labels.array, LABELS.array)
    alone = find_entries([folder / "images" / "c.ome.zarr"]).entries[0]
    assert (alone.name, alone.has_labels) == ("c", False)
    assert alone.hash == replace(alone, name="d").hash != found.entries[2].hash
