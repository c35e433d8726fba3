"""Cases to train a segmenter on: structures by name, one spacing, patches drawn around structures. Knows no torch.

Patches are turned, zoomed and changed in intensity, never mirrored: left and right are different structures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import label_name, name_key, named_sides
from maisi.config import Config
from maisi.data.agreement import STRUCTURES
from maisi.data.augment import SpatialRanges, apply, draw
from maisi.data.label_maps import ids_in, translated
from maisi.data.preprocess import HU_MIN, STORED_HU, edged, resample, resample_to_grid
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.volumes import Entry
from maisi.volume import Volume

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
Structures = Mapping[str, frozenset[int]]
"""Name -> ids that count as it, in the order of the classes 1, 2, ...; 0 is all else."""

Incomplete = Literal["leave-out", "absent"]

_MOVED = 0.02
"""A spacing that is off by more than this share counts as another one."""

_OFF_CENTRE = 0.25
"""How far, as a share of the patch, a patch lies off the voxel it was drawn for, at most."""


class PatchConfig(Config):
    """How patches are drawn.

    Attributes:
        size: voxels along X, Y, Z.
        foreground: share of patches that lie around a voxel of one of the structures, each as often as the others.
        rotate_degrees: largest turn about each axis, either way.
        zoom: smallest and largest magnification.
        shift_hu: largest change of all HU, either way.
        contrast: largest change of the contrast about 0 HU, as a share, either way.
    """

    size: Triple = (64, 64, 64)
    foreground: float = 0.9
    rotate_degrees: float = 10.0
    zoom: tuple[float, float] = (0.85, 1.2)
    shift_hu: float = 20.0
    contrast: float = 0.1

    @property
    def ranges(self) -> SpatialRanges:
        """For `data.augment`."""
        turn = self.rotate_degrees
        return SpatialRanges(rotate_degrees=(turn, turn, turn), zoom=self.zoom, size=self.size)


@dataclass(frozen=True)
class TrainingCase:
    """One case in memory.

    Attributes:
        name: of the entry.
        image: (X, Y, Z) int16 HU.
        classes: (X, Y, Z) uint8: 0, or 1 + the place of the structure.
        spacing_mm: of both.
        source_mm: spacing of the files it was made of.
        places: for each structure that is there, its voxels (N, 3).
    """

    name: str
    image: NDArray[np.int16]
    classes: NDArray[np.uint8]
    spacing_mm: Spacing
    source_mm: Spacing
    places: tuple[NDArray[np.int16], ...] = field(repr=False)


def parse_structures(names: Iterable[str], custom: Mapping[int, str] | None = None) -> dict[str, frozenset[int]]:
    """Turn names into structures, in the order given.

    Args:
        names: of labels ('mandible'), of pairs ('parotid gland' is both sides as one), of the groups of
            `agreement.STRUCTURES` ('lungs'), or several with commas between.
        custom: names of own classes, id -> name.

    Raises:
        MaisiError: none is given, one is unknown, or two hold the same label.
    """
    own = {name_key(name): (name, id) for id, name in (custom or {}).items()}
    found: dict[str, frozenset[int]] = {}
    for name in (part.strip() for text in names for part in text.split(",")):
        if not name:
            continue
        shown, ids = _structure(name, own)
        found[shown] = ids
    if not found:
        raise MaisiError("No structure is named; give --structure, such as --structure mandible.")
    taken: dict[int, str] = {}
    for name, ids in found.items():
        for id in ids:
            if id in taken:
                raise MaisiError(f"'{taken[id]}' and '{name}' hold the same label; leave one of them out.")
            taken[id] = name
    return found


def _structure(name: str, own: Mapping[str, tuple[str, int]]) -> tuple[str, frozenset[int]]:
    key = name_key(name)
    if key in own:
        return own[key][0], frozenset({own[key][1]})
    if key in STRUCTURES:
        return key, STRUCTURES[key]
    ids = named_sides(name)
    return label_name(ids[0]) if len(ids) == 1 else name, frozenset(ids)


def structures_held(entry: Entry, structures: Structures, cache: Cache) -> tuple[str, ...]:
    """Return the names of the structures that an entry's label map holds."""

    def look() -> list[int]:
        labels = entry.pair()[1]
        return [] if labels is None else list(ids_in(labels.array))

    held = set(cache.json(["ids held", entry.hash], look))
    return tuple(name for name, ids in structures.items() if ids & held)


def complete(
    entries: Sequence[Entry], structures: Structures, cache: Cache, what: str, incomplete: Incomplete = "leave-out"
) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Return the cases that a segmenter can be trained on, and notes about the others.

    Args:
        entries: of any kind.
        structures: wanted.
        cache: keeps what each holds.
        what: they are, for messages.
        incomplete: what to do about cases whose labels lack a structure: 'leave-out', since it may be there without
            anybody having drawn it, or 'absent', taking it for not there.

    Raises:
        MaisiError: a structure is in none of them, or none can be used.
    """
    labelled = [entry for entry in entries if entry.has_labels]
    held = [set(structures_held(entry, structures, cache)) for entry in labelled]
    absent = [name for name in structures if not any(name in own for own in held)]
    if absent:
        raise MaisiError(
            f"No label map of the {len(entries)} {what} cases has {', '.join(absent)}; leave that --structure out."
        )
    notes = []
    if len(labelled) < len(entries):
        notes.append(f"{len(entries) - len(labelled)} {what} case(s) have no labels and were left out.")
    if incomplete == "absent":
        return tuple(labelled), tuple(notes)
    whole = tuple(entry for entry, own in zip(labelled, held, strict=True) if own == structures.keys())
    if not whole:
        few = ", ".join(f"{name} in {sum(name in own for own in held)}" for name in structures)
        raise MaisiError(
            f"No {what} case has all structures in its labels ({few}); name fewer, or give --incomplete absent."
        )
    if len(whole) < len(labelled):
        notes.append(f"{len(labelled) - len(whole)} {what} case(s) lack a structure in their labels and were left out.")
    return whole, tuple(notes)


def in_order(structures: Structures) -> list[list[Any]]:
    """Names with their ids, for keys: the order numbers the classes, and keys take no notice of a mapping's."""
    return [[name, sorted(ids)] for name, ids in structures.items()]


def load_case(entry: Entry, structures: Structures, spacing_mm: Spacing, cache: Cache) -> TrainingCase:
    """Read an entry with labels, brought to a spacing; what was read before comes from the cache.

    Raises:
        MaisiError: a file cannot be read.
    """
    key = ["segmentation case", entry.hash, in_order(structures), list(spacing_mm)]
    stored = cache.arrays(key, partial(_arrays, entry, structures, spacing_mm))
    image, classes = stored["image"], stored["classes"]
    places = [np.argwhere(classes == number + 1).astype(np.int16) for number in range(len(structures))]
    x, y, z = map(float, stored["source_mm"])
    return TrainingCase(entry.name, image, classes, spacing_mm, (x, y, z), tuple(p for p in places if len(p)))


def _arrays(entry: Entry, structures: Structures, spacing_mm: Spacing) -> dict[str, NDArray[np.generic]]:
    ct, labels = entry.pair()
    if labels is None:
        raise MaisiError(f"{entry.name} has no labels; give a label map for each image.")
    image = resample(stored_hu(ct), spacing_mm)
    shares = (labels.with_array(np.isin(labels.array, sorted(ids)).astype(np.float32)) for ids in structures.values())
    return {"image": image.array, "classes": likeliest(shares, image), "source_mm": np.array(ct.spacing_mm)}


def likeliest(shares: Iterable[Volume], like: Volume) -> NDArray[np.uint8]:
    """Return the class that has the largest share of each voxel of another grid; 0 where the background has.

    Args:
        shares: for each class from 1 on, how much of each voxel is its, float32 from 0 to 1; background has the rest.
            The outermost voxels count for what lies up to a voxel further out.
        like: gives the grid.
    """
    best = np.zeros(like.shape, np.uint8)
    most: NDArray[np.float32] | None = None
    rest = np.ones(like.shape, np.float32)
    for number, share in enumerate(shares, 1):
        here = resample_to_grid(edged(share), like, order=1, fill=0.0).array
        rest -= here
        if most is None:
            most, best[...] = here, number
            continue
        larger = here > most
        best[larger] = number
        np.maximum(most, here, out=most)
    if most is not None:
        best[rest >= most] = 0
    return best


def draw_patch(
    case: TrainingCase, rng: np.random.Generator, config: PatchConfig
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Cut out one patch, changed at random: HU and classes, both `config.size`."""
    near, kind, which = rng.random(), rng.integers(2**31), rng.random()
    aside = rng.uniform(-_OFF_CENTRE, _OFF_CENTRE, 3) * np.array(config.size)
    shift, contrast = rng.uniform(-1, 1, 2) * (config.shift_hu, config.contrast)
    parameters = draw(rng, config.ranges, case.image.shape, case.spacing_mm)
    if near < config.foreground and case.places:
        places = case.places[int(kind) % len(case.places)]
        parameters = replace(parameters, centre=places[int(which * len(places))] + aside)
    image = apply(case.image, parameters, order=1, fill=HU_MIN).astype(np.float32)
    return (1 + contrast) * image + shift, apply(case.classes, parameters, order=0)


def stored_hu(ct: Volume) -> Volume:
    """The same CT as int16, in the range of what is stored."""
    return ct.with_array(np.clip(np.rint(ct.array), *STORED_HU).astype(np.int16))


def classes_of(labels: NDArray[Any], structures: Structures) -> NDArray[np.uint8]:
    """Return the class of each voxel of a label map: 1 + the place of its structure, 0 where it belongs to none."""
    numbers = {id: number for number, ids in enumerate(structures.values(), 1) for id in ids}
    return translated(labels, {id: numbers.get(id, 0) for id in ids_in(labels)})


def ids_of(classes: NDArray[np.uint8], structures: Mapping[str, Collection[int]]) -> NDArray[np.uint8]:
    """Return maisi's ids of classes; of a structure with several ids, the lowest.

    Raises:
        MaisiError: there are more classes than structures.
    """
    ids = np.array([0, *(min(ids) for ids in structures.values())], np.uint8)
    if classes.max() >= len(ids):
        raise MaisiError(f"A segmenter of {len(ids) - 1} structure(s) found class {classes.max()}; train it anew.")
    return ids[classes]


def resampling_note(cases: Sequence[TrainingCase]) -> tuple[str, ...]:
    """Say how many cases have another spacing than a segmenter works at; nothing where none has."""
    moved = [c for c in cases if not np.allclose(c.source_mm, c.spacing_mm, rtol=_MOVED, atol=0)]
    if not moved:
        return ()
    grid = " x ".join(f"{s:.3g}" for s in moved[0].spacing_mm)
    return (
        f"{len(moved)} of {len(cases)} cases have another spacing and were resampled to {grid} mm for the segmenter; "
        "what it finds is judged on the grid of the label maps.",
    )
