"""A CT as a series of DICOM files, and its label map as one DICOM segmentation; the same volume gives the same bytes.

Every file says that its data are synthetic (0008,001C), and nothing of it comes from another DICOM file: names, dates
and identifiers are made here. Slices are axial, rows run to the patient's left, columns to his back.

Specification: DICOM PS3.3, A.3 (CT image), A.51 (segmentation).
"""

from __future__ import annotations

import datetime
import hashlib
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import maisi
from maisi.errors import MaisiError
from maisi.io.preview import label_color
from maisi.volume import RAS_TO_LPS, Volume

SCHEME = "99MAISI"
"""Designator of the label ids as codes; those that begin with 99 are private."""

_SHEARED = 1e-3
_LONGEST = 62
"""Characters of one line; 64 are allowed, and a name has two of its own."""

_MAKER = "maisi"


@dataclass(frozen=True)
class About:
    """What a series says of itself.

    Attributes:
        case: name and id of the patient there is not.
        description: of the series, at most 64 characters.
        comment: what it is, for people.
        model: what made it.
        made: when.
        key: what unique identifiers are made of: different for different data.
    """

    case: str
    description: str
    comment: str
    model: str
    made: datetime.datetime
    key: str

    @property
    def day(self) -> str:
        """The date, as DICOM writes it."""
        return f"{self.made.year:04d}{self.made:%m%d}"

    def line(self, text: str) -> str:
        """Text as one value of at most 64 characters: shortened so that different texts stay different."""
        clean = " ".join("".join(c if c.isprintable() and c not in "\\^=" else " " for c in text).split())
        return clean if len(clean) <= _LONGEST else f"{clean[: _LONGEST - 9]}~{_hash(clean.encode())[:8]}"

    def uid(self, *of: object) -> str:
        """A unique identifier (2.25.UUID, PS3.5 B.2), always the same one for the same thing."""
        digest = bytes.fromhex(_hash("/".join([_MAKER, self.key, *map(str, of)]).encode()))
        return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_ct(folder: Path, volume: Volume, about: About) -> tuple[Any, ...]:
    """Write a CT into a folder that is there, a file a slice.

    Args:
        folder: where 0001.dcm, 0002.dcm, ... come to lie, from the feet upward.
        volume: HU, int16.
        about: what it says of itself.

    Returns:
        The slices (`pydicom.Dataset`), for `write_segmentation`.

    Raises:
        MaisiError: axes that are not at right angles, a single slice, or other values than whole HU.
        OSError: they cannot be written.
    """
    array, affine = _axial(volume)
    if array.shape[2] < 2:
        raise MaisiError("A CT of a single slice makes no DICOM series; give one of at least two.")
    if array.dtype != np.int16:
        raise MaisiError(f"The CT is of {array.dtype}, not of whole HU (int16); write it with maisi first.")
    slices = []
    for z in range(array.shape[2]):
        made = _slice(array[:, :, z], affine, z, about)
        made.save_as(folder / f"{z + 1:04d}.dcm", enforce_file_format=True)
        slices.append(made)
    return tuple(slices)


def write_segmentation(
    path: Path, labels: Volume, names: Mapping[int, str], slices: Sequence[Any], about: About, tumors: Collection[int]
) -> None:
    """Write a label map as a DICOM segmentation, a segment for each label.

    Args:
        path: file to make.
        labels: uint8, on the grid of the CT that `slices` are of.
        names: id -> name, of the labels wanted.
        slices: what `write_ct` returned.
        about: what it says of itself.
        tumors: ids that are no anatomy.

    Raises:
        MaisiError: the package highdicom is missing.
        OSError: it cannot be written.
    """
    hd = require_package()
    from pydicom.sr.codedict import codes

    array, _ = _axial(labels)
    numbers = np.zeros(256, np.uint8)
    numbers[list(names)] = range(1, len(names) + 1)
    held = numbers[array.T]
    own = f"segmentation/{_hash(held.tobytes())}/{_hash(repr(sorted(names.items())).encode())}"
    algorithm = hd.AlgorithmIdentificationSequence(_MAKER, codes.DCM.ArtificialIntelligence, maisi.__version__)
    described = [
        hd.seg.SegmentDescription(
            segment_number=n,
            segment_label=about.line(name),
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure
            if id in tumors
            else codes.SCT.AnatomicalStructure,
            segmented_property_type=hd.sr.CodedConcept(str(id), SCHEME, about.line(name)),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            display_color=hd.color.CIELabColor.from_rgb(*(255 * channel for channel in label_color(id))),
        )
        for n, (id, name) in enumerate(names.items(), 1)
    ]
    made = hd.seg.Segmentation(
        source_images=list(slices),
        pixel_array=held,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=about.uid(own),
        series_number=2,
        sop_instance_uid=about.uid(own, "instance"),
        instance_number=1,
        manufacturer=_MAKER,
        manufacturer_model_name=about.line(about.model),
        software_versions=maisi.__version__,
        device_serial_number="0",
        content_description=about.description,
        series_description=about.description,
        content_date=about.made.date(),
        content_time=about.made.time(),
        coding_schemes=[hd.coding_schemes.CodingSchemeIdentificationItem(SCHEME, name="label ids of maisi")],
    )
    made.SyntheticData = "YES"
    del made.InstanceCreationDate, made.InstanceCreationTime
    for entry in made.get("ContributingEquipmentSequence", ()):
        entry.ContributionDateTime = f"{about.day}{about.made:%H%M%S}"
    organization = about.uid(own, "dimensions")
    for entry in (*made.DimensionOrganizationSequence, *made.DimensionIndexSequence):
        entry.DimensionOrganizationUID = organization
    made.save_as(path, enforce_file_format=True)


def require_package() -> Any:
    """Import highdicom, which is slow.

    Raises:
        MaisiError: it is missing.
    """
    try:
        import highdicom
        import highdicom.coding_schemes
    except ImportError:
        raise MaisiError(
            "Segmentations in DICOM need the package highdicom; install it with: pip install 'maisi[dicom]'"
        ) from None
    return highdicom


def _axial(volume: Volume) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The voxels toward Left, Posterior, Superior, as near as their axes are, and their affine in LPS+."""
    ras = volume.to_ras()
    axes = ras.affine[:3, :3] / np.array(ras.spacing_mm)
    if np.abs(axes.T @ axes - np.eye(3)).max() > _SHEARED:
        raise MaisiError("The volume's axes are not at right angles, which DICOM has no word for; resample it first.")
    turned = np.diag([-1.0, -1.0, 1.0, 1.0])
    turned[:2, 3] = ras.shape[0] - 1, ras.shape[1] - 1
    return ras.array[::-1, ::-1], RAS_TO_LPS @ ras.affine @ turned


def _slice(pixels: NDArray[Any], affine: NDArray[np.float64], z: int, about: About) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    across, down = (affine[:3, a] / spacing[a] for a in (0, 1))
    made = Dataset()
    made.SpecificCharacterSet = "ISO_IR 192"
    made.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    made.SOPClassUID, made.SOPInstanceUID = CTImageStorage, about.uid("ct", z)
    made.SyntheticData = "YES"
    made.StudyInstanceUID, made.SeriesInstanceUID = about.uid("study"), about.uid("ct")
    made.FrameOfReferenceUID, made.PositionReferenceIndicator = about.uid("frame"), ""
    made.AccessionNumber = made.StudyID = made.ReferringPhysicianName = ""
    made.StudyDate, made.StudyTime = about.day, f"{about.made:%H%M%S}"
    made.PatientName, made.PatientID = f"{about.line(about.case)}^", about.line(about.case)
    made.PatientBirthDate = made.PatientSex = ""
    made.PatientIdentityRemoved, made.DeidentificationMethod = "YES", "no field of a patient was read"
    made.Modality, made.SeriesNumber, made.InstanceNumber, made.AcquisitionNumber = "CT", 1, z + 1, None
    made.StudyDescription = made.SeriesDescription = about.description
    made.Manufacturer, made.ManufacturerModelName, made.SoftwareVersions = (
        _MAKER,
        about.line(about.model),
        maisi.__version__,
    )
    made.ImageComments = made.DerivationDescription = about.comment
    made.BurnedInAnnotation, made.LossyImageCompression = "NO", "00"
    made.KVP, made.PatientPosition = None, "HFS"
    made.ImageOrientationPatient = [_decimal(v) for v in (*across, *down)]
    made.ImagePositionPatient = [_decimal(v) for v in affine[:3, 3] + z * affine[:3, 2]]
    made.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
    made.SliceThickness = made.SpacingBetweenSlices = _decimal(spacing[2])
    made.Columns, made.Rows = pixels.shape
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 1
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    made.RescaleIntercept, made.RescaleSlope, made.RescaleType = 0, 1, "HU"
    made.WindowCenter, made.WindowWidth = 40, 400
    made.PixelData = np.ascontiguousarray(pixels.T, "<i2").tobytes()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return made


def _decimal(value: float) -> str:
    """A decimal string, of at most 16 characters."""
    return next(text for digits in range(12, 5, -1) if len(text := f"{value:.{digits}g}") <= 16)
