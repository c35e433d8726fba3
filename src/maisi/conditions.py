"""What the networks are told about a volume, as numpy arrays: spacing, regions, modality, label bits.

The one home of "times 100", of the one-hot order and of the bit order. Knows no network and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import MODALITIES, REGIONS, parse_modality, sort_regions
from maisi.errors import MaisiError

Float32 = NDArray[np.float32]

CONDITION_SCALE = 100.0
"""Factor on spacing in mm and on region one-hots before they enter a network (as the released weights do)."""

MASK_BITS = 8
"""Channels of a label map as the ControlNet sees it: one per bit of an id from 0 to 255."""


@dataclass(frozen=True)
class Conditions:
    """What one volume is to be, or is.

    Attributes:
        spacing_mm: distance between voxels along X, Y, Z in mm, all positive.
        regions: members of `anatomy.REGIONS` (or aliases), kept from top to bottom; () where nobody knows.
        modality: a key of `anatomy.MODALITIES`.
    """

    spacing_mm: tuple[float, float, float]
    regions: tuple[str, ...] = ()
    modality: str = "ct"

    def __post_init__(self) -> None:
        """Normalise the names.

        Raises:
            MaisiError: unknown region or modality, or a spacing that is not three positive numbers.
        """
        spacing = tuple(float(value) for value in self.spacing_mm)
        if len(spacing) != 3 or not all(np.isfinite(value) and value > 0 for value in spacing):
            raise MaisiError(f"The spacing {spacing} is not usable; give three positive numbers of millimetres.")
        object.__setattr__(self, "spacing_mm", spacing)
        object.__setattr__(self, "regions", sort_regions(self.regions))
        object.__setattr__(self, "modality", parse_modality(self.modality))

    def top_region(self) -> Float32:
        """Return the uppermost region, one-hot times 100, float32 (4,); zeros where no region is known."""
        return _one_hot(self.regions[:1])

    def bottom_region(self) -> Float32:
        """Return the lowest region, one-hot times 100, float32 (4,); zeros where no region is known."""
        return _one_hot(self.regions[-1:])

    def spacing(self) -> Float32:
        """Return the spacing in mm times 100, float32 (3,)."""
        return np.asarray(self.spacing_mm, dtype=np.float32) * np.float32(CONDITION_SCALE)

    def modality_id(self) -> int:
        """Return the index of the modality's class embedding."""
        return MODALITIES[self.modality]


@dataclass(frozen=True)
class ConditionArrays:
    """The conditions of B volumes, ready to become tensors.

    Attributes:
        top_region: float32 (B, 4), one-hot times 100.
        bottom_region: float32 (B, 4), one-hot times 100.
        spacing: float32 (B, 3), mm times 100.
        modality: int64 (B,).
    """

    top_region: Float32
    bottom_region: Float32
    spacing: Float32
    modality: NDArray[np.int64]


def stack(conditions: Sequence[Conditions]) -> ConditionArrays:
    """Put the conditions of several volumes (at least one) on top of each other, in their order."""
    if not conditions:
        raise ValueError("no conditions to stack")
    return ConditionArrays(
        top_region=np.stack([item.top_region() for item in conditions]),
        bottom_region=np.stack([item.bottom_region() for item in conditions]),
        spacing=np.stack([item.spacing() for item in conditions]),
        modality=np.array([item.modality_id() for item in conditions], dtype=np.int64),
    )


def mask_bits(labels: NDArray[np.uint8]) -> Float32:
    """Turn a label map (X, Y, Z) into float32 (8, X, Y, Z) of zeros and ones, least significant bit first."""
    if labels.dtype != np.uint8:
        raise ValueError(f"a label map must be uint8, not {labels.dtype}")
    bits = np.empty((MASK_BITS, *labels.shape), dtype=np.float32)
    for bit in range(MASK_BITS):
        bits[bit] = (labels >> np.uint8(bit)) & np.uint8(1)
    return bits


def bits_mask(bits: NDArray[Any]) -> NDArray[np.uint8]:
    """Turn (8, X, Y, Z) back into a label map (X, Y, Z); over 0.5 counts as one. Inverse of `mask_bits`."""
    if bits.shape[0] != MASK_BITS:
        raise ValueError(f"a mask has {MASK_BITS} bits, not {bits.shape[0]}")
    labels = np.zeros(bits.shape[1:], dtype=np.uint8)
    for bit in range(MASK_BITS):
        labels |= (bits[bit] > 0.5).astype(np.uint8) << np.uint8(bit)
    return labels


def _one_hot(regions: tuple[str, ...]) -> Float32:
    vector = np.zeros(len(REGIONS), dtype=np.float32)
    for region in regions:
        vector[REGIONS.index(region)] = CONDITION_SCALE
    return vector
