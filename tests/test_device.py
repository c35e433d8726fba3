"""Devices, precisions and memory."""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maisi.device import (
    _cores_of_group,
    _left_to_group,
    fault_of,
    free_memory,
    numbered,
    parse_memory,
    peak_memory,
    resolve_device,
    resolve_precision,
    used_memory,
)
from maisi.errors import MaisiError

HELD = """
import sys
import psutil, torch
from maisi.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = psutil.Process().memory_info().rss
tensor = torch.zeros(50_000_000)
del tensor
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told to glibc alone")
def test_freed_memory_is_kept_when_asked() -> None:
    def held(word: str) -> int:
        return int(subprocess.run([sys.executable, "-c", HELD, word], capture_output=True, check=True).stdout)

    assert held("keep") > 150_000_000
    assert held("no") < 50_000_000


def test_names_become_devices_or_sentences() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(MaisiError, match="choose from auto, cpu, cuda, mps"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(MaisiError, match="cuda"):
            resolve_device("cuda")


def test_a_cuda_device_is_the_one_this_process_uses(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("cuda") == resolve_device("auto") == torch.device("cuda", 1)
    assert numbered(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert numbered(torch.device("cpu")) == torch.device("cpu")


def test_what_pytorch_keeps_of_freed_memory_is_free(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_memory(torch.device("cuda")) == 45


def test_apples_gpu_is_taken_only_where_it_is_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    assert resolve_device("mps").type == "mps"


def test_precisions() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == torch.float32
    assert resolve_precision("bf16", cpu) == torch.bfloat16
    assert resolve_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(MaisiError, match="precision"):
        resolve_precision("fp8", cpu)


def test_memory_is_counted_in_bytes() -> None:
    assert free_memory(torch.device("cpu")) > 2**26
    assert peak_memory(torch.device("cpu")) > 2**26


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * 2**30), ("800 MB", 800_000_000), ("1.5g", 3 * 2**29), ("512b", 512), ("2KiB", 2048)],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "0GB", "-1GB", "6 GiB of it", "6XB", "6"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(MaisiError, match="write it like 6GiB"):
        parse_memory(text)


def test_memory_in_use_grows_with_tensors() -> None:
    before = used_memory(torch.device("cpu"))
    fresh = mmap.mmap(-1, 2**26)  # what the allocator kept of freed tensors would not be new to the process
    ballast = torch.frombuffer(fresh, dtype=torch.float32).fill_(1)
    assert used_memory(torch.device("cpu")) > before + ballast.numel() * 3


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "memory did not suffice"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), "memory did not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory did not suffice"),
        (MemoryError(), "memory did not suffice"),
        (
            RuntimeError("CUDA error: unspecified launch failure\nCompile with"),
            "failed (CUDA error: unspecified launch",
        ),
    ],
)
def test_faults_of_devices_are_sentences(error: MemoryError | RuntimeError, told: str) -> None:
    sentence = fault_of(error)
    assert sentence is not None
    assert told in sentence
    assert "\n" not in sentence


def test_other_errors_are_no_faults_of_devices() -> None:
    assert fault_of(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")) is None


def group(folder: Path, limit: str, usage: str, most: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text(f"{most}\n")
    (folder / usage).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def test_the_limit_of_a_container_is_what_is_free(tmp_path: Path) -> None:
    own, top = tmp_path / "own", tmp_path / "groups"
    new = ("memory.max", "memory.current")
    own.write_text("0::/job/step\n")
    assert _left_to_group(top, own) == math.inf
    group(top / "job", *new, "8000", 5000, "anon 3000\ninactive_file 1000\n")
    group(top / "job" / "step", *new, "max", 5000, "anon 3000\n")
    assert _left_to_group(top, own) == 4000
    group(top / "job" / "step", *new, "6000", 5500, "inactive_file 500\n")
    assert _left_to_group(top, own) == 1000
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    own.write_text("9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    assert _left_to_group(top, own) == math.inf
    group(top / "memory", *old, "9000", 9500, "total_inactive_file 0\n")  # the container's own is all that it sees
    assert _left_to_group(top, own) == 0
    group(
        top / "memory",
        *old,
        "9000",
        6000,
        "inactive_file 0\nactive_file 7\ntotal_inactive_file 2000\ntotal_active_file 1000\n",
    )
    assert _left_to_group(top, own) == 6000
    assert _left_to_group(top, tmp_path / "none") == math.inf


def test_free_memory_is_no_more_than_the_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maisi.device._left_to_group", lambda: 12345.0)
    assert free_memory(torch.device("cpu")) == 12345


def test_apples_gpu_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(MaisiError, match="know no bf16; take --precision fp32"):
        resolve_precision("bf16", torch.device("mps"))
    assert resolve_precision("auto", torch.device("mps")) == torch.float32
    assert resolve_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.7.1"))
    with pytest.raises(MaisiError, match=r"needs PyTorch 2\.8 or newer"):
        resolve_device("mps")


def test_a_containers_cores_are_what_threads_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, top = tmp_path / "own", tmp_path / "groups"
    own.write_text("0::/job\n")
    assert _cores_of_group(top, own) == math.inf
    (top / "job").mkdir(parents=True)
    (top / "job" / "cpu.max").write_text("max 100000\n")
    assert _cores_of_group(top, own) == math.inf
    (top / "cpu.max").write_text("150000 100000\n")
    assert _cores_of_group(top, own) == 1.5
    own.write_text("3:cpu,cpuacct:/docker/abc\n")
    (top / "cpu").mkdir()
    (top / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (top / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert _cores_of_group(top, own) == math.inf
    (top / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    assert _cores_of_group(top, own) == 4


def test_pytorch_takes_no_more_threads_than_a_container_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("maisi.device._cores_of_group", lambda: 1.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    resolve_device("cpu")
    assert taken == []  # the user's word counts
    monkeypatch.delenv("OMP_NUM_THREADS")
    resolve_device("cpu")
    monkeypatch.setattr("maisi.device._cores_of_group", lambda: math.inf)
    resolve_device("cpu")
    assert taken == [2]
