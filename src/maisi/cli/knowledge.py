"""What the package knows: `labels`, `models`."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click


@click.command()
@click.argument("query", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with tumours, their hosts and the regions' markers.")
@click.option("--slicer", "as_colors", is_flag=True, help="As a colour table for 3D Slicer (save it as .ctbl).")
def labels(query: Sequence[str], as_json: bool, as_colors: bool) -> None:
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
    if as_colors:
        from maisi.io.label_names import slicer_color_table

        click.echo(slicer_color_table({row.id: row.name for row in rows}), nl=False)
        return
    for row in rows:
        click.echo(f"{row.id:3d}  {row.name}")


@click.command()
def models() -> None:
    """List the models that the package carries."""
    from maisi.weights.registry import carried_models, find_model

    for name in carried_models():
        model = find_model(name)
        config = model.config
        megabytes = sum(model.path(part).stat().st_size for part in config.files) / 1e6
        regions = sorted({region for view in config.field_of_view for region in view.regions})
        masks = "follows masks" if config.controlnet else "no masks"
        masks += " and makes them" if config.masks else ""
        click.echo(f"{name}: {', '.join(regions) or 'regions unknown'}; {masks}; {config.process['kind']}, ", nl=False)
        steps = f"{config.default_steps} steps"
        others = {"with a mask": config.usual_steps(masked=True), "in inpainting": config.usual_inpaint_steps()}
        if set(others.values()) != {config.default_steps}:
            steps += f" ({', '.join(f'{number} {when}' for when, number in others.items())})"
        click.echo(f"{steps}; {megabytes:.0f} MB; {model.folder / config.card}")
