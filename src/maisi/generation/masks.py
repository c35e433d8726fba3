"""Label maps as input of generation: what they hold, and stripped of tumours for guidance. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Container
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import BODY, TUMORS
from maisi.data.label_maps import checked_mask, ids_in
from maisi.data.mask_import import read_our_labels
from maisi.data.phantom import DESCRIPTION
from maisi.data.tumor_masks import with_hosts
from maisi.io.nifti import read_description
from maisi.volume import Volume

Labels = NDArray[np.uint8]


def without_tumors(labels: Labels, spacing_mm: tuple[float, float, float]) -> Labels:
    """Replace each tumour voxel by the organ it grows in: of the possible hosts the one nearest to it, in mm.

    A tumour none of whose hosts is in the map becomes body. (X, Y, Z) in and out.
    """
    result = labels
    for tumor, hosts in TUMORS.items():
        inside = labels == tumor
        if inside.any():
            result = with_hosts(result, inside, hosts, spacing_mm, BODY)
    return result


def only(labels: Labels, ids: Collection[int], spacing_mm: tuple[float, float, float]) -> Labels:
    """Keep some ids and make the others background; other tumours count as the organ that they grow in. (X, Y, Z)."""
    present = ids_in(labels)
    lost = [tumor for tumor in TUMORS if tumor in present and tumor not in ids]
    if lost:
        labels = np.where(np.isin(labels, lost), without_tumors(labels, spacing_mm), labels)
    return np.where(np.isin(labels, list(ids)), labels, np.uint8(0))


def is_phantom(mask: Volume | Path | None) -> bool:
    """Whether a label map is a file that says it is a phantom's."""
    return isinstance(mask, Path) and read_description(mask) == DESCRIPTION


def read_mask(mask: Volume | Path, custom: Container[int] = ()) -> Volume:
    """Read and check a label map that is to be followed; one in memory is taken at its word.

    Raises:
        MaisiError: as `checked_mask`, or a file whose ids mean something in another vocabulary only.
    """
    if isinstance(mask, Volume):
        return checked_mask(mask, custom)
    return checked_mask(read_our_labels(mask, custom), custom, str(mask))
