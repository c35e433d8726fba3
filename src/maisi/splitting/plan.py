"""From a memory budget to an execution: along which axis to cut, into how many parts, and where they wait.

Candidates are forecast (`maisi.splitting.forecast`) in the order of their speed, and the first that fits is taken.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from maisi.device import feature_layout, free_memory, used_memory
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting.autoencoder import decoded, encoded
from maisi.splitting.execution import Execution, Group, Recomputed
from maisi.splitting.forecast import counted, scratch_of
from maisi.splitting.layers import Moments
from maisi.splitting.maps import Ledger, Pulled, Storage, Store

Triple = tuple[int, int, int]
Task = Literal["encode", "decode"]

AXES = "XYZ"
PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
"""Numbers of parts that are tried; with more of them a plan saves little, and edges are computed twice more often."""

CPU_PART = 16 * 64
"""Rows of the image times channels of the finest maps in a part on a CPU, at most: larger parts take more memory and
are no quicker there, smaller ones are slower."""

CPU_PARTS = 32
"""On a CPU, at most, where memory allows fewer: with more of them edges are computed twice more often."""

CUDA_VALUES = 2**31
"""A tensor on CUDA has fewer values: cuDNN counts them in 32 bits."""

CUDA_SHARE = 0.8
"""Of a GPU's free memory that a plan takes unless told: kernels and the allocator's gaps need the rest. A plan of 75 of
77 GiB did not come to its end."""

FIXED_BYTES = 48 * 2**20
"""What PyTorch's kernels keep beside the tensors (rearranged weights, threads), whatever the size: measured."""


@dataclass(frozen=True)
class Plan:
    """How a volume is encoded or decoded, and the memory that takes beside the weights.

    Attributes:
        size: voxels of the image, multiples of the compression.
        axis: 0, 1, 2: the cut axis.
        parts: into how many parts each map is cut (fewer where it has fewer rows).
        storage: where the parts of stored maps wait.
        recompute: see `Recomputed`.
        peak_bytes: forecast, on the device.
        waiting_bytes: forecast, in host memory or on disk, where parts wait there.
        streamed: whether an image to encode is read row by row (else it lies in memory whole).
        processes: how many share the rows of every map; the forecasts are what each of them takes.
    """

    task: Task
    size: Triple
    axis: int
    parts: int
    storage: Storage
    recompute: Recomputed
    peak_bytes: int = 0
    waiting_bytes: int = 0
    streamed: bool = False
    processes: int = 1

    def execution(self, device: torch.device, folder: Path | None = None, group: Group | None = None) -> Execution:
        """Ready to run; parts that wait on disk go to `folder` (default: the system's for temporary files)."""
        store = Store(self.storage, folder or Path(tempfile.gettempdir()))
        return Execution(parts=self.parts, devices=(device,), store=store, recompute=self.recompute, group=group)

    def __str__(self) -> str:
        """Describe it in a line."""
        size = " x ".join(str(n) for n in self.size)
        how = "whole" if self.parts == 1 else f"{self.parts} parts along {AXES[self.axis]}"
        waiting = gib(self.waiting_bytes)
        where = {"device": "", "host": f", {waiting} waiting in the machine's memory", "disk": f", {waiting} on disk"}
        anew = {
            "none": "",
            "upsampled": ", the widest map computed anew",
            "inner": ", the finest maps computed anew",
            "finest": ", all that lies between the finest maps computed anew",
        }
        shared = f" in each of {self.processes} processes" if self.processes > 1 else ""
        way = f"{how}{where[self.storage]}{anew[self.recompute]}"
        return f"{self.task} {size}: {way}; about {gib(self.peak_bytes)}{shared} beside the weights"


def make_plan(
    config: AutoencoderConfig,
    task: Task,
    size: Triple,
    budget: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    streamed: bool = False,
    processes: int = 1,
    room: Mapping[Storage, int] | None = None,
) -> Plan:
    """Choose the quickest plan within `budget` bytes (of each process), weights not counted; it cuts the longest axis.

    Args:
        size: voxels of the image, multiples of the compression.
        room: bytes (for each process) that may wait in host memory and on disk; no limit where it does not say.

    Raises:
        MaisiError: no plan is that small; says what the smallest takes. Or there are more processes than rows.
    """
    room = room or {}
    # of equal axes the first, whose parts are contiguous in memory
    axis = max(range(3), key=lambda a: (size[a], -a))
    rows, voxels = size[axis] // config.compression, f"{' x '.join(str(n) for n in size)} voxels"
    if rows < processes:
        raise MaisiError(
            f"{processes} processes cannot share {voxels}, whose latents have {rows} rows along {AXES[axis]}; start at "
            f"most {rows}."
        )
    rows = -(-rows // processes)

    def candidate(storage: Storage, recompute: Recomputed, parts: int) -> Plan:
        plan = Plan(task, size, axis, parts, storage, recompute, streamed=streamed, processes=processes)
        return foreseen(config, plan, device, dtype)

    def has_room(plan: Plan) -> bool:
        return plan.waiting_bytes <= room.get(plan.storage, plan.waiting_bytes)

    def can_be_counted(plan: Plan) -> bool:
        return device.type != "cuda" or largest_tensor(config, plan, device, dtype) < CUDA_VALUES

    def will_do(plan: Plan) -> bool:
        return plan.peak_bytes <= budget and has_room(plan) and can_be_counted(plan)

    fewest = min(rows * config.compression * config.channels[0] // CPU_PART, CPU_PARTS) if device.type == "cpu" else 1
    counts = sorted({min(n, rows) for n in PARTS if n >= fewest})
    recomputed = _recomputed(config, task, device, processes)
    for way in _ways(recomputed, device):
        if will_do(plan := candidate(*way, counts[0])):
            return plan
        if min(candidate(*way, parts).peak_bytes for parts in counts[-3:]) > budget:
            continue  # in fewer parts it takes more; in the most a little more than in fewer, at times
        for plan in (candidate(*way, parts) for parts in counts[1:]):
            if will_do(plan):
                return plan
    smallest = [candidate("disk", recompute, rows) for recompute in recomputed]
    for plan in smallest:
        if will_do(plan):
            return plan
    fitting = [plan for plan in smallest if plan.peak_bytes <= budget]
    if not fitting:
        least = min(plan.peak_bytes for plan in smallest)
        raise MaisiError(
            f"To {task} {voxels} takes at least {gib(least)} and {gib(max(budget, 0))} are given beside the weights; "
            "give more memory (--memory) or a smaller size."
        )
    if not any(has_room(plan) for plan in fitting):
        least = min(plan.waiting_bytes for plan in fitting)
        raise MaisiError(
            f"To {task} {voxels} {gib(least)} of feature maps must wait on disk, and {gib(room['disk'])} are free in "
            f"{tempfile.gettempdir()}; set TMPDIR to a folder with more, or give more memory (--memory) or a smaller "
            "size."
        )
    raise MaisiError(
        f"To {task} {voxels} makes maps of more than {CUDA_VALUES} values, too many for CUDA's convolutions however "
        "they are cut; use a smaller size, or the CPU (--device cpu)."
    )


def _recomputed(config: AutoencoderConfig, task: Task, device: torch.device, processes: int) -> Sequence[Recomputed]:
    """What can be computed anew, the least first.

    Processes have one row of each neighbour; a map that is interpolated needs two, and so does one inside a block.
    All of the finest resolution only where memory is what there is least of: it is a third more arithmetic.
    """
    upsampled: Sequence[Recomputed] = ("upsampled",) if task == "decode" else ()
    if processes == 1:
        finest: Sequence[Recomputed] = ("finest",) if task == "decode" and device.type == "cuda" else ()
        return ("none", *upsampled, "inner", *finest)
    return ("none",) if config.upsampling == "trilinear" else ("none", *upsampled)


def _ways(recomputed: Sequence[Recomputed], device: torch.device) -> Iterator[tuple[Storage, Recomputed]]:
    """Ways to keep maps, quickest first."""
    for recompute in recomputed:
        yield "device", recompute
    if device.type != "cpu":
        yield "host", "none"
    for recompute in recomputed:
        yield "disk", recompute


def budget_beside(taken: int, memory: int | None, device: torch.device, processes: int = 1) -> int:
    """Bytes that a plan may use.

    Args:
        taken: what else will be needed beside what is in use now: weights not loaded yet, the result.
        memory: what the whole process may use on the device; None: `CUDA_SHARE` of what is free on a GPU now, on a CPU
            its share of all that is free.
        processes: how many share the machine's memory.
    """
    if memory is not None:
        return memory - used_memory(device) - taken
    free = free_memory(device)
    return (int(CUDA_SHARE * free) if device.type == "cuda" else free // processes) - taken


def free_on_disk(folder: Path) -> int:
    """Bytes that are free in a folder; none where it lies in memory, which systems do with that of temporary files."""
    place = folder.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if place.is_relative_to(m.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    if nearest is not None and nearest.fstype in ("tmpfs", "ramfs"):
        return 0
    return shutil.disk_usage(place).free


def waiting_room(processes: int = 1) -> dict[Storage, int]:
    """Bytes that each process may let wait: in memory that is free, and in the system's folder for temporary files."""
    free = {"host": free_memory(torch.device("cpu")), "disk": free_on_disk(Path(tempfile.gettempdir()))}
    return {"host": free["host"] // processes, "disk": free["disk"] // processes}


def coding_plan(
    config: AutoencoderConfig,
    task: Task,
    size: Triple,
    device: torch.device,
    dtype: torch.dtype,
    memory: int | None = None,
    weights: int = 0,
    *,
    streamed: bool = False,
    processes: int = 1,
) -> Plan:
    """How a volume will be encoded or decoded; this loads and computes nothing.

    Args:
        size: of the volume, before padding.
        memory: bytes that the process may use on the device; None: all that is free there.
        weights: bytes of networks still to be loaded.
        streamed: whether the image is taken from, or given to, a place outside the memory part by part.
        processes: how many share the work.

    Raises:
        MaisiError: the memory does not suffice.
    """
    multiple = config.compression
    x, y, z = (-(-n // multiple) * multiple for n in size)
    # encoding: the values in [0, 1]; decoding: the stored image
    beside = 0 if streamed or device.type != "cpu" else x * y * z * (4 if task == "encode" else 2)
    budget = budget_beside(weights + beside, memory, device, processes)
    room = waiting_room(processes)
    more: dict[str, Any] = {"streamed": streamed, "processes": processes, "room": room}
    return make_plan(config, task, (x, y, z), budget, device=device, dtype=dtype, **more)


def foreseen(config: AutoencoderConfig, plan: Plan, device: torch.device, dtype: torch.dtype) -> Plan:
    """Return the plan with its forecasts: the memory that it takes beside the weights, and what waits elsewhere."""
    peak, waiting, _ = _counted(config, replace(plan, peak_bytes=0, waiting_bytes=0), device, dtype)
    return replace(plan, peak_bytes=peak, waiting_bytes=waiting)


def largest_tensor(config: AutoencoderConfig, plan: Plan, device: torch.device, dtype: torch.dtype) -> int:
    """Values of the largest tensor that a plan makes."""
    return _counted(config, replace(plan, peak_bytes=0, waiting_bytes=0), device, dtype)[2]


@lru_cache(maxsize=512)
def _counted(config: AutoencoderConfig, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[int, int, int]:
    """Peak bytes beside the weights, peak bytes that wait elsewhere, values of the largest tensor."""
    layout, nowhere = feature_layout(device, dtype), torch.device("meta")
    with nowhere:
        model = Autoencoder(config).requires_grad_(False)
    model.to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    group = None if plan.processes == 1 else _Imagined(plan.processes - 1, plan.processes)
    ledger = Ledger()
    there = Execution(plan.parts, (nowhere,), Store(plan.storage, ledger=ledger), plan.recompute, group=group)
    decoding = plan.task == "decode"
    channels = config.latent_channels if decoding else config.in_channels
    size = [n // config.compression for n in plan.size] if decoding else list(plan.size)

    def rows(start: int, stop: int) -> torch.Tensor:
        shape = [1, channels, *size[: plan.axis], stop - start, *size[plan.axis + 1 :]]
        return torch.empty(shape, dtype=dtype, device=nowhere).contiguous(memory_format=layout)

    def run() -> None:
        pulled = plan.streamed and not decoding
        given = Pulled(plan.axis, size[plan.axis], rows) if pulled else rows(0, size[plan.axis])
        for _ in (decoded if decoding else encoded)(model, given, there, plan.axis):
            pass

    with torch.inference_mode():
        counter = counted(run, scratch_of(device))
    return FIXED_BYTES + counter.peak, ledger.peak, counter.largest


@dataclass
class _Imagined:
    """In a forecast, the group of the last process, whose share is the largest; it is given two neighbours' rows."""

    rank: int
    size: int

    def merged(self, moments: Moments) -> Moments:
        return moments

    def edges(self, first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return first, last


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"
