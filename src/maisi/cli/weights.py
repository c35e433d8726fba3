"""`maisi weights`: files of networks, converted, shown and put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import click

from maisi.cli.options import FILE, output_option, require_new
from maisi.weights.storage import STORAGES, Storage


@click.group()
def weights() -> None:
    """Look into files of weights, and convert them from and to the released layout."""


@weights.command()
@click.argument("official", type=FILE)
@click.option(
    "--network",
    help="autoencoder, unet or controlnet; of others: inception, radimagenet or lpips.  "
    "[default: as the tensors' names tell]",
)
@click.option("--lpips-heads", "heads", type=FILE, help="alex.pth, vgg.pth or squeeze.pth, beside the network's file.")
@click.option("--norm-groups", type=int, help="Groups of the normalisation, where not the released 32.")
@click.option("--head-channels", type=int, help="Channels of an attention head, where not the released 32.")
@click.option(
    "--upsampling",
    type=click.Choice(("nearest", "trilinear", "transposed")),
    help="Of an autoencoder, where not the released one: trilinear, transposed for label maps.",
)
@output_option("File to make (.safetensors).")
def convert(
    official: Path, network: str | None, heads: Path | None, output: Path, **settings: int | str | None
) -> None:
    """Convert OFFICIAL, a released .pt file or a published feature network, to safetensors; nothing in it is run."""
    from maisi.weights.convert import convert as convert_file

    require_new(output, ".safetensors")
    given = {name: value for name, value in settings.items() if value is not None}
    header = convert_file(official, output, as_network=network, settings=given, heads=heads)
    kind = " ".join([header.network, *([header.config["variant"]] if "variant" in header.config else [])])
    click.echo(f"{output}: {kind}, {header.parameters / 1e6:.1f} M parameters")


@weights.command()
@click.argument("name")
@click.option(
    "--from", "source", type=FILE, help="Folder that has the released .pt files already; nothing is downloaded."
)
@click.option("--revision", help="Branch, tag or commit of the repositories on the hub.  [default: main]")
@click.option("--cache", type=FILE, help="Where downloads are kept.  [default: the hub's cache, see HF_HOME]")
@click.option("--storage", type=click.Choice(STORAGES), help="How to store weights.  [default: as the files do]")
@output_option("Model folder to make.")
def fetch(
    name: str, source: Path | None, revision: str | None, cache: Path | None, storage: Storage | None, output: Path
) -> None:
    """Make a model folder of NAME, a released model: rflow-ct, ddpm-ct, rflow-mr or rflow-mr-brain.

    Its files come from the Hugging Face hub, each compared with the hash that the hub tells, or with --from from a
    folder, as the reference's scripts leave them. Nothing in them is run.

    \b
    maisi weights fetch rflow-ct -o rflow-ct
    maisi weights fetch rflow-ct --from NV-Generate-CTMR/models -o rflow-ct
    maisi generate --model rflow-ct --region chest --fov auto -o out
    """
    from maisi.cli.options import refuse_given
    from maisi.weights.fetch import FromFolder, FromHub
    from maisi.weights.fetch import fetch as fetch_model
    from maisi.weights.hub import Hub
    from maisi.weights.released_models import released_model

    model = released_model(name)
    require_new(output)
    if source is not None:
        refuse_given(("revision", "cache"), "is for downloads, and --from makes none")
    place = FromHub(Hub(revision or "main", cache)) if source is None else FromFolder(source)
    config = fetch_model(name, output, place, storage=storage, say=click.echo)
    click.echo(f"{output}: {', '.join(config.files)}; use it with --model {output}. {model.advice}".rstrip())


@weights.command()
@click.argument("file", type=FILE)
@output_option("File to make (.pt).")
def export(file: Path, output: Path) -> None:
    """Write FILE in the layout of the released .pt files."""
    from maisi.weights.convert import export_official

    require_new(output, ".pt")
    unsaid = export_official(file, output)
    if unsaid:
        told = "; ".join(f"{name} {value}" for name, value in unsaid.items())
        click.echo(f"Note: the layout has no place for {told}. Tell it whatever loads the file.", err=True)
    click.echo(str(output))


@weights.command()
@click.option("--autoencoder", type=FILE, required=True, help="Its safetensors.")
@click.option("--unet", type=FILE, required=True, help="Its safetensors.")
@click.option("--controlnet", type=FILE, help="Its safetensors; without it the model follows no masks.")
@click.option("--mask-autoencoder", type=FILE, help="Its safetensors, for a model that also makes label maps.")
@click.option("--mask-unet", type=FILE, help="Its safetensors; goes with --mask-autoencoder.")
@click.option("--name", required=True, help="What the model is called; ddpm-ct or rflow-ct for the released weights.")
@click.option(
    "--storage",
    type=click.Choice(STORAGES),
    help="How to store weights; int8: 8 bits, with a scale for each output channel.  [default: as the files do]",
)
@click.option("--ranges", type=FILE, help="What its images are judged by, made by `maisi quality learn`.")
@click.option("--library", type=FILE, help="Label maps that come with it, made by `maisi mask library build`.")
@output_option("Model folder to make.")
def assemble(
    name: str, storage: Storage | None, ranges: Path | None, library: Path | None, output: Path, **given: Path | None
) -> None:
    """Put networks that belong together into a model folder, to be used as `--model FOLDER`."""
    from maisi.data.mask_library import MaskLibrary
    from maisi.data.quality import read_ranges
    from maisi.weights.assemble import assemble as assemble_model

    if ranges is not None:
        read_ranges(ranges)
    if library is not None:
        MaskLibrary(library)
    files = {part: path for part, path in given.items() if path is not None}
    config = assemble_model(cast(Any, files), output, name, storage=storage, ranges=ranges, library=library)
    click.echo(
        f"{output}: {', '.join(config.files)}; {config.process['kind']}, images in steps of {config.size_multiple}"
    )


@weights.command()
@click.argument("file", type=FILE)
def show(file: Path) -> None:
    """Tell what FILE holds: network, parameters and how they are stored, configuration, notes, hash."""
    from maisi.io.files import sha256
    from maisi.weights.load import read_header

    header = read_header(file)
    notes = {k: v for k, v in header.metadata.items() if k not in ("maisi.network", "maisi.config")}
    facts = {"network": header.network, "parameters": header.parameters, "storage": header.storage}
    click.echo(json.dumps({**facts, "config": header.config, **notes, "sha256": sha256(file)}, indent=2))
