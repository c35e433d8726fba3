"""`maisi evaluate response`, `memorisation`, `fidelity`, and `maisi report`: judge what was generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maisi.cli.options import FILE, grid_options, output_option, progress, require_new, running_options
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.data.label_maps import Vocabulary
    from maisi.evaluation.result import Result
    from maisi.evaluation.segmenters import Segmenter

NEW_FOLDER = "Folder to make, with result.json, table.md and figure.png. An interrupted run is gone on with."


def cache_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--cache`: where answers are kept while an evaluation runs."""
    help = "Folder that keeps what is slow, and stays.  [default: OUTPUT.cache, removed in the end]"
    return click.option("--cache", "named_cache", type=FILE, help=help)(command)


@click.command()
@grid_options
@click.option("--model", default="tiny", show_default=True, help="A carried model's name, or a model folder.")
@running_options
@cache_option
@output_option(NEW_FOLDER)
def response(
    region: Sequence[str],
    size: str | None,
    spacing: str | None,
    seed: int,
    model: str,
    device: str,
    precision: str,
    named_cache: Path | None,
    output: Path,
) -> None:
    """Does a model do what its conditions say? Regions, 1.5 times the spacing, twice the size (the paper's Fig. 5).

    \b
    maisi evaluate response --region chest --region head-neck -o response/
    """
    from maisi.request import Request

    request = Request.parse(region=region, size=size, spacing=spacing, seed=seed, model=model)
    _require_new_folder(output)
    from maisi.evaluation.response import asks, respond
    from maisi.weights.registry import find_model

    folder = find_model(model)
    rows = asks(folder.config, request.region, request.size, request.spacing)
    from maisi.evaluation.kept import cache_for
    from maisi.evaluation.result import write_result
    from maisi.generation.pipeline import Model

    with cache_for(output, named_cache) as cache, progress() as report:
        made = Model(folder, device, precision)
        result, draw = respond(made, rows, request.seed, cache, partial(report, "response"))
        write_result(output, result, draw)
    _say(result, output)


@click.command()
@click.argument("generated", type=FILE)
@click.argument("training", type=FILE)
@click.option("--heldout", type=FILE, help="Real cases not trained on, for the baseline.  [default: training cases]")
@click.option("--features", default="gradients", show_default=True, help="gradients, or efficientnet-lite0.")
@click.option("--baseline", type=int, default=50, show_default=True, help="Real patients of the baseline at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw of those patients.")
@click.option("--show-real/--no-real-pictures", default=False, help="Draw the nearest pairs, real images too.")
@cache_option
@output_option(NEW_FOLDER)
def memorisation(
    generated: Path,
    training: Path,
    heldout: Path | None,
    features: str,
    baseline: int,
    seed: int,
    show_real: bool,
    named_cache: Path | None,
    output: Path,
) -> None:
    """Are GENERATED volumes copies of TRAINING cases? Nearest neighbours in voxels and in features.

    GENERATED and TRAINING are folders of items or volumes, prepared folders (of TRAINING the training side, of
    --heldout the other), or case lists. A real-to-real baseline tells how near is too near.
    """
    if baseline < 2:
        raise MaisiError(f"A baseline of {baseline} patients says nothing; give at least 2.")
    if seed < 0:
        raise MaisiError(f"The seed is {seed}; give 0 or more.")
    _require_new_folder(output)
    from maisi.evaluation.image_sets import find_images

    judged, known = find_images([generated]), find_images([training], "train")
    others = find_images([heldout], "validation") if heldout else ()
    from maisi.evaluation.kept import cache_for
    from maisi.evaluation.memorisation import CoarseGrid, draw, find_neighbours, slice_mean_features, summed_up
    from maisi.evaluation.result import write_result

    grid = CoarseGrid()
    described = (features, slice_mean_features(features, grid.features_spacing_mm))
    settings = {
        "generated": str(generated),
        "training": str(training),
        "training cases": len(known),
        "heldout": str(heldout) if heldout else None,
        "features": features,
        "grid": grid.model_dump(mode="json"),
        "baseline": baseline,
        "seed": seed,
        "shows_real_images": show_real,
    }
    with cache_for(output, named_cache) as cache, progress() as report:
        told = partial(report, "memorisation")
        found = find_neighbours(
            judged, known, others, described, cache, grid=grid, most_real=baseline, seed=seed, progress=told
        )
        result = summed_up(found, settings, bool(others))
        write_result(output, result, lambda figure: draw(figure, found, show_real))
    _say(result, output)


@click.command()
@click.argument("generated", nargs=-1, required=True, type=FILE)
@click.option("--real", type=FILE, help="Real cases with labels, kept out of training: a prepared folder, a case list.")
@click.option("--segmenter", default="rules", show_default=True, help="rules, or a command with {image} and {labels}.")
@click.option("--from", "vocabulary", metavar="NAME|TABLE.json", help="What the command's ids mean.  [default: maisi]")
@cache_option
@output_option(NEW_FOLDER)
def fidelity(
    generated: Sequence[Path],
    real: Path | None,
    segmenter: str,
    vocabulary: str | None,
    named_cache: Path | None,
    output: Path,
) -> None:
    """Do images show what their labels say? A segmenter's Dice on GENERATED images, beside that on real ones.

    \b
    maisi evaluate fidelity out/ --real prepared/ -o fidelity/
    maisi evaluate fidelity out/ --segmenter 'TotalSegmentator -i {image} -o {labels} --ml' \\
        --from totalsegmentator -o fidelity/
    """
    _require_new_folder(output)
    judge = _segmenter(segmenter, vocabulary)
    from maisi.evaluation.image_sets import find_images

    judged = find_images(generated)
    known = find_images([real], "validation") if real else ()
    from maisi.evaluation.fidelity import draw, measure, summed_up
    from maisi.evaluation.kept import cache_for
    from maisi.evaluation.result import write_result

    settings = {"generated": [str(path) for path in generated], "real": str(real) if real else None}
    with cache_for(output, named_cache) as cache, progress() as report:
        told = partial(report, "fidelity")
        rows = measure(judged, "generated", judge, cache, told)
        real_rows = measure(known, "real", judge, cache, told) if known else []
        result = summed_up(rows, real_rows, tuple(judge.structures), {**settings, "segmenter": judge.name})
        write_result(output, result, lambda figure: draw(figure, result))
    _say(result, output)


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


def _require_new_folder(output: Path) -> None:
    """Refuse, before any work, a folder that exists or cannot be made."""
    if output.exists():
        raise MaisiError(f"{output} exists; choose another folder or remove it.")
    if not output.resolve().parent.is_dir():
        raise MaisiError(f"The folder {output.parent} does not exist; make it first or choose another place.")


def _say(result: Result, output: Path) -> None:
    from maisi.evaluation.result import shown

    for name, value in result.summary.items():
        click.echo(f"{name}: {shown(value)}")
    click.echo(str(output))


EVALUATIONS = (response, memorisation, fidelity)
COMMANDS = (report,)
