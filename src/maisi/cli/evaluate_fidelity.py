"""`maisi evaluate fidelity`: do generated images show what their labels say?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maisi.cli.evaluate_segmenter import (
    Training,
    structure_option,
    structures_in,
    trainer_from,
    training_options,
)
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

if TYPE_CHECKING:
    from maisi.data.label_maps import Vocabulary
    from maisi.evaluation.segmenters import Segmenter
    from maisi.evaluation.volumes import Entry

TRAINED = "trained"


@click.command()
@click.argument("generated", nargs=-1, required=True, type=FILE)
@click.option("--real", type=FILE, help="Real cases with labels, kept out of training: a prepared folder, a case list.")
@click.option(
    "--segmenter",
    default="rules",
    show_default=True,
    help="rules, trained (see --train), a folder that `segmenter` made, or a command with {image} and {labels}.",
)
@click.option("--train", multiple=True, type=FILE, help="Real cases to train the segmenter on. May be repeated.")
@structure_option
@training_options
@click.option("--from", "vocabulary", metavar="NAME|TABLE.json", help="What the command's ids mean.  [default: maisi]")
@skip_option
@cache_option
@result_option
def fidelity(
    generated: Sequence[Path],
    real: Path | None,
    segmenter: str,
    train: Sequence[Path],
    structure: Sequence[str],
    vocabulary: str | None,
    skip_unreadable: bool,
    cache: Path | None,
    output: Path,
    **training: Any,
) -> None:
    """Do images show what their labels say? A segmenter's Dice on GENERATED images, beside that on real ones.

    \b
    maisi evaluate fidelity out/ --real prepared/ -o fidelity/
    maisi evaluate fidelity out/ --segmenter 'TotalSegmentator -i {image} -o {labels} --ml' \\
        --from totalsegmentator -o fidelity/
    maisi evaluate fidelity out/ --real prepared/ --segmenter trained --train prepared/ \\
        --structure mandible -o fidelity/
    """
    require_new(output)
    if segmenter != TRAINED and (train or structure):
        raise MaisiError("--train and --structure are for --segmenter trained; leave them out.")
    if segmenter == TRAINED:
        refuse_given(["vocabulary"], "says what the ids of a command mean, and this segmenter needs none")
    else:
        refuse_given(training, "is for --segmenter trained")
    judge = None if segmenter == TRAINED else _segmenter(segmenter, vocabulary)
    from maisi.evaluation.volumes import Found, find_entries, readable

    judged = readable(find_entries(generated), skip_unreadable)
    known = readable(find_entries([real], "validation"), skip_unreadable) if real else Found(())
    order = _order(train, structure, training, skip_unreadable) if judge is None else None
    _require_unseen(known.entries, judge, order)
    from maisi.evaluation.cache import cache_for
    from maisi.evaluation.fidelity import draw, measure, summed_up
    from maisi.evaluation.result import write_result

    settings: dict[str, Any] = {"generated": [str(path) for path in generated], "real": str(real) if real else None}
    if order is not None:
        settings |= {"train": [str(path) for path in train]}
        settings |= {"trainer": order.trainer.name, "training": dict(order.trainer.settings)}
    notes: tuple[str, ...] = ()
    with cache_for(output, cache) as kept, progress() as report:
        told = partial(report, "fidelity")
        if order is not None:
            judge, notes = order.trained(kept, told)
        assert judge is not None
        rows = measure(judged.entries, "generated", judge, kept, told)
        real_rows = measure(known.entries, "real", judge, kept, told) if real else []
        result = summed_up(rows, real_rows, tuple(judge.structures), {**settings, "segmenter": judge.name})
        result = result.with_notes(*judged.notes, *known.notes, *notes)
        write_result(output, result, lambda figure: draw(figure, result))
    say_result(result, output)


def _order(train: Sequence[Path], names: Sequence[str], training: dict[str, Any], skip_unreadable: bool) -> Training:
    from maisi.evaluation.volumes import find_entries, readable

    if not train:
        raise MaisiError("The segmenter is to be trained, and nothing says on what; give --train with real cases.")
    found = readable(find_entries(train, "train"), skip_unreadable)
    return Training(found, structures_in(found.entries, names), trainer_from(**training))


def _require_unseen(real: Sequence[Entry], judge: Segmenter | None, order: Training | None) -> None:
    """Refuse to judge a segmenter on cases or patients that it was trained on.

    Raises:
        MaisiError: so.
    """
    lessons = order.found.entries if order else ()
    hashes = {*(judge.trained_on if judge else ()), *(lesson.hash for lesson in lessons)}
    seen = [
        entry.name
        for entry in real
        if any(map(entry.may_share_patient, lessons))
        or (hashes and (entry.patient_hash in hashes or entry.hash in hashes))
    ]
    if seen:
        raise MaisiError(
            f"The segmenter is trained on {len(seen)} of the real cases ({seen[0]}, ...); give --real others."
        )


def _segmenter(text: str, vocabulary: str | None) -> Segmenter:
    from maisi.evaluation.segmenters import Program, Rules

    rules = text == "rules"
    if not rules and not Path(text).is_dir():
        return Program.parse(text, _vocabulary(vocabulary or "maisi"))
    if vocabulary is not None:
        raise MaisiError("--from says what the ids of a command mean, and this segmenter needs none; leave it out.")
    if rules:
        return Rules()
    from maisi.evaluation.trainers import open_segmenter

    return open_segmenter(Path(text))


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
