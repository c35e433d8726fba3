"""`maisi report`: results and generated items on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from maisi.cli.options import FILE, output_option, require_new


@click.command()
@click.argument("folders", nargs=-1, required=True, type=FILE)
@click.option("--title", default="maisi report", show_default=True, help="Title of the page.")
@output_option("Page to make (.html).")
def report(folders: Sequence[Path], title: str, output: Path) -> None:
    """Make one HTML page of FOLDERS, results of `maisi evaluate` and generated items; it needs no other file."""
    from maisi.evaluation.report import render, sections_of
    from maisi.io.files import atomic_path

    require_new(output, ".html")
    page = render(sections_of(folders), title)
    with atomic_path(output) as part:
        part.write_text(page, encoding="utf-8")
    click.echo(f"{output}")
