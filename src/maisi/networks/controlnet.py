"""The network that makes a U-Net follow a label map (paper, section 3.3; Zhang et al. 2023)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.layers.attention import zeroed
from maisi.layers.convolution import conv1, conv3
from maisi.networks.unet import ControlResiduals, Trunk, TrunkConfig, UNet

LabelId = Annotated[int, Field(ge=1, le=255)]


def _each_id_once(told_as: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    ids = [id for group in told_as.values() for id in group]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise ValueError(f"these ids are named more than once: {', '.join(map(str, twice))}; name each once")
    return told_as


ToldAs = Annotated[dict[LabelId, tuple[LabelId, ...]], AfterValidator(_each_id_once)]
"""Id -> ids that a network is told as this one."""


class ControlNetConfig(TrunkConfig):
    """Sizes of a ControlNet: those of its U-Net's encoder half, and the mask encoder's.

    Attributes:
        mask_channels: channels of the mask, its label ids as bits.
        image_channels: 2 for a network that inpaints: the known image (0 where it is to be painted) and where that is;
            0 for one that is told the mask alone, as the released ones.
        mask_encoder_channels: each entry after the first halves the axes; three of them bring the mask from
            image to latent resolution (factor 4).
        told_as: id -> ids of a label map that the network is told as this id instead of as themselves. A narrow
            network tells groups (any bone, any lobe) apart better than a hundred ids that share most of their bits.
    """

    mask_channels: PositiveInt = 8
    image_channels: Literal[0, 2] = 0
    mask_encoder_channels: tuple[PositiveInt, ...] = (8, 32, 64)
    told_as: ToldAs = Field(default={})

    def told(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Replace the ids of a label map, of any shape, by what the network is told in their place."""
        told: NDArray[np.uint8] = self.told_table()[labels]
        return told

    def told_table(self) -> NDArray[np.uint8]:
        """What each of the 256 ids is told as."""
        table = np.arange(256, dtype=np.uint8)
        for id, group in self.told_as.items():
            table[list(group)] = id
        return table

    @property
    def mask_compression(self) -> int:
        """Voxels of the mask for each voxel of the latent, along one axis."""
        return int(2 ** (len(self.mask_encoder_channels) - 1))


class MaskEncoder(nn.Module):
    """Bring the mask to the latent's size; the last convolution starts at zero."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths = config.mask_encoder_channels
        self.conv_in = conv3(config.mask_channels + config.image_channels, widths[0])
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            blocks += [conv3(narrow, narrow), conv3(narrow, wide, stride=2)]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = zeroed(conv3(widths[-1], config.channels[0]))

    def forward(self, mask: Tensor) -> Tensor:
        """`B 8 4X 4Y 4Z` (or 10 channels, with the image) -> `B C X Y Z`."""
        h = F.silu(self.conv_in(mask))
        for block in self.blocks:
            h = F.silu(block(h))
        out: Tensor = self.conv_out(h)
        return out


class ControlNet(Trunk):
    """A trainable copy of a U-Net's encoder half that is told the mask.

    Its outputs pass through convolutions that start at zero: a fresh one changes nothing, and training
    departs from the U-Net's own behaviour. It has no region or spacing input.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config, config.time_width)
        self.config = config
        self.mask_encoder = MaskEncoder(config)
        self.zero_convs = nn.ModuleList(zeroed(conv1(c, c)) for c in config.skip_channels)
        self.zero_conv_middle = zeroed(conv1(config.channels[-1], config.channels[-1]))

    @classmethod
    def from_unet(cls, unet: UNet, config: ControlNetConfig | None = None) -> ControlNet:
        """Make a ControlNet whose encoder half is a copy of `unet`'s; on its device, in its dtype.

        A U-Net with region or spacing inputs has wider embeddings; of the layers that read them the part for
        the time is copied, which is exact but for the missing inputs' contribution.

        Args:
            unet: the network to control.
            config: None for the U-Net's sizes and the released mask encoder.

        Raises:
            ValueError: `config` has another encoder half than `unet`.
        """
        shared = {name: getattr(unet.config, name) for name in TrunkConfig.model_fields}
        config = ControlNetConfig(**shared) if config is None else config
        if any(getattr(config, name) != value for name, value in shared.items()):
            raise ValueError("the ControlNet's encoder half must have the U-Net's sizes")
        if unet.config.context_channels is not None:
            raise ValueError("a U-Net with attention to a context cannot be copied to a ControlNet")
        net = cls(config).to(device=unet.conv_in.weight.device, dtype=unet.conv_in.weight.dtype)
        net.load_state_dict(net.state_dict() | _encoder_weights(unet, net))
        return net

    def forward(self, x: Tensor, times: Tensor, mask: Tensor, *, modality: Tensor | None = None) -> ControlResiduals:
        """Compute what to add to the U-Net's features.

        Args:
            x: noisy latent, `B C X Y Z`; axes multiples of `config.size_multiple`.
            times: (B,), in [0, 1000].
            mask: label ids, as `config.told` gives them, in bits, `B 8 4X 4Y 4Z`, zeros and ones; a network with
                `image_channels` takes `B 10 4X 4Y 4Z`, see `inpainting_mask`.
            modality: (B,) int64; not used by a network without that input.

        Raises:
            ValueError: an input is missing or a size does not fit.
        """
        expected = tuple(n * self.config.mask_compression for n in x.shape[2:])
        if tuple(mask.shape[2:]) != expected:
            raise ValueError(f"the mask has size {tuple(mask.shape[2:])}; this latent needs {expected}")
        embedding = self.embed_time(times, modality, x.dtype)
        h = self.conv_in(x) + self.mask_encoder(mask.to(x.dtype))
        features = self.encode(h, embedding, None)
        middle = self.middle_block(features[-1], embedding, None)
        down = tuple(zero(feature) for zero, feature in zip(self.zero_convs, features, strict=True))
        return ControlResiduals(down, self.zero_conv_middle(middle))


def inpainting_mask(bits: Tensor, image: Tensor | None = None, region: Tensor | None = None) -> Tensor:
    """Join what a network with `image_channels` is told.

    Args:
        bits: label ids as bits, `B 8 X Y Z`.
        image: the image in [0, 1], `B 1 X Y Z`; only what lies outside the region is looked at.
        region: 1 where to paint, 0 where the image is known, `B 1 X Y Z`. None, with the image: paint everything.

    Returns:
        `B 10 X Y Z`, in the dtype of `bits`.
    """
    if image is None or region is None:
        everything = torch.ones_like(bits[:, :1])
        return torch.cat([bits, torch.zeros_like(everything), everything], 1)
    region = region.to(bits.dtype)
    return torch.cat([bits, image.to(bits.dtype) * (1 - region), region], 1)


def with_image_input(net: ControlNet) -> ControlNet:
    """A copy of a network that is told the mask alone, ready to be told the image too, which it ignores at first."""
    wider = ControlNet(net.config.model_copy(update={"image_channels": 2}))
    tensors = net.state_dict()
    key = "mask_encoder.conv_in.weight"
    more = torch.zeros_like(tensors[key][:, : wider.config.image_channels])
    wider.load_state_dict(tensors | {key: torch.cat([tensors[key], more], 1)})
    return wider


def _encoder_weights(unet: UNet, net: ControlNet) -> dict[str, Tensor]:
    """Take from `unet` the tensors that `net` has by the same name, cut to the columns that read the time."""
    source = unet.state_dict()
    taken: dict[str, Tensor] = {}
    for name, own in net.state_dict().items():
        if name in source:
            tensor = source[name]
            taken[name] = tensor[:, : own.shape[1]] if name.endswith("time_emb_proj.weight") else tensor
    return {name: torch.clone(tensor) for name, tensor in taken.items()}
