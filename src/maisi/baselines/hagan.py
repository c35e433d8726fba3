"""HA-GAN (Sun et al. 2022): adversarial training on a small image and one stretch of the full one at a time.

Each step draws a batch, a stretch and latent vectors, and moves the discriminators, then the generators, then the
encoders. The losses are the published ones: logistic for the discriminators, L1 for the way there and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional as F

from maisi.baselines.hagan_networks import SCALE, Critic, Encoder, Generator, HaganConfig
from maisi.baselines.images import GridConfig, GridImages, shown
from maisi.baselines.trained import Progress, save_trained
from maisi.config import Config
from maisi.device import feature_layout, placed, resolve_device
from maisi.errors import MaisiError
from maisi.training.loop import LoopConfig
from maisi.training.optimizer import OptimizerConfig, Trainee
from maisi.training.pictures import three_planes
from maisi.training.state import Checkpoint, step_generator

PUBLISHED = OptimizerConfig(learning_rate=1e-4, betas=(0.0, 0.999), clip=0.0)
"""What the published training used for generators and encoders."""


class HaganRun(Config):
    """A complete training of HA-GAN.

    Attributes:
        data: prepared folder (`maisi prepare`).
        grid: what the networks see of a case, and make.
        adversarial_weight: of the discriminators' word in the generators' loss.
        reconstruction_weight: of the way there and back in the generators' loss. The published training has 0:
            encoders follow the generators, which follow the discriminators alone. Short trainings gain from more.
        optimizer: of the generators.
        encoder_optimizer: of the encoders.
        critic_optimizer: of the discriminators.
        validation_batches: batches over which the held-out reconstruction is averaged, always the same ones.
    """

    data: Path
    loop: LoopConfig
    grid: GridConfig = GridConfig()
    model: HaganConfig = HaganConfig()
    batch_size: PositiveInt = 4
    adversarial_weight: float = Field(default=1.0, ge=0)
    reconstruction_weight: float = Field(default=0.0, ge=0)
    optimizer: OptimizerConfig = PUBLISHED
    encoder_optimizer: OptimizerConfig = PUBLISHED
    critic_optimizer: OptimizerConfig = PUBLISHED.model_copy(update={"learning_rate": 4e-4})
    validation_batches: PositiveInt = 4

    @model_validator(mode="after")
    def _check(self) -> HaganRun:
        self.grid.require_multiple(self.model.size_multiple)
        if self.grid.size[2] % self.model.stretch:
            raise ValueError(f"grid.size[2] must be a multiple of model.stretch ({self.model.stretch})")
        if any(o.accumulate != 1 for o in (self.optimizer, self.encoder_optimizer, self.critic_optimizer)):
            raise ValueError("gradients of several batches cannot be accumulated here; leave accumulate at 1")
        return self


@dataclass(frozen=True)
class Stretch:
    """Rows of features, and the voxels along Z of the full image made of them."""

    first: int
    rows: int
    all_rows: int

    @property
    def place(self) -> float:
        """Where it lies, from 0 (bottom) to 1 (top)."""
        return self.first / max(1, self.all_rows - self.rows)

    def of_features(self, features: Tensor) -> Tensor:
        """Cut features `B C X/4 Y/4 Z/4`."""
        return features[..., self.first : self.first + self.rows]

    def of_image(self, image: Tensor) -> Tensor:
        """Cut a full image `B 1 X Y Z`."""
        return image[..., SCALE * self.first : SCALE * (self.first + self.rows)]


class HaganStage:
    """See `maisi.training.loop.Stage`."""

    def __init__(self, run: HaganRun) -> None:
        self.run, self.seed = run, run.loop.seed
        self.device = resolve_device(run.loop.device)
        self.layout = feature_layout(self.device, run.loop.dtype)
        self.images, self.held_out = (
            GridImages(run.data, split, run.grid, run.loop.seed) for split in ("train", "validation")
        )
        size, steps = run.grid.size, run.loop.steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.loop.seed)
            self.generator = placed(Generator(run.model, size), self.device, self.layout)
            self.encoder = placed(Encoder(run.model, size), self.device, self.layout)
            self.critic = placed(Critic(run.model, size), self.device, self.layout)
        self.makers = Trainee("generator", self.generator, run.optimizer, steps)
        self.encoders = Trainee("encoder", self.encoder, run.encoder_optimizer, steps)
        self.critics = Trainee("critic", self.critic, run.critic_optimizer, steps)

    def batch(self, step: int) -> Tensor:
        """Whole images, `B 1 X Y Z`."""
        return self.images.batch(step, self.run.batch_size)

    def update(self, batch: Tensor, step: int) -> Mapping[str, float]:
        """One step of the discriminators, one of the generators, one of the encoders."""
        generator = step_generator(self.seed, step, stream=1)
        stretch = self.stretch(generator)
        latent = torch.randn((len(batch), self.run.model.latent), generator=generator).to(self.device)
        x = batch.to(self.device).contiguous(memory_format=self.layout)
        real = small_of(x), stretch.of_image(x)
        with self.run.loop.autocast(self.device):
            features = self.generator.features(latent)
            made = self.generator.small_image(features), self.generator.full_image(stretch.of_features(features))
        terms = {"critic": self._criticise(real, made, stretch, step)}
        terms["adversarial"] = self._persuade(made, stretch)
        terms |= self._reconstruct(x, stretch)
        terms["gradient"] = self.makers.apply(step)
        terms["encoder_gradient"] = self.encoders.apply(step)
        return terms

    def stretch(self, generator: torch.Generator) -> Stretch:
        """Draw a stretch."""
        rows, all_rows = self.run.model.rows, self.run.grid.size[2] // SCALE
        return Stretch(int(torch.randint(all_rows - rows + 1, (), generator=generator)), rows, all_rows)

    def reconstructions(
        self, generator: Generator, encoder: Encoder, x: Tensor, stretch: Stretch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """L1 of the way there and back, from a stretch's features and from the latent vector; and that vector.

        The whole image's features are encoded stretch by stretch and without gradients, as published.
        """
        part, length = stretch.of_image(x), self.run.model.stretch
        pieces = [x[..., start : start + length] for start in range(0, x.shape[-1], length)]
        with torch.no_grad(), self.run.loop.autocast(self.device):
            features = torch.cat([encoder.features(piece) for piece in pieces], -1)
        with self.run.loop.autocast(self.device):
            back = generator.full_image(encoder.features(part))
            latent = encoder(features)
            again = generator.features(latent)
            small, full = generator.small_image(again), generator.full_image(stretch.of_features(again))
        whole = F.l1_loss(small.float(), small_of(x)) + F.l1_loss(full.float(), part)
        return {"stretch_l1": F.l1_loss(back.float(), part), "whole_l1": whole / 2}, latent.float()

    def _criticise(
        self, real: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor], stretch: Stretch, step: int
    ) -> float:
        small, full = (image.detach() for image in made)
        with self.run.loop.autocast(self.device):
            on_real, on_made = self.critic(*real, stretch.place), self.critic(small, full, stretch.place)
        loss = F.softplus(-on_real.float()).mean() + F.softplus(on_made.float()).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.critics.apply(step)
        return float(loss.detach())

    def _persuade(self, made: tuple[Tensor, Tensor], stretch: Stretch) -> float:
        self.critic.requires_grad_(False)
        with self.run.loop.autocast(self.device):
            scores = self.critic(*made, stretch.place)
        loss = self.run.adversarial_weight * F.softplus(-scores.float()).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.critic.requires_grad_(True)
        return float(loss.detach())

    def _reconstruct(self, x: Tensor, stretch: Stretch) -> dict[str, float]:
        """Add to the encoders' gradients, and to the generators' where they listen."""
        weight = self.run.reconstruction_weight
        self.generator.requires_grad_(weight > 0)
        terms, _ = self.reconstructions(self.generator, self.encoder, x, stretch)
        ((weight or 1.0) * torch.stack(list(terms.values())).sum()).backward()  # type: ignore[no-untyped-call]
        self.generator.requires_grad_(True)
        return {name: float(value.detach()) for name, value in terms.items()}

    @torch.no_grad()
    def validate(self, step: int) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
        """Reconstruction of held-out images by the averaged weights; two samples, and an image and its way back."""
        generator, encoder = self._averaged()
        sums: dict[str, float] = {}
        count = self.run.validation_batches
        for index in range(count):
            x = self.held_out.batch(index, self.run.batch_size).to(self.device)
            terms, latent = self.reconstructions(generator, encoder, x, self.stretch(step_generator(0, index, 3)))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value) / count
        drawn = torch.randn((2, self.run.model.latent), generator=step_generator(0, 0, stream=4)).to(self.device)
        samples, back = generator(drawn), generator(latent[:1])
        rows = [three_planes(shown(image[0]).float()) for image in samples]
        pair = [three_planes(shown(image[0, 0]).float()) for image in (x, back)]
        return sums, {"sample": torch.cat(rows, 1), "reconstruction": torch.cat(pair, 1)}

    def checkpoint(self) -> Checkpoint:
        """All networks and their optimizers."""
        return Checkpoint({**self.makers.tensors(), **self.encoders.tensors(), **self.critics.tensors()}, {})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `checkpoint`."""
        for trainee in (self.makers, self.encoders, self.critics):
            trainee.restore(dict(checkpoint.tensors))

    def export(self, folder: Path) -> None:
        """Write the generators' averaged weights with the run's settings."""
        save_trained(folder, "hagan", self.makers.ema.values, self.run)

    def _averaged(self) -> tuple[Generator, Encoder]:
        generator = Generator(self.run.model, self.run.grid.size)
        encoder = Encoder(self.run.model, self.run.grid.size)
        generator.load_state_dict(self.makers.ema.values)
        encoder.load_state_dict(self.encoders.ema.values)
        return placed(generator, self.device, self.layout), placed(encoder, self.device, self.layout)


class HaganMaker:
    """See `maisi.baselines.trained.Maker`."""

    def __init__(self, run: HaganRun, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.run, self.device, self.dtype = run, device, dtype
        network = Generator(run.model, run.grid.size)
        network.load_state_dict(dict(tensors))
        self.network = placed(network.eval(), device, feature_layout(device, dtype), dtype)

    def make(self, generator: torch.Generator, steps: int | None, solver: str | None, progress: Progress) -> Tensor:
        """The whole full image, by G^A and G^H."""
        latent = torch.randn((1, self.run.model.latent), generator=generator)
        image: Tensor = self.network(latent.to(self.device, self.dtype))
        progress(1, 1)
        return image[0].float()


def refuse_sampling(run: HaganRun, steps: int | None, solver: str | None) -> None:
    """Refuse steps and solvers, which a diffusion process has.

    Raises:
        MaisiError: one is asked for.
    """
    if steps is not None or solver is not None:
        raise MaisiError("HA-GAN makes a volume in one go; leave steps and solver out.")


def small_of(image: Tensor) -> Tensor:
    """The small image of a full one: the mean of each 4 x 4 x 4 voxels."""
    return F.avg_pool3d(image, SCALE)
