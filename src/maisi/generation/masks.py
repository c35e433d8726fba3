"""Label maps as input of generation: read, checked, and stripped of tumours for guidance. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import BODY, KNOWN_IDS, TUMORS
from maisi.errors import MaisiError
from maisi.io.nifti import read_labels
from maisi.volume import Volume

Labels = NDArray[np.uint8]


def checked_mask(mask: Volume | Path | str) -> Volume:
    """Return a label map as uint8, on its own grid, every id known.

    Raises:
        MaisiError: the file cannot be read, the values are no label ids or have no meaning, or all are 0.
    """
    name = "The mask" if isinstance(mask, Volume) else str(mask)
    volume = mask if isinstance(mask, Volume) else read_labels(Path(mask))
    ids = np.unique(volume.array)
    if ids.dtype.kind not in "iub" and not np.array_equal(ids, np.rint(ids)):
        raise MaisiError(f"{name} holds fractions, so it is no label map; give one with whole numbers.")
    unknown = [int(i) for i in ids if int(i) not in KNOWN_IDS]
    if unknown:
        raise MaisiError(f"{name} holds ids without a meaning: {_some(unknown)}; map them to those of `maisi labels`.")
    if not ids.any():
        raise MaisiError(f"{name} is empty (all 0); give a label map with at least the body ({BODY}) in it.")
    return volume.with_array(volume.array.astype(np.uint8))


def ids_of(labels: Labels) -> frozenset[int]:
    """Return the ids that a label map holds."""
    return frozenset(int(i) for i in np.flatnonzero(np.bincount(labels.ravel(), minlength=1)))


def without_tumors(labels: Labels, spacing_mm: tuple[float, float, float]) -> Labels:
    """Replace each tumour voxel by the organ it grows in: of the possible hosts the one nearest to it, in mm.

    A tumour none of whose hosts is in the map becomes body. (X, Y, Z) in and out.
    """
    result = labels.copy()
    for tumor, hosts in TUMORS.items():
        inside = labels == tumor
        if not inside.any():
            continue
        host = np.isin(labels, hosts)
        if not host.any():
            result[inside] = BODY
            continue
        nearest = ndimage.distance_transform_edt(
            ~host, sampling=spacing_mm, return_distances=False, return_indices=True
        )
        result[inside] = labels[tuple(axis[inside] for axis in nearest)]
    return result


def _some(ids: list[int], most: int = 10) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(str(i) for i in ids[:most]) + more
