"""`maisi evaluate fid`: a set of generated CTs against a set of real ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from maisi.cli.options import (
    FILE,
    cache_option,
    progress,
    require_new,
    result_option,
    skip_option,
    slice_features_options,
)


@click.command()
@click.argument("generated", type=FILE)
@click.argument("real", type=FILE)
@click.option("--spacing", metavar="X,Y,Z", help="Resample to this spacing in mm.  [default: as stored]")
@click.option("--size", metavar="X,Y,Z", help="Then crop, or pad with air, to these voxels.  [default: as they are]")
@click.option("--center-slices", type=float, default=0.5, show_default=True, help="Share of each axis that is seen.")
@slice_features_options("efficientnet-lite0")
@click.option(
    "--side",
    type=int,
    help="Pixels of the square that features see.  [default: 224; inception 299; radimagenet slices as they are]",
)
@click.option(
    "--metrics",
    default="fid,mmd,ms-ssim,precision-recall",
    show_default=True,
    help="What to measure, separated by commas.",
)
@click.option("--kernel", default="polynomial", show_default=True, help="Of MMD: polynomial or rbf.")
@click.option("--neighbours", type=int, default=3, show_default=True, help="Of precision and recall.")
@click.option("--pairs", type=int, default=20, show_default=True, help="Pairs of volumes for MS-SSIM, at most.")
@click.option("--ways", type=int, default=5, show_default=True, help="Ways to halve the real set.")
@click.option("--split", default="all", show_default=True, help="Of prepared folders: train, validation, all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of halves and pairs.")
@click.option(
    "--device", default="auto", show_default=True, help="Where features are computed: auto, cpu, cuda or mps."
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that look at volumes.")
@skip_option
@cache_option
@result_option
def fid(
    generated: Path,
    real: Path,
    spacing: str | None,
    size: str | None,
    split: str,
    seed: int,
    workers: int,
    features: str | None,
    feature_weights: Path | None,
    side: int | None,
    device: str,
    cache: Path | None,
    skip_unreadable: bool,
    output: Path,
    **how: str | float,
) -> None:
    """Compare GENERATED with REAL (folders of CTs, of generated items, or prepared): FID and its companions.

    Every distance stands beside that of two halves of REAL. The reference's settings are --spacing 1,1,1
    --size 512,512,512 --center-slices 0.4 with --features radimagenet.
    """
    from maisi.evaluation.cache import cache_for
    from maisi.evaluation.feature_weights import SLICE_NETWORKS, choose_features
    from maisi.evaluation.result import write_result
    from maisi.evaluation.volumes import find_entries, readable
    from maisi.request import Request

    require_new(output)
    grid = Request.parse(spacing=spacing, size=size, seed=seed)
    name, weights = choose_features(features, feature_weights, "efficientnet-lite0", SLICE_NETWORKS)
    made, true = (
        readable(find_entries([path], split), skip_unreadable, headers_only=True) for path in (generated, real)
    )
    from maisi.config import parse_config
    from maisi.device import resolve_device
    from maisi.evaluation.set_comparison import SetConfig, SetStudy

    seen = {"features": name, "feature_weights": weights, "side": side, "centre_share": how.pop("center_slices")}
    metrics = [name.strip() for name in str(how.pop("metrics")).split(",") if name.strip()]
    place = resolve_device(device).type
    values = {
        "fid": {**seen, "device": place, "spacing_mm": grid.spacing, "size": grid.size},
        "metrics": metrics,
        "seed": seed,
        **how,
    }
    config = parse_config(SetConfig, values, "The evaluation")
    with cache_for(output, cache) as kept, progress() as report:
        study = SetStudy(config, kept, workers)
        result, draw = study.run(made, true, skip_unreadable, partial(report, "describe"))
        write_result(output, result, draw)
    click.echo(str(output))
