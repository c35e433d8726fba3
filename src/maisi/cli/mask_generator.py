"""`maisi mask generate`: label maps made by a model's mask networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maisi.cli.options import (
    fill,
    items_options,
    output_option,
    require_first,
    running_options,
    say_items,
    set_up_memory,
    temperature_option,
)

if TYPE_CHECKING:
    from maisi.generation.mask_generator import MaskOrder
    from maisi.generation.output import Destination
    from maisi.weights.registry import ModelFolder


@click.command()
@click.option("--region", multiple=True, metavar="NAME", help="head-neck, chest, abdomen, lower-body; repeatable.")
@click.option(
    "--anatomy-size",
    "sizes",
    multiple=True,
    metavar="NAME=SIZE",
    help="0 to 1, or -1 for absent: liver=0.6, 'hepatic tumor=0.3'; at most one tumour. May be repeated.",
)
@click.option("--spacing", metavar="X,Y,Z", help="Bring the finished map to this spacing in mm.  [default: as made]")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same map.")
@items_options
@click.option("--model", default="tiny", show_default=True, help="A model with mask networks: name or folder.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option("--solver", help="Solver of the denoising.  [default: the model's]")
@temperature_option
@running_options
@click.option("--memory", metavar="AMOUNT", help="What the process may use, such as 6GiB.  [default: all that is free]")
@output_option("Folder to make, with a folder 0000, 0001, ... for each item. An interrupted one is gone on with.")
def generate(
    output: Path, sizes: tuple[str, ...], first: int, device: str, precision: str, memory: str | None, **wishes: Any
) -> None:
    """Make label maps.

    \b
    maisi mask generate --region abdomen --anatomy-size liver=0.6 --model FOLDER -o masks/
    """
    from maisi.data.anatomy_sizes import parse_sizes
    from maisi.request import Request

    request, wanted = Request.parse(**wishes), parse_sizes(sizes)
    require_first(first)
    from maisi.generation.mask_generator import make_order
    from maisi.weights.registry import find_model

    limit = set_up_memory(memory)
    folder = find_model(request.model)
    order = make_order(request, wanted, folder)
    place = _destination(output, order, folder, first)
    for note in order.notes:
        click.echo(f"Note: {note}", err=True)
    if place.missing:
        from maisi.generation.mask_generator import MaskGenerator

        generator = MaskGenerator(folder, device, precision, limit)
        plan = generator.prepare(order)
        fill(place, lambda number, report: generator.item(order, plan, number, report))
    say_items(output, range(first, first + request.count), place)


def _destination(output: Path, order: MaskOrder, folder: ModelFolder, first: int) -> Destination:
    from maisi.anatomy import label_name
    from maisi.generation.mask_generator import weights_used
    from maisi.generation.output import destination

    request = order.request
    content = {
        "request": request.model_dump(mode="json"),
        "anatomy_sizes": {label_name(id): size for id, size in sorted(order.wanted.items())},
        "first": first,
        "weights_sha256": weights_used(folder),
    }
    return destination(output, content, range(first, first + request.count))
