"""Sets of CT to judge, wherever they come from: generations, prepared folders, case lists, files. Knows no measure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from maisi.data.manifest import Case, read_cases
from maisi.data.prepare import label_map
from maisi.data.prepared import INDEX, PreparedCase, PreparedFolder, Split
from maisi.data.preprocess import STORED_HU, hu_fault
from maisi.errors import MaisiError
from maisi.io.nifti import read_labels, read_volume
from maisi.volume import Volume
from maisi.weights.tensor_file import sha256

IMAGE, LABELS, RECORD = "image.nii.gz", "labels.nii.gz", "record.json"
"""What a generated item's folder holds."""

ENDINGS = (".nii.gz", ".nii", ".nrrd")


@dataclass(frozen=True)
class SetImage:
    """One CT of a set; voxels are read when they are asked for.

    Attributes:
        name: for tables; unique in its set.
        patient: whose image it is; where nobody knows, the name.
        files: what it is read from.
        ct: reads the CT, in HU.
        labels: reads the label map on the same grid, in maisi's ids; None where there is none.
    """

    name: str
    patient: str
    files: tuple[Path, ...]
    ct: Callable[[], Volume]
    labels: Callable[[], Volume] | None = None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the files: what is computed from them may be kept under it."""
        return hashlib.sha256("".join(sha256(file) for file in self.files).encode()).hexdigest()


def find_images(sources: Sequence[Path], split: Split | None = None) -> tuple[SetImage, ...]:
    """List the CT of one or more sources; what is no CT is left out.

    Args:
        sources: each a generated item or a folder of them, a prepared folder, a case list (JSON), a volume or a folder
            of volumes.
        split: of prepared folders and case lists that have one: which side; None takes both.

    Raises:
        MaisiError: a source holds no CT, or an index or a case list cannot be read.
    """
    found: list[SetImage] = []
    for source in sources:
        images = _images_of(source, split)
        if not images:
            side = f" for {split}" if split else ""
            raise MaisiError(f"{source} holds no CT{side}; give generated items, a prepared folder, cases or volumes.")
        prefix = f"{source.resolve().name}/" if len(sources) > 1 else ""
        found += [_renamed(image, prefix + image.name) for image in images]
    names = [image.name for image in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise MaisiError(f"'{double}' is named by two sources; give each once, and folders of different names.")
    return tuple(found)


def _images_of(source: Path, split: Split | None) -> list[SetImage]:
    if source.name.endswith(ENDINGS):
        return [_file(source)]
    if source.suffix == ".json":
        cases = read_cases(source)
        return [_listed(case) for case in cases.cases if case.modality.startswith("ct") and split in (None, case.split)]
    if not source.is_dir():
        raise MaisiError(f"{source} is neither a folder nor a volume nor a case list; give one of them.")
    if (source / INDEX).exists():
        folder = PreparedFolder(source)
        chosen = folder.index.cases if split is None else folder.cases(split)
        return [_prepared(folder, case) for case in chosen if case.is_ct]
    if (source / IMAGE).exists():
        return [_item(source)]
    items = [path.parent for path in sorted(source.glob(f"*/{IMAGE}")) if ".part-" not in path.parent.name]
    if items:
        return [_item(folder) for folder in items if _is_ct(folder)]
    return [_file(path) for path in sorted(source.iterdir()) if path.name.endswith(ENDINGS)]


def _renamed(image: SetImage, name: str) -> SetImage:
    patient = name if image.patient == image.name else image.patient
    return SetImage(name, patient, image.files, image.ct, image.labels)


def _file(path: Path) -> SetImage:
    name = path.name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return SetImage(name, name, (path,), partial(_read_ct, path))


def _read_ct(path: Path) -> Volume:
    volume = read_volume(path)
    if fault := hu_fault(volume.array):
        raise MaisiError(f"{path} is no CT in HU: {fault}.")
    return volume


def _item(folder: Path) -> SetImage:
    image, labels = folder / IMAGE, folder / LABELS
    has = labels.exists()
    files = (image, labels) if has else (image,)
    name = folder.resolve().name
    return SetImage(name, name, files, partial(_read_ct, image), partial(read_labels, labels) if has else None)


def _is_ct(folder: Path) -> bool:
    """Whether a generated item is a CT; one without a record is taken for one."""
    try:
        request = json.loads((folder / RECORD).read_text(encoding="utf-8"))["request"]
        return str(request.get("modality", "ct")).startswith("ct")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def _prepared(folder: PreparedFolder, case: PreparedCase) -> SetImage:
    affine = np.array(case.affine)
    names = (case.image,) if case.labels is None else (case.image, case.labels)
    return SetImage(
        name=case.id,
        patient=case.patient,
        files=tuple(folder.folder / name for name in names),
        ct=lambda: Volume(np.array(folder.image(case)), affine),
        labels=None if case.labels is None else lambda: Volume(np.array(folder.labels(case)), affine),
    )


def _listed(case: Case) -> SetImage:
    return SetImage(case.id, case.patient, case.files(), partial(_listed_ct, case), partial(_listed_labels, case))


def _listed_ct(case: Case) -> Volume:
    image = read_volume(case.image).to_ras()
    return image.with_array(np.clip(np.rint(image.array), *STORED_HU).astype(np.int16))


def _listed_labels(case: Case) -> Volume:
    """Given labels over rule-based ones, as `maisi prepare` makes them."""
    image = _listed_ct(case)
    return image.with_array(label_map(case, image))
