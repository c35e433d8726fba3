"""The benchmarks at small sizes: they run, ours agrees with the reference, and what they write is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

CASES = {
    "decode": ["--size", "16", "--splits", "1,2"],
    "encode": ["--size", "16"],
    "denoise": ["--network", "unet", "--latent", "4", "--repeats", "2"],
    "denoise-controlnet": ["--network", "controlnet", "--latent", "4,4,8", "--repeats", "2"],
    "end_to_end": ["--size", "16", "--steps", "2"],
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a script, with its runs done in this process: each would spend seconds on importing PyTorch."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("maisi.device.keep_freed_memory", lambda sparing=False: None)
    before = set(sys.modules)

    def one(name: str) -> ModuleType:
        script, beside = __import__(name), __import__("beside")
        run = getattr(script, "one_run", None) or __import__("coding").one_run

        def here(file: str, kind: str, folder: Path, settings: dict) -> object:  # type: ignore[type-arg]
            made, cost = run(kind, folder, settings)
            np.save(folder / f"made-{kind}.npy", made)
            return cost

        monkeypatch.setattr(beside, "child", here)
        return script

    yield one
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and BENCHMARKS in Path(sys.modules[name].__file__).parents:
            del sys.modules[name]


@pytest.mark.parametrize("case", CASES)
def test_ours_beside_the_reference(case: str, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = case.split("-")[0]
    out = tmp_path / "results" / f"{case}.json"
    monkeypatch.setattr(sys, "argv", [name, *CASES[case], "--small", "--rounds", "2", "-o", str(out)])
    script = load(name)
    if name in ("decode", "encode"):
        __import__("coding").main(str(BENCHMARKS / f"{name}.py"), name, "")
    else:
        script.main()
    result = json.loads(out.read_text())
    assert [len(result["runs"][kind]) for kind in ("reference", "fp32", "bf16")] == [2, 2, 2]
    assert result["ours"]["fp32"]["largest_difference"] < 1e-3
    assert 0 < result["ours"]["bf16"]["largest_difference"] < 0.5
    least, most = result["ours"]["fp32"]["speed_least_most"]
    assert 0 < least <= result["ours"]["fp32"]["speed"] <= most
    assert {"name", "percent_busy_before", "under_load"} == result["machine"].keys()
    table = out.with_suffix(".md").read_text()
    assert result["machine"]["name"] in table
    assert "| bf16 |" in table


@pytest.mark.parametrize("task", ["decode", "encode", "train"])
def test_splitting(task: str, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results" / "splitting"
    arguments = ["--task", task, "--size", "32,8,8", "--parts", "1,2", "--small", "-o", str(out)]
    monkeypatch.setattr(sys, "argv", ["splitting", *arguments])
    script = load("splitting")
    script.main()
    result = json.loads(out.with_name("splitting.json").read_text())
    assert len(result["memory"]) == 2 * len(script.WAYS[task])
    assert [row["size"][0] for row in result["time"]] == [8, 16, 24, 32]
    assert all(row["seconds"] > 0 and row["forecast_bytes"] > 0 for row in result["memory"])
    for kind in ("memory", "time"):
        assert (tmp_path / "results" / f"splitting-{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_script_on_the_cpu(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results" / "gpu.json"
    arguments = ["--device", "cpu", "--small", "--sizes", "32,32x32x48", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments, "--seconds", "0", "-o", str(out)])
    load("gpu").main()
    result = json.loads(out.read_text())
    rows = result["measurements"]
    assert [(row["kind"], row["phase"]) for row in rows[:4]] == [
        (kind, phase) for phase in ("steps", "decode") for kind in ("reference", "bf16")
    ]
    assert len(rows) == 8
    assert all(row["finite"] and row["seconds"] > 0 and row["peak_bytes"] is None for row in rows)
    parts, precision, seams = result["exactness"]
    assert parts["largest_difference"] < 1e-4 < precision["relative_error"] < 0.1
    assert 0 < seams["relative_error"] < 0.5
    assert "| 32x32x48 | decoding |" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(("memory", "bytes_given"), [("half", 500), (None, None), ("2", 2 * 2**30)])
def test_gpu_script_gives_ours_half_of_what_the_reference_took(
    load, memory: str | None, bytes_given: int | None
) -> None:
    place = {"size": (32, 32, 32), "phase": "decode"}
    measured = [
        place | {"kind": "bf16", "peak_bytes": 90},
        place | {"kind": "reference", "peak_bytes": 1000},
        place | {"kind": "reference", "peak_bytes": 80, "phase": "steps"},
        place | {"kind": "reference", "peak_bytes": 70, "size": (48, 32, 32)},
    ]
    bench = SimpleNamespace(a=SimpleNamespace(memory=memory), result={"measurements": measured})
    assert load("gpu").Bench.given(bench, (32, 32, 32)) == bytes_given


def test_gpu_script_tells_of_what_fails(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--small", "--sizes", "16", "--steps", "1", "--warm-up", "16"]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments, "--seconds", "0.01", "-o", str(out)])
    script = load("gpu")
    script.main()
    result = json.loads(out.read_text())
    assert all(row["failed"].startswith("not run: out of time") for row in result["measurements"])
    assert "not run" in out.with_suffix(".md").read_text()


def test_a_process_of_its_own_counts_its_own_memory(load, tmp_path: Path) -> None:
    """The peak is what the work takes, not what was there before, nor a peak that has passed."""
    load("decode")
    beside = sys.modules["beside"]
    mib = 2**20
    held = torch.ones(64 * mib // 4)
    _, cost = beside.measured(lambda: float(torch.ones(32 * mib // 4).sum()), torch.device("cpu"))
    assert 0 <= cost.peak_bytes < 60 * mib
    assert held.sum() > 0


def test_the_real_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    import subprocess

    order = [sys.executable, str(BENCHMARKS / "encode.py"), "--size", "8", "--small", "--kinds", "fp32"]
    done = subprocess.run(order, capture_output=True, text=True, check=True)
    assert "encode 8 x 8 x 8, small configuration" in done.stdout
    assert "| fp32 |" in done.stdout
