"""Label maps as input of generation: what they hold, what networks are told of them, and them without tumours.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import BODY, TUMORS, label_id
from maisi.data.label_maps import checked_mask, ids_in
from maisi.data.mask_import import read_our_labels
from maisi.data.phantom import DESCRIPTION
from maisi.data.preprocess import wider_box
from maisi.data.tumor_masks import with_hosts
from maisi.io.nifti import read_description
from maisi.volume import Volume

Labels = NDArray[np.uint8]

_CORD = label_id("spinal cord")
_SPINE = label_id("vertebrae C4")  # released models know no unnamed bone
# A patient has 30 mm and more from the cord to the skin; scans that were cut away about it leave 3 to 12 mm.
_BARE_MM = 15.0
_BONE_MM = 15.0
_NECK_MM = 45.0


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


def bare_cords(labels: Labels, spacing_mm: tuple[float, float, float]) -> NDArray[np.bool_] | None:
    """Where a body was cut away about the spinal cord: the cord of axial slices in which it is 15 mm from air or less.

    Args:
        labels: RAS+ (X, Y, Z). A map without body (200) says nothing of where air is.
        spacing_mm: X, Y, Z.

    Returns:
        (X, Y, Z), or None where there is none.
    """
    cord = labels == _CORD
    if not cord.any() or not (labels == BODY).any():
        return None
    box = wider_box(ndimage.find_objects(cord.view(np.uint8))[0], labels.shape, _BARE_MM, (*spacing_mm[:2], np.inf))
    # slices infinitely far apart: distances within each of them
    far = ndimage.distance_transform_edt(~cord[box], sampling=(*spacing_mm[:2], 1e9))
    bare = np.zeros(labels.shape[2], bool)
    bare[box[2]] = ((labels[box] == 0) & (far <= _BARE_MM)).any((0, 1))
    found = cord & bare
    return found if found.any() else None


def with_body_about_cords(labels: Labels, spacing_mm: tuple[float, float, float]) -> Labels:
    """Give spinal cords that hang in air (see `bare_cords`) a spine and a neck; all that is labelled stays as it is.

    Scans are published with all but a strip about the cord cut away. Networks have not seen any such thing and make
    the cord bone; in a neck they make it a cord, and the image is cut as the map is. RAS+ (X, Y, Z) in and out.
    """
    bare = bare_cords(labels, spacing_mm)
    if bare is None:
        return labels
    box = wider_box(ndimage.find_objects(bare.view(np.uint8))[0], labels.shape, _NECK_MM, spacing_mm)
    far = ndimage.distance_transform_edt(~bare[box], sampling=spacing_mm)
    added = np.select([far <= _BONE_MM, far <= _NECK_MM], [np.uint8(_SPINE), np.uint8(BODY)], np.uint8(0))
    result = labels.copy()
    result[box] = np.where(labels[box] == 0, added, labels[box])
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
