"""Segmenters to judge images by: rules, or any program that reads and writes NIfTI. Knows no measure."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maisi.anatomy import KNOWN_IDS, label_name
from maisi.data.agreement import STRUCTURES
from maisi.data.label_maps import Vocabulary, apply_map
from maisi.data.preprocess import resample_to_grid
from maisi.data.segmentation import segment
from maisi.errors import MaisiError
from maisi.io.nifti import read_labels, write_volume
from maisi.volume import Volume

IMAGE_WORD, LABELS_WORD = "{image}", "{labels}"
_ERROR_CHARACTERS = 300


class Segmenter(Protocol):
    """Finds structures in a CT."""

    @property
    def name(self) -> str:
        """What decides the answer, for the record and the cache."""

    @property
    def structures(self) -> Mapping[str, frozenset[int]]:
        """What it can find: name -> ids that count as it."""

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Hashes of the cases and patients (`volumes.Entry`) that it learned from, as far as it is known here."""

    def __call__(self, ct: Volume) -> Volume:
        """CT in HU -> label map in maisi's ids on the same grid."""


@dataclass(frozen=True)
class Rules:
    """The rules of `data.segmentation`: lungs, skeleton, body."""

    name: str = "rules"
    trained_on: tuple[str, ...] = ()

    @property
    def structures(self) -> Mapping[str, frozenset[int]]:
        """See `Segmenter`."""
        return STRUCTURES

    def __call__(self, ct: Volume) -> Volume:
        """See `Segmenter`."""
        return segment(ct)


@dataclass(frozen=True)
class Program:
    """A program of somebody else's, run once for each image.

    Attributes:
        command: words of its command line; in each, {image} and {labels} become the paths of two NIfTI files.
        vocabulary: what the ids that it writes mean.
    """

    command: tuple[str, ...]
    vocabulary: Vocabulary
    trained_on: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, vocabulary: Vocabulary) -> Program:
        """Check a command line such as 'TotalSegmentator -i {image} -o {labels} --ml'; no shell reads it.

        Raises:
            MaisiError: a place for image or labels is missing, quotes are open, or there is no such program.
        """
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise MaisiError(f"The segmenter '{text}' cannot be read ({error}); close the quotes.") from None
        for place in (IMAGE_WORD, LABELS_WORD):
            if not any(place in word for word in words):
                raise MaisiError(f"The segmenter '{text}' has no {place}; write where it goes, or give 'rules'.")
        if shutil.which(words[0]) is None:
            raise MaisiError(f"The program '{words[0]}' is not installed here; install it or use --segmenter rules.")
        return cls(words, vocabulary)

    @property
    def name(self) -> str:
        """See `Segmenter`; a table of the user's own counts by what it holds."""
        table = json.dumps([sorted(self.vocabulary.to.items()), sorted(self.vocabulary.custom.items())])
        digest = hashlib.sha256(table.encode()).hexdigest()[:8]
        return f"{shlex.join(self.command)} ({self.vocabulary.name}, {digest})"

    @property
    def structures(self) -> Mapping[str, frozenset[int]]:
        """See `Segmenter`; each class that the vocabulary maps to one of maisi's."""
        ids = sorted({id for id in self.vocabulary.to.values() if id})
        own = self.vocabulary.custom
        return {own.get(id) or label_name(id): frozenset({id}) for id in ids if id in own or id in KNOWN_IDS}

    def __call__(self, ct: Volume) -> Volume:
        """See `Segmenter`.

        Raises:
            MaisiError: the program fails, writes nothing, or writes ids that its vocabulary lacks.
        """
        with tempfile.TemporaryDirectory(prefix="maisi-") as place:
            image, labels = Path(place) / "image.nii.gz", Path(place) / "labels.nii.gz"
            write_volume(image, ct, synthetic=False)
            self._run(image, labels)
            found = read_labels(self._written(labels))
        ours = found.with_array(apply_map(found.array, self.vocabulary.to))
        return ours if ours.same_grid(ct) else resample_to_grid(ours, ct, order=0)

    def _run(self, image: Path, labels: Path) -> None:
        words = [word.replace(IMAGE_WORD, str(image)).replace(LABELS_WORD, str(labels)) for word in self.command]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise MaisiError(f"The program '{words[0]}' does not start ({error.strerror}); mend its command.") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing")[-_ERROR_CHARACTERS:]
            last = said.splitlines()[-1]
            raise MaisiError(
                f"The segmenter '{words[0]}' failed with code {done.returncode}: {last}; mend its command."
            )

    def _written(self, labels: Path) -> Path:
        """The file it wrote; where it made a folder of that name, the one file in it."""
        files = sorted(labels.glob("*.nii*")) if labels.is_dir() else [labels]
        if len(files) != 1 or not files[0].is_file():
            raise MaisiError(
                f"The segmenter '{self.command[0]}' wrote {len(files) if labels.is_dir() else 'no'} label map(s) "
                f"at {LABELS_WORD}; have it write one file with all labels (TotalSegmentator: --ml)."
            )
        return files[0]
