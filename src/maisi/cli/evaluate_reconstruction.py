"""`maisi evaluate reconstruction`: how well an autoencoder gives CTs back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import click

from maisi.cli.options import (
    FILE,
    autoencoder_file,
    autoencoder_options,
    cache_option,
    progress,
    refuse_given,
    require_new,
    result_option,
    running_options,
    say_result,
    skip_option,
)
from maisi.errors import MaisiError


@click.command()
@click.argument("images", type=FILE, nargs=-1, required=True)
@click.option("--labels", type=FILE, help="Folder of label maps named as the images are; adds measures by structure.")
@click.option("--split", default="validation", show_default=True, help="Of prepared folders: train, validation, all.")
@autoencoder_options
@click.option(
    "--python",
    "hook",
    metavar="FILE.py:FUNCTION",
    help="Another's autoencoder: a function from a tensor (1 1 X Y Z in [0, 1]) to its reconstruction; it is run.",
)
@click.option("--spacing", metavar="X,Y,Z", help="Resample to this spacing in mm first.  [default: as stored]")
@click.option(
    "--lpips-features",
    "features",
    help="Of the perceptual distance: efficientnet-lite0, gradients, none to leave it out, or lpips or radimagenet "
    "with their weights.  [default: those of --lpips-weights, else efficientnet-lite0]",
)
@click.option("--lpips-weights", "weights", type=FILE, help="Published LPIPS, converted by `maisi weights convert`.")
@click.option("--mirror", is_flag=True, help="Mirror images, too: mirror_hu says how much they come out otherwise.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap intervals.")
@skip_option
@cache_option
@running_options
@result_option
def reconstruction(
    images: tuple[Path, ...],
    labels: Path | None,
    split: str,
    model: str | None,
    autoencoder: Path | None,
    hook: str | None,
    spacing: str | None,
    features: str | None,
    weights: Path | None,
    mirror: bool,
    seed: int,
    cache: Path | None,
    skip_unreadable: bool,
    output: Path,
    **where: str,
) -> None:
    """Encode and decode IMAGES (CT files, folders, prepared folders) and compare.

    \b
    maisi evaluate reconstruction PREPARED --model tiny -o out/
    maisi evaluate reconstruction images/ --labels labels/ --autoencoder vae.safetensors -o out/
    maisi evaluate reconstruction images/ --python theirs.py:reconstruct -o out/
    """
    from maisi.evaluation.cache import cache_for
    from maisi.evaluation.feature_weights import IMAGE_NETWORKS, choose_features
    from maisi.evaluation.result import write_result
    from maisi.evaluation.volumes import find_entries, readable
    from maisi.request import Request

    require_new(output)
    spacing_mm = Request.parse(spacing=spacing, seed=seed).spacing
    if hook and (model or autoencoder):
        raise MaisiError("Both --python and an autoencoder of this package are given; leave one of them out.")
    if hook:
        refuse_given(where, "is for an autoencoder of this package, and --python says itself where it runs")
    path = None if hook else autoencoder_file(model, autoencoder)
    name, read = choose_features(features, weights, "efficientnet-lite0", IMAGE_NETWORKS)
    found = readable(find_entries(images, split, labels), skip_unreadable)
    from maisi.config import parse_config
    from maisi.evaluation.hooks import PythonReconstructor
    from maisi.evaluation.reconstruction_study import (
        AutoencoderReconstructor,
        ReconstructionConfig,
        ReconstructionStudy,
        draw,
    )

    values = {"spacing_mm": spacing_mm, "features": name, "feature_weights": read, "mirror": mirror, "seed": seed}
    config = parse_config(ReconstructionConfig, values, "The evaluation")
    reconstructor = PythonReconstructor.find(hook) if hook else AutoencoderReconstructor(cast(Path, path), **where)
    with cache_for(output, cache) as kept, progress() as report:
        study = ReconstructionStudy(reconstructor, reconstructor.identity, config, kept)
        result = study.run(found, skip_unreadable, partial(report, "reconstruct"))
        write_result(output, result, partial(draw, result))
    say_result(result, output)
