"""Decoding beside the reference: MONAI's autoencoder and ours, same random weights, same latent, one process each.

    python benchmarks/decode.py --size 64 --rounds 2 -o benchmarks/results/decode.json

The released configuration decodes to SIZE^3 voxels: the reference in float32 with each of its `num_splits`, of which
the quickest counts, ours in float32 and bfloat16, alternating. Prints time and memory as ratios to the reference and
the largest difference; the memory is the peak above what the process had with the weights loaded. Absolute times on
CPUs say little; they stand in the JSON for whoever wants to check the ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch


def reference(splits: int) -> torch.nn.Module:
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    return AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, num_channels=(64, 128, 256),
        num_res_blocks=(2, 2, 2), norm_num_groups=32, norm_eps=1e-6, attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, num_splits=splits, dim_split=0,
        norm_float16=False, save_mem=True,
    ).eval()  # fmt: skip


def measure(kind: str, folder: Path, splits: int, memory: float | None) -> dict[str, float]:
    """One decoding in this process; the image goes to FOLDER/KIND.npy."""
    from maisi.device import keep_freed_memory
    from maisi.generation import codec
    from maisi.splitting import autoencoder as split

    latent = torch.from_numpy(np.load(folder / "latent.npy"))
    if kind == "reference":
        net = reference(splits)
        net.load_state_dict(torch.load(folder / "official.pt", weights_only=True))
    else:
        net = codec.load_autoencoder(folder / "ours.safetensors", "cpu", kind)
        size = tuple(4 * n for n in latent.shape[2:])
        limit = None if memory is None else int(memory * 2**30)
        plan = codec.coding_plan(net.config, "decode", size, *codec.place_of(net), limit)  # type: ignore[arg-type]
        print(plan, file=sys.stderr)
        if memory is None:
            keep_freed_memory()
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    with torch.inference_mode():
        if kind == "reference":
            image = net.decode(latent)[0, 0].numpy()
        else:
            axis, execution = plan.axis, plan.execution(torch.device("cpu"))
            given = latent.to(codec.place_of(net)[1]).contiguous(memory_format=codec.layout_of(net))
            image = split.decode(net, given, execution, axis)[0, 0].numpy()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    np.save(folder / f"{kind}.npy", image)
    return {"seconds": seconds, "peak_bytes": peak}


def child(kind: str, folder: Path, splits: int, memory: float | None) -> dict[str, float]:
    order = [sys.executable, __file__, "--child", kind, "--folder", str(folder), "--splits", str(splits)]
    order += [] if memory is None else ["--memory", str(memory)]
    done = subprocess.run(order, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(size: int, rounds: int, splits: list[int], memory: float | None) -> dict[str, Any]:
    from maisi.weights.convert import convert

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        torch.save(reference(1).state_dict(), folder / "official.pt")
        convert(folder / "official.pt", folder / "ours.safetensors")
        np.save(folder / "latent.npy", torch.randn(1, 4, *[size // 4] * 3).numpy())
        tried = {n: child("reference", folder, n, None)["seconds"] for n in splits}
        best = min(tried, key=lambda n: tried[n])
        runs: dict[str, list[dict[str, float]]] = {"reference": [], "fp32": [], "bf16": []}
        for _ in range(rounds):
            for kind in runs:
                runs[kind].append(child(kind, folder, best, memory))
        images = {kind: np.load(folder / f"{kind}.npy") for kind in runs}
    middle = {
        kind: {what: statistics.median(run[what] for run in done) for what in done[0]} for kind, done in runs.items()
    }
    true = images["reference"]
    rows = {
        kind: {
            "speed": middle["reference"]["seconds"] / middle[kind]["seconds"],
            "memory": middle[kind]["peak_bytes"] / middle["reference"]["peak_bytes"],
            "largest_difference": float(np.abs(images[kind] - true).max() / np.abs(true).max()),
            "relative_error": float(np.linalg.norm(images[kind] - true) / np.linalg.norm(true)),
        }
        for kind in ("fp32", "bf16")
    }
    return {"size": size, "num_splits": best, "tried_seconds": tried, "memory_gib": memory, "ours": rows, "runs": runs}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--splits", default="1,2,4", help="the reference's num_splits to try")
    parser.add_argument("--memory", type=float, help="GiB that ours may use in all")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        print(json.dumps(measure(a.child, a.folder, int(a.splits), a.memory)))
        return
    result = {"machine": machine(), **compare(a.size, a.rounds, [int(n) for n in a.splits.split(",")], a.memory)}
    print(f"decode to {a.size}^3, released configuration; {result['machine']}")
    print("| ours | times as fast | memory | largest difference | relative error |\n|---|---|---|---|---|")
    for kind, row in result["ours"].items():
        print(
            f"| {kind} | {row['speed']:.2f} | {row['memory']:.2f} | {row['largest_difference']:.1e} "
            f"| {row['relative_error']:.1e} |"
        )
    if a.out:
        a.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
