"""The patch discriminator of the autoencoder's adversarial loss (Isola et al. 2017; Wang et al. 2018)."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from maisi.config import Config


class DiscriminatorConfig(Config):
    """Sizes of a patch discriminator; the defaults fit patches of 64^3 and more.

    Attributes:
        channels: of the first convolution; doubled with each further one.
        num_layers: convolutions between the first and the last; all but the last of them halve the axes.
    """

    in_channels: PositiveInt = 1
    channels: PositiveInt = 64
    num_layers: PositiveInt = 3

    @property
    def smallest_size(self) -> int:
        """Voxels that each axis of the input must have at least."""
        return int(3 * 2**self.num_layers)


class PatchDiscriminator(nn.Module):
    """Score each overlapping patch of an image as real (high) or reconstructed (low).

    4 x 4 x 4 convolutions, LeakyReLU, and instance norm on all but the first and last.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        layers: list[nn.Module] = [_conv(config.in_channels, width, 2, bias=True), nn.LeakyReLU(0.2)]
        for index in range(config.num_layers):
            stride = 1 if index == config.num_layers - 1 else 2
            # The norm takes the mean away, so a bias before it would do nothing.
            layers += [
                _conv(width, 2 * width, stride, bias=False),
                nn.InstanceNorm3d(2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        layers.append(_conv(width, 1, 1, bias=True))
        self.layers = nn.Sequential(*layers)
        self.apply(_start)

    def forward(self, x: Tensor) -> Tensor:
        """`B C X Y Z` -> scores `B 1 x y z`, with x = X / 2^num_layers - 2.

        Raises:
            ValueError: the image is smaller than `config.smallest_size`.
        """
        if min(x.shape[2:]) < self.config.smallest_size:
            raise ValueError(f"size {tuple(x.shape[2:])} is below {self.config.smallest_size} on an axis")
        scores: Tensor = self.layers(x)
        return scores


def _conv(in_channels: int, out_channels: int, stride: int, *, bias: bool) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, kernel_size=4, stride=stride, padding=1, bias=bias)


def _start(module: nn.Module) -> None:
    """Small normal weights, the usual start of a patch discriminator."""
    if isinstance(module, nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
