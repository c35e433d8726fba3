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
        spacing_mm: in place of `zoom`, smallest and largest side of the patches' cubic voxels (log-uniform).
        flip: mirror each axis with probability 1/2.
        transpose: permute the axes at random (a rotation by 90 degrees, up to a mirror image).
        candidates: places drawn for each patch; the one with the most contrast is taken. More than one keeps training
            away from empty air, where nothing is learned.
    """

    size: tuple[int, int, int] = (64, 64, 64)
    batch_size: int = Field(default=1, ge=1)
    zoom: tuple[float, float] = (0.8, 1.6)
    spacing_mm: tuple[float, float] | None = None
    flip: bool = True
    transpose: bool = False
    candidates: int = Field(default=1, ge=1)


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
        zoom = math.exp(rng.uniform(*np.log(config.spacing_mm or config.zoom)))
        zooms = zoom / np.array(case.spacing_mm if config.spacing_mm else (1.0, 1.0, 1.0))
        order = rng.permutation(3) if config.transpose else np.arange(3)
        mirrored = [axis for axis in range(3) if config.flip and rng.random() < 0.5]
        wanted = np.array(config.size)[np.argsort(order)]
        blocks = [self._block(case, np.ceil(wanted * zooms).astype(int), rng) for _ in range(config.candidates)]
        block = max(blocks, key=np.std) if len(blocks) > 1 else blocks[0]
        patch = np.flip(block.transpose(*order), tuple(mirrored))
        tensor = torch.from_numpy(np.ascontiguousarray(patch))[None, None]
        return _resized(tensor, config.size)[0]

    def _block(self, case: PreparedCase, size: Array, rng: np.random.Generator) -> Array:
        """A block of `size` voxels at a random place, in [0, 1]; what lies outside the image is air."""
        image = self.folder.image(case)
        start = [int(rng.integers(min(0, n - s), max(0, n - s) + 1)) for n, s in zip(image.shape, size, strict=True)]
        inside = tuple(slice(max(0, a), min(n, a + s)) for a, s, n in zip(start, size, image.shape, strict=True))
        margins = [(max(0, -a), max(0, a + s - n)) for a, s, n in zip(start, size, image.shape, strict=True)]
        return np.pad(case.network_values(image[inside]), margins)


def _resized(image: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Interpolate the axes that grow, average over those that shrink."""
    have = tuple(image.shape[2:])
    grown = tuple(max(n, wanted) for n, wanted in zip(have, size, strict=True))
    if grown != have:
        image = F.interpolate(image, size=grown, mode="trilinear")
    return image if grown == size else F.interpolate(image, size=size, mode="area")
