"""Commands on label maps under `maisi mask`: `library build`, `library search`, `deform`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from maisi.cli.options import FILE, MOST_TOLD, output_option, progress, require_new, skip_option
from maisi.io.files import VOLUME_ENDINGS


@click.group()
def library() -> None:
    """A folder of label maps to draw from."""


@library.command()
@click.argument("folder", type=FILE)
@output_option("Library to make, a folder.")
@click.option("--note", default="", help="Where the masks come from; kept with each. Name no patient here.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that read and check.")
@skip_option
def build(folder: Path, output: Path, note: str, workers: int, skip_unreadable: bool) -> None:
    """Check the label maps in FOLDER and below, crop them to the body and list what each shows.

    They are files, or the labels of generated items, in maisi's ids (`maisi mask import`).
    """
    from maisi.data.mask_library import build as build_library

    require_new(output)
    with progress() as report:
        tell = partial(report, "library", "masks")
        built = build_library(folder, output, note, skip_unreadable=skip_unreadable, workers=workers, report=tell)
    for sentence in built.left_out[:MOST_TOLD]:
        click.echo(f"Left out: {sentence}", err=True)
    more = len(built.left_out) - MOST_TOLD
    if more > 0:
        click.echo(f"... and {more} more.", err=True)
    click.echo(f"{output}: {len(built.index.masks)} masks")


@library.command()
@click.argument("folder", metavar="LIBRARY", type=FILE)
@click.option("--region", multiple=True, metavar="NAME", help="Body region to cover. May be repeated.")
@click.option("--structure", multiple=True, metavar="NAME", help="Structure to show. May be repeated.")
@click.option("--tumor", multiple=True, metavar="NAME", help="Tumour, by its name or its host's. May be repeated.")
@click.option("--size", metavar="X,Y,Z", help="Voxels of the grid to fill; with --spacing.")
@click.option("--spacing", metavar="X,Y,Z", help="Distance between its voxels in mm.")
def search(
    folder: Path,
    region: Sequence[str],
    structure: Sequence[str],
    tumor: Sequence[str],
    size: str | None,
    spacing: str | None,
) -> None:
    """List the masks of LIBRARY that show what is asked for, the best first."""
    from maisi.anatomy import label_name, named_sides
    from maisi.data.mask_library import MaskLibrary
    from maisi.errors import MaisiError
    from maisi.request import Request
    from maisi.tumors import parse_kind

    request = Request.parse(region=region, size=size, spacing=spacing)
    if request.size and not request.spacing:
        raise MaisiError("A size in voxels says no extent alone; give --spacing too.")
    extent = None
    if request.size and request.spacing:
        (i, j, k), (x, y, z) = request.size, request.spacing
        extent = (i * x, j * y, k * z)
    ids = [id for name in structure for id in named_sides(name)]
    tumors = [parse_kind(name).id for name in tumor]
    found = MaskLibrary(folder).search(request.region, ids, tumors, extent, request.spacing)
    if not found.rows:
        raise MaisiError(found.reason)
    for row in found.rows:
        grid = f"{'x'.join(map(str, row.size))} at {'x'.join(f'{s:.3g}' for s in row.spacing_mm)} mm"
        lesions = ", ".join(f"{label_name(id)} {mm:.0f} mm" for id, mm in row.tumors.items())
        parts = [row.id, "+".join(row.regions) or "no region", grid, f"{len(row.structures)} structures", lesions]
        click.echo("; ".join(part for part in parts if part))


@click.command()
@click.argument("mask", type=FILE)
@output_option("Label map to make (.nii.gz, .nii, .nrrd or .zarr).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same change.")
@click.option("--anatomy-size", multiple=True, metavar="NAME=FACTOR", help="Volume of a structure. May be repeated.")
@click.option("--elastic", type=float, metavar="MM", help="Largest displacement.  [default: 5]")
@click.option("--rotate", type=float, metavar="DEGREES", help="Largest turn about each axis.  [default: 4]")
@click.option("--zoom", metavar="LOW,HIGH", help="Factors on the size of everything.  [default: 0.95,1.05]")
@click.option("--tumors", is_flag=True, help="Give its tumours other shapes within their hosts, too.")
def deform(
    mask: Path,
    output: Path,
    seed: int,
    tumors: bool,
    anatomy_size: Sequence[str],
    elastic: float | None,
    rotate: float | None,
    zoom: str | None,
) -> None:
    """Turn, stretch and bend MASK at random, then give structures other volumes.

    With --tumors each tumour is turned, zoomed and bent by itself, so that at least 80 % of it is left within its host.
    """
    import numpy as np

    from maisi.anatomy import label_id, label_names
    from maisi.data.label_maps import checked_mask, ids_in
    from maisi.data.mask_deform import (
        DeformationRanges,
        check_sizes,
        draw_deformation,
        scale_organs,
    )
    from maisi.data.mask_deform import deform as deform_labels
    from maisi.data.mask_import import read_our_labels
    from maisi.data.tumor_masks import deform_tumors
    from maisi.io.nifti import write_volume
    from maisi.request import parse_anatomy_sizes

    require_new(output, *VOLUME_ENDINGS)
    sizes = {label_id(name): factor for name, factor in parse_anatomy_sizes(anatomy_size).items()}
    given = {"elastic_mm": elastic, "rotate_degrees": rotate, "zoom": _pair(zoom)}
    ranges = DeformationRanges(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    labels = checked_mask(read_our_labels(mask), source=str(mask))
    check_sizes(labels, sizes)
    moved = deform_labels(labels, draw_deformation(np.random.default_rng(seed), ranges, labels))
    result = scale_organs(moved, sizes)
    if tumors:
        result = deform_tumors(result, np.random.default_rng([seed, 1]))
    names = label_names(ids_in(result.array))
    write_volume(output, result, description="label map deformed by maisi", synthetic=False, names=names)
    click.echo(str(output))


def _pair(text: str | None) -> tuple[float, float] | None:
    from maisi.errors import MaisiError

    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise MaisiError(f"'{text}' is no pair of factors; write --zoom 0.95,1.05.") from None
    return (low, high)
