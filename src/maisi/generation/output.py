"""The folder of a generation: `request.json`, and a folder for each item, whole or not there. Imports no torch.

A folder that was made for the same request is gone on with: items that are there are kept, the others are made. How
many items, and from which on, may differ, and where files are called from: their hashes are compared.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maisi.anatomy import label_name, label_names, modality_name
from maisi.data.label_maps import ids_in
from maisi.errors import MaisiError
from maisi.io.files import locked, make_folder, new_folder, remove, write_json
from maisi.io.nifti import write_volume
from maisi.io.record import write_record
from maisi.request import Request
from maisi.volume import Volume

REQUEST_FILE = "request.json"
IMAGE, LABELS, RECORD, PREVIEW = "image.nii.gz", "labels.nii.gz", "record.json", "preview.png"
"""What an item's folder holds."""

DAMAGED = f"{RECORD} is damaged."
"""What is said against an item whose record `record_in` cannot read."""

PAINTED = "CT with tissue painted into it by maisi"
"""What such an image says of itself."""


@dataclass(frozen=True)
class Item:
    """One generated volume.

    Attributes:
        image: int16; CT in HU.
        labels: the mask it follows, on the same grid, or None.
        request: what was asked for.
        number: which item of the request it is, from 0.
        seed: seed of its noise, made of the request's seed, `number` and, where it was made again, the attempt.
        timings_s: stage -> seconds.
        weights_sha256: file name of each network used -> hash.
        peak_memory_bytes: the most memory the process has used.
        custom_labels: names of label ids that only the model knows.
        details: what was decided for it: size, spacing, regions, steps, solver, device.
        synthetic: whether nobody's body is shown; not so where tissue was painted into a given CT.
    """

    image: Volume
    labels: Volume | None
    request: Request
    number: int
    seed: int
    timings_s: Mapping[str, float] = field(default_factory=dict)
    weights_sha256: Mapping[str, str] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    custom_labels: Mapping[int, str] = field(default_factory=dict)
    synthetic: bool = True

    def save(self, folder: Path | str, parents: bool = True) -> Path:
        """Write the item to a new folder (see `save_item`) and return it; `parents`: with those that it lies in."""
        if parents:
            make_folder(Path(folder).parent)
        return save_item(Path(folder), self)


def save_item(folder: Path, item: Item) -> Path:
    """Make `folder` with image.nii.gz, labels.nii.gz (with a mask), preview.png and record.json, all or nothing.

    Raises:
        MaisiError: the folder exists or cannot be written to.
    """
    from maisi.io.preview import preview

    with new_folder(folder) as part:
        said = f"synthetic {modality_name(item.request.modality)} made by maisi" if item.synthetic else PAINTED
        write_volume(part / IMAGE, item.image, description=said, synthetic=item.synthetic)
        if item.labels is not None:
            ids = ids_in(item.labels.array)
            names = label_names(ids) | {id: name for id, name in item.custom_labels.items() if id in ids}
            write_volume(part / LABELS, item.labels, description=said, synthetic=item.synthetic, names=names)
        preview(part / PREVIEW, item.image, item.labels, title=_title(item))
        write_record(
            part / RECORD,
            item.request,
            item=item.number,
            seed=item.seed,
            weights_sha256=item.weights_sha256,
            timings_s=item.timings_s,
            peak_memory_bytes=item.peak_memory_bytes,
            details=item.details,
            synthetic=item.synthetic,
        )
    return folder


@dataclass(frozen=True)
class Destination:
    """Where a request's items go.

    Attributes:
        folder: the output folder.
        order: what `request.json` holds.
        missing: numbers of the items that are not there yet.
    """

    folder: Path
    order: Mapping[str, Any]
    missing: tuple[int, ...]

    def item_folder(self, number: int) -> Path:
        """Folder of one item."""
        return self.folder / f"{number:04d}"

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Make the folder with its `request.json`, or clear what a killed process left half-written in it.

        Inside the block no other process may begin in this folder.

        Raises:
            MaisiError: another one has, or the folder cannot be made.
        """
        if not self.folder.exists():
            try:
                with new_folder(self.folder) as part:
                    write_json(part / REQUEST_FILE, dict(self.order))
            except MaisiError:
                if not _alike(_read_order(self.folder), self.order):  # else another process was quicker
                    raise
        with locked(self.folder, f"Another command is writing to {self.folder}; wait for its end."):
            if _read_order(self.folder) != dict(self.order):
                write_json(self.folder / REQUEST_FILE, dict(self.order))
            for leftover in self.folder.glob("*.part-*"):
                remove(leftover)
            yield

    def withdraw(self) -> None:
        """After a failure: remove the folder if it holds no item yet."""
        if [path.name for path in self.folder.iterdir()] == [REQUEST_FILE]:
            shutil.rmtree(self.folder, ignore_errors=True)


def destination(folder: Path, order: Mapping[str, Any], numbers: range) -> Destination:
    """Look at an output folder, and write nothing.

    Args:
        folder: new, or made for the same order before.
        order: JSON values that decide every byte of the items.
        numbers: the items wanted.

    Raises:
        MaisiError: the folder holds something else, or cannot be made.
    """
    if os.path.lexists(folder):
        before = _read_order(folder)
        if not _alike(before, order):
            raise MaisiError(
                f"{folder} exists and was not made by this request{_difference(before, order)}; choose another folder "
                "or remove it."
            )
    elif not folder.parent.is_dir():
        raise MaisiError(f"The folder {folder.parent} does not exist; make it first or choose another place.")
    place = folder if folder.is_dir() else folder.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise MaisiError(f"The folder {place} is not writable; choose a place you may write to.")
    whole = Destination(folder, order, tuple(numbers))
    return Destination(folder, order, tuple(n for n in numbers if not whole.item_folder(n).exists()))


def faults_of(record: Mapping[str, Any]) -> list[str]:
    """What an item's record says against it, in sentences: its quality check, tumours, structures that are missing."""
    quality = record.get("quality") or {}
    faults = [finding["sentence"] for finding in quality.get("findings", ()) if not finding["passed"]]
    if record.get("contrast_as_usual") is False:
        hu = ", ".join(f"{label_name(int(id))} {value:+.0f} HU" for id, value in record["contrast_hu"].items())
        faults.append(f"A tumour's contrast to its host is not that of its kind ({hu}).")
    faults += [f"There is no {name}, which was asked for." for name in record.get("missing") or ()]
    return faults


def record_in(item: Path) -> tuple[Mapping[str, Any], list[str]] | None:
    """An item's record, and what it says against it; None where it is missing or damaged."""
    try:
        record = json.loads((item / RECORD).read_text(encoding="utf-8"))
        return record, faults_of(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def items_in(folder: Path) -> list[Path]:
    """The folders of the items that an output folder has, those half-written left out."""
    found = sorted(record.parent for record in folder.glob(f"*/{RECORD}"))
    return [item for item in found if ".part-" not in item.name]


def _read_order(folder: Path) -> Any:
    try:
        return json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


FREE = ("first", "count", "mask", "image", "library", "ranges")
"""Settings that decide no item's bytes: which items are made, and what files are called, whose hashes stand beside."""


def _alike(before: Any, order: Mapping[str, Any]) -> bool:
    """Whether a folder's order makes the same items."""
    return isinstance(before, dict) and isinstance(before.get("request"), dict) and not _apart(before, order)


def _apart(before: Mapping[str, Any], order: Mapping[str, Any]) -> list[str]:
    """The settings in which two orders differ so that items do, sorted."""
    around = [{**one, "request": None} for one in (before, order)]
    asked = [dict(one.get("request") or {}) for one in (before, order)]
    return sorted(
        name
        for first, second in (around, asked)
        for name in (first.keys() | second.keys()) - set(FREE)
        if first.get(name) != second.get(name)
    )


def _difference(before: Any, order: Mapping[str, Any]) -> str:
    """The settings in which a folder's order differs, for a sentence; "" where the folder has none."""
    apart = _apart(before, order) if isinstance(before, dict) else []
    return f" (they differ in {', '.join(apart)})" if apart else ""


def _title(item: Item) -> str:
    regions = ", ".join(item.details.get("regions", ())) or "region not given"
    size = " x ".join(str(n) for n in item.image.shape)
    spacing = " x ".join(f"{s:.3g}" for s in item.image.spacing_mm)
    kind = "Synthetic" if item.synthetic else "Painted into a given CT"
    return f"{kind}: {regions}; {size} voxels of {spacing} mm; seed {item.request.seed}, item {item.number}"
