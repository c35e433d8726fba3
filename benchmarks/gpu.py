"""Ours in bfloat16 beside the reference as NVIDIA publishes it, on a CUDA GPU: flow steps, decoding, memory, exactness.

    python benchmarks/gpu.py -o out/bench/gpu.json

One process does everything, for each size the reference and ours in turn, and writes JSON and table after every
measurement, so that a run that is cut off loses nothing. What fails, or has no time left (`--seconds`), stands there as
text. What counts:

- Weights are random and the same for both, and so is the noise. Networks are loaded once. Before anything counts each
  kind does a step and a decoding at 128^3, so that loading modules and kernels is not counted; what a kernel looks up
  or compiles for a larger shape is. Each measurement is done once (`--rounds` for more), timed by CUDA events, with
  nothing left to do before and after. cuDNN's search for the quickest algorithm is off for both.
- Memory is the most that PyTorch's allocator gave out (`torch.cuda.max_memory_allocated`) from nothing: maps and the
  kind's own weights, U-Net and autoencoder, which lie on the GPU all the time. What the other kinds hold is taken off.
  Ours decodes within half of what the reference took, unless `--memory` says otherwise.
  CUDA's context and cuDNN's own memory are in neither.
- Images end in the machine's memory, whole, in both; ours goes there part by part. `of it in the network` is the
  decoding without the reference's blending of windows.
- The reference runs under `torch.autocast` in float16 from noise in float16, with attention that does not write out its
  matrix, group norms that give float16, and the windows of `PUBLISHED`. Under autocast its weights stay in float32.
- Without a GPU, `--device cpu --small` tries the script: the reference is then in float32 and memory is not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import beside
import psutil
import reference
import torch
from end_to_end import MODALITY, SPACING
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maisi.cuda_graph import CudaGraphs
from maisi.device import feature_layout, resolve_precision
from maisi.diffusion.rectified_flow import RectifiedFlow
from maisi.diffusion.sampler import sample
from maisi.generation import codec
from maisi.splitting.autoencoder import brought, decoded
from maisi.splitting.plan import Plan, Triple, coding_plan
from maisi.weights.load import load_network

KINDS = ("bf16", "reference")
PHASES = ("steps", "decode")

DECODE_GFLOP = 106.0
"""Of the released decoder for each 32^3 voxels of its image; a multiplication and its addition are two."""

PEAK_TFLOPS = 989.0
"""Dense bfloat16 or float16 of an H100 SXM or H200 (NVIDIA's data sheets)."""

BLEND = "gaussian"


@dataclass(frozen=True)
class Windows:
    """How the reference decodes: windows of the latent, their overlap, parts of a convolution's input, and whence."""

    size: Triple
    overlap: float
    splits: int
    source: str


_CONFIGS = "Project-MONAI/tutorials b3c6c99, generation/maisi/"

PUBLISHED = {
    (256, 256, 128): Windows((96, 96, 96), 0.25, 2, f"{_CONFIGS}configs/config_infer_16g_256x256x128.json"),
    (256, 256, 256): Windows((64, 64, 64), 0.25, 4, f"{_CONFIGS}configs/config_infer_24g_256x256x256.json"),
    (512, 512, 128): Windows((80, 80, 32), 0.4, 2, f"{_CONFIGS}configs/config_infer_24g_512x512x128.json"),
    (512, 512, 512): Windows((80, 80, 80), 0.4, 2, f"{_CONFIGS}configs/config_infer_80g_512x512x512.json"),
    (512, 512, 768): Windows((80, 80, 96), 0.4, 4, f"{_CONFIGS}configs/config_infer_80g_512x512x768.json"),
}
OTHERS = Windows((80, 80, 80), 0.4, 4, f"{_CONFIGS}scripts/diff_model_infer.py, configs/config_maisi3d-rflow.json")

SEAMS = Windows((48, 48, 64), 0.6666, 4, f"{_CONFIGS}configs/config_infer_16g_256x256x256.json")
"""Published for 256^3 on 16 GB; there the result without windows can be had too."""


class Place:
    """The device, its clock and its memory."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"

    def settle(self) -> None:
        """Let go of what is not in use, wait for what runs, and forget the most memory there was."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two marks; waits for the second."""
        if not self.cuda:
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000

    def held(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else None


@dataclass
class Side:
    """One kind's networks; `marks` are those around each call of a network since they were last emptied."""

    place: Place
    unet: nn.Module
    autoencoder: nn.Module
    held: int = 0
    marks: list[tuple[Any, Any]] = field(default_factory=list)

    def timed(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Tensor, **conditions: Tensor) -> Tensor:
            start = self.place.mark()
            made = network(*inputs, **conditions)
            self.marks.append((start, self.place.mark()))
            return made

        return call

    def calls(self) -> list[float]:
        """Seconds of each call."""
        seconds = [self.place.seconds(*pair) for pair in self.marks]
        self.marks.clear()
        return seconds

    def conditions(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(SPACING, device=self.place.device), torch.tensor(MODALITY, device=self.place.device)


class Ours(Side):
    @classmethod
    def load(cls, folder: Path, place: Place) -> Ours:
        dtype = resolve_precision("bf16", place.device)
        unet = codec.fast_layout(load_network(folder / "unet.safetensors", place.device, dtype, network="unet"))
        return cls(place, unet, codec.load_autoencoder(folder / "autoencoder.safetensors", place.device.type, "bf16"))

    def walk(self, noise: Tensor, steps: int) -> Tensor:
        dtype = next(self.unet.parameters()).dtype
        layout = feature_layout(self.place.device, dtype)
        spacing, modality = self.conditions()

        def denoise(x: Tensor, times: Tensor) -> Tensor:
            x = x.to(dtype).contiguous(memory_format=layout)
            made: Tensor = self.unet(x, times, spacing=spacing, modality=modality).float()
            return made

        step = self.timed(CudaGraphs(denoise))
        return sample(RectifiedFlow(reference_rounding=True), step, noise.to(self.place.device), steps=steps)

    def decode(self, latent: Tensor, plan: Plan) -> Tensor:
        return decode_ours(self.autoencoder, latent, plan)


class Theirs(Side):
    @classmethod
    def load(cls, unet: nn.Module, autoencoder: nn.Module, place: Place) -> Theirs:
        """Settings of configs/config_maisi3d-rflow.json that `reference` does not have; they change no weight."""
        for module in unet.modules():
            if hasattr(module, "use_flash_attention"):
                module.use_flash_attention = True
        for module in autoencoder.modules():
            if hasattr(module, "norm_float16"):
                module.norm_float16 = place.cuda
            if hasattr(module, "dim_split"):
                module.dim_split = 1
        return cls(place, unet.to(place.device), autoencoder.to(place.device))

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.float16) if self.place.cuda else nullcontext()

    def walk(self, noise: Tensor, steps: int) -> Tensor:
        from monai.networks.schedulers import RFlowScheduler

        scheduler = RFlowScheduler(use_discrete_timesteps=False, use_timestep_transform=True)
        scheduler.set_timesteps(steps, input_img_size_numel=noise[0, 0].numel())
        spacing, modality = self.conditions()
        times, unet = scheduler.timesteps, self.timed(self.unet)
        x = (noise.half() if self.place.cuda else noise).to(self.place.device)
        with self.autocast():
            for now, following in zip(times, [*times[1:], 0], strict=True):
                v = unet(x, now[None].float().to(x.device), spacing_tensor=spacing, class_labels=modality)
                x, _ = scheduler.step(v, now, x, following)
        return x

    def decode(self, latent: Tensor, windows: Windows, stitch: str = "cpu") -> Tensor:
        """Whole where the latent has no more voxels than a window, else in windows blended on the device `stitch`."""
        from monai.inferers import SlidingWindowInferer

        for module in self.autoencoder.modules():
            if hasattr(module, "num_splits"):
                module.num_splits = windows.splits
        latent = (latent.half() if self.place.cuda else latent).to(self.place.device)
        network = self.timed(self.autoencoder.decode_stage_2_outputs)
        with self.autocast():
            if not sliding(latent, windows):
                return network(latent).cpu()
            inferer = SlidingWindowInferer(
                roi_size=[min(pair) for pair in zip(windows.size, latent.shape[2:], strict=True)],
                sw_batch_size=1,
                progress=False,
                mode=BLEND,
                overlap=windows.overlap,
                sw_device=self.place.device,
                device=torch.device(stitch),
            )
            made: Tensor = inferer(inputs=latent, network=network)
            return made.cpu()


def sliding(latent: Tensor, windows: Windows) -> bool:
    return latent[0, 0].numel() > math.prod(windows.size)


def decode_ours(autoencoder: Any, latent: Tensor, plan: Plan) -> Tensor:
    """Each part goes to its place in an image on the CPU as it comes."""
    device, dtype = codec.place_of(autoencoder)
    x = latent.to(device, dtype).contiguous(memory_format=codec.layout_of(autoencoder))
    image = torch.empty(1, 1, *plan.size)

    def bring(start: int, rows: Tensor) -> None:
        image.narrow(2 + plan.axis, start, rows.shape[2 + plan.axis]).copy_(rows)

    for _ in brought(decoded(autoencoder, x, plan.execution(device), plan.axis), bring):
        pass
    return image


class Bench:
    """The measurements, and what is known so far: written after each of them."""

    def __init__(self, a: argparse.Namespace, place: Place) -> None:
        self.a, self.place = a, place
        self.end = psutil.Process().create_time() + a.seconds if a.seconds else math.inf
        self.sides: dict[str, Any] = {}
        self.result: dict[str, Any] = {
            "machine": beside.machine(a.device),
            "settings": {**settings_of(a), "windows": {name(s): asdict(windows_for(s)) for s in a.sizes}},
            "measurements": [],
            "exactness": [],
            "work": {},
        }

    def given(self, size: Triple) -> int | None:
        """Bytes that ours may use to decode a size, of `--memory`; None: all that is free."""
        if self.a.memory != "half":
            return None if self.a.memory is None else int(float(self.a.memory) * 2**30)
        wanted = (size, "reference", "decode")
        rows = [m for m in self.result["measurements"] if (m["size"], m["kind"], m["phase"]) == wanted]
        return next((m["peak_bytes"] // 2 for m in rows if m.get("peak_bytes")), None)

    def step(self, group: str, entry: dict[str, Any], work: Callable[[], dict[str, Any]], expected: float = 0) -> bool:
        """Add to a group what `work` gives, or why it gives nothing; whether it did."""
        left = self.end - time.time()
        began = time.perf_counter()
        if left < expected or left <= 0:
            entry["failed"] = f"not run: out of time ({max(left, 0):.0f} s left, {expected:.0f} s expected)"
        else:
            try:
                entry |= work()
            except Exception as error:
                entry["failed"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        entry["wall_seconds"] = time.perf_counter() - began
        self.result[group].append(entry)
        try:
            self.place.settle()
        except RuntimeError as error:  # a kernel that failed leaves the device unusable
            entry.setdefault("failed", str(error)[:300])
        print(json.dumps(entry), flush=True)
        self.write()
        return "failed" not in entry

    def measured(self, kind: str, work: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Any]]:
        side = self.sides[kind]
        side.marks.clear()
        self.place.settle()
        start = self.place.mark()
        made = work()
        seconds = self.place.seconds(start, self.place.mark())
        peak = self.place.peak()
        beside_it = sum(other.held for other in self.sides.values() if other is not side)
        return made, {"seconds": seconds, "peak_bytes": None if peak is None else peak - beside_it}

    def write(self) -> None:
        out = self.a.out
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            out.with_suffix(".md").write_text(table(self.result), encoding="utf-8")

    def expected(self, kind: str, phase: str, size: Triple) -> float:
        """Seconds, from what the kind's last measurement of this phase took for a voxel."""
        done = [m for m in self.result["measurements"] if (m["kind"], m["phase"]) == (kind, phase) and "seconds" in m]
        return done[-1]["wall_seconds"] * math.prod(size) / math.prod(done[-1]["size"]) if done else 0.0


def settings_of(a: argparse.Namespace) -> dict[str, Any]:
    kept = ("sizes", "steps", "rounds", "seconds", "memory", "stitch", "device", "small")
    return {key: getattr(a, key) for key in kept}


def windows_for(size: Triple) -> Windows:
    return PUBLISHED.get(size, OTHERS)


def name(size: Triple) -> str:
    return "x".join(map(str, size))


def noise_for(size: Triple, a: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 4, *(n // (2 if a.small else 4) for n in size), generator=generator)


def load(bench: Bench, folder: Path) -> None:
    """Give both kinds the same random weights and have each do a little work."""
    a, place = bench.a, bench.place
    unet, autoencoder = reference.unet(a.small, flow=True), reference.autoencoder(a.small)
    reference.save(unet, "unet", folder)
    reference.save(autoencoder, "autoencoder", folder)
    size: Triple = (a.warm_up,) * 3
    for kind in KINDS:
        before = place.held()
        side = Ours.load(folder, place) if kind == "bf16" else Theirs.load(unet, autoencoder, place)
        bench.sides[kind] = side
        began = time.perf_counter()
        try:
            latent = side.walk(noise_for(size, a), 1)
            side.decode(latent, plan_for(bench, size) if kind == "bf16" else windows_for(size))
            del latent
        except Exception as error:
            print(f"{kind}: the warm-up failed: {error}", flush=True)
        place.settle()
        side.held = place.held() - before
        print(f"{kind}: warm after {time.perf_counter() - began:.1f} s, holds {side.held / 2**30:.2f} GiB", flush=True)


def plan_for(bench: Bench, size: Triple, share: float = 1.0) -> Plan:
    """Of `--memory`, or of what is free, ours may use this share."""
    side, place = bench.sides["bf16"], bench.place
    device, dtype = codec.place_of(side.autoencoder)
    others = sum(other.held for other in bench.sides.values() if other is not side)
    given = bench.given(size)
    limit = None if given is None else int(share * given) + others
    if limit is None and share < 1:
        limit = place.held() + int(share * torch.cuda.mem_get_info()[0])
    return coding_plan(side.autoencoder.config, "decode", size, device, dtype, limit)


def steps_of(bench: Bench, kind: str, size: Triple, latents: dict[str, Tensor]) -> dict[str, Any]:
    side, noise = bench.sides[kind], noise_for(size, bench.a)
    made, cost = bench.measured(kind, lambda: side.walk(noise, bench.a.steps))
    latents[kind] = made.float().cpu()
    cost["step_seconds"] = statistics.median(side.calls())
    cost["finite"] = bool(torch.isfinite(latents[kind]).all())
    if kind != "reference" and "reference" in latents:
        cost["difference_from_reference"] = relative(latents[kind], latents["reference"])
    elif kind == "reference" and "bf16" in latents:
        cost["difference_of_ours"] = relative(latents["bf16"], latents["reference"])
    return cost


def decode_of(bench: Bench, kind: str, size: Triple, latents: dict[str, Tensor]) -> dict[str, Any]:
    side, latent = bench.sides[kind], latents.get(kind, noise_for(size, bench.a))
    if kind == "reference":
        windows = windows_for(size)
        made, cost = bench.measured(kind, lambda: side.decode(latent, windows, bench.a.stitch))
        calls = side.calls()
        cost |= {"network_seconds": sum(calls), "windows": len(calls)}
    else:
        made, cost = decode_planned(bench, size, latent)
    return cost | {"finite": bool(torch.isfinite(made).all())}


def decode_planned(bench: Bench, size: Triple, latent: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """By the plan for the memory there is; where that proves too little, once more by one for half of it."""
    side, failed = bench.sides["bf16"], None
    for share in (1.0, 0.5):
        began = time.perf_counter()
        plan = plan_for(bench, size, share)
        about = {"plan": str(plan), "plan_seconds": time.perf_counter() - began, "first_try": failed}
        try:
            made, cost = bench.measured("bf16", lambda plan=plan: side.decode(latent, plan))
            return made, cost | {key: value for key, value in about.items() if value is not None}
        except torch.OutOfMemoryError as error:
            failed = f"{plan}: {str(error)[:200]}"
        bench.place.settle()
    raise MemoryError(failed)


def relative(made: Tensor, true: Tensor) -> float:
    made, true = made.float(), true.float()
    return float((made - true).norm() / true.norm())


def largest(made: Tensor, true: Tensor) -> float:
    return float((made - true).abs().max() / true.abs().max())


def exactness(bench: Bench, folder: Path) -> None:
    """How far results lie apart; in float32 without the tensor cores' shorter factors."""
    a, place = bench.a, bench.place
    small, wide = ((32,) * 3, (64,) * 3) if a.small else ((128,) * 3, (256,) * 3)
    latent = noise_for(wide, a)

    def ours(size: Triple, parts: int) -> Tensor:
        net = codec.load_autoencoder(folder / "autoencoder.safetensors", a.device, "fp32")
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            return decode_ours(net, noise_for(size, a), Plan("decode", size, 0, parts, "device", "none"))

    def parts() -> dict[str, Any]:
        return {"largest_difference": largest(ours(small, 3), ours(small, 1))}

    def precision() -> dict[str, Any]:
        made = bench.sides["bf16"].decode(latent, plan_for(bench, wide))
        place.settle()
        true = ours(wide, 4)
        return {"relative_error": relative(made, true), "largest_difference": largest(made, true)}

    def seams() -> dict[str, Any]:
        side: Theirs = bench.sides["reference"]
        whole: Any = tuple(latent.shape[2:])
        window: Any = tuple(n * size // 64 for n, size in zip(whole, SEAMS.size, strict=True))
        made = side.decode(latent, replace(SEAMS, size=window), a.stitch)
        place.settle()
        true = side.decode(latent, replace(SEAMS, size=whole))
        return {"relative_error": relative(made, true), "largest_difference": largest(made.float(), true.float())}

    bench.step("exactness", {"what": f"ours in float32 at {name(small)}: 3 parts against 1"}, parts)
    bench.step("exactness", {"what": f"ours at {name(wide)}: bfloat16 against float32"}, precision)
    bench.step("exactness", {"what": f"the reference at {name(wide)}: windows (48, 48, 64 of 64) against none"}, seams)


def count_work(bench: Bench) -> None:
    """Floating-point operations of a step and of decoding at each size, counted on tensors without data."""
    a = bench.a
    unet: Any = bench.sides["bf16"].unet
    for size in a.sizes:
        work: dict[str, Any] = {"decode": None if a.small else DECODE_GFLOP * 1e9 * math.prod(size) / 32**3}
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.device("meta"):
                empty = type(unet)(unet.config)
                x = torch.empty(noise_for((32, 32, 32), a).shape[:2] + tuple(n // (2 if a.small else 4) for n in size))
                with FlopCounterMode(display=False) as counter:
                    empty(x, torch.empty(1), spacing=torch.empty(1, 3), modality=torch.ones(1, dtype=torch.long))
            work["step"] = counter.get_total_flops()
        except Exception as error:
            work |= {"step": None, "failed": f"{type(error).__name__}: {error}"}
        bench.result["work"][name(size)] = work


def gpu_peak(machine: str) -> float | None:
    known = "H200" in machine or ("H100" in machine and not any(slower in machine for slower in ("PCIe", "NVL")))
    return PEAK_TFLOPS if known else None


def medians(result: dict[str, Any], size: Triple, kind: str) -> dict[str, float | str | None]:
    """Of the rounds: seconds and bytes of each phase, and of both together; a text where it failed."""
    found: dict[str, float | str | None] = {}
    for phase in PHASES:
        rows = [
            m for m in result["measurements"] if (tuple(m["size"]), m["kind"], m["phase"]) == (tuple(size), kind, phase)
        ]
        done = [m for m in rows if "failed" not in m]
        for key in ("seconds", "step_seconds", "network_seconds", "peak_bytes"):
            values = [m[key] for m in done if m.get(key) is not None]
            found[f"{phase} {key}"] = statistics.median(values) if values else None
        if rows and not done:
            found[f"{phase} seconds"] = rows[-1]["failed"].split(":")[0]
    both = [found[f"{phase} seconds"] for phase in PHASES]
    peaks = [found[f"{phase} peak_bytes"] for phase in PHASES]
    found["total seconds"] = sum(both) if all(isinstance(t, float) for t in both) else None  # type: ignore[arg-type]
    found["total peak_bytes"] = max(peaks) if None not in peaks else None  # type: ignore[type-var]
    return found


def shown(value: float | str | None, unit: float = 1.0, form: str = ".2f") -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value / unit:{form}}"


def ratio(above: Any, below: Any) -> str:
    fine = isinstance(above, int | float) and isinstance(below, int | float) and below
    return f"{above / below:.2f}" if fine else ""


def table(result: dict[str, Any]) -> str:
    """Ratios and absolute figures, for people."""
    machine, settings = result["machine"], result["settings"]
    configuration = "small" if settings["small"] else "released rectified flow and autoencoder"
    lines = [
        f"Ours (bfloat16) beside the reference, {settings['steps']} steps and decoding; {configuration}; "
        f"{machine['name']}" + (", machine under load" if machine["under_load"] else ""),
        "",
        "| size | what | times as fast | ours, s | reference, s | memory | ours, GiB | reference, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in settings["sizes"]:
        ours, theirs = (medians(result, size, kind) for kind in KINDS)
        for what, seconds, peak in (
            (f"{settings['steps']} steps", "steps seconds", "steps peak_bytes"),
            ("one U-Net step", "steps step_seconds", ""),
            ("decoding", "decode seconds", "decode peak_bytes"),
            ("of it in the network", "decode network_seconds", ""),
            ("together", "total seconds", "total peak_bytes"),
        ):
            a, b, c, d = ours[seconds], theirs[seconds], ours.get(peak), theirs.get(peak)
            form = ".4f" if what == "one U-Net step" else ".2f"
            lines.append(
                f"| {name(size)} | {what} | {ratio(b, a)} | {shown(a, form=form)} | {shown(b, form=form)} "
                f"| {ratio(c, d)} | {shown(c, 2**30)} | {shown(d, 2**30)} |"
            )
    lines += ["", *rates(result), *notes(result)]
    return "\n".join(lines) + "\n"


def rates(result: dict[str, Any]) -> Iterator[str]:
    """What each kind achieves, in TFLOP/s and as a share of what the GPU could."""
    peak = gpu_peak(result["machine"]["name"])
    yield "| size | what | TFLOP | ours, TFLOP/s | reference, TFLOP/s | ours, of the peak | reference, of the peak |"
    yield "|---|---|---|---|---|---|---|"
    for size in result["settings"]["sizes"]:
        work = result["work"].get(name(size), {})
        for what, key, seconds in (
            ("U-Net step", "step", "steps step_seconds"),
            ("decoding", "decode", "decode seconds"),
        ):
            spent = [medians(result, size, kind)[seconds] for kind in KINDS]
            flops = work.get(key)
            rate = [flops / t / 1e12 if flops and isinstance(t, float) and t else None for t in spent]
            shares = [r / peak if r and peak else None for r in rate]
            cells = [shown(r, form=".1f") for r in rate] + [shown(s, form=".1%") for s in shares]
            yield f"| {name(size)} | {what} | {shown(flops, 1e12)} | {' | '.join(cells)} |"
    yield ""


def notes(result: dict[str, Any]) -> Iterator[str]:
    for row in result["exactness"]:
        figures = [
            f"{key.replace('_', ' ')} {row[key]:.1e}" for key in ("relative_error", "largest_difference") if key in row
        ]
        yield f"- {row['what']}: {', '.join(figures) or row.get('failed')}"
    for row in result["measurements"]:
        about = f"- {row['kind']}, {name(row['size'])}, {row['phase']}"
        if "failed" in row:
            yield f"{about}: {row['failed']}"
        else:
            told = [str(row[key]) for key in ("plan", "first_try") if key in row]
            told += [f"in windows: {row['windows']}"] if "windows" in row else []
            told += [f"latent differs from the reference's by {row[k]:.1e}" for k in row if k.startswith("difference")]
            told += [] if row["finite"] else ["result not finite"]
            if told:
                yield f"{about}: {'; '.join(told)}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="256,512x512x128,512,512x512x768", help="images: 256 or 512x512x128, commas")
    parser.add_argument("--phases", default=",".join(PHASES), help="what is measured")
    parser.add_argument("--no-exactness", action="store_true", help="leave out how far results lie apart")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", default="1", help="measurements of each kind, alternating; of each size: 3,1")
    parser.add_argument("--seconds", type=float, default=170, help="start nothing that would end later; 0: no limit")
    parser.add_argument(
        "--memory", default="half", help="GiB that ours may use in all to decode, `half` of the reference's, or `free`"
    )
    parser.add_argument("--stitch", choices=("cpu", "cuda"), default="cpu", help="where the reference blends windows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks, to see that it works")
    parser.add_argument("--warm-up", type=int, help="side of the image that does not count; default 128, small 32")
    parser.add_argument("-o", "--out", type=Path, help="JSON file; the table goes beside it as .md")
    a = parser.parse_args()
    a.sizes = [beside.sizes(size.replace("x", ",")) for size in a.sizes.split(",")]
    a.phases = a.phases.split(",")
    a.rounds = [int(count) for count in a.rounds.split(",")]
    a.warm_up = a.warm_up or (32 if a.small else 128)
    a.stitch = a.device if a.device == "cpu" else a.stitch
    a.memory = None if a.memory == "free" else a.memory
    return a


def main() -> None:
    a = arguments()
    torch.backends.cudnn.benchmark = False
    with tempfile.TemporaryDirectory() as folder:
        run(Bench(a, Place(a.device)), Path(folder))


@torch.inference_mode()
def run(bench: Bench, folder: Path) -> None:
    a = bench.a
    load(bench, folder)
    count_work(bench)
    bench.write()
    for index, size in enumerate(a.sizes):
        for number in range(a.rounds[min(index, len(a.rounds) - 1)]):
            latents: dict[str, Tensor] = {}
            for phase in a.phases:
                work = steps_of if phase == "steps" else decode_of
                for kind in reversed(KINDS):  # what the reference takes may be ours' limit
                    entry = {"size": size, "kind": kind, "phase": phase, "round": number}
                    expected = bench.expected(kind, phase, size)
                    done = lambda w=work, k=kind, s=size, x=latents: w(bench, k, s, x)  # noqa: E731
                    bench.step("measurements", entry, done, expected)
        if index == 0 and not a.no_exactness:
            exactness(bench, folder)
    print(table(bench.result), flush=True)
    bench.write()


if __name__ == "__main__":
    main()
