"""Tumours painted into a real CT, or taken out of one, on the CT's own grid.

    grow tumours in the labels -> crop -> encode -> denoise, the known part put back at each step -> decode
    -> match the surroundings -> blend

Each tumour is painted on a crop around it, at a spacing the model knows; what lies outside the painted region keeps
every bit. Without networks (`by="rules"`) tumours are painted by `data.tumor_texture`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from maisi.anatomy import TUMORS, label_name, regions_present
from maisi.conditions import Conditions
from maisi.data.label_maps import ids_in
from maisi.data.preprocess import (
    HU_MAX,
    HU_MIN,
    STORED_HU,
    resample_to_grid,
    robust_deviation,
    wider_box,
    without_padding,
)
from maisi.data.quality import QualityRanges, QualityReport, carried_ranges
from maisi.data.tumor_masks import PlacedTumor, grow_tumors
from maisi.data.tumor_texture import MOST_GRAIN_HU, paint_tumors
from maisi.device import peak_memory
from maisi.diffusion.sampler import sample
from maisi.generation import codec
from maisi.generation.inpaint_job import InpaintJob, make_inpaint_job
from maisi.generation.job import Job, padded_size, weights_used
from maisi.generation.masks import without_tumors
from maisi.generation.output import Item
from maisi.generation.pipeline import Known, Model, Progress, load, silent
from maisi.generation.tumor_contrast import Contrasts, Setting
from maisi.request import Request, item_seed
from maisi.splitting.plan import Plan, Task, coding_plan
from maisi.tumors import KINDS, kind_of
from maisi.volume import Array, Volume

Triple = tuple[int, int, int]
Mask = NDArray[np.bool_]

MARGIN_MM = 4.0
"""Around a tumour that much is repainted (at least two voxels) and blended, so that it sits in its surroundings."""

CONTEXT_MM = 30.0
"""Around the repainted region the networks see at least that much."""

LEAST_CROP = 48
"""Voxels along each axis of a crop, at least."""


@dataclass(frozen=True)
class Crop:
    """A piece of the CT on a grid that the networks take.

    Attributes:
        job: size, spacing, regions and labels of the crop.
        image: HU, float32.
        region: where to paint.
    """

    job: Job
    image: Volume
    region: Mask


@dataclass(frozen=True)
class Attempt:
    """One result with what was measured on it.

    Attributes:
        image: the CT with its tumours.
        made_with: what it was painted with.
        contrasts: of the kinds of tumour that were placed.
        report: the contrasts against those of real cases, for the tumours of which the ranges know such.
    """

    image: Volume
    made_with: Setting
    contrasts: Contrasts
    report: QualityReport

    @property
    def shortfall(self) -> float:
        """0 where every tumour has the contrast of its kind, and that of real cases."""
        return self.contrasts.shortfall + self.report.score


def inpaint(
    image: Volume | Path | str,
    labels: Volume | Path | str | None = None,
    *,
    tumor: Sequence[str] | str,
    model: Model | str | Path = "tiny",
    item: int = 0,
    progress: Progress | None = None,
    **wishes: Any,
) -> Item:
    """Paint tumours into a CT (HU), or take them out of it.

    Args:
        image: the CT, in memory or a file.
        labels: its label map on the same grid; without one lungs, airway, bone and body are found by rules.
        tumor: such as "liver:25mm" (see `maisi.tumors.parse_tumor`), or "none": healthy tissue in their place.
        model: an opened model, or the name or folder of one.
        item: number of the item.
        progress: told how far it is.
        wishes: further attributes of `Request`: seed, guidance, retries, ranges, steps, solver, region, by.

    Raises:
        MaisiError: something asked for cannot be made; said before any network runs.
    """
    opened = model if isinstance(model, Model) else load(model)
    given = {"image": image, "mask": labels}
    files = {name: Path(value) for name, value in given.items() if isinstance(value, (str, Path))}
    held = {name: value if isinstance(value, Volume) else None for name, value in given.items()}
    request = Request.parse(tumor=tumor, model=opened.name, **files, **wishes)
    job = make_inpaint_job(request, opened.folder.config, held["image"], held["mask"])
    return inpaint_item(opened if request.by == "network" else None, job, item, progress or silent)


def inpaint_item(model: Model | None, job: InpaintJob, number: int, progress: Progress) -> Item:
    """Make one item of a checked job; `model` None paints by rule.

    Attempts are made, each with the guidance that the one before asks for, until every tumour has the contrast of its
    kind, and the one that the ranges (the request's, or the model's) know from real cases, at most `retries` times more
    than once; the best is kept.
    """
    started = time.perf_counter()
    labels, placed = new_labels(job, number)
    changed = labels.array != job.labels.array
    by_labels = job.painting(tumor.kind for tumor in placed).mask_guidance
    setting = Setting(job.request.guidance, mask_guidance=by_labels)
    ranges = job.ranges or (carried_ranges() if model is None else model.ranges)
    attempts: list[Attempt] = []
    for attempt in range(1 + (0 if job.removal else job.request.retries)):
        if model is None:
            image = paint_tumors(job.image, _only(labels, changed), _rng(job, number, attempt, 2))
        else:
            image = painted(model, job, labels, changed, number, setting, progress)
        attempts.append(_measured(image, labels, changed, placed, setting, ranges))
        if attempts[-1].shortfall == 0:
            break
        setting = attempts[-1].contrasts.next(setting, [(a.contrasts, a.made_with) for a in attempts[:-1]])
    best = min(attempts, key=lambda a: a.shortfall)
    seconds = time.perf_counter() - started
    details = {
        "size": list(job.image.shape),
        "spacing_mm": list(job.image.spacing_mm),
        "regions": list(regions_present(ids_in(labels.array))),
        "tumors": [asdict(tumor) for tumor in placed],
        "removed": job.removal,
        "kinds": {kind: job.painting([kind]).model_dump() for kind in job.kinds},
        **best.contrasts.as_details(best.made_with),
        "quality": {**best.report.as_json(), "ranges": ranges.source},
        "attempts": len(attempts),
        "painted_by": "rules" if model is None else "network",
        "painted_voxels": int((np.rint(best.image.array) != np.rint(job.image.array)).sum()),
        "notes": list(job.notes),
    }
    return Item(
        image=best.image,
        labels=labels,
        request=job.request,
        number=number,
        seed=item_seed(job.request.seed, number),
        timings_s={"total": seconds},
        custom_labels=job.custom_labels,
        synthetic=False,
        weights_sha256={} if model is None else weights_used(model.folder, masked=True),
        peak_memory_bytes=None if model is None else peak_memory(model.device),
        details=details,
    )


def new_labels(job: InpaintJob, number: int) -> tuple[Volume, tuple[PlacedTumor, ...]]:
    """The labels of an item: with the tumours asked for, or without any."""
    if job.removal:
        return job.labels.with_array(without_tumors(job.labels.array, job.labels.spacing_mm)), ()
    return grow_tumors(job.labels, job.request.tumor, _rng(job, number, 0, 1))


def painted(
    model: Model,
    job: InpaintJob,
    labels: Volume,
    changed: Mask,
    number: int,
    setting: Setting,
    progress: Progress,
) -> Volume:
    """The CT with each changed part of its labels repainted by the networks."""
    result = job.image.array.copy()
    margin = max(MARGIN_MM, 2 * max(labels.spacing_mm))
    parts = changed_parts(changed, margin, labels.spacing_mm)
    for index, part in enumerate(parts, start=1):
        crop = make_crop(model, job, labels, part, margin)
        seed = item_seed(item_seed(job.request.seed, number), setting.noise * 1000 + index)
        values = _paint_crop(model, crop, seed, setting.guidance, progress)
        _blend(result, job.image, part, crop, values, margin, np.random.default_rng(seed))
        progress("inpaint", index, len(parts))
    return job.image.with_array(result)


@dataclass(frozen=True)
class Part:
    """Changed voxels that are painted together: the box that holds them with their margin, and where they are in it."""

    box: tuple[slice, ...]
    inside: Mask

    def place(self, grid: Volume) -> Volume:
        """The box's voxels as a label map of 0 and 1, where they lie in the world."""
        corner = np.eye(4)
        corner[:3, 3] = [side.start for side in self.box]
        return Volume(self.inside.astype(np.uint8), grid.affine @ corner)


def changed_parts(changed: Mask, margin: float, spacing_mm: tuple[float, float, float]) -> list[Part]:
    """Split changed voxels into parts whose margins do not touch."""
    found = ndimage.find_objects(changed.view(np.uint8))
    if not found:
        return []
    outer = wider_box(found[0], changed.shape, margin, spacing_mm)
    numbers, _ = ndimage.label(_distance(changed[outer], spacing_mm) <= margin)
    parts = []
    for index, box in enumerate(ndimage.find_objects(numbers), start=1):
        place = tuple(slice(o.start + b.start, o.start + b.stop) for o, b in zip(outer, box, strict=True))
        parts.append(Part(place, changed[place] & (numbers[box] == index)))
    return parts


def make_crop(model: Model, job: InpaintJob, labels: Volume, part: Part, margin: float) -> Crop:
    """Lay a grid of usable size and spacing around one part; axes as those of the image, in RAS+ order."""
    spacing = _crop_spacing(model, labels.to_ras())
    ends = np.array([[side.start, side.stop - 1] for side in part.box], dtype=np.float64)
    corners = np.array(np.meshgrid(*ends)).reshape(3, -1)
    world = labels.affine[:3, :3] @ corners + labels.affine[:3, 3:]
    ras = labels.to_ras().affine
    directions = ras[:3, :3] / np.linalg.norm(ras[:3, :3], axis=0)
    local = np.linalg.inv(directions) @ world
    extent = local.max(axis=1) - local.min(axis=1)
    wanted = [max(LEAST_CROP, math.ceil((e + 2 * CONTEXT_MM) / s)) for e, s in zip(extent, spacing, strict=True)]
    size = padded_size((wanted[0], wanted[1], wanted[2]), model.folder.config.size_multiple)
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing)
    middle = directions @ ((local.max(axis=1) + local.min(axis=1)) / 2)
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    like = Volume(np.broadcast_to(np.uint8(0), size), affine)
    # padding is air here: blurred, it would be no tissue's HU
    image = resample_to_grid(without_padding(job.image), like, order=1, fill=HU_MIN)
    image = image.with_array(image.array.astype(np.float32))
    seen = resample_to_grid(labels, like, order=0, fill=0)
    inside = resample_to_grid(part.place(labels), like, order=0, fill=0).array > 0
    seen, inside = _with_small(labels, part, seen, inside)
    region = _distance(inside, spacing) <= margin
    regions = job.request.region or regions_present(ids_in(seen.array)) or regions_present(ids_in(labels.array))
    changed = np.concatenate([one.array[part.box][part.inside] for one in (job.labels, labels)])
    painting = job.painting(kind_of(id).name for id in TUMORS.keys() & set(ids_in(changed)))
    inner = Job(
        request=job.request,
        conditions=Conditions(spacing, regions, job.request.modality),
        size=size,
        padded=size,
        labels=seen,
        steps=job.steps,
        solver=job.solver,
        mask_guidance=painting.mask_guidance,
        temperature=painting.temperature,
    )
    return Crop(inner, image, region)


def _with_small(labels: Volume, part: Part, seen: Volume, inside: Mask) -> tuple[Volume, Mask]:
    """Labels and changed voxels of a crop, those of a part so small that the crop misses it put into the nearest."""
    own = np.argwhere(part.inside) + [side.start for side in part.box]
    tumor = np.isin(labels.array[tuple(own.T)], list(TUMORS))
    if tumor.any():  # else tumours are taken away here
        own = own[tumor]
        found = inside & np.isin(seen.array, list(TUMORS))
    else:
        found = inside
    if found.any():
        return seen, inside
    world = own @ labels.affine[:3, :3].T + labels.affine[:3, 3]
    index = np.rint((world - seen.affine[:3, 3]) @ np.linalg.inv(seen.affine[:3, :3]).T).astype(int)
    places = tuple(np.clip(index, 0, np.array(seen.shape) - 1).T)
    array, there = seen.array.copy(), inside.copy()
    array[places] = labels.array[tuple(own.T)]
    there[places] = True
    return seen.with_array(array), there


@torch.inference_mode()
def _paint_crop(model: Model, crop: Crop, seed: int, guidance: float, progress: Progress) -> NDArray[np.float32]:
    """HU of the crop as the networks repaint it, matched to what is known."""
    image = torch.from_numpy(codec.normalised(crop.image.array, "ct"))[None, None]
    region = torch.from_numpy(crop.region.astype(np.float32))[None, None]
    config = model.autoencoder.config

    def plan(task: Task) -> Plan:
        return coding_plan(config, task, crop.job.size, model.device, model.dtype, model.memory)

    mean, _ = codec.encode_tensor(model.autoencoder, image, plan("encode"))
    scale = model.folder.config.scale_factor
    known = mean[None].to(model.device) * scale
    noise, generator = model.noise(crop.job.padded, seed)
    noise = noise.to(model.device)
    paint = F.adaptive_max_pool3d(region, tuple(noise.shape[2:])).to(model.device)

    def put_back(x: Tensor, times: Tensor) -> Tensor:
        there, _ = model.process.perturb(known, crop.job.temperature * noise, times)
        return paint * x + (1 - paint) * there

    latent = sample(
        model.process,
        model.denoiser(crop.job, Known(image, region), guidance),
        noise,
        steps=crop.job.steps,
        solver=crop.job.solver,
        generators=[generator],
        temperature=crop.job.temperature,
        progress=lambda done, steps: progress("denoise", done, steps),
        after_step=put_back,
    )
    latent = paint * latent + (1 - paint) * known
    decoded = codec.decode_tensor(model.autoencoder, latent / scale, "ct", plan("decode")).astype(np.float32)
    return _matched(decoded, crop)


def _matched(decoded: NDArray[np.float32], crop: Crop) -> NDArray[np.float32]:
    """Shift what was decoded by how far it is off around the region, smoothly."""
    spacing = crop.job.conditions.spacing_mm
    outside = (~crop.region).astype(np.float32)
    sigma = [6.0 / s for s in spacing]
    # of air, dense bone and metal the networks know that they are beyond their window, not how far
    off = np.clip(np.clip(crop.image.array, HU_MIN, HU_MAX) - decoded, -100, 100) * outside
    weight = ndimage.gaussian_filter(outside, sigma)
    return (decoded + ndimage.gaussian_filter(off, sigma) / np.maximum(weight, 1e-3)).astype(np.float32)


def _blend(
    result: Array,
    original: Volume,
    part: Part,
    crop: Crop,
    values: NDArray[np.float32],
    margin: float,
    rng: np.random.Generator,
) -> None:
    """Write a repainted part into `result`: fully inside, less and less towards the region's border, with the grain."""
    like = part.place(original)
    old = original.array[part.box].astype(np.float32)
    tissue = np.maximum(old, STORED_HU[0])
    new = resample_to_grid(Volume(values, crop.image.affine), like, order=1, fill=HU_MIN).array
    seen = resample_to_grid(crop.image, like, order=1, fill=HU_MIN).array
    t = np.clip(_distance(part.inside, original.spacing_mm) / margin, 0, 1)
    weight = 1 - t * t * (3 - 2 * t)
    weight[(old < STORED_HU[0]) | ((old > HU_MAX) & ~part.inside)] = 0  # padding, and bone and metal that networks clip
    # what the crop's coarser grid and the networks leave out is grain: noise that belongs to this scan
    fine = tissue - seen
    sigma = min(robust_deviation(fine), MOST_GRAIN_HU)
    grain = sigma * rng.standard_normal(new.shape).astype(np.float32)
    painted = old + weight * (new + grain - old)
    if result.dtype.kind != "f":
        painted = np.rint(painted)
    # where its weight is 0 another part, whose box may overlap this one's, may have painted already
    np.copyto(result[part.box], painted.astype(result.dtype), where=weight > 0)


def _measured(
    image: Volume,
    labels: Volume,
    changed: Mask,
    placed: tuple[PlacedTumor, ...],
    made_with: Setting,
    ranges: QualityRanges,
) -> Attempt:
    """An attempt with the contrast of each kind that was placed, and in which range it lies."""
    contrasts = Contrasts.of(image, labels, {KINDS[tumor.kind].id for tumor in placed}, changed)
    names = {id: label_name(id) for id in contrasts.hu}
    known = {name for name, entry in ranges.tumors.items() if entry.cases}
    judged = [ranges.contrast(names[id], hu) for id, hu in contrasts.hu.items() if names[id] in known]
    return Attempt(image, made_with, contrasts, QualityReport(tuple(judged)))


def _crop_spacing(model: Model, ras: Volume) -> tuple[float, float, float]:
    low, high = model.folder.config.crop_spacing_mm or (0.0, math.inf)
    x, y, z = (min(max(s, low), high) for s in ras.spacing_mm)
    return (x, y, z)


def _distance(inside: Mask, spacing_mm: tuple[float, float, float]) -> NDArray[np.float32]:
    """Distance in mm to the nearest voxel inside."""
    return np.asarray(ndimage.distance_transform_edt(~inside, sampling=spacing_mm), dtype=np.float32)


def _only(labels: Volume, changed: Mask) -> Volume:
    """Labels whose tumours are the new ones alone."""
    old = np.isin(labels.array, list(TUMORS)) & ~changed
    return labels.with_array(np.where(old, np.uint8(0), labels.array))


def _rng(job: InpaintJob, number: int, attempt: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([item_seed(job.request.seed, number), attempt, stream])
