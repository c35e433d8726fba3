"""Options and habits that commands share: where networks run, grids, budgets, progress, outputs that are new."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import click
from click.core import ParameterSource

from maisi.errors import MaisiError
from maisi.io import files

if TYPE_CHECKING:
    from maisi.evaluation.result import Result
    from maisi.generation.maker import Prepared
    from maisi.generation.output import Destination

FILE = click.Path(path_type=Path)
MOST_FINISHED = 4
"""Bars of finished stages that stay on the screen."""

MOST_SHOWN = 20
"""Numbers of an evaluation that are printed."""

MOST_TOLD = 5
"""Items of which a command says what is wrong with them."""

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class Savable(Protocol):
    """What items have in common here."""

    def save(self, folder: Path, parents: bool = True) -> Any:
        """Write to a new folder."""


def output_option(help: str) -> Decorator:
    """`-o`, required; `help` says what it makes."""
    return click.option("-o", "--output", "output", type=FILE, required=True, help=help)


def result_option(command: Callable[..., None]) -> Callable[..., None]:
    """`-o` of an evaluation."""
    return output_option("Folder to make, with result.json, table.md and figure.png.")(command)


def cache_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--cache`: where an evaluation keeps what is slow."""
    help = "Folder to go on from after an interruption, which stays.  [default: OUTPUT.cache, removed in the end]"
    return click.option("--cache", type=FILE, help=help)(command)


def skip_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--skip-unreadable`: what an evaluation does about damaged files."""
    help = "Leave out, and list, what can't be read."
    return click.option("--skip-unreadable", is_flag=True, help=help)(command)


def ranges_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--ranges` of what makes items."""
    help = "What passes the checks, made by `maisi quality learn`.  [default: the model's, or the carried ranges]"
    return click.option("--ranges", type=FILE, help=help)(command)


def temperature_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--temperature` of what is denoised."""
    help = "Of the noise; below 1 smoother, more alike.  [default: the model's]"
    return click.option("--temperature", type=float, help=help)(command)


def items_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which items are made."""
    help = "Number of the first item."
    command = click.option("--first", type=int, default=0, show_default=True, help=help)(command)
    return click.option("-n", "--count", type=int, default=1, show_default=True, help="How many items.")(command)


def running_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say where networks run."""
    command = click.option("--precision", default="auto", show_default=True, help="auto, fp32 or bf16.")(command)
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")(command)


def require_place(device: str, precision: str) -> None:
    """Refuse, before any work, a device or a precision that there is not.

    Raises:
        MaisiError: so.
    """
    from maisi.device import resolve_device, resolve_precision

    resolve_precision(precision, resolve_device(device))


def refuse_given(names: Iterable[str], why: str) -> None:
    """Refuse parameters of the running command that would have no effect.

    Args:
        names: of the parameters.
        why: rest of the sentence that begins with the option.

    Raises:
        MaisiError: one of them was given.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is ParameterSource.COMMANDLINE:
            raise MaisiError(f"{parameter.opts[0]} {why}; leave it out.")


def budget_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say how much memory may be used."""
    help = "Print how it would be done and the memory that takes, and do nothing else."
    command = click.option("--plan", "only_plan", is_flag=True, help=help)(command)
    help = "What the process may use, such as 6GiB; of several, each.  [default: all that is free]"
    return click.option("--memory", metavar="AMOUNT", help=help)(command)


def grid_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say what a volume shows and how it is sampled."""
    command = click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same volume.")(command)
    command = click.option("--spacing", metavar="X,Y,Z", help="Distance between voxels in mm.")(command)
    command = click.option("--size", metavar="X,Y,Z", help="Voxels; any number from 1 to 1024.")(command)
    help = "Body region: head-neck, chest, abdomen or lower-body. May be repeated."
    return click.option("--region", multiple=True, metavar="NAME", help=help)(command)


def slice_features_options(default: str) -> Decorator:
    """`--features` and `--feature-weights`: what 2D slices are looked at through."""
    help_name = (
        "gradients, efficientnet-lite0, or inception or radimagenet with their weights.  "
        f"[default: those of --feature-weights, else {default}]"
    )

    def add(command: Callable[..., None]) -> Callable[..., None]:
        help = "A published network, converted by `maisi weights convert`."
        command = click.option("--feature-weights", type=FILE, help=help)(command)
        return click.option("--features", help=help_name)(command)

    return add


def autoencoder_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that name an autoencoder, in a model or alone."""
    help = "A converted autoencoder, which says its own configuration; in place of --model."
    command = click.option("--autoencoder", type=FILE, help=help)(command)
    return click.option("--model", help="A carried model's name, or a model folder.  [default: tiny]")(command)


def autoencoder_file(model: str | None, autoencoder: Path | None) -> Path:
    """Find the file, checked as far as its header goes.

    Raises:
        MaisiError: both are given, or there is no such autoencoder.
    """
    from maisi.weights.load import read_header
    from maisi.weights.registry import find_model

    if autoencoder is None:
        return find_model(model or "tiny").path("autoencoder")
    if model is not None:
        raise MaisiError("Both --model and --autoencoder are given; leave one of them out.")
    held = read_header(autoencoder).network
    if held != "autoencoder":
        raise MaisiError(f"{autoencoder} holds the network '{held}'; give a file with an autoencoder.")
    return autoencoder


def require_new(path: Path, *endings: str) -> None:
    """Refuse, before any work, an output file (or a folder: without `endings`) that exists or cannot be made.

    Raises:
        MaisiError: so.
    """
    if endings and not path.name.lower().endswith(endings):
        raise MaisiError(f"{path}: this command writes {' or '.join(endings)}; give a name that ends so.")
    if endings and path.name.lower().endswith(".zarr"):
        from maisi.io.zarr_store import require_package

        require_package()
    files.require_new(path)


def require_first(first: int) -> None:
    """Refuse a first item that is none.

    Raises:
        MaisiError: so.
    """
    if first < 0:
        raise MaisiError(f"The first item cannot be number {first}; items are numbered from 0.")


@overload
def announced(prepared: Prepared, output: Path, numbers: range, what: str = "") -> Destination: ...


@overload
def announced(prepared: Prepared, output: None, numbers: range, what: str = "") -> None: ...


@overload
def announced(prepared: Prepared, output: Path | None, numbers: range, what: str = "") -> Destination | None: ...


def announced(prepared: Prepared, output: Path | None, numbers: range, what: str = "") -> Destination | None:
    """Look where a request's items go, if anywhere, and print its notes, with `what` before each.

    Raises:
        MaisiError: the folder holds something else, or cannot be made.
    """
    from maisi.generation.output import destination

    place = None if output is None else destination(output, prepared.order, numbers)
    for note in prepared.notes:
        click.echo(f"Note: {what}{note}", err=True)
    return place


def fill(place: Destination, make: Callable[[int, Callable[[str, int, int], None]], Savable], what: str = "") -> None:
    """Make and write the items that are missing; `make` takes an item's number and what to tell its progress to.

    Progress calls an item by `what` and its number.
    """
    with place.begun():
        try:
            with progress() as report:
                for number in place.missing:
                    made = make(number, partial(report, f"{what}{number:04d}"))
                    made.save(place.item_folder(number), parents=False)  # a folder that is gone ends the work
        except BaseException:
            place.withdraw()
            raise


def say_items(output: Path, numbers: range, place: Destination) -> None:
    """Print how many items a folder has, how many it had before, and what their records say against them."""
    from maisi.generation.output import RECORD, record_in

    before = len(numbers) - len(place.missing)
    click.echo(f"{output}: {len(numbers)} item(s)" + (f", {before} of them from before" if before else ""))
    faults = {}
    for number in numbers:
        told = record_in(place.item_folder(number))
        if told is None:
            faults[number] = [f"{RECORD} is missing or damaged; remove the item, and the same command makes it again."]
        elif told[1]:
            faults[number] = told[1]
    for number in list(faults)[:MOST_TOLD]:
        more = f" (and {len(faults[number]) - 1} more)" if len(faults[number]) > 1 else ""
        click.echo(f"Note: {number:04d} does not pass its check: {faults[number][0]}{more}", err=True)
    if len(faults) > MOST_TOLD:
        click.echo(f"Note: {len(faults) - MOST_TOLD} more do not pass theirs; {RECORD} says why.", err=True)


def say_result(result: Result, output: Path) -> None:
    """Print the numbers of an evaluation, and where it lies."""
    from maisi.evaluation.result import shown

    for name, value in list(result.summary.items())[:MOST_SHOWN]:
        click.echo(f"{name}: {shown(value)}")
    if len(result.summary) > MOST_SHOWN:
        click.echo(f"... and {len(result.summary) - MOST_SHOWN} more in {output / 'result.json'}")
    click.echo(str(output))


def set_up_memory(text: str | None) -> int | None:
    """Have freed memory kept, sparingly under a limit; return the limit, such as '6GiB', in bytes, or None."""
    from maisi.device import keep_freed_memory, parse_memory

    keep_freed_memory(sparing=text is not None)
    return None if text is None else parse_memory(text)


@contextmanager
def progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """Yield `report(what, stage, done, total)`: bars on a terminal, a line for each finished stage elsewhere."""
    if not sys.stderr.isatty():
        yield _plain_report()
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True)) as bars:
        tasks: dict[tuple[str, str], TaskID] = {}
        finished: list[TaskID] = []

        def report(what: str, stage: str, done: int, total: int) -> None:
            if (what, stage) not in tasks:
                tasks[what, stage] = bars.add_task(f"{what} {stage}", total=total)
            task = tasks[what, stage]
            bars.update(task, completed=done)
            if done == total and task not in finished:  # or the bar that moves would leave the screen
                finished.append(task)
                for old in finished[:-MOST_FINISHED]:
                    bars.update(old, visible=False)

        yield report


def _plain_report() -> Callable[[str, str, int, int], None]:
    started = time.monotonic()

    def report(what: str, stage: str, done: int, total: int) -> None:
        if done == total:
            click.echo(f"{time.monotonic() - started:7.1f} s  {what} {stage}", err=True)

    return report
