"""Several processes that each hold a stretch of every map's rows: what they tell each other. Knows no layer.

Neighbours exchange one row on each side of a stored map, and all of them the statistics of norms; nothing else travels
until the results are gathered. Works on CPUs (gloo) and GPUs (NCCL) under `torchrun`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from maisi.errors import MaisiError
from maisi.splitting.layers import Moments

TIMEOUT = timedelta(minutes=10)


class Processes:
    """The processes of torch.distributed's default group, in the order of their rows; see `execution.Group`."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def merged(self, moments: Moments) -> Moments:
        """Statistics of all processes' rows: gathered, then merged in the order of the ranks by each of them."""
        count = torch.full_like(moments.mean, float(moments.count))
        mine = torch.stack([count, moments.mean, moments.deviations])
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with _together():
            dist.all_gather(every, mine)
        return reduce(Moments.merged, (Moments(int(c[0, 0]), mean, m2) for c, mean, m2 in every))

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

    def gathered(self, rows: Tensor, dim: int) -> Tensor | None:
        """All processes' rows joined, for the first process; None for the others. They may differ in number."""
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

    Raises:
        MaisiError: not all of them come, or one is lost on the way.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _together():
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield Processes()
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """Say in a sentence that a process is lost, in place of a backend's trace."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        raise MaisiError(f"Another process of the group was lost ({reason}); start all of them again.") from None
