"""Volumes in files: NIfTI here, NRRD, Zarr and DICOM (read only) through modules of their own, headers before voxels.

Specification: https://nifti.nimh.nih.gov/nifti-1 (and nifti-2 for reading).
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from nibabel.nifti1 import Nifti1Extension, Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

import maisi
from maisi.errors import MaisiError
from maisi.io.dicom import files_of, is_dicom, open_series
from maisi.io.files import atomic_path, tree_sha256, writing
from maisi.io.label_names import EXTENSION_CODE, label_table_xml, names_in_xml
from maisi.io.nrrd import nrrd_voxels, read_nrrd_header, write_nrrd
from maisi.io.slabs import RasRows, Slabs, StoredRows
from maisi.io.stored import GZIP_LEVEL, ByteStream, StoredHeader, copy_voxels, read_some, read_voxels, skip
from maisi.io.zarr_store import ZarrRows, is_zarr, open_zarr, write_zarr
from maisi.volume import Volume

SYNTHETIC = "synthetic CT made by maisi"
"""What stands in the header's description of everything generated."""

_COMMENT = 6
_OFFSET_LIMIT = 1 << 24
_MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_HEADERS = {348: Nifti1Header, 540: Nifti2Header}
_MAGIC = {348: b"n+1\0", 540: b"n+2\0"}


def read_header(path: Path) -> StoredHeader:
    """Read and check the header of a NIfTI or NRRD file, a Zarr or a DICOM series: shape, affine, dtype; no voxel.

    Raises:
        MaisiError: no such file, another format, not one 3D volume of numbers, no finite affine; of a Zarr also: the
            package that reads it is missing.
    """
    path = Path(path)
    kind = _kind(path)
    with _reading(path):
        if kind == "zarr":
            return open_zarr(path).header
        if kind == "dicom":
            return open_series(path).header
        return read_nrrd_header(path) if kind == "nrrd" else _read_nifti_header(path)


def read_volume(path: Path, budget_bytes: int | None = None) -> Volume:
    """Read a volume from .nii, .nii.gz, .nrrd, .zarr or DICOM, in the orientation it is stored in.

    Args:
        path: the file; of a Zarr the folder; of a DICOM series its folder or one of its files.
        budget_bytes: memory that the voxels may take; None allows half of what is free.

    Returns:
        The volume; stored integers keep their type unless the header scales them (then float32 or float64).

    Raises:
        MaisiError: as `read_header`; or the header asks for more than the budget, the file is cut short or
            damaged, or voxels are not finite.
    """
    path = Path(path)
    if _kind(path) == "zarr":
        with _reading(path):
            image = open_zarr(path)
            image.check(budget_bytes)
            return Volume(image.read(), image.header.affine)
    if _kind(path) == "dicom":
        with _reading(path):
            series = open_series(path)
            series.header.check_memory(budget_bytes)
            return Volume(read_voxels(series.stream(), series.header), series.header.affine)
    header = read_header(path)
    with _reading(path):
        header.check_size(budget_bytes)
        with _voxels(header) as stream:
            return Volume(read_voxels(stream, header), header.affine)


@contextmanager
def opened_rows(path: Path) -> Iterator[RasRows]:
    """Open a volume that is read a few rows at a time and never whole; all of it is checked first.

    The voxels of a compressed file, and those of a DICOM series, are decompressed once, into an unnamed file in the
    folder for temporary files; those of a Zarr stay where they are, since its chunks are decompressed one by one.

    Raises:
        MaisiError: as `read_volume`, but for the budget; or no place for what is decompressed.
    """
    path = Path(path)
    if _kind(path) == "zarr":
        with _reading(path):
            image = open_zarr(path)
            image.check(sys.maxsize)
            image.require_whole()
        yield ZarrRows(image)
        return
    with ExitStack() as opened:
        header, file, offset = _seekable(path, opened)
        rows = StoredRows(header, file, offset)
        rows.require_finite()
        yield rows


def _seekable(path: Path, opened: ExitStack) -> tuple[StoredHeader, IO[bytes], int]:
    """Return the header, a file with the voxels as they are, and where in it they begin."""
    with _reading(path):
        if _kind(path) == "dicom":
            series = open_series(path)
            replace(series.header, shape=(*series.header.shape[:2], 1)).check_memory()  # one slice is held
            return series.header, _spooled(series.stream(), series.header, opened), 0
        header = read_header(path)
        header.check_size(sys.maxsize)
        if not header.compressed:
            return header, opened.enter_context(path.open("rb")), header.offset
        return header, _spooled(opened.enter_context(_voxels(header)), header, opened), 0


def _spooled(stream: ByteStream, header: StoredHeader, opened: ExitStack) -> IO[bytes]:
    """Copy voxels into an unnamed file, which goes when `opened` does."""
    folder = Path(tempfile.gettempdir())
    with writing(folder):
        file = opened.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115
        copy_voxels(stream, header, file)
    return file


def read_labels(path: Path, budget_bytes: int | None = None) -> Volume:
    """Read a label map, as `read_volume`; real numbers are accepted where all are whole.

    Returns:
        The volume as uint8 where all ids are 0 to 255, else as int32.

    Raises:
        MaisiError: as `read_volume`, or values that are no labels.
    """
    volume = read_volume(path, budget_bytes)
    array = volume.array
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise MaisiError(f"{path} holds fractions, so it is no label map; give one with whole numbers.")
    low, high = int(array.min()), int(array.max())
    if low < np.iinfo(np.int32).min or high > np.iinfo(np.int32).max:
        raise MaisiError(f"{path} holds values from {low} to {high}, which are no label ids; give a label map.")
    return volume.with_array(array.astype(np.uint8 if low >= 0 and high <= 255 else np.int32))


def volume_sha256(path: Path) -> str:
    """Return the SHA-256, 64 digits, of all files that a volume is read from.

    Raises:
        MaisiError: they cannot be read, or are no series.
    """
    path = Path(path)
    if not is_dicom(path) or is_zarr(path):
        return tree_sha256(path)
    with _reading(path):
        digests = [tree_sha256(file) for file in files_of(path)]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def read_description(path: Path) -> str:
    """Return what the header of a NIfTI file made by `write_volume` says of it; "" for others.

    Raises:
        MaisiError: it cannot be read.
    """
    path = Path(path)
    if _kind(path) not in ("nii", "nii.gz"):
        return ""
    with _reading(path), _open(path) as stream:
        raw = _read_exactly(stream, 348, path)
    fields = Nifti1Header(raw, endianness="<", check=False)
    return fields["descrip"].item().decode("ascii", "replace") if fields["sizeof_hdr"] == 348 else ""


def read_label_names(path: Path) -> dict[int, str]:
    """Return the label names in a header (id -> name), as TotalSegmentator, OME-Zarr and `write_volume` leave them.

    {} for a file without them, for NRRD and for DICOM.

    Raises:
        MaisiError: as `read_header`.
    """
    path = Path(path)
    if _kind(path) == "zarr":
        with _reading(path):
            return dict(open_zarr(path).names)
    header = read_header(path)
    if _kind(path) in ("nrrd", "dicom"):
        return {}
    with _reading(path), _open(path) as stream:
        data = _read_exactly(stream, header.offset, path)
    for content in _extensions(data):
        if names := names_in_xml(content):
            return names
    return {}


def write_volume(
    path: Path,
    volume: Volume,
    *,
    description: str | None = None,
    synthetic: bool = True,
    names: Mapping[int, str] | None = None,
) -> None:
    """Write a volume to .nii, .nii.gz, .nrrd or .zarr, atomically; the same volume gives the same bytes.

    Args:
        path: file to make, or folder of OME-Zarr, which must not exist; its ending decides the format.
        volume: uint8 and bool are stored as uint8 (labels); everything else as int16 (HU), reals rounded.
        description: text for the header (NIfTI: at most 79 ASCII characters); None writes `SYNTHETIC`, or "made by
            maisi" where `synthetic` is false.
        synthetic: whether nobody's body is shown; stands in the header either way.
        names: of a label map: id -> name, which NIfTI and OME-Zarr keep, with colours.

    Raises:
        MaisiError: unknown ending, values that int16 cannot hold, a place that cannot be written to; or of a Zarr, it
            exists or the package that writes it is missing.
    """
    path = Path(path)
    stored = _storable(volume.array)
    slabs = Slabs(volume.shape, volume.affine, stored.dtype, 2, [stored])
    write_slabs(path, slabs, description=description, synthetic=synthetic, names=names)


def write_slabs(
    path: Path,
    volume: Slabs,
    *,
    description: str | None = None,
    synthetic: bool = True,
    names: Mapping[int, str] | None = None,
) -> None:
    """As `write_volume`, of a volume of uint8 or int16 that comes slab by slab, with the same bytes.

    Slabs that are not along Z wait beside `path`, in a file without a name; those of a Zarr fill its chunks at once.
    """
    path = Path(path)
    kind = _kind(path)
    text = description if description is not None else SYNTHETIC if synthetic else "made by maisi"
    note = {"synthetic": synthetic, "description": text, "made_by": f"maisi {maisi.__version__}"}
    if kind == "dicom":
        raise MaisiError(f"{path}: volumes are written as .nii.gz, .nii, .nrrd or .zarr; name one of these.")
    if kind == "zarr":
        write_zarr(path, volume, note, names)
        return
    if kind == "nrrd":
        fields = {key: json.dumps(value).strip('"') for key, value in note.items()}
        write_nrrd(path, volume, text, fields)
        return
    header = _nifti_header(volume, text, json.dumps(note), names)
    with atomic_path(path) as part, part.open("wb") as file:
        if kind == "nii":
            _write_nifti(file, header, volume.stored_bytes(path.parent))
        else:
            with gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as packed:
                _write_nifti(packed, header, volume.stored_bytes(path.parent))


def _kind(path: Path) -> str:
    name = path.name.lower()
    for ending in ("nii.gz", "nii", "nrrd", "zarr"):
        if name.endswith("." + ending):
            return ending
    if is_zarr(path):  # a label image within another, say
        return "zarr"
    if is_dicom(path):
        return "dicom"
    there = "" if path.exists() else " (and there is none of this name)"
    raise MaisiError(
        f"{path}: files of this kind are not read or written{there}; use .nii.gz, .nii, .nrrd, .zarr, or a DICOM "
        "series."
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say in a sentence that a file cannot be read."""
    try:
        yield
    except OSError as error:
        raise MaisiError(
            f"Cannot read {path}: {error.strerror or error}; give the path of a file you may read."
        ) from error


@contextmanager
def _open(path: Path) -> Iterator[ByteStream]:
    """Open for reading, through gzip where the first bytes say so, whatever the name says."""
    with path.open("rb") as file:
        if _is_gzip(path):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked
        else:
            yield file


@contextmanager
def _voxels(header: StoredHeader) -> Iterator[ByteStream]:
    """Open for reading at the first voxel, decompressed."""
    if _kind(header.path) == "nrrd":
        with nrrd_voxels(header) as stream:
            yield stream
        return
    with _open(header.path) as stream:
        skip(stream, header.offset, header.path)
        yield stream


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _read_exactly(stream: ByteStream, count: int, path: Path) -> bytes:
    data = b""
    while len(data) < count:
        data += read_some(stream, count - len(data), path)
    return data


def _read_nifti_header(path: Path) -> StoredHeader:
    with _open(path) as stream:
        start = _read_exactly(stream, 4, path)
        size = next((n for n in _HEADERS if start in (n.to_bytes(4, "little"), n.to_bytes(4, "big"))), 0)
        if not size:
            raise MaisiError(f"{path} is not a NIfTI file; give a NIfTI or NRRD file.")
        raw = start + _read_exactly(stream, size - 4, path)
    fields = _HEADERS[size](raw, endianness="<" if start[0] else ">", check=False)
    if fields["magic"].item().ljust(4, b"\0")[:4] != _MAGIC[size]:
        raise MaisiError(f"{path} is not a single-file NIfTI (wrong magic); save it as .nii.gz.")
    try:
        return _checked_header(path, fields, size)
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise MaisiError(f"{path} has a damaged NIfTI header ({error}); export it again.") from error
    except KeyError as error:  # a code that the specification doesn't have
        raise MaisiError(f"{path} has a damaged NIfTI header (code {error}); export it again.") from error


def _checked_header(path: Path, fields: Any, size: int) -> StoredHeader:
    slope, intercept = fields.get_slope_inter()
    return StoredHeader(
        path=path,
        shape=_shape(path, fields),
        dtype=fields.get_data_dtype(),
        affine=_affine(path, fields),
        offset=_offset(path, fields, size),
        compressed=_is_gzip(path),
        slope=1.0 if slope is None else slope,
        intercept=0.0 if intercept is None else intercept,
    )


def _shape(path: Path, fields: Any) -> tuple[int, int, int]:
    """Return the three sizes; further axes must be single, as some writers add them."""
    dim = [int(n) for n in fields["dim"]]
    sizes = dim[1 : dim[0] + 1]
    if not 1 <= dim[0] <= 7:
        raise MaisiError(f"{path} has a damaged NIfTI header ({dim[0]} axes); export it again.")
    if dim[0] < 3 or any(n != 1 for n in sizes[3:]):
        raise MaisiError(f"{path} has shape {tuple(sizes)}; save one 3D volume.")
    return (sizes[0], sizes[1], sizes[2])


def _affine(path: Path, fields: Any) -> NDArray[np.float64]:
    if not (int(fields["sform_code"]) or int(fields["qform_code"])):
        raise MaisiError(
            f"{path} says nowhere how it lies in the patient (its qform and sform codes are 0), so left and right are "
            "unknown; set one of them, with nibabel's set_sform for instance."
        )
    unit = fields.get_xyzt_units()[0]
    affine = np.array(fields.get_best_affine(), dtype=np.float64)
    affine[:3] *= _MILLIMETRES[unit]
    return affine


def _offset(path: Path, fields: Any, size: int) -> int:
    """Return where the voxels begin; 0 means 'behind the header', and more than 16 MB is not believed."""
    offset = float(fields["vox_offset"])
    if not 0 <= offset <= _OFFSET_LIMIT:
        raise MaisiError(f"{path} has a damaged NIfTI header (voxels at byte {offset:g}); export it again.")
    return int(offset) if offset >= size else size + 4


def _storable(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype in (np.uint8, np.bool_):
        return array.astype(np.uint8, copy=False)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise MaisiError("The volume holds values that are not finite; nothing is written.")
    limits = np.iinfo(np.int16)
    low, high = float(array.min()), float(array.max())
    if low < limits.min or high > limits.max:
        raise MaisiError(f"The volume holds values from {low:g} to {high:g}; bring them into the range of int16.")
    return (np.rint(array) if array.dtype.kind == "f" else array).astype(np.int16, copy=False)


def _extensions(header: bytes) -> Iterator[bytes]:
    """Yield the contents of the extensions in all that stands before the voxels; stop where they are damaged."""
    big = int.from_bytes(header[:4], "little") not in _HEADERS
    start = int.from_bytes(header[:4], "big" if big else "little") + 4
    if len(header) < start or not header[start - 4]:
        return
    while start + 8 <= len(header):
        size = int.from_bytes(header[start : start + 4], "big" if big else "little")
        if not 8 <= size <= len(header) - start:
            return
        yield header[start + 8 : start + size]
        start += size


def _nifti_header(
    volume: Slabs, description: str, comment: str, names: Mapping[int, str] | None = None
) -> Nifti1Header:
    header = Nifti1Header(endianness="<")
    header.set_data_shape(volume.shape)
    header.set_data_dtype(volume.dtype)
    header.set_qform(volume.affine, code="scanner")
    header.set_sform(volume.affine, code="scanner")
    header.set_xyzt_units("mm")
    header.set_slope_inter(1.0, 0.0)
    header["descrip"] = description.encode("ascii", "replace")[:79]
    if names:
        header.extensions.append(Nifti1Extension(EXTENSION_CODE, label_table_xml(names)))
    header.extensions.append(Nifti1Extension(_COMMENT, comment.encode("utf-8")))
    return header


def _write_nifti(file: Any, header: Nifti1Header, voxels: Iterable[memoryview]) -> None:
    header.write_to(file)
    for data in voxels:
        file.write(data)
