"""Where networks run, in which number format, and how much memory is free there. Torch is imported when asked."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from maisi.errors import MaisiError

if TYPE_CHECKING:
    import torch

MPS_VERSION = "2.8"
"""Of PyTorch, the first that has transposed convolutions of volumes on Apple's GPU."""

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")

CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux keeps limits of groups of processes, and which of them this process is in."""

_LEAST_BARE = 10**6
"""A smaller number without a unit is no number of bytes: the unit was forgotten."""

NetworkT = TypeVar("NetworkT", bound="torch.nn.Module")

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Options of glibc's `mallopt` (malloc.h)."""


def resolve_device(name: str = "auto") -> torch.device:
    """Turn a member of `DEVICES` into a device that is there; `auto` takes CUDA, then the CPU.

    Apple's GPU is taken where it is asked for: nothing here was ever run on one. PyTorch then computes in no more
    threads than there are cores for: it counts the machine's, of which a container may have few.

    Raises:
        MaisiError: the device is unknown or not there.
    """
    import torch

    if name not in DEVICES:
        raise MaisiError(f"Unknown device '{name}'; choose from {', '.join(DEVICES)}.")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        raise MaisiError(f"PyTorch finds no device '{name}' here; choose auto or cpu.")
    if name == "mps" and torch.__version__ < MPS_VERSION:
        raise MaisiError(f"On Apple's GPU this needs PyTorch {MPS_VERSION} or newer; upgrade it, or choose cpu.")
    cores = _cores_of_group()
    if cores < torch.get_num_threads() and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, math.ceil(cores)))
    return numbered(torch.device(name))


def numbered(device: torch.device) -> torch.device:
    """A CUDA device by its number: without one, some libraries take the first GPU, not the one this process uses."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn a member of `PRECISIONS` into the type of weights and feature maps.

    `auto` is bfloat16 only where the hardware multiplies it natively (CUDA from Ampere on, CPUs with AMX or
    AVX-512 BF16): elsewhere it is emulated, slower and less exact than float32.

    Raises:
        MaisiError: the precision is unknown, or nothing that the device computes in.
    """
    import torch

    if name not in PRECISIONS:
        raise MaisiError(f"Unknown precision '{name}'; choose from {', '.join(PRECISIONS)}.")
    if name == "auto":
        name = "bf16" if _multiplies_bf16(device) else "fp32"
    if name == "bf16" and device.type == "mps":
        raise MaisiError("Transposed convolutions of Apple's GPU know no bf16; take --precision fp32.")
    return torch.bfloat16 if name == "bf16" else torch.float32


def feature_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Order of feature maps in memory that suits the hardware best.

    Channels last, but for bfloat16 on CPUs without AMX: their convolutions gain nothing from it, and PyTorch's group
    norm takes up to ten times as long in it.
    """
    import torch

    plain = device.type == "cpu" and dtype == torch.bfloat16 and not _has_amx()
    return torch.contiguous_format if plain else torch.channels_last_3d


def placed(
    network: NetworkT, device: torch.device, layout: torch.memory_format, dtype: torch.dtype | None = None
) -> NetworkT:
    """Move a network's weights to a device, in the order that its feature maps have; `dtype` None keeps their type."""
    moved: NetworkT = network.to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
    return moved


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the device (for Apple's GPU and the CPU: in the machine).

    What PyTorch keeps of freed memory on a CUDA device is free, too: this process takes it first.
    """
    import torch

    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(min(psutil.virtual_memory().available, _left_to_group()))


def _left_to_group(mounted: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> float:
    """Bytes that this process's control groups (of containers, of job schedulers) leave it; inf for no limit."""
    left = math.inf
    for folder, first in _groups("memory", mounted, own):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        left = min(left, _limit_less_usage(folder, *names))
    return left


def _cores_of_group(mounted: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> float:
    """Cores whose time this process's control groups give it; inf for no limit."""
    cores = math.inf
    for folder, first in _groups("cpu", mounted, own):
        try:
            if first:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if float(quota) > 0:  # -1 and 'max' are no limit
                cores = min(cores, float(quota) / float(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return cores


def _groups(controller: str, mounted: Path, own: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups that this process is in, those around them too; whether of the first version."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # another system
        return
    for _, controllers, group in (line for line in lines if len(line) == 3):
        first = controllers != ""
        if first and controller not in controllers.split(","):
            continue
        top = mounted / controller if first else mounted
        place = top / group.lstrip("/")
        # in a container the path may be the host's: then only the top is there, and is the container's own
        for folder in (place, *place.parents):
            if folder == top or top in folder.parents:
                yield folder, first


def _limit_less_usage(folder: Path, limit: str, usage: str) -> float:
    """What a group leaves of its limit; files that the kernel only keeps in memory are left. inf without a limit."""
    try:
        most = float((folder / limit).read_text())  # 'max' is no number
        used = float((folder / usage).read_text())
        told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return math.inf
    kept = sum(float(told.get(f"total_{kind}_file", told.get(f"{kind}_file", 0))) for kind in ("inactive", "active"))
    return max(0.0, most - used + kept)


def used_memory(device: torch.device) -> int:
    """Return the bytes that this process uses on the device (for Apple's GPU and the CPU: in the machine)."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def parse_memory(text: str) -> int:
    """Turn '6GiB', '800 MB' or '6g' (GiB) into bytes.

    Raises:
        MaisiError: that is no amount of memory.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?", text.strip().lower())
    bare = found is not None and not (found[2] or found[3])
    if found is None or float(found[1]) == 0 or (bare and float(found[1]) < _LEAST_BARE):
        raise MaisiError(f"'{text}' is no amount of memory; write it like 6GiB or 800MB.")
    base = 1000 if found[3] == "b" and found[2] else 1024
    return int(float(found[1]) * base ** " kmgt".index(found[2] or " "))


def fault_of(error: MemoryError | RuntimeError) -> str | None:
    """A sentence for an exception of PyTorch or NumPy that tells of memory run out or a GPU that failed; else None.

    A forecast cannot know what other programs take meanwhile. Not every device has a class of exceptions for it.
    """
    said = str(error)
    if isinstance(error, MemoryError) or re.search(r"out of memory|can.t allocate memory", said, re.IGNORECASE):
        return (
            "The memory did not suffice; close what else uses it, name less than is free (--memory, where the command "
            "has it), or take a smaller size or batch, or the CPU (--device cpu)."
        )
    if "CUDA error" in said:
        return (
            f"The GPU failed ({said.splitlines()[0]}); what was finished is kept. Run the same command again, on the "
            "CPU (--device cpu) if it fails again."
        )
    return None


def peak_memory(device: torch.device) -> int:
    """Return the largest memory this process has had in use so far, in bytes: on a CUDA device there, else in all."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def keep_freed_memory(sparing: bool = False) -> None:
    """Have the C library keep freed memory for the next tensor, where it can be told to (glibc); elsewhere do nothing.

    Otherwise every large tensor on a CPU is mapped anew and its pages are zeroed by the kernel: a training step of a
    small U-Net took 1.38 s so and 0.95 s with this, decoding 128^3 voxels 6.0 s and 4.6 s. The process's memory no
    longer shrinks while it runs, and what lies between its tensors can take a third more than a plan foresees.

    Args:
        sparing: only memory of tensors below 32 MiB, which is little more than foreseen; half of the gain.
    """
    import ctypes
    import sys

    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return
    kept = ((M_MMAP_THRESHOLD, 2**25),) if sparing else ((M_MMAP_MAX, 0), (M_TOP_PAD, 2**28))
    for option, value in (*kept, (M_TRIM_THRESHOLD, -1)):
        mallopt(option, value)


def _multiplies_bf16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    return device.type == "cpu" and (_has_amx() or _has_avx512_bf16())


def _has_amx() -> bool:
    import torch

    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


def _has_avx512_bf16() -> bool:
    import torch

    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked())
