from __future__ import annotations

import subprocess
import sys

import click
import pytest

from maisi.cli import cli, run
from maisi.cli.lazy import LazyGroup


@pytest.mark.parametrize("path", [(), ("evaluate",), ("mask",)])
def test_every_name_leads_to_its_command(path) -> None:
    context = click.Context(cli)
    group: click.Command | None = cli
    for name in path:
        assert isinstance(group, click.Group)
        group = group.get_command(context, name)
    assert isinstance(group, LazyGroup)
    names = group.list_commands(context)
    assert names
    for name in names:
        command = group.get_command(context, name)
        assert command is not None
        assert command.name == name
    assert group.get_command(context, "nothing") is None


def test_a_command_waits_for_no_other_commands_import() -> None:
    code = "import sys; from maisi import cli; cli.run(['labels', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("maisi.cli.")}
    assert ours == {"maisi.cli.group", "maisi.cli.lazy", "maisi.cli.knowledge"}


def test_a_misspelt_command_gets_the_nearest(capsys) -> None:
    assert run(["genrate"]) == 2
    assert "There is no command 'genrate'; did you mean 'generate'?" in capsys.readouterr().err
    assert run(["mask", "imprt"]) == 2
    assert "did you mean 'import'?" in capsys.readouterr().err
