"""What is sent to the service as a zip: a series of DICOM, which becomes one volume. Knows no HTTP.

Of the DICOM nothing stays: the volume has its geometry and numbers alone.
"""

from __future__ import annotations

import lzma
import shutil
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

from maisi.errors import MaisiError
from maisi.io.nifti import read_volume, write_volume

MOST_FILES = 10_000
"""In a zip."""


def volume_of_zip(archive: Path, volume: Path, name: str, most_bytes: int) -> None:
    """Write the series that a zip holds as a volume, and delete the zip.

    Args:
        archive: the zip; folders within it mean nothing.
        volume: file to write.
        name: what messages call the zip.
        most_bytes: that its files may have together once unpacked.

    Raises:
        MaisiError: it is no zip, is encrypted or damaged, holds more than it may, or no series, or several.
        OSError: the disk is full.
    """
    with TemporaryDirectory(prefix=".part-", dir=archive.parent) as scratch:
        folder = Path(scratch)
        try:
            _unpack(archive, folder, name, most_bytes)
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, zlib.error, lzma.LZMAError):
            raise MaisiError(f"'{name}' is no zip, or is damaged or encrypted; send a plain one.") from None
        archive.unlink()
        try:
            image = read_volume(folder)
        except MaisiError as error:
            raise MaisiError(str(error).replace(str(folder), f"'{name}'")) from None
        write_volume(volume, image, synthetic=False)


def _unpack(archive: Path, folder: Path, name: str, most_bytes: int) -> None:
    """Write each file under a number: names in a zip may point anywhere."""
    with zipfile.ZipFile(archive) as zipped:
        files = [entry for entry in zipped.infolist() if not entry.is_dir()]
        if len(files) > MOST_FILES:
            raise MaisiError(f"'{name}' has {len(files)} files; send one series, of at most {MOST_FILES}.")
        if sum(entry.file_size for entry in files) > most_bytes:
            raise MaisiError(f"'{name}' unpacks to more than {most_bytes / 1e9:.1f} GB; send less.")
        for number, entry in enumerate(files):
            # which ends at the size that the entry tells, whatever comes out
            with zipped.open(entry) as source, (folder / f"{number:05d}").open("wb") as out:
                try:
                    shutil.copyfileobj(source, out)
                except OSError as error:
                    if error.errno is None:  # bz2's way to say that its data are damaged
                        raise zipfile.BadZipFile from None
                    raise
