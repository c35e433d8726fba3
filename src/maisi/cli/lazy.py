"""`LazyGroup`: commands whose modules are imported when they are asked for. Knows no command."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from maisi.errors import MaisiError


class LazyGroup(click.Group):
    """A group that knows where its commands are, so that one command's start does not wait for the others' imports.

    Args:
        homes: the module of each command, by its name; the attribute is the name, followed by `_` where Python has
            the word to itself.
    """

    def __init__(self, *args: Any, homes: Mapping[str, str], **more: Any) -> None:
        super().__init__(*args, **more)
        self._homes = homes

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, sorted; imports none."""
        return sorted(self._homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of this name; None where there is none."""
        if cmd_name not in self._homes:
            self._refuse(cmd_name)
            return None
        module = import_module(self._homes[cmd_name])
        found = getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_")
        assert isinstance(found, click.Command)
        return found

    def _refuse(self, name: str) -> None:
        """Say what command may have been meant; nothing where no name is near.

        Raises:
            MaisiError: so.
        """
        near = get_close_matches(name, self._homes, n=1)
        if near:
            raise MaisiError(f"There is no command '{name}'; did you mean '{near[0]}'?")
