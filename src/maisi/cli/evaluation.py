"""The group `maisi evaluate`; its commands live in modules of their own."""

from __future__ import annotations

import click

from maisi.cli import judgement
from maisi.cli.evaluate_fid import fid
from maisi.cli.evaluate_reconstruction import reconstruction

evaluate = click.Group("evaluate", help="Judge images and models; each writes result.json, table.md, figure.png.")
_MEMBERS: tuple[click.Command, ...] = (reconstruction, fid, *judgement.EVALUATIONS)
for _command in _MEMBERS:
    evaluate.add_command(_command)

COMMANDS = (evaluate, *judgement.COMMANDS)
