"""`maisi evaluate memorisation`: are generated volumes copies of training cases?"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from maisi.cli.options import (
    FILE,
    cache_option,
    progress,
    require_new,
    result_option,
    say_result,
    skip_option,
    slice_features_options,
)
from maisi.errors import MaisiError


@click.command()
@click.argument("generated", type=FILE)
@click.argument("training", type=FILE)
@click.option("--heldout", type=FILE, help="Real cases not trained on, for the baseline.  [default: training cases]")
@slice_features_options("gradients")
@click.option("--baseline", type=int, default=50, show_default=True, help="Real patients of the baseline at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw of those patients.")
@click.option("--show-real/--no-real-pictures", default=False, help="Draw the nearest pairs, real images too.")
@skip_option
@cache_option
@result_option
def memorisation(
    generated: Path,
    training: Path,
    heldout: Path | None,
    features: str | None,
    feature_weights: Path | None,
    baseline: int,
    seed: int,
    show_real: bool,
    skip_unreadable: bool,
    cache: Path | None,
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
    require_new(output)
    from maisi.evaluation.feature_weights import SLICE_NETWORKS, choose_features

    name, weights = choose_features(features, feature_weights, "gradients", SLICE_NETWORKS)
    from maisi.evaluation.volumes import Found, find_entries, readable

    judged, known = (
        readable(find_entries([path], split), skip_unreadable)
        for path, split in ((generated, "all"), (training, "train"))
    )
    others = readable(find_entries([heldout], "validation"), skip_unreadable) if heldout else Found(())
    from maisi.evaluation.cache import cache_for
    from maisi.evaluation.memorisation import CoarseGrid, draw, find_neighbours, slice_mean_features, summed_up
    from maisi.evaluation.result import write_result

    grid = CoarseGrid()
    described = (
        name if weights is None else f"{name} {weights.sha256}",
        slice_mean_features(name, grid.features_spacing_mm, weights),
    )
    settings = {
        "generated": str(generated),
        "training": str(training),
        "training cases": len(known.entries),
        "heldout": str(heldout) if heldout else None,
        "features": name,
        "feature_weights": weights.model_dump(mode="json") if weights else None,
        "grid": grid.model_dump(mode="json"),
        "baseline": baseline,
        "seed": seed,
        "shows_real_images": show_real,
    }
    with cache_for(output, cache) as kept, progress() as report:
        told = partial(report, "memorisation")
        sets = judged.entries, known.entries, others.entries
        found = find_neighbours(*sets, described, kept, grid=grid, most_real=baseline, seed=seed, progress=told)
        result = summed_up(found, settings, bool(heldout)).with_notes(*judged.notes, *known.notes, *others.notes)
        write_result(output, result, lambda figure: draw(figure, found, show_real))
    say_result(result, output)
