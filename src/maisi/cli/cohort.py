"""`maisi cohort`: many requests as one table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maisi.cli.options import (
    FILE,
    MOST_TOLD,
    announced,
    fill,
    output_option,
    require_new,
    require_place,
    running_options,
    set_up_memory,
)
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.generation.cohort_table import CohortRow
    from maisi.generation.maker import Maker

LABELLED = ("structure", "tumor", "mask", "image", "library")
"""Columns that give a row's items a label map, and those that begin with anatomy_size."""


@click.group()
def cohort() -> None:
    """Many requests as one table: a row is what `maisi generate` or `inpaint` takes."""


@cohort.command()
@click.argument("spec", type=FILE, required=False, metavar="SPEC.yaml")
@click.option("-o", "--output", type=FILE, help="Table to make (.csv).")
@click.option("--example", is_flag=True, help="Print a commented SPEC.yaml and stop.")
def draw(spec: Path | None, output: Path | None, example: bool) -> None:
    """Draw a table of requests from what SPEC.yaml says: values, choices, distributions.

    Values are spread evenly, and shares are exact to one row. The same file gives the same table.
    """
    from maisi.generation.cohort_table import EXAMPLE, draw_cohort, read_spec, table_text
    from maisi.io.files import atomic_path

    if example:
        click.echo(EXAMPLE, nl=False)
        return
    if spec is None or output is None:
        raise MaisiError("Give SPEC.yaml and -o TABLE.csv; start from what `maisi cohort draw --example` prints.")
    require_new(output, ".csv")
    rows = draw_cohort(read_spec(spec), str(spec))
    with atomic_path(output) as part:
        part.write_text(table_text(rows), encoding="utf-8")
    labelled = [name for name in rows[0] if name in LABELLED or name.startswith("anatomy_size")]
    _tell_without_labels([str(row["case"]) for row in rows if not any(row[name] for name in labelled)], len(rows))
    click.echo(f"{output}: {len(rows)} rows")


@cohort.command()
@click.argument("table", type=FILE, metavar="TABLE.csv")
@click.option("--part", default="1/1", show_default=True, metavar="K/N", help="Every N-th row, from the K-th on.")
@running_options
@click.option("--memory", metavar="AMOUNT", help="What the process may use, such as 6GiB.  [default: all that is free]")
@output_option("Folder to make, with a folder for each row. An interrupted one is gone on with.")
def make(table: Path, part: str, device: str, precision: str, memory: str | None, output: Path) -> None:
    """Make the rows of TABLE.csv, each into a folder of its name; a model is loaded once for all of them.

    Columns are `case`, fields of a request (region, size, spacing, seed, count, mask, structure, tumor, keep, image,
    model, ...), and `anatomy_size.NAME` and `strengthen.NAME`; ';' stands between several words of one cell, and a row
    with an image is painted into it. All rows are checked first. What a row cannot get is told in the end, after the
    others were made. items.csv says how each item came out, overview.png shows them.

    Several processes may make the parts of one table into one folder: --part 1/2 here, --part 2/2 there.
    """
    from maisi.generation.cohort import begin_cohort, finish_cohort
    from maisi.generation.cohort_table import ITEMS, read_cohort
    from maisi.generation.maker import Maker
    from maisi.weights.registry import find_model

    first, step = _part(part)
    rows = read_cohort(table)
    for name in dict.fromkeys(row.request.model for row in rows):
        find_model(name)
    require_place(device, precision)
    maker = Maker(device, precision, set_up_memory(memory))
    begin_cohort(output, table)
    faults: list[str] = []
    models = list(dict.fromkeys(row.request.model for row in rows))
    try:
        for row in sorted(rows[first::step], key=lambda row: models.index(row.request.model)):
            try:
                _make_row(maker, row, output)
            except (MaisiError, MemoryError, RuntimeError) as error:
                faults.append(f"{row.case}: {_sentence(error)}")
                click.echo(f"Note: {faults[-1]}", err=True)
    finally:
        told = finish_cohort(output, rows)
    failed = [row["folder"] for row in told if row["passed"] != "yes"]
    if failed:
        some = ", ".join(failed[:MOST_TOLD]) + (", ..." if len(failed) > MOST_TOLD else "")
        click.echo(f"Note: {len(failed)} of {len(told)} do not pass their check: {some}; {ITEMS} says why.", err=True)
    click.echo(f"{output}: {len(told)} item(s) of {len(rows)} rows")
    if faults:
        raise MaisiError(f"{len(faults)} of {len(rows[first::step])} rows could not be made; the notes above say why.")


def _tell_without_labels(cases: Sequence[str], count: int) -> None:
    """Say which rows of a table, where others have label maps, will have none."""
    if 0 < len(cases) < count:
        some = ", ".join(cases[:MOST_TOLD]) + (", ..." if len(cases) > MOST_TOLD else "")
        click.echo(
            f"Note: {some} ask for no structure, tumour or mask, so they will have no label map; ask for a structure.",
            err=True,
        )


def _sentence(error: Exception) -> str:
    """What a row cannot have; what is a fault of this package goes on.

    Raises:
        RuntimeError: such a fault.
    """
    from maisi.device import fault_of

    known = fault_of(error) if isinstance(error, (MemoryError, RuntimeError)) else str(error)
    if known is None:
        raise error
    return known


def _part(text: str) -> tuple[int, int]:
    """Index of the first row, and how far the next is."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise MaisiError(f"--part {text} is none; write K/N, such as 2/4 for the second of four.")
    return int(match[1]) - 1, int(match[2])


def _make_row(maker: Maker, row: CohortRow, output: Path) -> None:
    prepared = maker.prepare(row.request)
    place = announced(prepared, output / row.case, range(row.request.count), f"{row.case}: ")
    if place.missing:
        fill(place, prepared.load(), f"{row.case} ")
