"""`maisi evaluate medians`: are the structures of generated images as dense as those of real ones?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from maisi.cli.options import (
    FILE,
    cache_option,
    progress,
    refuse_given,
    require_new,
    result_option,
    say_result,
    skip_option,
)
from maisi.errors import MaisiError


@click.command()
@click.argument("generated", nargs=-1, required=True, type=FILE)
@click.option("--real", type=FILE, help="Real cases with labels: a prepared folder, a case list.")
@click.option("--split", default="all", show_default=True, help="Of --real: train, validation, all.")
@click.option(
    "--ranges", type=FILE, help="In place of --real: ranges of `maisi quality learn`, as of a model's folder."
)
@skip_option
@cache_option
@result_option
def medians(
    generated: Sequence[Path],
    real: Path | None,
    split: str,
    ranges: Path | None,
    skip_unreadable: bool,
    cache: Path | None,
    output: Path,
) -> None:
    """Are structures as dense as real ones? Median HU of each label of GENERATED images against real ranges.

    \b
    maisi evaluate medians out/ --real prepared/ -o medians/
    maisi evaluate medians out/ --ranges model/ranges.json -o medians/
    """
    if (real is None) == (ranges is None):
        raise MaisiError("Ranges come from real cases or from a file; give either --real or --ranges.")
    require_new(output)
    from maisi.data.quality import read_ranges
    from maisi.evaluation.volumes import Found, find_entries, readable

    if real is None:
        refuse_given(["split"], "is of --real")
    told_ranges = read_ranges(ranges) if ranges else None
    judged = readable(find_entries(generated), skip_unreadable)
    cases = readable(find_entries([real], split), skip_unreadable) if real else Found(())
    from maisi.evaluation.cache import cache_for
    from maisi.evaluation.medians import draw, learned, measure, summed_up
    from maisi.evaluation.result import write_result

    given = {"generated": [str(path) for path in generated], "real": str(real) if real else None, "split": split}
    with cache_for(output, cache) as kept, progress() as report:
        told = partial(report, "medians")
        smallest_ml = told_ranges.smallest_ml if told_ranges else None
        found = measure(judged.entries, "generated", kept, told, smallest_ml)
        known = told_ranges.medians if told_ranges else learned(measure(cases.entries, "real", kept, told))
        result = summed_up(found, known, {**given, "ranges": str(ranges) if ranges else None})
        result = result.with_notes(*judged.notes, *cases.notes)
        write_result(output, result, lambda figure: draw(figure, result))
    say_result(result, output)
