"""Generated items as DICOM: for each a series of CT and, where it has a mask, a segmentation. Imports no torch.

For what takes DICOM and nothing else: treatment planning, archives, viewers of clinics. `export.json` beside the cases
says what they are; so does each file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import maisi
from maisi.anatomy import BACKGROUND, TUMORS
from maisi.data.label_maps import ids_in
from maisi.errors import MaisiError
from maisi.generation.export import (
    DESCRIPTION,
    EXPORT_FILE,
    PAINTED_DESCRIPTION,
    Pair,
    Report,
    chosen,
    find_items,
    id_in,
    name_in,
    own_names,
)
from maisi.generation.masks import only
from maisi.generation.output import IMAGE, LABELS, RECORD
from maisi.io.dicom_write import About, require_package, write_ct, write_segmentation
from maisi.io.files import new_folder, sha256, write_json
from maisi.io.nifti import read_labels, read_volume

SERIES_FOLDER, SEGMENTATION = "ct", "segmentation.dcm"


@dataclass(frozen=True)
class DicomExported:
    """What an export did.

    Attributes:
        folder: with a folder for each case.
        cases: their names.
        segmented: how many have a segmentation.
        not_passed: items that did not pass their check: left out or not, as was asked for.
    """

    folder: Path
    cases: tuple[str, ...]
    segmented: int
    not_passed: int


def export_dicom(
    folders: Sequence[Path],
    out: Path,
    keep: Sequence[int | str] | None = None,
    report: Report | None = None,
    passed: bool = False,
) -> DicomExported:
    """Write the items in `folders` as DICOM; the new folder is there whole or not at all.

    Args:
        folders: output folders of `maisi generate` or `maisi inpaint`, or items in them.
        out: folder to make: CASE/ct/0001.dcm and so on, CASE/segmentation.dcm.
        keep: ids or names of the labels wanted; None keeps all. A tumour that is not kept counts as the organ that it
            grows in.
        report: called with the case, how many are done, and how many there are.
        passed: leave out items that did not pass their check.

    Raises:
        MaisiError: no items, MR, masks that all lack a label wanted, a package is missing, or a place that cannot be
            written to.
    """
    items, not_passed = chosen(find_items(folders), passed, "items")
    if others := sorted({item.modality for item in items} - {"CT"}):
        raise MaisiError(f"The folders hold {others[0]}; only CT is written as DICOM.")
    masked = [item for item in items if item.masked]
    if masked:
        require_package()
    if keep is not None and not keep:
        raise MaisiError("No label is named to be kept; leave --keep out to keep all.")
    names = own_names(masked)
    wanted = None if keep is None else [id_in(label, names) for label in keep]
    held = {item: [id for id in ids_in(read_labels(item.folder / LABELS).array) if id != BACKGROUND] for item in masked}
    lacking = [id for id in wanted or () if not any(id in ids for ids in held.values())]
    if lacking:
        raise MaisiError(f"No mask holds '{name_in(lacking[0], names)}'; leave it out of --keep.")
    segmented = 0
    with new_folder(out) as part:
        for done, item in enumerate(items, 1):
            about = _about(item)
            series = part / item.name / SERIES_FOLDER
            series.mkdir(parents=True)
            slices = write_ct(series, read_volume(item.folder / IMAGE), about)
            own = held.get(item, [])
            kept = own if wanted is None else [id for id in wanted if id in own]
            if kept:
                labels = read_labels(item.folder / LABELS)
                labels = labels.with_array(only(labels.array, kept, labels.spacing_mm))
                called = {id: name_in(id, names) for id in kept}
                write_segmentation(part / item.name / SEGMENTATION, labels, called, slices, about, TUMORS.keys())
                segmented += 1
            if report is not None:
                report(item.name, done, len(items))
        write_json(part / EXPORT_FILE, _note(items))
    return DicomExported(out, tuple(item.name for item in items), segmented, not_passed)


def _about(item: Pair) -> About:
    """What an item's files say of themselves; its record says when it was made, and by which model."""
    record = json.loads((item.folder / RECORD).read_text(encoding="utf-8"))
    try:
        made, model = datetime.fromisoformat(record["created"]), Path(record["request"]["model"]).name
    except (KeyError, TypeError, ValueError) as error:
        raise MaisiError(f"{item.folder / RECORD} is damaged ({error!r}); remove the item and make it again.") from None
    return About(
        case=item.name,
        description="Synthetic CT by maisi" if item.synthetic else "CT with tissue painted in by maisi",
        comment="SYNTHETIC: no patient is shown. Not for diagnosis."
        if item.synthetic
        else "PARTLY SYNTHETIC: maisi painted tissue into it. Not for diagnosis.",
        model=model,
        made=made,
        key=f"{item.name}/{sha256(item.folder / IMAGE)}",
    )


def _note(items: Sequence[Pair]) -> dict[str, object]:
    synthetic = all(item.synthetic for item in items)
    return {
        "synthetic": synthetic,
        "description": DESCRIPTION if synthetic else PAINTED_DESCRIPTION,
        "made_by": f"maisi {maisi.__version__}",
        "format": "dicom",
        "cases": {item.name: str(item.folder) for item in items},
    }
