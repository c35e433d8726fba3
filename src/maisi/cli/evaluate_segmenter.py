"""`maisi evaluate segmenter`: train the segmenter that other evaluations judge with; and the options they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from maisi.cli.options import FILE, cache_option, output_option, progress, require_new, skip_option
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.evaluation.cache import Cache
    from maisi.evaluation.segmentation_cases import Structures
    from maisi.evaluation.trainer import FolderSegmenter, Trainer
    from maisi.evaluation.volumes import Entry, Found

OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "segresnet": ("steps", "spacing", "patch", "batch", "filters", "seed", "device", "precision"),
        "nnunet": ("epochs", "trainer_class", "configuration", "device"),
        "auto3dseg": ("epochs", "algorithms", "templates"),
    }
)
"""Trainer -> the options that it has."""


def structure_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--structure`: what a segmenter is to find."""
    help = "To find: a label, a pair as one ('parotid gland'), lungs, skeleton. May be repeated, or with commas."
    return click.option("--structure", "structure", multiple=True, metavar="NAME", help=help)(command)


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say what trains a segmenter, and how; `trainer_from` takes them."""
    options: list[tuple[str, dict[str, Any]]] = [
        ("--trainer", {"default": "segresnet", "show_default": True, "help": "segresnet, nnunet or auto3dseg."}),
        ("--steps", {"type": int, "help": "segresnet: of each training.  [default: 1000]"}),
        ("--spacing", {"metavar": "X,Y,Z", "help": "segresnet: mm that images are resampled to.  [default: 3,3,3]"}),
        ("--patch", {"metavar": "X,Y,Z", "help": "segresnet: voxels of a patch, by 8.  [default: 64,64,64]"}),
        ("--batch", {"type": int, "help": "segresnet: patches in a step.  [default: 2]"}),
        ("--filters", {"type": int, "help": "segresnet: channels, by 8.  [default: 8]"}),
        ("--seed", {"type": int, "help": "Of folds; segresnet: of weights and patches, too.  [default: 0]"}),
        ("--epochs", {"type": int, "help": "nnunet: 1, 5, 10, 20, 50, ...  [default: 1000]  auto3dseg: any number."}),
        ("--trainer-class", {"metavar": "NAME", "help": "nnunet: its class of trainer, in place of --epochs."}),
        ("--configuration", {"metavar": "NAME", "help": "nnunet: 2d, 3d_lowres or 3d_fullres.  [default: 3d_fullres]"}),
        ("--algorithms", {"metavar": "A,B,...", "help": "auto3dseg: of its templates, by name.  [default: all]"}),
        ("--templates", {"type": FILE, "help": "auto3dseg: folder of templates.  [default: downloaded by MONAI]"}),
        ("--device", {"help": "segresnet, nnunet: auto, cpu, cuda or mps.  [default: auto]"}),
        ("--precision", {"help": "segresnet: auto, fp32 or bf16.  [default: auto]"}),
    ]
    for name, how in reversed(options):
        command = click.option(name, **how)(command)
    return command


def trainer_from(trainer: str, **given: Any) -> Trainer:
    """Make the trainer of what `training_options` gave; None is not given.

    Raises:
        MaisiError: no such trainer, an option that it does not have or a value it cannot use, or it is not installed.
    """
    from maisi.device import resolve_device, resolve_precision
    from maisi.evaluation.trainers import TRAINERS, make_trainer

    values = {name: value for name, value in given.items() if value is not None}
    own = OPTIONS.get(trainer)
    if own is None:
        raise MaisiError(f"Unknown trainer '{trainer}'; choose from {', '.join(TRAINERS)}.")
    for name in values:
        if name not in own:
            raise MaisiError(
                f"{_option(name)} is not for --trainer {trainer}, which has {', '.join(map(_option, own))}."
            )
    made = make_trainer(trainer, _settings(trainer, values))
    device = resolve_device(values.get("device", "auto"))
    resolve_precision(values.get("precision", "auto"), device)
    return made


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _settings(trainer: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the fields of a trainer's configuration."""
    from maisi.evaluation.nnunet import class_of

    fields = dict(values)
    if trainer == "nnunet" and "epochs" in fields:
        if "trainer_class" in fields:
            raise MaisiError("--trainer-class says the number of epochs; leave --epochs out.")
        fields["trainer_class"] = class_of(fields.pop("epochs"))
    if "spacing" in fields:
        fields["spacing_mm"] = fields.pop("spacing").replace("x", ",").split(",")
    if "patch" in fields:
        fields["patch"] = {"size": fields["patch"].replace("x", ",").split(",")}
    if "algorithms" in fields:
        fields["algorithms"] = [word.strip() for word in fields["algorithms"].split(",")]
    if "templates" in fields and not fields["templates"].is_dir():
        raise MaisiError(f"{fields['templates']} is no folder; give --templates the folder of algorithm templates.")
    return fields


def structures_in(entries: Sequence[Entry], names: Sequence[str]) -> Structures:
    """Structures by name; names of own classes are those of the entries.

    Raises:
        MaisiError: as `parse_structures`.
    """
    from maisi.evaluation.segmentation_cases import parse_structures

    custom: dict[int, str] = {}
    for entry in entries:
        custom |= entry.custom_labels
    return parse_structures(names, custom)


@dataclass(frozen=True)
class Training:
    """An order for a segmenter.

    Attributes:
        found: cases, those without labels among them.
        structures: to find.
        trainer: that trains it.
    """

    found: Found
    structures: Structures
    trainer: Trainer

    def trained(self, cache: Cache, report: Callable[[str, int, int], None]) -> tuple[FolderSegmenter, tuple[str, ...]]:
        """Train it in the cache, and return it with notes.

        Raises:
            MaisiError: no case can be used.
        """
        from maisi.evaluation.segmentation_cases import complete
        from maisi.evaluation.trainer import Lesson, require_enough

        entries, notes = complete(self.found.entries, self.structures, cache, "training")
        require_enough(self.trainer, len(entries), "The set")
        prepared = self.trainer.prepare(entries, self.structures, cache, report)
        made = self.trainer.trained(Lesson(entries, self.structures), cache, report)
        return made, (*self.found.notes, *notes, *self.trainer.cautions(self.structures), *prepared)


@click.command()
@click.argument("real", nargs=-1, required=True, type=FILE)
@structure_option
@training_options
@skip_option
@cache_option
@output_option("Folder to make, for `maisi evaluate fidelity --segmenter FOLDER`.")
def segmenter(
    real: Sequence[Path],
    structure: Sequence[str],
    skip_unreadable: bool,
    cache: Path | None,
    output: Path,
    **training: Any,
) -> None:
    """Train a segmenter on REAL cases with labels (of prepared folders and case lists, those for training).

    \b
    maisi evaluate segmenter prepared/ --structure mandible,brainstem --steps 2000 -o segmenter/
    maisi evaluate segmenter prepared/ --structure mandible --trainer nnunet --epochs 250 -o segmenter/
    """
    require_new(output)
    from maisi.evaluation.volumes import find_entries, readable

    if training["trainer"] == "auto3dseg":
        raise MaisiError("A model of Auto3DSeg knows its own paths, so it is trained for a study or fidelity alone.")
    trainer = trainer_from(**training)
    found = readable(find_entries(real, "train"), skip_unreadable)
    order = Training(found, structures_in(found.entries, structure), trainer)
    from maisi.evaluation.cache import cache_for
    from maisi.io.files import new_folder

    with cache_for(output, cache) as kept, progress() as report:
        made, notes = order.trained(kept, partial(report, "segmenter"))
        with new_folder(output) as part:
            made.copy_to(part)
    for note in notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(str(output))
