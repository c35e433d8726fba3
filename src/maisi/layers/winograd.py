"""3 x 3 x 3 convolution of float32 maps on CPUs with half the products: Winograd's F(4, 3) along X.

Four rows of the result take six products with a 3 x 3 kernel instead of twelve (Winograd 1980; Lavin and Gray 2016,
"Fast Algorithms for Convolutional Neural Networks"). Rounding grows from about 1 part in a million to 1.7. Inference
only, and only where it `pays`.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

TAPS = 3
"""Of a kernel along each axis."""

ROWS = 4
"""Rows of a result that are computed together."""

POINTS = 6
"""Products of which they are made: values of the polynomials at 0, 1, -1, 2, -2 and infinity."""

BLOCK_BYTES = 2**24
"""Of a block's values and products at the points: smaller ones spend more time on rearranging weights."""

LEAST_VOXELS = 2**14
"""Of a map, below which the kernels at the points, which are kept, would take more memory than is worth it."""

LEAST_PRODUCTS = 2**26
"""Multiplications for a row of the result below which starting the operations takes longer than they save."""

INPUT = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
"""Six rows of a map -> at the points."""

KERNEL = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
"""Three taps of a kernel -> at the points."""

OUTPUT = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)
"""Products at the points -> four rows of the result."""


def pays(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution can be computed so, and is large enough to gain a third of its time or more."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    size = [n + 2 * p - TAPS + 1 for n, p in zip(x.shape[2:], padding, strict=True)]
    return set(stride) == {1} and is_large(x, weight, size)


def is_large(x: Tensor, weight: Tensor, size: Sequence[int]) -> bool:
    """Whether a convolution with stride 1 to a map of some size is of the kind for which it pays."""
    if x.dtype != torch.float32 or weight.dtype != x.dtype or tuple(weight.shape[2:]) != (TAPS,) * 3:
        return False
    rows, columns, width = size
    products = weight.numel() * columns * width
    return rows >= ROWS and x[0, 0].numel() >= LEAST_VOXELS and products >= LEAST_PRODUCTS


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """`F.conv3d` with stride 1, `B C X Y Z` -> `B C' X' Y' Z'`, channels-last."""
    kernels = _at_points(weight)
    volumes = x.permute(0, 2, 3, 4, 1)
    size = [n + 2 * p - TAPS + 1 for n, p in zip(x.shape[2:], padding, strict=True)]
    made = x.new_empty(len(x), *size, len(weight))
    for source, result in zip(volumes, made, strict=True):
        _convolve(source, kernels, bias, padding, result)
    return made.permute(0, 4, 1, 2, 3)


def _convolve(
    x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, padding: Sequence[int], result: Tensor
) -> None:
    """`X Y Z C` -> written to `X' Y' Z' C'`, in blocks of four rows and some columns along Y."""
    to_points, to_rows = torch.tensor(INPUT), torch.tensor(OUTPUT)
    rows, columns, width, out_channels = result.shape
    last_row, last_column, depth, channels = x.shape
    column_bytes = POINTS * x.element_size() * (depth * channels + width * out_channels)
    step = max(1, min(columns, BLOCK_BYTES // column_bytes))
    given = x.new_empty(POINTS, step + 2, depth, channels)
    products = x.new_empty(POINTS, step * width * out_channels)
    for top in range(0, columns, step):
        height = min(step, columns - top)
        # columns of x that the block takes from; what lies outside is zero
        before = max(0, padding[1] - top)
        first, end = max(0, top - padding[1]), min(last_column, top - padding[1] + height + 2)
        block = given[:, : height + 2]
        block[:, :before] = 0
        block[:, before + end - first :] = 0
        inside = block[:, before : before + end - first].flatten(1)
        for row in range(0, rows, ROWS):
            low, high = max(0, row - padding[0]), min(last_row, row - padding[0] + POINTS)
            place = low - (row - padding[0])
            torch.mm(to_points[:, place : place + high - low], x[low:high, first:end].flatten(1), out=inside)
            for at, (values, kernel) in enumerate(zip(block, kernels, strict=True)):
                product = F.conv2d(values.permute(2, 0, 1)[None], kernel, None, padding=(0, padding[2]))
                products[at, : height * width * out_channels] = product[0].permute(1, 2, 0).flatten()
            taken = min(ROWS, rows - row)
            target = result[row : row + taken, top : top + height].flatten(1)
            torch.mm(to_rows[:taken], products[:, : target.shape[1]], out=target)
            if bias is not None:
                target.view(taken, -1, out_channels).add_(bias)


_AT_POINTS: MutableMapping[Tensor, tuple[int, list[Tensor]]] = WeakTensorKeyDictionary()


def kept_bytes(weight: Tensor) -> int:
    """What stays in memory beside weights that have been used so."""
    return weight.numel() * weight.element_size() * POINTS // TAPS


def _at_points(weight: Tensor) -> list[Tensor]:
    """The 3 x 3 kernel of each point, computed once for weights that do not change."""
    if weight.is_inference():
        return _transformed(weight)
    version, kernels = _AT_POINTS.get(weight, (-1, []))
    if version != weight._version:
        kernels = _transformed(weight.detach())
        _AT_POINTS[weight] = weight._version, kernels
    return kernels


def _transformed(weight: Tensor) -> list[Tensor]:
    points = torch.einsum("pk,oikyz->poiyz", torch.tensor(KERNEL, dtype=torch.float64), weight.double()).float()
    return [kernel.contiguous(memory_format=torch.channels_last) for kernel in points]
