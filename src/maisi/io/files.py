"""Writing files and folders whole or not at all. Knows no format but JSON, and what volumes are called."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maisi.errors import MaisiError

if sys.platform != "win32":
    import fcntl

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".ome.zarr", ".zarr")
"""How volumes are called; all are files, but for those that end as a Zarr, which is a folder."""

INDEX = "index.json"
"""What lists and describes the content of a folder of cases, latents or label maps."""

_MENDS = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "choose a disk that takes larger files",
    errno.EACCES: "choose a place you may write to",
    errno.EPERM: "choose a place you may write to",
    errno.EROFS: "choose a place you may write to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EEXIST: "a file has that name; choose another",
    errno.ENOTDIR: "a file is in the place of a folder; choose another place",
}
"""Faults of the place, not of the program: what the user can do about them."""


_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors, which has no exception of the system's, tells that the disk is full."""


def is_volume(path: Path) -> bool:
    """Say whether a file is called as volumes are, or a folder as a Zarr, which then counts as one volume."""
    name = path.name.lower()
    return name.endswith(VOLUME_ENDINGS) and (path.is_dir() if name.endswith(".zarr") else path.is_file())


def sha256(path: Path) -> str:
    """Return the file's SHA-256 as 64 hexadecimal digits.

    Raises:
        MaisiError: it cannot be read.
    """
    try:
        return _digest(Path(path))
    except OSError as error:
        raise MaisiError(f"Cannot read {path}: {error.strerror}; give the path of a file.") from None


def tree_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files below a folder, as 64 digits.

    Raises:
        MaisiError: it cannot be read.
    """
    try:
        if not path.is_dir():
            return _digest(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listed = [[file.relative_to(path).as_posix(), _digest(file)] for file in files]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    except OSError as error:
        raise MaisiError(f"Cannot read {path}: {error.strerror}; give the path of a volume.") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` when the block ends well.

    An exception inside removes what was written and leaves an older file at `path` as it was.

    Raises:
        MaisiError: the folder is missing, may not be written to, or the disk is full.
    """
    path = Path(path)
    _require_parent(path)
    if path.is_dir():
        raise MaisiError(f"{path} is a folder; give the name of a file.")
    part = _part(path)
    try:
        yield part
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        _raise_as_maisi(error, path, part)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is renamed to `path` when the block ends well.

    An exception inside removes the folder with all that is in it.

    Raises:
        MaisiError: `path` exists, its parent is missing or may not be written to, or the disk is full.
    """
    path = Path(path)
    require_new(path, "another folder")
    part = _part(path)
    try:
        part.mkdir()
        yield part
        for inner in (*part.rglob("*"), part):
            _sync(inner)
        part.rename(path)
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST) and path.exists():
            raise MaisiError(f"{path} was made by another command meanwhile; choose another folder.") from error
        _raise_as_maisi(error, path, part)
        raise


@contextmanager
def locked(path: Path, held: str) -> Iterator[None]:
    """Keep other processes from a lock on a file or folder while the block runs, where the system has such locks.

    Raises:
        MaisiError: `held`, if another process has it.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MaisiError(held) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens where that cannot be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Say in a sentence that a file or folder cannot be written to, where that is a fault of the place.

    Raises:
        MaisiError: so.
    """
    try:
        yield
    except OSError as error:
        _raise_as_maisi(error, place, place)
        raise


def make_folder(path: Path) -> None:
    """Make a folder, with those that it lies in, if it is not there yet.

    Raises:
        MaisiError: it cannot be made there.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; what JSON cannot say (NaN, infinity) is a ValueError."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part-{secrets.token_hex(4)}")


def require_new(path: Path, mend: str = "another name") -> None:
    """Refuse a file or folder that exists, be it a link that leads nowhere, or that cannot be made.

    Raises:
        MaisiError: so.
    """
    if os.path.lexists(path):
        raise MaisiError(f"{path} exists; choose {mend} or remove it.")
    _require_parent(path)


def _require_parent(path: Path) -> None:
    parent = path.parent
    if not parent.is_dir():
        raise MaisiError(f"The folder {parent} does not exist; make it first or choose another place.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MaisiError(f"The folder {parent} is not writable; choose a place you may write to.")


def _raise_as_maisi(error: BaseException, path: Path, made: Path) -> None:
    """Raise a MaisiError where `error` is a fault of the place that `path` is in, `made` first; else return."""
    if isinstance(error, MaisiError):
        return
    if isinstance(error, FileNotFoundError) and error.filename and made.is_relative_to(error.filename):
        # a folder of the system's own, as /proc is, or one that went away
        raise MaisiError(f"Nothing can be made in {Path(error.filename).parent}; choose another place.") from error
    # PyTorch fails once more while it gives up
    fault = error.__context__ if isinstance(error, RuntimeError) else error
    number = fault.errno if isinstance(fault, OSError) else None
    if number is None and (told := _RUST.search(str(error))):
        number = int(told[1])
    if number is not None and number in _MENDS:
        raise MaisiError(f"Cannot write {path}: {os.strerror(number)}; {_MENDS[number]}.") from error


def _sync(path: Path) -> None:
    """Have the system put the file or folder on the disk, so that a rename never precedes its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # else one of the file systems that sync no folders
    finally:
        os.close(descriptor)
