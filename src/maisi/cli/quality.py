"""`maisi quality`: judge an image by its label map, and learn from cases what is normal."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from maisi.cli.options import FILE, output_option, progress, require_new
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.data.quality import QualityRanges, QualityReport

NOT_PASSED = 1
"""Exit code of a check that was done and did not pass."""


class _CheckUnlessNamed(click.Group):
    """A group whose command `check` needs no name: `maisi quality IMAGE LABELS`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["check", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_CheckUnlessNamed, subcommand_metavar="IMAGE LABELS | learn SOURCE")
def quality() -> None:
    """Judge a CT by its label map, or learn from cases what is normal.

    \b
    maisi quality image.nii.gz labels.nii.gz [--ranges ranges.json] [--json]
    maisi quality learn cases.json -o ranges.json
    """


@quality.command(short_help="Judge IMAGE by LABELS; `check` may be left out.")
@click.argument("image", type=FILE)
@click.argument("labels", type=FILE)
@click.option("--ranges", type=FILE, help="What passes, made by `maisi quality learn`.  [default: carried ranges]")
@click.option("--model", help="In place of --ranges: a model, by whose ranges its items are judged.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def check(
    context: click.Context, image: Path, labels: Path, ranges: Path | None, model: str | None, as_json: bool
) -> None:
    """Judge IMAGE (CT in HU) by LABELS; exit code 0 if all passes, 1 if not, 2 if they cannot be compared.

    An item of `maisi generate` is judged by its model's ranges, all else by those that the package carries.
    """
    from maisi.anatomy import CUSTOM_IDS
    from maisi.data.mask_import import read_our_labels
    from maisi.data.quality import carried_ranges, read_ranges
    from maisi.data.quality import check as check_volumes
    from maisi.io.nifti import read_volume

    if model is not None and ranges is not None:
        raise MaisiError("Both --ranges and --model say what passes; leave one of them out.")
    if model is None and ranges is None:
        model = _model_of(image)
    if model is None:
        normal = carried_ranges() if ranges is None else read_ranges(ranges)
    else:
        from maisi.generation.retry import ranges_of
        from maisi.weights.registry import find_model

        normal = ranges_of(find_model(model))
    report = check_volumes(read_volume(image), read_our_labels(labels, CUSTOM_IDS), normal)
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else f"{_table(report)}\nRanges: {normal.source}")
    context.exit(0 if report.passed else NOT_PASSED)


def _model_of(image: Path) -> str | None:
    """The model of an item that `maisi generate` made, if this is its image and the model is there."""
    from maisi.generation.output import IMAGE, RECORD
    from maisi.weights.registry import find_model

    try:
        record = json.loads((image.parent / RECORD).read_text(encoding="utf-8")) if image.name == IMAGE else {}
        model = str(record["request"]["model"])
        find_model(model)
    except (OSError, ValueError, KeyError, TypeError, MaisiError):
        return None
    return model


@quality.command()
@click.argument("source", type=FILE)
@click.option("--split", type=click.Choice(["train", "validation", "all"]), default="all", show_default=True)
@click.option("--least", type=click.IntRange(1), default=1, show_default=True, help="Cases that a range needs.")
@click.option("--origin", help="What the ranges say of where they are from.  [default: SOURCE]")
@output_option("Ranges to make (.json).")
def learn(
    source: Path, split: Literal["train", "validation", "all"], least: int, origin: str | None, output: Path
) -> None:
    """Learn from SOURCE, a case list (JSON) or a prepared folder, what is normal; for `maisi quality --ranges`."""
    from maisi.data.quality_learning import learn as learn_ranges
    from maisi.data.quality_learning import pairs_of
    from maisi.io.files import write_json

    require_new(output, ".json")
    with progress() as report:
        pairs = pairs_of(source, partial(report, "learn", "cases"), None if split == "all" else split)
        ranges = learn_ranges(pairs, origin or str(source), least)
    write_json(output, ranges.model_dump(mode="json"))
    click.echo(_summary(ranges))
    click.echo(str(output))


def _table(report: QualityReport) -> str:
    width = max(len(finding.name) for finding in report.findings)
    rows = [
        f"{'ok  ' if finding.passed else 'FAIL'}  {finding.name:{width}}  {finding.value:9.4g}  {finding.range}"
        for finding in report.findings
    ]
    verdict = "passed" if report.passed else f"{len(report.failed)} did not pass; score {report.score:.2f}, 0 is best"
    return "\n".join([*rows, f"{len(report.findings)} findings: {verdict}"])


def _summary(ranges: QualityRanges) -> str:
    """How many cases each range is from."""
    rows = []
    for name, entry in (ranges.organs | ranges.tumors | ranges.structures).items():
        origin = f"{entry.cases} case(s)" if entry.cases else "too few cases, carried range"
        rows.append(f"{name:22}  {entry.low:6.0f} to {entry.high:5.0f} HU  {origin}")
    return "\n".join(rows)
