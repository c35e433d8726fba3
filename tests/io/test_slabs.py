"""Slabs written = the volume written, rows read = the volume read; a full disk leaves a sentence and nothing else."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maisi.errors import MaisiError
from maisi.io import slabs
from maisi.io.nifti import opened_rows, read_volume, write_slabs, write_volume
from maisi.io.slabs import Slabs, Spool, regrouped
from maisi.volume import Volume

resource = pytest.importorskip("resource")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses to write more to a file: EFBIG, from the real system call."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def cut(array: np.ndarray, axis: int, parts: int) -> list[np.ndarray]:
    return np.array_split(array, min(parts, array.shape[axis]), axis)


def noise(shape: tuple[int, ...], dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def slabs_of(array: np.ndarray, axis: int, parts: int) -> Slabs:
    return Slabs(array.shape, np.eye(4), array.dtype, axis, iter(cut(array, axis, parts)))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, 90)] * 3),
    axis=st.integers(0, 2),
    parts=st.integers(1, 12),
    ending=st.sampled_from([".nii", ".nii.gz", ".nrrd"]),
    dtype=st.sampled_from(["int16", "uint8"]),
    fortran=st.booleans(),
)
def test_slabs_give_the_same_bytes_as_the_volume(tmp_path, shape, axis, parts, ending, dtype, fortran) -> None:
    array = np.asarray(noise(shape, dtype), order="F" if fortran else "C")
    whole, cut_up = tmp_path / f"whole{ending}", tmp_path / f"slabs{ending}"
    write_volume(whole, Volume(array, np.eye(4)))
    write_slabs(cut_up, slabs_of(array, axis, parts))
    assert whole.read_bytes() == cut_up.read_bytes()
    assert not list(tmp_path.glob("*.part-*"))
    np.testing.assert_array_equal(read_volume(cut_up).array, array)


@pytest.mark.parametrize("axis", [0, 2])
def test_slabs_that_do_not_make_up_the_shape_leave_nothing(tmp_path, axis) -> None:
    array = noise((5, 6, 7))
    short = Slabs((5, 6, 7), np.eye(4), array.dtype, axis, iter(cut(array, axis, 3)[:-1]))
    with pytest.raises(ValueError, match="do not make up"):
        write_slabs(tmp_path / "a.nii", short)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("axis", [0, 2], ids=["through a spool", "appended"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd"])
def test_a_disk_that_fills_while_streaming(tmp_path, axis, ending) -> None:
    path = tmp_path / f"a{ending}"
    with files_up_to(30_000), pytest.raises(MaisiError, match=r"Cannot write .*; choose a disk"):
        write_slabs(path, slabs_of(noise((40, 40, 40)), axis, 4))
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1.5, 2.0])] * 3),
    axis=st.integers(0, 2),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    dtype=st.sampled_from(["<i2", ">i2", "u1", "<f4", "<f8"]),
    slope=st.sampled_from([1.0, 2.5]),
    ending=st.sampled_from([".nii", ".nii.gz"]),
)
def test_rows_are_those_of_the_volume_in_ras(tmp_path, shape, order, signs, axis, ends, dtype, slope, ending) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.diag(signs)[:, order]
    affine[:3, 3] = (3, -4, 5)
    image = nibabel.Nifti1Image(noise(shape, dtype), affine)
    image.header.set_data_dtype(np.dtype(dtype))
    image.header.set_slope_inter(slope, 7.0 if slope != 1.0 else 0.0)
    path = tmp_path / f"a{ending}"
    nibabel.save(image, path)
    whole = read_volume(path).to_ras()
    with opened_rows(path) as source:
        assert source.shape == whole.shape
        np.testing.assert_array_equal(source.affine, whole.affine)
        start, stop = sorted(int(end * whole.shape[axis]) for end in ends)
        stop = max(stop, start + 1)
        start, stop = min(start, whole.shape[axis] - 1), min(stop, whole.shape[axis])
        rows = source.rows(axis, start, stop)
    assert rows.dtype == whole.array.dtype
    np.testing.assert_array_equal(rows, np.take(whole.array, range(start, stop), axis))


def test_rows_of_large_planes_and_of_nrrd(tmp_path, monkeypatch) -> None:
    """Several reads for one answer; and the other format, whose offset is one of the packed file."""
    monkeypatch.setattr(slabs, "PLANES_BYTES", 1000)
    array = noise((20, 30, 17))
    for ending in (".nrrd", ".nii"):
        write_volume(tmp_path / f"a{ending}", Volume(array, np.diag([-1.0, 2, 3, 1])))
        with opened_rows(tmp_path / f"a{ending}") as source:
            for axis in range(3):
                np.testing.assert_array_equal(source.rows(axis, 2, 11), np.take(array[::-1], range(2, 11), axis))


def test_what_is_wrong_with_a_file_is_told_before_its_rows(tmp_path) -> None:
    path = tmp_path / "a.nii.gz"
    write_volume(path, Volume(noise((20, 20, 20)), np.eye(4)))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(MaisiError, match="cut short or damaged"), opened_rows(path):
        pass
    holed = noise((6, 6, 6), "float32")
    holed[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(holed, np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(MaisiError, match="1 of its voxels are not finite"), opened_rows(tmp_path / "b.nii"):
        pass
    with pytest.raises(MaisiError, match="Cannot read"), opened_rows(tmp_path / "absent.nii"):
        pass


def test_no_place_for_what_is_decompressed(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.nii.gz"
    write_volume(path, Volume(noise((40, 40, 40)), np.eye(4)))
    assert len(gzip.decompress(path.read_bytes())) > 100_000
    folder = tmp_path / "waiting"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with files_up_to(50_000), pytest.raises(MaisiError, match=r"Cannot write .*waiting"), opened_rows(path):
        pass
    assert list(folder.iterdir()) == []


def test_a_spool_gives_back_what_it_was_given(tmp_path) -> None:
    with Spool(tmp_path) as spool:
        given = [noise((3, 4, n)).astype(dtype) for n, dtype in ((5, "i2"), (9, "u1"), (2, "i2"))]
        for array in given:
            spool.add(array)
            np.testing.assert_array_equal(spool.planes(0, 1, 4), given[0][:, :, 1:4])
        for number, array in enumerate(given):
            np.testing.assert_array_equal(spool.planes(number, 0, array.shape[2]), array)
        assert list(tmp_path.iterdir()) == [], "the file has a name"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(axis=st.integers(0, 2), given_=st.lists(st.integers(1, 5), min_size=1, max_size=6), data=st.data())
def test_rows_come_regrouped(axis, given_, data) -> None:
    total = sum(given_)
    wanted = []
    while sum(wanted) < total:
        wanted.append(data.draw(st.integers(1, total - sum(wanted))))
    array = noise([total if a == axis else 3 for a in range(3)])
    blocks = [b.copy() for b in regrouped(iter(np.split(array, np.cumsum(given_)[:-1], axis)), axis, wanted)]
    assert [b.shape[axis] for b in blocks] == wanted
    np.testing.assert_array_equal(np.concatenate(blocks, axis), array)
