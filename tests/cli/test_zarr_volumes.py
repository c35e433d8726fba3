"""Zarr where commands take and make volumes: the same as with NIfTI."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from maisi import cli
from maisi.data.latents import load_latent
from maisi.data.manifest import read_cases
from maisi.data.phantom import phantom
from maisi.io.nifti import read_label_names, read_volume, write_volume

pytest.importorskip("zarr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A phantom as NIfTI and as Zarr."""
    folder = tmp_path_factory.mktemp("zarr")
    image, labels = phantom((36, 26, 24), (12.0, 12.0, 12.0), ("chest", "abdomen"), seed=1)
    for ending in ("nii.gz", "zarr"):
        write_volume(folder / f"image.{ending}", image)
        write_volume(folder / f"labels.{ending}", labels)
    return folder


def run(*arguments: object) -> int:
    return cli.run([*map(str, arguments)])


def test_encode_and_decode(folder, tmp_path, model_folder) -> None:
    coder = ("--autoencoder", model_folder / "autoencoder.safetensors", "--device", "cpu", "--precision", "fp32")
    for ending in ("nii.gz", "zarr"):
        assert run("encode", folder / f"image.{ending}", "-o", tmp_path / f"{ending}.safetensors", *coder) == 0
    latents = [load_latent(tmp_path / f"{ending}.safetensors") for ending in ("nii.gz", "zarr")]
    np.testing.assert_array_equal(latents[0].mean, latents[1].mean)
    assert run("decode", tmp_path / "zarr.safetensors", "-o", tmp_path / "a.ome.zarr", *coder) == 0
    assert run("decode", tmp_path / "zarr.safetensors", "-o", tmp_path / "a.nii.gz", *coder) == 0
    np.testing.assert_array_equal(read_volume(tmp_path / "a.ome.zarr").array, read_volume(tmp_path / "a.nii.gz").array)
    assert run("decode", tmp_path / "zarr.safetensors", "-o", tmp_path / "a.ome.zarr", *coder) == 2


def test_quality_and_segment(folder, tmp_path, capsys) -> None:
    codes, told = [], []
    for ending in ("nii.gz", "zarr"):
        codes.append(run("quality", "--json", folder / f"image.{ending}", folder / f"labels.{ending}"))
        told.append(json.loads(capsys.readouterr().out))
    assert codes[0] == codes[1] in (0, 1)
    assert told[0] == told[1]
    assert run("segment", folder / "image.zarr", "-o", tmp_path / "rules.zarr") == 0
    assert run("segment", folder / "image.nii.gz", "-o", tmp_path / "rules.nii.gz") == 0
    np.testing.assert_array_equal(
        read_volume(tmp_path / "rules.zarr").array, read_volume(tmp_path / "rules.nii.gz").array
    )
    assert read_label_names(tmp_path / "rules.zarr") == read_label_names(tmp_path / "rules.nii.gz") != {}


def test_prepare_a_list_of_zarrs(folder, tmp_path) -> None:
    made = []
    for ending in ("nii.gz", "zarr"):
        row = {"id": "a", "patient": "a", "image": f"image.{ending}", "labels": f"labels.{ending}"}
        cases = folder / f"{ending}.json"
        cases.write_text(json.dumps({"version": 1, "cases": [row]}))
        assert read_cases(cases).cases[0].image == folder / f"image.{ending}"
        assert run("prepare", cases, "-o", tmp_path / ending) == 0
        made.append({p.name: p.read_bytes() for p in (tmp_path / ending).rglob("*.npy")})
    assert made[0] == made[1] != {}


def test_generate_follows_a_mask_in_zarr(tmp_path, chest_labels, model_folder) -> None:
    write_volume(tmp_path / "mask.zarr", chest_labels)
    wishes = ("generate", "--model", model_folder, "--mask", tmp_path / "mask.zarr", "--retries", 0)
    assert run(*wishes, "--device", "cpu", "-o", tmp_path / "out") == 0
    np.testing.assert_array_equal(read_volume(tmp_path / "out" / "0000" / "labels.nii.gz").array, chest_labels.array)
    assert run(*wishes, "--device", "cpu", "-o", tmp_path / "out") == 0  # goes on with the folder: the same mask


def test_without_the_package_it_is_said_before_any_work(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    for arguments in (
        ("segment", folder / "image.zarr", "-o", tmp_path / "a.nii.gz"),
        ("decode", tmp_path / "absent.safetensors", "-o", tmp_path / "a.zarr"),
    ):
        assert run(*arguments) == 2
        assert "pip install 'maisi[zarr]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
