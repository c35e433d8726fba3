"""Do generated images show what their labels say? Dice of a segmenter with the labels, beside its Dice on real cases.

The Dice on generated images alone says little: a segmenter errs on real ones too. What counts is the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from maisi.data.agreement import dice_by_group, joint_counts
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.result import Result
from maisi.evaluation.segmenters import Segmenter
from maisi.evaluation.volumes import Entry
from maisi.volume import Volume

Dice = Mapping[str, float | None]
Progress = Callable[[str, int, int], None]

SAME_RULES = 0.9995
"""A mean Dice of real cases above this says that their labels were made by the same segmenter."""


def agreement(ct: Volume, labels: Volume, segmenter: Segmenter) -> dict[str, float | None]:
    """Return the Dice of what a segmenter finds with what the labels say, by structure.

    None stands for a structure that the labels do not hold: nobody asked for it.

    Raises:
        MaisiError: image and labels lie on different grids, or the segmenter fails.
    """
    if not ct.same_grid(labels):
        raise MaisiError("Image and labels lie on different grids; resample one onto the other.")
    asked = {int(id) for id in np.unique(labels.array)}
    groups = {name: ids for name, ids in segmenter.structures.items() if ids & asked}
    found = dice_by_group(joint_counts(labels.array, segmenter(ct).array), groups)
    return {name: found.get(name) for name in segmenter.structures}


def measure(
    images: Sequence[Entry], kind: str, segmenter: Segmenter, cache: Cache, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Return a row for each image that has labels: its name, its set `kind`, and the Dice of each structure.

    Raises:
        MaisiError: none has labels, or as `agreement`.
    """
    labelled = [image for image in images if image.has_labels]
    if not labelled:
        raise MaisiError(f"None of the {len(images)} {kind} images has labels; give images made from label maps.")
    rows = []
    for done, image in enumerate(labelled):
        dice = cache.json(["fidelity", image.hash, segmenter.name], partial(_dice, image, segmenter))
        rows.append({"case": image.name, "set": kind, **dice})
        if progress:
            progress(f"segment {kind}", done + 1, len(labelled))
    return rows


def _dice(image: Entry, segmenter: Segmenter) -> dict[str, float | None]:
    ct, labels = image.pair()
    assert labels is not None
    try:
        # pairs may lie apart by rounding of their headers
        return agreement(ct, ct.with_array(labels.array), segmenter)
    except MaisiError as error:
        raise MaisiError(f"{image.name}: {error}") from None


def mean_dice(rows: Sequence[Mapping[str, Any]], structure: str) -> float | None:
    """The mean over the rows that have the structure; None where none has."""
    values = [row[structure] for row in rows if row.get(structure) is not None]
    return float(np.mean(values)) if values else None


def summed_up(
    generated: Sequence[Mapping[str, Any]],
    real: Sequence[Mapping[str, Any]],
    structures: Sequence[str],
    settings: Mapping[str, Any],
) -> Result:
    """Compare generated and real cases by structure, with the ratio of both; what no image was to show is left out.

    Raises:
        MaisiError: no generated image was to show any of the structures.
    """
    summary: dict[str, float | None] = {}
    notes = [
        "Dice of what the segmenter finds in the image with the labels; a structure not in the labels is left out."
    ]
    shown = [name for name in structures if mean_dice(generated, name) is not None]
    if not shown:
        raise MaisiError(
            f"No label map of the generated images holds what the segmenter finds ({', '.join(structures)}); "
            "give a segmenter of structures that are labelled."
        )
    for name in shown:
        summary[f"{name}, generated"] = mean_dice(generated, name)
        if real:
            summary[f"{name}, real"] = mean_dice(real, name)
            summary[f"{name}, ratio"] = _ratio(summary[f"{name}, generated"], summary[f"{name}, real"])
    trivial = [name for name in shown if (summary.get(f"{name}, real") or 0) > SAME_RULES]
    if trivial:
        notes.append(
            f"The real labels of {', '.join(trivial)} seem to be this segmenter's own, so their Dice is trivial."
        )
    if not real:
        notes.append("No real cases are given, so it is open how well the segmenter does on them.")
    columns = ("case", "set", *shown)
    return Result("fidelity", summary, [*generated, *real], settings, columns=columns, notes=tuple(notes))


def _ratio(generated: float | None, real: float | None) -> float | None:
    return generated / real if generated is not None and real else None


def draw(figure: Any, result: Result) -> None:
    """Draw the mean Dice of each structure, generated beside real, with a dot for each case."""
    shown = list(result.columns[2:])
    figure.set_size_inches(8, max(3.0, 1.2 + 0.45 * len(shown)))
    axis = figure.add_subplot()
    kinds = list(dict.fromkeys(row["set"] for row in result.items))
    for offset, (kind, color) in enumerate(zip(kinds, ("tab:orange", "0.45"), strict=False)):
        rows = [row for row in result.items if row["set"] == kind]
        places = np.arange(len(shown)) + 0.36 * (offset - (len(kinds) - 1) / 2)
        means = [mean_dice(rows, name) or 0.0 for name in shown]
        axis.barh(places, means, height=0.34, color=color, alpha=0.55, label=f"{kind} ({len(rows)})")
        for place, name in zip(places, shown, strict=True):
            values = [row[name] for row in rows if row.get(name) is not None]
            axis.plot(values, [place] * len(values), ".", color=color, markersize=4)
    axis.set_yticks(np.arange(len(shown)), shown)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="Dice", title=f"Labels found again by {result.settings['segmenter']}")
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(kinds))
