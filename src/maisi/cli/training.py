"""From data to trained networks: `prepare`, `train`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from maisi.cli.options import (
    FILE,
    autoencoder_file,
    autoencoder_options,
    output_option,
    progress,
    refuse_given,
    running_options,
)
from maisi.errors import MaisiError


def _show_views(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from maisi.training.runs import example_views

        click.echo(example_views(), nl=False)
        context.exit()


@click.command()
@click.argument("source", type=FILE)
@output_option("Folder to make; one that was begun is gone on with.")
@click.option("--validation-share", type=float, default=0.15, show_default=True, help="Patients kept out of training.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides who is kept out.")
@click.option("--views", type=FILE, help="YAML with the views to cache as latents; SOURCE is then a prepared folder.")
@click.option(
    "--example",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_views,
    help="Print such a file and stop.",
)
@autoencoder_options
@running_options
def prepare(source: Path, output: Path, validation_share: float, seed: int, views: Path | None, **network: Any) -> None:
    """Make data ready for training.

    SOURCE is a case list (JSON): its images and labels become arrays. With --views SOURCE is the folder that this
    made: views of its cases are drawn and kept as latents of an autoencoder.

    \b
    maisi prepare cases.json -o prepared
    maisi prepare prepared --views views.yaml --autoencoder autoencoder.safetensors -o latents
    """
    if views is not None:
        refuse_given(["validation_share", "seed"], "is of case lists, and views say their own seed")
        _prepare_latents(source, views, output, **network)
        return
    refuse_given(network, "is for --views")
    from maisi.data.manifest import read_cases
    from maisi.data.prepare import prepare as prepare_cases

    cases = read_cases(source)
    with progress() as report:
        index = prepare_cases(cases, output, validation_share, seed, partial(report, "prepare", "cases"))
    click.echo(f"{output}: {len(index.cases)} cases")


def _prepare_latents(
    source: Path,
    views: Path,
    output: Path,
    model: str | None,
    autoencoder: Path | None,
    device: str,
    precision: str,
) -> None:
    from maisi.data.prepared import PreparedFolder

    prepared = PreparedFolder(source)
    path = autoencoder_file(model, autoencoder)
    from maisi.generation.latent_views import cache

    with progress() as report:
        index = cache(prepared, views, path, output, device, precision, partial(report, "prepare", "latents"))
    click.echo(f"{output}: {len(index.views)} views, scale factor {index.scale_factor:.4f}")


@click.command()
@click.argument("stage", required=False)
@click.argument("file", type=FILE, required=False, metavar="RUN.yaml")
@click.option("-o", "--output", type=FILE, help="Folder of the run; one that exists is gone on with.")
@click.option("--example", is_flag=True, help="Print a commented RUN.yaml for STAGE and stop.")
def train(stage: str | None, file: Path | None, output: Path | None, example: bool) -> None:
    """Train STAGE as RUN.yaml says.

    Stages: autoencoder, diffusion, controlnet; mask-autoencoder and mask-diffusion for a model that makes label maps.
    """
    from maisi.training import runs

    stage = stage or ("autoencoder" if example else None)
    if stage not in runs.STAGES:
        raise MaisiError(f"There is no stage '{stage or ''}' to train; choose one of {', '.join(runs.STAGES)}.")
    if example:
        click.echo(runs.example_yaml(stage), nl=False)
        return
    if file is None:
        raise MaisiError(f"The run's settings are missing; start from what `maisi train --example {stage}` prints.")
    folder = output or Path("runs") / file.stem
    click.echo(f"{folder}: reached step {runs.run_stage(stage, file, folder)}")
