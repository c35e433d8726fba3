"""Data sets for other programs, read as those programs read them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maisi.anatomy import KNOWN_IDS, TUMORS
from maisi.cli import run
from maisi.errors import MaisiError
from maisi.generation.export import EXPORT_FILE, LAYOUTS, consecutive, export, find_pairs, folds_of, relabelled
from maisi.generation.output import Item, save_item
from maisi.io.nifti import read_label_names, read_labels, read_volume, write_volume
from maisi.io.record import write_record
from maisi.request import Request
from maisi.volume import Volume


def add_item(folder: Path, number: int, labels: Volume | None, modality: str = "ct") -> Path:
    """An item as `save_item` writes it, without the picture, which takes longest."""
    item = folder / f"{number:04d}"
    item.mkdir(parents=True)
    shape = (6, 5, 4) if labels is None else labels.shape
    array = np.random.default_rng(number).integers(-1000, 1000, shape).astype(np.int16)
    write_volume(item / "image.nii.gz", Volume(array, np.eye(4) if labels is None else labels.affine))
    if labels is not None:
        write_volume(item / "labels.nii.gz", labels)
    request = Request.parse(region="chest", seed=1, modality=modality)
    write_record(item / "record.json", request, item=number, seed=number, weights_sha256={}, timings_s={})
    return item


@pytest.fixture
def generated(tmp_path: Path, chest_labels: Volume) -> Path:
    """Five pairs of three masks, and an item without a mask."""
    folder = tmp_path / "my run"
    for number in range(5):
        array = chest_labels.array.copy()
        array[number % 3] = 200
        add_item(folder, number, chest_labels.with_array(array))
    add_item(folder, 5, None)
    (folder / "0006.part-ab12").mkdir()
    (folder / "request.json").write_text("{}")
    return folder


def test_pairs_that_did_not_pass_are_told_of_and_may_be_left_out(generated: Path, tmp_path: Path, capsys) -> None:
    path = generated / "0001" / "record.json"
    record = json.loads(path.read_text()) | {"contrast_as_usual": False, "contrast_hu": {"23": 40.0}}
    path.write_text(json.dumps(record))
    assert export([generated], tmp_path / "all", "monai").not_passed == 1
    words = ["export", str(generated), "--to", "MONAI"]
    assert run([*words, "-o", str(tmp_path / "told")]) == 0
    assert "1 pair(s) that did not pass their quality check are among them" in capsys.readouterr().err
    assert run([*words, "--passed", "-o", str(tmp_path / "passed")]) == 0
    assert len(list((tmp_path / "passed" / "imagesTr").iterdir())) == 4


def test_a_folder_given_twice_is_refused(generated: Path, tmp_path: Path) -> None:
    with pytest.raises(MaisiError, match="given twice"):
        export([generated, generated / ".." / "my run"], tmp_path / "out", "monai")


NAMES = [f"my-run-000{n}" for n in range(5)]
ALL = {23: 1, 28: 2, 32: 3, 200: 4}


@pytest.mark.parametrize("to", LAYOUTS)
def test_every_format_has_the_pairs_with_consecutive_labels(generated: Path, tmp_path: Path, to: str) -> None:
    made = export([generated], tmp_path / "out", to)
    suffix = "_0000" if to == "nnunet" else ""
    assert sorted(p.name for p in (tmp_path / "out/imagesTr").iterdir()) == [f"{n}{suffix}.nii.gz" for n in NAMES]
    assert sorted(p.name for p in (tmp_path / "out/labelsTr").iterdir()) == [f"{n}.nii.gz" for n in NAMES]
    assert (made.cases, made.without_mask, dict(made.ids)) == (tuple(NAMES), 1, ALL)
    for number, name in enumerate(NAMES):
        ours = read_labels(generated / f"000{number}/labels.nii.gz")
        theirs = read_labels(tmp_path / f"out/labelsTr/{name}.nii.gz")
        assert theirs.same_grid(ours)
        back = np.vectorize({0: 0, **{value: id for id, value in ALL.items()}}.get)(theirs.array)
        np.testing.assert_array_equal(back, ours.array)
        image = tmp_path / f"out/imagesTr/{name}{suffix}.nii.gz"
        np.testing.assert_array_equal(
            read_volume(image).array, read_volume(generated / f"000{number}/image.nii.gz").array
        )
        for path in (image, tmp_path / f"out/labelsTr/{name}.nii.gz"):
            assert b"synthetic" in nibabel.load(path).header["descrip"].item()
    note = json.loads((tmp_path / "out" / EXPORT_FILE).read_text())
    assert note["synthetic"] is True
    assert {entry["maisi_id"]: int(value) for value, entry in note["labels"].items()} == ALL
    index = (tmp_path / "out" / LAYOUTS[to].index).read_text()
    assert "ynthetic" in index or to == "torchio"
    assert str(tmp_path) not in index  # the data set may be moved


def test_nnunet_has_what_its_documentation_asks_for(generated: Path, tmp_path: Path) -> None:
    export([generated], tmp_path / "Dataset501_Synthetic", "nnunet")
    index = json.loads((tmp_path / "Dataset501_Synthetic/dataset.json").read_text())
    assert index["channel_names"] == {"0": "CT"}
    assert index["file_ending"] == ".nii.gz"
    assert index["numTraining"] == 5
    assert index["labels"] == {
        "background": 0,
        "lung tumor": 1,
        "left lung upper lobe": 2,
        "right lung lower lobe": 3,
        "body": 4,
    }


@pytest.mark.parametrize(("to", "index"), [("msd", "dataset.json"), ("monai", "datalist.json")])
def test_monai_reads_the_lists(generated: Path, tmp_path: Path, to: str, index: str) -> None:
    load = pytest.importorskip("monai.data").load_decathlon_datalist
    export([generated], tmp_path / "out", to)
    cases = load(str(tmp_path / "out" / index), is_segmentation=True, data_list_key="training")
    assert len(cases) == 5
    assert all(Path(case[key]).is_file() for case in cases for key in ("image", "label"))


def test_the_decathlon_index_has_its_entries(generated: Path, tmp_path: Path) -> None:
    export([generated], tmp_path / "Task50_Synthetic", "msd", keep=[28, 23])
    index = json.loads((tmp_path / "Task50_Synthetic/dataset.json").read_text())
    assert index["modality"] == {"0": "CT"}
    assert index["labels"] == {"0": "background", "1": "left lung upper lobe", "2": "lung tumor"}
    assert (index["numTraining"], index["numTest"], index["test"]) == (5, 0, [])
    assert index["training"][0] == {"image": f"./imagesTr/{NAMES[0]}.nii.gz", "label": f"./labelsTr/{NAMES[0]}.nii.gz"}


def test_auto3dseg_splits_by_fold(generated: Path, tmp_path: Path) -> None:
    read = pytest.importorskip("monai.auto3dseg.utils").datafold_read
    export([generated], tmp_path / "out", "auto3dseg", folds=3)
    for fold in range(3):
        train, validation = read(str(tmp_path / "out/datalist.json"), str(tmp_path / "out"), fold=fold)
        assert len(train) + len(validation) == 5
        masks = [{Path(case["label"]).read_bytes() for case in side} for side in (train, validation)]
        assert masks[1]
        assert not masks[0] & masks[1]  # the same mask on both sides would be a leak


def test_torchio_gets_a_csv(generated: Path, tmp_path: Path) -> None:
    export([generated], tmp_path / "out", "torchio")
    with (tmp_path / "out/subjects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["subject"] for row in rows] == NAMES
    assert all((tmp_path / "out" / row[key]).is_file() for row in rows for key in ("image", "label"))


def test_what_save_item_writes_is_found(tmp_path: Path, chest_labels: Volume) -> None:
    image = chest_labels.with_array(chest_labels.array.astype(np.int16))
    item = Item(image, chest_labels, Request.parse(region="chest", seed=4), number=0, seed=9)
    save_item(tmp_path / "0000", item)
    assert read_label_names(tmp_path / "0000/labels.nii.gz")[23] == "lung tumor"
    pairs, without = find_pairs([tmp_path / "0000"])
    assert [pair.folder for pair in pairs] == [tmp_path / "0000"]
    assert without == 0
    export([tmp_path / "0000"], tmp_path / "out", "monai")
    (written,) = (tmp_path / "out/labelsTr").iterdir()
    assert read_label_names(written) == {
        1: "lung tumor",
        2: "left lung upper lobe",
        3: "right lung lower lobe",
        4: "body",
    }


@pytest.mark.parametrize("keep", [None, [150, 28], ["Stent", "left lung upper lobe"]])
def test_classes_of_ones_own_go_by_their_names(
    tmp_path: Path, chest_labels: Volume, keep: list[int | str] | None
) -> None:
    array = chest_labels.array.copy()
    array[array == 32] = 150
    item = add_item(tmp_path / "run", 0, chest_labels.with_array(array))
    with pytest.raises(MaisiError, match="Label id 150 has no name"):
        export([tmp_path / "run"], tmp_path / "out", "nnunet")
    write_volume(item / "labels.nii.gz", chest_labels.with_array(array), names={150: "stent"})
    made = export([tmp_path / "run"], tmp_path / "out", "nnunet", keep)
    written = tmp_path / "out" / "labelsTr" / f"{made.cases[0]}.nii.gz"
    assert read_label_names(written)[made.ids[150]] == "stent"
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]["stent"] == made.ids[150]
    assert (read_labels(written).array == made.ids[150]).sum() == (array == 150).sum()
    other = add_item(tmp_path / "run", 1, None)
    write_volume(other / "labels.nii.gz", Volume(np.full((6, 5, 4), 150, np.uint8), np.eye(4)), names={150: "coil"})
    with pytest.raises(MaisiError, match="called both 'stent' and 'coil'"):
        export([tmp_path / "run"], tmp_path / "two", "nnunet", keep)


def test_painted_cts_are_not_called_synthetic(tmp_path: Path, chest_labels: Volume) -> None:
    for number, synthetic in ((0, True), (1, False)):
        item = add_item(tmp_path / "run", number, chest_labels)
        record = json.loads((item / "record.json").read_text())
        (item / "record.json").write_text(json.dumps(record | {"synthetic": synthetic, "painted": not synthetic}))
    for folder, synthetic in ((tmp_path / "run" / "0000", True), (tmp_path / "run", False)):
        made = export([folder], tmp_path / f"Dataset_{synthetic}", "nnunet")
        texts = [(made.folder / name).read_text() for name in ("dataset.json", "export.json")]
        assert all(("no patient is shown" in text) is synthetic for text in texts)
        assert json.loads(texts[1])["synthetic"] is synthetic


def test_folders_of_one_name_stay_apart(tmp_path: Path, chest_labels: Volume) -> None:
    for parent in ("a", "b"):
        add_item(tmp_path / parent / "run", 0, chest_labels)
    pairs, _ = find_pairs([tmp_path / "a/run", tmp_path / "b/run"])
    assert [pair.name for pair in pairs] == ["run-0000", "run-2-0000"]


# ---- relabelling -------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    array=hnp.arrays(np.uint8, (3, 4, 5), elements=st.sampled_from(sorted(KNOWN_IDS))),
    data=st.data(),
)
def test_relabelling_is_consecutive_and_can_be_undone(array: np.ndarray, data: st.DataObject) -> None:
    held = {int(id) for id in np.unique(array)} - {0}
    if not held:
        return
    keep = data.draw(st.none() | st.lists(st.sampled_from(sorted(held)), min_size=1, unique=True))
    ids = consecutive(held, keep)
    assert list(ids.values()) == list(range(1, len(ids) + 1))
    assert list(ids) == (sorted(held) if keep is None else keep)
    result = relabelled(Volume(array, np.eye(4)), ids)
    back = {value: id for id, value in ids.items()}
    for before, after in zip(array.ravel(), result.ravel(), strict=True):
        if before in ids:
            assert back[after] == before
        elif before not in TUMORS:
            assert after == 0
        else:
            assert after == 0 or back[after] in (*TUMORS[before], 200)


def test_a_tumor_that_is_not_kept_is_the_organ_about_it(chest_labels: Volume) -> None:
    result = relabelled(chest_labels, consecutive([23, 28, 32, 200], [28]))
    np.testing.assert_array_equal(result == 1, np.isin(chest_labels.array, (23, 28)))


@pytest.mark.parametrize("keep", [[1], [28, 28], [0]])
def test_labels_that_cannot_be_kept_are_refused(keep: list[int]) -> None:
    with pytest.raises(MaisiError):
        consecutive([23, 28], keep)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(masks=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20), folds=st.integers(1, 6))
def test_no_fold_is_empty_and_no_mask_is_in_two(masks: list[str], folds: int) -> None:
    dealt = folds_of(masks, folds)
    assert set(dealt) == set(range(min(folds, len(masks))))
    if len(set(masks)) >= folds:
        assert all(len({fold for fold, m in zip(dealt, masks, strict=True) if m == mask}) == 1 for mask in masks)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_what_is_no_generated_folder_is_refused(tmp_path: Path, chest_labels: Volume) -> None:
    with pytest.raises(MaisiError, match="no item"):
        export([tmp_path], tmp_path / "out", "monai")
    add_item(tmp_path / "bare", 0, None)
    with pytest.raises(MaisiError, match="None of the items has a mask"):
        export([tmp_path / "bare"], tmp_path / "out", "monai")
    item = add_item(tmp_path / "real", 0, chest_labels)
    for text, says in (("{}", "damaged"), ('{"synthetic": false, "request": {"modality": "ct"}}', "does not say")):
        (item / "record.json").write_text(text)
        with pytest.raises(MaisiError, match=says):
            export([tmp_path / "real"], tmp_path / "out", "monai")
    assert not (tmp_path / "out").exists()


def test_mixed_modalities_and_grids_are_refused(generated: Path, tmp_path: Path, chest_labels: Volume) -> None:
    add_item(tmp_path / "mr", 0, chest_labels, modality="mri_t1")
    with pytest.raises(MaisiError, match="CT and MRI"):
        export([generated, tmp_path / "mr"], tmp_path / "out", "msd")
    write_volume(tmp_path / "mr/0000/image.nii.gz", Volume(np.zeros((4, 4, 4), np.int16), np.eye(4)))
    with pytest.raises(MaisiError, match="different grids"):
        export([tmp_path / "mr"], tmp_path / "out", "msd")
    with pytest.raises(MaisiError, match="Unknown format"):
        export([generated], tmp_path / "out", "coco")
    with pytest.raises(MaisiError, match="folds"):
        export([generated], tmp_path / "out", "msd", folds=0)


def test_a_failure_leaves_no_data_set(generated: Path, tmp_path: Path) -> None:
    def stop(case: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export([generated], tmp_path / "out", "monai", report=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_it_loads_without_torch() -> None:
    code = "import sys, maisi.generation.export, maisi.data.mask_import; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
