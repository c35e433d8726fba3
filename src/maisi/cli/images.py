"""Commands on single images: `encode`, `decode`, `phantom`, `segment`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maisi.cli.group import agreed, joined_group, processes, tell
from maisi.cli.options import (
    FILE,
    autoencoder_file,
    autoencoder_options,
    budget_options,
    grid_options,
    output_option,
    require_new,
    running_options,
    set_up_memory,
)
from maisi.errors import MaisiError
from maisi.io.files import VOLUME_ENDINGS

if TYPE_CHECKING:
    from maisi.data.latents import Latent

_MADE_BY = "autoencoder_sha256"


@click.command()
@click.argument("image", type=FILE)
@output_option("Latent to make (.safetensors).")
@autoencoder_options
@click.option("--modality", default="ct", show_default=True, help="ct, or a kind of MR (mri, mri_t1, ...).")
@running_options
@budget_options
def encode(
    image: Path,
    output: Path,
    model: str | None,
    autoencoder: Path | None,
    modality: str,
    memory: str | None,
    only_plan: bool,
    device: str,
    precision: str,
) -> None:
    """Turn IMAGE into latents: mean and log_variance, float32, C x X/4 x Y/4 x Z/4.

    C is 4 in the released autoencoder and 16 in tiny's. A CT is read part by part, never whole, and several processes
    may share it (torchrun -m maisi encode ...). An MR image is read whole by one, since its percentiles are those of
    all voxels.
    """
    from maisi.anatomy import modality_name, parse_modality
    from maisi.io.nifti import opened_rows, read_volume
    from maisi.volume import Volume

    require_new(output, ".safetensors")
    modality, limit = parse_modality(modality), set_up_memory(memory)
    path = autoencoder_file(model, autoencoder)
    streamed = modality_name(modality) == "CT"
    if processes() > 1 and not streamed:
        raise MaisiError("Processes can share a CT only, since an MR image is read whole; start one process.")
    with opened_rows(image) if streamed else nullcontext(read_volume(image).to_ras()) as source:
        from maisi.data.latents import save_latent
        from maisi.generation import codec

        if not isinstance(source, Volume) and (fault := codec.rows_fault(source)):
            raise MaisiError(f"{image} does not hold HU: {fault}; an MR image is told by --modality.")
        from maisi.io.files import sha256

        with joined_group(device) as group:
            plan = partial(codec.file_plan, path, "encode", source.shape, device, precision, limit, streamed=streamed)
            chosen = agreed(group, lambda shared: plan(processes=shared))
            if only_plan:
                tell(str(chosen))
                return
            network, notes = codec.load_autoencoder(path, device, precision), {_MADE_BY: sha256(path)}
            if isinstance(source, Volume):
                latent: Latent | None = codec.encode(network, source, modality, notes, chosen)
            else:
                latent = codec.encode_rows(network, source, chosen, notes, group, modality)
            if latent is not None:
                save_latent(output, latent)
                tell(f"{output}: {' x '.join(map(str, latent.mean.shape))}")


@click.command()
@click.argument("latent", type=FILE)
@output_option("Image to make (.nii.gz, .nii, .nrrd or .zarr).")
@autoencoder_options
@running_options
@budget_options
def decode(
    latent: Path,
    output: Path,
    model: str | None,
    autoencoder: Path | None,
    memory: str | None,
    only_plan: bool,
    device: str,
    precision: str,
) -> None:
    """Turn LATENT, made by `maisi encode`, back into an image (CT: HU) of its own size and place.

    The image is written part by part and never whole in memory, and several processes may share the work (torchrun -m
    maisi decode ...).
    """
    from maisi.data.latents import load_latent
    from maisi.io.files import sha256
    from maisi.io.nifti import write_slabs
    from maisi.io.slabs import Slabs

    require_new(output, *VOLUME_ENDINGS)
    path, limit = autoencoder_file(model, autoencoder), set_up_memory(memory)
    read = load_latent(latent)
    if read.notes.get(_MADE_BY, sha256(path)) != sha256(path):
        tell("Note: the latent was made with another autoencoder.", err=True)
    from maisi.generation import codec

    with joined_group(device) as group:
        plan = partial(codec.file_plan, path, "decode", read.size, device, precision, limit, streamed=True)
        chosen = agreed(group, lambda shared: plan(processes=shared))
        if only_plan:
            tell(str(chosen))
            return
        slabs = codec.decode_slabs(codec.load_autoencoder(path, device, precision), read, chosen, group)
        if group is not None and group.rank > 0:
            deque(slabs, maxlen=0)
            return
        volume = Slabs(read.size, read.affine, codec.STORED, chosen.axis, slabs)
        write_slabs(output, volume, description="decoded by maisi from latents", synthetic=False)
        tell(f"{output}: {' x '.join(map(str, read.size))}")


@click.command()
@grid_options
@output_option("Folder to make, with image.nii.gz, labels.nii.gz and preview.png.")
def phantom(region: Sequence[str], size: str | None, spacing: str | None, seed: int, output: Path) -> None:
    """Draw a body of simple shapes as CT with its label map: data for trying things out anywhere."""
    from maisi.anatomy import label_names
    from maisi.data.label_maps import ids_in
    from maisi.data.phantom import DESCRIPTION
    from maisi.data.phantom import phantom as draw
    from maisi.io.files import new_folder
    from maisi.io.nifti import write_volume
    from maisi.io.preview import preview
    from maisi.request import Request

    wishes = {"region": region or ("chest",), "size": size or (96, 80, 64), "spacing": spacing or (4, 4, 5)}
    request = Request.parse(**wishes, seed=seed)
    assert request.size is not None
    assert request.spacing is not None
    with new_folder(output) as part:
        image, mask = draw(request.size, request.spacing, request.region, request.seed)
        write_volume(part / "image.nii.gz", image, description=DESCRIPTION)
        names = label_names(ids_in(mask.array))
        write_volume(part / "labels.nii.gz", mask, description=DESCRIPTION, names=names)
        preview(part / "preview.png", image, mask, title=f"Phantom: {', '.join(request.region)}; seed {seed}")
    click.echo(str(output))


@click.command()
@click.argument("ct", type=FILE)
@output_option("Label map to make (.nii.gz, .nii, .nrrd or .zarr).")
def segment(ct: Path, output: Path) -> None:
    """Segment a CT by rules: body, lungs, airway, bone."""
    from maisi.io.nifti import read_volume, write_volume

    require_new(output, *VOLUME_ENDINGS)
    volume = read_volume(ct)
    from maisi.data.preprocess import hu_fault

    if fault := hu_fault(volume.array):
        raise MaisiError(f"{ct} does not hold HU: {fault}.")
    from maisi.anatomy import label_names
    from maisi.data.label_maps import ids_in
    from maisi.data.segmentation import segment as segment_volume

    labels = segment_volume(volume)
    if not labels.array.any():
        raise MaisiError(f"No body is found in {ct}: hardly anything in it is denser than air; give a CT of a body.")
    names = label_names(ids_in(labels.array))
    write_volume(output, labels, description="labels made by maisi", synthetic=False, names=names)
    click.echo(str(output))
