"""`maisi generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maisi.cli.options import (
    FILE,
    announced,
    budget_options,
    fill,
    grid_options,
    items_options,
    output_option,
    ranges_option,
    refuse_given,
    require_first,
    running_options,
    say_items,
    set_up_memory,
    temperature_option,
)
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.request import Request


@click.command()
@grid_options
@items_options
@click.option("--mask", type=FILE, help="Label map (NIfTI, NRRD, Zarr) to follow; the image has its grid.")
@click.option("--structure", multiple=True, metavar="NAME", help="To be shown; without --mask, finds one that has it.")
@click.option("--tumor", multiple=True, metavar="WISH", help="Such as liver:25mm or lung:8-15mmx3; may be repeated.")
@click.option(
    "--anatomy-size", multiple=True, metavar="NAME=FACTOR", help="Volume of a structure, such as pancreas=0.7."
)
@click.option("--keep", multiple=True, metavar="NAMES", help="Structures that the written labels keep.  [default: all]")
@click.option("--library", type=FILE, help="Folder of label maps (maisi mask library) to find one in.")
@click.option("--model", default="tiny", show_default=True, help="A carried model's name, or a model folder.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option("--solver", help="Solver of the denoising.  [default: the model's]")
@click.option("--guidance", type=float, default=0.0, show_default=True, help="Strength of guidance; 0 is off.")
@click.option("--mask-guidance", type=float, help="Strengthens the label map; 0 is off.  [default: the model's]")
@click.option("--self-guidance", type=float, help="Sharpens; 0 is off.  [default: the model's]")
@temperature_option
@click.option("--strengthen", multiple=True, metavar="NAME=NUMBER", help="A structure of the mask, such as mandible=2.")
@click.option("--fov", default="given", show_default=True, help="given, or auto: size and spacing from the regions.")
@click.option("--retries", type=int, default=2, show_default=True, help="With a mask: made again if it fails checks.")
@ranges_option
@click.option("--modality", default="ct", show_default=True, help="ct, or a kind of MR the model knows.")
@click.option("--like", type=FILE, help="A volume (such as a CT of yours) whose size and spacing are wanted.")
@click.option("--again", type=FILE, help="A record.json: its item is made anew by what it says, in place of wishes.")
@running_options
@budget_options
@click.option(
    *("-o", "--output"),
    type=FILE,
    help="Folder to make, with a folder 0000, 0001, ... for each item. An interrupted one is gone on with.  [required]",
)
def generate(
    output: Path | None,
    device: str,
    precision: str,
    memory: str | None,
    only_plan: bool,
    first: int,
    again: Path | None,
    like: Path | None,
    **wishes: Any,
) -> None:
    """Make synthetic volumes.

    \b
    maisi generate --region chest --size 128,128,128 --spacing 3,3,3 -o out/
    maisi generate --mask labels.nii.gz -o out/
    maisi generate --region abdomen --structure liver --tumor liver:25mm -n 4 -o out/
    maisi generate --again out/0003/record.json -o anew/
    """
    from maisi.request import Request

    if output is None and not only_plan:
        raise MaisiError("Say where the items go: -o FOLDER.")
    if again is not None:
        refuse_given((*wishes, "first", "like"), "is a wish, and --again has those of the record")
        request, first, made_in = _request_of(again)
        precision = made_in if precision == "auto" else precision
    else:
        if like is not None:
            refuse_given(("size", "spacing", "mask", "fov"), "says the grid, and so does --like")
            wishes |= _grid_of(like)
        request = Request.parse(**wishes)
    require_first(first)
    _make(output, request, first, device, precision, memory, only_plan)


@click.command()
@click.argument("image", type=FILE, metavar="CT")
@click.option("--labels", "mask", type=FILE, help="Label map of the CT, on its grid.  [default: lungs, bone by rules]")
@click.option("--tumor", multiple=True, metavar="WISH", help="Such as liver:25mm; may be repeated. none: remove them.")
@items_options
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same volume.")
@click.option("--by", default="network", show_default=True, help="network, or rules: painted without any network.")
@click.option("--model", default="tiny", show_default=True, help="A carried model's name, or a model folder.")
@click.option("--region", multiple=True, metavar="NAME", help="Body region.  [default: as the labels tell]")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option("--solver", help="Solver of the denoising.  [default: the model's]")
@click.option("--guidance", type=float, default=0.0, show_default=True, help="Strengthens the tumour; 0 is off.")
@temperature_option
@click.option("--retries", type=int, default=2, show_default=True, help="Further attempts at a tumour too faint.")
@ranges_option
@running_options
@click.option("--memory", metavar="AMOUNT", help="What the process may use, such as 6GiB.  [default: all that is free]")
@output_option("Folder to make, with a folder 0000, 0001, ... for each item. An interrupted one is gone on with.")
def inpaint(output: Path, device: str, precision: str, memory: str | None, first: int, **wishes: Any) -> None:
    """Paint tumours into a real CT, or take them out; outside the painted region not a voxel changes.

    \b
    maisi inpaint ct.nii.gz --labels seg.nii.gz --tumor liver:25mm -n 5 -o out/
    maisi inpaint ct.nii.gz --tumor lung:8-15mmx2 --by rules -o out/
    """
    from maisi.request import Request

    request = Request.parse(**wishes)
    if request.by == "rules":
        refuse_given(
            ["steps", "solver", "guidance", "temperature", "device", "precision"],
            "is for networks, and rules paint here",
        )
    require_first(first)
    _make(output, request, first, device, precision, memory)


def _grid_of(volume: Path) -> dict[str, Any]:
    """Size and spacing of a volume in RAS+ order; its voxels are not read."""
    from maisi.io.nifti import read_header
    from maisi.volume import turn_to_ras

    header = read_header(volume)
    turn = turn_to_ras(header.shape, header.affine)
    spacing = (turn.affine[:3, :3] ** 2).sum(axis=0) ** 0.5
    return {"size": turn.shape, "spacing": tuple(round(float(mm), 4) for mm in spacing)}


def _request_of(record: Path) -> tuple[Request, int, str]:
    """The request that made one item, the item's number, and the precision that it was made in.

    Raises:
        MaisiError: the file cannot be read, or is no record of an item.
    """
    from maisi.config import parse_config
    from maisi.request import Request
    from maisi.weights.registry import find_model

    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        values, number, made_with = told["request"], int(told["item"]), dict(told["weights_sha256"])
        precision = {"float32": "fp32", "bfloat16": "bf16"}.get(told.get("precision"), "auto")
    except OSError as error:
        raise MaisiError(f"Cannot read {record}: {error.strerror}; give an item's record.json.") from None
    except (ValueError, KeyError, TypeError):
        raise MaisiError(f"{record} is no record of an item; give an item's record.json.") from None
    request = parse_config(Request, {**values, "count": 1}, str(record))
    now = find_model(request.model).config.sha256
    if any(now.get(name) != hash for name, hash in made_with.items()):
        click.echo("Note: The model has other weights now than when the record was written.", err=True)
    return request, number, precision


def _make(
    output: Path | None,
    request: Request,
    first: int,
    device: str,
    precision: str,
    memory: str | None,
    only_plan: bool = False,
) -> None:
    from maisi.generation.maker import Maker

    numbers = range(first, first + request.count)
    prepared = Maker(device, precision, set_up_memory(memory)).prepare(request, first)
    place = announced(prepared, output, numbers)
    if only_plan and prepared.plan is not None:
        click.echo(prepared.plan())
    if only_plan or output is None or place is None:
        return
    if place.missing:
        fill(place, prepared.load())
    say_items(output, numbers, place)
