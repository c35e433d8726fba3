"""Masks with a class of one's own, and the case list: `python cases.py CTS TABLE.json WORK`.

CTS holds `NAME_ct.nii.gz` and `NAME_labels.nii.gz`; TABLE.json says what the masks' values mean (`maisi mask import`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from maisi.data.label_maps import custom_vocabulary
from maisi.data.manifest import Case, CaseList, write_cases
from maisi.data.mask_import import Source, import_masks
from maisi.io.nifti import read_label_names, read_labels, read_volume, write_volume


def main(cts: Path, table: Path, work: Path) -> None:
    """Import every mask and write `cases.json`."""
    (work / "masks").mkdir(parents=True, exist_ok=True)
    values = json.loads(table.read_text(encoding="utf-8"))
    cases, own = [], dict[int, str]()
    for image in sorted(cts.glob("*_ct.nii.gz")):
        name = image.name.removesuffix("_ct.nii.gz")
        labels, mask = cts / f"{name}_labels.nii.gz", work / "masks" / f"{name}.nii.gz"
        names = read_label_names(labels)
        words = custom_vocabulary(values, str(table), names)
        own |= words.custom
        if not mask.exists():
            source = Source(labels=read_labels(labels), vocabulary=words, name=str(labels), names=names)
            result, report = import_masks([source], read_volume(image))
            write_volume(mask, result, description="labels imported by maisi", synthetic=False, names=report.names)
        cases.append(Case(id=name, patient=name, image=image.resolve(), labels=mask.resolve()))
    write_cases(work / "cases.json", CaseList(cases=tuple(cases), custom_labels=own))
    print(f"{len(cases)} cases; new: {own}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
