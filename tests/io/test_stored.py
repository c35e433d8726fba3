import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.errors import MaisiError
from maisi.io.stored import StoredHeader, read_voxels, skip, stored_bytes


def header(shape=(2, 3, 4), dtype="<i2", affine=None, **more):
    affine = np.eye(4) if affine is None else affine
    return StoredHeader(Path("a.nii"), shape, np.dtype(dtype), affine, 0, False, **more)


class Dripping(io.BytesIO):
    """A stream that gives a few bytes at a time, as sockets and decompressors may."""

    def read(self, size=-1, /):
        return super().read(min(size, 7))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(1, 70)] * 3), st.sampled_from(["<i2", ">i2", "u1", "<f4", ">f8"]), st.booleans())
def test_bytes_and_voxels_are_inverse(shape, dtype, fortran):
    array = np.arange(np.prod(shape)).reshape(shape, order="F" if fortran else "C") % 100
    array = array.astype(np.dtype(dtype).newbyteorder("="))
    data = b"".join(stored_bytes(array))
    assert data == array.astype(array.dtype.newbyteorder("<")).tobytes(order="F")
    again = read_voxels(io.BytesIO(data), header(shape, array.dtype.newbyteorder("<")))
    np.testing.assert_array_equal(again, array)
    swapped = array.astype(dtype).tobytes(order="F")
    np.testing.assert_array_equal(read_voxels(io.BytesIO(swapped), header(shape, dtype)), array)


def test_streams_may_drip():
    data = bytes(range(48))
    stream = Dripping(bytes(20) + data + b"more")
    skip(stream, 20, Path("a.nii"))
    assert read_voxels(stream, header()).tobytes(order="F") == data
    assert stream.tell() == 68
    with pytest.raises(MaisiError, match=r"a\.nii is cut short or damaged"):
        skip(stream, 5, Path("a.nii"))


@pytest.mark.parametrize(
    ("dtype", "slope", "expected", "needed"),
    [
        ("<i2", 1.0, "int16", 48),
        (">i4", 1.0, "int32", 96),
        ("<i2", 2.0, "float32", 48 + 96),
        ("u1", 0.5, "float32", 24 + 96),
        ("<f4", 2.0, "float32", 96 + 96),
        ("<i4", 2.0, "float64", 96 + 192),
        ("<f8", 2.0, "float64", 192 + 192),
    ],
)
def test_types_and_bytes(dtype, slope, expected, needed):
    stored = header(dtype=dtype, slope=slope)
    assert stored.value_dtype == np.dtype(expected)
    assert stored.needed_bytes == needed
    data = np.ones((2, 3, 4), dtype).tobytes()
    values = read_voxels(io.BytesIO(data), stored)
    assert values.dtype == np.dtype(expected)
    assert values.dtype.isnative
    assert (values == slope).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"shape": (2, 0, 4)}, "an axis has no voxels"),
        ({"dtype": "c8"}, "not single numbers"),
        ({"dtype": "V3"}, "not single numbers"),
        ({"affine": np.full((4, 4), np.nan)}, r"a\.nii: The affine is not a finite"),
        ({"affine": np.diag([1.0, 1, 0, 1])}, r"a\.nii: The affine is singular"),
    ],
)
def test_headers_are_checked_when_made(more, message):
    with pytest.raises(MaisiError, match=message):
        header(**more)
