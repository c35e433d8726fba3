"""Encoding and decoding beside the reference: the same random weights, the same input. See decode.py and encode.py."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import beside
import numpy as np
import reference
import torch

from maisi.device import keep_freed_memory
from maisi.generation import codec
from maisi.splitting import autoencoder as split
from maisi.splitting.plan import Task, coding_plan


def prepare(folder: Path, settings: beside.Settings) -> None:
    reference.save(reference.autoencoder(settings["small"]), "autoencoder", folder)
    generator = torch.Generator().manual_seed(1)
    size = settings["size"]
    compression = 2 if settings["small"] else 4
    image = torch.rand(1, 1, *size, generator=generator)
    latent = torch.randn(1, 4, *(n // compression for n in size), generator=generator)
    np.save(folder / "input.npy", (image if settings["task"] == "encode" else latent).numpy())


@torch.inference_mode()
def one_run(kind: str, folder: Path, settings: beside.Settings) -> tuple[np.ndarray, beside.Cost]:
    """Encode to the mean, or decode, the reference in `splits` parts, ours as the plan for `memory` says."""
    device, task = torch.device(settings["device"]), settings["task"]
    given = torch.from_numpy(np.load(folder / "input.npy")).to(device)
    if kind == "reference":
        if settings["keep"]:
            keep_freed_memory()
        net = reference.load(
            reference.autoencoder(settings["small"], settings["splits"]), "autoencoder", folder, device
        )
        work = (lambda: net.encode(given)[0]) if task == "encode" else (lambda: net.decode(given))
        made, cost = beside.measured(work, device, settings["repeats"])
        return made.float().cpu().numpy(), cost
    ours = codec.load_autoencoder(folder / "autoencoder.safetensors", settings["device"], kind)
    place, dtype = codec.place_of(ours)
    memory = settings["memory"]
    limit = None if memory is None else int(memory * 2**30)
    if device.type == "cpu":
        keep_freed_memory(sparing=limit is not None)  # as the command does
    plan = coding_plan(ours.config, task, tuple(settings["size"]), place, dtype, limit)
    print(plan, file=sys.stderr)
    execution = plan.execution(place)

    def work() -> torch.Tensor:
        x = given.to(dtype).contiguous(memory_format=codec.layout_of(ours))
        if task == "encode":
            return split.encode(ours, x, execution, plan.axis).mean
        return split.decode(ours, x, execution, plan.axis)

    made, cost = beside.measured(work, device, settings["repeats"])
    return made.float().cpu().numpy(), cost


def main(script: str, task: Task, description: str) -> None:
    parser = beside.options(description)
    parser.add_argument("--size", default="64", help="voxels of the image: one number or three")
    parser.add_argument("--splits", default="1", help="the reference's num_splits to try; the quickest counts")
    parser.add_argument("--memory", type=float, help="GiB that ours may use in all")
    parser.add_argument(
        "--repeats", type=int, default=1, help="times in each process; of several the first is left out"
    )
    parser.add_argument("--keep", action="store_true", help="have the reference keep freed memory too")
    a = parser.parse_args()
    if beside.answered(a, one_run):
        return
    size = beside.sizes(a.size)
    settings = {"task": task, "size": size, "memory": a.memory, "repeats": a.repeats, "keep": a.keep}
    with_splits = partial(dict[str, object], settings)
    tried = [int(n) for n in a.splits.split(",")]
    result = None
    for splits in tried:
        one = beside.compared(script, prepare, a, with_splits(splits=splits))
        if result is None or _seconds(one) < _seconds(result):
            result = one
    assert result is not None
    beside.report(
        f"{task} {' x '.join(map(str, size))}, {'small' if a.small else 'released'} configuration", result, a.out
    )


def _seconds(result: dict) -> float:  # type: ignore[type-arg]
    return min(run["seconds"] for run in result["runs"]["reference"])
