"""`maisi mask import`: masks of other segmenters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maisi.cli.options import FILE, MOST_TOLD, output_option, require_new
from maisi.errors import MaisiError
from maisi.io.files import VOLUME_ENDINGS

if TYPE_CHECKING:
    from maisi.data.label_maps import Vocabulary
    from maisi.data.mask_import import Source
    from maisi.io.dicom_structures import StructureSet
    from maisi.volume import Volume


@click.command("import")
@click.argument("segmentations", nargs=-1, required=True, type=FILE)
@click.option("--ct", type=FILE, help="CT of the same body, in HU: it shows where the body ends.")
@click.option(
    "--from",
    "vocabularies",
    multiple=True,
    required=True,
    metavar="NAME|TABLE.json",
    help="What the ids mean: totalsegmentator, vista3d, maisi, openkbp or a table; once, or once for each file.",
)
@output_option("Label map to make (.nii.gz, .nii, .nrrd or .zarr).")
@click.option("--resample", "to_grid", is_flag=True, help="Bring what lies on another grid to the CT's or the first's.")
@click.option("--spacing", metavar="X,Y,Z", help="Resample the result to this spacing in mm.  [default: as it is]")
@click.option("--swap-sides", is_flag=True, help="Exchange left and right where they are swapped.")
@click.option("--report", "with_report", is_flag=True, help="Write what was found beside the output, as JSON.")
def import_(
    segmentations: Sequence[Path],
    ct: Path | None,
    vocabularies: Sequence[str],
    output: Path,
    to_grid: bool,
    spacing: str | None,
    swap_sides: bool,
    with_report: bool,
) -> None:
    """Make one checked mask of SEGMENTATIONS from other programs, the most trusted first.

    They are label maps, folders of files that hold one structure each and are called as it is (liver.nii.gz, as
    TotalSegmentator leaves them without --ml), or DICOM: SEG, or RTSTRUCT with its CT, where structures are known by
    their names. Where masks overlap, tumour goes over organ, then earlier over later, in DICOM small over large. The
    body about them (200) is what the CT shows, or without one a guess from the labels. A table is a JSON file
    {"their id or name": our id or name, ..., "dropped": {"their id or name": "reason"}}; a class that `maisi labels`
    lacks is written {"id": 150, "name": "..."}.
    """
    from maisi.data.mask_import import import_masks
    from maisi.io.files import write_json
    from maisi.io.nifti import read_volume, write_volume
    from maisi.request import Request

    spacing_mm = Request.parse(spacing=spacing).spacing
    require_new(output, *VOLUME_ENDINGS)
    beside = output.with_name(output.name.removesuffix(".gz").rpartition(".")[0] + ".json")
    if with_report:
        require_new(beside, ".json")
    if len(vocabularies) not in (1, len(segmentations)):
        raise MaisiError(
            f"{len(segmentations)} masks and {len(vocabularies)} times --from are given; give it once, or for each."
        )
    words = vocabularies if len(vocabularies) > 1 else [*vocabularies] * len(segmentations)
    tables = [_table(name) for name in words]
    image = None if ct is None else read_volume(ct)
    sources = [_source(path, *table, ct, image) for path, table in zip(segmentations, tables, strict=True)]
    result, report = import_masks(sources, image, to_grid=to_grid, swap_sides=swap_sides, spacing_mm=spacing_mm)
    write_volume(output, result, description="labels imported by maisi", synthetic=False, names=report.names)
    if with_report:
        write_json(beside, report.as_json())
    for line in report.lines():
        click.echo(line)
    click.echo(str(output))


def _table(name: str) -> tuple[str, object]:
    """Check what --from says before a mask is read: the name, and the JSON where it is a table's."""
    from maisi.data.label_maps import VOCABULARIES, vocabulary

    if not name.endswith(".json"):
        vocabulary(name)
        return name, None
    try:
        return name, json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(VOCABULARIES)
        raise MaisiError(
            f"Cannot read {name}: {error.strerror}; give a table you may read, or one of {known}."
        ) from None
    except ValueError as error:
        raise MaisiError(f"{name} is no JSON ({error}); mend it.") from None


def _space_of(ct: Path) -> str:
    """Identifier of a DICOM series' frame of reference; "" for other files."""
    from maisi.io.dicom import is_dicom, open_series
    from maisi.io.zarr_store import is_zarr

    return open_series(ct).frame_of_reference if is_dicom(ct) and not is_zarr(ct) else ""


def _source(path: Path, name: str, table: object, ct: Path | None, image: Volume | None) -> Source:
    from maisi.data.label_maps import custom_vocabulary, named_vocabulary, vocabulary
    from maisi.data.mask_import import Source
    from maisi.data.structure_files import read_structure_files, structure_files
    from maisi.io.dicom_structures import holds_structures, read_structures
    from maisi.io.nifti import read_label_names, read_labels

    def by_name(names: Mapping[int, str], drawn: Mapping[int, str]) -> Vocabulary:
        if table is None:
            return named_vocabulary(name, drawn, str(path))
        return custom_vocabulary(table, name, names, by_name=True)

    if files := structure_files(path, name):
        labels, names = read_structure_files(files)
        return Source(labels, vocabulary=by_name(names, names), name=str(path), names=names)
    if holds_structures(path):
        held = read_structures(path, image)
        space = "" if ct is None else _space_of(ct)
        if space and held.frames_of_reference and space not in held.frames_of_reference:
            click.echo(f"Note: {path} says that it was drawn in another scan's space than this CT's.", err=True)
        words = by_name(held.names, {number: n for number, n in held.names.items() if number not in held.empty})
        return Source(_painted(held, words, path), vocabulary=words, name=str(path), names=held.names)
    names = read_label_names(path)
    words = vocabulary(name) if table is None else custom_vocabulary(table, name, names)
    return Source(labels=read_labels(path), vocabulary=words, name=str(path), names=names)


def _painted(held: StructureSet, words: Vocabulary, path: Path) -> Volume:
    """A label map of a file's structures; none of them is lost without a word."""
    import numpy as np

    from maisi.data.label_maps import rank

    unknown = [called for number, called in held.names.items() if number not in words.to and number not in held.empty]
    if unknown:
        some = ", ".join(f"'{called}'" for called in unknown[:MOST_TOLD]) + (
            ", ..." if len(unknown) > MOST_TOLD else ""
        )
        raise MaisiError(f"{path} holds structures that {words.name} neither maps nor drops ({some}); name each there.")
    for number, fault in held.faults.items():
        if words.to[number]:
            raise MaisiError(fault)
    labels = held.painted(lambda number: rank(words.to[number]))
    present = set(np.unique(labels.array))
    for number, called in held.names.items():
        if words.to.get(number) and number not in present:
            why = "has no voxel on this grid" if number in held.empty else "is covered by others"
            click.echo(f"Note: '{called}' {why}.", err=True)
    return labels
