"""Series of DICOM where commands take a CT: the same as with NIfTI, and nothing of the patient in what is made."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from dicom_files import PATIENT, circle, datasets, rtstruct, save, seg
from pydicom import dcmread

from maisi import cli
from maisi.anatomy import label_name
from maisi.data.latents import load_latent
from maisi.data.phantom import phantom
from maisi.io.nifti import read_volume, write_volume


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A phantom as NIfTI and as DICOM."""
    folder = tmp_path_factory.mktemp("dicom")
    image, labels = phantom((36, 26, 24), (12.0, 12.0, 12.0), ("chest", "abdomen"), seed=1)
    write_volume(folder / "image.nii.gz", image)
    write_volume(folder / "labels.nii.gz", labels)
    save(folder / "series", datasets(image.array + 1024, image.affine, bits=12, RescaleIntercept=-1024))
    return folder


def run(*arguments: object) -> int:
    return cli.run([*map(str, arguments)])


def require_no_patient(folder: Path) -> None:
    files = [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        if file.name.endswith(".gz"):
            content = gzip.decompress(content)
        for secret in (PATIENT, "4711", "19000101"):
            if not file.name.endswith((".npy", ".png")) or secret == PATIENT:
                assert secret.encode() not in content, file


def test_encode(folder, tmp_path, model_folder) -> None:
    coder = ("--autoencoder", model_folder / "autoencoder.safetensors", "--device", "cpu", "--precision", "fp32")
    for name in ("image.nii.gz", "series"):
        assert run("encode", folder / name, "-o", tmp_path / f"{name}.safetensors", *coder) == 0
    one, two = (load_latent(tmp_path / f"{name}.safetensors") for name in ("image.nii.gz", "series"))
    np.testing.assert_array_equal(one.mean, two.mean)
    np.testing.assert_allclose(one.affine, two.affine, atol=1e-6)
    require_no_patient(tmp_path)


def test_a_tumour_painted_into_a_series(folder, tmp_path) -> None:
    for name in ("image.nii.gz", "series"):
        wishes = ("--labels", folder / "labels.nii.gz", "--tumor", "lung:60mm", "--by", "rules", "--retries", 0)
        assert run("inpaint", folder / name, *wishes, "-o", tmp_path / name) == 0
    one, two = (read_volume(tmp_path / name / "0000" / "image.nii.gz") for name in ("image.nii.gz", "series"))
    np.testing.assert_array_equal(one.array, two.array)
    require_no_patient(tmp_path)


def test_quality_and_segment(folder, tmp_path, capsys) -> None:
    told = []
    for name in ("image.nii.gz", "series"):
        run("quality", "--json", folder / name, folder / "labels.nii.gz")
        told.append(json.loads(capsys.readouterr().out))
        assert run("segment", folder / name, "-o", tmp_path / f"{name}.nii.gz") == 0
        capsys.readouterr()
    assert told[0] == told[1]
    one, two = (read_volume(tmp_path / f"{name}.nii.gz") for name in ("image.nii.gz", "series"))
    np.testing.assert_array_equal(one.array, two.array)


def test_prepare_a_list_of_series(folder, tmp_path) -> None:
    made = []
    for name in ("image.nii.gz", "series"):
        row = {"id": "a", "patient": "a", "image": name, "labels": "labels.nii.gz"}
        cases = folder / f"{name}.json"
        cases.write_text(json.dumps({"version": 1, "cases": [row]}))
        assert run("prepare", cases, "-o", tmp_path / name) == 0
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.npy")})
    assert made[0] == made[1] != {}
    require_no_patient(tmp_path)


def test_evaluate_a_folder_of_series(folder, tmp_path, model_folder) -> None:
    shorter = read_volume(folder / "series").array[:, :, :16] + 1024
    save(tmp_path / "patients" / "one", datasets(shorter, np.diag([12.0, 12, 12, 1]), RescaleIntercept=-1024))
    (tmp_path / "patients" / "notes").mkdir()
    coder = (
        "--autoencoder",
        model_folder / "autoencoder.safetensors",
        "--device",
        "cpu",
        "--lpips-features",
        "gradients",
    )
    for n, place in enumerate((folder / "series", tmp_path / "patients")):
        assert run("evaluate", "reconstruction", place, *coder, "-o", tmp_path / f"out-{n}") == 0
        rows = json.loads((tmp_path / f"out-{n}" / "result.json").read_text())["items"]
        assert [row["volume"] for row in rows] == [("series", "one")[n]]
    require_no_patient(tmp_path / "out-0")


def test_masks_of_a_series(folder, tmp_path, capsys) -> None:
    labels, ct = read_volume(folder / "labels.nii.gz"), folder / "series"
    slices = [dcmread(file) for file in ct.iterdir()]
    slices.sort(key=lambda slice_: float(slice_.ImagePositionPatient[2]))
    masks = {label_name(id): labels.array == id for id in (1, 3, 14)}
    path = seg(tmp_path / "seg.dcm", slices, masks)
    assert run("mask", "import", path, "--ct", ct, "--from", "maisi", "-o", tmp_path / "seg.nii.gz") == 0
    made = read_volume(tmp_path / "seg.nii.gz").array
    for id in (1, 3, 14):
        np.testing.assert_array_equal(made == id, labels.array == id)
    table = tmp_path / "table.json"
    words = {"Liver": 1, "Boost": {"id": 150, "name": "boost"}}
    table.write_text(json.dumps(words | {"dropped": {"Couch": "no anatomy"}}))
    drawn = {"Liver": 9, "Couch": 12, "Boost": 3}
    contours = {name: [circle((17, 12), r, z, labels.affine) for z in (9, 10, 11)] for name, r in drawn.items()}
    path = rtstruct(tmp_path / "drawn.dcm", contours)
    assert run("mask", "import", path, "--ct", ct, "--from", table, "-o", tmp_path / "drawn.nii.gz") == 0
    made = read_volume(tmp_path / "drawn.nii.gz").array
    assert {1, 150} <= set(np.unique(made)) <= {0, 1, 150, 200}
    assert ((made == 150).sum(), (made == 1).sum()) == pytest.approx((3 * np.pi * 9, 3 * np.pi * 72), rel=0.1)
    require_no_patient(tmp_path / "drawn.nii.gz")
    assert "another scan's space" not in capsys.readouterr().err
    other = dcmread(path)
    other.FrameOfReferenceUID = "1.2.99"
    other.save_as(tmp_path / "other.dcm")
    away = ("mask", "import", tmp_path / "other.dcm", "--ct", ct, "--from", table)
    assert run(*away, "-o", tmp_path / "other.nii.gz") == 0
    assert "another scan's space" in capsys.readouterr().err
    for vocabulary, message in (
        ("maisi", "drawn.dcm holds structures that maisi does not know ('Couch', 'Boost'); use --from TABLE.json"),
        (folder / "half.json", "half.json neither maps nor drops ('Couch'); name each there"),
    ):
        (folder / "half.json").write_text(json.dumps(words))
        assert run("mask", "import", path, "--ct", ct, "--from", vocabulary, "-o", tmp_path / "no.nii.gz") == 2
        said = capsys.readouterr().err
        assert message in said
        assert "Couch" in said
    assert run("generate", "--mask", path, "-o", tmp_path / "out") == 2
    assert "come in by `maisi mask import`" in capsys.readouterr().err


def test_a_folder_without_images(tmp_path, capsys) -> None:
    assert run("segment", tmp_path, "-o", tmp_path / "a.nii.gz") == 2
    assert "holds no DICOM images; give a folder with a series" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
