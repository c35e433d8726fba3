"""A folder of label maps to draw from: built from files, searched by what it must show, put on any grid.

A library is `index.json` and `masks/0001.nii.gz`, ...: each cropped to the body and a margin, centred, in RAS, without
a file name, a date or a place of the original. It holds labels only, no image.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field
from scipy import ndimage

from maisi.anatomy import BACKGROUND, BODY, CUSTOM_IDS, TUMORS, label_name
from maisi.config import Config, parse_config
from maisi.data.label_maps import checked_mask, counts
from maisi.data.mask_deform import DeformationRanges, deform, draw_deformation
from maisi.data.mask_import import read_our_labels
from maisi.data.preprocess import resample_to_grid
from maisi.data.regions import regions_of
from maisi.errors import MaisiError
from maisi.io.files import INDEX, VOLUME_ENDINGS, is_volume, new_folder, sha256, write_json
from maisi.io.nifti import read_label_names, read_labels, write_volume
from maisi.volume import Volume

Triple = tuple[int, int, int]
_Job = tuple[Path, Path, int, str]
"""A file, the folder of the library, the mask's number in it, and the note."""
Spacing = tuple[float, float, float]

MARGIN_MM = 10.0
"""Air that is kept around the body."""

HEIGHT_SHARE = 0.8
"""A mask fits a field of view that is taller than itself as long as it fills this share of the height."""

COARSENESS = 2.0
"""A mask fits a spacing as long as its own is at most this many times as large along each axis."""


class MaskRow(Config):
    """One label map of a library.

    Attributes:
        id: number within the library, as text ('0001').
        file: path below the library's folder.
        regions: body regions it covers, from top to bottom.
        structures: label id -> volume in ml; tumours and the body's rest (200) not among them.
        tumors: tumour id -> diameter in mm of a ball of the same volume (all of one kind together).
        size: voxels along X, Y, Z.
        spacing_mm: of them.
        body_mm: extent of all that is labelled, along X, Y, Z.
        note: where it comes from, in the builder's words.
        sha256: of the file.
    """

    id: str
    file: str
    regions: tuple[str, ...]
    structures: dict[int, float]
    tumors: dict[int, float]
    size: Triple
    spacing_mm: Spacing
    body_mm: Spacing
    note: str = ""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class MaskIndex(Config):
    """What `index.json` holds."""

    version: int = Field(default=1, ge=1, le=1)
    masks: tuple[MaskRow, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Found:
    """Answer of a search: the rows that fit, the best first; without any, a sentence that says why."""

    rows: tuple[MaskRow, ...]
    reason: str = ""


@dataclass(frozen=True)
class _Wish:
    """One condition of a search: in words, whether a row meets it, and how far off a row is (0 is met)."""

    text: str
    miss: Callable[[MaskRow], float]


@dataclass(frozen=True)
class Built:
    """What `build` made: the index, and a sentence for each file that was left out."""

    index: MaskIndex
    left_out: tuple[str, ...] = ()


def build(
    source: Path | Sequence[Path],
    out: Path,
    note: str = "",
    *,
    skip_unreadable: bool = False,
    workers: int = 1,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Make a library of label maps; whole or not at all.

    Args:
        source: a folder (all volumes in it and in folders below, of generated items their labels), or files.
        out: folder to make.
        note: where the masks come from, kept in each row; name no patient here.
        skip_unreadable: whether to leave out what is no label map in maisi's ids.
        workers: processes that read and check; the library is the same.
        report: told how many files are done, of how many.

    Raises:
        MaisiError: `out` exists, there is no file, or one of them (with `skip_unreadable` all) is no label map in
            maisi's ids.
    """
    files = _mask_files(source)
    rows, left_out = [], []
    with new_folder(out) as part:
        (part / "masks").mkdir()
        jobs = [(file, part, number, note) for number, file in enumerate(files, start=1)]
        for done, made in enumerate(_mapped(_entry, jobs, workers), start=1):
            if isinstance(made, MaskRow):
                rows.append(made)
            elif skip_unreadable:
                left_out.append(made)
            else:
                raise MaisiError(made)
            report(done, len(files))
        if not rows:
            raise MaisiError(f"None of {len(files)} files can be used; the first: {left_out[0]}")
        index = MaskIndex(masks=tuple(rows))
        write_json(part / INDEX, index.model_dump(mode="json"))
    return Built(index, tuple(left_out))


def _mapped(work: Callable[[_Job], MaskRow | str], jobs: Sequence[_Job], workers: int) -> Iterator[MaskRow | str]:
    """In order, here or in several processes."""
    if workers <= 1:
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap(work, jobs)


def _entry(job: _Job) -> MaskRow | str:
    """Check a file, write its mask, and describe it; a sentence where it cannot be used."""
    file, out, number, note = job
    try:
        names = {id: name for id, name in read_label_names(file).items() if id in CUSTOM_IDS}
        mask = _cropped(checked_mask(read_our_labels(file, names), names, str(file)).to_ras())
    except MaisiError as error:
        return str(error)
    path = out / "masks" / f"{number:04d}.nii.gz"
    said = "label map of a library, made by maisi"
    write_volume(path, mask, description=said, synthetic=False, names=names or None)
    return _row(f"{number:04d}", f"masks/{path.name}", mask, note, sha256(path))


def _mask_files(source: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(source, (str, Path)):
        files = [Path(file) for file in source]
    elif Path(source).is_dir():
        files = list(_below(Path(source)))
    else:
        raise MaisiError(f"{source} is not a folder; give a folder of label maps.")
    if not files:
        raise MaisiError(f"There is no label map in {source}; give files that end in {', '.join(VOLUME_ENDINGS)}.")
    return files


def _below(folder: Path) -> Iterator[Path]:
    """Volumes in a folder, then those in each folder below; of an item, which has an image beside them, its labels."""
    entries = sorted(folder.iterdir())
    volumes = [path for path in entries if is_volume(path)]
    named = {path.name.partition(".")[0]: path for path in volumes}
    yield from [named["labels"]] if named.keys() >= {"image", "labels"} else volumes
    for path in entries:
        if path.is_dir() and not path.is_symlink() and not is_volume(path):  # links may lead in circles
            yield from _below(path)


def _cropped(mask: Volume) -> Volume:
    """What is labelled and a margin, centred on the world's origin."""
    margins = (round(MARGIN_MM / step) for step in mask.spacing_mm)
    box = tuple(slice(max(0, s.start - m), s.stop + m) for s, m in zip(_filled(mask), margins, strict=True))
    return Volume.from_spacing(np.ascontiguousarray(mask.array[box]), mask.spacing_mm)


def _filled(mask: Volume) -> tuple[slice, ...]:
    """The smallest box around what is labelled."""
    return ndimage.find_objects((mask.array > 0).view(np.uint8))[0]


def _row(id: str, file: str, mask: Volume, note: str, sha256: str) -> MaskRow:
    voxel_ml = math.prod(mask.spacing_mm) / 1000
    voxels = counts(mask.array)
    volumes = {int(i): round(float(voxels[i]) * voxel_ml, 4) for i in np.flatnonzero(voxels)}
    named = {i: ml for i, ml in volumes.items() if i not in (BACKGROUND, BODY)}
    body = [(part.stop - part.start) * step for part, step in zip(_filled(mask), mask.spacing_mm, strict=True)]
    return MaskRow(
        id=id,
        file=file,
        regions=regions_of(mask.array, mask.spacing_mm),
        structures={i: ml for i, ml in named.items() if i not in TUMORS},
        tumors={i: round((6000 * ml / math.pi) ** (1 / 3), 2) for i, ml in named.items() if i in TUMORS},
        size=mask.shape,
        spacing_mm=mask.spacing_mm,
        body_mm=(body[0], body[1], body[2]),
        note=note,
        sha256=sha256,
    )


class MaskLibrary:
    """A library opened for reading; the index is read and checked, the masks are not yet."""

    def __init__(self, folder: Path) -> None:
        """Open a library.

        Raises:
            MaisiError: there is none, or its index is damaged.
        """
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise MaisiError(f"{folder} is no mask library; make one with `maisi mask library build`.") from None
        except ValueError as error:
            raise MaisiError(f"{path} is damaged ({error}); build the library again.") from None
        self.rows = parse_config(MaskIndex, values, str(path)).masks

    def only(self, wanted: Callable[[MaskRow], bool]) -> MaskLibrary:
        """The library with those of its masks alone; there may be none."""
        part = copy(self)
        part.rows = tuple(row for row in self.rows if wanted(row))
        return part

    def search(
        self,
        regions: Sequence[str] = (),
        structures: Sequence[int] = (),
        tumors: Sequence[int] = (),
        size_mm: Spacing | None = None,
        spacing: Spacing | None = None,
    ) -> Found:
        """Find the masks that show what is wished for.

        Args:
            regions: all must be covered.
            structures: ids that must be there.
            tumors: tumour ids that must be there.
            size_mm: field of view to fill along X, Y, Z: its height decides, as beside the body lies air.
            spacing: of the grid to fill, in mm.

        Returns:
            Rows that fit; first those nearest in height and spacing that show least beside what was asked for.
        """
        wishes = _wishes(regions, structures, tumors, size_mm, spacing)
        fitting = [row for row in self.rows if not any(wish.miss(row) for wish in wishes)]
        if not fitting:
            return Found((), self._reason(wishes))

        def strangeness(row: MaskRow) -> tuple[float, int, str]:
            height = abs(math.log(_height(row) / size_mm[2])) if size_mm else 0.0
            steps = sum(abs(math.log(a / b)) for a, b in zip(row.spacing_mm, spacing, strict=True)) if spacing else 0.0
            return (round(height + steps / 3, 6), len(set(row.regions) - set(regions)), row.id)

        return Found(tuple(sorted(fitting, key=strangeness)))

    def _reason(self, wishes: Sequence[_Wish]) -> str:
        """Which wish no mask meets (else: that none meets all together), and the mask that comes nearest."""
        if not self.rows:
            return "There is no mask of this kind."
        alone = [wish.text for wish in wishes if all(wish.miss(row) for row in self.rows)]
        nearest = min(self.rows, key=lambda row: (sum(min(w.miss(row), 1.0) for w in wishes), row.id))
        missed = " and ".join(wish.text for wish in wishes if wish.miss(nearest))
        what = f"has {' or '.join(alone)}" if alone else "meets all wishes at once"
        return f"None of the {len(self.rows)} masks {what}; the nearest, {nearest.id}, lacks only {missed}."

    def load(
        self,
        row: MaskRow,
        size: Triple,
        spacing: Spacing,
        centre_on: Sequence[int] = (),
        deformation: DeformationRanges | None = None,
        generator: np.random.Generator | None = None,
    ) -> Volume:
        """Read a mask, deform it, and put it on a grid; where the grid leaves the mask there is background.

        Args:
            row: from `rows` or `search`.
            size: voxels along X, Y, Z.
            spacing: in mm.
            centre_on: ids that the field of view is centred on, as far as it stays within the mask; () is all.
            deformation: bounds of a deformation, drawn from `generator`; None changes nothing.
            generator: needed with `deformation`.

        Returns:
            uint8, RAS+, centred on the world's origin.

        Raises:
            MaisiError: the file is missing, not the one of the index, or holds nothing to centre on.
        """
        path = self.folder / row.file
        if not path.is_file() or sha256(path) != row.sha256:
            raise MaisiError(f"{path} is missing or was changed after the library was built; build the library again.")
        mask = read_labels(path).to_ras()
        if deformation is not None:
            if generator is None:
                raise ValueError("a deformation needs a generator")
            mask = deform(mask, draw_deformation(generator, deformation, mask))
        return _on_grid(mask, size, spacing, centre_on)


def _on_grid(mask: Volume, size: Triple, spacing: Spacing, centre_on: Sequence[int]) -> Volume:
    """Cut a field of view out of a RAS+ mask, or lay the mask in its middle along an axis where that is shorter."""
    centre = np.zeros(3)
    wanted = np.isin(mask.array, centre_on) if len(centre_on) else None
    if wanted is not None and not wanted.any():
        names = ", ".join(label_name(id) for id in centre_on)
        raise MaisiError(f"The mask holds nothing of {names} to centre on; choose another mask.")
    for axis in range(3):
        step, count = mask.spacing_mm[axis], mask.shape[axis]
        place = (count - 1) / 2
        room = (count * step - size[axis] * spacing[axis]) / 2 / step
        if wanted is not None and room > 0:
            filled = np.flatnonzero(wanted.any(axis=tuple(a for a in range(3) if a != axis)))
            place += float(np.clip((filled[0] + filled[-1]) / 2 - place, -room, room))
        centre[axis] = mask.affine[axis, 3] + place * step
    origin = centre - (np.array(size) - 1) / 2 * spacing
    like = Volume.from_spacing(
        np.empty(size, np.uint8), spacing, (float(origin[0]), float(origin[1]), float(origin[2]))
    )
    return Volume.from_spacing(resample_to_grid(mask, like, order=0, fill=BACKGROUND).array, spacing)


def _height(row: MaskRow) -> float:
    return row.size[2] * row.spacing_mm[2]


def _wishes(
    regions: Sequence[str],
    structures: Sequence[int],
    tumors: Sequence[int],
    size_mm: Spacing | None,
    spacing: Spacing | None,
) -> list[_Wish]:
    wishes = [_Wish(f"the region {r}", lambda row, r=r: float(r not in row.regions)) for r in regions]  # type: ignore[misc]
    for id in structures:
        wishes.append(_Wish(f"the structure '{label_name(id)}'", lambda row, i=id: float(i not in row.structures)))  # type: ignore[misc]
    for id in tumors:
        wishes.append(_Wish(f"a '{label_name(id)}'", lambda row, i=id: float(i not in row.tumors)))  # type: ignore[misc]
    if size_mm is not None:
        need = HEIGHT_SHARE * size_mm[2]
        wishes.append(_Wish(f"a height of {need:.0f} mm", lambda row: max(0.0, 1 - _height(row) / need)))
    if spacing is not None:
        limit = [COARSENESS * s + 1e-6 for s in spacing]
        text = "voxels of at most " + " x ".join(f"{s:.3g}" for s in limit) + " mm"
        over = lambda row: max(0.0, *(1 - b / a for a, b in zip(row.spacing_mm, limit, strict=True)))  # noqa: E731
        wishes.append(_Wish(text, over))
    return wishes
