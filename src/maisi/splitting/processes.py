"""Several processes that each hold a stretch of every map's rows: what they tell each other. Knows no layer.

Neighbours exchange one row on each side of a stored map, and all of them the statistics of norms; nothing else travels
until the results are gathered. Works on CPUs (gloo) and GPUs (NCCL) under `torchrun`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from maisi.device import fault_of
from maisi.errors import MaisiError
from maisi.io.slabs import Spool
from maisi.splitting.layers import Moments

TIMEOUT = timedelta(minutes=10)
T = TypeVar("T")

# What is received into is made outside inference mode: the threads of PyTorch 2.5's backends may not write to tensors
# of that mode.
_receives = torch.inference_mode(False)


class LostProcessError(MaisiError):
    """Another process of the group did not answer: what went wrong is said there, or by who ended it."""


class Processes:
    """The processes of torch.distributed's default group, in the order of their rows; see `execution.Group`."""

    def __init__(self, device: torch.device) -> None:
        """`device`: where what travels has to lie."""
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def agreed(self, decide: Callable[[], T]) -> T:
        """What the first process decides; the others wait for it."""
        made = [decide() if self.rank == 0 else None]
        with _together():
            dist.broadcast_object_list(made, 0)
        return cast(T, made[0])

    def in_order(self, slabs: Iterable[NDArray[np.int16]]) -> Iterator[NDArray[np.int16]]:
        """For the first process the slabs of all, one after the other; the others' iterators end when theirs are sent.

        All compute at the same time: slabs of the others wait in an unnamed file until those before are taken.

        Raises:
            MaisiError: a process is lost, or the disk with the folder for temporary files is full.
        """
        if self.rank == 0:
            yield from slabs
            for other in range(1, self.size):
                yield from self._received(other)
            return
        with Spool(Path(tempfile.gettempdir())) as spool:
            for slab in slabs:
                spool.add(slab)
            for number, (x, y, z) in enumerate(spool.shapes):
                self._send(np.array((x, y, z), np.int64))
                self._send(spool.planes(number, 0, z))
            self._send(np.zeros(3, np.int64))

    def _received(self, other: int) -> Iterator[NDArray[np.int16]]:
        while (shape := self._receive(other, 3, np.int64)).any():
            yield self._receive(other, int(shape.prod()), np.int16).reshape(shape, order="F")

    def _send(self, array: NDArray[Any]) -> None:
        raw = np.frombuffer(array.tobytes(order="F"), np.uint8).copy()
        with _together():
            dist.send(torch.from_numpy(raw).to(self.device), 0)

    @_receives
    def _receive(self, other: int, count: int, dtype: type[np.generic]) -> NDArray[Any]:
        raw = torch.empty(count * np.dtype(dtype).itemsize, dtype=torch.uint8, device=self.device)
        with _together():
            dist.recv(raw, other)
        return raw.cpu().numpy().view(dtype)

    @_receives
    def merged(self, moments: Moments) -> Moments:
        """Statistics of all processes' rows: gathered, then merged in the order of the ranks by each of them."""
        count = torch.full_like(moments.mean, float(moments.count))
        mine = torch.stack([count, moments.mean, moments.deviations])
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with _together():
            dist.all_gather(every, mine)
        return reduce(Moments.merged, (Moments(int(c[0, 0]), mean, m2) for c, mean, m2 in every))

    @_receives
    def edges(self, first: Tensor, last: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Give the neighbours my first and last row; get the row before mine and the one after."""
        before = torch.empty_like(first) if self.rank > 0 else None
        after = torch.empty_like(last) if self.rank < self.size - 1 else None
        exchanges = []
        for given, got, other in ((first, before, self.rank - 1), (last, after, self.rank + 1)):
            if got is not None:
                exchanges += [dist.P2POp(dist.isend, given, other), dist.P2POp(dist.irecv, got, other)]
        with _together():
            for request in dist.batch_isend_irecv(exchanges) if exchanges else ():
                request.wait()
        return before, after

    @_receives
    def gathered(self, rows: Tensor, dim: int) -> Tensor | None:
        """All processes' rows joined, for the first process; None for the others. They may differ in number."""
        rows = rows.to(self.device)
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.size)]
        with _together():
            dist.all_gather(counts, torch.tensor([rows.shape[dim]], device=rows.device))
            if self.rank > 0:
                dist.send(rows.contiguous(), 0)
                return None
            pieces = [rows]
            for other in range(1, self.size):
                shape = list(rows.shape)
                shape[dim] = int(counts[other])
                piece = torch.empty(shape, dtype=rows.dtype, device=rows.device)
                dist.recv(piece, other)
                pieces.append(piece)
        return torch.cat(pieces, dim)


@contextmanager
def joined(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """Join the processes that `torchrun` started.

    On GPUs each takes the one of its number on its machine, which becomes the current one.

    Raises:
        MaisiError: not all of them come, or one is lost on the way; more of them than GPUs.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    device = _own_gpu(int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else torch.device("cpu")
    with _together():
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield Processes(device)
    finally:
        dist.destroy_process_group()


def _own_gpu(number: int) -> torch.device:
    """Make a GPU the current one, and return it by its number: `cuda` alone may have been numbered before."""
    there = torch.cuda.device_count()
    if number >= there:
        raise MaisiError(f"There are more processes than GPUs here ({there}); start one for each GPU, or --device cpu.")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@contextmanager
def _together() -> Iterator[None]:
    """Say in a sentence that a process is lost, in place of a backend's trace; memory that ran out here is no loss."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if fault_of(error):
            raise
        reason = str(error).splitlines()[0]
        raise LostProcessError(f"Another process of the group was lost ({reason}); start all of them again.") from None
