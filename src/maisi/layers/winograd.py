"""3 x 3 x 3 convolutions with 64 products where the definition takes 216: Winograd's F(2, 3) along each of three axes.

Eight neighbouring outputs come from 4 x 4 x 4 inputs by sums, 64 products and sums (Winograd 1980; Lavin and Gray 2016,
arXiv:1509.09308, section 4). The products of all places of one kind are one matrix product over channels. In float32
the result differs from the direct one by about 1e-6 of its largest value; in half precision the sums would cost
accuracy, so there it is not used. Knows no layer, no plan and no training: it has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import ceil, prod

import torch
from torch import Tensor

Triple = tuple[int, int, int]

CHANNELS_AT_LEAST = 128
"""With fewer channels the sums cost what the products save, on several threads more than on one."""

TILES_AT_LEAST = 512
"""With fewer tiles turning the kernel around costs what the products save."""

CACHED_BYTES = 4 << 20
"""Of the transformed input that each thread works on at a time, so that it stays in a core's cache; more for wide
kernels, which are read anew for each share."""

FILLED_AT_LEAST = 0.8
"""Share of the tiles' outputs that are wanted: maps of few and odd rows waste more than is saved."""


def suits(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution of `x`, `1 C X Y Z`, can be made so, and is large enough to be quicker so."""
    kind = x.dtype == torch.float32 and len(x) == 1 and tuple(weight.shape[2:]) == (3, 3, 3) and set(stride) == {1}
    if not (kind and min(weight.shape[:2]) >= CHANNELS_AT_LEAST and set(padding) <= {0, 1}):
        return False
    size = _output_size(x, padding)
    tiles = prod(_tiles(size))
    return tiles >= TILES_AT_LEAST and prod(size) >= FILLED_AT_LEAST * 8 * tiles


def scratch_bytes(weight: Tensor) -> int:
    """What `convolved` takes beside input and result, about: the kernel turned, and a share's sums and products."""
    return 2 * _turned_bytes(weight) + 3 * _share_bytes(weight)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """The convolution of `1 Cin X Y Z` by `Cout Cin 3 3 3` at stride 1; `padding` is 0 or 1 along each axis.

    Returns:
        `1 Cout X Y Z` (two less along an axis without padding), channels-last.
    """
    size = _output_size(x, padding)
    tiles = _tiles(size)
    block = _block(tiles, weight)
    kernel, room = _turned(weight), _Room(block, weight)
    source = x[0].permute(1, 2, 3, 0)
    result = x.new_empty((*size, weight.shape[0]))
    for first_tile in product(range(0, tiles[0], block[0]), range(0, tiles[1], block[1])):
        first = (2 * first_tile[0], 2 * first_tile[1], 0)
        shape = (min(block[0], tiles[0] - first_tile[0]), min(block[1], tiles[1] - first_tile[1]), tiles[2])
        sums = _input_sums(_cut(source, first, shape, padding), room)
        for corner, values in _output_sums(room.multiplied(sums, kernel).view(4, 4, 4, *shape, -1)):
            place = result[tuple(slice(a + c, a + 2 * n, 2) for a, c, n in zip(first, corner, shape, strict=True))]
            values = values[: place.shape[0], : place.shape[1], : place.shape[2]]
            _ = place.copy_(values) if bias is None else torch.add(values, bias, out=place)
    return result.permute(3, 0, 1, 2)[None]


class _Room:
    """Memory for a block's sums after each axis and for its products, used again for every block."""

    def __init__(self, block: tuple[int, int, int], weight: Tensor) -> None:
        x, y, z = block
        rows, columns = 2 * y + 2, 2 * z + 2
        width = weight.shape[1]
        sizes = (4 * x * rows * columns * width, 16 * x * y * columns * width, 64 * x * y * z * width)
        self.sums = [weight.new_empty(size) for size in sizes]
        self.products = weight.new_empty(64 * x * y * z * weight.shape[0])

    def multiplied(self, sums: Tensor, kernel: Tensor) -> Tensor:
        """For each of the 64 places `tiles Cin` times `Cin Cout`."""
        flat = sums.view(64, -1, sums.shape[-1])
        shape = (64, flat.shape[1], kernel.shape[2])
        return torch.bmm(flat, kernel, out=self.products[: prod(shape)].view(shape))


def _output_size(x: Tensor, padding: Sequence[int]) -> Triple:
    a, b, c = (n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True))
    return (a, b, c)


def _tiles(size: Triple) -> Triple:
    a, b, c = (ceil(n / 2) for n in size)
    return (a, b, c)


def _turned_bytes(weight: Tensor) -> int:
    return 64 * weight.shape[0] * weight.shape[1] * weight.itemsize


def _share_bytes(weight: Tensor) -> int:
    return max(CACHED_BYTES * torch.get_num_threads(), _turned_bytes(weight) // 2)


def _block(tiles: Triple, weight: Tensor) -> Triple:
    """Tiles along X and Y whose sums or products fill the cache's share, all of those along Z."""
    rows = max(1, _share_bytes(weight) // (64 * max(weight.shape[:2]) * weight.itemsize * tiles[2]))
    along_y = min(rows, tiles[1])
    return (min(tiles[0], max(1, rows // along_y)), along_y, tiles[2])


def _turned(weight: Tensor) -> Tensor:
    """`Cout Cin 3 3 3` -> for each of the 64 places, along Z, Y and X, a matrix `Cin Cout`: `64 Cin Cout`."""
    w = weight.permute(4, 3, 2, 1, 0)
    for axis in range(3):
        first, middle, last = w.unbind(axis)
        outer = (first + last) / 2
        w = torch.stack([first, outer + middle / 2, outer - middle / 2, last], axis)
    return w.reshape(64, weight.shape[1], weight.shape[0])


def _cut(source: Tensor, first: Triple, tiles: Triple, padding: Sequence[int]) -> Tensor:
    """The input of a block of tiles, `X Y Z C`; zeros where it lies outside the map."""
    wanted = [(a - p, a - p + 2 * n + 2) for a, n, p in zip(first, tiles, padding, strict=True)]
    there = [(max(a, 0), min(b, n)) for (a, b), n in zip(wanted, source.shape[:3], strict=True)]
    block = source.new_zeros((*(b - a for a, b in wanted), source.shape[3]))
    inside = tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(there, wanted, strict=True))
    block[inside] = source[tuple(slice(a, b) for a, b in there)]
    return block


def _input_sums(block: Tensor, room: _Room) -> Tensor:
    """`X Y Z C` -> the sums of the 64 places, `4 4 4 tiles-X tiles-Y tiles-Z C`; the axes' places stand as Z, Y, X."""
    for done, memory in enumerate(room.sums):
        axis = 2 * done  # the places of the axes done so far stand in front, what is left of those axes behind
        count = block.shape[axis] // 2 - 1
        before = (slice(None),) * axis
        even, odd = block[(*before, slice(0, None, 2))], block[(*before, slice(1, None, 2))]
        first, second = even.narrow(axis, 0, count), odd.narrow(axis, 0, count)
        third, fourth = even.narrow(axis, 1, count), odd.narrow(axis, 1, count)
        shape = (4, *first.shape)
        block = memory[: prod(shape)].view(shape)
        torch.sub(first, third, out=block[0])
        torch.add(second, third, out=block[1])
        torch.sub(third, second, out=block[2])
        torch.sub(second, fourth, out=block[3])
    return block


def _output_sums(products: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """`4 4 4 X Y Z C` of the places -> each of a tile's eight corners and its values; overwrites the products."""
    found: list[tuple[tuple[int, ...], Tensor]] = [((), products)]
    for _ in range(3):  # along Z, then Y, then X
        halves = []
        for corner, places in found:
            first, second, third, fourth = places.unbind(0)
            halves.append(((0, *corner), first.add_(second).add_(third)))
            halves.append(((1, *corner), second.sub_(third).sub_(fourth)))
        found = halves
    return found
