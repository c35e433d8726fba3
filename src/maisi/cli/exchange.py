"""Results for other programs: `export`."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from maisi.cli.options import FILE, output_option, progress, require_new
from maisi.errors import MaisiError


@click.command()
@click.argument("folders", nargs=-1, required=True, type=FILE)
@click.option("--to", "to", required=True, metavar="FORMAT", help="nnunet, msd, auto3dseg, monai, torchio or dicom.")
@output_option("Folder to make.")
@click.option("--keep", metavar="LABELS", help="Names or ids with commas between, in this order.  [default: all]")
@click.option("--passed", is_flag=True, help="Leave out pairs that did not pass their quality check.")
@click.option("--folds", type=int, default=5, show_default=True, help="Folds of an Auto3DSeg list.")
def export(folders: Sequence[Path], to: str, output: Path, keep: str | None, folds: int, passed: bool) -> None:
    """Make a data set of the pairs of image and mask in FOLDERS, which `maisi generate` made.

    Labels get the values 1, 2, ...; export.json says what they were. Tumours that are not kept count as the organ
    that they grow in. As dicom each item becomes a series of CT, and its mask a segmentation with a segment a label.
    """
    from maisi.generation.export import LAYOUTS
    from maisi.generation.export import export as write

    require_new(output, "")
    to = to.lower()
    if to not in (*LAYOUTS, "dicom"):
        raise MaisiError(f"Unknown format '{to}'; choose from {', '.join(LAYOUTS)}, dicom.")
    wanted = None if keep is None else [_label(word) for word in next(csv.reader([keep], skipinitialspace=True), [])]
    if to == "dicom":
        _export_dicom(folders, output, wanted, passed)
        return
    with progress() as report:
        told = partial(report, "export")
        made = write(folders, output, to, wanted, folds, told, passed)
    left_out = f"; {made.without_mask} items without a mask left out" if made.without_mask else ""
    click.echo(f"{made.folder}: {len(made.cases)} pairs, {len(made.ids)} labels{left_out}")
    _tell_not_passed(made.not_passed, "pair(s)", passed)
    if to == "nnunet" and not re.fullmatch(r"Dataset\d{3}_\w+", output.name):
        click.echo("Note: nnU-Net looks for folders called DatasetNNN_Name, such as Dataset501_Synthetic.", err=True)


def _export_dicom(folders: Sequence[Path], output: Path, wanted: list[int | str] | None, passed: bool) -> None:
    from maisi.generation.export_dicom import export_dicom

    with progress() as report:
        made = export_dicom(folders, output, wanted, partial(report, "export"), passed)
    click.echo(f"{made.folder}: {len(made.cases)} series, {made.segmented} segmentations")
    _tell_not_passed(made.not_passed, "item(s)", passed)


def _tell_not_passed(count: int, what: str, left_out: bool) -> None:
    if count:
        where = "were left out" if left_out else "are among them (--passed leaves them out)"
        click.echo(f"Note: {count} {what} that did not pass their quality check {where}.", err=True)


def _label(word: str) -> int | str:
    """An id or a name, which may be one that the masks give."""
    return int(word) if word.strip().isdecimal() else word.strip()
