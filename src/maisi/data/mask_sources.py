"""Where a label map comes from when nobody gives one: the user's library, the model's, else a phantom that is deformed.

Knows ids and regions, no names, no network. The phantom itself says where its structures lie: nothing is tabled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import label_name, sort_regions
from maisi.data.mask_deform import DeformationRanges, deform, draw_deformation
from maisi.data.mask_library import MaskLibrary
from maisi.data.phantom import REGION_SPAN_MM, phantom_labels
from maisi.data.regions import ids_in
from maisi.errors import MaisiError
from maisi.volume import Volume

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
Boxes = dict[int, NDArray[np.float64]]

_COARSE_SIZE, _COARSE_MM = (140, 110, 272), 4.0
"""Grid that holds the whole phantom, for finding where its structures lie."""

_DRAWS = 5

PHANTOM = "phantom"
"""How the sentence begins that says where a label map comes from, where it is a phantom's."""


def find_mask(
    regions: Sequence[str],
    structures: Sequence[int],
    tumor_hosts: Sequence[Sequence[int]],
    size: Triple,
    spacing: Spacing,
    seed: int,
    library: Path | None = None,
    carried: Path | None = None,
) -> tuple[Volume, str]:
    """Find a label map that shows what is asked for, and vary it at random.

    Args:
        regions: body regions to show; () leaves it to the structures, and without these it is the whole body.
        structures: ids that must be in the field of view, which is centred on them.
        tumor_hosts: for each tumour to come the ids of its hosts, such as `anatomy.TUMORS[26]`: one of each must
            be there.
        size: voxels along X, Y, Z.
        spacing: in mm.
        seed: decides which mask of those that fit, and how it is deformed.
        library: folder of the user's library; where nothing in it fits, it is as if there were none.
        carried: folder of the label maps that come with the model, of which those are taken that begin with the same
            region: one of the head and neck that ends below the shoulders is none of a chest.

    Returns:
        Labels (uint8, RAS+), and a sentence that says where they come from.

    Raises:
        MaisiError: nothing has the structures, or the field of view cannot hold them together.
    """
    regions = sort_regions(regions)
    why = ""
    if library is not None:
        found = _from_library(MaskLibrary(library), regions, structures, tumor_hosts, size, spacing, seed)
        if isinstance(found, tuple):
            return found[0], f"library, {found[1]}"
        why = f" ({found})"
    if carried is not None and (shown := regions or _regions_of(structures, tumor_hosts, seed)):
        maps = MaskLibrary(carried).only(lambda row: row.regions[:1] == shown[:1])
        found = _from_library(maps, shown, structures, tumor_hosts, size, spacing, seed)
        if isinstance(found, tuple):
            return found[0], f"the model's library, {found[1]}{why}"
    wanted = [*structures, *(_host_of_phantom(hosts, seed) for hosts in tumor_hosts)]
    return phantom_mask(regions, wanted, size, spacing, seed), f"{PHANTOM}, seed {seed}, deformed{why}"


def _from_library(
    library: MaskLibrary,
    regions: Sequence[str],
    structures: Sequence[int],
    tumor_hosts: Sequence[Sequence[int]],
    size: Triple,
    spacing: Spacing,
    seed: int,
) -> tuple[Volume, str] | str:
    """One of the masks that fit, drawn by the seed; or the reason why there is none."""
    x, y, z = (n * s for n, s in zip(size, spacing, strict=True))
    found = library.search(regions, structures, (), (x, y, z), spacing)
    rows = [row for row in found.rows if all(row.structures.keys() & set(hosts) for hosts in tumor_hosts)]
    if not rows:
        return found.reason.rstrip(".") or "no mask of the library has a host for the tumour"
    generator = np.random.default_rng((seed, 0))
    start = int(generator.integers(len(rows)))
    for row in rows[start:] + rows[:start]:
        present = [id for hosts in tumor_hosts for id in hosts if id in row.structures]
        mask = library.load(row, size, spacing, [*structures, *present], DeformationRanges(), generator)
        ids = set(ids_in(mask.array))
        if set(structures) <= ids and all(ids & set(hosts) for hosts in tumor_hosts):
            return mask, f"mask {row.id} (sha256 {row.sha256[:12]}), seed {seed}, deformed"
    return "no mask of the library holds the structures within this field of view"


def phantom_mask(
    regions: Sequence[str], structures: Sequence[int], size: Triple, spacing: Spacing, seed: int
) -> Volume:
    """Draw a phantom's label map, deformed at random, whose field of view shows structures and regions.

    The field of view is centred on the regions where it holds the structures so, else on the structures.

    Raises:
        MaisiError: the phantom has no such structure, or the field of view cannot hold them together.
    """
    unknown = [label_name(id) for id in structures if id not in phantom_boxes(seed)]
    if unknown:
        raise MaisiError(f"The phantom has no {', '.join(unknown)}; give a mask, or a library that has one.")
    centre = _field_centre(regions, structures, size, spacing, seed)
    drawn = phantom_labels(size, spacing, regions, seed, centre)
    generator = np.random.default_rng((seed, 2))
    for _ in range(_DRAWS):
        mask = deform(drawn, draw_deformation(generator, DeformationRanges(), drawn))
        lost = set(structures) - set(ids_in(mask.array))
        if not lost:
            return mask
    names = ", ".join(sorted(label_name(id) for id in lost))
    raise MaisiError(f"At this size and spacing the phantom shows no voxel of {names}; take a finer spacing.")


@lru_cache(maxsize=8)
def phantom_boxes(seed: int) -> Boxes:
    """Where each structure of a seed's phantom lies: id -> (2, 3) lowest and highest corner in mm of the world."""
    coarse = phantom_labels(_COARSE_SIZE, (_COARSE_MM,) * 3, (), seed)
    origin = coarse.affine[:3, 3] - _COARSE_MM / 2
    boxes = {}
    for id, found in enumerate(ndimage.find_objects(coarse.array), start=1):
        if found is not None:
            corners = np.array([[part.start for part in found], [part.stop for part in found]])
            boxes[id] = origin + _COARSE_MM * corners
    return boxes


def regions_of_structure(id: int, seed: int = 0) -> tuple[str, ...]:
    """Return the body regions that the phantom's structure reaches into, from top to bottom; () if it has none."""
    box = phantom_boxes(seed).get(id)
    if box is None:
        return ()
    return sort_regions(r for r, (low, high) in REGION_SPAN_MM.items() if box[1, 2] > low and box[0, 2] < high)


def _regions_of(structures: Sequence[int], tumor_hosts: Sequence[Sequence[int]], seed: int) -> tuple[str, ...]:
    """The regions that structures and the tumours' hosts reach into; () where one of them has none."""
    known = [regions_of_structure(id, seed) for id in structures]
    known += [sort_regions(r for id in hosts for r in regions_of_structure(id, seed)) for hosts in tumor_hosts]
    return sort_regions({r for regions in known for r in regions}) if all(known) else ()


def _host_of_phantom(hosts: Sequence[int], seed: int) -> int:
    """The largest of the hosts that the phantom has."""
    boxes = phantom_boxes(seed)
    known = [id for id in hosts if id in boxes]
    if not known:
        names = ", ".join(label_name(id) for id in hosts)
        raise MaisiError(f"The phantom has none of {names}; give a mask, or a library that has one.")
    return max(known, key=lambda id: float(np.prod(boxes[id][1] - boxes[id][0])))


def _field_centre(
    regions: Sequence[str], structures: Sequence[int], size: Triple, spacing: Spacing, seed: int
) -> tuple[float, float, float] | None:
    """Centre of the field of view in the world; None: that of the regions."""
    if not structures:
        return None
    boxes = np.stack([phantom_boxes(seed)[id] for id in structures])
    half = np.multiply(size, spacing) / 2
    regional = phantom_labels((1, 1, 1), (1.0, 1.0, 1.0), regions, seed).affine[:3, 3]
    middles = boxes.mean(axis=1)
    low, high = boxes[:, 0].min(axis=0), boxes[:, 1].max(axis=0)
    if regions and bool(((low >= regional - half) & (high <= regional + half)).all()):
        return None
    centre = (low + high) / 2
    if not (np.abs(middles - centre) < half).all():
        centre = (middles.min(axis=0) + middles.max(axis=0)) / 2
    if not (np.abs(middles - centre) < half).all():
        names = ", ".join(label_name(id) for id in structures)
        need = " x ".join(f"{e:.0f}" for e in high - low)
        raise MaisiError(f"The field of view cannot show {names} together; they span {need} mm, so enlarge it.")
    # along an axis whose field of view holds the whole body, the body lies in the middle
    whole = np.stack(list(phantom_boxes(seed).values()))
    room = np.maximum(half - (high - low) / 2, 0)
    middle = (whole[:, 0].min(axis=0) + whole[:, 1].max(axis=0)) / 2
    x, y, z = (
        float(c + np.clip(m - c, -r, r)) if a < 2 else float(c)
        for a, (c, m, r) in enumerate(zip(centre, middle, room, strict=True))
    )
    return (x, y, z)
