"""Label maps from nothing: ten anatomy sizes and regions -> noise -> latent -> class of each voxel -> cleaned map.

Class scores (125 for each voxel in the released network) are made part by part and never exist whole. As with images,
an item depends on the request's seed and the item's number alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import ANY_BONE, BACKGROUND, BODY, LUNGS, label_name, label_names
from maisi.conditions import Conditions, stack
from maisi.data.anatomy_sizes import (
    ABSENT,
    MIDDLE_SIZE,
    SIZED,
    MaskTraining,
    Sizes,
    complete_sizes,
    context,
    measure_ml,
    named_sizes,
    relative_sizes,
    training_of,
)
from maisi.data.label_maps import ids_in
from maisi.data.mask_codes import MaskCodes, codes_of
from maisi.data.mask_postprocess import clean, resample_smooth
from maisi.errors import MaisiError
from maisi.io.files import make_folder, new_folder
from maisi.io.nifti import write_volume
from maisi.io.record import write_record
from maisi.request import MAX_VOXELS, Request, item_seed
from maisi.volume import Volume
from maisi.weights.load import read_header
from maisi.weights.registry import MaskModel, ModelFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from maisi.networks.autoencoder import Autoencoder
    from maisi.networks.unet import UNet
    from maisi.splitting.plan import Plan

SCORE_BYTES = 256 * 2**20
"""Class scores are decoded in parts of at most about this much."""


@dataclass(frozen=True)
class MaskOrder:
    """A checked order for label maps that differ only in their noise.

    Attributes:
        request: regions, seed, count, model, and perhaps the spacing that finished maps are brought to.
        wanted: label id -> size, what was asked for.
        masks: the model's mask networks.
        training: what they were trained on; gives the grid.
        notes: sentences for the user.
    """

    request: Request
    wanted: Mapping[int, float]
    masks: MaskModel
    training: MaskTraining
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return self.request.steps or self.masks.default_steps

    @property
    def solver(self) -> str:
        """Name of the solver."""
        return self.request.solver or self.masks.solver

    @property
    def temperature(self) -> float:
        """Standard deviation of the noise."""
        return self.request.temperature or self.masks.temperature

    def sizes(self, number: int) -> Sizes:
        """The ten sizes of an item: what was asked for, and what suits it."""
        rng = np.random.default_rng([item_seed(self.request.seed, number), 1])
        return complete_sizes(self.wanted, self.request.region, self.training.cases, rng)


def make_order(request: Request, wanted: Mapping[int, float], folder: ModelFolder) -> MaskOrder:
    """Check a request for label maps as far as that goes without the networks.

    Raises:
        MaisiError: the model makes no label maps, or its files are damaged.
    """
    masks = folder.config.masks
    if masks is None:
        raise MaisiError(
            f"The model '{folder.config.name}' makes no label maps: give --model a folder with mask networks "
            "(`maisi weights assemble --mask-autoencoder ...`), draw one with `maisi phantom`, or take one from a "
            "library of label maps."
        )
    path = folder.path("mask_unet")
    header = read_header(path)
    training = training_of(header.metadata, str(path))
    if request.spacing is not None:
        extents = (
            n * step / wanted
            for n, step, wanted in zip(training.size, training.spacing_mm, request.spacing, strict=True)
        )
        finished = tuple(round(n) for n in extents)
        if math.prod(finished) > MAX_VOXELS:
            raise MaisiError(
                f"At {request.spacing} mm the label map would have {finished} voxels, more than "
                f"{MAX_VOXELS / 1e6:.0f} million; give a coarser spacing."
            )
    notes = []
    if request.region and not header.config.get("region_input"):
        notes.append("This model's mask network is not told regions; the anatomy sizes decide what it shows.")
    elif request.region and training.cases and all(case.regions != request.region for case in training.cases):
        known = sorted({" + ".join(case.regions) for case in training.cases if case.regions})
        notes.append(f"The mask network saw no maps of {' + '.join(request.region)}; it knows {', '.join(known)}.")
    if not training.cases:
        notes.append(
            f"The model tells no usual anatomy sizes: organs not given count as {MIDDLE_SIZE} in the abdomen and as "
            "absent elsewhere."
        )
    return MaskOrder(request, wanted, masks, training, tuple(notes))


@dataclass(frozen=True)
class MaskItem:
    """One generated label map.

    Attributes:
        labels: uint8, RAS+, its centre the world's origin.
        request: what was asked for.
        number: which item, from 0.
        asked_sizes: the ten sizes that the network was told.
        found_sizes: those of the map, before any resampling; None where nobody knows what they are relative to.
        details: what else was decided.
    """

    labels: Volume
    request: Request
    number: int
    asked_sizes: Sizes
    found_sizes: Sizes | None
    timings_s: Mapping[str, float] = field(default_factory=dict)
    weights_sha256: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, parents: bool = True) -> Path:
        """Make `folder`, with `parents` those that it lies in, too; labels.nii.gz, preview.png, record.json or nothing.

        Raises:
            MaisiError: the folder exists or cannot be written to.
        """
        from maisi.io.preview import preview

        if parents:
            make_folder(folder.parent)
        regions = ", ".join(self.request.region) or "region not given"
        title = f"Synthetic label map: {regions}; seed {self.request.seed}, item {self.number}"
        with new_folder(folder) as part:
            names = label_names(ids_in(self.labels.array))
            write_volume(
                part / "labels.nii.gz", self.labels, description="synthetic label map made by maisi", names=names
            )
            preview(part / "preview.png", self.labels.with_array(painted(self.labels.array)), self.labels, title)
            write_record(
                part / "record.json",
                self.request,
                item=self.number,
                seed=item_seed(self.request.seed, self.number),
                weights_sha256=self.weights_sha256,
                timings_s=self.timings_s,
                details={
                    **self.details,
                    "anatomy_sizes": named_sizes(self.asked_sizes),
                    "found_anatomy_sizes": None if self.found_sizes is None else named_sizes(self.found_sizes),
                },
            )
        return folder


class MaskGenerator:
    """The mask networks of a model, ready to make items. Networks load when first needed."""

    def __init__(
        self, folder: ModelFolder, device: str = "auto", precision: str = "auto", memory: int | None = None
    ) -> None:
        """Choose where to run; `device`, `precision` and `memory` as in `maisi.load` (bytes)."""
        from maisi.device import feature_layout, resolve_device, resolve_precision

        self.folder, self.memory = folder, memory
        self.device: torch.device = resolve_device(device)
        self.dtype: torch.dtype = resolve_precision(precision, self.device)
        self.layout = feature_layout(self.device, self.dtype)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The mask autoencoder, on the device."""
        from maisi.generation.codec import fast_layout

        return cast("Autoencoder", fast_layout(self.folder.load("mask_autoencoder", self.device, self.dtype)))

    @cached_property
    def unet(self) -> UNet:
        """The mask diffusion network, on the device."""
        from maisi.generation.codec import fast_layout

        return cast("UNet", fast_layout(self.folder.load("mask_unet", self.device, self.dtype)))

    @cached_property
    def codes(self) -> MaskCodes:
        """The table of the autoencoder's labels."""
        path = self.folder.path("mask_autoencoder")
        header = read_header(path)
        return codes_of(header.metadata, int(header.config.get("out_channels", 0)), str(path))

    def prepare(self, order: MaskOrder) -> Plan:
        """Check solver, steps and memory, load the networks, and return how latents are decoded.

        Raises:
            MaisiError: something of that does not fit, or a file is damaged.
        """
        from maisi.diffusion.process import process_from_config
        from maisi.diffusion.sampler import require_sampling
        from maisi.splitting.plan import coding_plan

        process = process_from_config(order.masks.process, f"{self.folder.folder / 'model.json'}: masks.process")
        require_sampling(process, order.solver, order.steps)
        _ = self.codes
        multiple = self.autoencoder.config.compression * self.unet.config.size_multiple
        if any(n % multiple for n in order.training.size):
            raise MaisiError(f"These mask networks need sizes in steps of {multiple}; assemble those that fit.")
        plan = coding_plan(self.autoencoder.config, "decode", order.training.size, self.device, self.dtype, self.memory)
        return replace(plan, parts=max(plan.parts, score_parts(order.training.size, len(self.codes.ids))))

    def item(self, order: MaskOrder, plan: Plan, number: int, progress: Any = None) -> MaskItem:
        """Make one item; `plan` comes from `prepare`, `progress` is told stage, steps done and steps in all."""
        import torch

        report = progress or (lambda stage, done, total: None)
        started = time.perf_counter()
        sizes = order.sizes(number)
        with torch.inference_mode():
            latent = self._latent(order, sizes, number, report)
            denoised = time.perf_counter()
            channels = decode_classes(self.autoencoder, latent / order.masks.scale_factor, self._never(sizes), plan)
        labels = clean(self.codes.labels(channels))
        report("decode", 1, 1)
        made = Volume.from_spacing(labels, order.training.spacing_mm)
        spacing = order.request.spacing
        finished = made if spacing is None else _resampled(made, spacing)
        largest = order.training.largest_ml
        missing = {id for id, wish in order.wanted.items() if wish > 0} - {*ids_in(finished.array)}
        ended = time.perf_counter()
        return MaskItem(
            labels=finished,
            request=order.request,
            number=number,
            asked_sizes=sizes,
            found_sizes=relative_sizes(measure_ml(labels, made.spacing_mm), largest) if largest else None,
            timings_s={"denoise": denoised - started, "decode": ended - denoised, "total": ended - started},
            weights_sha256=weights_used(self.folder),
            details={
                "regions": list(order.request.region),
                "size": list(finished.shape),
                "spacing_mm": list(finished.spacing_mm),
                "steps": order.steps,
                "solver": order.solver,
                "temperature": order.temperature,
                "device": str(self.device),
                "precision": str(self.dtype).removeprefix("torch."),
                "notes": list(order.notes),
                "missing": [label_name(id) for id in sorted(missing)],
            },
        )

    def _never(self, sizes: Sizes) -> tuple[int, ...]:
        """Channels that must not be chosen: those whose id means nothing, and structures that are to be absent."""
        absent = {id for id, size in zip(SIZED, sizes, strict=True) if size == ABSENT}
        return (*self.codes.nameless, *(channel for channel, id in enumerate(self.codes.ids) if id in absent))

    def _latent(self, order: MaskOrder, sizes: Sizes, number: int, report: Any) -> Tensor:
        """Noise and its denoising: `1 C X/4 Y/4 Z/4`, scaled."""
        import torch

        from maisi.cuda_graph import CudaGraphs
        from maisi.diffusion import process_from_config, sample

        generator = torch.Generator().manual_seed(item_seed(order.request.seed, number))
        config = self.autoencoder.config
        shape = (1, config.latent_channels, *(n // config.compression for n in order.training.size))
        noise = torch.randn(shape, generator=generator)
        arrays = stack([Conditions(order.training.spacing_mm, order.request.region)])
        told = {name: torch.from_numpy(value).to(self.device) for name, value in vars(arrays).items()}
        told["context"] = torch.from_numpy(context([sizes])).to(self.device, self.dtype)

        def denoise(x: Tensor, times: Tensor) -> Tensor:
            x = x.to(self.dtype).contiguous(memory_format=self.layout)
            prediction: Tensor = self.unet(x, times, **told)
            return prediction.float()

        return sample(
            process_from_config(order.masks.process),
            CudaGraphs(denoise),
            noise.to(self.device),
            steps=order.steps,
            solver=order.solver,
            temperature=order.temperature,
            generators=[generator],
            progress=lambda done, steps: report("denoise", done, steps),
        )


def _resampled(labels: Volume, spacing_mm: tuple[float, float, float]) -> Volume:
    finer = resample_smooth(labels, spacing_mm)
    return finer.with_array(clean(finer.array))


def weights_used(folder: ModelFolder) -> dict[str, str]:
    """File name -> hash of the mask networks."""
    paths = [folder.path("mask_autoencoder"), folder.path("mask_unet")]
    return {path.name: folder.config.sha256[path.name] for path in paths}


def score_parts(size: tuple[int, int, int], channels: int) -> int:
    """How many parts to decode in, so that the scores of one take no more than `SCORE_BYTES`, where rows allow."""
    return -(-int(np.prod(size)) * channels * 4 // SCORE_BYTES)


def decode_classes(
    autoencoder: Autoencoder, latent: Tensor, never: tuple[int, ...], plan: Plan | None = None
) -> NDArray[np.uint8]:
    """Latent `1 C X/4 Y/4 Z/4` (unscaled) -> each voxel's most likely class but for those of `never`, (X, Y, Z)."""
    from maisi.generation.codec import layout_of, place_of, require_numbers
    from maisi.splitting.autoencoder import decoded
    from maisi.splitting.execution import Execution

    device, dtype = place_of(autoencoder)
    axis, execution = (0, Execution(devices=(device,))) if plan is None else (plan.axis, plan.execution(device))
    latent = latent.to(device, dtype).contiguous(memory_format=layout_of(autoencoder))
    classes = np.empty([n * autoencoder.config.compression for n in latent.shape[2:]], np.uint8)
    for start, stop, scores in decoded(autoencoder, latent, execution, axis):
        require_numbers(bool(scores.isfinite().all()))
        scores[:, list(never)] = -float("inf")
        place = (*[slice(None)] * axis, slice(start, stop))
        classes[place] = scores[0].argmax(0).cpu().numpy()
    return classes


def painted(labels: NDArray[np.uint8]) -> NDArray[np.int16]:
    """A CT in flat HU to show a label map on: air, lungs, bone, and all else as soft tissue."""
    hu = np.full(256, 50, np.int16)
    hu[BACKGROUND], hu[BODY], hu[list(LUNGS)], hu[list(ANY_BONE)] = -1000, -60, -850, 500
    return hu[labels]
