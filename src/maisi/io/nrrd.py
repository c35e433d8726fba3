"""NRRD files (the format of 3D Slicer) with voxels inside the file, raw or gzipped. Knows no other format.

Specification: https://teem.sourceforge.net/nrrd/format.html
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from gzip import GzipFile
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
from numpy.typing import NDArray

from maisi.errors import MaisiError
from maisi.io.files import atomic_path
from maisi.io.slabs import Slabs
from maisi.io.stored import GZIP_LEVEL, ByteStream, StoredHeader
from maisi.volume import RAS_TO_LPS

_HEADER_LIMIT = 1 << 20

_TYPES = {
    "int8": ("int8", "int8_t", "signed char"),
    "uint8": ("uint8", "uint8_t", "uchar", "unsigned char"),
    "int16": ("int16", "int16_t", "short", "short int", "signed short", "signed short int"),
    "uint16": ("uint16", "uint16_t", "ushort", "unsigned short", "unsigned short int"),
    "int32": ("int32", "int32_t", "int", "signed int"),
    "uint32": ("uint32", "uint32_t", "uint", "unsigned int"),
    "int64": ("int64", "int64_t", "longlong", "long long", "long long int", "signed long long"),
    "uint64": ("uint64", "uint64_t", "ulonglong", "unsigned long long", "unsigned long long int"),
    "float32": ("float",),
    "float64": ("double",),
}
_DTYPES = {name: dtype for dtype, names in _TYPES.items() for name in names}

_SIGNS_TO_RAS = {
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
}


def read_nrrd_header(path: Path) -> StoredHeader:
    """Read and check the header of an NRRD file; no voxel is touched.

    Raises:
        MaisiError: not an NRRD file, its voxels are elsewhere or coded otherwise, not 3D, no known space.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER_LIMIT)
    if not head.startswith(b"NRRD"):
        raise MaisiError(f"{path} is not an NRRD file; give an NRRD or NIfTI file.")
    source = io.BytesIO(head)
    try:
        fields = nrrd.read_header(source)
    except Exception as error:  # the parser raises whatever the damaged line leads it to
        raise MaisiError(f"{path} has a damaged NRRD header ({error}); export it again.") from error
    offset = source.tell()
    if offset >= len(head):
        raise MaisiError(f"{path} has no voxels behind its header; export it again as one .nrrd file.")
    return StoredHeader(
        path=path,
        shape=_shape(path, fields),
        dtype=_dtype(path, fields),
        affine=_affine(path, fields),
        offset=offset,
        compressed=_is_compressed(path, fields),
    )


@contextmanager
def nrrd_voxels(header: StoredHeader) -> Iterator[ByteStream]:
    """Open for reading at the first voxel, decompressed."""
    with header.path.open("rb") as file:
        file.seek(header.offset)
        yield GzipFile(fileobj=file) if header.compressed else file


def write_nrrd(path: Path, volume: Slabs, comment: str, fields: Mapping[str, str]) -> None:
    """Write a volume, gzipped, in the space left-posterior-superior; the same volume gives the same bytes.

    Args:
        path: file to make.
        volume: its dtype is one that NRRD knows (integers or reals of at most 8 bytes).
        comment: one line for the head of the file.
        fields: free key-value pairs.
    """
    affine = RAS_TO_LPS @ volume.affine
    lines = [
        "NRRD0005",
        f"# {comment}",
        f"type: {next(name for name in _TYPES[volume.dtype.name])}",
        "dimension: 3",
        "space: left-posterior-superior",
        "sizes: " + " ".join(str(n) for n in volume.shape),
        "space directions: " + " ".join(_vector(affine[:3, axis]) for axis in range(3)),
        "kinds: domain domain domain",
        "endian: little",
        "encoding: gzip",
        "space origin: " + _vector(affine[:3, 3]),
        *(f"{key}:={value}" for key, value in fields.items()),
    ]
    with atomic_path(path) as part, part.open("wb") as file:
        file.write(("\n".join(lines) + "\n\n").encode("ascii", "replace"))
        packer = zlib.compressobj(level=GZIP_LEVEL, wbits=31)
        for data in volume.stored_bytes(path.parent):
            file.write(packer.compress(data))
        file.write(packer.flush())


def _vector(values: NDArray[np.float64]) -> str:
    return "(" + ",".join(repr(float(value)) for value in values) + ")"


def _shape(path: Path, fields: Mapping[str, Any]) -> tuple[int, int, int]:
    sizes = [int(size) for size in fields.get("sizes", ())]
    if len(sizes) != 3 or int(fields.get("dimension", 0)) != 3:
        raise MaisiError(f"{path} has {len(sizes)} axes (sizes {sizes}); save one 3D volume.")
    return (sizes[0], sizes[1], sizes[2])


def _dtype(path: Path, fields: Mapping[str, Any]) -> np.dtype[Any]:
    name = str(fields.get("type", "")).lower()
    if name not in _DTYPES:
        raise MaisiError(f"{path}: voxels of type '{name}' cannot be read; save integers or reals.")
    dtype = np.dtype(_DTYPES[name])
    return dtype.newbyteorder(">" if str(fields.get("endian", "little")).lower() == "big" else "<")


def _is_compressed(path: Path, fields: Mapping[str, Any]) -> bool:
    encoding = str(fields.get("encoding", "")).lower()
    elsewhere = {"data file", "datafile"} & set(fields)
    skips = [int(fields.get(key, 0)) for key in ("line skip", "lineskip", "byte skip", "byteskip")]
    if elsewhere or any(skips) or encoding not in ("raw", "gzip", "gz"):
        raise MaisiError(
            f"{path}: its voxels are not in the file itself as raw or gzip (encoding '{encoding}'); "
            "save it as one .nrrd file."
        )
    return encoding != "raw"


def _affine(path: Path, fields: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return the RAS+ affine; NRRD's directions are one vector per array axis, in the file's own space."""
    space = str(fields.get("space", "")).lower()
    if space not in _SIGNS_TO_RAS or "space directions" not in fields:
        raise MaisiError(
            f"{path}: its place in the patient is unknown (space '{space}'); "
            "save it with space left-posterior-superior and space directions."
        )
    directions = np.asarray(fields["space directions"], dtype=np.float64)
    origin = np.asarray(fields.get("space origin", np.zeros(3)), dtype=np.float64)
    if directions.shape != (3, 3) or origin.shape != (3,):
        raise MaisiError(f"{path}: its space directions or origin are not those of a 3D volume; export it again.")
    affine = np.eye(4)
    affine[:3, :3] = directions.T
    affine[:3, 3] = origin
    return np.diag([*_SIGNS_TO_RAS[space], 1.0]) @ affine
