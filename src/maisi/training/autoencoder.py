"""The autoencoder stage: L1 + perceptual + KL + adversarial loss on patches (paper, section 3.1, equation 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from maisi.config import Config
from maisi.data.prepared import PreparedCase, PreparedFolder
from maisi.device import feature_layout, placed, resolve_device
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.networks.discriminator import DiscriminatorConfig, PatchDiscriminator
from maisi.training.initial import load_initial
from maisi.training.linear_start import require_components, start_as_components
from maisi.training.loop import LoopConfig
from maisi.training.losses import adversarial, perceptual
from maisi.training.optimizer import OptimizerConfig, Trainee
from maisi.training.patches import PatchConfig, PatchSource
from maisi.training.perceptual import FeatureName, Features, load_features
from maisi.training.splitting import SplittingConfig, coding_for
from maisi.training.state import Checkpoint, step_generator
from maisi.weights.load import save_network


class AutoencoderLosses(Config):
    """Weights of the terms; the defaults are the paper's.

    Attributes:
        perceptual_slices: slices of each axis that the perceptual loss looks at.
        adversarial_start: step at which the discriminator joins; until then its weight is 0.
        adversarial_ramp: steps over which its weight then grows to the full one.
        equivariance: share of the steps in which latent and image are both halved in size before they are compared
            (Kouzelis et al. 2025, EQ-VAE). It smooths the latents, which diffusion then learns faster.
    """

    perceptual: float = Field(default=0.3, ge=0)
    perceptual_features: FeatureName = "efficientnet-lite0"
    perceptual_slices: int = Field(default=2, ge=1)
    kl: float = Field(default=1e-7, ge=0)
    adversarial: float = Field(default=0.1, ge=0)
    adversarial_start: int = Field(default=1000, ge=0)
    adversarial_ramp: int = Field(default=500, ge=1)
    equivariance: float = Field(default=0.0, ge=0, le=1)

    def adversarial_weight(self, step: int) -> float:
        """Weight of the adversarial term in a step."""
        return self.adversarial * min(1.0, max(0.0, (step - self.adversarial_start) / self.adversarial_ramp))


class AutoencoderRun(Config):
    """A complete training of the autoencoder.

    Attributes:
        data: prepared folder (`maisi prepare`).
        init: weights to start from; none starts anew.
        start: without `init`: at `random`, or as block PCA (`components`, see `linear_start`), which comes to finer
            details in less time and wants a small learning rate.
        decoder_only: leave the encoder as it is, so that latents cached with it stay valid: a sharper decoder
            (perceptual and adversarial losses) can be trained beside the diffusion stage.
        validation_size: voxels of the centre crop that each validation case contributes.
    """

    data: Path
    loop: LoopConfig
    init: Path | None = None
    start: Literal["random", "components"] = "random"
    decoder_only: bool = False
    model: AutoencoderConfig = AutoencoderConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    patches: PatchConfig = PatchConfig()
    splitting: SplittingConfig = SplittingConfig()
    losses: AutoencoderLosses = AutoencoderLosses()
    optimizer: OptimizerConfig = OptimizerConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig()
    validation_cases: int = Field(default=4, ge=1)
    validation_size: tuple[int, int, int] = (96, 96, 96)

    @model_validator(mode="after")
    def _check(self) -> AutoencoderRun:
        if self.start == "components" and self.init is None:
            require_components(self.model)
        return self


def quieten(model: Autoencoder) -> None:
    """Start with small latent noise (standard deviation about e^-4).

    At random initial weights the noise would be 1, larger than the means: the decoder would first learn to ignore its
    input. The KL term lets the noise grow to where it belongs.
    """
    with torch.no_grad():
        model.quant_conv_log_sigma.weight.mul_(0.1)
        assert model.quant_conv_log_sigma.bias is not None
        model.quant_conv_log_sigma.bias.sub_(8.0)


def freeze_encoder(model: Autoencoder) -> None:
    """Train the decoder alone, so that latents stay what they are."""
    for part in (model.encoder, model.quant_conv_mu, model.quant_conv_log_sigma):
        part.requires_grad_(False)


class AutoencoderStage:
    """See `maisi.training.loop.Stage`."""

    def __init__(self, run: AutoencoderRun) -> None:
        self.run = run
        self.device = resolve_device(run.loop.device)
        self.folder = PreparedFolder(run.data)
        self.source = PatchSource(self.folder, "train", run.patches, run.loop.seed)
        if run.loop.validate_every and not self.folder.cases("validation"):
            raise MaisiError(
                f"{run.data} has no validation cases; prepare more patients, or set loop.validate_every to 0."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.loop.seed)
            model = _initial(run, self.source)
            discriminator = PatchDiscriminator(run.discriminator)
        _require_sizes(run, model.config.compression)
        if run.decoder_only:
            freeze_encoder(model)
        shape = (run.patches.batch_size, model.config.in_channels, *run.patches.size)
        self.coding = coding_for(run.splitting, model.config, shape, self.device, run.loop.dtype)
        self.layout = feature_layout(self.device, run.loop.dtype)
        self.model = placed(model, self.device, self.layout)
        self.trainee = Trainee("autoencoder", self.model, run.optimizer, run.loop.steps)
        discriminator = placed(discriminator, self.device, self.layout)
        self.judge = Trainee("discriminator", discriminator, run.discriminator_optimizer, run.loop.steps)
        self.features: Features | None = None
        if run.losses.perceptual:
            self.features = load_features(run.losses.perceptual_features)
            if isinstance(self.features, torch.nn.Module):
                self.features.to(self.device)

    def batch(self, step: int) -> list[Tensor]:
        """One tensor `B 1 X Y Z` for each accumulated batch."""
        count = self.run.optimizer.accumulate
        return [self.source.batch(step * count + i) for i in range(count)]

    def update(self, batch: list[Tensor], step: int) -> Mapping[str, float]:
        """One step of the autoencoder and, once the warm-up is over, one of the discriminator."""
        weight = self.run.losses.adversarial_weight(step)
        sums: dict[str, float] = {}
        for part, images in enumerate(batch):
            x = images.to(self.device).contiguous(memory_format=self.layout)
            generator = step_generator(self.run.loop.seed, step * len(batch) + part, stream=1)
            output, target, terms = self._generator_loss(x, generator, weight)
            if weight > 0:
                terms["discriminator"] = self._discriminator_loss(target, output.detach(), len(batch))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / len(batch)
        sums["gradient"] = self.trainee.apply(step)
        if weight > 0:
            self.judge.apply(step)
        return sums

    def _generator_loss(
        self, x: Tensor, generator: torch.Generator, adversarial_weight: float
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Backpropagate; return the reconstruction, what it should be, and the terms."""
        losses = self.run.losses
        halved = bool(torch.rand((), generator=generator) < losses.equivariance)
        with self.run.loop.autocast(self.device):
            distribution = self.coding.encode(self.model, x)
            z = distribution.sample(generator)
            output = self.coding.decode(self.model, F.avg_pool3d(z, 2) if halved else z).float()
        if halved:
            x = F.avg_pool3d(x, 2)
        terms = {"l1": F.l1_loss(output, x), "kl": losses.kl * distribution.kl().float()}
        if self.features is not None:
            positions = torch.rand(losses.perceptual_slices, generator=generator)
            terms["perceptual"] = losses.perceptual * perceptual(self.features, output, x, positions)
        if adversarial_weight > 0:
            self.judge.module.requires_grad_(False)
            with self.run.loop.autocast(self.device):
                scores = self.judge.module(output)
            terms["adversarial"] = adversarial_weight * adversarial(scores.float(), real=True)
            self.judge.module.requires_grad_(True)
        (torch.stack(list(terms.values())).sum() / self.run.optimizer.accumulate).backward()  # type: ignore[no-untyped-call]
        return output, x, {name: float(value.detach()) for name, value in terms.items()}

    def _discriminator_loss(self, real: Tensor, made: Tensor, parts: int) -> float:
        with self.run.loop.autocast(self.device):
            on_real, on_made = self.judge.module(real), self.judge.module(made)
        loss = 0.5 * (adversarial(on_real.float(), True) + adversarial(on_made.float(), False))
        (loss / parts).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, step: int) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
        """PSNR and mean absolute error in HU of the averaged weights, and input over output over difference."""
        model = placed(Autoencoder(self.model.config), self.device, self.layout)
        model.load_state_dict(self.trainee.ema.values)
        errors: list[tuple[float, float]] = []
        columns: list[Tensor] = []
        cases = self.folder.cases("validation")
        stride = max(1, len(cases) // self.run.validation_cases)
        for case in cases[::stride][: self.run.validation_cases]:
            x = self._centre(case).to(self.device)
            y = self.coding.decode(model, self.coding.encode(model, x).mean).clamp(0, 1)
            errors.append((float((x - y).square().mean()), float((x - y).abs().mean())))
            middle = [t[0, 0, :, t.shape[3] // 2, :].flip(1).T for t in (x, y, 0.5 + 2 * (y - x))]
            columns.append(torch.cat([_square(m) for m in middle], 0))
        psnr = float(np.mean([-10 * np.log10(max(mse, 1e-12)) for mse, _ in errors]))
        mae = float(np.mean([mean for _, mean in errors])) * 2000
        picture = torch.cat(columns, 1)[None].expand(3, -1, -1).cpu()
        return {"psnr": psnr, "mae_hu": mae}, {"reconstruction": picture}

    def _centre(self, case: PreparedCase) -> Tensor:
        image = self.folder.image(case)
        multiple = self.model.config.compression
        index = []
        for n, wanted in zip(image.shape, self.run.validation_size, strict=True):
            size = min(n, wanted) // multiple * multiple
            index.append(slice((n - size) // 2, (n - size) // 2 + size))
        return torch.from_numpy(case.network_values(image[tuple(index)]))[None, None]

    def checkpoint(self) -> Checkpoint:
        """Both networks and their optimizers."""
        return Checkpoint({**self.trainee.tensors(), **self.judge.tensors()}, {})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `checkpoint`."""
        self.trainee.restore(dict(checkpoint.tensors))
        self.judge.restore(dict(checkpoint.tensors))

    def export(self, folder: Path) -> None:
        """Write `autoencoder.safetensors` with the averaged weights."""
        model: Any = Autoencoder(self.model.config)
        model.load_state_dict(self.trainee.ema.values)
        save_network(folder / "autoencoder.safetensors", model)


BATCHES_FOR_COMPONENTS = 32


def _initial(run: AutoencoderRun, source: PatchSource) -> Autoencoder:
    if run.init is None:
        model = Autoencoder(run.model)
        if run.start == "components":
            start_as_components(model, torch.cat([source.batch(step) for step in range(BATCHES_FOR_COMPONENTS)]))
        else:
            quieten(model)
        return model
    loaded = load_initial(run.init, "autoencoder", run)
    assert isinstance(loaded, Autoencoder)
    return loaded


def _require_sizes(run: AutoencoderRun, compression: int) -> None:
    """Refuse patches that a step could not use.

    Raises:
        MaisiError: so.
    """
    halved = 2 if run.losses.equivariance else 1
    multiple, least = compression * halved, run.discriminator.smallest_size * halved
    if any(n % multiple for n in run.patches.size):
        raise MaisiError(f"patches.size is {run.patches.size}; give multiples of {multiple}.")
    if run.losses.adversarial_weight(run.loop.steps - 1) and min(run.patches.size) < least:
        raise MaisiError(
            f"patches.size is {run.patches.size}, and the discriminator needs {least} voxels along each axis; give "
            "larger patches, fewer discriminator.num_layers, or losses.adversarial: 0."
        )


def _square(picture: Tensor) -> Tensor:
    """Bring a picture `H W` to 128 x 128."""
    return F.interpolate(picture[None, None], size=(128, 128))[0, 0]
