"""What trains a segmenter, whoever wrote it: from cases with labels to a segmenter that lies in a folder. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.segmentation_cases import Structures
from maisi.evaluation.segmenters import Segmenter
from maisi.evaluation.volumes import Entry

ABOUT_FILE = "segmenter.json"
"""What every trained segmenter's folder holds."""

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Lesson:
    """What a segmenter is to learn from.

    Attributes:
        entries: cases with labels.
        structures: to find.
        weights: how often each case is drawn, relative to the others; None is alike.
    """

    entries: tuple[Entry, ...]
    structures: Structures
    weights: tuple[float, ...] | None = None

    @property
    def learned_from(self) -> list[str]:
        """Hash of each case, then of each patient that is known."""
        patients = {entry.patient_hash for entry in self.entries}
        return [entry.hash for entry in self.entries] + sorted(patient for patient in patients if patient)


def read_about(folder: Path) -> Any:
    """Read what a trained segmenter says of itself, as JSON gives it.

    Raises:
        MaisiError: the folder is none of a segmenter.
    """
    try:
        return json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MaisiError(
            f"{folder} holds no readable {ABOUT_FILE}; give a folder made by `maisi evaluate segmenter`."
        ) from None


class FolderSegmenter(Segmenter, Protocol):
    """A segmenter that lies in a folder."""

    def copy_to(self, folder: Path) -> None:
        """Copy all that it is made of into an empty folder."""


class Way(Protocol):
    """A way to train, always the same."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides a training, but for the cases, as JSON values."""

    @property
    def effort(self) -> str:
        """What every training takes, as in 'Every training takes the same ...'."""

    @property
    def fewest(self) -> int:
        """Cases that it needs."""

    def cautions(self, structures: Structures) -> tuple[str, ...]:
        """Sentences for the reader of a result: what these structures suffer from."""


class Trainer(Way, Protocol):
    """Trains segmenters in one way."""

    def prepare(
        self, entries: Sequence[Entry], structures: Structures, cache: Cache, report: Report | None = None
    ) -> tuple[str, ...]:
        """Read all cases that will be trained on, so that what can't be used is known before; return notes.

        Raises:
            MaisiError: a file can't be read.
        """

    def trained(self, lesson: Lesson, cache: Cache, report: Report | None = None) -> FolderSegmenter:
        """Train a segmenter in the cache, or take the one that is there; an interrupted training goes on.

        Raises:
            MaisiError: it can't be trained on these cases, or its program fails.
        """


def require_enough(trainer: Trainer, count: int, where: str) -> None:
    """Refuse fewer cases than a trainer needs.

    Raises:
        MaisiError: so.
    """
    if count < trainer.fewest:
        raise MaisiError(
            f"{where} has {count} training case(s), and {trainer.name} needs {trainer.fewest}; give more real cases."
        )
