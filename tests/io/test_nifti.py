import errno
import gzip
import json
import os
import struct
import subprocess
import sys
import tracemalloc

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maisi.errors import MaisiError
from maisi.io import nifti
from maisi.io.nifti import SYNTHETIC, read_description, read_header, read_labels, read_volume, write_volume
from maisi.volume import Volume

MAGIC = 344
DIM = 40
DATATYPE = 70
VOX_OFFSET = 108
SCL_SLOPE = 112
XYZT = 123
SFORM_CODE = 254
SROW_X = 280


@pytest.fixture
def plain(tmp_path, oblique):
    path = tmp_path / "plain.nii"
    write_volume(path, oblique)
    return path


def patch(path, position, form, *values):
    """Overwrite fields of an uncompressed file."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + form, data, position, *values)
    path.write_bytes(data)


@st.composite
def volumes(draw):
    dtype = draw(st.sampled_from([np.int16, np.uint8]))
    array = draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7)))
    matrix = draw(hnp.arrays(np.float64, (3, 3), elements=st.floats(-4, 4, width=32)))
    origin = draw(hnp.arrays(np.float64, 3, elements=st.floats(-1000, 1000, width=32)))
    affine = np.eye(4)
    affine[:3, :3] = matrix + np.diag([9.0, -9.0, 9.0])  # diagonally dominant, so never singular
    affine[:3, 3] = origin
    return Volume(array, affine)


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nrrd"])
@settings(derandomize=True, deadline=None, max_examples=20)
@given(volume=volumes())
def test_there_and_back(tmp_path_factory, ending, volume):
    path = tmp_path_factory.mktemp("io") / f"a.{ending}"
    write_volume(path, volume)
    again = read_volume(path)
    np.testing.assert_array_equal(again.array, volume.array)
    assert again.array.dtype == volume.array.dtype
    np.testing.assert_allclose(again.affine, volume.affine, rtol=1e-6, atol=1e-6)
    header = read_header(path)
    assert header.shape == volume.shape
    assert header.dtype == volume.array.dtype
    np.testing.assert_array_equal(header.affine, again.affine)


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nrrd"])
def test_same_volume_same_bytes(tmp_path, oblique, ending):
    contents = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.{ending}"
        write_volume(path, Volume(oblique.array.copy(order="F"), oblique.affine))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_nibabel_reads_what_is_written(tmp_path, oblique):
    path = tmp_path / "a.nii.gz"
    write_volume(path, oblique)
    image = nibabel.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), oblique.array)
    np.testing.assert_allclose(image.get_sform(), oblique.affine, atol=1e-4)
    np.testing.assert_allclose(image.get_qform(), oblique.affine, atol=1e-4)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.get_data_dtype() == np.int16
    assert image.header["descrip"].item().decode() == SYNTHETIC
    (comment,) = image.header.extensions
    assert comment.get_code() == 6
    assert json.loads(comment.get_content())["synthetic"] is True


def test_real_volumes_are_not_called_synthetic(tmp_path, oblique):
    path = tmp_path / "a.nii.gz"
    write_volume(path, oblique, synthetic=False, description="resampled")
    image = nibabel.load(path)
    assert image.header["descrip"].item().decode() == "resampled"
    assert json.loads(image.header.extensions[0].get_content())["synthetic"] is False
    write_volume(path, oblique, synthetic=False)
    assert b"synthetic CT" not in gzip.decompress(path.read_bytes())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nibabel_writes_what_is_read(tmp_path, oblique, dtype, image_class):
    path = tmp_path / "a.nii.gz"
    array = np.abs(oblique.array % 200).astype(dtype)
    nibabel.save(image_class(array, oblique.affine, dtype=dtype), path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, array)
    assert volume.array.dtype == dtype
    assert volume.same_grid(oblique)


def test_other_byte_order(tmp_path, oblique):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(oblique.array, oblique.affine, header)
    nibabel.save(image, tmp_path / "a.nii")
    assert read_header(tmp_path / "a.nii").dtype == np.dtype(">i2")
    volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.array, oblique.array)
    assert volume.array.dtype == np.dtype(np.int16)
    assert volume.same_grid(oblique)


def test_slope_and_intercept_are_applied(plain, oblique):
    patch(plain, SCL_SLOPE, "ff", 2.0, -1024.0)
    volume = read_volume(plain)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, oblique.array * 2.0 - 1024.0)
    assert read_header(plain).scaled


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_no_slope_means_none(plain, oblique, slope):
    patch(plain, SCL_SLOPE, "ff", slope, 5.0)
    np.testing.assert_array_equal(read_volume(plain).array, oblique.array)


def test_units_are_brought_to_mm(plain, oblique):
    patch(plain, XYZT, "B", 3)  # micrometres
    np.testing.assert_allclose(read_volume(plain).affine[:3], oblique.affine[:3] / 1000, rtol=1e-5)


def test_qform_serves_where_there_is_no_sform(plain, oblique):
    patch(plain, SFORM_CODE, "h", 0)
    np.testing.assert_allclose(read_volume(plain).affine, oblique.affine, atol=1e-3)


def test_single_trailing_axes_are_dropped(tmp_path, oblique):
    nibabel.save(nibabel.Nifti1Image(oblique.array[..., None, None], oblique.affine), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array, oblique.array)


def test_the_name_need_not_tell_of_gzip(tmp_path, oblique):
    write_volume(tmp_path / "a.nii.gz", oblique)
    (tmp_path / "a.nii.gz").rename(tmp_path / "b.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii").array, oblique.array)


def test_four_axes(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), np.int16), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(MaisiError, match=r"has shape \(2, 2, 2, 3\); save one 3D volume"):
        read_header(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("position", "form", "values", "message"),
    [
        (0, "i", (999,), "is not a NIfTI file"),
        (MAGIC, "4s", (b"ni1\0",), "wrong magic"),
        (MAGIC, "4s", (b"abcd",), "wrong magic"),
        (DIM, "h", (0,), "0 axes"),
        (DIM, "h", (-3,), "-3 axes"),
        (DIM, "h", (9,), "9 axes"),
        (DIM, "h", (2,), "save one 3D volume"),
        (DIM + 2, "h", (0,), r"an axis has no voxels \(shape \(0, 6, 7\)\)"),
        (DIM + 4, "h", (-6,), "an axis has no voxels"),
        (DATATYPE, "h", (128,), "not single numbers"),  # RGB
        (DATATYPE, "h", (32,), "not single numbers"),  # complex64
        (DATATYPE, "h", (1536,), "not single numbers"),  # float128
        (DATATYPE, "h", (1,), "not single numbers"),  # one bit a voxel
        (DATATYPE, "h", (12345,), "damaged NIfTI header"),
        (SROW_X, "f", (np.nan,), "affine is not a finite 4 x 4 matrix"),
        (SROW_X + 12, "f", (np.inf,), "plain.nii: The affine is not a finite"),
        (SROW_X, "12f", (0.0,) * 12, "singular"),
        (VOX_OFFSET, "f", (np.nan,), "damaged NIfTI header"),
        (VOX_OFFSET, "f", (1e12,), "damaged NIfTI header"),
        (VOX_OFFSET, "f", (-5.0,), "damaged NIfTI header"),
        (SCL_SLOPE, "ff", (2.0, np.inf), "damaged NIfTI header"),
        (XYZT, "B", (7,), "damaged NIfTI header"),
    ],
)
def test_damaged_headers(plain, position, form, values, message):
    patch(plain, position, form, *values)
    with pytest.raises(MaisiError, match=message):
        read_volume(plain)


def test_a_header_that_asks_for_too_much(plain):
    patch(plain, DIM + 2, "hhh", 30000, 30000, 30000)
    with pytest.raises(MaisiError, match=r"asks for 30000 x 30000 x 30000 voxels of int16, 54,000.0 GB, over the"):
        read_volume(plain)


def test_the_budget_counts_every_byte(plain, oblique):
    needed = oblique.array.nbytes
    assert read_volume(plain, budget_bytes=needed).shape == oblique.shape
    with pytest.raises(MaisiError, match=r"0.00042 MB, over the 0.000419 MB allowed"):
        read_volume(plain, budget_bytes=needed - 1)
    patch(plain, SCL_SLOPE, "ff", 2.0, 0.0)
    with pytest.raises(MaisiError, match="over the"):
        read_volume(plain, budget_bytes=needed * 3 - 1)  # stored voxels and float32 beside them
    assert read_volume(plain, budget_bytes=needed * 3).shape == oblique.shape


def test_a_bomb_takes_no_more_memory_than_its_header_says(tmp_path, oblique):
    write_volume(tmp_path / "small.nii", oblique)
    bomb = tmp_path / "bomb.nii.gz"
    bomb.write_bytes(gzip.compress((tmp_path / "small.nii").read_bytes() + bytes(200_000_000), 1))
    tracemalloc.start()
    try:
        volume = read_volume(bomb, budget_bytes=1_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(volume.array, oblique.array)
    assert peak < 5_000_000


def test_lies_about_size_are_seen_before_memory_is_taken(tmp_path, oblique):
    path = tmp_path / "a.nii"
    write_volume(path, oblique)
    patch(path, DIM + 2, "hhh", 500, 500, 500)
    packed = tmp_path / "a.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    tracemalloc.start()
    try:
        for lie in (path, packed):
            with pytest.raises(MaisiError, match="is cut short or damaged"):
                read_volume(lie, budget_bytes=10**9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("keep", [0, 1, 3, 100, 347, 349, -1])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_cut_files(tmp_path, oblique, ending, keep):
    path = tmp_path / f"a.{ending}"
    write_volume(path, oblique)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MaisiError, match=r"cut short|damaged"):
        read_volume(path)


def written(folder, volume):
    path = folder / "written.nii.gz"
    write_volume(path, volume)
    return path.read_bytes()


def test_damaged_compression(tmp_path, oblique):
    path = tmp_path / "a.nii.gz"
    write_volume(path, oblique)
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # in the checksum
    path.write_bytes(data)
    with pytest.raises(MaisiError, match="cut short or damaged"):
        read_volume(path)
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(MaisiError, match="cut short or damaged"):
        read_volume(path)


def test_damage_that_makes_the_stream_longer(tmp_path, oblique):
    content = gzip.decompress(written(tmp_path, oblique)) + bytes(5_000_000)
    packed = bytearray(gzip.compress(content, mtime=0))
    path = tmp_path / "long.nii.gz"
    path.write_bytes(packed)
    assert (read_volume(path).array == oblique.array).all()  # others' padding
    packed[-6] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(MaisiError, match="cut short or damaged"):
        read_volume(path)


def test_a_stream_that_goes_on_and_on(tmp_path, oblique, monkeypatch):
    monkeypatch.setattr("maisi.io.stored._MOST_AFTER", 1000)
    path = tmp_path / "long.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(written(tmp_path, oblique)) + bytes(2000)))
    with pytest.raises(MaisiError, match="after its voxels"):
        read_volume(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(tmp_path, bad):
    array = np.zeros((3, 3, 3), np.float32)
    array[1, 1, 1:] = bad
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(MaisiError, match="2 of its voxels are not finite"):
        read_volume(tmp_path / "a.nii.gz")


def test_what_a_file_says_of_itself(tmp_path, oblique):
    for ending in ("nii", "nii.gz", "nrrd"):
        write_volume(tmp_path / f"a.{ending}", oblique, description="a phantom")
        assert read_description(tmp_path / f"a.{ending}") == ("" if ending == "nrrd" else "a phantom")
    (tmp_path / "b.nii").write_bytes(bytes(400))
    assert read_description(tmp_path / "b.nii") == ""


def test_no_file(tmp_path):
    with pytest.raises(MaisiError, match=r"Cannot read .*none.nii: No such file or directory; give the path"):
        read_header(tmp_path / "none.nii")
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(MaisiError, match="Is a directory"):
        read_volume(tmp_path / "folder.nii")
    with pytest.raises(MaisiError, match=r"use .nii.gz, .nii, .nrrd, .zarr, or a DICOM series"):
        read_volume(tmp_path / "a.mha")


def test_foreign_file(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(MaisiError, match="is not a NIfTI file"):
        read_volume(tmp_path / "a.nii")


def test_whole_reals_are_labels(tmp_path):
    array = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    labels = read_labels(tmp_path / "a.nii.gz")
    assert labels.array.dtype == np.uint8
    np.testing.assert_array_equal(labels.array, array)


def test_ids_beyond_a_byte_are_kept(tmp_path):
    array = np.full((2, 2, 2), 1000, np.int16)
    array[0] = -1
    write_volume(tmp_path / "a.nii.gz", Volume(array, np.eye(4)))
    labels = read_labels(tmp_path / "a.nii.gz")
    assert labels.array.dtype == np.int32
    np.testing.assert_array_equal(labels.array, array)


@pytest.mark.parametrize(("value", "message"), [(0.5, "holds fractions"), (1e12, "are no label ids")])
def test_no_labels(tmp_path, value, message):
    nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), value), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(MaisiError, match=message):
        read_labels(tmp_path / "a.nii.gz")


def test_reals_are_rounded_to_hu(tmp_path):
    array = np.array([-1000.4, -0.6, 0.4, 3071.5]).reshape(1, 2, 2)
    write_volume(tmp_path / "a.nii", Volume(array, np.eye(4)))
    again = read_volume(tmp_path / "a.nii").array
    assert again.dtype == np.int16
    np.testing.assert_array_equal(again.ravel(), [-1000, -1, 0, 3072])


def test_bool_is_stored_as_a_label(tmp_path):
    write_volume(tmp_path / "a.nii", Volume(np.ones((2, 2, 2), bool), np.eye(4)))
    assert read_header(tmp_path / "a.nii").dtype == np.uint8


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "not finite"), (1e6, "range of int16"), (-40000, "range of int16")]
)
def test_what_cannot_be_stored(tmp_path, value, message):
    with pytest.raises(MaisiError, match=message):
        write_volume(tmp_path / "a.nii", Volume(np.full((2, 2, 2), value), np.eye(4)))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path, oblique, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nifti, "_write_nifti", full)
    with pytest.raises(MaisiError, match=r"Cannot write .*a.nii.gz: No space left on device"):
        write_volume(tmp_path / "a.nii.gz", oblique)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_takes_no_more(tmp_path):
    """The system itself refuses to let the file grow, in a process of its own."""
    code = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from maisi.errors import MaisiError\n"
        "from maisi.io.nifti import write_volume\n"
        "from maisi.volume import Volume\n"
        "noise = np.random.default_rng(0).integers(-1000, 1000, (64, 64, 64)).astype(np.int16)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    write_volume(Path(sys.argv[1]), Volume(noise, np.eye(4)))\n"
        "except MaisiError as error:\n"
        "    print(error)\n"
    )
    for name in ("a.nii", "a.nii.gz", "a.nrrd"):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"Cannot write {tmp_path / name}: File too large; choose a disk")
    assert os.listdir(tmp_path) == []


@pytest.mark.realdata
def test_real_ct_as_nibabel_reads_it(real_data):
    path = real_data / "torso" / "lidc_0001_ct.nii.gz"
    image = nibabel.load(path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, np.asarray(image.dataobj))
    np.testing.assert_array_equal(volume.affine, image.affine)


def test_a_file_that_says_nowhere_how_it_lies_is_refused(tmp_path) -> None:
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([-1, 1, 1, 1.0]))
    image.header.set_sform(None, 0)
    image.header.set_qform(None, 0)
    for codes in ((0, 0), (1, 0), (0, 1)):
        image.header["sform_code"], image.header["qform_code"] = codes
        data = image.header.binaryblock + b"\0" * 4 + np.zeros((4, 5, 6), np.int16).tobytes()
        (tmp_path / "a.nii").write_bytes(data)
        if any(codes):
            read_volume(tmp_path / "a.nii")
        else:
            with pytest.raises(MaisiError, match="says nowhere how it lies in the patient"):
                read_volume(tmp_path / "a.nii")
