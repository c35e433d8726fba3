"""Small prepared folders, latents and run configurations: every stage runs its real code in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maisi.data.mask_maps import MaskMapsConfig
from maisi.data.prepared import PreparedCase, PreparedFolder, PreparedIndex
from maisi.data.views import TumorViews, ViewConfig, cache_latents
from maisi.io.files import INDEX, write_json
from maisi.networks.autoencoder import AutoencoderConfig
from maisi.networks.discriminator import DiscriminatorConfig
from maisi.networks.unet import UNetConfig
from maisi.training.autoencoder import AutoencoderLosses, AutoencoderRun
from maisi.training.controlnet import ControlNetRun
from maisi.training.diffusion import DiffusionRun
from maisi.training.latents import LatentBatchConfig
from maisi.training.loop import LoopConfig
from maisi.training.mask_autoencoder import MaskAutoencoderRun
from maisi.training.mask_diffusion import MaskDiffusionRun
from maisi.training.optimizer import OptimizerConfig
from maisi.training.patches import PatchConfig
from maisi.training.splitting import SplittingConfig

AUTOENCODER = AutoencoderConfig(channels=(4, 8), num_res_blocks=(1, 1), norm_groups=4, upsampling="nearest")
UNET = UNetConfig(
    channels=(8, 16),
    num_res_blocks=(1, 1),
    attention_levels=(False, True),
    head_channels=8,
    norm_groups=4,
    region_input=True,
    spacing_input=True,
    num_modalities=4,
)


def ball(size: int, centre: tuple[float, float, float], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    return np.square(grid - np.array(centre)[:, None, None, None]).sum(0) <= radius**2


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patients, one of them for validation: a body with a liver, a lung and a liver tumour."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = []
    for number in range(4):
        rng = np.random.default_rng(number)
        labels = np.zeros((32, 32, 32), np.uint8)
        labels[ball(32, (16, 16, 16), 14)] = 200
        labels[ball(32, (20, 16, 14), 6)] = 1
        labels[ball(32, (21, 16, 14), 2)] = 26
        labels[ball(32, (9, 16, 20), 5)] = 28
        image = np.full(labels.shape, -1000, np.int16)
        for label, hu in ((200, 40), (1, 110), (26, 60), (28, -800)):
            image[labels == label] = hu + 5 * number
        image += rng.integers(-10, 10, image.shape).astype(np.int16)
        np.save(folder / f"p{number}.npy", image)
        np.save(folder / f"p{number}-labels.npy", labels)
        rows.append(
            PreparedCase(
                id=f"p{number}",
                patient=f"p{number}",
                split="validation" if number == 3 else "train",
                image=f"p{number}.npy",
                labels=f"p{number}-labels.npy",
                affine=((4, 0, 0, 0), (0, 4, 0, 0), (0, 0, 4, 0), (0, 0, 0, 1)),
                spacing_mm=(4, 4, 4),
                shape=(32, 32, 32),
                regions=("chest", "abdomen"),
            )
        )
    write_json(folder / INDEX, PreparedIndex(cases=tuple(rows)).model_dump(mode="json"))
    return folder


def encode(image: Tensor) -> tuple[Tensor, Tensor]:
    """Stand-in for an encoder: four shifted averages of 4 x 4 x 4 voxels, exact and quick."""
    mean = torch.nn.functional.avg_pool3d(image, 4)[0]
    return torch.cat([mean * 2 - 1, mean, -mean, mean.square()]), torch.full((4, *mean.shape[1:]), -6.0)


@pytest.fixture(scope="session")
def latents(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    kinds = [
        ViewConfig(size=(24, 16, 16), spacing_mm=(4, 6), views=2),
        ViewConfig(size=(16, 16, 16), spacing_mm=(5, 7)),
    ]
    cache_latents(PreparedFolder(prepared), kinds, encode, "0" * 64, folder)
    return folder


@pytest.fixture(scope="session")
def pairs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views with images and simulated tumours."""
    folder = tmp_path_factory.mktemp("pairs")
    kind = ViewConfig(
        size=(16, 16, 16), spacing_mm=(5, 7), views=2, tumors=TumorViews(share=1.0), vary_names=0.5, keep_image=True
    )
    cache_latents(PreparedFolder(prepared), [kind], encode, "0" * 64, folder)
    return folder


def loop(steps: int) -> LoopConfig:
    return LoopConfig(steps=steps, seed=3, log_every=1, validate_every=2, checkpoint_every=2, device="cpu")


@pytest.fixture
def autoencoder_run(prepared: Path) -> AutoencoderRun:
    return AutoencoderRun(
        data=prepared,
        loop=loop(4),
        model=AUTOENCODER,
        discriminator=DiscriminatorConfig(channels=4, num_layers=2),
        patches=PatchConfig(size=(16, 16, 16), batch_size=2),
        losses=AutoencoderLosses(
            perceptual_features="gradients", perceptual_slices=2, adversarial_start=1, adversarial_ramp=1
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, accumulate=2),
        validation_cases=1,
        validation_size=(24, 24, 24),
    )


@pytest.fixture
def split_autoencoder_run(autoencoder_run: AutoencoderRun) -> AutoencoderRun:
    return autoencoder_run.model_copy(update={"splitting": SplittingConfig(parts=3, axis=1)})


@pytest.fixture
def diffusion_run(latents: Path) -> DiffusionRun:
    return DiffusionRun(
        data=latents,
        loop=loop(4),
        model=UNET,
        batches=LatentBatchConfig(batch_size=2),
        optimizer=OptimizerConfig(kind="muon", learning_rate=1e-3, schedule="cosine", warmup_steps=2),
        validation_batches=2,
    )


@pytest.fixture
def unet_file(tmp_path: Path) -> Path:
    from maisi.networks.unet import UNet
    from maisi.weights.load import save_network

    torch.manual_seed(0)
    unet = UNet(UNET)
    for parameter in unet.parameters():
        parameter.data.normal_(0, 0.05)
    path = tmp_path / "unet.safetensors"
    save_network(path, unet)
    return path


MASK_LABELS = (0, 1, 26, 28, 200)
MASK_MAPS = MaskMapsConfig(size=(16, 16, 16), spacing_mm=(8, 8, 8))
MASK_AUTOENCODER = AUTOENCODER.model_copy(update={"in_channels": 8, "out_channels": len(MASK_LABELS)})


@pytest.fixture
def mask_autoencoder_run(prepared: Path) -> MaskAutoencoderRun:
    return MaskAutoencoderRun(
        data=prepared,
        loop=loop(4),
        labels=MASK_LABELS,
        model=MASK_AUTOENCODER,
        maps=MASK_MAPS,
        patch=(8, 12, 16),
        batch_size=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, accumulate=2),
    )


@pytest.fixture
def mask_diffusion_run(prepared: Path, tmp_path: Path) -> MaskDiffusionRun:
    from maisi.networks.autoencoder import Autoencoder
    from maisi.weights.load import save_network

    torch.manual_seed(0)
    path = tmp_path / "mask_autoencoder.safetensors"
    save_network(path, Autoencoder(MASK_AUTOENCODER), metadata={"maisi.label_ids": str(list(MASK_LABELS))})
    return MaskDiffusionRun(
        data=prepared,
        autoencoder=path,
        loop=loop(4),
        model=UNET.model_copy(update={"context_channels": 10, "num_modalities": None}),
        maps=MASK_MAPS,
        batch_size=2,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        validation_batches=1,
        sample_steps=2,
    )


@pytest.fixture
def controlnet_run(latents: Path, unet_file: Path) -> ControlNetRun:
    return ControlNetRun(
        data=latents,
        unet=unet_file,
        loop=loop(4),
        mask_encoder_channels=(4, 8, 8),
        batches=LatentBatchConfig(batch_size=2),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        validation_batches=1,
    )


@pytest.fixture
def inpainting_run(controlnet_run: ControlNetRun, pairs: Path) -> ControlNetRun:
    return controlnet_run.model_copy(update={"data": pairs, "inpainting": 0.5})
