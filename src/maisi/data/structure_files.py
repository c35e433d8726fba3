"""Masks as folders of files, each of one structure and called as it is, as TotalSegmentator leaves them.

Their ids mean nothing; the names of the files do, in some vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maisi.anatomy import name_key
from maisi.data.label_maps import VOCABULARIES, vocabulary
from maisi.errors import MaisiError
from maisi.io.dicom import holds_slices
from maisi.io.files import VOLUME_ENDINGS, is_volume
from maisi.io.nifti import read_labels
from maisi.volume import Volume


def structure_files(path: Path, words: str) -> list[Path]:
    """Files of one structure each: those of a folder, or one that is such a file by its name and its values; or none.

    Args:
        path: a file or a folder.
        words: vocabulary that a single file's name is looked up in.
    """
    if path.is_file():
        return [path] if is_volume(path) and _holds_one(path, words) else []
    if not path.is_dir() or is_volume(path) or holds_slices(path):
        return []
    return sorted(filter(is_volume, path.iterdir()))


def read_structure_files(files: Sequence[Path]) -> tuple[Volume, dict[int, str]]:
    """Read files of one structure each as one label map, numbered from 1.

    Returns:
        The map, and the name of each number that it holds; empty files have none. What overlaps belongs to the first.

    Raises:
        MaisiError: a file cannot be read, lies on another grid or holds several structures, or all are empty.
    """
    grid, made, names = None, None, dict[int, str]()
    for number, path in enumerate(files, start=1):
        part = read_labels(path)
        if grid is None or made is None:
            grid, made = part, np.zeros(part.shape, np.uint16)
        if not part.same_grid(grid):
            raise MaisiError(
                f"{path} ({part.grid}) lies on another grid than {files[0].name} ({grid.grid}); give masks of one CT."
            )
        if len(np.unique(part.array)) > 2:
            raise MaisiError(f"{path} holds more than one structure; a folder has one a file, so import it by itself.")
        inside = (part.array > 0) & (made == 0)
        if inside.any():
            made[inside] = number
            names[number] = _structure(path)
    if grid is None or made is None or not names:
        raise MaisiError(f"Nothing is drawn in any of {len(files)} files; give masks with something in them.")
    return grid.with_array(made), names


def _structure(path: Path) -> str:
    """What a file is called, without its ending."""
    ending = next(ending for ending in VOLUME_ENDINGS if path.name.lower().endswith(ending))
    return path.name[: -len(ending)]


def _holds_one(path: Path, words: str) -> bool:
    """Whether a file is called as a class that its only value, 1, is not."""
    if words not in VOCABULARIES:
        return False
    ids = {name_key(name): id for id, name in vocabulary(words).names.items()}
    return ids.get(name_key(_structure(path)), 1) != 1 and set(np.unique(read_labels(path).array).tolist()) <= {0, 1}
