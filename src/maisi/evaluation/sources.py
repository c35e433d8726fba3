"""Whose images and labels a generated pair was made of: what must not meet in training and test. Knows no measure.

`record.json` beside a generated item names the label map that it follows and the CT that was painted into, as paths;
entries of a case list or a prepared folder name a patient themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maisi.errors import MaisiError
from maisi.evaluation.volumes import Entry
from maisi.generation.output import IMAGE, RECORD

_PATHS = ("mask", "image")
"""Where in a request something of a patient is named."""

_FOLDERS = 2
"""How many last words of a path are searched for a patient: a file is often called after its folder alone."""


@dataclass(frozen=True)
class Origin:
    """Where a pair comes from.

    Attributes:
        patients: of the real cases that it was made of; none, where it was made of nobody known here.
        recorded: whether anything says so; without, it may be anybody's.
    """

    patients: frozenset[str]
    recorded: bool


def origins(pairs: Sequence[Entry], real: Sequence[Entry], told: Mapping[str, str] | None = None) -> list[Origin]:
    """Find the patients that each pair was made of, in the order of the pairs.

    A path counts as a patient's where it is one of the patient's files, or where the patient or the case is a whole
    word of the last parts of it ('pt_10' is in 'pt_10_labels.nii.gz', not in 'pt_101.nii.gz').

    Args:
        pairs: generated.
        real: cases with known patients.
        told: name of a pair -> patient, where the user knows better.

    Raises:
        MaisiError: `told` names a pair or a patient that is not there.
    """
    table = dict(told or {})
    patients = {entry.patient for entry in real}
    for kind, strange in (
        ("pair", table.keys() - {p.name for p in pairs}),
        ("patient", set(table.values()) - patients),
    ):
        if strange:
            raise MaisiError(f"The table of sources names the {kind} '{min(strange)}', which is not there; correct it.")
    words = _words(real)
    files = {file.resolve(): entry.patient for entry in real for file in entry.files}
    return [
        Origin(frozenset({table[pair.name]}), True) if pair.name in table else _origin(pair, patients, words, files)
        for pair in pairs
    ]


def read_sources(path: Path) -> dict[str, str]:
    """Read a JSON table, name of a pair -> patient.

    Raises:
        MaisiError: it is no such table.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MaisiError(f'Cannot read {path} ({error}); give a table such as {{"0000": "patient"}}.') from None
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise MaisiError(f'{path} is no table of names; write it as {{"0000": "patient"}}.')
    return values


def _words(real: Iterable[Entry]) -> dict[str, re.Pattern[str]]:
    """Patient -> what finds the patient, or one of the cases, in a path."""
    names: dict[str, set[str]] = {}
    for entry in real:
        names.setdefault(entry.patient, {entry.patient}).add(entry.name)
    return {
        patient: re.compile("|".join(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])" for name in sorted(own)))
        for patient, own in names.items()
    }


def _origin(pair: Entry, patients: set[str], words: Mapping[str, re.Pattern[str]], files: Mapping[Path, str]) -> Origin:
    if pair.affine is not None or pair.case is not None:
        return Origin(frozenset({pair.patient} & patients) or _named(pair.name, words), True)
    record, found = _record(pair), frozenset[str]()
    if record is None:
        found = _named(pair.image.name, words) if pair.image.name != IMAGE else found
        return Origin(found, bool(found))
    request = record["request"]
    paths = [Path(request[key]) for key in _PATHS if isinstance(request.get(key), str)]
    recorded = True
    for path in paths:
        whose = files.get(path.resolve())
        named = _named("/".join(path.parts[-_FOLDERS:]), words) if whose is None else frozenset({whose})
        # a file that names none of the patients may be of any of them
        found, recorded = found | named, recorded and bool(named)
    # a mask of a library carries nobody's name, and what was in memory has none
    in_memory = record.get("mask_source") == "" or "painted_by" in record
    return Origin(found, recorded and (bool(paths) or not (in_memory or request.get("library"))))


def _record(pair: Entry) -> dict[str, Any] | None:
    try:
        record = json.loads((pair.image.parent / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("request"), dict) else None


def _named(text: str, words: Mapping[str, re.Pattern[str]]) -> frozenset[str]:
    return frozenset(patient for patient, pattern in words.items() if pattern.search(text))
