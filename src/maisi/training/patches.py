"""Random patches of prepared images for training the autoencoder. What a step sees depends on seed and step alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from maisi.config import Config
from maisi.data.prepared import PreparedCase, PreparedFolder, Split
from maisi.errors import MaisiError
from maisi.training.state import step_rng
from maisi.volume import Array


class PatchConfig(Config):
    """How patches are drawn.

    Attributes:
        size: voxels of a patch along each axis.
        zoom: smallest and largest factor by which the voxels of a patch are larger than the image's
            (log-uniform); this is how one scan serves many spacings.
        flip: mirror each axis with probability 1/2.
        transpose: permute the axes at random (a rotation by 90 degrees, up to a mirror image).
    """

    size: tuple[int, int, int] = (64, 64, 64)
    batch_size: int = Field(default=1, ge=1)
    zoom: tuple[float, float] = (0.8, 1.6)
    flip: bool = True
    transpose: bool = False


class PatchSource:
    """Draws batches of patches `B 1 X Y Z` in [0, 1]."""

    def __init__(self, folder: PreparedFolder, split: Split, config: PatchConfig, seed: int) -> None:
        self.folder, self.config, self.seed = folder, config, seed
        self.cases = folder.cases(split)
        if not self.cases:
            raise MaisiError(f"{folder.folder} has no {split} cases; prepare more patients or another split.")
        weights = np.array([case.weight for case in self.cases])
        self.probabilities = weights / weights.sum()

    def batch(self, step: int) -> Tensor:
        """The batch of one step."""
        rng = step_rng(self.seed, step, stream=0)
        return torch.stack([self._patch(rng) for _ in range(self.config.batch_size)])

    def _patch(self, rng: np.random.Generator) -> Tensor:
        config = self.config
        case = self.cases[int(rng.choice(len(self.cases), p=self.probabilities))]
        zoom = math.exp(rng.uniform(*np.log(config.zoom)))
        order = rng.permutation(3) if config.transpose else np.arange(3)
        mirrored = [axis for axis in range(3) if config.flip and rng.random() < 0.5]
        wanted = np.array(config.size)[np.argsort(order)]
        block = self._block(case, np.ceil(wanted * zoom).astype(int), rng)
        patch = np.flip(block.transpose(*order), tuple(mirrored))
        tensor = torch.from_numpy(np.ascontiguousarray(patch))[None, None]
        if tensor.shape[2:] != config.size:
            mode = "area" if zoom > 1 else "trilinear"
            tensor = F.interpolate(tensor, size=config.size, mode=mode)
        return tensor[0]

    def _block(self, case: PreparedCase, size: Array, rng: np.random.Generator) -> Array:
        """A block of `size` voxels at a random place, in [0, 1]; what lies outside the image is air."""
        image = self.folder.image(case)
        start = [int(rng.integers(min(0, n - s), max(0, n - s) + 1)) for n, s in zip(image.shape, size, strict=True)]
        inside = tuple(slice(max(0, a), min(n, a + s)) for a, s, n in zip(start, size, image.shape, strict=True))
        margins = [(max(0, -a), max(0, a + s - n)) for a, s, n in zip(start, size, image.shape, strict=True)]
        return np.pad(case.network_values(image[inside]), margins)
