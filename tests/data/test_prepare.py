"""Prepared folders: orientation, crop, labels, split, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maisi.anatomy import BODY, TARGET_VOLUME, label_id
from maisi.data.manifest import Case, CaseList, read_cases, write_cases
from maisi.data.prepare import body_box, label_map, prepare
from maisi.data.prepared import PreparedFolder
from maisi.data.segmentation import AIRWAY
from maisi.errors import MaisiError
from maisi.io.nifti import read_volume, write_volume
from maisi.volume import Volume

SPACING = (4.0, 4.0, 5.0)


def ct(seed: int) -> Volume:
    """A cylinder of tissue with a bone in it, off-centre in air, stored as LPS."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(60), np.arange(50), indexing="ij")
    hu = np.full((60, 50, 24), -1000, np.int16)
    hu[np.hypot(x - 25, y - 24) < 18] = 40
    hu[np.hypot(x - 25, y - 16) < 4] = 700  # cortex
    hu[np.hypot(x - 25, y - 16) < 2.5] = 250  # marrow
    hu += rng.integers(-5, 5, hu.shape).astype(np.int16)
    ras = Volume.from_spacing(hu, SPACING)
    affine = ras.affine @ np.diag([-1, -1, 1, 1])
    affine[:3, 3] = ras.affine[:3, 3] + [59 * 4, 49 * 4, 0]
    return Volume(np.ascontiguousarray(hu[::-1, ::-1]), affine)


def liver(image: Volume) -> Volume:
    array = np.zeros(image.shape, np.uint8)
    array[30:36, 22:28, 5:15] = 5  # TotalSegmentator's liver
    return image.with_array(array)


@pytest.fixture
def cases(tmp_path: Path) -> CaseList:
    rows = []
    for number in range(3):
        image = ct(number)
        write_volume(tmp_path / f"c{number}.nii.gz", image, synthetic=False)
        write_volume(tmp_path / f"l{number}.nii.gz", liver(image), synthetic=False)
        rows.append(
            Case(
                id=f"c{number}",
                patient=f"p{number}",
                image=tmp_path / f"c{number}.nii.gz",
                labels=tmp_path / f"l{number}.nii.gz" if number else None,
                vocabulary="totalsegmentator",
                split="validation" if number == 2 else "train",
            )
        )
    return CaseList(cases=tuple(rows))


def test_arrays_lie_where_the_affine_says(cases: CaseList, tmp_path: Path) -> None:
    index = prepare(cases, tmp_path / "out")
    folder = PreparedFolder(tmp_path / "out")
    assert [case.split for case in index.cases] == ["train", "train", "validation"]
    for number, case in enumerate(folder.index.cases):
        image, labels = folder.image(case), folder.labels(case)
        assert image.shape == labels.shape == case.shape
        assert case.shape[0] < 60
        whole = ct(number).to_ras()
        offset = np.linalg.inv(whole.affine) @ np.array(case.affine)
        start = np.rint(offset[:3, 3]).astype(int)
        crop = whole.array[tuple(slice(a, a + n) for a, n in zip(start, case.shape, strict=True))]
        assert np.array_equal(crop, image)
        assert set(np.unique(labels)) <= {0, 1, BODY, 133, AIRWAY}
        assert (number > 0) == (1 in labels)
        assert (labels[image > 500] == 133).mean() > 0.9
    assert folder.index.cases[1].regions == ("abdomen",)


def test_an_interrupted_preparation_goes_on(cases: CaseList, tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(cases, tmp_path / "out", progress=stop)
    with pytest.raises(MaisiError, match="maisi prepare"):
        PreparedFolder(tmp_path / "out")
    before = (tmp_path / "out" / "c0.npy").stat().st_mtime_ns
    resumed = prepare(cases, tmp_path / "out")
    assert (tmp_path / "out" / "c0.npy").stat().st_mtime_ns == before
    assert resumed == prepare(cases, tmp_path / "whole")


def test_what_the_list_says_anew_is_prepared_anew(cases: CaseList, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(cases, out)
    stamps = {case.id: (out / f"{case.id}.npy").stat().st_mtime_ns for case in cases.cases}
    changed = cases.cases[1].model_copy(update={"weight": 3.0, "regions": ("head-neck",)})
    again = prepare(cases.model_copy(update={"cases": (cases.cases[0], changed, *cases.cases[2:])}), out)
    assert (again.cases[1].weight, again.cases[1].regions) == (3.0, ("head-neck",))
    assert {id for id, stamp in stamps.items() if (out / f"{id}.npy").stat().st_mtime_ns != stamp} == {changed.id}
    image = cases.cases[0].image
    volume = read_volume(image)
    write_volume(image, volume.with_array(np.where(volume.array > 500, 800, volume.array)), synthetic=False)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(cases, out, progress=stop)
    with pytest.raises(MaisiError, match="maisi prepare"):  # the index was of other arrays
        PreparedFolder(out)
    assert prepare(cases, out) == prepare(cases, tmp_path / "whole")
    np.testing.assert_array_equal(np.load(out / "c0.npy"), np.load(tmp_path / "whole" / "c0.npy"))


def test_a_ct_that_is_not_in_hu_is_refused(cases: CaseList, tmp_path: Path) -> None:
    image = cases.cases[0].image
    write_volume(image, (volume := read_volume(image)).with_array(volume.array + 1024), synthetic=False)
    with pytest.raises(MaisiError, match=r"Case c0 does not hold HU.*offset by 1024; subtract that"):
        prepare(cases, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(MaisiError, match="Cannot write"):
        prepare(cases, tmp_path / "file")


def test_labels_on_another_grid_are_refused(cases: CaseList, tmp_path: Path) -> None:
    moved = liver(ct(1))
    affine = moved.affine.copy()
    affine[0, 3] += 10
    write_volume(tmp_path / "moved.nii.gz", Volume(moved.array, affine), synthetic=False)
    wrong = cases.cases[1].model_copy(update={"labels": tmp_path / "moved.nii.gz"})
    with pytest.raises(MaisiError, match="different grids"):
        prepare(CaseList(cases=(wrong,)), tmp_path / "out")


def test_a_target_volume_hides_no_anatomy(tmp_path: Path) -> None:
    image = ct(0).to_ras()
    target = np.full(image.shape, 10, np.uint8)  # OpenKBP's PTV70, everywhere
    write_volume(tmp_path / "t.nii.gz", image.with_array(target), synthetic=False)
    case = Case(id="a", patient="a", image=tmp_path / "a", labels=tmp_path / "t.nii.gz", vocabulary="openkbp")
    labels = label_map(case, image)
    assert label_id("target volume") == TARGET_VOLUME
    assert (labels[image.array > 500] == 133).mean() > 0.9
    assert (labels[(image.array > 0) & (image.array < 100)] == TARGET_VOLUME).mean() > 0.9


def test_mr_is_stored_as_the_networks_see_it(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(0, 700, (20, 20, 20)).astype(np.float32)
    write_volume(tmp_path / "mr.nii.gz", Volume.from_spacing(values, (1, 1, 1)), synthetic=False)
    case = Case(id="mr", patient="m", image=tmp_path / "mr.nii.gz", modality="mri_t1", split="train")
    folder_index = prepare(CaseList(cases=(case,)), tmp_path / "out")
    image = PreparedFolder(tmp_path / "out").image(folder_index.cases[0])
    assert image.dtype == np.float32
    assert 0 <= image.min() < 0.05
    assert 0.95 < np.percentile(image, 99.5) < 1.05


def test_box_of_nothing_is_everything() -> None:
    assert body_box(np.zeros((3, 4, 5), bool)) == (slice(0, 3), slice(0, 4), slice(0, 5))


def test_classes_of_ones_own_are_kept_with_their_names(tmp_path: Path) -> None:
    image = ct(0)
    array = np.zeros(image.shape, np.uint8)
    array[30:36, 22:28, 5:15] = 150
    write_volume(tmp_path / "c.nii.gz", image, synthetic=False)
    write_volume(tmp_path / "l.nii.gz", image.with_array(array), synthetic=False)
    case = Case(id="c", patient="p", image=tmp_path / "c.nii.gz", labels=tmp_path / "l.nii.gz")
    with pytest.raises(MaisiError, match="150"):
        prepare(CaseList(cases=(case,)), tmp_path / "unnamed")
    named = CaseList(cases=(case,), custom_labels={150: "submandibular gland"})
    write_cases(tmp_path / "cases.json", named)
    assert read_cases(tmp_path / "cases.json").custom_labels == {150: "submandibular gland"}
    folder_index = prepare(named, tmp_path / "out")
    folder = PreparedFolder(tmp_path / "out")
    assert folder.index.custom_labels == folder_index.custom_labels == {150: "submandibular gland"}
    assert (folder.labels(folder.index.cases[0]) == 150).sum() == (array == 150).sum()


@pytest.mark.parametrize(("id", "name"), [(1, "mine"), (200, "mine"), (140, "mine"), (150, "liver"), (150, " ")])
def test_names_and_ids_that_are_taken_are_refused(id: int, name: str, cases: CaseList) -> None:
    with pytest.raises(ValueError, match=r"class of your own|empty or taken"):
        CaseList(cases=cases.cases, custom_labels={id: name})
