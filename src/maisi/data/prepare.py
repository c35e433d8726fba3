"""From a case list to a prepared folder: read, orient, label, crop to the body, store as arrays. Knows no network.

Labels given in another vocabulary are translated; what they leave open is filled by the rule-based segmentation, so
that every CT comes with at least body, lungs, airway and skeleton.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import BACKGROUND
from maisi.data.label_maps import apply_map, label_table, merge
from maisi.data.manifest import Case, CaseList
from maisi.data.mask_import import read_our_labels, sides_fault
from maisi.data.prepared import PreparedCase, PreparedIndex
from maisi.data.preprocess import HU_MIN, STORED_HU, hu_fault, window_mr
from maisi.data.regions import regions_of
from maisi.data.segmentation import segment, with_organs
from maisi.errors import MaisiError
from maisi.io.files import INDEX, atomic_path, make_folder, write_json
from maisi.io.nifti import read_labels, read_volume, volume_sha256
from maisi.volume import Array, Volume

MARGIN_VOXELS = 6
"""Air kept around the body."""

GRID_TOLERANCE_MM = 0.5
"""How far apart the corners of image and label map may lie."""


def prepare(
    cases: CaseList,
    out: Path,
    validation_share: float = 0.15,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedIndex:
    """Prepare every case into `out` and write the index last.

    Cases that are already there are not made anew, unless their files or what the list says of them have changed.

    Args:
        cases: what to prepare.
        out: folder of arrays; made if it does not exist.
        validation_share: share of patients kept out of training, chosen by `seed` and patient.
        seed: of that choice.
        progress: called with (cases done, cases in all).

    Raises:
        MaisiError: a file cannot be read, or image and labels lie on different grids.
    """
    make_folder(out)
    splits = cases.split(validation_share, seed)
    rows = []
    for done, case in enumerate(cases.cases):
        row_file, digest = out / f"{case.id}.json", _made_of(case, cases.custom_labels)
        row = _kept_row(row_file, digest)
        if row is None:
            if row_file.exists():  # an index of other arrays must not speak of these
                (out / INDEX).unlink(missing_ok=True)
                row_file.unlink()
            row = prepare_case(case, splits[case.id], out, cases.custom_labels)
            write_json(row_file, {"made_of": digest, "case": row.model_dump(mode="json")})
        rows.append(row.model_copy(update={"split": splits[case.id]}))
        if progress:
            progress(done + 1, len(cases.cases))
    index = PreparedIndex(cases=tuple(rows), custom_labels=cases.custom_labels)
    write_json(out / INDEX, index.model_dump(mode="json"))
    return index


def _made_of(case: Case, custom: Mapping[int, str]) -> str:
    """Hash of all that decides what is prepared: the files' contents, and what the list says of the case."""
    said = case.model_dump(mode="json", exclude={"image", "labels", "split"})
    files = [volume_sha256(path) for path in case.files()]
    return hashlib.sha256(json.dumps([said, files, sorted(custom)]).encode()).hexdigest()


def _kept_row(path: Path, digest: str) -> PreparedCase | None:
    """What was prepared of the same before, if anything."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return PreparedCase.model_validate(stored["case"]) if stored["made_of"] == digest else None
    except (OSError, ValueError, KeyError):
        return None


def prepare_case(case: Case, split: str, out: Path, custom: Collection[int] = ()) -> PreparedCase:
    """Prepare one case: `ID.npy` (int16 HU for CT, float32 in [0, 1] for MR) and `ID-labels.npy` (uint8).

    `custom` are ids of classes of the user's own.
    """
    image = read_volume(case.image).to_ras()
    is_ct = case.modality.startswith("ct")
    if is_ct and (fault := hu_fault(image.array)):
        raise MaisiError(f"Case {case.id} does not hold HU: {fault}.")
    labels = label_map(case, image, custom) if is_ct else _given_labels(case, image, custom)
    if is_ct:
        array: Array = np.clip(np.rint(image.array), *STORED_HU).astype(np.int16)
        box = body_box(array > HU_MIN / 2)
    else:
        array = window_mr(image.array)
        box = body_box(array > 0.05)
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array([s.start for s in box])
    _store(out / f"{case.id}.npy", array[box])
    if labels is not None:
        _store(out / f"{case.id}-labels.npy", labels[box])
    found = () if labels is None else regions_of(labels, image.spacing_mm)
    return PreparedCase.model_validate(
        {
            "id": case.id,
            "patient": case.patient,
            "split": split,
            "image": f"{case.id}.npy",
            "labels": None if labels is None else f"{case.id}-labels.npy",
            "affine": affine.tolist(),
            "spacing_mm": image.spacing_mm,
            "shape": array[box].shape,
            "regions": found if case.regions is None else case.regions,
            "modality": case.modality,
            "weight": case.weight,
        }
    )


def label_map(case: Case, ct: Volume, custom: Collection[int] = ()) -> NDArray[np.uint8]:
    """Given labels in maisi's ids over rule-based ones over the body, on the grid of `ct`."""
    rules = segment(ct).array
    given = _given_labels(case, ct, custom)
    if given is None:
        return rules
    return merge([given, rules], body=with_organs(ct, rules != BACKGROUND, given))


def _given_labels(case: Case, image: Volume, custom: Collection[int]) -> NDArray[np.uint8] | None:
    if case.labels is None:
        return None
    ours = case.vocabulary == "maisi"
    labels = (read_our_labels(case.labels, custom) if ours else read_labels(case.labels)).to_ras()
    if not labels.same_grid(image, tolerance_mm=GRID_TOLERANCE_MM):
        raise MaisiError(
            f"Case {case.id}: labels ({labels.grid}) and image ({image.grid}) lie on different grids; "
            "resample the labels to the image first."
        )
    own = {id: id for id in custom} if ours else {}
    mapped = apply_map(labels.array, {**label_table(case.vocabulary), **own})
    if fault := sides_fault(labels.with_array(mapped)):
        raise MaisiError(f"Case {case.id}: {fault}")
    return mapped


def body_box(inside: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """Bounding box of `inside` with a margin; the whole array where nothing is inside."""
    if not inside.any():
        return (slice(0, inside.shape[0]), slice(0, inside.shape[1]), slice(0, inside.shape[2]))
    x, y, z = (
        slice(max(0, int(places[0]) - MARGIN_VOXELS), int(places[-1]) + 1 + MARGIN_VOXELS)
        for axis in range(3)
        for places in [np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))]
    )
    return (x, y, z)


def _store(path: Path, array: Array) -> None:
    with atomic_path(path) as part, part.open("wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
