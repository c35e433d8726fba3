"""The CTs that an evaluation looks at, found in files and folders of several kinds. Knows no measure, no torch.

A folder is a prepared folder (it has `index.json`), one generated item or a folder of such (`image.nii.gz` with or
without `labels.nii.gz`), or a folder of volumes, of which a folder of DICOM files is one; a file, a Zarr or a folder of
DICOM files is a volume; or it is a case list (JSON).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import CUSTOM_IDS
from maisi.data.manifest import Case, read_cases
from maisi.data.mask_import import read_our_labels
from maisi.data.prepare import GRID_TOLERANCE_MM, label_map
from maisi.data.prepared import PreparedCase, PreparedFolder
from maisi.data.preprocess import hu_fault
from maisi.errors import MaisiError
from maisi.generation.output import IMAGE, LABELS, RECORD
from maisi.io.dicom import holds_slices, is_dicom
from maisi.io.files import INDEX, VOLUME_ENDINGS, is_volume
from maisi.io.nifti import read_header, read_label_names, read_labels, read_volume, volume_sha256
from maisi.volume import Volume

SPLITS = ("train", "validation", "all")

_CHANNEL = "_0000"
"""What nnU-Net's layout has at the end of an image's name and not of its label map's."""

_SHOWN = 5
_TOLERANCE_MM = 1e-2


@dataclass(frozen=True)
class Entry:
    """One CT on the disk.

    Attributes:
        name: of the volume, unique in its set.
        patient: whose it is; the name, where nothing tells.
        image: a volume (of a Zarr or a DICOM series the folder), or an array (.npy) of a prepared folder.
        labels: its label map, of the same kind, or None.
        affine: of a prepared folder's arrays, 4 rows of 4; None: the files say it themselves.
        custom_labels: names of the own classes of a prepared folder or a case list, id -> name.
        case: of a case list, or None; its label map is made as `maisi prepare` makes it.
    """

    name: str
    patient: str
    image: Path
    labels: Path | None = None
    affine: tuple[tuple[float, ...], ...] | None = None
    custom_labels: Mapping[int, str] = field(default_factory=dict)
    case: Case | None = None

    def check(self) -> None:
        """Look at the headers alone.

        Raises:
            MaisiError: a file can't be read, or image and label map lie on different grids.
        """
        if self.affine is not None:
            self._mapped(self.image)
            return
        image = read_header(self.image)
        if self.labels is None:
            return
        labels = read_header(self.labels)
        apart = _corners(image.shape, image.affine)[:, None] - _corners(labels.shape, labels.affine)[None]
        nearest = np.linalg.norm(apart, axis=2).min(axis=1).max()
        tolerance_mm = _TOLERANCE_MM if self.case is None else GRID_TOLERANCE_MM
        if sorted(image.shape) != sorted(labels.shape) or nearest > tolerance_mm:
            raise self._no_pair()

    def require_whole(self) -> None:
        """Read all voxels, and keep none.

        Raises:
            MaisiError: a file is damaged, the CT's values can't be HU, or the label map's are no labels.
        """
        self.ct()
        self._stored_labels()

    def ct(self) -> Volume:
        """Read the CT in HU, in the orientation it is stored in.

        Raises:
            MaisiError: it can't be read, or its values can't be HU.
        """
        volume = read_volume(self.image) if self.affine is None else self._mapped(self.image)
        fault = hu_fault(volume.array)
        if fault:
            raise MaisiError(f"{self.image} is no CT in HU: {fault}.")
        return volume

    def label_names(self) -> dict[int, str]:
        """Names that the folder, the list or the label map's header gives to ids; {} where they give none."""
        if self.labels is None or self.affine is not None or self.case is not None:
            return dict(self.custom_labels)
        return read_label_names(self.labels)

    def pair(self) -> tuple[Volume, Volume | None]:
        """Read the CT and its label map, both RAS+ and on one grid; None stands for no label map.

        Raises:
            MaisiError: as `ct`, or the label map can't be read or lies on a different grid.
        """
        ct = self.ct().to_ras()
        if self.case is not None:
            return ct, ct.with_array(label_map(self.case, ct, self.custom_labels))
        labels = self._stored_labels()
        if labels is None:
            return ct, None
        labels = labels.to_ras()
        if not ct.same_grid(labels, _TOLERANCE_MM):
            raise self._no_pair()
        return ct, labels

    @property
    def has_labels(self) -> bool:
        """Whether `pair` gives a label map."""
        return self.labels is not None or self.case is not None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it is made of."""
        return (self.image,) if self.labels is None else (self.image, self.labels)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides what is read: what is computed from that may be kept under it.

        Raises:
            MaisiError: a file can't be read.
        """
        vocabulary = None if self.case is None else self.case.vocabulary
        how = [self.affine, vocabulary, sorted(self.custom_labels.items())]
        return hashlib.sha256(json.dumps([*map(volume_sha256, self.files), how]).encode()).hexdigest()

    @property
    def tells_patient(self) -> bool:
        """Whether an index or a list says whose it is; else each is taken for another patient's."""
        return self.affine is not None or self.case is not None

    @property
    def patient_hash(self) -> str | None:
        """SHA-256 of the patient's name, for what must not hold names; None, where nothing tells whose it is."""
        if not self.tells_patient:
            return None
        return hashlib.sha256(json.dumps(["patient", self.patient]).encode()).hexdigest()

    def may_share_patient(self, other: Entry) -> bool:
        """Whether both may be of one patient: the same file, or the same name, if it is no number of an item."""
        numbered = any(not entry.tells_patient and entry.image.name == IMAGE for entry in (self, other))
        return self.image == other.image or (self.patient == other.patient and not numbered)

    def _stored_labels(self) -> Volume | None:
        if self.labels is None:
            return None
        if self.affine is not None:
            return self._mapped(self.labels)
        ours = self.case is None or self.case.vocabulary == "maisi"
        return read_our_labels(self.labels, CUSTOM_IDS) if ours else read_labels(self.labels)

    def _mapped(self, path: Path) -> Volume:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            raise MaisiError(f"{path} is missing or damaged; prepare the data anew.") from None
        return Volume(array, np.array(self.affine))

    def _no_pair(self) -> MaisiError:
        return MaisiError(f"{self.image} and {self.labels} lie on different grids; give the label map of this image.")


@dataclass(frozen=True)
class Found:
    """Entries, and sentences about what was left out."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()


def find_entries(paths: Iterable[Path], split: str = "all", labels: Path | None = None) -> Found:
    """Find CTs.

    Args:
        paths: files and folders, see the module.
        split: which cases of prepared folders and case lists, one of `SPLITS`; cases of a list whose side is open
            are in "all" alone.
        labels: folder of label maps named as the images are ('a.nii.gz' or 'a_0000.nii.gz' has 'a.nii.gz').

    Raises:
        MaisiError: nothing is there, two CTs have one name, or an image has no label map in `labels`.
    """
    if split not in SPLITS:
        raise MaisiError(f"There is no split '{split}'; choose from {', '.join(SPLITS)}.")
    entries: list[Entry] = []
    notes: list[str] = []
    for path in paths:
        found = _in(path, split)
        if not found.entries:
            side = "" if split == "all" else f" for {split}"
            kinds = f"{', '.join(VOLUME_ENDINGS)}, DICOM"
            raise MaisiError(f"{path} holds no CT{side} ({kinds}) to evaluate; give one that does.")
        entries += found.entries
        notes += found.notes
    named = _with_unique_names(entries)
    return Found(tuple(named if labels is None else _with_labels(named, labels)), tuple(notes))


def readable(found: Found, skip: bool = False, headers_only: bool = False) -> Found:
    """Check all files; what can't be read is refused with a list, or left out with a note where `skip` is true.

    Args:
        found: what to check.
        skip: whether to leave out what can't be read.
        headers_only: do not read voxels. For evaluations whose processes read them, and list what they can't, later;
            all others learn of a damaged file here, one more reading of each, before any network is loaded.

    Raises:
        MaisiError: an entry can't be read and `skip` is false, or none is left.
    """
    kept: list[Entry] = []
    faults: list[str] = []
    for entry in found.entries:
        try:
            entry.check()
            if not headers_only:
                entry.require_whole()
            kept.append(entry)
        except MaisiError as error:
            faults.append(str(error))
    return Found(tuple(kept), (*found.notes, *skipped(faults, len(kept), skip)))


def skipped(faults: Sequence[str], left: int, skip: bool) -> tuple[str, ...]:
    """Turn the faults of single volumes into notes.

    Raises:
        MaisiError: there are faults and `skip` is false, or no volume is left.
    """
    if faults and not skip:
        more = f" (and {len(faults) - _SHOWN} more)" if len(faults) > _SHOWN else ""
        raise MaisiError(f"{' '.join(faults[:_SHOWN])}{more} To leave such volumes out, give --skip-unreadable.")
    if not left:
        raise MaisiError(f"No volume could be read: {faults[0] if faults else 'there is none.'}")
    return tuple(f"Left out: {fault}" for fault in faults)


def ct_of(folder: PreparedFolder, case: PreparedCase) -> Volume:
    """The image of a prepared case with its affine; the array is mapped, not read."""
    return Volume(np.asarray(folder.image(case)), np.array(case.affine))


def _in(path: Path, split: str) -> Found:
    if (path / INDEX).is_file():
        return _in_prepared(path, split)
    if path.is_file() and path.suffix == ".json":
        return _in_list(path, split)
    if path.is_file() or is_volume(path) or _is_series(path):
        return Found((Entry(_stem(path.resolve()), _stem(path.resolve()), path),))
    if not path.is_dir():
        raise MaisiError(f"{path} does not exist; give a file or folder that does.")
    return _in_folder(path)


def _in_prepared(folder: Path, split: str) -> Found:
    index = PreparedFolder(folder).index
    own = index.custom_labels
    chosen = [case for case in index.cases if split in ("all", case.split)]
    entries = tuple(
        Entry(c.id, c.patient, folder / c.image, None if c.labels is None else folder / c.labels, c.affine, own)
        for c in chosen
        if c.is_ct
    )
    return Found(entries, _other_notes(len(chosen) - len(entries), "case(s)", folder))


def _in_list(path: Path, split: str) -> Found:
    listed = read_cases(path)
    own = listed.custom_labels
    chosen = [case for case in listed.cases if split in ("all", case.split)]
    entries = tuple(
        Entry(c.id, c.patient, c.image, c.labels, custom_labels=own, case=c)
        for c in chosen
        if c.modality.startswith("ct")
    )
    return Found(entries, _other_notes(len(chosen) - len(entries), "case(s)", path))


def _in_folder(path: Path) -> Found:
    inner = [folder for folder in sorted(path.iterdir()) if ".part-" not in folder.name]
    items = [folder for folder in (path, *inner) if (folder / IMAGE).is_file()]
    files = sorted(file for file in inner if is_volume(file) or holds_slices(file))
    if items:
        entries = tuple(_item(folder) for folder in items if _is_ct(folder))
        loose = [] if path in items else files
        beside = (f"{len(loose)} volume(s) of {path} that lie beside its items were left out.",) if loose else ()
        return Found(entries, (*_other_notes(len(items) - len(entries), "item(s)", path), *beside))
    return Found(tuple(Entry(_stem(file), _stem(file), file) for file in files))


def _is_series(path: Path) -> bool:
    """Whether a folder's own files are of DICOM."""
    return path.is_dir() and any(is_dicom(file) for file in path.iterdir() if file.is_file())


def _item(folder: Path) -> Entry:
    labels, name = folder / LABELS, folder.name or folder.resolve().name
    return Entry(name, name, folder / IMAGE, labels if labels.is_file() else None)


def _is_ct(folder: Path) -> bool:
    """Whether a generated item is a CT; one whose record does not say is taken for one."""
    try:
        request = json.loads((folder / RECORD).read_text(encoding="utf-8"))["request"]
        return str(request.get("modality", "ct")).startswith("ct")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def _other_notes(count: int, what: str, place: Path) -> tuple[str, ...]:
    return (f"{count} {what} of {place} are not CT and were left out.",) if count else ()


def _with_unique_names(entries: Sequence[Entry]) -> list[Entry]:
    """Entries of which two share a name are called by their folder, too."""
    often = Counter(entry.name for entry in entries)
    longer = [replace(e, name=f"{_home(e).name}/{e.name}") if often[e.name] > 1 else e for e in entries]
    names = Counter(entry.name for entry in longer)
    double = [name for name, count in names.items() if count > 1]
    if double:
        raise MaisiError(f"Two CTs are called '{double[0]}'; give each once, or rename one.")
    return [e if e.tells_patient else replace(e, patient=e.name) for e in longer]


def _home(entry: Entry) -> Path:
    folder = entry.image.resolve().parent
    return folder.parent if entry.image.name == IMAGE else folder


def _with_labels(entries: Sequence[Entry], folder: Path) -> list[Entry]:
    if not folder.is_dir():
        raise MaisiError(f"{folder} is no folder; give the folder of the images' label maps.")
    files = {_stem(path): path for path in sorted(filter(is_volume, folder.iterdir()))}
    found = {}
    for entry in entries:
        stem = entry.name.rpartition("/")[2]
        found[entry.name] = files.get(stem) or files.get(stem.removesuffix(_CHANNEL))
    missing = [name for name, path in found.items() if path is None]
    if missing:
        some = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise MaisiError(
            f"{folder} has no label map for {len(missing)} image(s) ({some}); name them as the images are."
        )
    own = [entry.name for entry in entries if entry.affine is not None or entry.case is not None]
    if own:
        raise MaisiError(
            f"{own[0]} comes from a prepared folder or a case list, which has its own labels; leave --labels out."
        )
    return [replace(entry, labels=found[entry.name]) for entry in entries]


def _stem(path: Path) -> str:
    ending = next((e for e in VOLUME_ENDINGS if path.name.lower().endswith(e)), "")
    return path.name[: len(path.name) - len(ending)]


def _corners(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The world positions of the 8 outermost voxels, (8, 3) in mm: the same however the axes are stored."""
    index = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
    corners: NDArray[np.float64] = (affine @ index)[:3].T
    return corners
