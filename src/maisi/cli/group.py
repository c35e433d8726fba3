"""Commands under `torchrun`: which process speaks, and the group that shares one volume. Loads no torch by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import click

from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.splitting.processes import Processes

T = TypeVar("T")


def processes() -> int:
    """How many processes `torchrun` started; 1 without it.

    Raises:
        MaisiError: its variables in the environment are not numbers.
    """
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def speaks() -> bool:
    """Whether this process writes to the terminal: of a group the first alone."""
    return os.environ.get("RANK", "0") == "0"


def tell(text: str, err: bool = False) -> None:
    """Write a line to the terminal, once in a group."""
    if speaks():
        click.echo(text, err=err)


def agreed(group: Processes | None, decide: Callable[[int], T]) -> T:
    """What the first process decides for so many processes, and all do."""
    return decide(1) if group is None else group.agreed(lambda: decide(group.size))


@contextmanager
def joined_group(device: str) -> Iterator[Processes | None]:
    """Join the other processes, if there are some; all checks that need none of them come before.

    A process that fails by itself says so, whichever it is: the others only know that it is lost.
    """
    if processes() == 1:
        yield None
        return
    from maisi.device import resolve_device
    from maisi.splitting.processes import LostProcessError, joined

    with joined(resolve_device(device)) as group:
        try:
            yield group
        except LostProcessError:
            raise
        except MaisiError as error:
            if not speaks():
                click.echo(f"maisi: process {group.rank} of {group.size}: {error}", err=True)
            raise


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal() or int(text) < 1:
        raise MaisiError(
            f"{name}={text} in the environment is no number of processes; start with torchrun, or unset it."
        )
    return int(text)
