"""Write the case list of the carried model from the folder of real CT: `python recipes/tiny/cases.py DATA cases.json`.

DATA holds `openkbp/` (head and neck), `torso/` and `totalsegmentator/`: `*_ct.nii.gz` with optional `*_labels.nii.gz`.
Which patients are kept out of training is fixed here, so that every stage and every measurement agrees on it.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from maisi.data.manifest import Case, CaseList, write_cases

ENDING = "_ct.nii.gz"
ONE_PATIENT = ("lungpetctdx_A0001", "acrin_flt_001", "heart")
"""Beginnings of file names that belong to one patient each (the two heart crops may)."""

KEPT_OUT = {"nlst_149872", "lungpetctdx_A0002"}
TRUNK_WEIGHT = 8.0
"""A trunk counts as many head-and-neck cases: there are twelve of them and 244 of those."""


def case_of(path: Path) -> Case:
    """One row of the list."""
    name = path.name.removesuffix(ENDING)
    patient = next((start for start in ONE_PATIENT if name.startswith(start)), name)
    labels = path.with_name(f"{name}_labels.nii.gz")
    head_neck = path.parent.name == "openkbp"
    return Case(
        id=name,
        patient=patient,
        image=path,
        labels=labels if labels.is_file() else None,
        vocabulary="openkbp" if head_neck else "totalsegmentator" if labels.is_file() else "maisi",
        regions=("head-neck",) if head_neck else ("chest",) if patient == "heart" else None,
        weight=1.0 if head_neck else TRUNK_WEIGHT,
        split="validation" if is_kept_out(patient, head_neck) else "train",
    )


def is_kept_out(patient: str, head_neck: bool) -> bool:
    """About 15 % of the head-and-neck patients, by a hash of their name; the trunks by name."""
    if not head_neck:
        return patient in KEPT_OUT
    return int(hashlib.sha256(patient.encode()).hexdigest(), 16) % 100 < 15


def main(data: Path, out: Path) -> None:
    """Write the list."""
    images = sorted(
        path for folder in ("openkbp", "torso", "totalsegmentator") for path in (data / folder).glob(f"*{ENDING}")
    )
    cases = CaseList(cases=tuple(case_of(path) for path in images))
    write_cases(out, cases)
    kept_out = sum(case.split == "validation" for case in cases.cases)
    print(f"{len(cases.cases)} cases, {kept_out} of them kept out of training")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
