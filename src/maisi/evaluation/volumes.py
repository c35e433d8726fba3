"""The CTs that an evaluation looks at, found in files and folders of several kinds. Knows no measure, no torch.

A folder is a prepared folder (it has `index.json`), one generated item or a folder of such (`image.nii.gz` with or
without `labels.nii.gz`), or a folder of volumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maisi.data.prepared import INDEX, PreparedCase, PreparedFolder
from maisi.data.preprocess import hu_fault
from maisi.errors import MaisiError
from maisi.io.nifti import read_header, read_label_names, read_labels, read_volume
from maisi.volume import Volume

ENDINGS = (".nii.gz", ".nii", ".nrrd")
ITEM_IMAGE, ITEM_LABELS = "image.nii.gz", "labels.nii.gz"
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
        image: a volume file, or an array (.npy) of a prepared folder.
        labels: its label map, of the same kind, or None.
        affine: of a prepared folder's arrays, 4 rows of 4; None: the files say it themselves.
        custom_labels: names of a prepared folder's own classes, id -> name.
    """

    name: str
    patient: str
    image: Path
    labels: Path | None = None
    affine: tuple[tuple[float, ...], ...] | None = None
    custom_labels: Mapping[int, str] = field(default_factory=dict)

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
        if sorted(image.shape) != sorted(labels.shape) or nearest > _TOLERANCE_MM:
            raise self._no_pair()

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

    def label_map(self) -> Volume | None:
        """Read the label map, or return None if there is none.

        Raises:
            MaisiError: it can't be read.
        """
        if self.labels is None:
            return None
        return read_labels(self.labels) if self.affine is None else self._mapped(self.labels)

    def label_names(self) -> dict[int, str]:
        """Names that the folder or the label map's header gives to ids; {} where they give none."""
        if self.labels is None or self.affine is not None:
            return dict(self.custom_labels)
        return read_label_names(self.labels)

    def pair(self) -> tuple[Volume, Volume | None]:
        """Read the CT and its label map, both RAS+ and on one grid.

        Raises:
            MaisiError: as `ct`, `label_map`, or they lie on different grids.
        """
        ct, labels = self.ct().to_ras(), self.label_map()
        if labels is None:
            return ct, None
        labels = labels.to_ras()
        if not ct.same_grid(labels, _TOLERANCE_MM):
            raise self._no_pair()
        return ct, labels

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it is made of."""
        return (self.image,) if self.labels is None else (self.image, self.labels)

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
        split: which cases of prepared folders, one of `SPLITS`.
        labels: folder of label maps named as the images are ('a.nii.gz' or 'a_0000.nii.gz' has 'a.nii.gz').

    Raises:
        MaisiError: nothing is there, two CTs have one name, or an image has no label map in `labels`.
    """
    if split not in SPLITS:
        raise MaisiError(f"There is no split '{split}'; choose from {', '.join(SPLITS)}.")
    entries: list[Entry] = []
    notes: list[str] = []
    for path in paths:
        found = _in_prepared(path, split) if (path / INDEX).is_file() else Found(tuple(_in_files(path)))
        if not found.entries:
            raise MaisiError(f"{path} holds no CT ({', '.join(ENDINGS)}) to evaluate; give one that does.")
        entries += found.entries
        notes += found.notes
    named = _with_unique_names(entries)
    return Found(tuple(named if labels is None else _with_labels(named, labels)), tuple(notes))


def readable(found: Found, skip: bool = False) -> Found:
    """Check all headers; what can't be read is refused with a list, or left out with a note where `skip` is true.

    Raises:
        MaisiError: an entry can't be read and `skip` is false, or none is left.
    """
    kept: list[Entry] = []
    faults: list[str] = []
    for entry in found.entries:
        try:
            entry.check()
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


def _in_prepared(folder: Path, split: str) -> Found:
    index = PreparedFolder(folder).index
    own = index.custom_labels
    chosen = [case for case in index.cases if split in ("all", case.split)]
    entries = tuple(
        Entry(c.id, c.patient, folder / c.image, None if c.labels is None else folder / c.labels, c.affine, own)
        for c in chosen
        if c.is_ct
    )
    others = len(chosen) - len(entries)
    return Found(entries, (f"{others} case(s) of {folder} are not CT and were left out.",) if others else ())


def _in_files(path: Path) -> list[Entry]:
    if path.is_file():
        return [Entry(_stem(path), _stem(path), path)]
    if not path.is_dir():
        raise MaisiError(f"{path} does not exist; give a file or folder that does.")
    items = [folder for folder in (path, *sorted(path.iterdir())) if (folder / ITEM_IMAGE).is_file()]
    if items:
        return [_item(folder) for folder in items]
    files = sorted(file for file in path.iterdir() if file.name.lower().endswith(ENDINGS))
    return [Entry(_stem(file), _stem(file), file) for file in files]


def _item(folder: Path) -> Entry:
    labels = folder / ITEM_LABELS
    return Entry(folder.name, folder.name, folder / ITEM_IMAGE, labels if labels.is_file() else None)


def _with_unique_names(entries: Sequence[Entry]) -> list[Entry]:
    """Entries of which two share a name are called by their folder, too."""
    often = Counter(entry.name for entry in entries)
    longer = [replace(e, name=f"{_home(e).name}/{e.name}") if often[e.name] > 1 else e for e in entries]
    names = Counter(entry.name for entry in longer)
    double = [name for name, count in names.items() if count > 1]
    if double:
        raise MaisiError(f"Two CTs are called '{double[0]}'; give each once, or rename one.")
    # without an index nothing says whose a CT is, so each is taken for another patient's
    return [e if e.affine is not None else replace(e, patient=e.name) for e in longer]


def _home(entry: Entry) -> Path:
    folder = entry.image.resolve().parent
    return folder.parent if entry.image.name == ITEM_IMAGE else folder


def _with_labels(entries: Sequence[Entry], folder: Path) -> list[Entry]:
    if not folder.is_dir():
        raise MaisiError(f"{folder} is no folder; give the folder of the images' label maps.")
    files = {_stem(path): path for path in sorted(folder.iterdir()) if path.name.lower().endswith(ENDINGS)}
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
    prepared = [entry.name for entry in entries if entry.affine is not None]
    if prepared:
        raise MaisiError(f"{prepared[0]} comes from a prepared folder, which has its own labels; leave --labels out.")
    return [replace(entry, labels=found[entry.name]) for entry in entries]


def _stem(path: Path) -> str:
    ending = next((e for e in ENDINGS if path.name.lower().endswith(e)), "")
    return path.name[: len(path.name) - len(ending)]


def _corners(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The world positions of the 8 outermost voxels, (8, 3) in mm: the same however the axes are stored."""
    index = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
    corners: NDArray[np.float64] = (affine @ index)[:3].T
    return corners
