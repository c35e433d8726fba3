"""Measure a model's tumours: `python recipes/tiny/tumors.py --model tiny --data PREPARED_FOLDER -o OUT [--count 50]`.

On cases kept out of training, tumours of random size are painted into the real CT, and CTs are generated from the
cases' label maps with tumours grown in them. Of each: the diameter asked for and that in the label map, whether the
tumour lies within its host, whether its contrast to the host is that of its kind, and for inpainting whether a voxel
outside changed. In lungs the diameter is also read off the image: the piece around the tumour's centre that is denser
than half-way to its host.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from maisi.anatomy import ANY_BONE, LUNGS
from maisi.data.prepared import PreparedCase, PreparedFolder
from maisi.data.preprocess import crop_or_pad, resample
from maisi.data.tumor_masks import equivalent_diameter_mm
from maisi.data.tumor_texture import Contrast, contrasts, unlikeness
from maisi.errors import MaisiError
from maisi.generation.inpaint import MARGIN_MM, inpaint
from maisi.generation.output import Item
from maisi.generation.pipeline import Model, load
from maisi.io.files import write_json
from maisi.tumors import KINDS
from maisi.volume import Volume

Pair = tuple[Volume, Volume]
KINDS_WITH_HOSTS = {"lung": (LUNGS, 500.0), "bone": (ANY_BONE, 200.0)}
"""Kinds that rule-based labels have hosts for, with the least volume in ml."""


def main() -> None:
    """Read the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--size", type=int, default=96, help="voxels along each axis of generated volumes")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = load(arguments.model)
    folder = PreparedFolder(arguments.data)
    cases = [case for case in folder.cases("validation") if case.is_ct and case.labels]
    result = {
        "inpainted": rows_of(
            folder, cases, arguments.count, lambda pair, wish, seed: inpainted(model, pair, wish, seed)
        ),
        "generated": rows_of(
            folder, cases, arguments.count, lambda pair, wish, seed: generated(model, pair, wish, seed, arguments.size)
        ),
    }
    summary = {name: summarised(rows) for name, rows in result.items()}
    write_json(arguments.out / "tumors.json", {"summary": summary, "items": result})
    for name, numbers in summary.items():
        print(name, numbers)


def rows_of(
    folder: PreparedFolder, cases: list[PreparedCase], count: int, make: Callable[[Pair, str, int], Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Make `count` items, kinds and cases in turn."""
    rows: list[Mapping[str, Any]] = []
    tries = 0
    while len(rows) < count and tries < 6 * count:
        rng = np.random.default_rng([7, tries])
        kind = sorted(KINDS_WITH_HOSTS)[tries % 2]
        suited = [case for case in cases if has_host(folder, case, kind)]
        case = suited[int(rng.integers(len(suited)))]
        diameter = float(rng.uniform(12, 30))
        pair = (volume(folder.image(case), case), volume(folder.labels(case), case))
        tries += 1
        try:
            row = make(pair, f"{kind}:{diameter:.1f}mm", tries)
        except MaisiError:  # no room for that size there
            continue
        rows.append({"kind": kind, "asked_mm": round(diameter, 1), **row})
        print(len(rows), rows[-1], flush=True)
    return rows


def volume(array: Any, case: PreparedCase) -> Volume:
    """An array of a prepared case in its place."""
    return Volume(np.array(array), np.array(case.affine))


def has_host(folder: PreparedFolder, case: PreparedCase, kind: str) -> bool:
    """Whether a case's labels have enough of the kind's hosts."""
    ids, least_ml = KINDS_WITH_HOSTS[kind]
    return bool(np.isin(folder.labels(case), ids).sum() * np.prod(case.spacing_mm) / 1000 > least_ml)


def inpainted(model: Model, pair: Pair, wish: str, seed: int) -> Mapping[str, Any]:
    """Paint one tumour into a real CT and measure it."""
    item = inpaint(*pair, tumor=wish, model=model, seed=seed)
    assert item.labels is not None
    tumor = item.labels.array != pair[1].array
    far = ndimage.distance_transform_edt(~tumor, sampling=pair[0].spacing_mm)
    outside = far > max(MARGIN_MM, 2 * max(pair[0].spacing_mm))
    same = bool(np.array_equal(item.image.array[outside], pair[0].array[outside]))
    return measured(item, pair[1]) | {"outside_unchanged": same, "attempts": item.details["attempts"]}


def generated(model: Model, pair: Pair, wish: str, seed: int, size: int) -> Mapping[str, Any]:
    """Generate a CT from a real label map with a tumour grown in it, and measure that."""
    spacing = max(3.0, *pair[1].spacing_mm)
    mask = crop_or_pad(resample(pair[1], (spacing,) * 3, order=0), (size,) * 3)
    return measured(model.generate(mask=mask, tumor=wish, seed=seed), mask)


def measured(item: Item, before: Volume) -> dict[str, Any]:
    """Size, place and contrast of an item's one tumour."""
    labels = item.labels
    assert labels is not None
    (placed,) = item.details["tumors"]
    kind = KINDS[placed["kind"]]
    new = (labels.array == kind.id) & (before.array != kind.id)
    found = next(iter(contrasts(item.image.array, labels.array, kind.id, labels.spacing_mm, new)), None)
    row: dict[str, Any] = {
        "diameter_mm": placed["diameter_mm"],
        "within_host": bool(np.isin(before.array[new], kind.hosts).all()),
        "contrast_hu": None if found is None else round(found.hu, 1),
        "contrast_as_usual": found is not None and unlikeness(found, kind) == 0,
    }
    if placed["kind"] == "lung" and found is not None:
        row["seen_mm"] = round(seen_diameter(item.image, new, found), 1)
    return row


def seen_diameter(image: Volume, tumor: Any, found: Contrast) -> float:
    """Equivalent diameter of what looks like the tumour, within 8 mm of it."""
    near = ndimage.distance_transform_edt(~tumor, sampling=image.spacing_mm) < 8
    dense = (image.array > (found.tumor_hu + found.host_hu) / 2) & near
    parts, _ = ndimage.label(dense)
    counts = np.bincount(parts[tumor], minlength=2)
    counts[0] = 0
    return equivalent_diameter_mm(int((parts == counts.argmax()).sum()), image.spacing_mm) if counts.any() else 0.0


def summarised(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares over rows."""
    if not rows:
        return {"items": 0}
    size = [abs(row["diameter_mm"] / row["asked_mm"] - 1) <= 0.1 for row in rows]
    seen = [abs(row["seen_mm"] / row["asked_mm"] - 1) <= 0.1 for row in rows if "seen_mm" in row]
    return {
        "items": len(rows),
        "diameter_within_10_percent": float(np.mean(size)),
        "within_host": float(np.mean([row["within_host"] for row in rows])),
        "contrast_as_usual": float(np.mean([row["contrast_as_usual"] for row in rows])),
        "contrast_as_usual_by_kind": {
            kind: float(np.mean([row["contrast_as_usual"] for row in rows if row["kind"] == kind]))
            for kind in sorted({row["kind"] for row in rows})
        },
        "seen_within_10_percent": float(np.mean(seen)) if seen else None,
        "seen_over_asked": float(np.median([r["seen_mm"] / r["asked_mm"] for r in rows if "seen_mm" in r] or [0])),
        "outside_unchanged": float(np.mean([row.get("outside_unchanged", True) for row in rows])),
    }


if __name__ == "__main__":
    main()
