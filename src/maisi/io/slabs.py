"""Volumes that are never whole in memory: written slab by slab, read a few rows at a time. Knows no file format.

A file holds its first axis fastest, so slabs along Z are simply appended. Those along another axis wait in an unnamed
file first, each in the file's own order, from which planes of all slabs are then joined: what is in memory is one slab,
or a few planes, whatever the axis. Formats that hold chunks have slabs `regrouped` to whole chunks, along any axis.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from maisi.errors import MaisiError
from maisi.io.files import writing
from maisi.io.stored import StoredHeader, bad_values, converted, require_finite, stored_bytes, write_all
from maisi.volume import turn_to_ras

Array = NDArray[Any]
Triple = tuple[int, int, int]

PLANES_BYTES = 1 << 23
"""Planes are read and joined so many bytes at a time (at least one plane)."""


@dataclass(frozen=True)
class Slabs:
    """A volume to write, in slabs that come in order.

    Attributes:
        shape: voxels along X, Y, Z.
        affine: see `Volume`.
        dtype: of the slabs.
        axis: 0, 1 or 2: the axis that is cut.
        slabs: arrays (X, Y, Z), as large as the volume but along the cut axis; iterated once.
    """

    shape: Triple
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    axis: int
    slabs: Iterable[Array]

    def stored_bytes(self, folder: Path) -> Iterator[memoryview]:
        """Yield the voxels as files hold them; a plane along Z at a time, whatever the slabs were.

        Args:
            folder: where slabs wait that are not along Z.

        Raises:
            ValueError: the slabs do not make up the shape.
        """
        for part in self.in_order() if self.axis == 2 else self._joined(folder):
            yield from stored_bytes(part)

    def in_order(self) -> Iterator[Array]:
        """Yield the slabs.

        Raises:
            ValueError: they do not make up the shape.
        """
        rows, wanted = 0, self.shape[self.axis]
        for slab in self.slabs:
            rows += slab.shape[self.axis]
            if rows > wanted:
                break
            yield slab
        if rows != wanted:
            raise ValueError(f"slabs with {rows} rows along axis {self.axis} do not make up {self.shape}")

    def _joined(self, folder: Path) -> Iterator[Array]:
        with Spool(folder) as spool:
            for slab in self.in_order():
                spool.add(slab)
            step = planes_in(self.shape, self.dtype)
            for z in range(0, self.shape[2], step):
                stop = min(z + step, self.shape[2])
                yield np.concatenate([spool.planes(n, z, stop) for n in range(len(spool.shapes))], self.axis)


def regrouped(slabs: Iterable[Array], axis: int, lengths: Sequence[int]) -> Iterator[Array]:
    """Yield the rows of slabs in blocks of other lengths, each of which is overwritten by the next."""
    wanted = iter(lengths)
    buffer, length, filled = np.empty(0), 0, 0
    for slab in slabs:
        rows = np.moveaxis(slab, axis, 0)
        while len(rows):
            if not length:
                length, filled = next(wanted), 0
                if not buffer.size:
                    buffer = np.empty((max(lengths), *rows.shape[1:]), rows.dtype)
            taken = rows[: length - filled]
            buffer[filled : filled + len(taken)] = taken
            filled, rows = filled + len(taken), rows[len(taken) :]
            if filled == length:
                yield np.moveaxis(buffer[:length], 0, axis)
                length = 0


class Spool:
    """Arrays that wait in an unnamed file, which goes with the process whatever happens; a context.

    Attributes:
        shapes: of the arrays, in the order in which they came.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.shapes = folder, list[Triple]()
        self._offsets, self._dtypes = list[int](), list[np.dtype[Any]]()
        with writing(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def add(self, array: Array) -> None:
        """Put an array (X, Y, Z) in.

        Raises:
            MaisiError: the disk is full.
        """
        x, y, z = array.shape
        self.shapes.append((x, y, z))
        self._dtypes.append(array.dtype.newbyteorder("<"))
        self._offsets.append(self._file.tell())
        with writing(self.folder):
            for data in stored_bytes(array):
                write_all(self._file, data)

    def planes(self, number: int, start: int, stop: int) -> Array:
        """Planes start to stop - 1 along Z of one of the arrays, read-only."""
        x, y, _ = self.shapes[number]
        dtype = self._dtypes[number]
        raw = read_at(self._file, self._offsets[number] + start * x * y * dtype.itemsize, (stop - start) * x * y, dtype)
        self._file.seek(0, 2)
        return raw.reshape((x, y, stop - start), order="F")

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class RasRows(ABC):
    """The voxels of an open volume, asked for a few rows of an axis at a time, as if stored in RAS+.

    Attributes:
        shape: of the volume in RAS+.
        affine: likewise.
    """

    def __init__(self, header: StoredHeader) -> None:
        self._turn = turn_to_ras(header.shape, header.affine)
        self.shape, self.affine = self._turn.shape, self._turn.affine

    def rows(self, axis: int, start: int, stop: int) -> Array:
        """Rows start to stop - 1 of an axis, (X, Y, Z) in RAS+; the values that `read_volume` gives."""
        if self._turn.flipped[axis]:
            start, stop = self.shape[axis] - stop, self.shape[axis] - start
        return self._turn.applied(self._stored_rows(self._turn.order[axis], start, stop))

    @abstractmethod
    def _stored_rows(self, axis: int, start: int, stop: int) -> Array:
        """Rows start to stop - 1 of an axis as it is stored, values converted."""


class StoredRows(RasRows):
    """The voxels of an open file that holds them as they are, the first axis fastest."""

    def __init__(self, header: StoredHeader, file: IO[bytes], offset: int) -> None:
        """`offset`: byte of `file` at which the voxels begin, not compressed."""
        super().__init__(header)
        self._header, self._file, self._offset = header, file, offset

    def require_finite(self) -> None:
        """Look through a file of real numbers.

        Raises:
            MaisiError: some are NaN or infinite.
        """
        header = self._header
        if header.value_dtype.kind == "f":
            step, end = planes_in(header.shape, header.value_dtype), header.shape[2]
            starts = range(0, end, step)
            require_finite(sum(bad_values(self._planes(z, min(z + step, end))) for z in starts), header.path)

    def _stored_rows(self, axis: int, start: int, stop: int) -> Array:
        shape = list(self._header.shape)
        shape[axis] = stop - start
        rows = np.empty(shape, self._header.value_dtype, order="F")
        first, end = (start, stop) if axis == 2 else (0, shape[2])
        step = planes_in(self._header.shape, self._header.dtype)
        for z in range(first, end, step):
            planes = self._planes(z, min(z + step, end))
            wanted = planes if axis == 2 else planes[start:stop] if axis == 0 else planes[:, start:stop]
            rows[:, :, z - first : z - first + planes.shape[2]] = wanted
        return rows

    def _planes(self, start: int, stop: int) -> Array:
        header = self._header
        x, y, _ = header.shape
        offset = self._offset + start * x * y * header.dtype.itemsize
        raw = read_at(self._file, offset, (stop - start) * x * y, header.dtype)
        return converted(raw.reshape((x, y, stop - start), order="F"), header)


def planes_in(shape: Triple, dtype: np.dtype[Any]) -> int:
    """Planes along Z that are handled at a time."""
    return max(1, PLANES_BYTES // (shape[0] * shape[1] * dtype.itemsize))


def read_at(file: IO[bytes], offset: int, count: int, dtype: np.dtype[Any]) -> Array:
    """`count` numbers of a file, one axis.

    Raises:
        MaisiError: it has become shorter.
    """
    file.seek(offset)
    buffer = bytearray(count * dtype.itemsize)
    view, position = memoryview(buffer), 0
    while position < len(buffer):
        read = file.readinto(view[position:])  # type: ignore[attr-defined]
        if not read:
            raise MaisiError("A file became shorter while it was read; start again.")
        position += read
    return np.frombuffer(buffer, dtype)
