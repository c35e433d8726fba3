"""Generation in five verbs: draw noise, tell the conditions, choose the times, denoise, decode.

    noise(seed, item) -> denoiser(conditions, mask) -> sampling times -> sample -> decode -> volume in HU

Each item is made on its own, from a generator that depends on the request's seed and the item's number alone, so item 3
of five has the same bytes as item 3 made alone (on the same machine, device and precision).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from maisi.conditions import Conditions, mask_bits, stack
from maisi.config import parse_config
from maisi.device import free_memory, peak_memory, resolve_device, resolve_precision
from maisi.diffusion.guidance import guided
from maisi.diffusion.process import Process, process_from_config
from maisi.diffusion.sampler import Denoiser, sample
from maisi.errors import MaisiError
from maisi.generation import codec
from maisi.generation.job import Job, make_job, weights_used
from maisi.generation.memory import decoding_bytes, require_memory
from maisi.generation.output import Item
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.networks.controlnet import ControlNet
from maisi.networks.unet import UNet
from maisi.request import Request, item_seed
from maisi.volume import Volume
from maisi.weights.load import read_header
from maisi.weights.registry import ModelFolder, Part, find_model

Triple = tuple[int, int, int]
Progress = Callable[[str, int, int], None]
"""Called with the stage ("denoise", "decode"), steps done and steps in all."""


def load(name_or_folder: str | Path = "tiny", device: str = "auto", precision: str = "auto") -> Model:
    """Open a model: a carried one by name, or a folder with a `model.json`.

    Args:
        name_or_folder: which.
        device: "auto", "cpu", "cuda" or "mps".
        precision: "auto", "fp32" or "bf16"; auto is bf16 where the hardware multiplies it natively.

    Raises:
        MaisiError: no such model or device, or files that are not what `model.json` says.
    """
    return Model(find_model(name_or_folder), device, precision)


class Model:
    """Autoencoder, U-Net and, where there is one, ControlNet, with their process. Networks load when first needed."""

    def __init__(self, folder: ModelFolder, device: str = "auto", precision: str = "auto") -> None:
        self.folder = folder
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device)

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
        modality: str = "ct",
        steps: int | None = None,
        solver: str | None = None,
        guidance: float = 0.0,
        fov: Literal["given", "auto"] = "given",
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
            modality: see `anatomy.MODALITIES`.
            steps: denoising steps; None for the model's default.
            solver: name of the solver; None for the model's default.
            guidance: 0 is off. With a mask it strengthens the tumours: away from the same mask with the tumours
                replaced by their host organs. Without one it strengthens region and modality: away from none.
            fov: "auto" picks size and spacing from the regions.
            progress: told how far it is.

        Raises:
            MaisiError: something asked for cannot be made; said before any network runs.
        """
        wishes: dict[str, Any] = {
            "region": region,
            "size": size,
            "spacing": spacing,
            "seed": seed,
            "modality": modality,
        }
        wishes |= {"modality": modality, "steps": steps, "solver": solver, "guidance": guidance, "fov": fov}
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
        volume = mask if isinstance(mask, Volume) else None
        path = None if mask is None or isinstance(mask, Volume) else Path(mask)
        request = Request.parse(model=str(self.name), mask=path, **wishes)
        return make_job(request, self.folder.config, volume)

    def run(self, job: Job, numbers: Iterable[int], progress: Progress | None = None) -> Iterator[Item]:
        """Make the items of a job with these numbers, one at a time.

        Raises:
            MaisiError: as `prepare`.
        """
        self.prepare(job)
        return (self._item(job, number, progress or _silent) for number in numbers)

    def prepare(self, job: Job) -> None:
        """Check solver, steps and memory, then load what the job needs.

        Raises:
            MaisiError: the process has no such solver, or not so many steps; the memory does not suffice;
                guidance would have nothing to act on; a network's file is damaged.
        """
        if job.solver not in self.process.solvers:
            known = ", ".join(self.process.solvers)
            raise MaisiError(f"{job.solver!r} is no solver for {self.process.name}; choose one of {known}.")
        self.process.sampling_times(job.steps, 1)
        self._require_memory(job)
        if job.labels is not None:
            _ = self.controlnet
        multiple = self.autoencoder.config.compression * self.unet.config.size_multiple
        if any(n % multiple for n in job.padded):
            raise MaisiError(
                f"model.json of '{self.name}' says size_multiple {self.folder.config.size_multiple}, "
                f"but its networks need {multiple}; correct it there."
            )
        if job.request.guidance > 0 and job.labels is None:
            self._require_guidable(job)

    def noise(self, job: Job, number: int) -> tuple[Tensor, torch.Generator]:
        """Draw the starting noise of an item on the CPU, float32 `1 4 X/4 Y/4 Z/4`, and return its generator too."""
        generator = torch.Generator().manual_seed(item_seed(job.request.seed, number))
        config = self.autoencoder.config
        shape = (1, config.latent_channels, *(n // config.compression for n in job.padded))
        return torch.randn(shape, generator=generator), generator

    def denoiser(self, job: Job) -> Denoiser:
        """The networks with everything they are told, guided if the request says so."""
        bits = self._bits(job.padded_labels())
        conditional = self._conditioned(job.conditions, bits)
        if job.request.guidance == 0:
            return conditional
        if bits is not None:
            healthy = self._bits(job.padded_labels_without_tumors())
            if healthy is None:
                return conditional
            return guided(conditional, self._conditioned(job.conditions, healthy), job.request.guidance)
        modality = "unknown" if codec.is_mr(job.conditions.modality) else job.conditions.modality
        nothing = Conditions(job.conditions.spacing_mm, (), modality)
        return guided(conditional, self._conditioned(nothing, None), job.request.guidance)

    @torch.inference_mode()
    def _item(self, job: Job, number: int, progress: Progress) -> Item:
        started = time.perf_counter()
        noise, generator = self.noise(job, number)
        latent = sample(
            self.process,
            self.denoiser(job),
            noise.to(self.device),
            steps=job.steps,
            solver=job.solver,
            generators=[generator],
            progress=lambda done, steps: progress("denoise", done, steps),
        )
        denoised = time.perf_counter()
        progress("decode", 0, 1)
        values = codec.decode_tensor(self.autoencoder, latent / self.folder.config.scale_factor)
        image = job.place(codec.intensities(values, job.conditions.modality))
        progress("decode", 1, 1)
        timings = {"denoise": denoised - started, "decode": time.perf_counter() - denoised}
        return self._finished(job, number, image, timings)

    def _finished(self, job: Job, number: int, image: Volume, timings: Mapping[str, float]) -> Item:
        details = {
            "regions": list(job.conditions.regions),
            "size": list(job.size),
            "spacing_mm": list(job.conditions.spacing_mm),
            "steps": job.steps,
            "solver": job.solver,
            "device": str(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
            "notes": list(job.notes),
        }
        return Item(
            image=image,
            labels=job.labels,
            request=job.request,
            number=number,
            seed=item_seed(job.request.seed, number),
            timings_s={**timings, "total": sum(timings.values())},
            weights_sha256=weights_used(self.folder, job),
            peak_memory_bytes=peak_memory(self.device),
            details=details,
        )

    def _conditioned(self, conditions: Conditions, bits: Tensor | None) -> Denoiser:
        """The U-Net (and the ControlNet, with the bits of a mask) as a function of the noisy latent and the time."""
        arrays = stack([conditions])
        told = {name: torch.from_numpy(value).to(self.device) for name, value in vars(arrays).items()}
        modality = told["modality"]

        def denoise(x: Tensor, times: Tensor) -> Tensor:
            x = _channels_last(x.to(self.dtype))
            residuals = None if bits is None else self.controlnet(x, times, bits, modality=modality)
            prediction: Tensor = self.unet(x, times, **told, residuals=residuals)
            return prediction.float()

        return denoise

    def _bits(self, labels: np.ndarray[Any, np.dtype[np.uint8]] | None) -> Tensor | None:
        if labels is None:
            return None
        bits = torch.from_numpy(mask_bits(labels))[None].to(self.device, self.dtype)
        return _channels_last(bits)

    def _network(self, part: Part) -> nn.Module:
        return codec.fast_layout(self.folder.load(part, self.device, self.dtype))

    def _require_memory(self, job: Job) -> None:
        path = self.folder.path("autoencoder")
        config = parse_config(AutoencoderConfig, read_header(path).config, str(path))
        x, y, z = job.padded
        needed = decoding_bytes(config.channels, self.dtype.itemsize, x * y * z)
        multiple = self.folder.config.size_multiple
        require_memory(needed, free_memory(self.device), job.padded, multiple, "Generating")

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

    def forward(self, bits: Tensor) -> Tensor:
        """As the encoder; a tensor is encoded once as long as somebody holds it."""
        self._answers = [pair for pair in self._answers if pair[0]() is not None]
        for asked, answer in self._answers:
            if asked() is bits:
                return answer
        answer = cast(Tensor, self.encoder(bits))
        self._answers.append((weakref.ref(bits), answer))
        return answer


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def _silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""
