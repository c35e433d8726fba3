"""Running a chain of layers on a cut map: which maps are stored, in how many parts, and when they are let go.

Between two stored maps everything is computed part by part: the activation, the convolution and the sum of a residual
block never exist whole. Under autograd each part's computation is a checkpoint, so that training keeps the stored maps
alone. Knows no autoencoder and no budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import accumulate, zip_longest
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maisi.layers import winograd
from maisi.layers.blocks import Downsample, ResidualBlock, Upsample
from maisi.splitting.layers import (
    Activated,
    Activation,
    Convolved,
    Doubled,
    Moments,
    Sum,
    TransposedConvolved,
    mixed,
)
from maisi.splitting.maps import Begun, FeatureMap, Parts, Store, cuts

Recomputed = Literal["none", "upsampled", "inner", "finest"]
"""Maps that are not stored: their rows are computed anew each time they are needed.

"upsampled" are those that an upsampling makes, the widest of a decoder; "inner" are these and the map inside each
residual block whose own input is stored; "finest" are those inside all residual blocks, but for as many first rows as
the block's result, which takes their place, leaves room for. Only at the finest resolution, whose maps decide the
peak. Under autograd, where those of all resolutions are kept: at all of them, and inside every residual block.
"""

Result = TypeVar("Result")


class Group(Protocol):
    """Several processes that hold a stretch of rows of each map; see `maisi.splitting.processes`."""

    rank: int
    size: int

    def merged(self, moments: Moments) -> Moments:
        """Statistics of all processes' rows."""

    def edges(self, first: Tensor, last: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Give the neighbours my first and last row; get the row before mine and the one after."""


@dataclass(frozen=True)
class Execution:
    """How a network is run.

    Attributes:
        parts: parts of each map (of this process's share of it).
        devices: the parts of a map are spread over these in order.
        store: where the parts of stored maps wait.
        recompute: see `Recomputed`; less memory for more time.
        share: this process's rows of the maps, first and end, as numerators of `denominator`.
        group: the processes that hold the other rows.
    """

    parts: int = 1
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)
    store: Store = field(default_factory=Store)
    recompute: Recomputed = "none"
    share: tuple[int, int] = (0, 1)
    denominator: int = 1
    group: Group | None = None

    def stretches(self, size: int) -> list[tuple[int, int]]:
        """Rows of each part, of this process's share of a map of `size` rows."""
        start, stop = (size * n // self.denominator for n in self.share)
        return cuts(start, stop, self.parts, winograd.ROWS)

    def run(self, blocks: Sequence[nn.Module], source: FeatureMap, dtype: torch.dtype | None = None) -> FeatureMap:
        """Chain `blocks` after `source`; the result's rows are still to be asked for.

        Args:
            blocks: convolutions, residual blocks, up- and downsamplings, and group norms right before a convolution.
            source: rows of the chain's input; it is read twice where a norm comes first, and released on the way.
            dtype: precision of the last convolution; None is that of the weights.
        """
        x, moments = source, None
        for block, following, finest in zip_longest(blocks, blocks[1:], _finest(blocks)):
            recompute = self.recompute if finest or torch.is_grad_enabled() else "none"
            if isinstance(block, nn.GroupNorm):
                assert moments is not None
                x = Activated(x, Activation(block, moments, silu=False))
                continue
            if following is None:
                return self._made(block, x, moments, recompute, dtype)
            made = self._made(block, x, moments, recompute)
            normed = isinstance(following, nn.GroupNorm | ResidualBlock)
            if isinstance(block, Upsample) and recompute != "none":
                x, moments = made, self._moments(made) if normed else None
            else:
                x, moments = self._stored(made, normed, release=True)
        return x

    def pieces(self, x: FeatureMap, release: bool = True) -> Iterator[tuple[int, int, Tensor]]:
        """Compute the parts of a map in order: first row, end, `B C X Y Z`; `release` what they came from."""
        for start, stop, device in self._places(x.size):
            yield start, stop, computed_twice(partial(x.rows, start, stop, device))
            if release and not torch.is_grad_enabled():
                x.release(stop)

    def _places(self, size: int) -> list[tuple[int, int, torch.device]]:
        """The stretches of a map, each with the device that computes it."""
        stretches = self.stretches(size)
        count = len(stretches)
        return [(*rows, self.devices[index * len(self.devices) // count]) for index, rows in enumerate(stretches)]

    def _made(
        self,
        block: nn.Module,
        x: FeatureMap,
        moments: Moments | None,
        recompute: Recomputed,
        dtype: torch.dtype | None = None,
    ) -> FeatureMap:
        """A block's map, whose rows are still to be asked for."""
        if isinstance(block, nn.Conv3d):
            return Convolved(x, block, dtype=dtype)
        if isinstance(block, ResidualBlock):
            assert moments is not None
            return self._residual(block, x, moments, recompute)
        if isinstance(block, Downsample):
            return Convolved(x, block.conv, far_pad=1)
        if isinstance(block, Upsample):
            return upsampled(block, x)
        raise TypeError(f"splitting does not know the layer {type(block).__name__}")

    def _residual(self, block: ResidualBlock, x: FeatureMap, moments: Moments, recompute: Recomputed) -> FeatureMap:
        inner = Convolved(Activated(x, Activation(block.norm1, moments)), block.conv1)
        h: FeatureMap = inner
        shortcut: FeatureMap = x
        if isinstance(block.shortcut, nn.Conv3d):
            shortcut = mixed(x, block.shortcut)
        h_moments: Moments | None
        if recompute in ("inner", "finest") and (isinstance(x, Parts) or torch.is_grad_enabled()):
            h_moments = self._moments(inner)
        elif recompute == "finest":
            h, h_moments = self._begun(inner, 1 - _share_of_source(block))
        elif isinstance(x, Parts) and _halves(block) and not torch.is_grad_enabled():
            # both maps together are no wider than x, which each part of them can take the place of
            beside = Parts(x.axis, x.size)
            h, h_moments = self._stored(inner, True, release=True, beside=(shortcut, beside))
            shortcut = beside
        else:
            h, h_moments = self._stored(inner, True, release=False)
        assert h_moments is not None
        outer = Convolved(Activated(h, Activation(block.norm2, h_moments)), block.conv2)
        return Sum(outer, shortcut, shared=h is inner or isinstance(h, Begun))

    def _stored(
        self, x: FeatureMap, normed: bool, release: bool, beside: tuple[FeatureMap, Parts] | None = None
    ) -> tuple[Parts, Moments | None]:
        """Compute all parts of a map and let them wait; with the map's statistics if a norm follows.

        Of a map `beside`, made from the same one, the same rows are computed and put into the parts that come with it.
        """
        parts, found = Parts(x.axis, x.size), []
        own = self.stretches(x.size)
        start, stop = own[0][0], own[-1][1]
        edge_rows: list[Tensor] = []
        layout = torch.contiguous_format
        for first, end, made in self.pieces(x, release):
            if normed:
                found.append(computed_twice(partial(Moments.of, made)))
            if self.group is not None and (first == start or end == stop):
                edge_rows += [made.narrow(x.dim, 0, 1), made.narrow(x.dim, end - first - 1, 1)]
                if made.is_contiguous(memory_format=torch.channels_last_3d) and not made.is_contiguous():
                    layout = torch.channels_last_3d
            if beside is not None:
                beside[1].add(first, end, self.store.put(beside[0].rows(first, end, made.device), x.axis))
            parts.add(first, end, self.store.put(made, x.axis))
            del made
        if self.group is not None:
            before, after = self.group.edges(edge_rows[0].contiguous(), edge_rows[-1].contiguous())
            for row, place in ((before, start - 1), (after, stop)):
                if row is not None:  # in the others' layout, or joining them would lose it
                    row = row.contiguous(memory_format=layout)
                    parts.add(place, place + 1, self.store.put(row, x.axis))
        return parts, self._joint(found) if normed else None

    def _moments(self, x: FeatureMap) -> Moments:
        """Statistics of a map that is not stored."""

        def found(start: int, stop: int, device: torch.device) -> Moments:
            return Moments.of(x.rows(start, stop, device))

        return self._joint([computed_twice(partial(found, *place)) for place in self._places(x.size)])

    def _begun(self, x: FeatureMap, share: float) -> tuple[Begun, Moments]:
        """Compute all parts of a map for its statistics, and store those within a share of its rows."""
        stored, found = Begun(x), []
        for first, end, device in self._places(x.size):
            made = x.rows(first, end, device)
            found.append(Moments.of(made))
            if end <= share * x.size:
                stored.add(first, end, self.store.put(made, x.axis))
            del made
        return stored, self._joint(found)

    def _joint(self, found: Sequence[Moments]) -> Moments:
        mine = reduce(Moments.merged, found)
        return mine if self.group is None else self.group.merged(mine)


def computed_twice(compute: Callable[[], Result]) -> Result:
    """Under autograd a checkpoint: of what `compute` makes on the way nothing is kept, the backward pass makes it anew.

    Nothing that it calls may draw random numbers.
    """
    if not torch.is_grad_enabled():
        return compute()
    made: Result = checkpoint(compute, use_reentrant=False, preserve_rng_state=False)
    return made


def _finest(blocks: Sequence[nn.Module]) -> list[bool]:
    """Of each block, whether its result is as fine as any."""
    doublings = list(accumulate(isinstance(block, Upsample) - isinstance(block, Downsample) for block in blocks))
    most = max(doublings)
    return [doubled == most for doubled in doublings]


def _share_of_source(block: ResidualBlock) -> float:
    """Of the values of a block's result, those of the coarser map that its upsampled input comes from."""
    return block.conv1.in_channels / block.conv1.out_channels / 8


def _halves(block: ResidualBlock) -> bool:
    """Whether a block's channels are at most half of its input's."""
    return 2 * block.conv1.out_channels <= block.conv1.in_channels


def upsampled(block: Upsample, x: FeatureMap) -> FeatureMap:
    """A map after an upsampling."""
    if block.mode == "trilinear":
        assert isinstance(block.conv, nn.Conv3d)
        return Convolved(Doubled(x), block.conv)
    return TransposedConvolved(x, block.conv, folded=block.mode == "nearest")
