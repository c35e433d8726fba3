"""Are generated volumes copies of training cases? Nearest neighbours in voxels and in features, against patients.

How near is too near is told by people: a baseline of how near each real patient comes to the nearest other patient. A
generated volume that comes nearer to a training case than the nearest 5 % of patients do is flagged (Dar et al. 2023,
"Investigating data memorization in 3D latent diffusion models", take a quantile of real pairs in the same way). So
where nothing is memorised about 5 % are flagged.

In voxels, images are compared on a coarse grid by normalised cross-correlation over all eight flips and all shifts that
leave enough overlap, each mean and norm taken where both fields of view overlap (Padfield 2012, "Masked object
registration in the Fourier domain"): so a copy is found where it is flipped, shifted, or shows a part of its original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from maisi.config import Config
from maisi.data.preprocess import resample, window_ct
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.feature_weights import FeatureWeights
from maisi.evaluation.result import Result
from maisi.evaluation.volumes import Entry
from maisi.volume import Volume

Array = NDArray[Any]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Triple = tuple[int, int, int]
Progress = Callable[[str, int, int], None]
VolumeFeatures = Callable[[Volume], NDArray[np.floating[Any]]]
"""A CT in HU -> a vector; its length is always the same."""

QUANTILE = 0.05
"""A generated volume nearer than this quantile of the baseline is flagged."""

SAME = 1e-6
"""Distance, in voxels or features, of an image to itself in another file, at most."""

TISSUE = 0.35
"""Of [0, 1]: -300 HU."""

FINEST = 1.0
"""Standard deviation, in coarse voxels, of the smoothing that makes the comparison blind to shifts by half a voxel."""

FLAT = 1e-6
"""Variance (of values in [0, 1]) below which there is nothing to correlate."""

STEADY = 0.01
"""A feature that spreads less than this share of the median spread is left out: that may be rounding alone."""

ROUNDING = 1e-9
"""A shift is not lost because the overlap that it must leave came out that much above a whole number."""

FLIPS: tuple[tuple[int, ...], ...] = tuple(
    tuple(axis for axis in range(3) if chosen[axis]) for chosen in product((False, True), repeat=3)
)
"""Axes that are flipped, all eight ways."""


class CoarseGrid(Config):
    """How images are compared in voxels.

    Attributes:
        spacing_mm: of the grid, along all axes.
        detail_mm: structures wider than about this are filtered out: that both show a body says nothing.
        overlap: share of the smaller field of view that a shift must leave in the larger one.
        features_spacing_mm: of the grid that features are computed on.
    """

    spacing_mm: float = 12.0
    detail_mm: float = 36.0
    overlap: float = 0.7
    features_spacing_mm: float = 8.0


def coarse(ct: Volume, grid: CoarseGrid) -> Floats:
    """Return a CT in HU as float32 RAS+ (X, Y, Z) on the coarse grid: windowed to [0, 1], one band of detail.

    It is trimmed to the box that holds all denser than lung, so that empty room about a body costs and says nothing.
    """
    s = grid.spacing_mm
    values = window_ct(resample(ct.to_ras(), (s, s, s)).array)
    boxes = ndimage.find_objects((values > TISSUE).astype(np.uint8))
    values = ndimage.gaussian_filter(values[boxes[0]] if boxes else values, FINEST, mode="nearest")
    wide: Floats = ndimage.gaussian_filter(values, grid.detail_mm / s / 2, mode="nearest")
    return values - wide


@dataclass(frozen=True)
class Match:
    """The best way to lay one image over another.

    Attributes:
        correlation: from -1 to 1, 1 where they are the same up to brightness and contrast.
        flipped: axes along which the first image is flipped.
        shift: voxels by which the first image is then moved.
    """

    correlation: float
    flipped: tuple[int, ...]
    shift: Triple


class Correlator:
    """Compares images (from `coarse`) of at most a given shape."""

    def __init__(self, largest: Triple, overlap: float = 0.7) -> None:
        """Prepare for images of at most `largest` voxels along each axis; `overlap` as in `CoarseGrid`."""
        self.overlap = overlap
        # a shift that leaves the overlap sticks out by 1 - overlap at most, so a gap wider than that tells cyclic wraps
        self.shape = tuple(int(fft.next_fast_len(int((2 - overlap) * n) + 1, real=True)) for n in largest)

    def matches(self, a: Floats, others: Iterable[Floats]) -> Iterator[Match]:
        """Yield the best match of `a`, in all its flips, with each of the others."""
        spectra = [np.conj(self._transform(np.flip(a, flipped))) for flipped in FLIPS]
        sums_a, squares_a = _Sums(a), _Sums(a * a)
        for b in others:
            shifts = self._shifts(a.shape, b.shape)
            sizes = zip(shifts, a.shape, b.shape, strict=True)
            in_b = tuple((np.maximum(0, s), np.minimum(nb, na + s)) for s, na, nb in sizes)
            in_a = tuple((low - s, high - s) for s, (low, high) in zip(shifts, in_b, strict=True))
            along_x, along_y, along_z = np.ix_(*(high - low for low, high in in_b))
            count = along_x * along_y * along_z
            allowed = count >= self.overlap * min(a.size, b.size)
            of_b, sum_b = self._transform(b), _Sums(b).over(in_b)
            scatter_b = _Sums(b * b).over(in_b) - sum_b**2 / count
            found = []
            for flipped, of_a in zip(FLIPS, spectra, strict=True):
                mirrored = _mirrored(in_a, a.shape, flipped)
                sum_a = sums_a.over(mirrored)
                scatter_a = squares_a.over(mirrored) - sum_a**2 / count
                both = self._back(of_a * of_b, shifts) - sum_a * sum_b / count
                judged = allowed & (np.minimum(scatter_a, scatter_b) > FLAT * count)
                norm = np.sqrt(np.where(judged, scatter_a * scatter_b, 1.0))
                score = np.where(judged, both / norm, -1.0)
                place = np.unravel_index(int(np.argmax(score)), score.shape)
                x, y, z = (int(s[i]) for s, i in zip(shifts, place, strict=True))
                found.append(Match(float(np.clip(score[place], -1, 1)), flipped, (x, y, z)))
            yield max(found, key=lambda match: match.correlation)

    def _shifts(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Indices, ...]:
        """The shifts along each axis that can leave the overlap."""
        shared = np.minimum(a, b)
        share = min(1.0, self.overlap * min(np.prod(a), np.prod(b)) / np.prod(shared))
        least = np.ceil(share * shared - ROUNDING).astype(int)
        return tuple(np.arange(o - na, nb - o + 1) for na, nb, o in zip(a, b, least, strict=True))

    def _transform(self, values: Array) -> Array:
        transformed: Array = fft.rfftn(values.astype(np.float32, copy=False), self.shape)
        return transformed

    def _back(self, values: Array, shifts: tuple[Indices, ...]) -> Array:
        """The inverse transform at these shifts alone: each axis is cut as soon as it is done."""
        for axis in (0, 1):
            values = fft.ifft(values, axis=axis, overwrite_x=True).take(shifts[axis], axis=axis, mode="wrap")
        back: Array = fft.irfft(values, self.shape[2], axis=2).take(shifts[2], axis=2, mode="wrap")
        return back


class _Sums:
    """Sums over boxes of an image, from its integral image (Lewis 1995, "Fast normalized cross-correlation")."""

    def __init__(self, values: Array) -> None:
        self.integral = np.pad(values.astype(np.float64), ((1, 0),) * 3)
        for axis in range(3):
            np.cumsum(self.integral, axis=axis, out=self.integral)

    def over(self, spans: tuple[tuple[Indices, Indices], ...]) -> Array:
        """Sums over all boxes of one span (first, behind the last) along each axis."""
        found = self.integral
        for axis, (low, high) in enumerate(spans):
            found = found.take(high, axis=axis) - found.take(low, axis=axis)
        return found


def _mirrored(
    spans: tuple[tuple[Indices, Indices], ...], shape: tuple[int, ...], flipped: tuple[int, ...]
) -> tuple[tuple[Indices, Indices], ...]:
    """Where spans of an image that is flipped lie in the one that is not."""
    return tuple(
        (n - high, n - low) if axis in flipped else (low, high)
        for axis, ((low, high), n) in enumerate(zip(spans, shape, strict=True))
    )


def slice_mean_features(name: str, spacing_mm: float, weights: FeatureWeights | None = None) -> VolumeFeatures:
    """Make the features of `evaluation.fid`, averaged over the central slices of each plane and put in a row.

    Args:
        name: of a 2D extractor: "gradients", which needs no weights, or another of `maisi.evaluation.features`.
        spacing_mm: of the grid that slices are taken from.
        weights: of extractors that others published.

    Raises:
        MaisiError: its package is not installed, or its weights are missing or those of another.
    """
    from maisi.config import parse_config
    from maisi.evaluation.fid import PLANES, FidConfig, SliceFid

    side = 96 if name == "gradients" else None
    values = {"features": name, "feature_weights": weights, "spacing_mm": (spacing_mm,) * 3, "side": side}
    judge = SliceFid(parse_config(FidConfig, values, "The features"))

    def describe(ct: Volume) -> NDArray[np.floating[Any]]:
        planes = judge.describe(ct)
        return np.concatenate([planes[plane].mean(axis=0) for plane in PLANES])

    return describe


@dataclass(frozen=True)
class Described:
    """One image of a set, ready to be compared.

    Attributes:
        image: which.
        grey: from `coarse`.
        features: its vector.
    """

    image: Entry
    grey: Floats
    features: Array


@dataclass(frozen=True)
class Nearest:
    """An image's nearest neighbours in a set.

    Attributes:
        image: whose neighbours.
        in_voxels: the most correlated one, and 1 - correlation.
        in_features: the one with the nearest vector, and the distance.
    """

    image: Entry
    in_voxels: tuple[Entry, float]
    in_features: tuple[Entry, float]


@dataclass(frozen=True)
class Neighbours:
    """What was found: for generated volumes, and for the real patients of the baseline."""

    generated: tuple[Nearest, ...]
    real: tuple[Nearest, ...]
    identical: int = 0
    """Real images that were left out of the baseline, since another patient's is the same."""

    def flagged(self, nearest: Nearest) -> tuple[str, ...]:
        """In which of "voxels" and "features" an image is nearer than the baseline's quantile, or the same."""
        voxels, features = (max(limit, SAME) for limit in self.thresholds)
        near = {"voxels": nearest.in_voxels[1] < voxels, "features": nearest.in_features[1] < features}
        return tuple(name for name, is_near in near.items() if is_near)

    @property
    def thresholds(self) -> tuple[float, float]:
        """The `QUANTILE` of the baseline's distances in voxels and in features."""
        return quantile(self.real, "voxels"), quantile(self.real, "features")


def quantile(found: Sequence[Nearest], space: str) -> float:
    """The `QUANTILE` of distances in "voxels" or "features"."""
    return float(np.quantile(distances(found, space), QUANTILE))


def distances(found: Sequence[Nearest], space: str) -> NDArray[np.float64]:
    """Distances to the nearest neighbours in "voxels" or "features"."""
    return np.array([(one.in_voxels if space == "voxels" else one.in_features)[1] for one in found])


def percentile(distance: float, baseline: Array) -> float:
    """How many per cent of the baseline are at most as far as `distance`."""
    return float(100 * np.mean(baseline <= distance))


def find_neighbours(
    generated: Sequence[Entry],
    training: Sequence[Entry],
    heldout: Sequence[Entry],
    features: tuple[str, VolumeFeatures],
    cache: Cache,
    *,
    grid: CoarseGrid | None = None,
    most_real: int = 50,
    seed: int = 0,
    progress: Progress | None = None,
) -> Neighbours:
    """Find each image's nearest training case, in voxels and in features.

    Args:
        generated: the images to judge.
        training: what the model was trained on.
        heldout: real patients for the baseline; without any, training patients against the other patients.
        features: what tells images apart beside their voxels, with its name.
        cache: keeps descriptions and neighbours.
        grid: how voxels are compared.
        most_real: patients of the baseline at most, one image each; drawn by `seed` where there are more.
        seed: of that draw.
        progress: told the stage, images done, images in all.

    Raises:
        MaisiError: there are fewer than two real patients to compare.
    """
    grid, tell = grid or CoarseGrid(), progress or (lambda stage, done, total: None)
    baseline = _baseline(heldout or training, most_real, seed)
    if not any(_others(one, training) for one in baseline):
        raise MaisiError("The real images are of one patient, which leaves no baseline; give images of at least two.")
    wanted = {image.files: image for image in (*training, *baseline, *generated)}
    described: dict[tuple[Path, ...], Described] = {}
    for done, (files, image) in enumerate(wanted.items()):
        described[files] = _described(image, features, grid, cache)
        tell("describe", done + 1, len(wanted))
    known = [described[image.files] for image in training]
    comparison = _Comparison.of(tuple(described.values()), known, grid, features[0], cache)

    def nearest(images: Sequence[Entry], stage: str, patients_differ: bool) -> Iterator[Nearest]:
        for done, image in enumerate(images):
            others = [one for one in known if not patients_differ or not one.image.may_share_patient(image)]
            yield comparison.nearest(image, described[image.files], others)
            tell(stage, done + 1, len(images))

    found = tuple(nearest(generated, "compare generated", False))
    real = tuple(nearest([one for one in baseline if _others(one, training)], "compare real", True))
    different = tuple(one for one in real if one.in_voxels[1] > SAME)
    if not different:
        raise MaisiError("All real images are the same as another patient's, which leaves no baseline; give others.")
    return Neighbours(found, different, len(real) - len(different))


@dataclass(frozen=True)
class _Comparison:
    """How images are compared with training cases, and where the answers are kept."""

    correlator: Correlator
    spread: Array
    settings: tuple[Any, ...]
    cache: Cache

    @classmethod
    def of(
        cls, everything: Sequence[Described], known: Sequence[Described], grid: CoarseGrid, features: str, cache: Cache
    ) -> _Comparison:
        x, y, z = np.max([one.grey.shape for one in everything], axis=0)
        # one training case has no spread, so then all images say what a large step is
        spreading = known if len(known) > 1 else everything
        spread = np.stack([one.features for one in spreading]).std(axis=0)
        varies = spread > STEADY * np.median(spread)
        correlator = Correlator((int(x), int(y), int(z)), grid.overlap)
        settings = (grid.model_dump(mode="json"), features, sorted(one.image.hash for one in spreading))
        return cls(correlator, np.where(varies, spread, np.inf), settings, cache)

    def nearest(self, image: Entry, one: Described, others: Sequence[Described]) -> Nearest:
        def compute() -> dict[str, list[float]]:
            matches = self.correlator.matches(one.grey, [other.grey for other in others])
            # root mean squares do not grow with the number of features
            steps = [np.sqrt(np.mean(((one.features - other.features) / self.spread) ** 2)) for other in others]
            return {"voxels": [1 - match.correlation for match in matches], "features": [float(s) for s in steps]}

        key = ["nearest", image.hash, self.correlator.shape, [other.image.hash for other in others], *self.settings]
        found = self.cache.json(key, compute)
        first = {space: int(np.argmin(values)) for space, values in found.items()}
        i, j = first["voxels"], first["features"]
        return Nearest(image, (others[i].image, found["voxels"][i]), (others[j].image, found["features"][j]))


def _others(image: Entry, training: Sequence[Entry]) -> bool:
    return any(not one.may_share_patient(image) for one in training)


def _baseline(real: Sequence[Entry], most: int, seed: int) -> tuple[Entry, ...]:
    """One image of each patient, of at most so many."""
    first = {image.patient: image for image in reversed(real)}
    patients = list(dict.fromkeys(image.patient for image in real))
    if len(patients) > most:
        drawn = np.random.default_rng([seed, 0]).choice(len(patients), most, replace=False)
        patients = [patients[i] for i in sorted(drawn)]
    return tuple(first[patient] for patient in patients)


def _described(image: Entry, features: tuple[str, VolumeFeatures], grid: CoarseGrid, cache: Cache) -> Described:
    name, describe = features

    def compute() -> dict[str, Array]:
        ct = image.ct()
        return {"grey": coarse(ct, grid), "features": np.asarray(describe(ct), np.float64)}

    stored = cache.arrays(["described", image.hash, grid.model_dump(mode="json"), name], compute)
    return Described(image, stored["grey"], stored["features"])


def summed_up(found: Neighbours, settings: dict[str, Any], heldout: bool) -> Result:
    """Turn neighbours into numbers."""
    voxels, features = distances(found.real, "voxels"), distances(found.real, "features")
    items = [
        {
            "image": one.image.name,
            "nearest in voxels": one.in_voxels[0].name,
            "voxel distance": one.in_voxels[1],
            "voxel percentile": percentile(one.in_voxels[1], voxels),
            "nearest in features": one.in_features[0].name,
            "feature distance": one.in_features[1],
            "feature percentile": percentile(one.in_features[1], features),
            "flagged by": list(found.flagged(one)),
        }
        for one in sorted(found.generated, key=lambda one: one.in_voxels[1])
    ]
    flags = [found.flagged(one) for one in found.generated]
    summary: dict[str, float | None] = {
        "generated to training, 5 % quantile, voxels": quantile(found.generated, "voxels"),
        "real to real, 5 % quantile, voxels": found.thresholds[0],
        "generated to training, 5 % quantile, features": quantile(found.generated, "features"),
        "real to real, 5 % quantile, features": found.thresholds[1],
        "share flagged as copies, voxels": float(np.mean(["voxels" in flag for flag in flags])),
        "share flagged as copies, features": float(np.mean(["features" in flag for flag in flags])),
        "share that chance flags": QUANTILE,
    }
    people = (
        "held-out patients to the nearest training patient" if heldout else "training patients to the nearest other"
    )
    notes: tuple[str, ...] = (
        f"Baseline: the distance of each of {len(found.real)} {people}. A generated volume nearer than its "
        f"{QUANTILE:.0%} quantile is flagged, so about {QUANTILE:.0%} are where nothing is memorised.",
        "Voxel distance is 1 - correlation of fine structure, over flips and shifts; feature distance counts standard "
        "deviations of training cases.",
    )
    if found.identical:
        notes += (
            f"{found.identical} real image(s) are the same as that of another patient and left out of the baseline; "
            "is one patient there under two names?",
        )
    return Result("memorisation", summary, items, settings, notes=notes)


SHOWN_PAIRS = 4


def draw(figure: Any, found: Neighbours, show_real: bool) -> None:
    """Draw the distances; with `show_real` also the nearest pairs, which shows real patients' images."""
    if show_real:
        figure.set_size_inches(8, 10)
        top, bottom = figure.subfigures(2, 1, height_ratios=(2, 3))
        _draw_pairs(bottom, found)
    else:
        top = figure
    axes = top.subplots(1, 2)
    words = {"voxels": "1 - correlation", "features": "standard deviations"}
    for axis, (space, unit), limit in zip(axes, words.items(), found.thresholds, strict=True):
        for images, name, color in ((found.real, "real to real", "0.35"), (found.generated, "generated", "tab:orange")):
            values = np.sort(distances(images, space))
            shares = np.arange(1, len(values) + 1) / len(values)
            axis.step([values[0], *values], [0, *shares], where="post", color=color)
            axis.plot(values, shares, ".", color=color, label=name)
        axis.axvline(limit, color="tab:red", linestyle="--", linewidth=1, label=f"{QUANTILE:.0%} of real to real")
        axis.set(title=f"Nearest training case, {space}", xlabel=f"distance ({unit})", ylabel="share of images")
        axis.set(xlim=(0, None), ylim=(0, 1.03))
        axis.legend(fontsize=8)


def _draw_pairs(figure: Any, found: Neighbours) -> None:
    from maisi.evaluation.pictures import WIDE, Tile

    pairs = sorted(found.generated, key=lambda one: one.in_voxels[1])[:SHOWN_PAIRS]
    axes = figure.subplots(2, len(pairs), squeeze=False)
    for column, one in enumerate(pairs):
        neighbour, distance = one.in_voxels
        titles = (f"generated: {one.image.name}", f"real: {neighbour.name}, {distance:.3f}")
        for axis, image, title in zip(axes[:, column], (one.image, neighbour), titles, strict=True):
            tile = Tile(image.ct(), "coronal", window=WIDE)
            width, height = tile.size_mm
            axis.imshow(tile.picture(), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
            axis.set_title(title, fontsize=7, parse_math=False)
            axis.set_axis_off()
