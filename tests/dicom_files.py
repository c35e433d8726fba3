"""Series of DICOM as scanners write them, made of arrays; with a patient, whose name must show up nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

PATIENT = "Nobody^Knows"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def datasets(
    stored: np.ndarray, affine: np.ndarray, series: str = "1.2.3", *, signed: bool = False, bits: int = 16, **more: Any
) -> list[Dataset]:
    """A slice for each plane of `stored` (X, Y, Z), whose `affine` (RAS+) has Z along the slices."""
    return [_slice(stored, LPS @ affine, z, series, signed, bits, more) for z in range(stored.shape[2])]


def _slice(
    stored: np.ndarray, affine: np.ndarray, z: int, series: str, signed: bool, bits: int, more: dict[str, Any]
) -> Dataset:
    slice_ = _empty(CTImageStorage, f"{series}.{z + 1}", series)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    slice_.ImageOrientationPatient = [f"{v:.12g}" for v in (affine[:3, :2] / spacing[:2]).T.ravel()]
    slice_.ImagePositionPatient = [f"{v:.12g}" for v in affine[:3, 3] + z * affine[:3, 2]]
    slice_.SliceThickness = f"{spacing[2]:.12g}"
    slice_.PixelSpacing = [f"{spacing[1]:.12g}", f"{spacing[0]:.12g}"]
    _pixels(slice_, stored[:, :, z : z + 1], signed, bits)
    slice_.RescaleSlope, slice_.RescaleIntercept = 1, 0
    for name, value in more.items():
        setattr(slice_, name, value)
    return slice_


def enhanced(stored: np.ndarray, affine: np.ndarray, intercept: float) -> Dataset:
    """All slices in one file, the last first."""
    affine = LPS @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = _empty(EnhancedCTImageStorage, "1.2.9.1", "1.2.9")
    _pixels(image, stored[:, :, ::-1], False, 16)
    image.NumberOfFrames = stored.shape[2]
    shared, plane, measures, values = Dataset(), Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = [f"{v:.12g}" for v in (affine[:3, :2] / spacing[:2]).T.ravel()]
    measures.PixelSpacing = [float(spacing[1]), float(spacing[0])]
    values.RescaleSlope, values.RescaleIntercept = 1, intercept
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([plane]), Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([values])
    groups = []
    for z in reversed(range(stored.shape[2])):
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = [f"{v:.12g}" for v in affine[:3, 3] + z * affine[:3, 2]]
        group.PlanePositionSequence = Sequence([place])
        groups.append(group)
    image.SharedFunctionalGroupsSequence, image.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence(groups)
    return image


def save(folder: Path, slices: list[Dataset]) -> Path:
    """Write slices under names that tell nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, slice_ in zip(_names(len(slices)), slices, strict=True):
        slice_.save_as(folder / name, enforce_file_format=True)
    return folder


def contour(points: Any, affine: np.ndarray, kind: str = "CLOSED_PLANAR") -> Dataset:
    """A contour of points that are indices of a grid."""
    made = Dataset()
    made.ContourGeometricType, made.NumberOfContourPoints = kind, len(points)
    there = (LPS @ affine @ np.c_[points, np.ones(len(points))].T)[:3].T
    made.ContourData = [f"{v:.10g}" for v in there.ravel()]
    return made


def circle(centre: tuple[float, float], radius: float, z: float, affine: np.ndarray, count: int = 200) -> Dataset:
    """A contour in a plane of the third axis."""
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    x, y = centre
    points = [x + radius * np.cos(turn), y + radius * np.sin(turn), np.full(count, z)]
    return contour(np.array(points).T, affine)


def rtstruct(path: Path, structures: dict[str, list[Dataset]]) -> Path:
    """Write contours by the names of their structures."""
    made = _empty("1.2.840.10008.5.1.4.1.1.481.3", "1.2.7.1", "1.2.7")
    made.Modality = "RTSTRUCT"
    made.StructureSetROISequence, made.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(structures.items(), 5):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber = number, name, number
        if contours:
            drawn.ContourSequence = contours
        made.StructureSetROISequence.append(roi)
        made.ROIContourSequence.append(drawn)
    made.save_as(path, enforce_file_format=True)
    return path


def seg(path: Path, slices: list[Dataset], masks: dict[str, np.ndarray], kind: str = "BINARY") -> Path:
    """Write structures by name, bool (X, Y, Z) on the grid of the slices."""
    told = [
        highdicom.seg.SegmentDescription(
            n, name, codes.SCT.Organ, codes.SCT.Organ, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for n, name in enumerate(masks, 1)
    ]
    array = np.stack([mask.T for mask in masks.values()], -1)
    array = array.astype(np.float32 if kind == "FRACTIONAL" else np.uint8)
    if kind == "LABELMAP":
        array = (array * np.arange(1, len(masks) + 1, dtype=np.uint8)).max(-1)
    highdicom.seg.Segmentation(
        slices, array, kind, told, "1.8", 1, "1.8.1", 1, "somebody", "something", "1", "1"
    ).save_as(path)
    return path


def _names(count: int) -> Iterator[str]:
    for n in np.random.default_rng(0).permutation(count):
        yield f"IM{n:05d}"


def _empty(kind: str, uid: str, series: str) -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID, made.file_meta.MediaStorageSOPInstanceUID = kind, uid
    made.SOPClassUID, made.SOPInstanceUID, made.SeriesInstanceUID = kind, uid, series
    made.StudyInstanceUID, made.FrameOfReferenceUID, made.Modality = "1.2.1", "1.2.2", "CT"
    made.PatientName, made.PatientID, made.PatientBirthDate = PATIENT, "4711", "19000101"
    made.StudyID, made.StudyDate, made.StudyTime, made.AccessionNumber, made.PatientSex = "", "", "", "", ""
    made.ReferringPhysicianName, made.SeriesNumber, made.InstanceNumber = "", 1, 1
    return made


def _pixels(made: Dataset, stored: np.ndarray, signed: bool, bits: int) -> None:
    made.Rows, made.Columns, made.SamplesPerPixel = stored.shape[1], stored.shape[0], 1
    made.PhotometricInterpretation, made.PixelRepresentation = "MONOCHROME2", int(signed)
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, bits, bits - 1
    made.PixelData = np.asarray(stored.T, np.int16 if signed else np.uint16).tobytes()
