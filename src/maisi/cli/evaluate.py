"""The group `maisi evaluate`; its commands live in modules of their own."""

from __future__ import annotations

import click

from maisi.cli.lazy import LazyGroup
from maisi.cli.options import set_up_memory

HOMES = {
    name: f"maisi.cli.evaluate_{name}"
    for name in (
        "fid",
        "fidelity",
        "medians",
        "memorisation",
        "reconstruction",
        "response",
        "segmenter",
        "study",
    )
}


@click.group(cls=LazyGroup, homes=HOMES)
def evaluate() -> None:
    """Judge images and models; each writes result.json, table.md, figure.png."""
    set_up_memory(None)
