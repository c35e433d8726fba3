"""A segmenter trained on one's own cases: MONAI's SegResNet, as an independent judge. Knows no measure.

This is the only module that imports MONAI, inside its functions: the networks of the product are our own, and what
judges them comes from elsewhere. A trained segmenter is a folder with `segmenter.json` and `segmenter.safetensors`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from maisi.config import Config, parse_config
from maisi.data.preprocess import resample
from maisi.device import feature_layout, keep_freed_memory, placed, resolve_device, resolve_precision
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.segmentation_cases import (
    PatchConfig,
    Structures,
    TrainingCase,
    draw_patch,
    ids_of,
    in_order,
    likeliest,
    load_case,
    resampling_note,
)
from maisi.evaluation.trainer import ABOUT_FILE, Lesson, Report, read_about
from maisi.evaluation.volumes import Entry
from maisi.io.files import new_folder, sha256, write_json
from maisi.training.optimizer import OptimizerConfig
from maisi.training.state import (
    Checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    step_rng,
)
from maisi.volume import Volume
from maisi.weights.tensor_file import write_tensors

WEIGHTS_FILE = "segmenter.safetensors"

_WARM_UP = 0.05
"""Share of the steps in which the learning rate grows."""


class SegmenterConfig(Config):
    """What decides a trained segmenter, but for the cases.

    Attributes:
        spacing_mm: that images are resampled to.
        patch: how patches are drawn; the network sees boxes of this size, when it segments, too.
        batch: patches in a step.
        steps: of training.
        filters: channels at the full resolution; each further level has twice as many.
        blocks: residual blocks of each level on the way down.
        windows_hu: ranges of HU that the network sees, each as one channel from 0 to 1.
        learning_rate: of AdamW, at its highest; it falls to 0 along a cosine.
        background_weight: what a voxel of the background counts for in the cross entropy, against one of a structure:
            in few steps small structures are not found at all with 1.
        weight_decay: of AdamW.
        seed: of the weights and the patches.
        device: member of `device.DEVICES`.
        precision: member of `device.PRECISIONS`.
        checkpoint_every: steps after which an interrupted training goes on.
    """

    spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    patch: PatchConfig = PatchConfig()
    batch: int = Field(default=2, ge=1)
    steps: int = Field(default=1000, ge=1)
    filters: int = Field(default=8, ge=8, multiple_of=8)
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    windows_hu: tuple[tuple[float, float], ...] = ((-1000.0, 1000.0), (-160.0, 240.0))
    learning_rate: float = Field(default=5e-3, gt=0)
    background_weight: float = Field(default=0.2, gt=0, le=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    precision: str = "auto"
    checkpoint_every: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _sizes_fit(self) -> SegmenterConfig:
        factor = 2 ** (len(self.blocks) - 1)
        if any(n < factor or n % factor for n in self.patch.size):
            raise ValueError(f"a patch of {self.patch.size} voxels does not halve; give multiples of {factor}")
        if not all(0.3 <= s <= 20 for s in self.spacing_mm):
            raise ValueError(f"a spacing of {self.spacing_mm} mm is not usable; give three numbers from 0.3 to 20")
        return self


class About(Config):
    """What `segmenter.json` holds.

    Attributes:
        config: as it was trained.
        structures: name -> ids that count as it, in the order of the network's classes.
        trained_on: hash of each case and patient (`Entry.hash`, `Entry.patient_hash`).
        weights_sha256: of the other file.
    """

    version: Literal[1] = 1
    config: SegmenterConfig
    structures: dict[str, tuple[int, ...]]
    trained_on: tuple[str, ...]
    weights_sha256: str


def require_monai() -> None:
    """Refuse, before any work, where MONAI is not installed.

    Raises:
        MaisiError: so.
    """
    from importlib.util import find_spec

    if find_spec("monai") is None:
        raise MaisiError(
            "The trained segmenter needs MONAI, which is not installed; pip install 'maisi[segmentation]'."
        )


def train(
    folder: Path,
    config: SegmenterConfig,
    structures: Structures,
    cases: Sequence[TrainingCase],
    trained_on: Sequence[str],
    weights: Sequence[float] | None = None,
    report: Report | None = None,
) -> None:
    """Train a segmenter and write it to `folder`, which is new; an interrupted training goes on.

    Its checkpoints lie beside the folder until that is there.

    Args:
        folder: to make.
        config: how.
        structures: what it is to find.
        cases: to learn from.
        trained_on: hashes of the cases and their patients (`Lesson.learned_from`).
        weights: how often each case is drawn, relative to the others; None is alike.
        report: told after each step.

    Raises:
        MaisiError: MONAI is not there, no case holds any structure, or a place cannot be written to.
    """
    require_monai()
    at_work = folder.with_name(f"{folder.name}.training")
    training = _Training(config, structures, cases, trained_on, weights)
    start = training.resume(at_work)
    for step in range(start, config.steps):
        training.step(step)
        done = step + 1
        if done % config.checkpoint_every == 0 and done < config.steps:
            training.save(at_work, done)
        if report:
            report("train", done, config.steps)
    _write(folder, training.network, config, structures, trained_on)
    shutil.rmtree(at_work, ignore_errors=True)


class SegResNetTrainer:
    """A `trainer.Trainer`: the built-in one. It keeps the cases that it read in memory."""

    name = "segresnet"
    fewest = 1

    def __init__(self, config: SegmenterConfig) -> None:
        """Train as `config` says."""
        self.config = config
        self._read: dict[str, TrainingCase] = {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Trainer`."""
        return self.config.model_dump(mode="json")

    @property
    def effort(self) -> str:
        """See `Trainer`."""
        return f"{self.config.steps} steps of {self.config.batch} patch(es), with the same seed"

    def cautions(self, structures: Structures) -> tuple[str, ...]:
        """See `Trainer`."""
        return ()

    def prepare(
        self, entries: Sequence[Entry], structures: Structures, cache: Cache, report: Report | None = None
    ) -> tuple[str, ...]:
        """See `Trainer`."""
        cases = []
        for done, entry in enumerate(entries, 1):
            cases.append(self._case(entry, structures, cache))
            if report:
                report("read cases", done, len(entries))
        return resampling_note(cases)

    def trained(self, lesson: Lesson, cache: Cache, report: Report | None = None) -> TrainedSegmenter:
        """See `Trainer`."""
        structures, learned_from, odds = lesson.structures, lesson.learned_from, lesson.weights
        cases = [self._case(entry, structures, cache) for entry in lesson.entries]
        key = ["segmenter", self.settings, in_order(structures), learned_from, odds]
        folder = cache.path(key, lambda place: train(place, self.config, structures, cases, learned_from, odds, report))
        return TrainedSegmenter.open(folder)

    def _case(self, entry: Entry, structures: Structures, cache: Cache) -> TrainingCase:
        if entry.hash not in self._read:
            self._read[entry.hash] = load_case(entry, structures, self.config.spacing_mm, cache)
        return self._read[entry.hash]


class _Training:
    """Network, optimizer and data of one training; what a step does depends on its number and what was before."""

    def __init__(
        self,
        config: SegmenterConfig,
        structures: Structures,
        cases: Sequence[TrainingCase],
        trained_on: Sequence[str],
        weights: Sequence[float] | None,
    ) -> None:
        if not any(case.places for case in cases):
            raise MaisiError(f"No training case holds {', '.join(structures)}; name structures that are labelled.")
        from monai.losses.dice import DiceCELoss

        self.config, self.cases, self.trained_on = config, cases, list(trained_on)
        self.structures = in_order(structures)
        share = np.ones(len(cases)) if weights is None else np.asarray(weights, dtype=np.float64)
        self.odds = share / share.sum()
        self.running = _Running.of(config)
        self.network = self.running.placed(_network(config, len(structures) + 1)).train()
        counts = torch.tensor([config.background_weight, *(1.0 for _ in structures)], device=self.running.device)
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, weight=counts)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        warm = max(1, round(_WARM_UP * config.steps))
        self.schedule = OptimizerConfig(learning_rate=config.learning_rate, schedule="cosine", warmup_steps=warm)
        keep_freed_memory()

    def step(self, step: int) -> float:
        """Draw patches, move the weights, return the loss."""
        images, classes = self._patches(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step, self.config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.loss(self.running.logits(self.network, images), classes)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def _patches(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, windows, X, Y, Z) and classes (B, 1, X, Y, Z)."""
        rng = step_rng(self.config.seed, step, 0)
        chosen = rng.choice(len(self.cases), self.config.batch, p=self.odds)
        drawn = [draw_patch(self.cases[i], rng, self.config.patch) for i in chosen]
        images = np.stack([_windowed(image, self.config.windows_hu) for image, _ in drawn])
        classes = torch.from_numpy(np.stack([classes for _, classes in drawn])[:, None])
        return torch.from_numpy(images), classes.to(self.running.device)

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint."""
        tensors = {f"model.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        save_checkpoint(folder, step, Checkpoint(tensors, {"step": step, "config": self._identity}), keep=1)

    def resume(self, folder: Path) -> int:
        """Take over the newest checkpoint, if there is one, and return its step."""
        newest = newest_checkpoint(folder)
        if newest is None:
            return 0
        checkpoint = load_checkpoint(newest)
        if checkpoint.facts["config"] != self._identity:
            raise MaisiError(f"{folder} holds another training; remove it, or choose another folder.")
        self.network.load_state_dict(checkpoint.part("model."))
        load_optimizer_tensors(self.optimizer, checkpoint.part("optimizer."))
        return int(checkpoint.facts["step"])

    @property
    def _identity(self) -> Any:
        """What a training that goes on must have in common with the one that stopped."""
        config = self.config.model_dump(mode="json")
        return json.loads(json.dumps([config, self.structures, self.trained_on, list(self.odds)]))


@dataclass(frozen=True)
class _Running:
    """Where a network runs, and in which type."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format

    @classmethod
    def of(cls, config: SegmenterConfig) -> _Running:
        device = resolve_device(config.device)
        dtype = resolve_precision(config.precision, device)
        return cls(device, dtype, feature_layout(device, dtype))

    def placed(self, network: nn.Module) -> nn.Module:
        return placed(network, self.device, self.layout)

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Of images (B, windows, X, Y, Z): (B, classes, X, Y, Z), float32."""
        images = images.to(self.device).contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return network(images).float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TrainedSegmenter:
    """A `segmenters.Segmenter` from its folder; the weights are read when they are first needed.

    Attributes:
        folder: that `train` made.
        about: what it says of itself.
    """

    folder: Path
    about: About

    @classmethod
    def open(cls, folder: Path) -> TrainedSegmenter:
        """Read what it says of itself.

        Raises:
            MaisiError: it is no segmenter, its files do not belong together, or MONAI is not there.
        """
        path, weights = folder / ABOUT_FILE, folder / WEIGHTS_FILE
        about = parse_config(About, read_about(folder), str(path))
        if not weights.is_file() or sha256(weights) != about.weights_sha256:
            raise MaisiError(f"{weights} is missing or is not the one that {path} describes; train it anew.")
        require_monai()
        return cls(folder, about)

    def copy_to(self, folder: Path) -> None:
        """Copy its two files into an empty folder."""
        for name in (ABOUT_FILE, WEIGHTS_FILE):
            shutil.copyfile(self.folder / name, folder / name)

    @property
    def name(self) -> str:
        """See `Segmenter`."""
        config = self.about.config
        return f"SegResNet, {config.steps} steps, {self.about.weights_sha256[:12]}"

    @property
    def structures(self) -> Mapping[str, frozenset[int]]:
        """See `Segmenter`."""
        return {name: frozenset(ids) for name, ids in self.about.structures.items()}

    @property
    def trained_on(self) -> tuple[str, ...]:
        """See `Segmenter`."""
        return self.about.trained_on

    def __call__(self, ct: Volume) -> Volume:
        """See `Segmenter`; of a structure with several ids, the lowest is written."""
        hu = ct.to_ras()
        hu = hu.with_array(np.asarray(hu.array, dtype=np.float32))
        coarse = resample(hu, self.about.config.spacing_mm)
        shares = self._shares(coarse.array)
        classes = likeliest((Volume(share, coarse.affine) for share in shares[1:]), ct)
        return Volume(ids_of(classes, self.about.structures), ct.affine)

    @torch.inference_mode()
    def _shares(self, hu: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probability of each class in each voxel: (classes, X, Y, Z)."""
        from monai.inferers.utils import sliding_window_inference

        config = self.about.config
        images = torch.from_numpy(_windowed(hu, config.windows_hu))[None]
        logits = sliding_window_inference(
            images, config.patch.size, 1, self._logits, overlap=0.25, mode="gaussian", padding_mode="constant"
        )
        assert isinstance(logits, Tensor)
        shares: NDArray[np.float32] = logits.softmax(dim=1)[0].cpu().numpy()
        return shares

    def _logits(self, images: Tensor) -> Tensor:
        """On the device of the images, where what is put together from windows lies."""
        running, network = self._network
        return running.logits(network, images).to(images.device)

    @cached_property
    def _network(self) -> tuple[_Running, nn.Module]:
        from safetensors.torch import load_file

        running = _Running.of(self.about.config)
        network = _network(self.about.config, len(self.about.structures) + 1)
        network.load_state_dict(load_file(self.folder / WEIGHTS_FILE))
        return running, running.placed(network).eval()


def _network(config: SegmenterConfig, classes: int) -> nn.Module:
    """A SegResNet with random weights, the same for the same seed; torch's own state of chance is left as it was."""
    from monai.networks.nets.segresnet import SegResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network: nn.Module = SegResNet(
            init_filters=config.filters,
            in_channels=len(config.windows_hu),
            out_channels=classes,
            blocks_down=config.blocks,
            blocks_up=(1,) * (len(config.blocks) - 1),
        )
    return network


def _windowed(hu: NDArray[np.float32], windows: Sequence[tuple[float, float]]) -> NDArray[np.float32]:
    """(X, Y, Z) HU to (windows, X, Y, Z) in [0, 1]; air is 0 in each, as what lies outside the image is."""
    return np.stack([np.clip((hu - low) / (high - low), 0, 1) for low, high in windows]).astype(np.float32, copy=False)


def _write(
    folder: Path, network: nn.Module, config: SegmenterConfig, structures: Structures, trained_on: Sequence[str]
) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with new_folder(folder) as part:
        write_tensors(part / WEIGHTS_FILE, tensors, {"network": "MONAI SegResNet"})
        about = About(
            config=config,
            structures={name: tuple(sorted(ids)) for name, ids in structures.items()},
            trained_on=tuple(sorted(trained_on)),
            weights_sha256=sha256(part / WEIGHTS_FILE),
        )
        write_json(part / ABOUT_FILE, about.model_dump(mode="json"))
