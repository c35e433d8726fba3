"""Volumes in folders of Zarr, read and written chunk by chunk: OME-Zarr (see `io.ome`), and plain arrays.

Written are chunks of 64 x 64 x 64 voxels in one level of Zarr 2, each a Zstandard frame with a checksum. Read is what
the package `zarr` reads, Zarr 2 and 3. A plain array is indexed X, Y, Z and has the attribute
`{"maisi": {"affine": 4 rows of 4, voxel indices to mm, RAS+}}`.

A chunk that is missing stands for the fill value, so in general its loss cannot be seen. Of what is written here every
chunk is there, and an attribute says so: such an image is refused when one is missing.

Specification: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from maisi.errors import MaisiError
from maisi.io.files import new_folder
from maisi.io.ome import (
    ATTRIBUTE,
    LEVEL,
    Place,
    attributes_of,
    label_names,
    level_path,
    own_affine,
    place_of,
    stored_turn,
)
from maisi.io.slabs import RasRows, Slabs, regrouped
from maisi.io.stored import StoredHeader, bad_values, converted, require_finite, truncated
from maisi.volume import Turn

CHUNK = 64
"""Voxels along each side of a chunk."""

_METADATA = (".zattrs", ".zgroup", ".zarray", "zarr.json")
_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class ZarrImage:
    """A volume in an open Zarr; no voxel is read before it is asked for.

    Attributes:
        header: what is known of the volume.
        array: the `zarr.Array`.
        place: where the volume lies in it.
        names: of labels, id -> name.
    """

    header: StoredHeader
    array: Any
    place: Place
    names: Mapping[int, str] = field(default_factory=dict)

    def check(self, budget_bytes: int | None = None) -> None:
        """Look at the size and at which chunks are there; none is read.

        Args:
            budget_bytes: memory that the volume may take; None allows half of what is free now.

        Raises:
            MaisiError: the volume, or a single chunk, needs more memory than allowed; or a chunk is missing.
        """
        self.header.check_memory(budget_bytes)
        chunk = math.prod(self.array.chunks) * self.header.dtype.itemsize
        if chunk > psutil.virtual_memory().available // 2:
            raise MaisiError(
                f"{self.header.path}: a single chunk of it holds {chunk / 1e9:,.1f} GB; save it in smaller chunks."
            )
        missing = self.array.nchunks - self.array.nchunks_initialized if self.place.complete else 0
        if missing:
            raise MaisiError(f"{self.header.path}: {missing} of its chunks are missing; copy or export it again.")

    def read(self) -> NDArray[Any]:
        """Read all voxels, a layer of chunks at a time.

        Returns:
            (X, Y, Z) of `header.value_dtype`, in Fortran order.

        Raises:
            MaisiError: chunks are damaged, or values are not finite.
        """
        array = np.empty(self.header.shape, self.header.value_dtype, order="F")
        axis, layers = self._layers()
        for start, stop in layers:
            array[(*[slice(None)] * axis, slice(start, stop))] = self.rows(axis, start, stop)
        require_finite(_bad(array), self.header.path)
        return array

    def require_whole(self) -> None:
        """Read all voxels, and keep none.

        Raises:
            MaisiError: as `read`.
        """
        axis, layers = self._layers()
        require_finite(sum(_bad(self.rows(axis, start, stop)) for start, stop in layers), self.header.path)

    def rows(self, axis: int, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop - 1 of an axis of the volume, (X, Y, Z); only chunks that hold some of them are read.

        Raises:
            MaisiError: chunks are damaged.
        """
        axes, flipped = self.place.axes, self.place.flipped
        wanted: list[Any] = [0] * self.array.ndim
        for a, size in enumerate(self.header.shape):
            first, end = (start, stop) if a == axis else (0, size)
            wanted[axes[a]] = slice(size - end, size - first) if flipped[a] else slice(first, end)
        try:
            stored = np.asarray(self.array[tuple(wanted)])
        except OSError:
            raise
        except Exception as error:  # each codec raises its own
            raise truncated(self.header.path) from error
        turned = stored.transpose([sorted(axes).index(a) for a in axes])
        return converted(np.flip(turned, tuple(a for a in range(3) if flipped[a])), self.header)

    def _layers(self) -> tuple[int, list[tuple[int, int]]]:
        """The volume's axis that is outermost in the array, and its rows that make up layers of chunks."""
        axis = self.place.axes.index(min(self.place.axes))
        size = self.header.shape[axis]
        layers = _stretches(size, self.array.chunks[self.place.axes[axis]])
        return axis, [(size - stop, size - start) for start, stop in layers] if self.place.flipped[axis] else layers


class ZarrRows(RasRows):
    """The voxels of a Zarr, see `RasRows`."""

    def __init__(self, image: ZarrImage) -> None:
        super().__init__(image.header)
        self._image = image

    def _stored_rows(self, axis: int, start: int, stop: int) -> NDArray[Any]:
        return self._image.rows(axis, start, stop)


def is_zarr(path: Path) -> bool:
    """Say whether a folder holds Zarr metadata, whatever it is called."""
    return any((path / name).is_file() for name in _METADATA)


def open_zarr(path: Path) -> ZarrImage:
    """Open an image; its metadata is read and checked.

    Raises:
        MaisiError: the package `zarr` is missing; or this is no Zarr, damaged, not one 3D volume of numbers, or its
            place in the patient is unknown.
        OSError: there is no such folder, or it may not be read.
    """
    zarr = require_package()
    path.stat()
    try:
        node = zarr.open(str(path), mode="r")
        return _plain(path, node) if isinstance(node, zarr.Array) else _ome(path, node)
    except (MaisiError, PermissionError):
        raise
    except Exception as error:  # metadata that is not what it should be shows in many ways
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise MaisiError(f"{path} is no Zarr image, or its metadata is damaged ({told}); export it again.") from error


def write_zarr(path: Path, volume: Slabs, note: Mapping[str, Any], names: Mapping[int, str] | None = None) -> None:
    """Make a folder of OME-Zarr, all or nothing; the same volume gives the same bytes.

    Slabs may be along any axis: what is in memory is one of them and one layer of chunks.

    Args:
        path: folder to make.
        volume: what to write.
        note: more of our own attributes.
        names: of labels, id -> name, which are kept with colours.

    Raises:
        MaisiError: the package `zarr` is missing, `path` exists or cannot be made, or the disk is full.
        ValueError: the slabs do not make up the shape.
    """
    zarr = require_package()
    from numcodecs import Zstd

    turn = stored_turn(volume.shape, volume.affine)
    shape = turn.shape[::-1]
    with new_folder(path) as part:
        attributes = attributes_of(turn, volume.affine, note, names or {})
        zarr.create_group(store=str(part), zarr_format=2, attributes=attributes)
        array = zarr.create_array(
            store=str(part),
            name=LEVEL,
            zarr_format=2,
            shape=shape,
            chunks=tuple(min(CHUNK, n) for n in shape),
            dtype=volume.dtype.newbyteorder("<"),
            compressors=Zstd(level=_ZSTD_LEVEL, checksum=True),
            fill_value=0,
            order="C",
            chunk_key_encoding={"name": "v2", "separator": "/"},
            config={"write_empty_chunks": True},
        )
        _write_layers(array, volume, turn)
        _forget_checksum(part / LEVEL / ".zarray")


def require_package() -> Any:
    """Import the package `zarr`, which is slow.

    Raises:
        MaisiError: it is missing, or older than 3.
    """
    try:
        import zarr
        from zarr import create_array as _  # noqa: F401  version 2 does not have it
    except ImportError:
        raise MaisiError(
            "Zarr needs the package zarr, 3.1 or newer; install it with: pip install 'maisi[zarr]'"
        ) from None
    return zarr


def _plain(path: Path, array: Any) -> ZarrImage:
    own = dict(array.attrs).get(ATTRIBUTE)
    if own is None:
        raise MaisiError(
            f"{path} is a plain Zarr array whose place in the patient is unknown; save it as OME-Zarr, or give it the "
            f'attribute "{ATTRIBUTE}": {{"affine": 4 rows of 4, voxel indices to mm, RAS+}}.'
        )
    if array.ndim != 3:
        raise MaisiError(f"{path} has shape {array.shape}; save one 3D volume.")
    return _image(path, array, Place((0, 1, 2), (False, False, False), own_affine(path, own)), {})


def _ome(path: Path, group: Any) -> ZarrImage:
    attributes = dict(group.attrs)
    array = group[level_path(attributes)]
    return _image(path, array, place_of(path, attributes, array.shape), label_names(attributes))


def _image(path: Path, array: Any, place: Place, names: Mapping[int, str]) -> ZarrImage:
    x, y, z = (array.shape[axis] for axis in place.axes)
    header = StoredHeader(path, (x, y, z), np.dtype(array.dtype), place.affine, offset=0, compressed=True)
    return ZarrImage(header, array, place, names)


def _write_layers(array: Any, volume: Slabs, turn: Turn) -> None:
    """Write slabs as they come, a layer of chunks as soon as it is full."""
    stored = turn.order.index(volume.axis)
    axis = 2 - stored
    layers = _stretches(turn.shape[stored], array.chunks[axis])
    if turn.flipped[stored]:
        layers.reverse()
    blocks = regrouped(volume.in_order(), volume.axis, [stop - start for start, stop in layers])
    for (start, _), block in zip(layers, blocks, strict=True):
        _write_chunks(array, turn.applied(block).T, axis, start)


def _write_chunks(array: Any, layer: NDArray[Any], axis: int, start: int) -> None:
    """Write a layer of chunks (z, y, x) that begins at `start` along the array's `axis`.

    One after the other: of several written at once, those under way when the disk is full would go on.
    """
    for box in product(*(_stretches(n, step) for n, step in zip(layer.shape, array.chunks, strict=True))):
        shift = [start if a == axis else 0 for a in range(3)]
        place = tuple(slice(first + by, end + by) for (first, end), by in zip(box, shift, strict=True))
        array[place] = layer[tuple(slice(first, end) for first, end in box)]


def _bad(array: NDArray[Any]) -> int:
    return bad_values(array) if array.dtype.kind == "f" else 0


def _stretches(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _forget_checksum(path: Path) -> None:
    """Take the word 'checksum' out of an array's metadata.

    It is for who writes, as each frame says itself whether it has one; and the readers of ITK and ngff-zarr
    (tensorstore, zarrs) refuse an array of Zarr 2 whose metadata have the word.
    """
    metadata = json.loads(path.read_text(encoding="utf-8"))
    del metadata["compressor"]["checksum"]
    path.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
