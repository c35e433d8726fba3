from __future__ import annotations

import json

import numpy as np
import pytest
from maisi.evaluation.image_sets import find_images

from maisi.data.manifest import Case, CaseList, write_cases
from maisi.data.prepare import prepare
from maisi.errors import MaisiError
from maisi.io.nifti import write_volume
from maisi.volume import Volume


def ct(seed: int = 0) -> Volume:
    hu = np.random.default_rng(seed).integers(-1000, 1000, (16, 14, 12)).astype(np.int16)
    return Volume.from_spacing(hu, (5, 5, 5))


def make_item(folder, seed: int = 0, labels: bool = True, modality: str = "ct"):
    folder.mkdir(parents=True)
    write_volume(folder / "image.nii.gz", ct(seed))
    if labels:
        write_volume(folder / "labels.nii.gz", ct().with_array(np.full((16, 14, 12), 200, np.uint8)))
    (folder / "record.json").write_text(json.dumps({"request": {"modality": modality}}))
    return folder


def test_items_one_or_many(tmp_path) -> None:
    make_item(tmp_path / "out" / "0000", 1)
    make_item(tmp_path / "out" / "0001", 2, labels=False)
    make_item(tmp_path / "out" / "0002", 3, modality="mri")
    (tmp_path / "out" / "0003.part-12").mkdir()
    images = find_images([tmp_path / "out"])
    assert [image.name for image in images] == ["0000", "0001"]
    assert images[1].labels is None
    np.testing.assert_array_equal(images[0].ct().array, ct(1).array)
    assert (images[0].labels().array == 200).all()
    alone = find_images([tmp_path / "out" / "0000"])
    assert alone[0].hash == images[0].hash != images[1].hash


def test_several_sources_have_names_of_their_own(tmp_path) -> None:
    for name in ("a", "b"):
        make_item(tmp_path / name / "0000")
    assert [image.name for image in find_images([tmp_path / "a", tmp_path / "b"])] == ["a/0000", "b/0000"]
    with pytest.raises(MaisiError, match="named by two sources"):
        find_images([tmp_path / "a", tmp_path / "a"])


def test_case_lists_prepared_folders_and_bare_volumes(tmp_path) -> None:
    (tmp_path / "raw").mkdir()
    for number in range(3):
        write_volume(tmp_path / "raw" / f"c{number}.nii.gz", ct(number), synthetic=False)
    cases = [Case(id=f"c{n}", patient=f"p{n}", image=tmp_path / "raw" / f"c{n}.nii.gz") for n in range(3)]
    cases[2] = cases[2].model_copy(update={"split": "validation"})
    write_cases(tmp_path / "cases.json", CaseList(cases=tuple(cases)))
    prepare(CaseList(cases=tuple(cases)), tmp_path / "prepared", validation_share=0.0)
    assert [image.name for image in find_images([tmp_path / "raw"])] == ["c0", "c1", "c2"]
    listed = find_images([tmp_path / "cases.json"])
    assert [image.patient for image in listed] == ["p0", "p1", "p2"]
    assert listed[0].labels().shape == listed[0].ct().shape
    prepared = find_images([tmp_path / "prepared"], "validation")
    assert [image.name for image in prepared] == ["c2"]
    assert prepared[0].labels().same_grid(prepared[0].ct())
    assert len(find_images([tmp_path / "prepared"])) == 3


def test_grey_values_are_no_ct(tmp_path) -> None:
    write_volume(tmp_path / "grey.nii.gz", ct().with_array(np.abs(ct().array) // 4))
    with pytest.raises(MaisiError, match="grey values"):
        find_images([tmp_path])[0].ct()


def test_what_holds_no_images(tmp_path) -> None:
    with pytest.raises(MaisiError, match="holds no CT"):
        find_images([tmp_path])
    with pytest.raises(MaisiError, match="neither a folder"):
        find_images([tmp_path / "absent"])
