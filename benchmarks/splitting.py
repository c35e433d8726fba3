"""What splitting costs and saves: peak memory against the number of parts, time against size. Two pictures and a JSON.

    python benchmarks/splitting.py --task decode --size 96,48,48 -o benchmarks/results/splitting-decode
    python benchmarks/splitting.py --task train --size 64 --parts 1,2,4,8 -o benchmarks/results/splitting-train

The released autoencoder in float32 (or `--small`), random weights, each run in a process of its own. Memory is drawn
for each way to keep the maps, measured beside forecast: with the maps on disk it follows the slab, a part's rows.
`train` is the autoencoder's forward and backward pass with an L1 loss. Time is that of the size's axis X cut to a
quarter, a half, three quarters and the whole. How things are measured: beside.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import beside
import numpy as np
import torch

from maisi.device import feature_layout
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting import autoencoder as split
from maisi.splitting.plan import Plan, foreseen
from maisi.training.splitting import SplittingConfig, coding_for, step_bytes

SMALL = AutoencoderConfig(channels=(16, 16), num_res_blocks=(1, 1), norm_groups=8)
WAYS = {
    "decode": (
        ("device", "none"),
        ("device", "upsampled"),
        ("device", "inner"),
        ("device", "finest"),
        ("disk", "none"),
    ),
    "encode": (("device", "none"), ("device", "inner"), ("disk", "none")),
    "train": (("device", "none"), ("device", "inner")),
}
"""Where stored maps wait, and which are computed anew instead."""


def one_run(kind: str, folder: Path, settings: beside.Settings) -> tuple[np.ndarray, beside.Cost]:
    """`kind` is the task. Returns the forecast."""
    device, size, parts = torch.device(settings["device"]), tuple(settings["size"]), settings["parts"]
    config = SMALL if settings["small"] else AutoencoderConfig()
    storage, recompute = settings["way"]
    torch.manual_seed(0)
    model: Any = Autoencoder(config).to(device, memory_format=torch.channels_last_3d)
    latent = tuple(n // config.compression for n in size)
    given = torch.rand(1, 4, *latent) if kind == "decode" else torch.rand(1, 1, *size)
    given = given.to(device).contiguous(memory_format=feature_layout(device, torch.float32))
    if kind == "train":
        wanted = SplittingConfig(parts=parts, recompute=recompute == "inner" and parts > 1)
        coding = coding_for(wanted, config, (1, 1, *size), device, torch.float32)
        forecast = step_bytes(config, (1, 1, *size), coding, device, torch.float32)

        def work() -> None:
            latents = coding.encode(model, given)
            (coding.decode(model, latents.mean) - given).abs().mean().backward()

        _, cost = beside.measured(work, device)
        return np.array(forecast), cost
    plan = foreseen(config, Plan(kind, size, 0, parts, storage, recompute), device, torch.float32)  # type: ignore[arg-type]
    execution = plan.execution(device, folder)
    run = split.decoded if kind == "decode" else split.encoded
    with torch.inference_mode():
        _, cost = beside.measured(lambda: [None for _ in run(model, given, execution, 0)], device)
    return np.array(plan.peak_bytes), cost


def series(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs: memory for every way and number of parts, time for four sizes in four parts."""
    x, y, z = beside.sizes(a.size)
    settings = {"device": a.device, "small": a.small}

    def row(size: tuple[int, int, int], parts: int, way: tuple[str, str]) -> dict[str, Any]:
        order = {**settings, "size": size, "parts": parts, "way": way}
        cost = beside.child(__file__, a.task, folder, order)
        forecast = int(np.load(folder / f"made-{a.task}.npy"))
        return {"size": size, "parts": parts, "way": way, "forecast_bytes": forecast, **asdict(cost)}

    parts = [int(n) for n in a.parts.split(",")]
    quarters = sorted({max(8, x * n // 4 // 8 * 8) for n in (1, 2, 3, 4)})
    first = WAYS[a.task][0]
    return {
        "machine": beside.machine(a.device),
        "task": a.task,
        "size": (x, y, z),
        "memory": [row((x, y, z), n, way) for way in WAYS[a.task] for n in parts],
        "time": [row((n, y, z), 4, first) for n in quarters],
    }


def pictures(result: dict[str, Any], out: Path) -> None:
    """Draw both series: OUT-memory.png and OUT-time.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    title = f"{result['task']} {' x '.join(map(str, result['size']))}"
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for index, way in enumerate(WAYS[result["task"]]):
        rows = [row for row in result["memory"] if tuple(row["way"]) == way]
        again = {
            "none": "",
            "upsampled": ", upsampled ones computed anew",
            "inner": ", inner ones computed anew",
            "finest": ", nearly all finest ones computed anew",
        }
        name = {"device": "maps in memory", "disk": "maps on disk"}[way[0]] + again[way[1]]
        parts = [row["parts"] for row in rows]
        axes.plot(parts, [row["peak_bytes"] / 2**30 for row in rows], "o-", color=f"C{index}", label=name)
        axes.plot(parts, [row["forecast_bytes"] / 2**30 for row in rows], ":", color=f"C{index}")
    axes.set(xlabel="parts", ylabel="peak beside the weights, GiB", title=f"{title}; dotted: forecast", ylim=(0, None))
    axes.legend()
    figure.savefig(out.with_name(out.name + "-memory.png"), dpi=110)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    voxels = [np.prod(row["size"]) / 1e6 for row in result["time"]]
    for name, key in (("wall", "seconds"), ("CPU", "cpu_seconds")):
        axes.plot(voxels, [row[key] for row in result["time"]], "o-", label=name)
    axes.set(xlabel="million voxels", ylabel="seconds", title=f"{title}, 4 parts", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(out.with_name(out.name + "-time.png"), dpi=110)
    plt.close("all")


def main() -> None:
    parser = beside.options((__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=tuple(WAYS), default="decode")
    parser.add_argument("--size", default="96,48,48")
    parser.add_argument("--parts", default="1,2,4,8")
    a = parser.parse_args()
    if beside.answered(a, one_run):
        return
    with tempfile.TemporaryDirectory() as name:
        result = series(a, Path(name))
    for row in result["memory"]:
        print({key: row[key] for key in ("parts", "way", "peak_bytes", "forecast_bytes", "seconds")}, flush=True)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.with_name(a.out.name + ".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        pictures(result, a.out)


if __name__ == "__main__":
    main()
