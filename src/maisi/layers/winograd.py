"""3 x 3 x 3 convolutions with 64 products where the definition takes 216: Winograd's F(2, 3) along each of three axes.

Eight neighbouring outputs come from 4 x 4 x 4 inputs by sums, 64 products and sums (Winograd 1980; Lavin and Gray 2016,
arXiv:1509.09308, section 4). The products of all places of one kind are one matrix product over channels. In float32 the
result differs from the direct one by about 1e-6 of its largest value; in half precision the sums would cost accuracy, so
there it is not used. Knows no layer, no plan and no training: it has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

Slices = list[Tensor]

CHANNELS_AT_LEAST = 64
"""With fewer channels the sums cost what the products save."""

TILES_AT_LEAST = 64
"""With fewer tiles turning the kernel around is most of the work."""

CACHED_BYTES = 4 << 20
"""Of the transformed input that is worked on at a time; it should stay in a core's cache."""


def suits(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether this way is quicker for a convolution of `x`, `1 C X Y Z`, and possible."""
    kind = x.dtype == torch.float32 and len(x) == 1 and tuple(weight.shape[2:]) == (3, 3, 3) and set(stride) == {1}
    wide = min(weight.shape[:2]) >= CHANNELS_AT_LEAST
    if not (kind and wide and set(padding) <= {0, 1}):
        return False
    x_tiles, y_tiles, z_tiles = (ceil(n / 2) for n in _output_size(x, padding))
    return x_tiles * y_tiles * z_tiles >= TILES_AT_LEAST


def scratch_bytes(weight: Tensor) -> int:
    """What `convolved` takes beside input, kernel and result: the turned kernel and about five times the cache's share."""
    return weight.shape[0] * weight.shape[1] * 64 * weight.itemsize + 5 * CACHED_BYTES


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """The convolution of `1 Cin X Y Z` by `Cout Cin 3 3 3` at stride 1; `padding` is 0 or 1 along each axis.

    Returns:
        `1 Cout X Y Z` (two less along an axis without padding), channels-last.
    """
    kernels = _turned(weight)
    source = x[0].permute(1, 2, 3, 0)
    size = _output_size(x, padding)
    result = x.new_empty((*size, weight.shape[0]))
    tiles = [ceil(n / 2) for n in size]
    along_x, along_y = _block(tiles, x.shape[1])
    for first_x, first_y in product(range(0, tiles[0], along_x), range(0, tiles[1], along_y)):
        shape = (min(along_x, tiles[0] - first_x), min(along_y, tiles[1] - first_y), tiles[2])
        first = (2 * first_x, 2 * first_y, 0)
        sums = _input_sums(_cut(source, first, shape, padding))
        made = [_multiplied(part, kernel).view(*shape, -1) for part, kernel in zip(sums, kernels, strict=True)]
        for corner, values in _output_sums(made):
            x_, y_, z_ = (slice(a + c, a + 2 * n, 2) for a, c, n in zip(first, corner, shape, strict=True))
            place = result[x_, y_, z_]
            values = values[: place.shape[0], : place.shape[1], : place.shape[2]]
            place.copy_(values) if bias is None else torch.add(values, bias, out=place)
    return result.permute(3, 0, 1, 2)[None]


def _output_size(x: Tensor, padding: Sequence[int]) -> list[int]:
    return [n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)]


def _block(tiles: Sequence[int], channels: int) -> tuple[int, int]:
    """Tiles along X and Y whose transformed input fits the cache's share, all of those along Z."""
    row = 64 * channels * 4 * tiles[2]
    rows = max(1, CACHED_BYTES // row)
    along_y = min(rows, tiles[1])
    return max(1, rows // along_y) if along_y == tiles[1] else 1, along_y


def _turned(weight: Tensor) -> Slices:
    """`Cout Cin 3 3 3` -> for each of the 64 places a matrix `Cout Cin 1 1`."""
    w = weight.permute(2, 3, 4, 0, 1)
    for axis in range(3):
        first, middle, last = w.unbind(axis)
        outer = (first + last) / 2
        w = torch.stack([first, outer + middle / 2, outer - middle / 2, last], axis)
    return list(w.reshape(64, *weight.shape[:2], 1, 1))


def _cut(source: Tensor, first: Sequence[int], tiles: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The input of a block of tiles, `X Y Z C`; zeros where it lies outside the map."""
    wanted = [(a - p, a - p + 2 * n + 2) for a, n, p in zip(first, tiles, padding, strict=True)]
    there = [(max(a, 0), min(b, n)) for (a, b), n in zip(wanted, source.shape, strict=False)]
    inside = source[tuple(slice(a, b) for a, b in there)]
    ends = [(a - low, high - b) for (low, high), (a, b) in zip(wanted, there, strict=True)]
    return F.pad(inside.contiguous(), (0, 0, *(n for pair in reversed(ends) for n in pair)))


def _input_sums(block: Tensor) -> Slices:
    """`X Y Z C` -> for each of the 64 places the values of all tiles, `1 C tiles 1` (channels-last)."""
    channels = block.shape[-1]
    for done in range(3):
        axis = 2 * done  # places of the axes done so far come first, then what is left of them
        tiles = block.shape[axis] // 2 - 1
        pairs = block.narrow(axis, 0, 2 * tiles + 2).unflatten(axis, (tiles + 1, 2))
        even, odd = pairs.select(axis + 1, 0), pairs.select(axis + 1, 1)
        first, second = even.narrow(axis, 0, tiles), odd.narrow(axis, 0, tiles)
        third, fourth = even.narrow(axis, 1, tiles), odd.narrow(axis, 1, tiles)
        out = block.new_empty((4, *first.shape))
        torch.sub(first, third, out=out[0])
        torch.add(second, third, out=out[1])
        torch.sub(third, second, out=out[2])
        torch.sub(second, fourth, out=out[3])
        block = out
    # the axes stand in front as Z, Y, X; the kernels' as X, Y, Z
    flat = block.view(4, 4, 4, 1, -1, 1, channels).permute(2, 1, 0, 3, 6, 4, 5)
    return [flat[place] for place in product(range(4), repeat=3)]


def _multiplied(values: Tensor, kernel: Tensor) -> Tensor:
    """One matrix product over channels; a 1 x 1 convolution is oneDNN's, quicker than the library's plain one."""
    return F.conv2d(values, kernel).permute(0, 2, 3, 1).contiguous()


def _output_sums(made: Slices) -> list[tuple[tuple[int, ...], Tensor]]:
    """Products of the 64 places -> outputs of the eight corners of each tile; works in the products' memory."""
    named = dict(zip(product(range(4), repeat=3), made, strict=True))
    for axis in range(3):
        rest = sorted({place[:axis] + place[axis + 1 :] for place in named})
        for other in rest:
            first, second, third, fourth = (named.pop((*other[:axis], n, *other[axis:])) for n in range(4))
            near = first.add_(second).add_(third)
            named[(*other[:axis], 0, *other[axis:])] = near
            named[(*other[:axis], 1, *other[axis:])] = second.sub_(third).sub_(fourth)
    return list(named.items())
