"""The group `maisi mask`; its commands live in modules of their own."""

from __future__ import annotations

import click

from maisi.cli.lazy import LazyGroup

HOMES = {
    "deform": "maisi.cli.mask_library",
    "generate": "maisi.cli.mask_generator",
    "import": "maisi.cli.mask_import",
    "library": "maisi.cli.mask_library",
}


@click.group(cls=LazyGroup, homes=HOMES)
def mask() -> None:
    """Label maps: made, brought in, found, changed."""
