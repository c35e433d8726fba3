"""Ours beside the reference: each run in a process of its own, the two alternating; time, memory and difference.

A benchmark gives its script and a function that does one run; this module starts the runs, measures, and reports the
ratios. A run's memory is the peak above what the process had with weights and inputs loaded. Absolute times on CPUs say
little; they stand in the JSON for whoever wants to check the ratios.

With `--device cuda` times come from CUDA events after a run that does not count, and memory from torch.cuda. That has
not been run yet: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

Result = TypeVar("Result")
Settings = dict[str, Any]
OneRun = Callable[[str, Path, Settings], tuple[np.ndarray, "Cost"]]
"""(kind, folder with weights and inputs, settings) -> what was made, and what it cost. Runs in its own process."""

BUSY_PERCENT = 10.0
"""Times are not worth keeping where others use more of the machine's cores than this."""

KINDS = ("reference", "fp32", "bf16")


@dataclass(frozen=True)
class Cost:
    """Of one run: wall time, time on the CPUs (steadier on a loaded machine), memory above what was loaded."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def options(description: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each kind, alternating")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kinds", default="fp32,bf16", help="which of ours")
    parser.add_argument("--small", action="store_true", help="small networks, to see that it works")
    parser.add_argument("-o", "--out", type=Path, help="JSON file; the table goes beside it as .md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def answered(a: argparse.Namespace, run: OneRun) -> bool:
    """In a process that `compared` started: do the run and print its cost."""
    if not a.child:
        return False
    order = json.loads(a.child)
    folder = Path(order["folder"])
    made, cost = run(order["kind"], folder, order["settings"])
    np.save(folder / f"made-{order['kind']}.npy", made)
    print(json.dumps(asdict(cost)))
    return True


def child(script: str, kind: str, folder: Path, settings: Settings) -> Cost:
    """One run in a process of its own."""
    order = json.dumps({"kind": kind, "folder": str(folder), "settings": settings})
    done = subprocess.run([sys.executable, script, "--child", order], stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def compared(
    script: str, prepare: Callable[[Path, Settings], None], a: argparse.Namespace, settings: Settings
) -> dict[str, Any]:
    """Reference and ours in turn, on what `prepare` puts into a folder; the ratios of each round and their middle."""
    kinds = ("reference", *a.kinds.split(","))
    place = machine(a.device)
    settings = {**settings, "device": a.device, "small": a.small}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, settings)
        runs: dict[str, list[Cost]] = {kind: [] for kind in kinds}
        for _ in range(a.rounds):
            for kind in kinds:
                runs[kind].append(child(script, kind, folder, settings))
        made = {kind: np.load(folder / f"made-{kind}.npy") for kind in kinds}
    rows = {kind: _row(runs["reference"], runs[kind], made["reference"], made[kind]) for kind in kinds[1:]}
    costs = {kind: [asdict(cost) for cost in done] for kind, done in runs.items()}
    return {"machine": place, "settings": settings, "ours": rows, "runs": costs}


def _row(theirs: list[Cost], ours: list[Cost], true: np.ndarray, made: np.ndarray) -> dict[str, Any]:
    pairs = list(zip(theirs, ours, strict=True))
    speeds = [t.seconds / o.seconds for t, o in pairs]
    return {
        "speed": statistics.median(speeds),
        "speed_least_most": [min(speeds), max(speeds)],
        "cpu_speed": statistics.median(t.cpu_seconds / o.cpu_seconds for t, o in pairs),
        "memory": statistics.median(o.peak_bytes / max(t.peak_bytes, 1) for t, o in pairs),
        "largest_difference": float(np.abs(made - true).max() / np.abs(true).max()),
        "relative_error": float(np.linalg.norm(made - true) / np.linalg.norm(true)),
    }


def table(title: str, result: dict[str, Any]) -> str:
    """The ratios, for people."""
    lines = [
        f"{title}; {result['machine']['name']}" + (", machine under load" if result["machine"]["under_load"] else ""),
        "",
        "| ours | times as fast (least to most) | by CPU time | memory | largest difference | relative error |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in result["ours"].items():
        least, most = row["speed_least_most"]
        lines.append(
            f"| {kind} | {row['speed']:.2f} ({least:.2f} to {most:.2f}) | {row['cpu_speed']:.2f} | {row['memory']:.2f} "
            f"| {row['largest_difference']:.1e} | {row['relative_error']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def report(title: str, result: dict[str, Any], out: Path | None) -> None:
    """Print the table; write it and the JSON."""
    text = table(title, result)
    print(text, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(text, encoding="utf-8")


def measured(work: Callable[[], Result], device: torch.device, repeats: int = 1) -> tuple[Result, Cost]:
    """Do a piece of work; the middle of the repeats' times (the first of several does not count), the most memory."""
    if device.type == "cuda":
        return _measured_on_gpu(work, device, repeats)
    _return_freed()
    before = psutil.Process().memory_info().rss
    _forget_peak()
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        made = work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    counted = slice(min(1, repeats - 1), None)
    cost = Cost(statistics.median(walls[counted]), statistics.median(cpus[counted]), max(_peak() - before, 0))
    return made, cost


def _measured_on_gpu(work: Callable[[], Result], device: torch.device, repeats: int) -> tuple[Result, Cost]:
    made = work()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    del made
    before, times, cpu = torch.cuda.memory_allocated(device), [], time.process_time()
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        made = work()
        stop.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(stop) / 1000)
    spent = (time.process_time() - cpu) / repeats
    return made, Cost(statistics.median(times), spent, torch.cuda.max_memory_allocated(device) - before)


def _return_freed() -> None:
    """Give back to the system what loading has freed (glibc): else it would be used again unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _forget_peak() -> None:
    """Linux: start the record of the most memory anew; elsewhere loading may count too."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    """Most memory since then. (`getrusage` would count what the starting process had, too.)"""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def machine(device: str) -> dict[str, Any]:
    """Its name, and whether others were using it when the runs began."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    name = f"{model}, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    busy = psutil.cpu_percent(interval=2.0)
    return {
        "name": f"{name}, PyTorch {torch.__version__}",
        "percent_busy_before": busy,
        "under_load": busy > BUSY_PERCENT,
    }


def sizes(text: str) -> tuple[int, ...]:
    """`64` -> (64, 64, 64), `64,64,32` -> themselves."""
    numbers = tuple(int(n) for n in text.split(","))
    return numbers * 3 if len(numbers) == 1 else numbers
