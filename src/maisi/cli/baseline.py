"""`maisi baseline`: train the systems that the paper compares with, and make volumes with them."""

from __future__ import annotations

from pathlib import Path

import click

from maisi.cli.options import FILE, fill, items_options, output_option, require_first, running_options, say_items
from maisi.errors import MaisiError

baseline = click.Group("baseline", help="Systems to compare with: DDPM in image space, HA-GAN.")


@baseline.command()
@click.argument("method")
@click.argument("file", type=FILE, required=False, metavar="RUN.yaml")
@click.option("-o", "--output", type=FILE, help="Folder of the run; one that exists is gone on with.")
@click.option("--example", is_flag=True, help="Print a commented RUN.yaml for METHOD and stop.")
def train(method: str, file: Path | None, output: Path | None, example: bool) -> None:
    """Train METHOD, ddpm or hagan, as RUN.yaml says.

    The third baseline, latent diffusion without conditions, is `maisi train diffusion` with recipes/baselines/ldm.yaml.
    """
    from maisi.baselines import methods

    if method not in methods.METHODS:
        raise MaisiError(f"There is no baseline '{method}' to train; choose one of {', '.join(methods.METHODS)}.")
    if example:
        click.echo(methods.example_yaml(method), nl=False)
        return
    if file is None:
        raise MaisiError(
            f"The run's settings are missing; start from what `maisi baseline train {method} --example` prints."
        )
    folder = output or Path("runs") / file.stem
    click.echo(f"{folder}: reached step {methods.train(method, file, folder)}")


@baseline.command()
@click.argument("folder", type=FILE)
@items_options
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same volume.")
@click.option("--steps", type=int, help="Denoising steps (ddpm).  [default: all its timesteps]")
@click.option("--solver", help="Solver of the denoising (ddpm).  [default: ancestral, as published]")
@running_options
@output_option("Folder to make, with a folder 0000, 0001, ... for each item. An interrupted one is gone on with.")
def generate(
    folder: Path,
    count: int,
    first: int,
    seed: int,
    steps: int | None,
    solver: str | None,
    device: str,
    precision: str,
    output: Path,
) -> None:
    """Make volumes with the baseline that was trained in FOLDER; `maisi evaluate fid` takes them as they are.

    \b
    maisi baseline generate runs/hagan -n 32 --seed 0 -o out/
    """
    require_first(first)
    from maisi.baselines.methods import Baseline
    from maisi.generation.output import destination

    made = Baseline(folder, device, precision)
    request = made.request(seed, count, steps, solver)
    order = {"request": request.model_dump(mode="json"), "first": first, "weights_sha256": made.weights_sha256}
    place = destination(output, order, range(first, first + count))
    if place.missing:
        fill(place, lambda number, report: made.item(request, number, report))
    say_items(output, range(first, first + count), place)
