import gzip

import nrrd
import numpy as np
import pytest

from maisi.errors import MaisiError
from maisi.io.nifti import read_header, read_labels, read_volume, write_volume

LPS = np.diag([-1.0, -1.0, 1.0])


def fields(volume, space="left-posterior-superior", signs=LPS, **more):
    return {
        "space": space,
        "space directions": (signs @ volume.affine[:3, :3]).T,
        "space origin": signs @ volume.affine[:3, 3],
        **more,
    }


@pytest.mark.parametrize("encoding", ["gzip", "raw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_pynrrd_writes_what_is_read(tmp_path, oblique, encoding, dtype):
    path = str(tmp_path / "a.nrrd")
    array = np.abs(oblique.array % 200).astype(dtype)
    nrrd.write(path, array, fields(oblique, encoding=encoding))
    volume = read_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume.array, array)
    assert volume.array.dtype == dtype
    assert volume.same_grid(oblique)
    assert read_labels(tmp_path / "a.nrrd").array.dtype == np.uint8


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", LPS),
        ("LPS", LPS),
        ("right-anterior-superior", np.eye(3)),
        ("RAS", np.eye(3)),
        ("left-anterior-superior", np.diag([-1.0, 1.0, 1.0])),
    ],
)
def test_spaces(tmp_path, oblique, space, signs):
    nrrd.write(str(tmp_path / "a.nrrd"), oblique.array, fields(oblique, space, signs))
    assert read_volume(tmp_path / "a.nrrd").same_grid(oblique)


def test_pynrrd_reads_what_is_written(tmp_path, oblique):
    write_volume(tmp_path / "a.nrrd", oblique)
    array, header = nrrd.read(str(tmp_path / "a.nrrd"))
    np.testing.assert_array_equal(array, oblique.array)
    assert header["space"] == "left-posterior-superior"
    np.testing.assert_allclose(header["space directions"], (LPS @ oblique.affine[:3, :3]).T)
    np.testing.assert_allclose(header["space origin"], LPS @ oblique.affine[:3, 3])
    assert header["synthetic"] == "true"


def test_nrrd_and_nifti_agree(tmp_path, oblique):
    for name in ("a.nrrd", "a.nii.gz"):
        write_volume(tmp_path / name, oblique)
    one, two = (read_volume(tmp_path / name) for name in ("a.nrrd", "a.nii.gz"))
    np.testing.assert_array_equal(one.array, two.array)
    assert one.same_grid(two)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"NRRD0005", b"NOPE0005", "is not an NRRD file"),
        (b"type: int16", b"type: block", "voxels of type 'block'"),
        (b"dimension: 3", b"dimension: 4", "damaged NRRD header|has 3 axes"),
        (b"sizes: 5 6 7", b"sizes: 0 6 7", "an axis has no voxels"),
        (b"sizes: 5 6 7", b"sizes: 5 6 x", "damaged NRRD header"),
        (b"sizes: 5 6 7", b"sizes: 5 6", "has 2 axes"),
        (b"sizes: 5 6 7", b"sizes: 5 6 8", "cut short"),
        (b"sizes: 5 6 7", b"sizes: 90000 90000 90000", r"asks for 90000 x 90000 x 90000 .* over the"),
        (b"space: left-posterior-superior", b"space: scanner-xyz", r"place in the patient is unknown"),
        (b"space: left-posterior-superior\n", b"", r"place in the patient is unknown"),
        (b"encoding: gzip", b"encoding: bzip2", "save it as one .nrrd file"),
        (b"encoding: gzip", b"encoding: gzip\ndata file: /etc/passwd", "save it as one .nrrd file"),
        (b"encoding: gzip", b"encoding: gzip\nbyte skip: 5", "save it as one .nrrd file"),
        (b"space origin: (", b"space origin: (nan,", "damaged|not those of a 3D volume|not a finite"),
    ],
)
def test_damaged_headers(tmp_path, oblique, old, new, message):
    path = tmp_path / "a.nrrd"
    write_volume(path, oblique)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(MaisiError, match=message):
        read_volume(path)


def test_no_finite_place(tmp_path, oblique):
    path = tmp_path / "a.nrrd"
    write_volume(path, oblique)
    lines = path.read_bytes().split(b"\n")
    place = next(i for i, line in enumerate(lines) if line.startswith(b"space origin"))
    lines[place] = b"space origin: (nan,0,0)"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(MaisiError, match=r"a.nrrd: The affine is not a finite"):
        read_header(path)


def test_four_axes(tmp_path):
    nrrd.write(str(tmp_path / "a.nrrd"), np.zeros((2, 3, 4, 5), np.int16))
    with pytest.raises(MaisiError, match=r"has 4 axes \(sizes \[2, 3, 4, 5\]\); save one 3D volume"):
        read_header(tmp_path / "a.nrrd")


def test_cut_and_damaged_voxels(tmp_path, oblique):
    path = tmp_path / "a.nrrd"
    write_volume(path, oblique)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(MaisiError, match="cut short or damaged"):
        read_volume(path)
    path.write_bytes(data[: data.index(b"\n\n") + 2])
    with pytest.raises(MaisiError, match="no voxels behind its header"):
        read_volume(path)


def test_a_header_without_end(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0005\n" + b"# " + b"a" * (3 << 20))
    with pytest.raises(MaisiError, match="no voxels behind its header"):
        read_volume(tmp_path / "a.nrrd")


def test_voxels_beyond_the_header_are_not_read(tmp_path, oblique):
    path = tmp_path / "a.nrrd"
    write_volume(path, oblique)
    head, packed = path.read_bytes().split(b"\n\n", 1)
    path.write_bytes(head + b"\n\n" + gzip.compress(gzip.decompress(packed) + bytes(50_000_000), 1))
    np.testing.assert_array_equal(read_volume(path, budget_bytes=10_000).array, oblique.array)
