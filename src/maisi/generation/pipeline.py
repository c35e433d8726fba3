"""Generation in five verbs: draw noise, tell the conditions, choose the times, denoise, decode.

    noise(seed, item) -> denoiser(conditions, mask) -> sampling times -> sample -> decode -> volume in HU

Each item is made on its own, from a generator that depends on the request's seed and the item's number alone, so item 3
of five has the same bytes as item 3 made alone (on the same machine, device and precision).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from maisi.anatomy import label_id, label_name
from maisi.conditions import MASK_BITS, Conditions, mask_bits, stack
from maisi.config import Config, parse_config
from maisi.cuda_graph import CudaGraphs, GraphMemory
from maisi.device import feature_layout, parse_memory, peak_memory, resolve_device, resolve_precision
from maisi.diffusion.guidance import guided, noisier
from maisi.diffusion.process import Process, process_from_config
from maisi.diffusion.sampler import Denoiser, require_sampling, sample
from maisi.errors import MaisiError
from maisi.generation import codec
from maisi.generation.job import Job, make_job, weights_used
from maisi.generation.output import Item
from maisi.generation.retry import best_of, count_attempts, ranges_of
from maisi.generation.tumor_contrast import Setting
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.networks.controlnet import ControlNet, inpainting_mask
from maisi.networks.unet import UNet, UNetConfig
from maisi.request import Request, item_seed
from maisi.splitting.forecast import forecast, scratch_of
from maisi.splitting.plan import FIXED_BYTES, Plan, budget_beside, coding_plan, gib
from maisi.volume import Volume
from maisi.weights.load import NetworkHeader, build_network, read_header
from maisi.weights.registry import ModelFolder, Part, find_model

ConfigT = TypeVar("ConfigT", bound=Config)
Triple = tuple[int, int, int]
Progress = Callable[[str, int, int], None]
"""Called with the stage ("denoise", "decode"), steps done and steps in all."""


def load(
    name_or_folder: str | Path = "tiny",
    device: str | torch.device = "auto",
    precision: str = "auto",
    memory: str | int | None = None,
) -> Model:
    """Open a model: a carried one by name, or a folder with a `model.json`.

    Args:
        name_or_folder: which.
        device: "auto", "cpu", "cuda" or "mps".
        precision: "auto", "fp32" or "bf16"; auto is bf16 where the hardware multiplies it natively.
        memory: what the process may use on the device, such as "6GiB", or bytes; None: all that is free. Volumes are
            decoded in as many parts as that takes, with the same result up to rounding.

    Raises:
        MaisiError: no such model or device, or files that are not what `model.json` says.
    """
    limit = None if memory is None else parse_memory(str(memory))
    return Model(find_model(name_or_folder), str(device), precision, limit)


@dataclass(frozen=True)
class Footprint:
    """The memory that a job takes beside the weights.

    Attributes:
        weights_bytes: of the networks it needs.
        denoise_bytes: of one step of the denoising networks.
        decode: how the latent is decoded.
    """

    weights_bytes: int
    denoise_bytes: int
    decode: Plan

    def __str__(self) -> str:
        """Describe it in three lines."""
        return f"weights: {gib(self.weights_bytes)}\ndenoise: about {gib(self.denoise_bytes)} a step\n{self.decode}"


@dataclass(frozen=True)
class Known:
    """The part of an image that inpainting leaves as it is, on a job's padded grid.

    Attributes:
        image: `1 1 X Y Z` in [0, 1].
        region: 1 where to paint, `1 1 X Y Z`.
    """

    image: Tensor
    region: Tensor


class Model:
    """Autoencoder, U-Net and, where there is one, ControlNet, with their process. Networks load when first needed."""

    def __init__(
        self, folder: ModelFolder, device: str = "auto", precision: str = "auto", memory: int | None = None
    ) -> None:
        self.folder = folder
        self.memory = memory
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device)
        self.layout = feature_layout(self.device, self.dtype)
        self.ranges = ranges_of(folder)

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.folder.config.name

    @cached_property
    def process(self) -> Process:
        """The diffusion process."""
        return process_from_config(self.folder.config.process, f"{self.folder.folder / 'model.json'}: process")

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, ready on the device."""
        return cast(Autoencoder, self._network("autoencoder"))

    @cached_property
    def unet(self) -> UNet:
        """The denoising network."""
        return cast(UNet, self._network("unet"))

    @cached_property
    def controlnet(self) -> ControlNet:
        """The network that follows masks; MaisiError where the model has none."""
        net = cast(ControlNet, self._network("controlnet"))
        net.mask_encoder = cast(Any, RememberingEncoder(net.mask_encoder))
        return net

    def generate(
        self,
        *,
        region: Sequence[str] | str = (),
        size: Triple | None = None,
        spacing: tuple[float, float, float] | None = None,
        seed: int = 0,
        item: int = 0,
        mask: Volume | Path | str | None = None,
        structure: Sequence[str] = (),
        tumor: Sequence[str] | str = (),
        anatomy_size: Mapping[str, float] | None = None,
        keep: Sequence[str] = (),
        library: Path | str | None = None,
        modality: str = "ct",
        steps: int | None = None,
        solver: str | None = None,
        guidance: float = 0.0,
        mask_guidance: float | None = None,
        self_guidance: float | None = None,
        temperature: float | None = None,
        strengthen: Mapping[str, float] | None = None,
        fov: Literal["given", "auto"] = "given",
        retries: int = 2,
        ranges: Path | str | None = None,
        progress: Progress | None = None,
    ) -> Item:
        """Make one synthetic volume.

        Args:
            region: body regions that it shows.
            size: voxels along X, Y, Z; any. None: what suits region and spacing, or the mask's.
            spacing: mm along X, Y, Z. None: what suits region and size, or the mask's.
            seed: decides the noise, together with `item`.
            item: number of the item; items of one seed differ as those of different seeds do.
            mask: a label map to follow, in memory or a file; the image has its grid.
            structure: names of structures to show; without a mask one is found that has them.
            tumor: tumours to grow in the mask, such as "liver:25mm"; see `maisi.tumors.parse_tumor`.
            anatomy_size: structure -> factor on its volume in the mask.
            keep: structures that the item's labels keep; () is all.
            library: folder of label maps to find a mask in.
            modality: see `anatomy.MODALITIES`.
            steps: denoising steps; None for the model's default.
            solver: name of the solver; None for the model's default.
            guidance: 0 is off. With a mask it strengthens the tumours: away from the same mask with the tumours
                replaced by their host organs. Without one it strengthens region and modality: away from none.
            mask_guidance: strengthens all of the mask: away from what the model makes without one. 0 is off; None for
                the model's default.
            self_guidance: away from what the model makes when it takes its input to be noisier than it is, for
                another run of the networks each step. 0 is off; None for the model's default.
            temperature: of the noise: below 1 items are smoother and more alike, above 1 more varied. None for the
                model's default.
            strengthen: structure -> how far to go away from what the model makes with a mask that lacks it, for
                another run of the networks each step; 0 is off. The model's default holds for those not named.
            fov: "auto" picks size and spacing from the regions.
            retries: how often an item with a mask is made again, at most, where the quality check does not pass.
            ranges: file of what passes, made by `maisi quality learn`; None: the model's, or the carried ranges.
            progress: told how far it is.

        Raises:
            MaisiError: something asked for cannot be made; said before any network runs.
        """
        wishes: dict[str, Any] = {
            "region": region,
            "size": size,
            "spacing": spacing,
            "seed": seed,
            "structure": structure,
            "tumor": tumor,
            "anatomy_size": anatomy_size or {},
            "keep": keep,
            "library": library,
        }
        wishes |= {"modality": modality, "steps": steps, "solver": solver, "guidance": guidance, "fov": fov}
        wishes |= {"mask_guidance": mask_guidance, "self_guidance": self_guidance, "strengthen": strengthen or {}}
        wishes |= {"temperature": temperature, "retries": retries, "ranges": ranges}
        job = self.job(mask, **wishes)
        return next(self.run(job, [item], progress))

    def generate_many(
        self, count: int, *, first: int = 0, progress: Progress | None = None, **wishes: Any
    ) -> Iterator[Item]:
        """Make items `first`, `first + 1`, ... one after the other; `wishes` are the arguments of `generate`."""
        job = self.job(wishes.pop("mask", None), count=count, **wishes)
        return self.run(job, range(first, first + count), progress)

    def job(self, mask: Volume | Path | str | None = None, **wishes: Any) -> Job:
        """Turn the arguments of `generate` into a checked job."""
        if not (mask is None or isinstance(mask, (Volume, Path, str))):
            raise MaisiError(
                f"A mask is a maisi.Volume or the path of a file, not {type(mask).__name__}; wrap an array as "
                "maisi.Volume(array, affine)."
            )
        volume = mask if isinstance(mask, Volume) else None
        path = None if mask is None or isinstance(mask, Volume) else Path(mask)
        request = Request.parse(model=str(self.name), mask=path, **wishes)
        return make_job(request, self.folder.config, volume, self.folder.library())

    def run(self, job: Job, numbers: Iterable[int], progress: Progress | None = None) -> Iterator[Item]:
        """Make the items of a job with these numbers, one at a time.

        Raises:
            MaisiError: as `prepare`.
        """
        plan = self.prepare(job).decode
        return (self.item(job, plan, number, progress or silent) for number in numbers)

    def prepare(self, job: Job) -> Footprint:
        """Check solver, steps and memory, then load what the job needs; return how much memory it will take.

        Raises:
            MaisiError: the process has no such solver, or not so many steps; the memory does not suffice;
                guidance would have nothing to act on; a network's file is damaged.
        """
        require_sampling(self.process, job.solver, job.steps)
        footprint = self.footprint(job)
        _ = self.autoencoder, self.unet
        if job.labels is not None:
            _ = self.controlnet
        if job.request.guidance > 0 and job.labels is None:
            self._require_guidable(job)
        return footprint

    def footprint(self, job: Job) -> Footprint:
        """Forecast the memory of a job and plan its decoding; this loads nothing.

        Raises:
            MaisiError: the memory does not suffice.
        """
        parts: tuple[Part, ...] = ("autoencoder", "unet", *(() if job.labels is None else ("controlnet",)))
        headers = {part: read_header(self.folder.path(part)) for part in parts}
        config = self._config(AutoencoderConfig, "autoencoder", headers)
        multiple = config.compression * self._config(UNetConfig, "unet", headers).size_multiple
        if any(n % multiple for n in job.padded):
            raise MaisiError(
                f"model.json of '{self.name}' says size_multiple {self.folder.config.size_multiple}, "
                f"but its networks need {multiple}; correct it there."
            )
        weights = {part: header.parameters * self.dtype.itemsize for part, header in headers.items()}
        to_load = sum(size for part, size in weights.items() if part not in self.__dict__)
        denoise = self._denoise_bytes(job, config, headers)
        budget = budget_beside(to_load, self.memory, self.device)
        if denoise > budget:
            size = ",".join(map(str, job.padded))
            raise MaisiError(
                f"A denoising step for {size} voxels takes about {gib(denoise)} and {gib(max(budget, 0))} are given "
                "beside the weights; give more memory (--memory) or a smaller size."
            )
        decode = coding_plan(config, "decode", job.padded, self.device, self.dtype, self.memory, to_load)
        return Footprint(sum(weights.values()), denoise, decode)

    def noise(self, padded: Triple, seed: int) -> tuple[Tensor, torch.Generator]:
        """Draw the starting noise of an item on the CPU, float32 `1 C X/4 Y/4 Z/4`, and return its generator too."""
        generator = torch.Generator().manual_seed(seed)
        config = self.autoencoder.config
        shape = (1, config.latent_channels, *(n // config.compression for n in padded))
        return torch.randn(shape, generator=generator), generator

    def denoiser(self, job: Job, known: Known | None = None, guidance: float | None = None) -> Denoiser:
        """The networks with everything they are told, guided if the request (or `guidance`) says so."""
        scale = job.request.guidance if guidance is None else guidance
        told = self._mask(job.padded_labels(), known)
        memory = GraphMemory()
        conditional = self._conditioned(job.conditions, told, memory)
        weaker = noisier(conditional, float(self.process.sampling_times(1, 1)[0]))
        others = [(weaker, job.self_guidance)]
        if told is None:
            modality = "unknown" if codec.is_mr(job.conditions.modality) else job.conditions.modality
            nothing = Conditions(job.conditions.spacing_mm, (), modality)
            return guided(conditional, *others, (self._conditioned(nothing, None, memory), scale))
        others.append((self._conditioned(job.conditions, None, memory), job.mask_guidance))
        healthy = None if scale == 0 else self._mask(job.padded_labels_without_tumors(), known)
        if healthy is not None:
            others.append((self._conditioned(job.conditions, healthy, memory), scale))
        for strength in sorted(set(job.strengthened.values())):
            ids = [id for id, own in job.strengthened.items() if own == strength]
            lacking = self._mask(job.padded_labels_without(ids), known)
            if lacking is not None:
                others.append((self._conditioned(job.conditions, lacking, memory), strength))
        return guided(conditional, *others)

    def item(self, job: Job, plan: Plan, number: int, progress: Progress) -> Item:
        """Make one item of a prepared job, the best of its attempts; `plan` is how `prepare` said it is decoded."""
        own = job.of_item(number)
        ranges = job.ranges or self.ranges
        told = count_attempts(progress)
        best = best_of(
            lambda setting: self._attempt(own, plan, number, setting, next(told)),
            job.request.retries,
            ranges,
            Setting(job.request.guidance, mask_guidance=own.mask_guidance, strengthened=own.strengthened),
            halving=job.request.mask_guidance is None,
            fixed=[label_id(name) for name in job.request.strengthen],
        )
        return replace(best, labels=own.kept_labels())

    @torch.inference_mode()
    def _attempt(self, job: Job, plan: Plan, number: int, setting: Setting, progress: Progress) -> Item:
        started = time.perf_counter()
        job = replace(job, mask_guidance=setting.mask_guidance, strengthened=setting.strengthened)
        seed = item_seed(job.request.seed, number, setting.noise)
        noise, generator = self.noise(job.padded, seed)
        latent = sample(
            self.process,
            self.denoiser(job, guidance=setting.guidance),
            noise.to(self.device),
            steps=job.steps,
            solver=job.solver,
            generators=[generator],
            temperature=job.temperature,
            progress=lambda done, steps: progress("denoise", done, steps),
        )
        denoised = time.perf_counter()
        progress("decode", 0, 1)
        unscaled = latent / self.folder.config.scale_factor
        image = job.place(codec.decode_tensor(self.autoencoder, unscaled, job.conditions.modality, plan))
        image = image if codec.is_mr(job.conditions.modality) else job.outside_body(image)
        progress("decode", 1, 1)
        timings = {"denoise": denoised - started, "decode": time.perf_counter() - denoised}
        return self._finished(job, plan, number, seed, image, timings)

    def _finished(
        self, job: Job, plan: Plan, number: int, seed: int, image: Volume, timings: Mapping[str, float]
    ) -> Item:
        details = {
            "regions": list(job.conditions.regions),
            "size": list(job.size),
            "spacing_mm": list(job.conditions.spacing_mm),
            "steps": job.steps,
            "solver": job.solver,
            "device": str(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
            "decoding": str(plan),
            "mask_source": job.mask_source,
            "mask_guidance": job.mask_guidance,
            "self_guidance": job.self_guidance,
            "temperature": job.temperature,
            "strengthened": {label_name(id): strength for id, strength in sorted(job.strengthened.items())},
            "tumors": [asdict(tumor) for tumor in job.placed],
            "notes": list(job.notes),
        }
        return Item(
            image=image,
            labels=job.labels,
            request=job.request,
            number=number,
            seed=seed,
            timings_s={**timings, "total": sum(timings.values())},
            weights_sha256=weights_used(self.folder, job.labels is not None),
            peak_memory_bytes=peak_memory(self.device),
            details=details,
            custom_labels=job.custom_labels,
        )

    def _conditioned(self, conditions: Conditions, mask: Tensor | None, memory: GraphMemory) -> Denoiser:
        """The U-Net (and the ControlNet, with what it is told) as a function of the noisy latent and the time."""
        arrays = stack([conditions])
        told = {name: torch.from_numpy(value).to(self.device) for name, value in vars(arrays).items()}
        modality = told["modality"]

        def denoise(x: Tensor, times: Tensor) -> Tensor:
            x = x.to(self.dtype).contiguous(memory_format=self.layout)
            residuals = None if mask is None else self.controlnet(x, times, mask, modality=modality)
            prediction: Tensor = self.unet(x, times, **told, residuals=residuals)
            return prediction.float()

        return CudaGraphs(denoise, memory)

    def _mask(self, labels: np.ndarray[Any, np.dtype[np.uint8]] | None, known: Known | None) -> Tensor | None:
        """What the ControlNet is told: label bits, and the known image if it looks at one."""
        if labels is None:
            return None
        told = torch.from_numpy(mask_bits(self.controlnet.config.told(labels)))[None]
        if self.controlnet.config.image_channels:
            told = inpainting_mask(told, *(() if known is None else (known.image, known.region)))
        return told.to(self.device, self.dtype).contiguous(memory_format=self.layout)

    def _network(self, part: Part) -> nn.Module:
        return codec.fast_layout(self.folder.load(part, self.device, self.dtype))

    def _config(self, kind: type[ConfigT], part: Part, headers: Mapping[Part, NetworkHeader]) -> ConfigT:
        return parse_config(kind, headers[part].config, str(self.folder.path(part)))

    def _denoise_bytes(self, job: Job, config: AutoencoderConfig, headers: Mapping[Part, NetworkHeader]) -> int:
        """Forecast of one step; with a mask its bits and features count too, and further masks to go away from."""
        nowhere = torch.device("meta")
        nets = {part: build_network(part, h.config, part) for part, h in headers.items() if part != "autoencoder"}
        image_channels = int(headers["controlnet"].config.get("image_channels", 0)) if "controlnet" in nets else 0
        latent = (1, config.latent_channels, *(n // config.compression for n in job.padded))

        def filled(*shape: int) -> Tensor:
            x = torch.empty(shape, dtype=self.dtype, device=nowhere)
            return x.contiguous(memory_format=self.layout)

        def run() -> None:
            arrays = stack([job.conditions])
            told = {name: torch.from_numpy(value).to(nowhere) for name, value in vars(arrays).items()}
            x, times, residuals = filled(*latent), torch.empty(1, device=nowhere), None
            if "controlnet" in nets:
                masks = [filled(1, MASK_BITS + image_channels, *job.padded) for _ in range(job.masks_told)]
                residuals = nets["controlnet"](x, times, masks[0], modality=told["modality"])
            nets["unet"](x, times, **told, residuals=residuals)

        for net in nets.values():
            net.to(dtype=self.dtype, memory_format=self.layout)  # type: ignore[call-overload]
        with torch.inference_mode():
            return FIXED_BYTES + forecast(run, scratch_of(self.device))

    def _require_guidable(self, job: Job) -> None:
        config = self.unet.config
        by_region = config.region_input and bool(job.conditions.regions)
        by_modality = config.num_modalities is not None and codec.is_mr(job.conditions.modality)
        if not (by_region or by_modality):
            raise MaisiError("Guidance has nothing to strengthen here; name a region or leave guidance out.")


class RememberingEncoder(nn.Module):
    """A mask encoder that keeps its answers: the mask is the same at every step, so its features are too."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._answers: list[tuple[weakref.ref[Tensor], Tensor]] = []

    def forward(self, mask: Tensor) -> Tensor:
        """As the encoder; a tensor is encoded once as long as somebody holds it."""
        self._answers = [pair for pair in self._answers if pair[0]() is not None]
        for asked, answer in self._answers:
            if asked() is mask:
                return answer
        answer = cast(Tensor, self.encoder(mask))
        self._answers.append((weakref.ref(mask), answer))
        return answer


def silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""
