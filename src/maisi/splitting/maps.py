"""Feature maps cut along one axis: what they can be asked for, and where their parts wait. Knows no layer.

A map is `B C X Y Z`; its cut axis is X, Y or Z, and a *row* is everything at one index of that axis. Whoever needs a
map asks for rows; whether they lie in memory, wait on a disk or are computed on the spot is the map's own business.
"""

from __future__ import annotations

import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from maisi.errors import MaisiError
from maisi.io.files import writing

Storage = Literal["device", "host", "disk"]
"""Where parts wait: on the device that made them, in the machine's memory, or in files."""

FIRST_SPATIAL_DIM = 2


class FeatureMap(ABC):
    """A map along its cut axis.

    Attributes:
        axis: 0, 1 or 2 for X, Y, Z.
        size: rows.
    """

    axis: int
    size: int

    @abstractmethod
    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows start to stop - 1, `0 <= start < stop <= size`, on a device."""

    def release(self, before: int) -> None:  # noqa: B027
        """Say that rows below `before` will not be asked for again."""

    @property
    def dim(self) -> int:
        """The cut axis among a tensor's dimensions."""
        return FIRST_SPATIAL_DIM + self.axis


class Whole(FeatureMap):
    """A map that lies in memory as one tensor."""

    def __init__(self, tensor: Tensor, axis: int) -> None:
        self.tensor, self.axis = tensor, axis
        self.size = tensor.shape[FIRST_SPATIAL_DIM + axis]

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """A view where possible."""
        return self.tensor.narrow(self.dim, start, stop - start).to(device)


class Pulled(FeatureMap):
    """A map whose rows are fetched when they are asked for: the end of a chain that is read from a file."""

    def __init__(self, axis: int, size: int, fetch: Callable[[int, int], Tensor]) -> None:
        """`fetch` gives rows start to stop - 1, `B C X Y Z`."""
        self.axis, self.size, self.fetch = axis, size, fetch

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Fetch them anew each time."""
        return self.fetch(start, stop).to(device)


class Waiting(Protocol):
    """One part of a stored map."""

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows of this part, counted from its own first one."""

    def drop(self) -> None:
        """Give up what it takes."""


@dataclass
class InMemory:
    """A part that waits as a tensor."""

    tensor: Tensor
    dim: int

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """See `Waiting`."""
        return self.tensor.narrow(self.dim, start, stop - start).to(device)

    def drop(self) -> None:
        """See `Waiting`."""
        self.tensor = self.tensor.new_empty(0)


def _space(shape: Sequence[int], dim: int, rows: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Room for some rows of a map, channels-last."""
    size = [rows if d == dim else n for d, n in enumerate(shape)]
    return torch.empty(size, dtype=dtype, device=device, memory_format=torch.channels_last_3d)


class Writer:
    """Writes one part while the next is computed, which takes the memory of one part more."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def write(self, job: Callable[[], None]) -> Future[None]:
        """Begin a job when the one before has ended.

        Raises:
            MaisiError: that one failed.
        """
        if self._last is not None:
            ended(self._last)
        self._last = self._thread.submit(job)
        return self._last


def ended(job: Future[None]) -> None:
    """Wait for a job's end.

    Raises:
        MaisiError: it failed. A new one each time: the job's own would keep what it passes through, and parts' files.
    """
    error = job.exception()
    if isinstance(error, MaisiError):
        raise MaisiError(str(error))
    if error is not None:
        raise error


class OnDisk:
    """A part that waits in a file, its rows one after the other, so that a few are read without the rest."""

    def __init__(self, tensor: Tensor, dim: int, folder: Path, writer: Writer) -> None:
        """Begin to write it.

        Raises:
            MaisiError: the disk is full, or was for the part before.
        """
        # rows first, channels last: of a map that is channels-last and cut along X not a value changes its place
        self.order = (dim, 0, *(d for d in range(FIRST_SPATIAL_DIM, 5) if d != dim), 1)
        self.shape, self.dim, self.dtype = tensor.shape, dim, tensor.dtype
        # flat: an axis of one value may keep any stride, which a view of bytes does not take
        values = tensor.permute(self.order).contiguous().cpu().flatten().view(torch.uint8).numpy().data
        with writing(folder):
            file = tempfile.NamedTemporaryFile(dir=folder, suffix=".rows", delete=False)  # noqa: SIM115
        self.path = Path(file.name)
        # the thread is given the finalizer alone: holding the part, it would keep the file of one that nobody wants
        self._finalizer = give_up = weakref.finalize(self, self.path.unlink, missing_ok=True)

        def write() -> None:
            try:
                with writing(folder), file:
                    file.write(values)
            except BaseException:
                give_up()
                raise

        try:
            self._written = writer.write(write)
        except BaseException:
            file.close()
            give_up()
            raise

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """See `Waiting`.

        Raises:
            MaisiError: the disk was full, or the file has been cut short since.
        """
        ended(self._written)
        made = _space(self.shape, self.dim, stop - start, self.dtype)
        stored = made.permute(self.order)
        read = stored if stored.is_contiguous() else torch.empty(stored.shape, dtype=self.dtype)
        space = read.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb") as file:
            file.seek(start * stored[0].numel() * self.dtype.itemsize)
            if file.readinto(space) != space.nbytes:
                raise MaisiError(f"{self.path}, where rows of a feature map wait, was cut short; start again.")
        if read is not stored:
            stored.copy_(read)
        return made.to(device)

    def drop(self) -> None:
        """See `Waiting`."""
        self._finalizer()


@dataclass
class Ledger:
    """In a forecast, the bytes of parts that wait elsewhere: those there are, and the most there were.

    `written` is the part that a `Writer` would hold.
    """

    waiting: int = 0
    peak: int = 0
    written: Tensor | None = None

    def enter(self, size: int) -> None:
        """Add a part, or with a negative size take one away."""
        self.waiting += size
        self.peak = max(self.peak, self.waiting)


class OnPaper:
    """In a forecast, the place of a part that waits elsewhere: its shape, which takes nothing, and a ledger's entry."""

    def __init__(self, tensor: Tensor, dim: int, ledger: Ledger) -> None:
        self.shape, self.dtype, self.dim = list(tensor.shape), tensor.dtype, dim
        ledger.enter(tensor.nbytes)
        self._finalizer = weakref.finalize(self, ledger.enter, -tensor.nbytes)

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """See `Waiting`."""
        return _space(self.shape, self.dim, stop - start, self.dtype, device)

    def drop(self) -> None:
        """See `Waiting`."""
        self._finalizer()


class Parts(FeatureMap):
    """A stored map: parts in order, each a stretch of rows. A process of several holds its own stretch and edges."""

    def __init__(self, axis: int, size: int) -> None:
        self.axis, self.size = axis, size
        self._parts: list[tuple[int, int, Waiting]] = []

    def add(self, start: int, stop: int, part: Waiting) -> None:
        """Put a part in; in any order, without overlap."""
        self._parts.append((start, stop, part))
        self._parts.sort(key=lambda entry: entry[0])

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Cut them out of the parts they lie in.

        Raises:
            ValueError: they are not here (any more).
        """
        pieces, position = [], start
        for first, end, part in self._parts:
            if first <= position < min(end, stop):
                upto = min(end, stop)
                pieces.append(part.rows(position - first, upto - first, device))
                position = upto
        if position != stop:
            raise ValueError(f"rows {position} to {stop} of a map of {self.size} are not here")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def release(self, before: int) -> None:
        """Drop the parts that end there."""
        for _, end, part in self._parts:
            if end <= before:
                part.drop()
        self._parts = [entry for entry in self._parts if entry[1] > before]


class Begun(Parts):
    """A map of which only the first parts are stored; rows of the others are computed when they are asked for."""

    def __init__(self, computed: FeatureMap) -> None:
        super().__init__(computed.axis, computed.size)
        self._computed, self._end = computed, 0

    def add(self, start: int, stop: int, part: Waiting) -> None:
        """See `Parts`; here in order, from the first row on."""
        super().add(start, stop, part)
        self._end = stop

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Those stored, and those computed."""
        middle = min(max(start, self._end), stop)
        pieces = [super().rows(start, middle, device)] if start < middle else []
        if middle < stop:
            pieces.append(self._computed.rows(middle, stop, device))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def release(self, before: int) -> None:
        """Drop parts, and let go of what the others are computed from."""
        super().release(before)
        self._computed.release(before)


@dataclass(frozen=True)
class Store:
    """Where parts are put.

    Attributes:
        storage: see `Storage`.
        folder: for "disk": an existing folder; files are removed with their part.
        ledger: for a forecast: what would wait there is entered here.
        writer: for "disk".
    """

    storage: Storage = "device"
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    ledger: Ledger = field(default_factory=Ledger, compare=False)
    writer: Writer = field(default_factory=Writer, compare=False)

    def put(self, tensor: Tensor, axis: int) -> Waiting:
        """Let a part wait."""
        dim = FIRST_SPATIAL_DIM + axis
        if tensor.is_meta and self.storage != "device":
            self.ledger.written = tensor if self.storage == "disk" else None
            return OnPaper(tensor, dim, self.ledger)
        if self.storage == "disk":
            return OnDisk(tensor, dim, self.folder, self.writer)
        return InMemory(tensor.cpu() if self.storage == "host" else tensor, dim)


def cuts(start: int, stop: int, parts: int, together: int = 1) -> list[tuple[int, int]]:
    """Cut rows into as many even stretches as asked for, none of them empty: fewer where there are fewer rows.

    With `together` rows in each or more they are multiples of it, but for the last.
    """
    rows = stop - start
    count = max(1, min(parts, rows))
    unit = together if rows >= together * count else 1
    marks = [start + round(rows * i / count / unit) * unit for i in range(count)]
    return list(pairwise([*marks, stop]))
