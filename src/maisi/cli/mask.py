"""The group `maisi mask`; its commands live in modules of their own."""

from __future__ import annotations

import click

from maisi.cli import mask_generator, mask_import, mask_library

mask = click.Group("mask", help="Label maps: made, brought in, found, changed.")
for _command in (*mask_import.MASK_COMMANDS, *mask_generator.MASK_COMMANDS, *mask_library.MASK_COMMANDS):
    mask.add_command(_command)

COMMANDS = (mask,)
