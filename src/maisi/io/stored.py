"""A volume as a file holds it: the header, checked before the voxels are read. Knows no file format."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from maisi.errors import MaisiError
from maisi.volume import checked_affine

DEFLATE_LIMIT = 1032
"""No deflate stream grows by more than this factor, so a header that asks for more is lying."""

GZIP_LEVEL = 3
"""The noise of CT hardly compresses: higher levels take twice as long and save a few per cent."""

_CHUNK = 1 << 22
_PIECE = 1 << 16
_MOST_AFTER = 1 << 30
_SLAB = 32


class ByteStream(Protocol):
    """What voxels are read from: a file or a decompressor."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, and b'' at the end."""
        ...


@dataclass(frozen=True)
class StoredHeader:
    """What a file says of the volume in it.

    Attributes:
        path: the file, or the folder of a Zarr.
        shape: voxels along X, Y, Z, in the file's own orientation; in a file the first axis runs fastest.
        dtype: type of the stored voxels, with byte order; integers or reals of at most 8 bytes.
        affine: float64 (4, 4), voxel indices to mm, RAS+.
        offset: bytes before the first voxel (NIfTI: of the decompressed stream; NRRD: of the file; Zarr: 0).
        compressed: whether the voxels are compressed.
        slope: factor on the stored values.
        intercept: added to the stored values times `slope`.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    affine: NDArray[np.float64]
    offset: int
    compressed: bool
    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        """Check what every format has in common.

        Raises:
            MaisiError: empty axes, voxels that are not single numbers, an affine that is not finite or singular.
        """
        if min(self.shape) < 1:
            raise MaisiError(f"{self.path}: an axis has no voxels (shape {self.shape}); the file is damaged.")
        if self.dtype.kind not in "iuf" or self.dtype.itemsize > 8:
            raise MaisiError(
                f"{self.path}: its voxels are {self.dtype}, not single numbers (colours or complex?); "
                "save it as integers or reals."
            )
        try:
            checked_affine(self.affine)
        except MaisiError as error:
            raise MaisiError(f"{self.path}: {error}") from None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the voxels, decompressed."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def scaled(self) -> bool:
        """Whether the values differ from the stored ones by slope or intercept."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """Type of the array that reading gives: the stored one in native byte order, reals where scaled."""
        if not self.scaled:
            return self.dtype.newbyteorder("=")
        return np.dtype(np.float64 if self.dtype.itemsize > 2 and self.dtype != np.float32 else np.float32)

    @property
    def needed_bytes(self) -> int:
        """Memory that reading needs: the array, and the stored voxels beside it where these are scaled."""
        values = math.prod(self.shape) * self.value_dtype.itemsize
        return values + (self.stored_bytes if self.scaled else 0)

    def check_memory(self, budget_bytes: int | None = None) -> None:
        """Compare what the header asks for with the memory allowed.

        Args:
            budget_bytes: memory that the volume may take; None allows half of what is free now.

        Raises:
            MaisiError: the voxels need more than that.
        """
        allowed = psutil.virtual_memory().available // 2 if budget_bytes is None else budget_bytes
        if self.needed_bytes > allowed:
            x, y, z = self.shape
            raise MaisiError(
                f"{self.path}: its header asks for {x} x {y} x {z} voxels of {self.dtype.name}, "
                f"{_gigabytes(self.needed_bytes)}, over the {_gigabytes(allowed)} allowed; make it smaller."
            )

    def check_size(self, budget_bytes: int | None = None) -> None:
        """Compare what the header asks for with the file's length, too.

        Raises:
            MaisiError: as `check_memory`, or the file is too short to hold the voxels.
        """
        self.check_memory(budget_bytes)
        length = self.path.stat().st_size
        holds = length * DEFLATE_LIMIT if self.compressed else length - self.offset
        if holds < self.stored_bytes:
            raise truncated(self.path)


def truncated(path: Path) -> MaisiError:
    """Return the error for a file that ends before its voxels do, or whose compression is damaged."""
    return MaisiError(f"{path} is cut short or damaged; copy or export it again.")


def read_voxels(stream: ByteStream, header: StoredHeader) -> NDArray[Any]:
    """Read the voxels that `header` promises, from a stream that stands at the first, and no more than those.

    Returns:
        (X, Y, Z) of `header.value_dtype`, in Fortran order.

    Raises:
        MaisiError: the stream ends early, is damaged, or holds values that are not finite.
    """
    buffer = np.empty(header.stored_bytes, dtype=np.uint8)
    _fill(buffer.data, stream, header.path)
    if header.compressed:
        _check_end(stream, header.path)
    array = converted(buffer.view(header.dtype).reshape(header.shape, order="F"), header)
    if array.dtype.kind == "f":
        require_finite(bad_values(array), header.path)
    return array


def write_all(file: IO[bytes], data: memoryview | bytes) -> None:
    """Write to an unbuffered file, which may take less at once than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def copy_voxels(stream: ByteStream, header: StoredHeader, file: IO[bytes]) -> None:
    """Decompress the voxels that `header` promises into an unbuffered file; nothing is held.

    Raises:
        MaisiError: the stream ends early or is damaged.
    """
    left = header.stored_bytes
    while left > 0:
        data = read_some(stream, min(left, _CHUNK), header.path)
        write_all(file, data)
        left -= len(data)
    _check_end(stream, header.path)


def converted(stored: NDArray[Any], header: StoredHeader) -> NDArray[Any]:
    """Stored voxels, all or some, as values: `header.value_dtype`, slope and intercept applied."""
    if not header.scaled:
        return stored.astype(header.value_dtype, copy=False)
    array = stored.astype(header.value_dtype)
    array *= header.slope
    array += header.intercept
    return array


def stored_bytes(array: NDArray[Any]) -> Iterator[memoryview]:
    """Yield the voxels as files hold them: little-endian, first axis fastest; a plane along Z at a time.

    Planes are laid out some at a time: so no second copy of a large volume is made, and an array whose last axis is the
    fastest is not read voxel by voxel from all over the memory. That each plane comes alone makes the bytes of a
    compressed file those of the volume, however it was cut before.
    """
    little = array.dtype.newbyteorder("<")
    plane = array.shape[0] * array.shape[1] * array.dtype.itemsize
    for z in range(0, array.shape[2], _SLAB):
        data = memoryview(array[:, :, z : z + _SLAB].astype(little, copy=False).tobytes(order="F"))
        for start in range(0, len(data), plane):
            yield data[start : start + plane]


def skip(stream: ByteStream, count: int, path: Path) -> None:
    """Read `count` bytes and forget them.

    Raises:
        MaisiError: the stream ends earlier.
    """
    while count > 0:
        count -= len(read_some(stream, min(count, _CHUNK), path))


def read_some(stream: ByteStream, size: int, path: Path) -> bytes:
    """Read 1 to `size` bytes; the end of the stream, or damaged compression, is a MaisiError."""
    try:
        data = stream.read(size)
    except (EOFError, zlib.error, OSError) as error:
        raise truncated(path) from error
    if not data:
        raise truncated(path)
    return data


def _fill(target: memoryview, stream: ByteStream, path: Path) -> None:
    position = 0
    while position < len(target):
        data = read_some(stream, min(len(target) - position, _CHUNK), path)
        target[position : position + len(data)] = data
        position += len(data)


def _check_end(stream: ByteStream, path: Path) -> None:
    """Read to the end, where a gzip stream compares its checksum; a damaged one may go on after the voxels."""
    left = _MOST_AFTER
    try:
        while data := stream.read(_PIECE):
            left -= len(data)
            if left < 0:
                raise MaisiError(f"{path} goes on for over {_gigabytes(_MOST_AFTER)} after its voxels; write it anew.")
    except (EOFError, zlib.error, OSError) as error:
        raise truncated(path) from error


def bad_values(array: NDArray[Any]) -> int:
    """Count what is NaN or infinite."""
    return array.size - int(np.count_nonzero(np.isfinite(array)))


def require_finite(bad: int, path: Path) -> None:
    """Refuse a volume with `bad` values that are not finite.

    Raises:
        MaisiError: there are some.
    """
    if bad:
        raise MaisiError(f"{path}: {bad} of its voxels are not finite (NaN or infinity); replace them first.")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
