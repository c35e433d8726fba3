"""Masks of other segmenters as one mask in maisi's ids, checked, with the body about it. Knows no file, no network.

What is checked stands in `ImportReport`. What can't be meant (sides swapped, another vocabulary than said, HU that
are no HU, grids that differ) is refused with the option that mends it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import BACKGROUND, BODY, KNOWN_IDS, LINGULA, OPPOSITE, label_name, name_key, opposite
from maisi.data.label_maps import VOCABULARIES, Vocabulary, counts, ids_in, merge, translated, vocabulary
from maisi.data.preprocess import edged, hu_fault, resample, resample_to_grid, turned_onto
from maisi.data.segmentation import envelope, with_organs
from maisi.errors import MaisiError
from maisi.io.nifti import read_label_names, read_labels
from maisi.volume import Volume

Array = NDArray[Any]
Bools = NDArray[np.bool_]
Centre = NDArray[np.float64]

GROWN_MM = 10.0
"""Skin, fat and muscle about the outermost labels, where no CT shows the skin: so far the body goes beyond them."""

CLOSED_MM = 30.0
"""Labels of a slice that lie less than this apart (and slices that do) are in one body; limbs farther off are not."""

HULL_SPACING_MM = 3.0

CLEARLY_MM = 10.0
"""A left structure that lies so far to the right of its counterpart is worth a word; parts of vessels cross over."""

GRID_TOLERANCE_MM = 0.05
"""By which the grids of a CT and its labels may differ."""

VERTEBRAE = (127, *range(33, 57))
"""S1, then L5 to C1: from below to above."""

_UPRIGHT = 3
"""Pairs of vertebrae that must be there to tell above from below."""

LEFT_OF = ((3, 1), (12, 1), (6, 7))
"""Organs that are not paired, and which lies to the left of which: spleen and stomach of liver, aorta of vena cava."""

_GUESS = "the body is a guess from the labels alone; a CT (--ct) would show it"
_SURE, _DOUBTFUL, _ENOUGH = 0.9, 0.7, 6
_TOLD = 5


@dataclass(frozen=True)
class Source:
    """A mask as another program made it.

    Attributes:
        labels: integers of any type, on any grid.
        vocabulary: what they mean.
        name: for messages: its file.
        names: id -> name as its file says, where it does.
    """

    labels: Volume
    vocabulary: Vocabulary
    name: str = "The mask"
    names: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    """One label of the result.

    Attributes:
        id: ours.
        name: ours, or the user's for a class of their own.
        ml: volume.
        outside: share of its voxels outside the body that the CT shows (they keep their label); None without a CT.
    """

    id: int
    name: str
    ml: float
    outside: float | None


@dataclass(frozen=True)
class SourceReport:
    """What became of one source.

    Attributes:
        name: of the source.
        vocabulary: of the source.
        mapped: their class (name and id) -> our id.
        dropped: their class -> why; only those that the mask holds.
        swapped: whether left and right were exchanged.
        resampled: whether it was brought to another grid.
        kept: share of its labelled volume that lies on the grid of the result, about 1 but for what is outside.
    """

    name: str
    vocabulary: str
    mapped: Mapping[str, int]
    dropped: Mapping[str, str]
    swapped: bool
    resampled: bool
    kept: float


@dataclass(frozen=True)
class ImportReport:
    """What an import did and found.

    Attributes:
        sources: one for each, in order of priority.
        shape: of the result.
        spacing_mm: of the result.
        structures: by id, the body last.
        body: where the envelope is from: 'ct', 'labels' (see `hull`), or 'given' (200 in a source).
        pairs: how many paired structures have both sides in the result.
        warnings: sentences on what should be looked at.
    """

    sources: tuple[SourceReport, ...]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    structures: tuple[Structure, ...]
    body: str
    pairs: int
    warnings: tuple[str, ...]

    @property
    def names(self) -> dict[int, str]:
        """Id -> name of all structures."""
        return {structure.id: structure.name for structure in self.structures}

    def as_json(self) -> dict[str, Any]:
        """Return all of it as values that JSON can hold."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return all of it as plain lines to read."""
        text = []
        for source in self.sources:
            how = ", left and right exchanged" * source.swapped
            how += f", resampled ({source.kept:.0%} of its volume is on the grid)" * source.resampled
            text.append(f"{source.name}: {len(source.mapped)} classes of {source.vocabulary} taken over{how}")
            text += [f"  dropped: {name}: {reason}" for name, reason in source.dropped.items()]
        size = " x ".join(str(n) for n in self.shape)
        text.append(f"{size} voxels of {' x '.join(f'{s:.3g}' for s in self.spacing_mm)} mm; body from {self.body}")
        for structure in self.structures:
            outside = f"  {structure.outside:.1%} outside the body" if structure.outside else ""
            text.append(f"{structure.id:5d}  {structure.name:32s} {structure.ml:10.1f} ml{outside}")
        return text + [f"Note: {warning}" for warning in self.warnings]


@dataclass(frozen=True)
class Found:
    """A class in a mask.

    Attributes:
        voxels: their number.
        centre: their mean position in mm, RAS+.
    """

    voxels: int
    centre: Centre


def import_masks(
    sources: Sequence[Source],
    ct: Volume | None = None,
    *,
    to_grid: bool = False,
    swap_sides: bool = False,
    spacing_mm: tuple[float, float, float] | None = None,
) -> tuple[Volume, ImportReport]:
    """Translate, check and merge masks, and put the body about them.

    Args:
        sources: by priority. Tumour goes over organ over target volume over body, then earlier over later.
        ct: HU, of the same body. The result then lies on its grid, and the body (200) is what it shows; what sources
            call body is forgotten. Without it the body is theirs, or else `hull` of the labels.
        to_grid: resample (nearest) what lies on another grid than the CT, or than the first source; else it is refused.
        swap_sides: exchange left and right in the sources that have them swapped; else these are refused.
        spacing_mm: of the result along X, Y, Z, which is resampled (nearest) to it in the end; None keeps the grid.

    Returns:
        uint8 mask and what was found; volumes are those before resampling. Every label of a source is kept, in the body
        or not, but for what is too small for `spacing_mm`: a warning names it.

    Raises:
        MaisiError: no HU, another grid, another vocabulary, swapped sides, or nothing in the mask.
    """
    if not sources:
        raise MaisiError("No mask is given; give at least one.")
    if ct is not None and (fault := hu_fault(ct.array)):
        raise MaisiError(f"The CT is not in HU: {fault}.")
    grid = sources[0].labels if ct is None else ct
    custom = _custom_names(sources)
    layers, reports = [], []
    for source in sources:
        layer, done = _translate(source, grid, custom, to_grid, swap_sides)
        layers.append(layer)
        reports.append(done)
    mask = merge(layers)
    del layers
    if not (mask != BACKGROUND).any():
        raise MaisiError("Nothing is left in the mask on this grid; check that mask and CT show the same place.")
    shown, body = _body(mask, grid, ct)
    structures = _structures(mask, shown if ct is not None else None, grid, custom)
    found = {i: f for i, f in census(grid.with_array(mask)).items() if i != BODY}
    mask = merge([mask], body=shown)
    whole = Structure(BODY, label_name(BODY), _ml(int(counts(mask)[BODY]), grid), None)
    warnings = [*((_GUESS,) if body == "labels" else ()), *_warnings(structures, found, custom)]
    warnings += [f"{source.name}: {one}" for source in sources for one in _name_warnings(source)]
    result = grid.with_array(mask)
    if spacing_mm is not None:
        result = resample(result.to_ras(), spacing_mm, order=0)
        left = counts(result.array)
        lost = [one.name for one in structures if not left[one.id]]
        warnings += [f"{name} is too small for this spacing and was lost" for name in lost]
        structures = tuple(replace(one, ml=_ml(int(left[one.id]), result)) for one in structures)
        whole = replace(whole, ml=_ml(int(left[BODY]), result))
    report = ImportReport(
        sources=tuple(reports),
        shape=result.shape,
        spacing_mm=result.spacing_mm,
        structures=(*structures, whole),
        body=body,
        pairs=len(_sides(found, custom)),
        warnings=tuple(warnings),
    )
    return result, report


def require_our_ids(labels: Volume, source: str, names: Mapping[int, str], custom: Container[int] = ()) -> None:
    """Refuse a label map that makes sense in another vocabulary than maisi's and none in that.

    Args:
        labels: whole numbers.
        source: for messages: the file.
        names: id -> name as the file says, where it does.
        custom: ids that mean something beside maisi's own.

    Raises:
        MaisiError: so; it says what to do.
    """
    found = {id: one for id, one in census(labels, source).items() if id not in custom}
    mask = Source(labels, vocabulary("maisi"), source, names)
    if not found.keys() <= KNOWN_IDS and not _others(mask, found):
        return  # no other vocabulary has these ids either
    try:
        _check_vocabulary(mask, found)
    except MaisiError as error:
        raise MaisiError(f"{str(error).rstrip('.')} of `maisi mask import`, and give the mask that it makes.") from None


def sides_fault(labels: Volume) -> str | None:
    """What is wrong with the sides of a label map in maisi's ids, in a sentence; None where nothing is seen."""
    mask = Source(labels, vocabulary("maisi"), "The mask")
    known = {id: one for id, one in census(labels).items() if id in mask.vocabulary.to}
    try:
        _require_upright(mask, known)
        _check_sides(mask, known, {}, swap=False)
    except MaisiError as error:
        return f"{str(error).rstrip('.')} (`maisi mask import`)."
    return None


def read_our_labels(path: Path, custom: Container[int] = ()) -> Volume:
    """Read a label map in maisi's ids.

    Args:
        path: the file.
        custom: ids that mean something beside maisi's own.

    Raises:
        MaisiError: it cannot be read, or makes sense in another vocabulary than maisi's and none in that.
    """
    labels = read_labels(path)
    if labels.array.dtype.kind in "iub":
        require_our_ids(labels, str(path), read_label_names(path), custom)
    return labels


def _require_upright(source: Source, found: Mapping[int, Found]) -> None:
    """Refuse a body that stands on its head.

    Raises:
        MaisiError: so.
    """
    ours = _ours(found, source.vocabulary.to)
    spine = [ours[id].centre[2] for id in VERTEBRAE if id in ours]
    reversed_ = [low > high for low, high in pairwise(spine)]
    if len(reversed_) >= _UPRIGHT and sum(reversed_) > len(reversed_) / 2:
        raise MaisiError(
            f"{source.name} stands on its head: {sum(reversed_)} of {len(reversed_)} vertebrae lie above the next; "
            "mend the affine in its header (and the CT's, if that is so, too)."
        )


def census(labels: Volume, name: str = "The mask") -> dict[int, Found]:
    """Count the voxels of each id and find their centre in mm (RAS+); the background is left out.

    Raises:
        MaisiError: more than 256 different values; it speaks of `name`.
    """
    ids = ids_in(labels.array)
    if len(ids) > 256:
        raise MaisiError(f"{name} holds {len(ids)} different values, so it is no label map; give one.")
    codes = labels.array
    if codes.dtype != np.uint8:
        codes = translated(codes, {id: code for code, id in enumerate(ids)})
        coded = {code: id for code, id in enumerate(ids)}
    else:
        coded = {id: id for id in ids}
    sums, voxels = _index_sums(codes, 1 + max(coded))
    found = {}
    for code, id in coded.items():
        if id != BACKGROUND:
            mean = sums[:, code] / voxels[code]
            found[id] = Found(int(voxels[code]), labels.affine[:3, :3] @ mean + labels.affine[:3, 3])
    return found


def hull(labels: Volume) -> Bools:
    """Guess the body from labels alone: slice by slice, the convex hull of what lies together, grown by `GROWN_MM`.

    What lies less than `CLOSED_MM` apart is together, in a slice and across slices without labels. All labels are
    inside. The guess is made at `HULL_SPACING_MM`: shoulders and hips have corners, and a lean body gets some fat.

    Returns:
        bool on the grid of `labels`.
    """
    from skimage.morphology import convex_hull_image as convex

    inside = labels.with_array((labels.array != BACKGROUND).view(np.uint8))
    x, y, z = (max(s, HULL_SPACING_MM) for s in labels.spacing_mm)
    work = resample(inside, (x, y, z), order=0).to_ras()
    sx, sy, sz = work.spacing_mm
    body = np.zeros(work.shape, np.bool_)
    for k in range(work.shape[2]):
        near = _within(work.array[:, :, k] != 0, CLOSED_MM / 2, (sx, sy))
        parts, count = ndimage.label(near)
        for part in range(1, count + 1):
            together = (parts == part) & (work.array[:, :, k] != 0)
            body[:, :, k] |= convex(together)  # type: ignore[no-untyped-call]
    reach = round(CLOSED_MM / 2 / sz)
    if reach:
        between = ndimage.maximum_filter1d(body.view(np.uint8), 2 * reach + 1, axis=2, mode="constant")
        body |= ndimage.minimum_filter1d(between, 2 * reach + 1, axis=2, mode="constant").view(np.bool_)
    for k in range(work.shape[2]):
        body[:, :, k] = _within(body[:, :, k], GROWN_MM, (sx, sy))
    fine = resample_to_grid(edged(work.with_array(body.view(np.uint8))), labels, order=0).array
    result: Bools = (fine | inside.array) != 0
    return result


def _within(plane: Bools, mm: float, spacing: tuple[float, float]) -> Bools:
    """Pixels at most `mm` from the set ones."""
    if not plane.any():
        return plane
    near: Bools = ndimage.distance_transform_edt(~plane, sampling=spacing) <= mm
    return near


def _translate(
    source: Source, grid: Volume, custom: Mapping[int, str], to_grid: bool, swap_sides: bool
) -> tuple[NDArray[np.uint8], SourceReport]:
    """Bring one source into our ids and onto the grid."""
    words, labels = source.vocabulary, source.labels
    found = census(labels, source.name)
    if not found:
        raise MaisiError(f"{source.name} is empty (all 0); give a mask with labels in it.")
    _check_vocabulary(source, found)
    _require_upright(source, found)
    to = {id: words.to[id] for id in (BACKGROUND, *found)}
    swapped = _check_sides(source, found, custom, swap_sides)
    if swapped:
        other = _opposites(custom)
        to = {theirs: other.get(ours, ours) for theirs, ours in to.items()}
    aligned, resampled = _aligned(labels, grid, source.name, to_grid)
    report = SourceReport(
        name=source.name,
        vocabulary=words.name,
        mapped={words.name_of(theirs): to[theirs] for theirs in sorted(found) if to[theirs]},
        dropped={words.name_of(theirs): words.dropped.get(theirs, "") for theirs in sorted(found) if not to[theirs]},
        swapped=swapped,
        resampled=resampled,
        kept=_volume_ml(aligned) / _volume_ml(labels) if resampled else 1.0,
    )
    return translated(aligned.array, to), report


def _volume_ml(labels: Volume) -> float:
    return _ml(int(np.count_nonzero(labels.array)), labels)


def _aligned(labels: Volume, grid: Volume, name: str, to_grid: bool) -> tuple[Volume, bool]:
    """Return labels on the grid, and whether that took more than turning the axes."""
    turned = turned_onto(labels, grid, GRID_TOLERANCE_MM)
    if turned is not None:
        return turned, False
    if not to_grid:
        raise MaisiError(
            f"{name} ({labels.grid}) lies on another grid than what it goes with ({grid.grid}); "
            "add --resample to bring it there, if both show the same body."
        )
    return resample_to_grid(labels, grid, order=0, fill=BACKGROUND), True


def _check_vocabulary(source: Source, found: Mapping[int, Found]) -> None:
    """Refuse a vocabulary that lacks ids of the mask, or under which its names or its anatomy make no sense.

    Raises:
        MaisiError: so; it names the vocabulary that fits, if one does.
    """
    words = source.vocabulary
    unknown = [id for id in sorted(found) if id not in words.to]
    others = _others(source, found)
    if unknown:
        fits = sorted(others, key=lambda v: (_name_share(source.names, v), _order_share(found, v)[0]))
        best = fits[-1].name if fits else ""
        mend = f"{best} has them all, so use --from {best}" if fits else "use --from TABLE.json that maps them"
        called = [f"{id} '{source.names[id]}'" if id in source.names else str(id) for id in unknown[:10]]
        some = ", ".join(called) + (", ..." if len(unknown) > 10 else "")
        raise MaisiError(f"{source.name} holds ids that {words.name} lacks ({some}); {mend}.")
    named = _named(source, found)
    if words.names and named and _name_share(named, words) < 0.5:
        better = [v.name for v in others if _name_share(named, v) >= _SURE]
        if better:
            raise MaisiError(
                f"{source.name} names its classes as {better[0]} does, not {words.name}; use it as --from."
            )
        raise MaisiError(
            f"{source.name} names its classes otherwise than {words.name} ({_otherwise(named, words)[0]}); "
            "use --from TABLE.json that maps them."
        )
    share, tests = _order_share(found, words)
    if tests >= _ENOUGH and share < _DOUBTFUL:
        for other in others:
            if _order_share(found, other)[0] >= _SURE and _order_share(found, other)[1] >= _ENOUGH:
                raise MaisiError(
                    f"{source.name}: as {words.name}, its vertebrae and sides are in disorder, as {other.name} "
                    f"they are in order; use --from {other.name}."
                )


def _named(source: Source, found: Container[int]) -> dict[int, str]:
    """What the file calls the classes that it holds, but for the user's own."""
    own = source.vocabulary.custom
    return {id: name for id, name in source.names.items() if id in found and source.vocabulary.to.get(id) not in own}


def _otherwise(named: Mapping[int, str], words: Vocabulary) -> list[str]:
    """In words, which classes the file calls otherwise than the vocabulary."""
    ours = {id: words.names.get(id, "nothing") for id in named}
    return [
        f"{id} is '{name}' there, '{ours[id]}' here"
        for id, name in named.items()
        if name_key(ours[id]) != name_key(name)
    ]


def _others(source: Source, found: Mapping[int, Found]) -> list[Vocabulary]:
    """Other vocabularies that have all ids of the mask."""
    known = [vocabulary(name) for name in VOCABULARIES if name != source.vocabulary.name]
    return [words for words in known if found.keys() <= words.to.keys()]


def _name_share(names: Mapping[int, str], words: Vocabulary) -> float:
    """Share of the file's names that are the vocabulary's."""
    same = [name_key(words.names.get(id, "")) == name_key(name) for id, name in names.items()]
    return sum(same) / len(same) if same else 0.0


def _order_share(found: Mapping[int, Found], words: Vocabulary) -> tuple[float, int]:
    """Share of anatomical orders that hold under a vocabulary, and their number: sides, and heights of vertebrae."""
    ours = _ours(found, words.to)
    tests = [left.centre[0] < right.centre[0] for left, right in _sides(ours, words.custom).values()]
    spine = [ours[id].centre[2] for id in VERTEBRAE if id in ours]
    tests += [low < high for low, high in pairwise(spine)]
    return (sum(map(bool, tests)) / len(tests) if tests else 0.0), len(tests)


def _ours(found: Mapping[int, Found], to: Mapping[int, int]) -> dict[int, Found]:
    """The same by our ids; classes that become one are taken together."""
    result: dict[int, Found] = {}
    for theirs, one in found.items():
        ours = to[theirs]
        if ours == BACKGROUND:
            continue
        before = result.get(ours, Found(0, np.zeros(3)))
        voxels = before.voxels + one.voxels
        centre = (before.centre * before.voxels + one.centre * one.voxels) / voxels
        result[ours] = Found(voxels, centre)
    return result


def _check_sides(source: Source, found: Mapping[int, Found], custom: Mapping[int, str], swap: bool) -> bool:
    """Say whether the names of the sides are to be exchanged.

    Raises:
        MaisiError: most pairs lie on the wrong sides, and nobody asked for a swap; or the body itself is mirrored,
            which exchanging names can't mend.
    """
    ours = _ours(found, source.vocabulary.to)
    pairs = _sides(ours, custom)
    wrong = [left.centre[0] > right.centre[0] for left, right in pairs.values()]
    organs = [ours[a].centre[0] > ours[b].centre[0] for a, b in LEFT_OF if a in ours and b in ours]
    if not pairs and len(organs) > 1 and all(organs):
        raise MaisiError(
            f"{source.name} is mirrored: its unpaired organs lie on the wrong side of each other; "
            "mend the affine in its header (and the CT's, if that is mirrored)."
        )
    if not pairs or 2 * sum(wrong) <= len(wrong):
        return False
    count = f"{sum(wrong)} of {len(wrong)} paired structures"
    ordered = [v.name for v in _others(source, found) if _order_share(found, v)[0] >= _SURE]
    instead = f", or say --from {ordered[0]} if that is what its ids mean" if ordered else ""
    if organs and 2 * sum(organs) > len(organs):
        raise MaisiError(
            f"{source.name} is mirrored: {count} and its unpaired organs lie on the wrong side of each other; "
            f"mend the affine in its header (and the CT's, if that is mirrored){instead}."
        )
    if not swap:
        raise MaisiError(
            f"{source.name} has left and right swapped against its affine ({count} lie on the wrong side); "
            f"add --swap-sides to exchange their names{instead}."
        )
    return True


def _sides(found: Mapping[int, Found], custom: Mapping[int, str]) -> dict[int, tuple[Found, Found]]:
    """Id of a left structure -> it and its right one, where both are there."""
    names = {id: _name(id, custom) for id in found}
    other = _opposites(custom)
    return {
        id: (found[id], found[other[id]])
        for id, name in names.items()
        if "left" in name_key(name).split() and other.get(id) in found and other.get(other[id]) == id
    }


def _opposites(custom: Mapping[int, str]) -> dict[int, int]:
    """Our id -> that of the other side, the user's own classes among them."""
    ids = {name_key(name): id for id, name in custom.items()}
    own = {id: ids[name_key(opposite(name))] for id, name in custom.items() if name_key(opposite(name)) in ids}
    return {**OPPOSITE, **LINGULA, **own}


def _custom_names(sources: Sequence[Source]) -> dict[int, str]:
    """Names of the users' own classes; one id with two names is refused."""
    names: dict[int, str] = {}
    for source in sources:
        for id, name in source.vocabulary.custom.items():
            if name_key(names.setdefault(id, name)) != name_key(name):
                raise MaisiError(f"Id {id} is called both '{names[id]}' and '{name}'; give each class its own id.")
    return names


def _name(id: int, custom: Mapping[int, str]) -> str:
    return custom.get(id) or label_name(id)


def _body(mask: NDArray[np.uint8], grid: Volume, ct: Volume | None) -> tuple[Bools, str]:
    """Return the envelope, labels in it or not, and where it is from. With a CT, takes the 200 out of `mask`."""
    given = mask == BODY
    if ct is not None:
        mask[given] = BACKGROUND
        return with_organs(ct, envelope(ct).array, mask), "ct"
    if given.any():
        return given, "given"
    return hull(grid.with_array(mask)), "labels"


def _name_warnings(source: Source) -> list[str]:
    """Which classes the file calls otherwise than the vocabulary that it is said to follow, a few of them."""
    words = source.vocabulary
    if not words.names or not source.names:
        return []
    return _otherwise(_named(source, ids_in(source.labels.array)), words)[:_TOLD]


def _structures(
    mask: NDArray[np.uint8], shown: Bools | None, grid: Volume, custom: Mapping[int, str]
) -> tuple[Structure, ...]:
    """Volumes, and the shares outside the body that the CT shows."""
    total = counts(mask)
    inside = None if shown is None else counts(mask * shown)
    return tuple(
        Structure(
            id=int(id),
            name=_name(int(id), custom),
            ml=_ml(int(total[id]), grid),
            outside=None if inside is None else round(1 - int(inside[id]) / int(total[id]), 4),
        )
        for id in np.flatnonzero(total)
        if id not in (BACKGROUND, BODY)
    )


def _ml(voxels: int, grid: Volume) -> float:
    return round(voxels * abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000, 3)


def _warnings(
    structures: Iterable[Structure], found: Mapping[int, Found], custom: Mapping[int, str]
) -> tuple[str, ...]:
    sides = _sides(found, custom).items()
    wrong = [_name(id, custom) for id, (left, right) in sides if left.centre[0] > right.centre[0] + CLEARLY_MM]
    notes = [f"{name} lies to the right of its counterpart" for name in wrong]
    for structure in structures:
        if structure.outside is not None and structure.outside > 0.05:
            notes.append(f"{structure.outside:.0%} of {structure.name} lie outside the body that the CT shows")
    return tuple(notes)


def _index_sums(codes: NDArray[np.uint8], n: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each of `n` ids the sums of its voxels' indices along the three axes, (3, n), and their number, (n,).

    Goes plane by plane along the axis that is slowest in memory, counting ids by row and by column.
    """
    order = np.argsort(np.abs(codes.strides), kind="stable")
    view = codes.transpose(order)
    nx, ny, nz = view.shape
    by_x, by_y = np.zeros((n, nx), np.int64), np.zeros((n, ny), np.int64)
    by_z = np.zeros((n, nz), np.int64)
    columns, rows = np.arange(nx)[None], np.arange(ny)[:, None]
    for k in range(nz):
        plane = view[:, :, k].T.astype(np.intp)
        by_x += np.bincount((plane * nx + columns).ravel(), minlength=n * nx).reshape(n, nx)
        by_y += np.bincount((plane * ny + rows).ravel(), minlength=n * ny).reshape(n, ny)
        by_z[:, k] = by_x.sum(axis=1)
    by_z = np.diff(by_z, axis=1, prepend=0)
    sums = np.zeros((3, n))
    for axis, marginal in zip(order, (by_x, by_y, by_z), strict=True):
        sums[axis] = marginal @ np.arange(marginal.shape[1], dtype=np.float64)
    return sums, by_z.sum(axis=1)
