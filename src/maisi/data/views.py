"""Views of prepared cases as cached latents: one scan, seen at several spacings, places and turns. Knows no network.

A view is a box of fixed size in voxels laid into a case; its image is encoded (`encode` is handed in) and kept as mean
and log-variance with the label map of the same box. What the box covers decides the body regions it is told.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor

from maisi.anatomy import LINGULA, LUNGS, OPPOSITE, REGION_MARKERS, REGIONS
from maisi.config import Config, parse_config
from maisi.data.label_variants import vary_names
from maisi.data.prepared import PreparedCase, PreparedFolder, Split
from maisi.data.preprocess import HU_MIN, resample_to_grid
from maisi.data.tumor_examples import with_tumors
from maisi.errors import MaisiError
from maisi.io.files import INDEX, atomic_path, make_folder, sha256, write_json
from maisi.volume import Array, Volume

NEIGHBOUR_MM = 40.0
LONGEST_GAP_MM = 300.0
"""Between two regions that are marked (abdomen and thighs, say) the upper one goes on this far at most."""

MADE_OF = "maisi.made_of"
"""Name in a view's file of the hash of all that it was made of."""

Triple = tuple[int, int, int]
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Image `1 1 X Y Z` in [0, 1] -> mean and log-variance, `C X/4 Y/4 Z/4` each."""


class TumorViews(Config):
    """Simulated tumours in views, for networks that learn to inpaint.

    Attributes:
        share: of the views that get any.
        most: largest number of tumours in one view.
        anywhere: whether soft tissue without a name may host every kind: data rarely have all organs labelled.
    """

    share: float = Field(default=0.5, ge=0, le=1)
    most: int = Field(default=2, ge=1)
    anywhere: bool = True


class ViewConfig(Config):
    """One kind of view.

    Attributes:
        size: voxels; a multiple of what the networks need (4 x the U-Net's factor).
        spacing_mm: smallest and largest voxel, the same along all axes of a view, drawn log-uniformly.
        stretch: further factor of the z axis, from 1/stretch to stretch.
        views: how many for each case of weight 1; a case of weight w gets w times as many.
        rotate_degrees: largest turn about the z axis.
        mirror: whether cases of the head and neck alone are mirrored left to right half of the time (labels
            change sides with it). The trunk is never mirrored.
        regions: only cases that have one of these; empty is all.
        min_body_mm: only cases whose body is at least this large from right to left, back to front and bottom to top;
            leaves out scans of which only a part was kept.
        tumors: simulate tumours in image and labels.
        vary_names: share of views in which whole lungs become lobes and unnamed bones get names (at random, see
            `label_variants`), so that a network learns what all their ids look like.
        keep_image: keep the image beside its latent; inpainting is trained on both.
    """

    size: Triple
    spacing_mm: tuple[float, float]
    stretch: float = Field(default=1.0, ge=1)
    views: float = Field(default=1.0, gt=0)
    rotate_degrees: float = Field(default=0.0, ge=0)
    mirror: bool = False
    regions: tuple[str, ...] = ()
    min_body_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tumors: TumorViews | None = None
    vary_names: float = Field(default=0.0, ge=0, le=1)
    keep_image: bool = False


class LatentView(Config):
    """One row of the index; `shape` and `spacing_mm` are the image's."""

    file: str
    case: str
    patient: str
    split: Split
    shape: Triple
    spacing_mm: tuple[float, float, float]
    regions: tuple[str, ...]
    modality: str = "ct"


class LatentIndex(Config):
    """What `index.json` holds; `scale_factor` is 1 / standard deviation of the training latents.

    `custom_labels` as in `manifest.CaseList`.
    """

    version: int = 1
    scale_factor: float
    autoencoder_sha256: str
    views: tuple[LatentView, ...]
    custom_labels: dict[int, str] = Field(default={})


@dataclass(frozen=True)
class StoredLatent:
    """Mean and log-variance `C X/4 Y/4 Z/4`; if asked for, the label map `X Y Z` uint8 and, where kept, the image.

    The image `X Y Z` is float16, as networks see it.
    """

    mean: Tensor
    log_variance: Tensor
    labels: Tensor | None
    image: Tensor | None


class LatentFolder:
    """Read access to a folder of cached latents."""

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            MaisiError: there is no index, or it is not one of latents.
        """
        self.folder = folder
        try:
            values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise MaisiError(f"{folder} holds no readable {INDEX}; make one with 'maisi prepare --views'.") from None
        self.index = parse_config(LatentIndex, values, str(folder / INDEX))
        self.scale_factor = self.index.scale_factor

    def views(self, split: Split) -> tuple[LatentView, ...]:
        """Views of one split."""
        return tuple(view for view in self.index.views if view.split == split)

    def load(self, view: LatentView, with_labels: bool) -> StoredLatent:
        """Read one view."""
        try:
            with safe_open(self.folder / view.file, framework="pt") as file:
                labels = file.get_tensor("labels") if with_labels else None
                image = file.get_tensor("image") if with_labels and "image" in file.keys() else None  # noqa: SIM118
                return StoredLatent(file.get_tensor("mean"), file.get_tensor("log_variance"), labels, image)
        except (SafetensorError, OSError):
            raise MaisiError(f"{self.folder / view.file} is missing or damaged; prepare the latents anew.") from None


def cache_latents(
    prepared: PreparedFolder,
    kinds: Iterable[ViewConfig],
    encode: Encode,
    autoencoder_sha256: str,
    out: Path,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LatentIndex:
    """Draw views of every case, encode them, and write them with an index.

    A view depends on `seed`, its case, its kind, its number and the autoencoder alone, so an interrupted run continues
    where it was. Files made of something else by the same names are made anew.
    """
    make_folder(out)
    bodies = {case.id: body_extent_mm(prepared.labels(case), case.spacing_mm) for case in prepared.index.cases}
    jobs = [
        (case, kind, number, copy)
        for case in prepared.index.cases
        for number, kind in enumerate(kinds)
        if all(have >= least for have, least in zip(bodies[case.id], kind.min_body_mm, strict=True))
        for copy in range(_copies(case, kind, number, seed))
    ]
    extents = {
        case.id: region_extents(prepared.labels(case), np.array(case.affine), case.regions)
        for case in prepared.index.cases
    }
    contents = {
        case.id: [sha256(prepared.folder / name) for name in (case.image, case.labels) if name is not None]
        for case in prepared.index.cases
    }
    views, spread = [], _Spread()
    for done, (case, kind, number, copy) in enumerate(jobs):
        rng = np.random.default_rng([seed, number, copy, *case.id.encode()])
        file = f"{case.id}-{number}-{copy}.safetensors"
        plan = plan_view(case, kind, extents[case.id], rng, file)
        shown = [case.affine, case.regions, case.modality, plan.row.regions, contents[case.id]]
        made_of = [autoencoder_sha256, seed, kind.model_dump(mode="json"), shown]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        kept = _kept_mean(out / file, digest)
        if kept is None:
            if (out / file).exists():  # an index of other views must not speak of these
                (out / INDEX).unlink(missing_ok=True)
            image, labels = varied(*draw_view(prepared, case, plan), case, kind, rng)
            values = torch.from_numpy(case.network_values(image.array))
            mean, log_variance = encode(values[None, None])
            tensors = {"mean": mean, "log_variance": log_variance, "labels": torch.from_numpy(labels)}
            if kind.keep_image:
                tensors["image"] = values.half()
            with atomic_path(out / file) as part:
                save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata={MADE_OF: digest})
        else:
            mean = kept
        if plan.row.split == "train":
            spread.add(mean)
        views.append(plan.row)
        if progress:
            progress(done + 1, len(jobs))
    index = LatentIndex(
        scale_factor=1 / spread.deviation(),
        autoencoder_sha256=autoencoder_sha256,
        views=tuple(views),
        custom_labels=prepared.index.custom_labels,
    )
    write_json(out / INDEX, index.model_dump(mode="json"))
    return index


def _kept_mean(path: Path, digest: str) -> Tensor | None:
    """The mean of a view that is there already; None where there is none, or one made of something else."""
    try:
        with safe_open(path, framework="pt") as stored:
            return stored.get_tensor("mean") if (stored.metadata() or {}).get(MADE_OF) == digest else None
    except (SafetensorError, OSError):
        return None


@dataclass(frozen=True)
class PlannedView:
    """A box laid into a case, before its voxels are read."""

    row: LatentView
    grid: NDArray[np.float64]
    mirrored: bool


def plan_view(
    case: PreparedCase,
    kind: ViewConfig,
    extents: Mapping[str, tuple[float, float]],
    rng: np.random.Generator,
    file: str,
) -> PlannedView:
    """Lay one random box into a case. `extents`: see `region_extents`."""
    spacing = math.exp(rng.uniform(*np.log(kind.spacing_mm)))
    stretched = spacing * math.exp(rng.uniform(-1, 1) * math.log(kind.stretch))
    spacings = (spacing, spacing, stretched)
    angle = math.radians(rng.uniform(-kind.rotate_degrees, kind.rotate_degrees))
    shares = rng.uniform(0, 1, 3)
    mirrored = kind.mirror and case.regions == ("head-neck",) and bool(rng.random() < 0.5)
    grid = _place(case.shape, np.array(case.affine), kind.size, spacings, angle, shares)
    bottom = float(grid[2, 3])
    row = LatentView(
        file=file,
        case=case.id,
        patient=case.patient,
        split=case.split,
        shape=kind.size,
        spacing_mm=spacings,
        regions=regions_of_box(extents, bottom, bottom + stretched * kind.size[2]),
        modality=case.modality,
    )
    return PlannedView(row, grid, mirrored)


def draw_view(prepared: PreparedFolder, case: PreparedCase, plan: PlannedView) -> tuple[Volume, NDArray[np.uint8]]:
    """Return the image as it is stored and the labels inside a planned box."""
    affine = np.array(case.affine)
    like = Volume(np.broadcast_to(np.uint8(0), plan.row.shape), plan.grid)
    air = HU_MIN if case.is_ct else 0.0
    seen = resample_to_grid(Volume(np.asarray(prepared.image(case)), affine), like, order=1, fill=air)
    mask = resample_to_grid(Volume(np.asarray(prepared.labels(case)), affine), like, order=0, fill=0).array
    if plan.mirrored:
        seen = seen.with_array(np.ascontiguousarray(seen.array[::-1]))
        mask = mirrored(mask)
    return seen, np.ascontiguousarray(mask)


def varied(
    image: Volume, labels: NDArray[np.uint8], case: PreparedCase, kind: ViewConfig, rng: np.random.Generator
) -> tuple[Volume, NDArray[np.uint8]]:
    """Give a view other names for its parts, and tumours, as its kind wants; they are drawn after all else."""
    chances = rng.random(2)
    if chances[0] < kind.vary_names:
        labels = vary_names(labels, rng)
    if kind.tumors is None or not case.is_ct or chances[1] >= kind.tumors.share:
        return image, labels
    return with_tumors(image, image.with_array(labels), kind.tumors.most, kind.tumors.anywhere, rng)


def region_extents(
    labels: Array, affine: NDArray[np.float64], known: tuple[str, ...] = ()
) -> dict[str, tuple[float, float]]:
    """Where along the body each region lies, in mm of world z, as far as the labels of a whole case tell.

    A region with markers spans them. Lungs bound their neighbours: a case that goes on for `NEIGHBOUR_MM` and more
    above or below them shows head and neck, or abdomen, there. A case without any of this is all `known`.
    """
    step, origin = float(affine[2, 2]), _bottom(labels.shape, affine)
    volume_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    extents: dict[str, tuple[float, float]] = {}
    for region in REGIONS:
        counts = _levels(np.isin(labels, REGION_MARKERS[region]), affine)
        if counts.sum() * volume_ml < (250 if region == "chest" else 1):
            continue
        levels = np.flatnonzero(np.cumsum(counts) / counts.sum() > 0.01)
        top = np.flatnonzero(np.cumsum(counts) / counts.sum() >= 0.995)[0]
        extents[region] = (origin + step * float(levels[0]), origin + step * float(top + 1))
    end = origin + step * _level_count(labels.shape, affine)
    if not extents:
        return dict.fromkeys(known, (origin, end))
    if "chest" in extents:
        low, high = extents["chest"]
        if end - high >= NEIGHBOUR_MM and "head-neck" not in extents:
            extents["head-neck"] = (high, end)
        if low - origin >= NEIGHBOUR_MM and "abdomen" not in extents:
            extents["abdomen"] = (origin, low)
    return _without_gaps(extents, end)


def _without_gaps(extents: Mapping[str, tuple[float, float]], end: float) -> dict[str, tuple[float, float]]:
    """Let each region reach down to the top of the next one, and the head to the top of the case."""
    found = [region for region in REGIONS if region in extents]
    filled = dict(extents)
    for upper, lower in pairwise(found):
        low, high = filled[upper]
        filled[upper] = (min(low, max(filled[lower][1], low - LONGEST_GAP_MM)), high)
    if found[0] == "head-neck":
        filled["head-neck"] = (filled["head-neck"][0], end)
    return filled


def _bottom(shape: tuple[int, ...], affine: NDArray[np.float64]) -> float:
    """World z of the lowest voxel's centre."""
    low = np.minimum(affine[2, :3] * (np.array(shape) - 1), 0)
    return float(affine[2, 3] + low.sum())


def _level_count(shape: tuple[int, ...], affine: NDArray[np.float64]) -> int:
    """How many levels, of the height of a voxel, a box takes in world z: where it is oblique more than its slices."""
    return 1 + round(float(np.abs(affine[2, :3]) @ (np.array(shape) - 1)) / float(affine[2, 2]))


def _levels(inside: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.int64]:
    """Voxels inside at each level of world z, from the lowest up."""
    if not affine[2, :2].any():
        return np.asarray(inside.sum(axis=(0, 1)), dtype=np.int64)
    x, y = np.ogrid[: inside.shape[0], : inside.shape[1]]
    step, bottom, count = affine[2, 2], _bottom(inside.shape, affine), _level_count(inside.shape, affine)
    heights = affine[2, 0] * x + affine[2, 1] * y + affine[2, 3] - bottom
    total = np.zeros(count, np.int64)
    for z in np.flatnonzero(inside.any(axis=(0, 1))):
        levels = np.rint((heights[inside[:, :, z]] + step * z) / step).astype(np.int64)
        total += np.bincount(levels, minlength=count)
    return total


def body_extent_mm(labels: Array, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    """Size of the smallest box around everything labelled (the body and what is in it), mm along each axis."""
    box = ndimage.find_objects((np.asarray(labels) > 0).astype(np.int8))
    if not box:
        return (0.0, 0.0, 0.0)
    x, y, z = ((part.stop - part.start) * step for part, step in zip(box[0], spacing_mm, strict=True))
    return (x, y, z)


def regions_of_box(extents: Mapping[str, tuple[float, float]], bottom: float, top: float) -> tuple[str, ...]:
    """Regions that take at least 35 % (or 80 mm) of the part of a box that anything is known of, top to bottom."""
    shares = {r: max(0.0, min(top, high) - max(bottom, low)) for r, (low, high) in extents.items()}
    height = (
        min(top, max(h for _, h in extents.values())) - max(bottom, min(lo for lo, _ in extents.values()))
        if extents
        else 0
    )
    found = [r for r in REGIONS if shares.get(r, 0.0) >= min(80.0, 0.35 * max(height, 1.0))]
    if not found and any(shares.values()):
        found = [max(shares, key=lambda r: shares[r])]
    return tuple(REGIONS[REGIONS.index(found[0]) : REGIONS.index(found[-1]) + 1]) if found else ()


def mirrored(labels: Array) -> NDArray[np.uint8]:
    """Mirror a label map (X, Y, Z) from right to left; structures get the names of the other side."""
    lobes = bool(np.isin(labels, LUNGS[1:-1]).any())
    return np.ascontiguousarray(_other_side(lobes)[labels[::-1]])


@cache
def _other_side(lobes: bool) -> NDArray[np.uint8]:
    """Table of 256 ids: the same structure on the other side; without `lobes`, 28 and 32 are whole lungs."""
    table = np.arange(256, dtype=np.uint8)
    table[list(OPPOSITE)] = list(OPPOSITE.values())
    if lobes:
        table[list(LINGULA)] = list(LINGULA.values())
    else:
        table[LUNGS[0]], table[LUNGS[-1]] = LUNGS[-1], LUNGS[0]
    return table


def _copies(case: PreparedCase, kind: ViewConfig, number: int, seed: int) -> int:
    """`views` times the case's weight; a fraction is rounded up or down at random."""
    if kind.regions and not set(kind.regions) & set(case.regions):
        return 0
    wanted = kind.views * case.weight if case.split == "train" else min(1.0, kind.views * case.weight)
    rng = np.random.default_rng([seed, number, *case.id.encode()])
    return int(wanted) + int(rng.random() < wanted % 1)


def _place(
    shape: tuple[int, ...],
    affine: NDArray[np.float64],
    size: Triple,
    spacing: tuple[float, float, float],
    angle: float,
    shares: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Affine of a box: where the case is longer than the box, `shares` (0 to 1) say where in between it lies."""
    have = np.abs(affine[:3, :3]) @ np.array(shape)
    want = np.array(size) * np.array(spacing)
    slack = (have - want) / 2
    # A box larger than the case lies centred, give or take a tenth of the difference.
    shift = (2 * shares - 1) * np.where(slack > 0, slack, 0.1 * slack)
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3] + shift
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    result = np.eye(4)
    result[:3, :3] = turn * np.array(spacing)
    result[:3, 3] = centre - result[:3, :3] @ ((np.array(size) - 1) / 2)
    return result


class _Spread:
    """Standard deviation of everything added, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        self.count += values.numel()
        self.total += float(values.double().sum())
        self.squares += float(values.double().square().sum())

    def deviation(self) -> float:
        if self.count < 2:
            raise MaisiError("There are no training cases to measure latents on; prepare more patients.")
        mean = self.total / self.count
        return math.sqrt(max(self.squares / self.count - mean * mean, 1e-12))
