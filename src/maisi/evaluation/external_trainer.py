"""Segmenters that somebody else's program trains and runs, on a data set in its own layout. Knows no such program.

A program is a `Tool`. What it trained is a folder with `segmenter.json` and, in `model`, whatever the program left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from maisi.anatomy import OPPOSITE
from maisi.config import Config, parse_config
from maisi.data.preprocess import resample_to_grid
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.segmentation_cases import (
    Structures,
    classes_of,
    ids_of,
    in_order,
    stored_hu,
    structures_held,
)
from maisi.evaluation.trainer import ABOUT_FILE, Lesson, Report, Way, read_about
from maisi.evaluation.volumes import Entry
from maisi.generation.export import IMAGES_FOLDER, LABELS_FOLDER, LAYOUTS, Dataset, folds_of
from maisi.io.files import new_folder, sha256, write_json
from maisi.io.nifti import read_labels, write_volume
from maisi.volume import Volume

MODEL, LOG = "model", "log.txt"
_IMAGE, _LABELS, _CASES = "image.nii.gz", "labels.nii.gz", "cases.json"
_DESCRIPTION = "Cases that maisi trains a segmenter on; real patients may be among them."


class Tool(Way, Protocol):
    """Somebody else's program."""

    @property
    def layout(self) -> str:
        """Of its data sets, a key of `export.LAYOUTS`."""

    @property
    def folds(self) -> int:
        """Parts that it deals its training cases to."""

    def version(self) -> str:
        """Name and version of the program, as far as it is known.

        Raises:
            MaisiError: it is not installed.
        """

    def dataset_folder(self, work: Path) -> Path:
        """Where in the folder of a training the data set has to lie."""

    def train(self, work: Path, dataset: Dataset, report: Report | None) -> None:
        """Train on the data set, in `work`; go on where an earlier try was stopped.

        Raises:
            MaisiError: the program fails.
        """

    def keep(self, work: Path, model: Path) -> None:
        """Put what is needed to segment at `model`, a path that is new; `work` stays as it is."""

    def weights(self, model: Path) -> list[Path]:
        """The files that hold what was learned."""

    def segment(self, model: Path, place: Path, image: Path, log: Path) -> Path | None:
        """Segment one NIfTI file, with `place` as a folder to work in; return the file of classes, if there is one.

        Raises:
            MaisiError: the program fails.
        """


class About(Config):
    """What `segmenter.json` holds.

    Attributes:
        trainer: name of the tool.
        program: that trained it, with its version.
        config: settings of the tool.
        structures: name -> ids that count as it, in the order of the classes.
        trained_on: hash of each case and patient (`Entry.hash`, `Entry.patient_hash`).
        weights_sha256: of all files of weights.
    """

    version: Literal[1] = 1
    trainer: str
    program: str
    config: dict[str, Any]
    structures: dict[str, tuple[int, ...]]
    trained_on: tuple[str, ...]
    weights_sha256: str


def mirrored_sides(structures: Structures, program: str, mend: str) -> tuple[str, ...]:
    """Warn where a structure is that of one side, and a program mirrors its patches."""
    sided = [name for name, ids in structures.items() if any(OPPOSITE.get(id, id) not in ids for id in ids)]
    if not sided:
        return ()
    return (f"{program} mirrors its patches, so that it may confuse {', '.join(sided)} with the other side{mend}.",)


@dataclass(frozen=True)
class ExternalTrainer:
    """A `trainer.Trainer` by means of a tool."""

    tool: Tool

    @property
    def name(self) -> str:
        """See `Trainer`."""
        return self.tool.name

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Trainer`."""
        return {**self.tool.settings, "program": self.tool.version()}

    @property
    def effort(self) -> str:
        """See `Trainer`."""
        return self.tool.effort

    @property
    def fewest(self) -> int:
        """See `Trainer`."""
        return self.tool.fewest

    def cautions(self, structures: Structures) -> tuple[str, ...]:
        """See `Trainer`."""
        return self.tool.cautions(structures)

    def prepare(
        self, entries: Sequence[Entry], structures: Structures, cache: Cache, report: Report | None = None
    ) -> tuple[str, ...]:
        """See `Trainer`; each case is written once, and every training that has it links to its files."""
        for done, entry in enumerate(entries, 1):
            _case_files(entry, structures, cache)
            if report:
                report("write cases", done, len(entries))
        return ()

    def trained(self, lesson: Lesson, cache: Cache, report: Report | None = None) -> ExternalSegmenter:
        """See `Trainer`."""
        if lesson.weights is not None:
            raise MaisiError(f"{self.name} draws its cases itself, so they cannot be weighted; leave --share out.")
        key = ["external segmenter", self.name, self.settings, in_order(lesson.structures), lesson.learned_from]
        folder = cache.path(key, partial(self._train, lesson, cache, report))
        return ExternalSegmenter.open(folder, self.tool)

    def _train(self, lesson: Lesson, cache: Cache, report: Report | None, folder: Path) -> None:
        _require_held(lesson, cache)
        work = folder.resolve().with_name(f"{folder.name}.training")
        work.mkdir(exist_ok=True)
        place = self.tool.dataset_folder(work)
        dataset = _dataset(place.name, lesson, self.tool)
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            _write_dataset(place, dataset, lesson, cache, self.tool.layout)
        self.tool.train(work, dataset, report)
        self._keep(folder, work, lesson)
        if not (folder / MODEL).is_symlink():
            shutil.rmtree(work, ignore_errors=True)

    def _keep(self, folder: Path, work: Path, lesson: Lesson) -> None:
        with new_folder(folder) as part:
            self.tool.keep(work, part / MODEL)
            about = About(
                trainer=self.name,
                program=self.tool.version(),
                config=dict(self.tool.settings),
                structures={name: tuple(sorted(ids)) for name, ids in lesson.structures.items()},
                trained_on=tuple(sorted(lesson.learned_from)),
                weights_sha256=_digest(self.tool.weights(part / MODEL)),
            )
            write_json(part / ABOUT_FILE, about.model_dump(mode="json"))
            shutil.copyfile(work / LOG, part / LOG)


@dataclass(frozen=True)
class ExternalSegmenter:
    """A `trainer.FolderSegmenter` that a tool runs, once for each image.

    Attributes:
        folder: that `ExternalTrainer` made.
        about: what it says of itself.
        tool: that trained it.
    """

    folder: Path
    about: About
    tool: Tool

    @classmethod
    def open(cls, folder: Path, tool: Tool) -> ExternalSegmenter:
        """Read what it says of itself.

        Raises:
            MaisiError: its files do not belong together, or the program is not installed.
        """
        path = folder / ABOUT_FILE
        about = parse_config(About, read_about(folder), str(path))
        tool.version()
        weights = tool.weights(folder / MODEL)
        if not weights or not all(file.is_file() for file in weights) or _digest(weights) != about.weights_sha256:
            raise MaisiError(f"The model in {folder} is missing, or another than {path} describes; train it anew.")
        return cls(folder, about, tool)

    def copy_to(self, folder: Path) -> None:
        """Copy all that it is made of into an empty folder.

        Raises:
            MaisiError: its model cannot be moved.
        """
        if (self.folder / MODEL).is_symlink():
            raise MaisiError(f"A model of {self.about.trainer} knows its own paths and cannot be copied.")
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    @property
    def name(self) -> str:
        """See `Segmenter`."""
        how = [f"{key} {_shown(value)}" for key, value in self.about.config.items() if key != "device" and value]
        return ", ".join([self.about.program, *how, self.about.weights_sha256[:12]])

    @property
    def structures(self) -> Mapping[str, frozenset[int]]:
        """See `Segmenter`."""
        return {name: frozenset(ids) for name, ids in self.about.structures.items()}

    @property
    def trained_on(self) -> tuple[str, ...]:
        """See `Segmenter`."""
        return self.about.trained_on

    def __call__(self, ct: Volume) -> Volume:
        """See `Segmenter`; of a structure with several ids, the lowest is written.

        Raises:
            MaisiError: the program fails, or what it writes is no answer; its output is kept in the file named.
        """
        upright = ct.to_ras()
        handle, log = tempfile.mkstemp(prefix=f"maisi-{self.about.trainer}-", suffix=".log")
        os.close(handle)
        with tempfile.TemporaryDirectory(prefix="maisi-") as place:
            image = Path(place) / _IMAGE
            _write_plain(image, stored_hu(upright))
            written = self.tool.segment((self.folder / MODEL).resolve(), Path(place), image, Path(log))
            if written is None:
                raise MaisiError(f"{self.about.program} wrote no label map; see {log}.")
            classes = read_labels(written)
        if classes.shape != upright.shape:
            raise MaisiError(
                f"{self.about.program} wrote a label map of {classes.shape} voxels for an image of {upright.shape}; "
                f"see {log}."
            )
        with suppress(OSError):
            Path(log).unlink()
        found = upright.with_array(ids_of(classes.array, self.about.structures))
        return found if found.same_grid(ct) else resample_to_grid(found, ct, order=0)


def _require_held(lesson: Lesson, cache: Cache) -> None:
    """Refuse a training in which a class has no voxel: a program may count the classes in the cases alone."""
    held = {name for entry in lesson.entries for name in structures_held(entry, lesson.structures, cache)}
    absent = [name for name in lesson.structures if name not in held]
    if absent:
        raise MaisiError(f"No case of a training has {', '.join(absent)}; leave that --structure out.")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _case_files(entry: Entry, structures: Structures, cache: Cache) -> Path:
    """The folder in the cache with image and classes of a case."""
    key = ["case files", entry.hash, [sorted(ids) for ids in structures.values()]]
    return cache.path(key, partial(_write_case, entry, structures))


def _write_case(entry: Entry, structures: Structures, folder: Path) -> None:
    ct, labels = entry.pair()
    if labels is None:
        raise MaisiError(f"{entry.name} has no labels; give a label map for each image.")
    with new_folder(folder) as part:
        _write_plain(part / _IMAGE, stored_hu(ct))
        _write_plain(part / _LABELS, ct.with_array(classes_of(labels.array, structures)))


def _write_plain(path: Path, volume: Volume) -> None:
    """Write the voxels with their spacing alone: programs differ in what they make of an affine that is oblique."""
    write_volume(path, Volume.from_spacing(volume.array, volume.spacing_mm), synthetic=False)


def _dataset(name: str, lesson: Lesson, tool: Tool) -> Dataset:
    return Dataset(
        name=name,
        modality="CT",
        cases=tuple(f"case{number:04d}" for number in range(len(lesson.entries))),
        folds=folds_of([entry.patient for entry in lesson.entries], tool.folds),
        labels=tuple(lesson.structures),
        suffix=LAYOUTS[tool.layout].suffix,
        description=_DESCRIPTION,
    )


def _write_dataset(folder: Path, dataset: Dataset, lesson: Lesson, cache: Cache, layout: str) -> None:
    with new_folder(folder) as part:
        (part / IMAGES_FOLDER).mkdir()
        (part / LABELS_FOLDER).mkdir()
        for case, entry in zip(dataset.cases, lesson.entries, strict=True):
            files = _case_files(entry, lesson.structures, cache)
            _link(files / _IMAGE, part / dataset.image(case))
            _link(files / _LABELS, part / dataset.label(case))
        (part / LAYOUTS[layout].index).write_text(LAYOUTS[layout].content(dataset), encoding="utf-8")
        write_json(part / _CASES, {c: entry.name for c, entry in zip(dataset.cases, lesson.entries, strict=True)})


def _link(file: Path, place: Path) -> None:
    """The same file at a second place, or a copy where the disk has no such thing."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
