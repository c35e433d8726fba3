"""`maisi cohort`: many requests as one table."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maisi.cli.generation import order_of
from maisi.cli.options import FILE, Savable, fill, output_option, require_new, running_options, set_up_memory
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.generation.cohort_table import CohortRow
    from maisi.generation.pipeline import Model
    from maisi.request import Request
    from maisi.weights.registry import ModelFolder

MOST_TOLD = 5

Make = Callable[[int, Callable[[str, int, int], None]], Savable]
Prepared = tuple[dict[str, Any], Sequence[str], Callable[[], Make]]
"""What decides a row's items, notes, and what loads the model and then makes an item."""


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
    from maisi.generation.cohort import ITEMS, begin_cohort, finish_cohort
    from maisi.generation.cohort_table import read_cohort

    first, step = _part(part)
    rows = read_cohort(table)
    for name in dict.fromkeys(row.request.model for row in rows):
        _find(name)
    limit = set_up_memory(memory)
    begin_cohort(output, table)
    maker = _Maker(output, device, precision, limit)
    faults: list[str] = []
    for row in rows[first::step]:
        try:
            maker.make(row)
        except MaisiError as error:
            faults.append(f"{row.case}: {error}")
            click.echo(f"Note: {faults[-1]}", err=True)
    told = finish_cohort(output, rows)
    failed = [row["folder"] for row in told if row["passed"] != "yes"]
    if failed:
        some = ", ".join(failed[:MOST_TOLD]) + (", ..." if len(failed) > MOST_TOLD else "")
        click.echo(f"Note: {len(failed)} item(s) do not pass their check: {some}; {ITEMS} says why.", err=True)
    click.echo(f"{output}: {len(told)} item(s) of {len(rows)} rows")
    if faults:
        raise MaisiError(f"{len(faults)} of {len(rows[first::step])} rows could not be made; the notes above say why.")


def _part(text: str) -> tuple[int, int]:
    """Index of the first row, and how far the next is."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise MaisiError(f"--part {text} is none; write K/N, such as 2/4 for the second of four.")
    return int(match[1]) - 1, int(match[2])


def _find(name: str) -> ModelFolder:
    from maisi.weights.registry import find_model

    return find_model(name)


class _Maker:
    """Makes rows one after the other; keeps the last model, as long as rows name it."""

    def __init__(self, output: Path, device: str, precision: str, limit: int | None) -> None:
        self.output = output
        self._running = (device, precision, limit)
        self._model: tuple[str, Model] | None = None

    def make(self, row: CohortRow) -> None:
        """Make the items of a row that are missing.

        Raises:
            MaisiError: it cannot be made.
        """
        from maisi.generation.output import destination

        request, folder = row.request, _find(row.request.model)
        prepared = self._inpainting if request.image is not None else self._generation
        order, notes, maker = prepared(request, folder)
        place = destination(self.output / row.case, order, range(request.count))
        for note in notes:
            click.echo(f"Note: {row.case}: {note}", err=True)
        if place.missing:
            fill(place, maker(), f"{row.case} ")

    def _generation(self, request: Request, folder: ModelFolder) -> Prepared:
        from maisi.generation.job import make_job

        job = make_job(request, folder.config, carried=folder.library())

        def maker() -> Make:
            model = self._loaded(request.model, folder)
            plan = model.prepare(job).decode
            return lambda number, report: model.item(job, plan, number, report)

        return order_of(request, 0, folder, masked=job.labels is not None), job.notes, maker

    def _inpainting(self, request: Request, folder: ModelFolder) -> Prepared:
        from maisi.generation.inpaint import inpaint_item
        from maisi.generation.inpaint_job import make_inpaint_job

        job, by_network = make_inpaint_job(request, folder.config), request.by == "network"

        def maker() -> Make:
            return partial(inpaint_item, self._loaded(request.model, folder) if by_network else None, job)

        return order_of(request, 0, folder if by_network else None, masked=True), job.notes, maker

    def _loaded(self, name: str, folder: ModelFolder) -> Model:
        from maisi.generation.pipeline import Model

        if self._model is None or self._model[0] != name:
            self._model = None  # gone before the next is loaded
            self._model = (name, Model(folder, *self._running))
        return self._model[1]
