"""Items as DICOM, read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from test_export import add_item

from maisi.cli import run
from maisi.errors import MaisiError
from maisi.generation.export_dicom import export_dicom
from maisi.io.dicom_structures import read_structures
from maisi.io.nifti import read_volume
from maisi.volume import Volume


@pytest.fixture
def generated(tmp_path: Path, chest_labels: Volume) -> Path:
    """A pair, and an item without a mask."""
    add_item(tmp_path / "my run", 0, chest_labels)
    add_item(tmp_path / "my run", 1, None)
    return tmp_path / "my run"


def test_there_and_back(generated: Path, tmp_path: Path, chest_labels: Volume) -> None:
    made = export_dicom([generated], tmp_path / "out")
    assert (made.cases, made.segmented, made.not_passed) == (("my-run-0000", "my-run-0001"), 1, 0)
    for number, case in enumerate(made.cases):
        wanted = read_volume(generated / f"{number:04d}" / "image.nii.gz").to_ras()
        ct = read_volume(tmp_path / "out" / case / "ct")
        np.testing.assert_array_equal(ct.to_ras().array, wanted.array)
        assert ct.to_ras().same_grid(wanted)
    ct = read_volume(tmp_path / "out" / made.cases[0] / "ct").to_ras()
    assert not (tmp_path / "out" / made.cases[1] / "segmentation.dcm").exists()
    found = read_structures(tmp_path / "out" / made.cases[0] / "segmentation.dcm", ct)
    held = [id for id in np.unique(chest_labels.array) if id]
    for number, id in enumerate(held, 1):
        np.testing.assert_array_equal(found.painted().array == number, chest_labels.to_ras().array == id)
    note = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (note["synthetic"], note["format"]) == (True, "dicom")


def test_the_command(generated: Path, tmp_path: Path, capsys) -> None:
    words = ["export", str(generated), "--to", "DICOM"]
    for name in ("a", "b"):
        assert run([*words, "-o", str(tmp_path / name), "--keep", "body"]) == 0
    assert f"{tmp_path / 'b'}: 2 series, 1 segmentations" in capsys.readouterr().out
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    segmentation = pydicom.dcmread(tmp_path / "a" / "my-run-0000" / "segmentation.dcm")
    assert [segment.SegmentLabel for segment in segmentation.SegmentSequence] == ["body"]
    capsys.readouterr()
    assert run([*words, "-o", str(tmp_path / "a")]) == 2
    assert "exists" in capsys.readouterr().err
    assert run(["export", str(generated), "--to", "dicomm", "-o", str(tmp_path / "c")]) == 2
    assert "choose from nnunet, msd, auto3dseg, monai, torchio, dicom" in capsys.readouterr().err


def test_the_segmentation_comes_in_as_a_mask(generated: Path, tmp_path: Path, chest_labels: Volume) -> None:
    export_dicom([generated / "0000"], tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*/segmentation.dcm")
    assert run(["mask", "import", str(path), "--from", "maisi", "-o", str(tmp_path / "mask.nii.gz")]) == 0
    mask, wanted = read_volume(tmp_path / "mask.nii.gz").to_ras(), chest_labels.to_ras()
    shift = np.rint(np.linalg.inv(wanted.affine) @ mask.affine)[:3, 3].astype(int)
    held = wanted.array[tuple(slice(a, a + n) for a, n in zip(shift, mask.shape, strict=True))]
    np.testing.assert_array_equal(np.where(held == 200, 0, held), np.where(mask.array == 200, 0, mask.array))
    assert np.count_nonzero(held) == np.count_nonzero(wanted.array)


def test_painted_cts_say_what_they_are(generated: Path, tmp_path: Path) -> None:
    path = generated / "0000" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"synthetic": False, "painted": True}))
    export_dicom([generated / "0000"], tmp_path / "out")
    (case,) = (tmp_path / "out").glob("*/ct")
    assert pydicom.dcmread(case / "0001.dcm").ImageComments.startswith("PARTLY SYNTHETIC")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["synthetic"] is False


def test_what_is_refused(generated: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(MaisiError, match="No mask holds 'spleen'; leave it out of --keep"):
        export_dicom([generated], out, keep=["spleen"])
    with pytest.raises(MaisiError, match="No label is named to be kept"):
        export_dicom([generated], out, keep=[])
    with pytest.raises(MaisiError, match="No mask holds 'body'"):
        export_dicom([generated / "0001"], out, keep=["body"])
    record = generated / "0000" / "record.json"
    kept = record.read_text()
    record.write_text(json.dumps(json.loads(kept) | {"contrast_as_usual": False, "contrast_hu": {"23": 40.0}}))
    assert export_dicom([generated], tmp_path / "all").not_passed == 1
    assert export_dicom([generated], tmp_path / "passed", passed=True).cases == ("my-run-0001",)
    with pytest.raises(MaisiError, match="None of the items passed its check"):
        export_dicom([generated / "0000"], out, passed=True)
    record.write_text(kept.replace('"created"', '"when"'))
    with pytest.raises(MaisiError, match=r"record.json is damaged"):
        export_dicom([generated], out)
    record.write_text(kept)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MaisiError, match=r"pip install 'maisi\[dicom\]'"):
        export_dicom([generated], out)
    add_item(tmp_path / "mr", 0, None, modality="mri")
    with pytest.raises(MaisiError, match="hold MRI; only CT is written as DICOM"):
        export_dicom([tmp_path / "mr"], out)
    assert not out.exists()
