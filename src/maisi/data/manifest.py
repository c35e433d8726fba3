"""Case lists: which images, labels and patients a data set has, as one JSON file; and its patient-wise split.

    {"version": 1, "cases": [{"id": "a1", "patient": "a", "image": "a1_ct.nii.gz", "labels": "a1_mask.nii.gz",
                              "vocabulary": "totalsegmentator", "regions": ["chest"], "modality": "ct"}, ...]}

Paths are relative to the file. Unknown keys, double ids and missing files are errors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from maisi.anatomy import custom_labels, parse_modality, sort_regions
from maisi.config import Config, parse_config
from maisi.data.label_maps import VOCABULARIES
from maisi.errors import MaisiError
from maisi.io.files import write_json

Split = Literal["train", "validation"]

_SHOWN = 5


class Case(Config):
    """One image of one patient.

    Attributes:
        id: unique; letters, digits, '-', '_' and '.' only, since files are named after it.
        patient: whose image it is; all images of a patient land on the same side of a split.
        image: CT or MR file, or folder of a Zarr or a DICOM series.
        labels: label map on the image's grid, or None.
        vocabulary: what the label ids mean, one of `label_maps.VOCABULARIES`.
        regions: body regions it covers; None lets the labels tell.
        modality: a key of `anatomy.MODALITIES`.
        weight: how often the case is seen in training, relative to others.
        split: fixes the side of a split; None leaves it to the hash. One patient's cases must agree.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    patient: str = Field(min_length=1)
    image: Path
    labels: Path | None = None
    vocabulary: str = "maisi"
    regions: tuple[str, ...] | None = None
    modality: str = "ct"
    weight: float = Field(default=1.0, gt=0)
    split: Split | None = None

    @field_validator("vocabulary")
    @classmethod
    def _known_vocabulary(cls, name: str) -> str:
        if name not in VOCABULARIES:
            raise ValueError(f"unknown label vocabulary '{name}'; choose from {', '.join(VOCABULARIES)}")
        return name

    @field_validator("regions")
    @classmethod
    def _known_regions(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        try:
            return None if names is None else sort_regions(names)
        except MaisiError as error:
            raise ValueError(str(error)) from None

    @field_validator("modality")
    @classmethod
    def _known_modality(cls, name: str) -> str:
        try:
            return parse_modality(name)
        except MaisiError as error:
            raise ValueError(str(error)) from None

    def files(self) -> tuple[Path, ...]:
        """Return the image and, where there is one, the label map."""
        return (self.image,) if self.labels is None else (self.image, self.labels)


class CaseList(Config):
    """Cases in a fixed order, at least one; ids are unique.

    Attributes:
        cases: what there is.
        custom_labels: names of classes of one's own, id -> name; their ids stand in masks of the vocabulary "maisi".
    """

    version: Literal[1] = 1
    cases: tuple[Case, ...]
    custom_labels: dict[int, str] = Field(default={})

    @field_validator("custom_labels")
    @classmethod
    def _free_ids(cls, labels: dict[int, str]) -> dict[int, str]:
        try:
            return custom_labels(labels)
        except MaisiError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _some_and_unique(self) -> CaseList:
        if not self.cases:
            raise ValueError("there are no cases in it; list at least one")
        double = [id for id, count in Counter(case.id for case in self.cases).items() if count > 1]
        if double:
            raise ValueError(f"the id '{double[0]}' stands there twice; give each case its own")
        fixed = {(case.patient, case.split) for case in self.cases if case.split is not None}
        torn = [patient for patient, count in Counter(patient for patient, _ in fixed).items() if count > 1]
        if torn:
            raise ValueError(f"patient '{torn[0]}' is fixed to both sides of the split; choose one")
        return self

    def split(self, validation_share: float = 0.15, seed: int = 0) -> dict[str, Split]:
        """Say for each case id whether it is for training or validation.

        A hash of seed and patient decides, so a patient never stands on both sides, the order of the list does not
        matter, and cases that are added later move nobody. With two patients or more and a share above 0 at least
        one is kept out, and at least one is not.

        Patients whose side a case fixes stand there.

        Raises:
            MaisiError: a share outside [0, 1).
        """
        if not 0 <= validation_share < 1:
            raise MaisiError(f"The validation share is {validation_share}; give a number from 0 to below 1.")
        fixed = {case.patient: case.split for case in self.cases if case.split is not None}
        patients = sorted(
            {case.patient for case in self.cases} - fixed.keys(), key=lambda name: _hash_fraction(name, seed)
        )
        count = sum(_hash_fraction(name, seed) < validation_share for name in patients)
        if validation_share > 0 and len(patients) > 1:
            count = min(max(count, 1), len(patients) - 1)
        kept_out = {*patients[:count], *(patient for patient, side in fixed.items() if side == "validation")}
        return {case.id: "validation" if case.patient in kept_out else "train" for case in self.cases}


def read_cases(path: Path) -> CaseList:
    """Read a case list; paths become absolute, and every file named must exist.

    Raises:
        MaisiError: no such file, not JSON, unknown keys, wrong values, or files that are missing (the first five
            are named).
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MaisiError(f"Cannot read {path}: {error.strerror}; give the path of a case list.") from None
    except ValueError as error:
        raise MaisiError(f"{path} is not JSON ({error}); correct it there.") from None
    listed = parse_config(CaseList, values, str(path))
    cases = listed.model_copy(update={"cases": tuple(_anchored(case, path.parent) for case in listed.cases)})
    missing = [str(file) for case in cases.cases for file in case.files() if not file.exists()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise MaisiError(
            f"{path} names files that don't exist: {', '.join(missing[:_SHOWN])}{more}; correct the paths."
        )
    return cases


def write_cases(path: Path, cases: CaseList) -> None:
    """Write a case list as JSON, atomically, with paths relative to it, so that the folder can be moved."""
    rows = []
    for case in cases.cases:
        row = case.model_dump(mode="json", exclude_defaults=True)
        for key, file in zip(("image", "labels"), case.files(), strict=False):
            row[key] = Path(os.path.relpath(file, path.parent)).as_posix()
        rows.append(row)
    own = {"custom_labels": cases.custom_labels} if cases.custom_labels else {}
    write_json(path, {"version": cases.version, **own, "cases": rows})


def _anchored(case: Case, folder: Path) -> Case:
    """Return the case with paths relative to `folder` made absolute."""
    image, *labels = (Path(os.path.abspath(folder / file)) for file in case.files())
    return case.model_copy(update={"image": image, "labels": labels[0] if labels else None})


def _hash_fraction(patient: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
