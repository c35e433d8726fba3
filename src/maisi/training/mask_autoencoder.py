"""The mask autoencoder stage: label maps as bits in, each voxel's class out; cross-entropy, Dice and a little KL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from maisi.conditions import MASK_BITS
from maisi.config import Config
from maisi.data.mask_codes import METADATA_KEY, MaskCodes, codes_of, released_codes
from maisi.data.mask_maps import Labels, MaskMaps, MaskMapsConfig
from maisi.device import feature_layout, placed, resolve_device
from maisi.errors import MaisiError
from maisi.networks.autoencoder import MASK_AUTOENCODER, Autoencoder, AutoencoderConfig
from maisi.training.autoencoder import quieten
from maisi.training.initial import require_model
from maisi.training.latents import mask_tensor
from maisi.training.loop import LoopConfig
from maisi.training.losses import classification
from maisi.training.optimizer import OptimizerConfig, Trainee
from maisi.training.pictures import label_planes
from maisi.training.state import Checkpoint, step_generator, step_rng
from maisi.weights.load import load_network, read_header, save_network

Triple = tuple[PositiveInt, PositiveInt, PositiveInt]


class MaskAutoencoderRun(Config):
    """A complete training of the mask autoencoder.

    Attributes:
        data: prepared folder (`maisi prepare`); none trains on the phantoms of `maps` alone.
        init: weights to start from; none starts at random.
        labels: label id of each output channel, 0 among them; none is the released table of 125.
        coarsen: ids that `labels` lacks count as unnamed bone (133) if they are bones and it is listed, else as body
            (200); off, they are an error.
        patch: voxels of the patches that are cut out of the maps at random; none takes whole maps.
        dice: weight of the Dice term.
        kl: weight of the KL term.
        validation_maps: maps over which validation averages.
    """

    loop: LoopConfig
    data: Path | None = None
    init: Path | None = None
    labels: tuple[int, ...] | None = None
    coarsen: bool = False
    model: AutoencoderConfig = MASK_AUTOENCODER
    maps: MaskMapsConfig = MaskMapsConfig()
    patch: Triple | None = None
    batch_size: int = Field(default=1, ge=1)
    dice: float = Field(default=1.0, ge=0)
    kl: float = Field(default=1e-7, ge=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    validation_maps: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _check(self) -> MaskAutoencoderRun:
        if self.model.in_channels != MASK_BITS:
            raise ValueError(f"model.in_channels must be {MASK_BITS}, the bits of a label id")
        if self.model.out_channels != len(self.codes.ids):
            raise ValueError(f"model.out_channels must be {len(self.codes.ids)}, one for each label")
        sizes = (*self.maps.size, *(self.patch or ()))
        if any(n % self.model.compression for n in sizes):
            raise ValueError(f"maps.size and patch must be multiples of {self.model.compression}")
        if any(part > whole for part, whole in zip(self.patch or (), self.maps.size, strict=False)):
            raise ValueError("patch must not be larger than maps.size")
        return self

    @property
    def codes(self) -> MaskCodes:
        """The table of labels."""
        return released_codes() if self.labels is None else MaskCodes(self.labels)


class MaskAutoencoderStage:
    """See `maisi.training.loop.Stage`. A batch is a tuple of label maps `B X Y Z` uint8, one for each accumulation."""

    def __init__(self, run: MaskAutoencoderRun) -> None:
        self.run, self.codes = run, run.codes
        self.device = resolve_device(run.loop.device)
        self.maps = MaskMaps(run.maps, run.data, "train", run.loop.seed)
        self.held_out = MaskMaps(run.maps, run.data, "validation", run.loop.seed)
        self.layout = feature_layout(self.device, run.loop.dtype)
        self.model = placed(_initial(run), self.device, self.layout)
        self.trainee = Trainee("mask_autoencoder", self.model, run.optimizer, run.loop.steps)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Label maps of one step."""
        rng = step_rng(self.run.loop.seed, step, stream=0)
        return tuple(self._drawn(rng) for _ in range(self.run.optimizer.accumulate))

    def _drawn(self, rng: np.random.Generator) -> Tensor:
        items = []
        for _ in range(self.run.batch_size):
            map = self.maps[int(rng.integers(len(self.maps)))]
            labels = self._listed(self.maps.mirrored(map, wanted=bool(rng.random() < 0.5)))
            items.append(torch.from_numpy(_patch(labels, self.run.patch, rng)))
        return torch.stack(items)

    def _listed(self, labels: Labels) -> Labels:
        if self.run.coarsen:
            return self.codes.coarse(labels)
        self.codes.channels(labels)  # an id without a channel is an error here, in words
        return labels

    def update(self, batch: tuple[Tensor, ...], step: int) -> Mapping[str, float]:
        """Make one optimizer step."""
        sums: dict[str, float] = {}
        for part, labels in enumerate(batch):
            generator = step_generator(self.run.loop.seed, step * len(batch) + part, stream=1)
            terms = self._losses(labels, generator)
            (torch.stack(list(terms.values())).sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batch)
        return {**sums, "gradient": self.trainee.apply(step)}

    def _losses(self, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        with self.run.loop.autocast(self.device):
            distribution = self.model.encode(self._bits(labels))
            logits = self.model.decode(distribution.sample(generator))
        classes = torch.from_numpy(self.codes.channels(labels.numpy())).to(self.device)
        terms = classification(logits.float(), classes, self.run.dice)
        return {**terms, "kl": self.run.kl * distribution.kl().float()}

    def _bits(self, labels: Tensor) -> Tensor:
        return mask_tensor(labels).to(self.device).contiguous(memory_format=self.layout)

    @torch.no_grad()
    def validate(self, step: int) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
        """Dice averaged over the labels of held-out maps (background apart), and those maps over their copies."""
        model = placed(self._averaged(), self.device, self.layout)
        scores, columns = [], []
        for number in range(min(len(self.held_out), self.run.validation_maps)):
            truth = torch.from_numpy(self._listed(self.held_out[number].labels))[None]
            with self.run.loop.autocast(self.device):
                channels = model.decode(model.encode(self._bits(truth)).mean).argmax(1).cpu()
            copy = torch.from_numpy(self.codes.labels(channels.numpy()))
            scores.append(mean_dice(truth, copy))
            columns.append(torch.cat([label_planes(truth[0]), label_planes(copy[0])], 1))
        return {"label_dice": float(np.mean(scores))}, {"reconstruction": torch.cat(columns[:2], 2)}

    def checkpoint(self) -> Checkpoint:
        """The network and its optimizer."""
        return Checkpoint(self.trainee.tensors(), {})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `checkpoint`."""
        self.trainee.restore(dict(checkpoint.tensors))

    def export(self, folder: Path) -> None:
        """Write `mask_autoencoder.safetensors` with the averaged weights and the table of labels."""
        metadata = {METADATA_KEY: json.dumps(self.codes.ids)}
        save_network(folder / "mask_autoencoder.safetensors", self._averaged(), metadata=metadata)

    def _averaged(self) -> Autoencoder:
        model = Autoencoder(self.model.config)
        model.load_state_dict(self.trainee.ema.values)
        return model


def load_mask_autoencoder(path: Path) -> tuple[Autoencoder, MaskCodes]:
    """Load a mask autoencoder and its table of labels.

    Raises:
        MaisiError: the file holds something else.
    """
    header = read_header(path)
    loaded = load_network(path, network="autoencoder")
    assert isinstance(loaded, Autoencoder)
    if loaded.config.in_channels != MASK_BITS:
        raise MaisiError(f"{path} is an autoencoder of images, not of label maps; name a mask autoencoder.")
    return loaded.requires_grad_(False), codes_of(header.metadata, loaded.config.out_channels, str(path))


def mean_dice(truth: Tensor, other: Tensor) -> float:
    """Dice averaged over the ids of `truth` (any shape, uint8), background apart; 1 where there are none."""
    counts = [torch.bincount(x.flatten().long(), minlength=256).double() for x in (truth, other, truth[truth == other])]
    there = counts[0] > 0
    there[0] = False
    dice = 2 * counts[2] / (counts[0] + counts[1])
    return float(dice[there].mean()) if there.any() else 1.0


def _patch(labels: Labels, size: tuple[int, int, int] | None, rng: np.random.Generator) -> Labels:
    """Cut a patch at a random place."""
    if size is None:
        return labels
    starts = [int(rng.integers(have - want + 1)) for have, want in zip(labels.shape, size, strict=True)]
    return np.ascontiguousarray(labels[tuple(slice(s, s + n) for s, n in zip(starts, size, strict=True))])


def _initial(run: MaskAutoencoderRun) -> Autoencoder:
    if run.init is not None:
        model, codes = load_mask_autoencoder(run.init)
        if codes != run.codes:
            raise MaisiError(f"{run.init} has another table of labels than the run; give it the same or no `init`.")
        require_model(run.init, model, run)
        return model.requires_grad_(True).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.loop.seed)
        model = Autoencoder(run.model)
    quieten(model)
    return model
