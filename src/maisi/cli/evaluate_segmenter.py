"""`maisi evaluate segmenter`: train the segmenter that other evaluations judge with; and the options they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maisi.cli.options import FILE, cache_option, output_option, progress, require_new, running_options, skip_option

if TYPE_CHECKING:
    from maisi.evaluation.cache import Cache
    from maisi.evaluation.segmentation_cases import Structures
    from maisi.evaluation.trained_segmenter import SegmenterConfig, TrainedSegmenter
    from maisi.evaluation.volumes import Entry, Found


def structure_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--structure`: what a segmenter is to find."""
    help = "To find: a label, a pair as one ('parotid gland'), lungs, skeleton. May be repeated, or with commas."
    return click.option("--structure", "structure", multiple=True, metavar="NAME", help=help)(command)


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say how a segmenter is trained."""
    command = running_options(command)
    command = click.option("--seed", type=int, default=0, show_default=True, help="Of weights and patches.")(command)
    command = click.option("--filters", type=int, default=8, show_default=True, help="Channels, by 8.")(command)
    command = click.option("--batch", type=int, default=2, show_default=True, help="Patches in a step.")(command)
    help = "Voxels of a patch, by 8.  [default: 64,64,64]"
    command = click.option("--patch", metavar="X,Y,Z", help=help)(command)
    help = "Distance of voxels in mm that images are resampled to.  [default: 3,3,3]"
    command = click.option("--spacing", metavar="X,Y,Z", help=help)(command)
    return click.option("--steps", type=int, default=1000, show_default=True, help="Of each training.")(command)


def segmenter_config(
    steps: int,
    spacing: str | None,
    patch: str | None,
    batch: int,
    filters: int,
    seed: int,
    device: str,
    precision: str,
) -> SegmenterConfig:
    """Check what `training_options` gave.

    Raises:
        MaisiError: a value cannot be used, or MONAI is not there.
    """
    from maisi.config import parse_config
    from maisi.device import resolve_device
    from maisi.evaluation.trained_segmenter import SegmenterConfig, require_monai

    values: dict[str, Any] = {"steps": steps, "batch": batch, "filters": filters, "seed": seed}
    values |= {"device": device, "precision": precision}
    if spacing is not None:
        values["spacing_mm"] = spacing.replace("x", ",").split(",")
    if patch is not None:
        values["patch"] = {"size": patch.replace("x", ",").split(",")}
    config = parse_config(SegmenterConfig, values, "The segmenter")
    require_monai()
    resolve_device(device)
    return config


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
        config: how.
    """

    found: Found
    structures: Structures
    config: SegmenterConfig

    def trained(
        self, cache: Cache, report: Callable[[str, int, int], None]
    ) -> tuple[TrainedSegmenter, tuple[str, ...]]:
        """Train it in the cache, and return it with notes.

        Raises:
            MaisiError: no case can be used.
        """
        from maisi.evaluation.segmentation_cases import complete, load_case, resampling_note
        from maisi.evaluation.trained_segmenter import trained

        entries, notes = complete(self.found.entries, self.structures, cache, "training")
        cases = [load_case(entry, self.structures, self.config.spacing_mm, cache) for entry in entries]
        made = trained(cache, self.config, self.structures, cases, [entry.hash for entry in entries], report=report)
        return made, (*self.found.notes, *notes, *resampling_note(cases))


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
    """
    require_new(output)
    from maisi.evaluation.volumes import find_entries, readable

    found = readable(find_entries(real, "train"), skip_unreadable)
    order = Training(found, structures_in(found.entries, structure), segmenter_config(**training))
    from maisi.evaluation.cache import cache_for
    from maisi.io.files import new_folder

    with cache_for(output, cache) as kept, progress() as report:
        made, notes = order.trained(kept, partial(report, "segmenter"))
        with new_folder(output) as part:
            made.copy_to(part)
    for note in notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(str(output))
