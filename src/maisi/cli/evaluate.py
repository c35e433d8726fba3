"""The group `maisi evaluate`; its commands live in modules of their own."""

from __future__ import annotations

import click

from maisi.cli.evaluate_fid import fid
from maisi.cli.evaluate_fidelity import fidelity
from maisi.cli.evaluate_medians import medians
from maisi.cli.evaluate_memorisation import memorisation
from maisi.cli.evaluate_reconstruction import reconstruction
from maisi.cli.evaluate_response import response
from maisi.cli.evaluate_segmenter import segmenter
from maisi.cli.evaluate_study import study
from maisi.cli.options import set_up_memory


@click.group()
def evaluate() -> None:
    """Judge images and models; each writes result.json, table.md, figure.png."""
    set_up_memory(None)


_MEMBERS: tuple[click.Command, ...] = (
    reconstruction,
    fid,
    response,
    memorisation,
    fidelity,
    medians,
    segmenter,
    study,
)
for _command in _MEMBERS:
    evaluate.add_command(_command)

COMMANDS = (evaluate,)
