"""An autoencoder that starts as block PCA gives back what the projection on the components gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.training.linear_start import principal_components, require_components, start_as_components

CONFIG = AutoencoderConfig(
    latent_channels=12, channels=(16, 64, 96), num_res_blocks=(1, 2, 1), norm_groups=4, upsampling="transposed"
)


def smooth_images(seed: int) -> Tensor:
    noise = torch.rand(4, 1, 24, 24, 24, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool3d(noise, 5, 1, 2) * 2 - 0.5


def projected(images: Tensor, count: int, fitted_to: Tensor) -> Tensor:
    """The second way: project block after block."""
    _, components, mean = principal_components(fitted_to)
    kept = components[:, :count] @ components[:, :count].T
    result = torch.empty_like(images)
    for x in range(0, images.shape[2], 4):
        for y in range(0, images.shape[3], 4):
            for z in range(0, images.shape[4], 4):
                here = (slice(None), 0, slice(x, x + 4), slice(y, y + 4), slice(z, z + 4))
                block = images[here].reshape(len(images), -1) - mean
                result[here] = (block @ kept + mean).reshape(len(images), 4, 4, 4)
    return result


def test_starts_as_the_projection_on_the_first_components() -> None:
    images, others = smooth_images(0), smooth_images(1)
    model = Autoencoder(CONFIG)
    start_as_components(model, images)
    with torch.no_grad():
        made = model.decode(model.encode(others).mean)
    expected = projected(others, CONFIG.latent_channels, images)
    lost = (expected - others).square().mean().sqrt()
    assert lost > 0.01  # something is left out at all
    assert float((made - expected).square().mean().sqrt()) < 0.05 * float(lost)


def test_latents_have_the_spread_asked_for() -> None:
    images = smooth_images(2)
    model = Autoencoder(CONFIG)
    spread, _, _ = principal_components(images)
    for power in (0.0, 1.0):
        start_as_components(model, images, power)
        with torch.no_grad():
            found = model.encode(images).mean.square().mean((0, 2, 3, 4)).sqrt()
        torch.testing.assert_close(found, ((spread / spread[0]) ** power)[:12], rtol=0.05, atol=0.002)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"upsampling": "nearest"}, "transposed"),
        ({"in_channels": 8}, "one channel"),
        ({"channels": (16, 32, 96)}, "at least"),
        ({"channels": (64, 64, 96)}, "all different"),
        ({"norm_groups": 1, "latent_channels": 65}, "64 components"),
        ({"channels": (12, 66, 96), "norm_groups": 3}, "divide 64"),
    ],
)
def test_a_model_that_cannot_hold_it_is_refused(change: dict[str, object], words: str) -> None:
    config = AutoencoderConfig.model_validate(CONFIG.model_dump() | change)
    with pytest.raises(ValueError, match=words):
        require_components(config)
