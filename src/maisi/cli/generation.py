"""`maisi generate`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maisi.cli.options import (
    FILE,
    budget_options,
    grid_options,
    output_option,
    parsed_memory,
    progress,
    running_options,
)
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.generation.job import Job
    from maisi.generation.output import Destination
    from maisi.weights.registry import ModelFolder


@click.command()
@grid_options
@click.option("-n", "--count", type=int, default=1, show_default=True, help="How many items.")
@click.option("--first", type=int, default=0, show_default=True, help="Number of the first item.")
@click.option("--mask", type=FILE, help="Label map (NIfTI, NRRD) to follow; the image has its grid.")
@click.option("--model", default="tiny", show_default=True, help="A carried model's name, or a model folder.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option("--solver", help="Solver of the denoising.  [default: the model's]")
@click.option("--guidance", type=float, default=0.0, show_default=True, help="Strength of guidance; 0 is off.")
@click.option("--fov", default="given", show_default=True, help="given, or auto: size and spacing from the regions.")
@click.option("--retries", type=int, default=2, show_default=True, help="With a mask: made again if it fails checks.")
@click.option("--modality", default="ct", show_default=True, help="ct, or a kind of MR the model knows.")
@running_options
@budget_options
@output_option("Folder to make, with a folder 0000, 0001, ... for each item. An interrupted one is gone on with.")
def generate(
    output: Path, device: str, precision: str, memory: str | None, only_plan: bool, first: int, **wishes: Any
) -> None:
    """Make synthetic volumes.

    \b
    maisi generate --region chest --size 128,128,128 --spacing 3,3,3 -o out/
    maisi generate --mask labels.nii.gz -o out/
    """
    from maisi.request import Request

    request = Request.parse(**wishes)
    if first < 0:
        raise MaisiError(f"The first item cannot be number {first}; items are numbered from 0.")
    from maisi.generation.job import make_job
    from maisi.weights.registry import find_model

    limit = parsed_memory(memory)
    folder = find_model(request.model)
    job = make_job(request, folder.config)
    place = _destination(output, job, folder, first)
    for note in job.notes:
        click.echo(f"Note: {note}", err=True)
    if only_plan:
        from maisi.generation.pipeline import Model

        click.echo(str(Model(folder, device, precision, limit).footprint(job)))
        return
    if place.missing:
        _make_items(job, place, folder, device, precision, limit)
    click.echo(f"{output}: {request.count} item(s), {request.count - len(place.missing)} of them from before")


def _destination(output: Path, job: Job, folder: ModelFolder, first: int) -> Destination:
    from maisi.generation.job import weights_used
    from maisi.generation.output import destination
    from maisi.weights.load import sha256

    request = job.request
    order = {
        "request": request.model_dump(mode="json"),
        "first": first,
        "mask_sha256": None if request.mask is None else sha256(request.mask),
        "weights_sha256": weights_used(folder, job),
    }
    return destination(output, order, range(first, first + request.count))


def _make_items(
    job: Job, place: Destination, folder: ModelFolder, device: str, precision: str, memory: int | None
) -> None:
    from maisi.generation.pipeline import Model

    model = Model(folder, device, precision, memory)
    plan = model.prepare(job).decode
    place.begin()
    try:
        with progress() as report:
            for number in place.missing:
                item = model.item(job, plan, number, partial(report, f"{number:04d}"))
                item.save(place.item_folder(number))
    except BaseException:
        place.withdraw()
        raise


COMMANDS = (generate,)
