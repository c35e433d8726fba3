import errno
import hashlib
import json
import math
import os
import stat
from pathlib import Path

import pytest

from maisi.errors import MaisiError
from maisi.io import files
from maisi.io.files import atomic_path, is_volume, make_folder, new_folder, remove, tree_sha256, write_json

FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(*args, **kwargs):
    raise FULL_DISK


def test_atomic_path_writes_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        with atomic_path(path) as part:
            assert part.parent == tmp_path
            part.write_text(text)
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["a.txt"]


def write_half(path, error):
    """Write some of a file, and fail."""
    with atomic_path(path) as part:
        part.write_text("half")
        raise error


def fill_half(path, error):
    """Write some of a folder, and fail."""
    with new_folder(path) as part:
        (part / "a.txt").write_text("half")
        raise error


def enter(manager):
    """Enter a context that should have refused."""
    with manager:
        pytest.fail("the block must not run")


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_interrupted_file_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_half(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_interrupted_file_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        write_half(tmp_path / "a.txt", RuntimeError("stop"))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_while_writing(tmp_path):
    with pytest.raises(MaisiError, match=r"Cannot write .*a.txt: No space left on device; free some space"):
        write_half(tmp_path / "a.txt", FULL_DISK)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_while_syncing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(MaisiError, match="No space left"):
        write_json(path, {})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_half(tmp_path / "a.txt", FileNotFoundError("another file"))


@pytest.mark.parametrize("make", [atomic_path, new_folder])
def test_missing_parent(tmp_path, make):
    with pytest.raises(MaisiError, match=r"folder .*none does not exist; make it first"):
        enter(make(tmp_path / "none" / "a"))


@pytest.mark.parametrize("make", [atomic_path, new_folder])
def test_unwritable_parent(tmp_path, make, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(MaisiError, match="is not writable; choose a place"):
        enter(make(tmp_path / "a"))


def test_read_only_disk(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(MaisiError, match=r"Cannot write .*Read-only file system; choose a place"):
        enter(new_folder(tmp_path / "a"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder of the system's own here")
@pytest.mark.parametrize("make", [atomic_path, new_folder])
def test_a_folder_of_the_systems_own_takes_nothing(make):
    refused = pytest.raises(MaisiError, match="Nothing can be made in /proc; choose another place")
    with refused, make(Path("/proc/x")) as part:
        part.write_text("x")
    with refused:
        make_folder(Path("/proc/x/y"))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(MaisiError, match="is a folder; give the name of a file"):
        enter(atomic_path(tmp_path))


def test_new_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as part:
        (part / "0000").mkdir()
        (part / "0000" / "a.txt").write_text("one")
        assert not out.exists()
    assert (out / "0000" / "a.txt").read_text() == "one"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_new_folder_refuses_what_exists(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(MaisiError, match=r"out exists; choose another folder or remove it\."):
        enter(new_folder(out))
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_interrupted_folder_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        fill_half(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_no_folder(tmp_path):
    with pytest.raises(MaisiError, match=r"Cannot write .*out: No space left"):
        fill_half(tmp_path / "out", FULL_DISK)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_a_file_is_in_the_way_of(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(MaisiError, match=r"Cannot write .*choose another"):
            make_folder(place)


def test_json_there_and_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ä": True}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert "ä" in text


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert os.listdir(tmp_path) == []


def test_what_counts_as_a_volume(tmp_path):
    for name in ("a.nii", "B.NII.GZ", "c.nrrd", "d.zarr", "e.txt", "nii"):
        (tmp_path / name).touch()
    for name in ("f.zarr", "g.ome.zarr", "h.nii", "i"):
        (tmp_path / name).mkdir()
    found = sorted(path.name for path in tmp_path.iterdir() if is_volume(path))
    assert found == ["B.NII.GZ", "a.nii", "c.nrrd", "f.zarr", "g.ome.zarr"]
    assert not is_volume(tmp_path / "absent.zarr")


def test_the_hash_of_a_folder_is_that_of_names_and_contents(tmp_path):
    for name in ("a.zarr", "b.zarr"):
        (tmp_path / name / "0").mkdir(parents=True)
        (tmp_path / name / "0" / "x").write_bytes(b"1")
        (tmp_path / name / "y").write_bytes(b"2")
    one = tree_sha256(tmp_path / "a.zarr")
    assert one == tree_sha256(tmp_path / "b.zarr")
    (tmp_path / "b.zarr" / "y").rename(tmp_path / "b.zarr" / "z")
    assert one != tree_sha256(tmp_path / "b.zarr")
    (tmp_path / "a.zarr" / "0" / "x").write_bytes(b"3")
    assert one != tree_sha256(tmp_path / "a.zarr")
    assert tree_sha256(tmp_path / "b.zarr" / "z") == hashlib.sha256(b"2").hexdigest()
    with pytest.raises(MaisiError, match=r"Cannot read .*absent: No such file"):
        tree_sha256(tmp_path / "absent")


def test_all_that_is_in_a_new_folder_is_synced_before_it_appears(tmp_path, monkeypatch):
    synced = []

    def record(descriptor):
        synced.append(os.stat(descriptor).st_ino)
        assert (tmp_path / "a").exists() == (len(synced) > 4)

    monkeypatch.setattr(os, "fsync", record)
    with new_folder(tmp_path / "a") as part:
        (part / "b").mkdir()
        (part / "b" / "c").write_text("1")
        (part / "d").write_text("2")
    places = (tmp_path, *(tmp_path / "a" / name for name in ("", "b", "b/c", "d")))
    assert set(synced) == {place.stat().st_ino for place in places}


def test_folders_that_cannot_be_synced_are_no_fault(tmp_path, monkeypatch):
    plain = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with atomic_path(tmp_path / "a") as part:
        part.write_text("a")
    with new_folder(tmp_path / "b") as part:
        (part / "c").write_text("c")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c"]


def test_a_full_disk_as_safetensors_tells_it(tmp_path):
    told = r"Cannot write .*a: No space left on device; free some"
    with pytest.raises(MaisiError, match=told), atomic_path(tmp_path / "a"):
        raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_what_is_removed_is_gone_whatever_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("link", "folder/file", "folder", "nothing"):
        remove(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_not_said_to_be_unwritable(tmp_path):
    def unreadable():
        try:
            raise PermissionError(errno.EACCES, "Permission denied")
        except OSError:
            raise MaisiError("Cannot read a: Permission denied; give another.") from None

    for place in (atomic_path(tmp_path / "a"), new_folder(tmp_path / "b")):
        with pytest.raises(MaisiError, match="Cannot read a"), place:
            unreadable()

    def faulty():
        try:
            raise FULL_DISK
        except OSError:
            raise KeyError("a fault of the program, whatever went before") from None

    with pytest.raises(KeyError), atomic_path(tmp_path / "a"):
        faulty()
