"""`maisi evaluate fidelity`: do generated images show what their labels say?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maisi.cli.options import (
    FILE,
    cache_option,
    progress,
    require_new,
    result_option,
    say_result,
    skip_option,
)
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.data.label_maps import Vocabulary
    from maisi.evaluation.segmenters import Segmenter


@click.command()
@click.argument("generated", nargs=-1, required=True, type=FILE)
@click.option("--real", type=FILE, help="Real cases with labels, kept out of training: a prepared folder, a case list.")
@click.option("--segmenter", default="rules", show_default=True, help="rules, or a command with {image} and {labels}.")
@click.option("--from", "vocabulary", metavar="NAME|TABLE.json", help="What the command's ids mean.  [default: maisi]")
@skip_option
@cache_option
@result_option
def fidelity(
    generated: Sequence[Path],
    real: Path | None,
    segmenter: str,
    vocabulary: str | None,
    skip_unreadable: bool,
    cache: Path | None,
    output: Path,
) -> None:
    """Do images show what their labels say? A segmenter's Dice on GENERATED images, beside that on real ones.

    \b
    maisi evaluate fidelity out/ --real prepared/ -o fidelity/
    maisi evaluate fidelity out/ --segmenter 'TotalSegmentator -i {image} -o {labels} --ml' \\
        --from totalsegmentator -o fidelity/
    """
    require_new(output)
    judge = _segmenter(segmenter, vocabulary)
    from maisi.evaluation.volumes import Found, find_entries, readable

    judged = readable(find_entries(generated), skip_unreadable)
    known = readable(find_entries([real], "validation"), skip_unreadable) if real else Found(())
    from maisi.evaluation.cache import cache_for
    from maisi.evaluation.fidelity import draw, measure, summed_up
    from maisi.evaluation.result import write_result

    settings = {"generated": [str(path) for path in generated], "real": str(real) if real else None}
    with cache_for(output, cache) as kept, progress() as report:
        told = partial(report, "fidelity")
        rows = measure(judged.entries, "generated", judge, kept, told)
        real_rows = measure(known.entries, "real", judge, kept, told) if real else []
        result = summed_up(rows, real_rows, tuple(judge.structures), {**settings, "segmenter": judge.name})
        result = result.with_notes(*judged.notes, *known.notes)
        write_result(output, result, lambda figure: draw(figure, result))
    say_result(result, output)


def _segmenter(text: str, vocabulary: str | None) -> Segmenter:
    from maisi.evaluation.segmenters import Program, Rules

    if text != "rules":
        return Program.parse(text, _vocabulary(vocabulary or "maisi"))
    if vocabulary is not None:
        raise MaisiError("--from says what the ids of a command mean, and the rules need none; leave it out.")
    return Rules()


def _vocabulary(name: str) -> Vocabulary:
    import json

    from maisi.data.label_maps import custom_vocabulary, vocabulary

    if not name.endswith(".json"):
        return vocabulary(name)
    try:
        table = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MaisiError(f"Cannot read {name} ({error}); give a table as for `maisi mask import`.") from None
    return custom_vocabulary(table, name)
