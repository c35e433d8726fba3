"""A series of DICOM sent as a zip becomes a volume, and nothing else of it stays."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maisi.errors import MaisiError
from maisi.io.nifti import read_volume
from maisi.service.uploads import MOST_FILES, volume_of_zip

pytest.importorskip("highdicom")
from dicom_files import PATIENT, datasets, save

AFFINE = np.array([[-1.5, 0, 0, 30], [0, -1.5, 0, 20], [0, 0, 4, -100], [0, 0, 0, 1.0]])
MOST = 10_000_000


@pytest.fixture
def series(tmp_path: Path) -> tuple[Path, np.ndarray]:
    stored = np.random.default_rng(1).integers(0, 2000, (12, 10, 6)).astype(np.uint16)
    slices = datasets(stored, AFFINE)
    for slice_ in slices:
        slice_.RescaleIntercept = -1024
    return save(tmp_path / "series", slices), stored.astype(int) - 1024


def zip_of(folder: Path, archive: Path, name: Callable[[Path], str] = lambda path: path.name) -> Path:
    archive.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted(folder.iterdir()):
            zipped.write(path, name(path))
    return archive


def test_the_volume_is_the_series(series: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, hu = series
    archive = zip_of(folder, tmp_path / "sent" / "ct.zip", lambda path: f"../../{path.name}/../a/{path.name}")
    volume_of_zip(archive, tmp_path / "sent" / "ct.nii.gz", "ct.zip", MOST)
    volume = read_volume(tmp_path / "sent" / "ct.nii.gz")
    assert (volume.array == hu).all()
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert os.listdir(tmp_path / "sent") == ["ct.nii.gz"]
    assert PATIENT.encode() not in (tmp_path / "sent" / "ct.nii.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sent", "series"]


def test_what_lies_beside_the_series_does_no_harm(series: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, hu = series
    (folder / "._00000").write_bytes(b"\0\5\x16\7")
    (folder / "readme.txt").write_text("from the archive")
    archive = zip_of(folder, tmp_path / "sent" / "ct.zip")
    volume_of_zip(archive, tmp_path / "sent" / "ct.nii.gz", "ct.zip", MOST)
    assert (read_volume(tmp_path / "sent" / "ct.nii.gz").array == hu).all()


def spoilt(archive: Path, spoil: Callable[[bytearray], None]) -> None:
    content = bytearray(archive.read_bytes())
    spoil(content)
    archive.write_bytes(bytes(content))


def encrypted(content: bytearray) -> None:
    at = content.find(b"PK\x01\x02")
    content[at + 8] |= 1


def smaller_than_told(content: bytearray) -> None:
    at = content.find(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 10)


def flipped(content: bytearray) -> None:
    content[200] ^= 255


def cut(content: bytearray) -> None:
    del content[-100:]


@pytest.mark.parametrize("spoil", [encrypted, smaller_than_told, flipped, cut])
def test_a_bad_zip_is_one_sentence(
    series: tuple[Path, np.ndarray], tmp_path: Path, spoil: Callable[[bytearray], None]
) -> None:
    archive = zip_of(series[0], tmp_path / "sent" / "ct.zip")
    spoilt(archive, spoil)
    with pytest.raises(MaisiError, match=r"'ct.zip' is no zip, or is damaged or encrypted"):
        volume_of_zip(archive, tmp_path / "sent" / "ct.nii.gz", "ct.zip", MOST)
    assert os.listdir(tmp_path / "sent") == ["ct.zip"]


def test_what_is_too_much_is_not_unpacked(series: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    archive = zip_of(series[0], tmp_path / "sent" / "ct.zip")
    with pytest.raises(MaisiError, match=r"unpacks to more than 0\.0 GB"):
        volume_of_zip(archive, tmp_path / "sent" / "ct.nii.gz", "ct.zip", 1000)
    with zipfile.ZipFile(archive, "w") as zipped:
        for number in range(MOST_FILES + 1):
            zipped.writestr(str(number), b"")
    with pytest.raises(MaisiError, match=f"has {MOST_FILES + 1} files"):
        volume_of_zip(archive, tmp_path / "sent" / "ct.nii.gz", "ct.zip", MOST)


def test_without_one_series_it_says_so_of_the_zip(series: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("nothing")
    archive = zip_of(tmp_path / "text", tmp_path / "sent" / "ct.zip")
    with pytest.raises(MaisiError, match=r"'ct.zip'") as none:
        volume_of_zip(archive, tmp_path / "sent" / "ct.nii.gz", "ct.zip", MOST)
    save(series[0] / "more", datasets(np.zeros((4, 4, 3), np.uint16), AFFINE, series="1.2.7"))
    for path in (series[0] / "more").iterdir():
        path.rename(series[0] / f"more-{path.name}")
    (series[0] / "more").rmdir()
    archive = zip_of(series[0], archive)
    with pytest.raises(MaisiError, match=r"'ct.zip' .*2 series") as two:
        volume_of_zip(archive, tmp_path / "sent" / "ct.nii.gz", "ct.zip", MOST)
    assert str(tmp_path) not in str(none.value) + str(two.value)


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_damage_is_told_however_it_is_packed(series: tuple[Path, np.ndarray], tmp_path: Path, how: int) -> None:
    (tmp_path / "sent").mkdir()
    archive = tmp_path / "sent" / "ct.zip"
    with zipfile.ZipFile(archive, "w", how) as zipped:
        for path in sorted(series[0].iterdir()):
            zipped.write(path, path.name)
    for place in (60, 90, 150, 300):
        damaged = bytearray(archive.read_bytes())
        damaged[place] ^= 255
        (tmp_path / "sent" / "bad.zip").write_bytes(bytes(damaged))
        with pytest.raises(MaisiError, match=r"'bad\.zip' is no zip"):
            volume_of_zip(tmp_path / "sent" / "bad.zip", tmp_path / "sent" / "ct.nii.gz", "bad.zip", MOST)


def test_a_name_that_is_no_text_is_told(series: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    archive = zip_of(series[0], tmp_path / "sent" / "ct.zip", lambda path: f"{path.name}\u00e9")
    spoilt(archive, lambda content: content.__setitem__(slice(None), content.replace("\u00e9".encode(), b"\xff\xff")))
    with pytest.raises(MaisiError, match=r"'ct\.zip' is no zip"):
        volume_of_zip(archive, tmp_path / "sent" / "ct.nii.gz", "ct.zip", MOST)
