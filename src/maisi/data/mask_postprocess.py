"""Clean a generated label map: stray parts go, holes close, tumours stay with their hosts. Knows no network.

The rules are applied until nothing changes. That ends: a rule either takes away a part (of a structure, or of the body
as a whole), which no rule brings back, or fills a hole.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure

from maisi.anatomy import BACKGROUND, BODY, TUMORS, UNNAMED_BONE, label_id
from maisi.data.preprocess import resample
from maisi.volume import Volume

Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Box = tuple[slice, ...]

SMALLEST_SHARE = 0.05
"""A part smaller than this share of its structure's largest goes."""

SEVERAL_PARTS = frozenset(
    {
        *TUMORS,
        UNNAMED_BONE,
        *(
            label_id(name)
            for name in (
                *("aorta", "inferior vena cava", "portal vein and splenic vein", "hepatic vessel", "pulmonary vein"),
                *("left iliac artery", "right iliac artery", "left iliac vena", "right iliac vena"),
                *("left common carotid artery", "right common carotid artery", "superior vena cava"),
                *("left subclavian artery", "right subclavian artery", "brachiocephalic trunk"),
                *("left brachiocephalic vein", "right brachiocephalic vein", "airway", "esophagus"),
                *("colon", "small bowel", "costal cartilages", "left autochthon", "right autochthon"),
                *("skull", "thyroid gland", "spinal cord", "target volume"),
            )
        ),
    }
)
"""Structures that may be in several parts inside a field of view; of all others only the largest part is kept."""

_NEIGHBOURS = np.ones((3, 3, 3), bool)


def clean(labels: Labels) -> Labels:
    """Return a label map (X, Y, Z) without what no anatomy has; the result is its own `clean`.

    Of each structure the largest part is kept, of those in `SEVERAL_PARTS` all parts of 5 % of the largest and more; a
    tumour's parts are kept where they touch a host. What goes becomes body (background in a map without body). Holes
    in a structure that are body or background become the structure, and background enclosed in an axial slice of the
    body becomes body, but for gaps (between arm and trunk, say) of 5 % of the slice's body and more. Parts
    of everything labelled that are smaller than 5 % of the largest become background. No id is made that was not there.
    """
    rest = BODY if (labels == BODY).any() else BACKGROUND
    while True:
        before, labels = labels, labels.copy()
        _drop_parts(labels, rest)
        for id, box in _boxes(labels):
            _fill_holes(labels, id, box)
        _drop_strays(labels)
        if rest == BODY:
            _close_body(labels)
        if np.array_equal(before, labels):
            return labels


def resample_smooth(labels: Volume, spacing_mm: tuple[float, float, float]) -> Volume:
    """Bring a label map to another spacing: each id's share is interpolated and the largest wins, so no steps show."""
    best: NDArray[np.float32] | None = None
    result = Volume(labels.array, labels.affine)
    for id in np.unique(labels.array):
        share = resample(labels.with_array((labels.array == id).astype(np.float32)), spacing_mm, order=1)
        if best is None:
            best, result = share.array, share.with_array(np.full(share.shape, id, np.uint8))
            continue
        result.array[share.array > best] = id
        np.maximum(best, share.array, out=best)
    return result


def _boxes(labels: Labels) -> list[tuple[int, Box]]:
    """Ids of structures (neither background nor body) with their bounding boxes."""
    found = enumerate(ndimage.find_objects(labels), start=1)
    return [(id, box) for id, box in found if box is not None and id != BODY]


def _drop_parts(labels: Labels, rest: int) -> None:
    parts, count = measure.label(  # type: ignore[no-untyped-call]
        labels, background=BACKGROUND, return_num=True, connectivity=3
    )
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    ids = np.zeros(count + 1, np.uint8)
    ids[parts.ravel()] = labels.ravel()
    largest = np.zeros(256, sizes.dtype)
    np.maximum.at(largest, ids, sizes)
    kept = sizes >= SMALLEST_SHARE * largest[ids]
    single = ~np.isin(ids, [*SEVERAL_PARTS, BACKGROUND, BODY])
    kept[single] = False
    by_size = np.lexsort((np.arange(count + 1), -sizes, ids))
    kept[by_size[np.unique(ids[by_size], return_index=True)[1]]] = True
    for tumor, hosts in TUMORS.items():
        if largest[tumor]:
            near = ndimage.binary_dilation(np.isin(labels, hosts), _NEIGHBOURS)
            kept[(ids == tumor) & ~np.isin(np.arange(count + 1), parts[near])] = False
    kept[(ids == BACKGROUND) | (ids == BODY)] = True
    if not kept.all():
        labels[~kept[parts]] = rest


def _fill_holes(labels: Labels, id: int, box: Box) -> None:
    inside = labels[box] == id
    holes = ndimage.binary_fill_holes(inside) & ~inside
    part = labels[box]
    part[holes & ((part == BACKGROUND) | (part == BODY))] = id


def _drop_strays(labels: Labels) -> None:
    parts, count = cast("tuple[NDArray[np.int32], int]", ndimage.label(labels, _NEIGHBOURS))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    large = sizes >= SMALLEST_SHARE * sizes[1:].max(initial=0)
    large[0] = True
    if not large.all():
        labels[~large[parts]] = BACKGROUND


def _close_body(labels: Labels) -> None:
    for plane in np.moveaxis(labels, 2, 0):
        body = plane > 0
        holes, count = cast("tuple[NDArray[np.int32], int]", ndimage.label(ndimage.binary_fill_holes(body) & ~body))
        if count:
            small = np.bincount(holes.ravel(), minlength=count + 1) < SMALLEST_SHARE * np.count_nonzero(body)
            small[0] = False
            plane[small[holes]] = BODY
