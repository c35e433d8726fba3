"""CT with simulated tumours as examples to learn from: where they are put in scans whose organs have no labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import BODY, TUMORS
from maisi.data.tumor_masks import grow_tumors
from maisi.data.tumor_texture import paint_tumors
from maisi.errors import MaisiError
from maisi.tumors import KINDS, TumorWish
from maisi.volume import Volume

SOFT_HU = (-20.0, 150.0)
"""Tissue without a name that may host a tumour: neither fat nor bone."""

SOFT_KINDS = ("liver", "pancreas", "kidney")
"""Kinds that look in muscle as they do in their own hosts."""


def with_tumors(
    image: Volume, labels: Volume, most: int, anywhere: bool, rng: np.random.Generator
) -> tuple[Volume, NDArray[np.uint8]]:
    """Put one to `most` tumours of random kinds and sizes into a CT (HU) and its labels, on one RAS+ grid.

    Kinds without a host in the map grow in soft tissue if they may grow `anywhere`; what finds no room is left out.
    """
    soft = _soft(image, labels) if anywhere else None
    changed = labels
    for name in rng.choice(sorted(KINDS), int(rng.integers(1, most + 1))):
        kind = KINDS[str(name)]
        own = bool(np.isin(labels.array, kind.hosts).any())
        if not own and (soft is None or kind.name not in SOFT_KINDS):
            continue
        wish = TumorWish(kind=kind.name, diameter_mm=_diameter(kind.diameter_mm, labels, rng))
        try:
            changed, _ = grow_tumors(changed, [wish], rng, None if own else soft)
        except MaisiError:
            continue
    new = changed.array != labels.array
    if not new.any():
        return image, labels.array
    # tumours that are there already keep their look: they are not painted again
    old = np.isin(labels.array, list(TUMORS))
    fresh = changed.with_array(np.where(old, np.uint8(0), changed.array))
    return paint_tumors(image, fresh, rng, host=soft), changed.array


def _diameter(usual: tuple[float, float], labels: Volume, rng: np.random.Generator) -> tuple[float, float]:
    """A diameter evenly drawn in its logarithm: at least 2.5 voxels, at most what is usual."""
    least = max(usual[0], 2.5 * max(labels.spacing_mm))
    diameter = float(np.exp(rng.uniform(np.log(least), np.log(max(usual[1], least)))))
    return (diameter, diameter)


def _soft(image: Volume, labels: Volume) -> NDArray[np.bool_]:
    """Unnamed soft tissue of the body, without its outermost and thinnest parts."""
    low, high = SOFT_HU
    smooth = ndimage.uniform_filter(image.array.astype(np.float32), 3)
    return ndimage.binary_opening((labels.array == BODY) & (smooth > low) & (smooth < high))


def inpainting_region(labels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw what a network is to paint: the tumours with a margin, mostly, or an ellipsoid of anything in the body.

    Args:
        labels: (X, Y, Z).
        rng: always asked for the same numbers, whatever the labels.
    """
    around_tumors, margin, place = rng.random() < 0.7, rng.uniform(1, 4), rng.random()
    radii = rng.uniform(4, 12, 3)
    inside = np.isin(labels, list(TUMORS))
    if around_tumors and inside.any():
        return np.asarray(ndimage.distance_transform_edt(~inside) <= margin)
    candidates = np.flatnonzero(labels)
    chosen = int(candidates[int(place * len(candidates))]) if len(candidates) else int(place * labels.size)
    centre = np.unravel_index(chosen, labels.shape)
    axes = np.ogrid[tuple(slice(0, n) for n in labels.shape)]
    level = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True))
    return np.asarray(level <= 1)
