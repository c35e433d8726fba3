"""The command `maisi`. Each command turns its options into checked values and calls one function.

Imports stand inside the commands: `maisi --help` and every refused request answer without loading torch.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

import maisi
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.generation.job import Job
    from maisi.generation.output import Destination
    from maisi.weights.registry import ModelFolder

BAD_INPUT = 2
INTERRUPTED = 130

FILE = click.Path(path_type=Path)
Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def main() -> None:
    """Entry point: run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (one sentence on stderr), 130 when interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(cli.main(list(arguments), prog_name="maisi", standalone_mode=False) or 0)
    except MaisiError as error:
        return _refuse(str(error))
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted; nothing is left half-written.", err=True)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _refuse(f"The disk is full ({error.filename or 'writing'}); free some space or choose another disk.")


def _interrupt(number: int, frame: object) -> None:
    """A polite kill ends a run as Ctrl-C does: what is half-written gets removed."""
    raise KeyboardInterrupt


def _refuse(sentence: str) -> int:
    click.echo(f"maisi: {sentence}", err=True)
    return BAD_INPUT


def _output(help: str) -> Decorator:
    return click.option("-o", "--output", "output", type=FILE, required=True, help=help)


def _running(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say where networks run."""
    command = click.option("--precision", default="auto", show_default=True, help="auto, fp32 or bf16.")(command)
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")(command)


def _budgeted(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say how much memory may be used."""
    help = "Print how it would be done and the memory that takes, and do nothing else."
    command = click.option("--plan", "only_plan", is_flag=True, help=help)(command)
    help = "What the process may use, such as 6GiB.  [default: all that is free]"
    return click.option("--memory", metavar="AMOUNT", help=help)(command)


def _grid_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say what a volume shows and how it is sampled."""
    command = click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same volume.")(command)
    command = click.option("--spacing", metavar="X,Y,Z", help="Distance between voxels in mm.")(command)
    command = click.option("--size", metavar="X,Y,Z", help="Voxels; any number from 1 to 1024.")(command)
    help = "Body region: head-neck, chest, abdomen or lower-body. May be repeated."
    return click.option("--region", multiple=True, metavar="NAME", help=help)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(maisi.__version__, prog_name="maisi")
def cli() -> None:
    """Synthetic 3D CT with labels: generate volumes, train the networks that do it, and judge the result."""


@cli.command()
@_grid_options
@click.option("-n", "--count", type=int, default=1, show_default=True, help="How many items.")
@click.option("--first", type=int, default=0, show_default=True, help="Number of the first item.")
@click.option("--mask", type=FILE, help="Label map (NIfTI, NRRD) to follow; the image has its grid.")
@click.option("--model", default="tiny", show_default=True, help="A carried model's name, or a model folder.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option("--solver", help="Solver of the denoising.  [default: the model's]")
@click.option("--guidance", type=float, default=0.0, show_default=True, help="Strength of guidance; 0 is off.")
@click.option("--fov", default="given", show_default=True, help="given, or auto: size and spacing from the regions.")
@click.option("--modality", default="ct", show_default=True, help="ct, or a kind of MR the model knows.")
@_running
@_budgeted
@_output("Folder to make, with a folder 0000, 0001, ... for each item. An interrupted one is gone on with.")
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

    limit = _memory(memory)
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


def _memory(text: str | None) -> int | None:
    from maisi.device import parse_memory

    return None if text is None else parse_memory(text)


def _make_items(
    job: Job, place: Destination, folder: ModelFolder, device: str, precision: str, memory: int | None
) -> None:
    from maisi.generation.pipeline import Model

    model = Model(folder, device, precision, memory)
    plan = model.prepare(job).decode
    place.begin()
    try:
        with _progress() as report:
            for number in place.missing:
                item = model.item(job, plan, number, partial(report, f"{number:04d}"))
                item.save(place.item_folder(number))
    except BaseException:
        place.withdraw()
        raise


@contextmanager
def _progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """Yield `report(what, stage, done, total)`: bars on a terminal, a line for each finished stage elsewhere."""
    if not sys.stderr.isatty():
        yield _plain_report()
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True)) as bars:
        tasks: dict[tuple[str, str], TaskID] = {}

        def report(what: str, stage: str, done: int, total: int) -> None:
            if (what, stage) not in tasks:
                tasks[what, stage] = bars.add_task(f"{what} {stage}", total=total)
            bars.update(tasks[what, stage], completed=done)

        yield report


def _plain_report() -> Callable[[str, str, int, int], None]:
    started = time.monotonic()

    def report(what: str, stage: str, done: int, total: int) -> None:
        if done == total:
            click.echo(f"{time.monotonic() - started:7.1f} s  {what} {stage}", err=True)

    return report


@cli.command()
@click.argument("query", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with tumours, their hosts and the regions' markers.")
def labels(query: Sequence[str], as_json: bool) -> None:
    """List the ids and names of the anatomy, all or those that QUERY (words or an id) is in."""
    from maisi.anatomy import EXTENSION, LABELS, REGION_MARKERS, TUMORS, label_id

    wanted = " ".join(query).lower()
    rows = [label for label in (*LABELS, *EXTENSION) if not label.free]
    rows = sorted((r for r in rows if wanted in r.name or wanted == str(r.id)), key=lambda r: r.id)
    if not rows:
        label_id(wanted)  # other spellings; or the error that names the nearest label
        rows = [label for label in (*LABELS, *EXTENSION) if label.id == label_id(wanted)]
    if as_json:
        hosts = {str(tumor): list(ids) for tumor, ids in TUMORS.items()}
        markers = {region: list(ids) for region, ids in REGION_MARKERS.items()}
        names = {str(row.id): row.name for row in rows}
        click.echo(json.dumps({"labels": names, "tumor_hosts": hosts, "region_markers": markers}, indent=2))
        return
    for row in rows:
        click.echo(f"{row.id:3d}  {row.name}")


@cli.command()
def models() -> None:
    """List the models that the package carries."""
    from maisi.weights.registry import carried_models, find_model

    for name in carried_models():
        model = find_model(name)
        config = model.config
        megabytes = sum(model.path(part).stat().st_size for part in config.files) / 1e6
        regions = sorted({region for view in config.field_of_view for region in view.regions})
        masks = "follows masks" if config.controlnet else "no masks"
        click.echo(f"{name}: {', '.join(regions) or 'regions unknown'}; {masks}; {config.process['kind']}, ", nl=False)
        click.echo(f"{config.default_steps} steps; {megabytes:.0f} MB; {model.folder / config.card}")


def _autoencoder_options(command: Callable[..., None]) -> Callable[..., None]:
    help = "A converted autoencoder, which says its own configuration; in place of --model."
    command = click.option("--autoencoder", type=FILE, help=help)(command)
    return click.option("--model", help="A carried model's name, or a model folder.  [default: tiny]")(command)


def _autoencoder_file(model: str | None, autoencoder: Path | None) -> Path:
    """Find the file, checked as far as its header goes.

    Raises:
        MaisiError: both are given, or there is no such autoencoder.
    """
    from maisi.weights.load import read_header
    from maisi.weights.registry import find_model

    if autoencoder is None:
        return find_model(model or "tiny").path("autoencoder")
    if model is not None:
        raise MaisiError("Both --model and --autoencoder are given; leave one of them out.")
    held = read_header(autoencoder).network
    if held != "autoencoder":
        raise MaisiError(f"{autoencoder} holds the network '{held}'; give a file with an autoencoder.")
    return autoencoder


def _require_new(path: Path, *endings: str) -> None:
    """Refuse, before any work, an output file that exists or cannot be made.

    Raises:
        MaisiError: so.
    """
    if not path.name.lower().endswith(endings):
        raise MaisiError(f"{path}: this command writes {' or '.join(endings)}; give a name that ends so.")
    if path.exists():
        raise MaisiError(f"{path} exists; choose another name or remove it.")
    if not path.parent.is_dir():
        raise MaisiError(f"The folder {path.parent} does not exist; make it first or choose another place.")


_VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd")
_MADE_BY = "autoencoder_sha256"


@cli.command()
@click.argument("image", type=FILE)
@_output("Latent to make (.safetensors).")
@_autoencoder_options
@click.option("--modality", default="ct", show_default=True, help="ct, or a kind of MR (mri, mri_t1, ...).")
@_running
@_budgeted
def encode(
    image: Path,
    output: Path,
    model: str | None,
    autoencoder: Path | None,
    modality: str,
    memory: str | None,
    only_plan: bool,
    **where: str,
) -> None:
    """Turn IMAGE into latents: mean and log_variance, float32, 4 x X/4 x Y/4 x Z/4."""
    from maisi.anatomy import parse_modality
    from maisi.io.nifti import read_volume

    _require_new(output, ".safetensors")
    modality, limit = parse_modality(modality), _memory(memory)
    path = _autoencoder_file(model, autoencoder)
    volume = read_volume(image)
    from maisi.data.latents import save_latent
    from maisi.generation import codec
    from maisi.weights.load import sha256

    plan = codec.file_plan(path, "encode", volume.to_ras().shape, memory=limit, **where)
    if only_plan:
        click.echo(str(plan))
        return
    notes = {_MADE_BY: sha256(path)}
    latent = codec.encode(codec.load_autoencoder(path, **where), volume, modality, notes, plan)
    save_latent(output, latent)
    click.echo(f"{output}: {' x '.join(map(str, latent.mean.shape))}")


@cli.command()
@click.argument("latent", type=FILE)
@_output("Image to make (.nii.gz, .nii or .nrrd).")
@_autoencoder_options
@_running
@_budgeted
def decode(
    latent: Path,
    output: Path,
    model: str | None,
    autoencoder: Path | None,
    memory: str | None,
    only_plan: bool,
    **where: str,
) -> None:
    """Turn LATENT, made by `maisi encode`, back into an image (CT: HU) of its own size and place."""
    from maisi.data.latents import load_latent
    from maisi.io.nifti import write_volume
    from maisi.weights.load import sha256

    _require_new(output, *_VOLUME_ENDINGS)
    path, limit = _autoencoder_file(model, autoencoder), _memory(memory)
    read = load_latent(latent)
    if read.notes.get(_MADE_BY, sha256(path)) != sha256(path):
        click.echo("Note: the latent was made with another autoencoder.", err=True)
    from maisi.generation import codec

    plan = codec.file_plan(path, "decode", read.size, memory=limit, **where)
    if only_plan:
        click.echo(str(plan))
        return
    volume = codec.decode(codec.load_autoencoder(path, **where), read, plan)
    write_volume(output, volume, description="decoded by maisi from latents", synthetic=False)
    click.echo(f"{output}: {' x '.join(map(str, volume.shape))}")


@cli.command()
@_grid_options
@_output("Folder to make, with image.nii.gz, labels.nii.gz and preview.png.")
def phantom(region: Sequence[str], size: str | None, spacing: str | None, seed: int, output: Path) -> None:
    """Draw a body of simple shapes as CT with its label map: data for trying things out anywhere."""
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
        write_volume(part / "image.nii.gz", image, description="phantom made by maisi")
        write_volume(part / "labels.nii.gz", mask, description="phantom made by maisi")
        preview(part / "preview.png", image, mask, title=f"Phantom: {', '.join(request.region)}; seed {seed}")
    click.echo(str(output))


@cli.command()
@click.argument("ct", type=FILE)
@_output("Label map to make (.nii.gz, .nii or .nrrd).")
def segment(ct: Path, output: Path) -> None:
    """Segment a CT by rules: body, lungs, airway, bone."""
    from maisi.io.nifti import read_volume, write_volume

    _require_new(output, *_VOLUME_ENDINGS)
    volume = read_volume(ct)
    from maisi.data.segmentation import segment as segment_volume

    write_volume(output, segment_volume(volume), description="labels made by maisi", synthetic=False)
    click.echo(str(output))


@cli.group()
def weights() -> None:
    """Look into files of weights, and convert them from and to the released layout."""


@weights.command()
@click.argument("official", type=FILE)
@click.option("--network", help="autoencoder, unet or controlnet.  [default: as the tensors' names tell]")
@click.option("--norm-groups", type=int, help="Groups of the normalisation, where not the released 32.")
@click.option("--head-channels", type=int, help="Channels of an attention head, where not the released 32.")
@_output("File to make (.safetensors).")
def convert(official: Path, network: str | None, output: Path, **settings: int | None) -> None:
    """Convert OFFICIAL, a released .pt file, to safetensors; nothing in it is run."""
    from maisi.weights.convert import convert as convert_file

    _require_new(output, ".safetensors")
    given = {name: value for name, value in settings.items() if value is not None}
    header = convert_file(official, output, as_network=network, settings=given)
    click.echo(f"{output}: {header.network}, {_millions(header.tensors)} M parameters")


@weights.command()
@click.argument("file", type=FILE)
@_output("File to make (.pt).")
def export(file: Path, output: Path) -> None:
    """Write FILE in the layout of the released .pt files."""
    from maisi.weights.convert import export_official

    _require_new(output, ".pt")
    export_official(file, output)
    click.echo(str(output))


@weights.command()
@click.option("--autoencoder", type=FILE, required=True, help="Its safetensors.")
@click.option("--unet", type=FILE, required=True, help="Its safetensors.")
@click.option("--controlnet", type=FILE, help="Its safetensors; without it the model follows no masks.")
@click.option("--name", required=True, help="What the model is called; ddpm-ct or rflow-ct for the released weights.")
@click.option("--half", is_flag=True, help="Store float16.")
@_output("Model folder to make.")
def assemble(autoencoder: Path, unet: Path, controlnet: Path | None, name: str, half: bool, output: Path) -> None:
    """Put networks that belong together into a model folder, to be used as `--model FOLDER`."""
    from maisi.weights.assemble import assemble as assemble_model

    given = {"autoencoder": autoencoder, "unet": unet, "controlnet": controlnet}
    files = {part: path for part, path in given.items() if path is not None}
    config = assemble_model(cast(Any, files), output, name, half=half)
    click.echo(
        f"{output}: {', '.join(config.files)}; {config.process['kind']}, images in steps of {config.size_multiple}"
    )


@weights.command()
@click.argument("file", type=FILE)
def show(file: Path) -> None:
    """Tell what FILE holds: network, configuration, notes, hash."""
    from maisi.weights.load import read_header, sha256

    header = read_header(file)
    notes = {k: v for k, v in header.metadata.items() if k not in ("maisi.network", "maisi.config")}
    facts = {"network": header.network, "parameters": _parameters(header.tensors), "config": header.config}
    click.echo(json.dumps(facts | notes | {"sha256": sha256(file)}, indent=2))


def _parameters(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    import math

    return sum(math.prod(shape) for _, shape in tensors.values())


def _millions(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    return f"{_parameters(tensors) / 1e6:.1f}"


@cli.command()
@click.argument("source", type=FILE)
@_output("Folder to make; one that was begun is gone on with.")
@click.option("--validation-share", type=float, default=0.15, show_default=True, help="Patients kept out of training.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides who is kept out.")
@click.option("--views", type=FILE, help="YAML with the views to cache as latents; SOURCE is then a prepared folder.")
@_autoencoder_options
@_running
def prepare(source: Path, output: Path, validation_share: float, seed: int, views: Path | None, **network: Any) -> None:
    """Make data ready for training.

    SOURCE is a case list (JSON): its images and labels become arrays. With --views SOURCE is the folder that this
    made: views of its cases are drawn and kept as latents of an autoencoder.

    \b
    maisi prepare cases.json -o prepared
    maisi prepare prepared --views views.yaml --autoencoder autoencoder.safetensors -o latents
    """
    if views is not None:
        _prepare_latents(source, views, output, **network)
        return
    from maisi.data.manifest import read_cases
    from maisi.data.prepare import prepare as prepare_cases

    cases = read_cases(source)
    with _progress() as report:
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
    path = _autoencoder_file(model, autoencoder)
    from maisi.generation.latent_views import cache

    with _progress() as report:
        index = cache(prepared, views, path, output, device, precision, partial(report, "prepare", "latents"))
    click.echo(f"{output}: {len(index.views)} views, scale factor {index.scale_factor:.4f}")


@cli.command()
@click.argument("stage", required=False)
@click.argument("file", type=FILE, required=False, metavar="RUN.yaml")
@click.option("-o", "--output", type=FILE, help="Folder of the run; one that exists is gone on with.")
@click.option("--example", is_flag=True, help="Print a commented RUN.yaml for STAGE and stop.")
def train(stage: str | None, file: Path | None, output: Path | None, example: bool) -> None:
    """Train STAGE (autoencoder, diffusion or controlnet) as RUN.yaml says."""
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


if __name__ == "__main__":
    main()
