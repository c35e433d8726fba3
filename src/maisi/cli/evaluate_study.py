"""`maisi evaluate study`: does training with generated pairs help a segmenter?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maisi.cli.evaluate_segmenter import structure_option, structures_in, trainer_from, training_options
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
    from maisi.evaluation.study import StudyConfig
    from maisi.evaluation.trainer import Trainer


@click.command()
@click.argument("real", nargs=-1, required=True, type=FILE)
@click.option("--pairs", multiple=True, type=FILE, help="Generated images with labels. May be repeated.")
@click.option("--inpainted", multiple=True, type=FILE, help="Real CT with tumours painted in, and labels.")
@structure_option
@click.option("--folds", type=int, default=5, show_default=True, help="Parts that patients are dealt to.")
@click.option("--real-count", metavar="N,N,...", help="Numbers of real training patients.  [default: all]")
@click.option("--split", default="all", show_default=True, help="Which REAL cases: train, validation or all.")
@click.option("--test-split", help="Split of REAL to test on, never trained on.  [default: folds of --split]")
@click.option("--tolerance", type=float, default=2.0, show_default=True, help="Of the surface Dice, in mm.")
@click.option("--share", type=float, help="segresnet: of patches that come from added cases.  [default: 0.5]")
@click.option("--incomplete", default="leave-out", show_default=True, help="Cases that lack a structure; or absent.")
@click.option("--sources", type=FILE, help="JSON table, name of a pair -> patient, where no record says it.")
@training_options
@skip_option
@cache_option
@result_option
def study(
    real: Sequence[Path],
    pairs: Sequence[Path],
    inpainted: Sequence[Path],
    structure: Sequence[str],
    folds: int,
    real_count: str | None,
    split: str,
    test_split: str | None,
    tolerance: float,
    share: float | None,
    incomplete: str,
    sources: Path | None,
    skip_unreadable: bool,
    cache: Path | None,
    output: Path,
    **training: Any,
) -> None:
    """Does training with generated cases help a segmenter? Real cases alone against real and added ones.

    In each of several folds a segmenter is trained on REAL cases, and on the same with --pairs, and with --inpainted,
    added; Dice and surface Dice are those of the patients kept out. Cases made of these are not used in their fold.
    With --test-split each fold tests a part of that split and draws its training patients anew from --split.

    \b
    maisi evaluate study prepared/ --pairs out/ --structure mandible,brainstem --real-count 20 -o study/
    maisi evaluate study prepared/ --pairs out/ --structure mandible --trainer nnunet --epochs 250 -o study/
    maisi evaluate study prepared/ --pairs out/ --structure mandible --split train --test-split validation -o study/
    """
    require_new(output)
    if not pairs and not inpainted:
        raise MaisiError("There is nothing to add to the real cases; give --pairs or --inpainted.")
    counts = _counts(real_count)
    config = _config(training, share, folds=folds, counts=counts, tolerance_mm=tolerance, incomplete=incomplete)
    trainer = _trainer(training)
    from maisi.evaluation.sources import origins, read_sources
    from maisi.evaluation.volumes import Found, find_entries, readable

    told = read_sources(sources) if sources else {}
    known = readable(find_entries(real, split), skip_unreadable)
    tested = readable(find_entries(real, test_split), skip_unreadable) if test_split else Found(())
    given = readable(find_entries([*pairs, *inpainted]), skip_unreadable)
    made_of = origins(given.entries, [*known.entries, *tested.entries], told)
    structures = structures_in([*known.entries, *tested.entries, *given.entries], structure)
    from maisi.evaluation.cache import cache_for
    from maisi.evaluation.result import write_result
    from maisi.evaluation.study import Added, draw, plan, run_study

    of_pairs = {entry.image for entry in find_entries(pairs).entries} if pairs else set()
    first = {entry.name for entry in given.entries if entry.image in of_pairs}
    rest = {entry.name for entry in given.entries} - first
    origin = tuple(made_of)
    added = [
        Added(name, given.entries, origin).only(names)
        for name, names in (("pairs", first), ("inpainted", rest))
        if names
    ]
    plan(known.entries, added, config, tested.entries)
    settings = {"real": [str(path) for path in real], "split": split, "test split": test_split}
    settings |= {"sources": str(sources) if sources else None}
    settings |= {"pairs": [str(path) for path in pairs], "inpainted": [str(path) for path in inpainted]}
    with cache_for(output, cache) as kept, progress() as report:
        said = partial(report, "study")
        result = run_study(
            known.entries, added, structures, config, trainer, kept, settings, said, tested=tested.entries
        )
        result = result.with_notes(*known.notes, *tested.notes, *given.notes)
        write_result(output, result, lambda figure: draw(figure, result))
    say_result(result, output)


def _config(training: Mapping[str, Any], share: float | None, **values: Any) -> StudyConfig:
    from maisi.config import parse_config
    from maisi.evaluation.study import StudyConfig
    from maisi.evaluation.trainers import BUILT_IN

    values["seed"] = training["seed"] or 0
    if training["trainer"] != BUILT_IN:
        if share is not None:
            raise MaisiError(
                f"--share is not for --trainer {training['trainer']}, which trains on all cases together; leave it out."
            )
        values["added_share"] = None
    elif share is not None:
        values["added_share"] = share
    return parse_config(StudyConfig, values, "The study")


def _trainer(training: Mapping[str, Any]) -> Trainer:
    """The trainer; where it has no seed, that of the folds is not for it."""
    from maisi.evaluation.trainers import BUILT_IN

    others = {} if training["trainer"] == BUILT_IN else {"seed": None}
    return trainer_from(**{**training, **others})


def _counts(text: str | None) -> list[int]:
    """Read '20,60,120'.

    Raises:
        MaisiError: it is no list of whole numbers.
    """
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise MaisiError(f"'{text}' is no list of numbers of patients; write it as 20,60,120.") from None
