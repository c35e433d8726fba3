"""`maisi evaluate response`: does a model do what its conditions say?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from maisi.cli.options import (
    cache_option,
    grid_options,
    progress,
    require_new,
    result_option,
    running_options,
    say_result,
)


@click.command()
@grid_options
@click.option("--model", default="tiny", show_default=True, help="A carried model's name, or a model folder.")
@running_options
@cache_option
@result_option
def response(
    region: Sequence[str],
    size: str | None,
    spacing: str | None,
    seed: int,
    model: str,
    device: str,
    precision: str,
    cache: Path | None,
    output: Path,
) -> None:
    """Does a model do what its conditions say? Regions, 1.5 times the spacing, twice the size (the paper's Fig. 5).

    \b
    maisi evaluate response --region chest --region head-neck -o response/
    """
    from maisi.request import Request

    request = Request.parse(region=region, size=size, spacing=spacing, seed=seed, model=model)
    require_new(output)
    from maisi.evaluation.response import asks, respond
    from maisi.weights.registry import find_model

    folder = find_model(model)
    rows = asks(folder.config, request.region, request.size, request.spacing)
    from maisi.evaluation.cache import cache_for
    from maisi.evaluation.result import write_result
    from maisi.generation.pipeline import Model

    with cache_for(output, cache) as kept, progress() as report:
        made = Model(folder, device, precision)
        result, draw = respond(made, rows, request.seed, kept, partial(report, "response"))
        write_result(output, result, draw)
    say_result(result, output)
