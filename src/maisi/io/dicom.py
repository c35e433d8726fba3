"""CT and MR as scanners leave them: series of DICOM, one image a slice, or all slices in one file (enhanced CT and MR).

A series is what has one Series Instance UID. Its slices are put in order by their place in the patient, and only a grid
is accepted: a slice missing, another distance or a tilted gantry is refused, since no affine says it. Read are geometry
and numbers; not a field about the patient is. Knows nothing of writing.

Specification: DICOM PS3.3, C.7.6.2 (image plane), C.7.6.16 (functional groups), C.11.1 (modality LUT).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.errors import MaisiError
from maisi.io.stored import StoredHeader, truncated
from maisi.volume import RAS_TO_LPS

ENDINGS = (".dcm", ".ima", ".dicom")
"""How single files are often called; many have no ending at all."""

STRUCTURES = ("RTSTRUCT", "SEG")
"""Modalities of files that hold what was drawn into images."""

_MAGIC = b"DICM"
_MAGIC_AT = 128
_DEFLATED = "1.2.840.10008.1.2.1.99"
_MOST_TILT_DEGREES = 1.0
_UNEVEN = 0.1
"""Part of the distance between slices by which one may lie off its place: scanners round."""

_LISTED = 6
_MOST_FILES = 50_000
_LOOKED_AT = 20
_TAGS = (
    *("SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "ImageType", "NumberOfFrames"),
    *("Rows", "Columns", "SamplesPerPixel", "BitsStored", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"),
    *("HighBit", "PhotometricInterpretation", "ModalityLUTSequence"),
    *("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "SliceThickness"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)

Vector = tuple[float, ...]


class _DeflatedError(MaisiError):
    """A file that is not inflated; others beside it may be of use."""


@dataclass(frozen=True)
class Frame:
    """One slice of a series, in the terms of DICOM.

    Attributes:
        path: its file.
        index: its number in that file, from 0.
        position: of the first pixel's centre, mm, LPS.
        orientation: directions of a row and of a column, LPS.
        spacing_mm: between rows, and between columns.
        shape: rows and columns.
        low: least value that its bits can hold.
        high: largest such value.
        slope: factor on what is stored.
        intercept: added to that.
        thickness_mm: of the slice, 0 where nothing tells.
    """

    path: Path
    index: int
    position: Vector
    orientation: Vector
    spacing_mm: Vector
    shape: tuple[int, int]
    low: int
    high: int
    slope: float
    intercept: float
    thickness_mm: float = 0.0

    def values(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Read the pixels, (rows, columns), slope and intercept applied.

        Raises:
            MaisiError: they are cut short or damaged.
        """
        from pydicom.pixels.utils import pixel_array

        try:
            with quiet():
                stored = pixel_array(self.path, index=self.index)
            if stored.shape != self.shape or stored.min() < self.low or stored.max() > self.high:
                raise truncated(self.path)
        except MaisiError:
            raise
        except Exception as error:  # each decoder raises its own
            if from_the_system(error):
                raise
            raise truncated(self.path) from error
        if (self.slope, self.intercept) == (1.0, 0.0):
            return stored.astype(dtype, copy=False)
        return (stored * self.slope + self.intercept).astype(dtype)


@dataclass(frozen=True)
class DicomSeries:
    """A series whose headers were read; no pixel is read before it is asked for.

    Attributes:
        header: what is known of the volume; its type is int16 or int32 where all values are whole, else float32.
        frames: its slices, in order.
        frame_of_reference: identifier of the space that its places are in; "" where it is not told.
    """

    header: StoredHeader
    frames: tuple[Frame, ...]
    frame_of_reference: str = ""

    def stream(self) -> PlaneStream:
        """The voxels, X fastest, as `header` says."""
        return PlaneStream(self)


class PlaneStream:
    """The voxels of a series as a stream; one slice is in memory at a time."""

    def __init__(self, series: DicomSeries) -> None:
        self._planes = self._read(series)
        self._rest = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, and b'' at the end."""
        if not self._rest:
            self._rest = next(self._planes, memoryview(b""))
        data, self._rest = self._rest[:size], self._rest[size:]
        return bytes(data)

    @staticmethod
    def _read(series: DicomSeries) -> Iterator[memoryview]:
        for frame in series.frames:
            yield memoryview(frame.values(series.header.dtype).tobytes())


def is_dicom(path: Path) -> bool:
    """Say whether a path is that of a folder, or of a file that begins as DICOM does or is called so."""
    return path.is_dir() or path.name.lower().endswith(ENDINGS) or (path.is_file() and _may_begin_as_dicom(path))


def holds_slices(folder: Path) -> bool:
    """Say whether there are DICOM files in a folder or in those below, by the first few files that are found."""
    files = islice((file for file in folder.rglob("*") if file.is_file()), _LOOKED_AT) if folder.is_dir() else ()
    return any(map(_may_begin_as_dicom, files))


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of a series, in its order; see `open_series`."""
    return tuple(dict.fromkeys(frame.path for frame in open_series(path).frames))


def open_series(path: Path) -> DicomSeries:
    """Read and check the headers of a series.

    Args:
        path: a folder with one series of images, in it or in folders below; or one of the series' files, whose folder
            may then hold other series, too. What shows no slice (localizers, structures, reports) is passed over.

    Raises:
        MaisiError: no images, or those of several series; slices that do not make up a grid of single numbers; coded in
            a way that no package at hand decodes.
        OSError: something may not be read.
    """
    path = Path(path)
    files = _files(path)
    chosen = None if path.is_dir() else read_dicom(path)
    if path.is_file() and chosen is None:
        raise MaisiError(f"{path} is not a DICOM file, or damaged; give a folder with a series, or one of its files.")
    held: dict[str, list[tuple[Path, Any]]] = {}
    for file in files:
        try:
            told = read_dicom(file)
        except _DeflatedError:
            if chosen is None:
                raise
            continue
        if told is not None and _shows_slices(told):
            held.setdefault(str(told.get("SeriesInstanceUID", "")), []).append((file, told))
    if chosen is not None:
        wanted = str(chosen.get("SeriesInstanceUID", ""))
        if not _shows_slices(chosen):
            kind, mend = chosen.get("Modality", "something else"), "give a series of CT or MR images"
            if kind in STRUCTURES:
                mend = "its structures come in by `maisi mask import`"
            raise MaisiError(f"{path} holds no slices ({kind}); {mend}.")
        return _series(path, held[wanted])
    if not held:
        raise MaisiError(
            f"{path} holds no DICOM images; give a folder with a series of CT or MR, or a file .nii.gz, .nii or .nrrd."
        )
    if len(held) > 1:
        raise MaisiError(f"{path} holds {len(held)} series; give one of their files: {_listing(held.values(), path)}.")
    return _series(path, next(iter(held.values())))


def _files(path: Path) -> list[Path]:
    """All files below a folder, or beside a file."""
    found = path.rglob("*") if path.is_dir() else path.parent.glob("*")
    files = list(islice((file for file in found if file.is_file()), _MOST_FILES + 1))
    if len(files) > _MOST_FILES:
        raise MaisiError(f"{path} holds more than {_MOST_FILES:,} files; give the folder of one series.")
    return sorted(files)


def _may_begin_as_dicom(path: Path) -> bool:
    """As `_begins_as_dicom`; what cannot be read does not."""
    try:
        return _begins_as_dicom(path)
    except OSError:
        return False


def _begins_as_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(_MAGIC_AT)
        return file.read(len(_MAGIC)) == _MAGIC


def read_dicom(path: Path, tags: Sequence[str] = _TAGS, convert: bool = True) -> Any | None:
    """The elements `tags` of a file (a `pydicom.Dataset`), without pixels; None where it is no DICOM.

    Values are converted at once, so that later none can be found damaged, unless `convert` is false.

    Raises:
        MaisiError: it is damaged, or would have to be inflated first.
        OSError: it may not be read.
    """
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    if not _begins_as_dicom(path):
        return None
    try:
        with quiet():
            # inflated as a whole, and before anything is known of it
            if read_file_meta_info(path).get("TransferSyntaxUID") == _DEFLATED:
                raise _DeflatedError(f"{path} is a deflated DICOM file; save it without (dcmconv, or dcm2niix).")
            told = dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
            for _ in told.iterall() if convert else ():
                pass
            return told
    except MaisiError:
        raise
    except Exception as error:  # the parser raises whatever the damaged bytes lead it to
        if from_the_system(error):
            raise
        raise MaisiError(f"{path} has a damaged DICOM header ({type(error).__name__}); export it again.") from error


def from_the_system(error: Exception) -> bool:
    """Whether a file could not be read; the library calls a damaged one so, too, but without a number."""
    return isinstance(error, OSError) and error.errno is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, and without the library's log: they quote values, which may be a patient's."""
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _shows_slices(told: Any) -> bool:
    kind = [str(word).upper() for word in told.get("ImageType") or ()]
    if told.get("Modality") in (*STRUCTURES, "RTDOSE"):
        return False
    single = int(told.get("NumberOfFrames") or 1) == 1
    placed = ("ImagePositionPatient" in told and single) or "PerFrameFunctionalGroupsSequence" in told
    return placed and "Rows" in told and "LOCALIZER" not in kind


def _listing(series: Any, folder: Path) -> str:
    told = [
        f"{files[0][0].relative_to(folder)} ({files[0][1].get('Modality', '?')}, {_count(files)} images)"
        for files in series
    ]
    more = f" and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
    return ", ".join(told[:_LISTED]) + more


def _count(files: Sequence[tuple[Path, Any]]) -> int:
    return sum(int(told.get("NumberOfFrames") or 1) for _, told in files)


def _series(path: Path, files: Sequence[tuple[Path, Any]]) -> DicomSeries:
    """Order the slices and find their grid."""
    copies = {
        (str(told.get("SOPInstanceUID", file)), str(told.get("ImagePositionPatient", ""))): (file, told)
        for file, told in files
    }
    frames: list[Frame] = []
    for file, told in copies.values():
        _require_numbers(file, told)
        try:
            frames.extend(frames_of(file, told))
        except (KeyError, AttributeError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise MaisiError(f"{file} has a damaged DICOM header ({error}); export it again.") from error
    _require_one_plane(path, frames)
    across, down = (np.array(frames[0].orientation[part]) for part in (slice(0, 3), slice(3, 6)))
    normal = np.cross(across, down)
    frames.sort(key=lambda frame: float(np.dot(frame.position, normal)))
    step = _step(path, frames, normal)
    between_rows, between_columns = frames[0].spacing_mm
    affine = np.eye(4)
    affine[:3] = np.stack([across * between_columns, down * between_rows, step, frames[0].position], axis=1)
    rows, columns = frames[0].shape
    header = StoredHeader(
        path=path,
        shape=(columns, rows, len(frames)),
        dtype=_dtype(frames),
        affine=RAS_TO_LPS @ affine,
        offset=0,
        compressed=True,
    )
    return DicomSeries(header, tuple(frames), str(files[0][1].get("FrameOfReferenceUID", "")))


def _require_numbers(path: Path, told: Any) -> None:
    """Refuse colours, and coded pixels that nothing here decodes."""
    from pydicom.pixels.decoders.base import get_decoder

    if told.get("SamplesPerPixel", 1) != 1 or not str(told.get("PhotometricInterpretation", "MONO")).startswith("MONO"):
        raise MaisiError(f"{path} holds colours, not single numbers; give a series of CT or MR images.")
    bits = told.get("BitsStored", 16)
    if told.get("HighBit", bits - 1) != bits - 1 or told.get("ModalityLUTSequence"):
        raise MaisiError(f"{path} stores its numbers in a way that is not read (high bit, lookup table); use dcm2niix.")
    syntax = told.file_meta.get("TransferSyntaxUID")
    try:
        with quiet():
            decodable = get_decoder(syntax).is_available
    except Exception:  # one that nobody knows, or none
        decodable = False
    if not decodable:
        name = getattr(syntax, "name", syntax)
        raise MaisiError(
            f"{path}: its pixels are coded as {name}, for which a package is missing; install it with: "
            "pip install 'maisi[dicom]' (or decode the files first: gdcmconv --raw)."
        )


def frames_of(path: Path, told: Any) -> Iterator[Frame]:
    """The slices in a file; its header says where they lie, once for each or in groups.

    Raises:
        ValueError: it says so little, or what makes no sense; or other errors of that kind.
    """
    groups = told.get("PerFrameFunctionalGroupsSequence")
    shared = (told.get("SharedFunctionalGroupsSequence") or [{}])[0]
    bits, signed = int(told.BitsStored), int(told.PixelRepresentation)
    if not 1 <= bits <= 32:
        raise ValueError(f"{bits} bits")
    if groups is not None and len(groups) != int(told.get("NumberOfFrames") or 1):
        raise ValueError(f"{told.get('NumberOfFrames')} frames, of which {len(groups)} have a place")
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    for index, group in enumerate([{}] if groups is None else groups):

        def of(name: str, sequence: str, group: Any = group) -> Any:
            if groups is None:
                return told.get(name)
            found = group.get(sequence) or shared.get(sequence)
            return found[0].get(name) if found else told.get(name)

        yield Frame(
            path=path,
            index=index,
            position=_numbers(of("ImagePositionPatient", "PlanePositionSequence"), 3),
            orientation=_numbers(of("ImageOrientationPatient", "PlaneOrientationSequence"), 6),
            spacing_mm=_numbers(of("PixelSpacing", "PixelMeasuresSequence"), 2),
            shape=(int(told.Rows), int(told.Columns)),
            low=low,
            high=high,
            slope=_slope(of("RescaleSlope", "PixelValueTransformationSequence")),
            intercept=_number(of("RescaleIntercept", "PixelValueTransformationSequence"), 0.0),
            thickness_mm=_number(of("SliceThickness", "PixelMeasuresSequence"), 0.0),
        )


def _numbers(values: Any, count: int) -> Vector:
    numbers = tuple(float(value) for value in values or ())
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"its place in the patient is {numbers}")
    return numbers


def _number(value: Any, usual: float) -> float:
    number = usual if value is None else float(value)
    if not math.isfinite(number) or abs(number) > 1e9:
        raise ValueError(f"a number of {number}")
    return number


def _slope(value: Any) -> float:
    slope = _number(value, 1.0)
    if slope == 0:
        raise ValueError("a rescale slope of 0")
    return slope


def _require_one_plane(path: Path, frames: Sequence[Frame]) -> None:
    """Refuse what is no stack of parallel slices of one size."""
    first = frames[0]
    if len(frames) < 2:
        raise MaisiError(f"{path} holds a single slice; give all slices of a series.")
    shapes = Counter(frame.shape for frame in frames)
    turned = max(np.abs(np.subtract(frame.orientation, first.orientation)).max() for frame in frames)
    zoomed = max(np.abs(np.subtract(frame.spacing_mm, first.spacing_mm)).max() for frame in frames)
    if len(shapes) > 1 or turned > 1e-3 or zoomed > 1e-3:
        raise MaisiError(
            f"{path}: the slices of this series differ in size, direction or spacing, so they are no volume; give "
            "those that belong together in a folder of their own."
        )
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    if abs(across @ across - 1) > 1e-2 or abs(down @ down - 1) > 1e-2 or abs(across @ down) > 1e-2:
        raise MaisiError(f"{path}: the directions of its rows and columns are damaged; export it again.")
    if min(first.spacing_mm) <= 0:
        raise MaisiError(f"{path}: the spacing of its pixels is {min(first.spacing_mm):g} mm; export it again.")


def _step(path: Path, frames: Sequence[Frame], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """From one slice to the next, mm, LPS."""
    places = np.array([frame.position for frame in frames])
    heights = places @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if gaps.min() < 0.5 * _UNEVEN * usual or usual <= 0:
        raise MaisiError(
            f"{path} holds several slices at one place (phases of one series?); give those of one phase in a folder "
            "of their own."
        )
    if gaps.max() > 1.5 * usual:
        wide = int(gaps.argmax())
        raise MaisiError(
            f"{path}: slices are missing ({usual:.3g} mm apart, but {gaps[wide]:.3g} between the slices at "
            f"{heights[wide]:.5g} and {heights[wide + 1]:.5g} mm); copy or export the series again."
        )
    rate, first = np.polyfit(np.arange(len(frames)), heights, 1)
    if np.abs(heights - first - rate * np.arange(len(frames))).max() > _UNEVEN * usual:
        raise MaisiError(
            f"{path}: its slices are not evenly spaced ({gaps.min():.3g} to {gaps.max():.3g} mm); dcm2niix makes a "
            "volume of such a series."
        )
    step: NDArray[np.float64] = (places[-1] - places[0]) / (len(frames) - 1)
    straight = float(step @ normal) / float(np.linalg.norm(step) * np.linalg.norm(normal))
    tilt = math.degrees(math.acos(min(1.0, straight)))
    if tilt > _MOST_TILT_DEGREES:
        raise MaisiError(
            f"{path} was taken with a gantry tilted by {tilt:.1f} degrees, so its slices are no box; dcm2niix "
            "straightens such a series."
        )
    return step


def _dtype(frames: Sequence[Frame]) -> np.dtype[Any]:
    """The smallest type for all values that the bits can hold."""
    if not all(frame.slope.is_integer() and frame.intercept.is_integer() for frame in frames):
        return np.dtype(np.float32)
    ends = [end * frame.slope + frame.intercept for frame in frames for end in (frame.low, frame.high)]
    for dtype in (np.int16, np.int32):
        if np.iinfo(dtype).min <= min(ends) and max(ends) <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.float32)
