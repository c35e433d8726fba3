"""Train the carried model's autoencoder, U-Net and ControlNet on one GPU in the minutes given.

    python recipes/tiny/on_gpu.py PREPARED OUT --seconds 470

PREPARED is a folder that `maisi prepare` made. Everything that can wait for the GPU is done beside it: processes draw
views of the cases (with simulated tumours) from the first second on, while patches for the autoencoder are cut on the
GPU itself. A stage's length is a share of the time, and its learning rate follows the clock, so a slower GPU trains
less and still finishes. `--stages`, with the networks trained already, makes it a work of several commands; views that
an earlier one left drawn are used. Networks, optimizer and process are the package's own; the losses of U-Net and
ControlNet are squared, and the data comes another way than in `maisi train`. OUT gets float16 weights (files over
15 MiB in parts) and pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maisi.anatomy import TUMORS
from maisi.conditions import Conditions
from maisi.config import read_yaml
from maisi.cuda_graph import CudaGraphs
from maisi.data.prepared import PreparedCase, PreparedFolder
from maisi.data.preprocess import window_ct
from maisi.data.tumor_examples import inpainting_region
from maisi.data.views import TumorViews, ViewConfig, body_extent_mm, draw_view, plan_view, region_extents, varied
from maisi.device import placed as device_placed
from maisi.device import resolve_precision
from maisi.diffusion.rectified_flow import RectifiedFlow
from maisi.diffusion.sampler import sample
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.networks.controlnet import ControlNet, ControlNetConfig, inpainting_mask
from maisi.networks.discriminator import DiscriminatorConfig, PatchDiscriminator
from maisi.networks.unet import TrunkConfig, UNet, UNetConfig
from maisi.training.autoencoder import freeze_encoder
from maisi.training.controlnet import ControlNetRun
from maisi.training.diffusion import soften_conditions
from maisi.training.latents import condition_tensors, mask_tensor
from maisi.training.linear_start import start_as_components
from maisi.training.losses import adversarial, channel_weights, perceptual
from maisi.training.optimizer import OptimizerConfig, Trainee
from maisi.training.perceptual import load_features
from maisi.weights.load import load_network, read_header, save_network

NetworkT = TypeVar("NetworkT", bound=nn.Module)

AUTOENCODER = AutoencoderConfig(
    latent_channels=16, channels=(32, 64, 128), num_res_blocks=(1, 2, 2), norm_groups=8, upsampling="transposed"
)
UNET = UNetConfig(
    in_channels=AUTOENCODER.latent_channels,
    out_channels=AUTOENCODER.latent_channels,
    channels=(64, 128, 160),
    num_res_blocks=(1, 1, 2),
    attention_levels=(False, False, True),
    norm_groups=8,
    region_input=True,
    spacing_input=True,
    num_modalities=34,
)
PROCESS = RectifiedFlow(base_voxels=1024)
HEADS, TRUNKS = ("head-neck",), ("chest", "abdomen")
WHOLE_HEAD, WHOLE_TRUNK, ANY = (390.0, 0.0, 200.0), (240.0, 0.0, 180.0), (0.0, 0.0, 0.0)
"""Extents of the body, mm."""


def heads(
    size: tuple[int, int, int],
    least: float,
    most: float,
    tumors: float = 0.35,
    body_mm: tuple[float, float, float] = WHOLE_HEAD,
) -> ViewConfig:
    """Whole heads, necks and shoulders, unless `body_mm` says otherwise."""
    return ViewConfig(
        size=size, spacing_mm=(least, most), stretch=1.05, rotate_degrees=8, mirror=True, regions=HEADS,
        min_body_mm=body_mm, tumors=TumorViews(share=tumors),
    )  # fmt: skip


def trunks(size: tuple[int, int, int], least: float, most: float) -> ViewConfig:
    """Whole trunks."""
    return ViewConfig(
        size=size, spacing_mm=(least, most), rotate_degrees=8, regions=TRUNKS, min_body_mm=WHOLE_TRUNK,
        tumors=TumorViews(share=0.5),
    )  # fmt: skip


def crops(regions: tuple[str, ...], least: float, most: float) -> ViewConfig:
    """Close to tumours, as inpainting works on a crop."""
    return ViewConfig(
        size=(64, 64, 64), spacing_mm=(least, most), rotate_degrees=8, regions=regions,
        tumors=TumorViews(share=1.0, most=3),
    )  # fmt: skip


KINDS = (
    (0.42, heads((112, 80, 80), 4.0, 4.9)),
    (0.10, heads((144, 112, 112), 3.1, 3.6)),
    (0.08, heads((80, 64, 64), 5.2, 6.6)),
    (0.10, trunks((128, 128, 128), 2.8, 3.3)),
    (0.05, trunks((128, 96, 64), 2.7, 3.3)),
    (0.09, trunks((96, 80, 80), 3.6, 4.8)),
    (0.05, trunks((80, 64, 64), 5.0, 6.6)),
    (0.07, crops(TRUNKS, 1.8, 3.2)),
    (0.04, crops(HEADS, 2.5, 3.5)),
)
"""How often each kind of view is drawn. The crops are for the ControlNet alone, and so are views with tumours."""

CUT = (
    (0.7, heads((112, 80, 80), 3.0, 4.9, tumors=0.2, body_mm=ANY)),
    (0.3, heads((144, 112, 112), 2.9, 3.6, tumors=0.2, body_mm=ANY)),
)
"""Kinds of views of heads that were published with most of their shoulders cut away, so that cords hang in air."""

STAGES = ("autoencoder", "decoder", "unet", "controlnet")
SHARES = {"autoencoder": 0.25, "decoder": 0.05, "unet": 0.42, "controlnet": 0.28}
"""Of the time that the stages to train have."""

LARGEST, OUTSIZED = 12.0, 0.01
"""Standard deviations beyond which a latent costs something, and the weight of that."""

BLUR = 0.1
"""Noise on latents, up to this part of their spread, that the decoder learns to overlook: made ones are not exact."""

STARTED = time.monotonic()


def say(*words: object) -> None:
    """Print with the time."""
    print(f"[{time.monotonic() - STARTED:6.1f} s]", *words, flush=True)


# --- views, drawn by processes beside the GPU


@dataclass(frozen=True)
class DrawnView:
    """One view as its file holds it: image in [0, 1] float16, labels, the region to paint, what it is told."""

    image: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    region: np.ndarray[Any, Any]
    conditions: Conditions
    crop: bool
    clean: bool


def draw_views(
    prepared: Path, folder: Path, worker: int, workers: int, waiting: int, seed: int, cut: float, facts: dict[str, Any]
) -> None:
    """Draw views number worker, worker + workers, ... until the folder holds a file `stop`; pause while many wait.

    A share `cut` of them is of the kinds `CUT`.
    """
    torch.set_num_threads(1)
    os.nice(5)
    source = PreparedFolder(prepared)
    cases = [case for case in source.cases("train") if case.id in facts]
    kinds = [((1 - cut) * share, kind, _fitting(cases, kind, facts)) for share, kind in KINDS]
    whole = {case.id for case in _fitting(cases, heads((0, 0, 0), 1, 1), facts)}
    parts = [case for case in cases if case.id not in whole]
    kinds += [(cut * share, kind, _fitting(parts, kind, facts)) for share, kind in CUT]
    fitting = [entry for entry in kinds if entry[0] and entry[2]]
    shares = np.array([share for share, _, _ in fitting])
    number = worker
    while not (folder / "stop").exists():
        if len(os.listdir(folder)) > waiting:
            time.sleep(1)
            continue
        rng = np.random.default_rng([6 + seed, number])
        index = int(rng.choice(len(fitting), p=shares / shares.sum()))
        _, kind, choice = fitting[index]
        weights = np.array([case.weight for case in choice])
        case = choice[int(rng.choice(len(choice), p=weights / weights.sum()))]
        extents = {name: (low, high) for name, (low, high) in facts[case.id]["extents"].items()}
        plan = plan_view(case, kind, extents, rng, "")
        image, labels = varied(*draw_view(source, case, plan), case, kind, rng)
        part = folder / f"{number:06d}.part.npz"
        np.savez(
            part,
            image=window_ct(image.array).astype(np.float16),
            labels=labels,
            region=np.packbits(inpainting_region(labels, rng)),
            facts=np.frombuffer(
                json.dumps(
                    {
                        "spacing_mm": plan.row.spacing_mm,
                        "regions": plan.row.regions,
                        "crop": kind.size == (64, 64, 64),
                        "clean": kind.min_body_mm != ANY and not np.isin(labels, list(TUMORS)).any(),
                    }
                ).encode(),
                np.uint8,
            ),
        )
        part.rename(folder / f"{number:06d}.npz")
        number += workers


def _fitting(cases: list[PreparedCase], kind: ViewConfig, facts: dict[str, Any]) -> list[PreparedCase]:
    return [
        case
        for case in cases
        if set(kind.regions) & set(case.regions)
        and all(have >= least for have, least in zip(facts[case.id]["body_mm"], kind.min_body_mm, strict=True))
    ]


def facts_of(job: tuple[Path, str]) -> tuple[str, dict[str, Any]]:
    """What views need to know of a case, found once."""
    prepared, name = job
    source = PreparedFolder(prepared)
    case = next(case for case in source.index.cases if case.id == name)
    labels = np.asarray(source.labels(case))
    extents = region_extents(labels, np.array(case.affine), case.regions)
    return name, {"body_mm": body_extent_mm(labels, case.spacing_mm), "extents": extents}


def read_view(path: Path) -> DrawnView:
    """Load a view's file."""
    with np.load(path) as stored:
        labels = stored["labels"]
        facts = json.loads(stored["facts"].tobytes())
        region = np.unpackbits(stored["region"], count=labels.size).reshape(labels.shape).astype(bool)
        told = Conditions(tuple(facts["spacing_mm"]), tuple(facts["regions"]), "ct")
        return DrawnView(stored["image"], labels, region, told, facts["crop"], facts["clean"])


# --- patches for the autoencoder, cut on the GPU


WHOLE = (((112, 80, 80), 3.8, 5.0), ((80, 64, 64), 5.2, 6.6), ((144, 112, 112), 3.1, 3.6))
"""Sizes and voxels (mm) of whole bodies."""


class Patches:
    """Random boxes of the training images: turned, mirrored, at any spacing; mostly around voxels of the body."""

    def __init__(self, source: PreparedFolder, device: torch.device, size: int) -> None:
        self.cases = source.cases("train")
        self.size, self.device = size, device
        weights = np.array([case.weight for case in self.cases])
        self.chances = weights / weights.sum()
        with ThreadPoolExecutor(8) as pool:
            loaded = list(pool.map(lambda case: self._loaded(source, case), self.cases))
        self.images = [torch.from_numpy(image)[None, None].to(device) for image, _ in loaded]
        self.inside = [places for _, places in loaded]

    @staticmethod
    def _loaded(source: PreparedFolder, case: PreparedCase) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        image = window_ct(np.asarray(source.image(case)))
        body = np.flatnonzero(np.asarray(source.labels(case)).reshape(-1)[::53]) * 53
        return image, body

    def batch(self, count: int, rng: np.random.Generator) -> Tensor:
        """`B 1 n n n` in [0, 1]."""
        return torch.cat([self._patch(rng) for _ in range(count)])

    def whole(self, voxels: int, rng: np.random.Generator) -> Tensor:
        """Bodies with the air around them, `B 1 X Y Z` in [0, 1], of some `voxels` together."""
        size, least, most = WHOLE[int(rng.integers(len(WHOLE)))]
        bodies = []
        for _ in range(max(1, voxels // math.prod(size))):
            index = int(rng.choice(len(self.cases), p=self.chances))
            shape, places = self.images[index].shape[2:], self.inside[index]
            middle = np.mean(np.unravel_index(places, shape), axis=1) if len(places) else np.array(shape) / 2
            bodies.append(self._box(index, size, math.exp(rng.uniform(math.log(least), math.log(most))), middle, rng))
        return torch.cat(bodies)

    def _patch(self, rng: np.random.Generator) -> Tensor:
        index = int(rng.choice(len(self.cases), p=self.chances))
        places, shape = self.inside[index], np.array(self.images[index].shape[2:])
        least = max(1.4, 0.75 * float(max(self.cases[index].spacing_mm)))
        spacing = math.exp(rng.uniform(math.log(least), math.log(6.4)))
        if rng.random() < 0.9 and len(places):
            centre = np.array(np.unravel_index(int(rng.choice(places)), shape), float)
        else:
            centre = rng.uniform(0, shape)
        return self._box(index, (self.size,) * 3, spacing, centre, rng)

    def _box(
        self,
        index: int,
        size: tuple[int, int, int],
        spacing: float,
        centre: np.ndarray[Any, Any],
        rng: np.random.Generator,
    ) -> Tensor:
        """A box around a voxel of an image, turned about Z and mirrored."""
        image, native = self.images[index], np.array(self.cases[index].spacing_mm)
        shape = np.array(image.shape[2:])
        angle = math.radians(rng.uniform(-12, 12))
        turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
        turn = turn @ np.diag(rng.choice([-1.0, 1.0], 3))
        # finer than asked for, then averaged, where that would alias
        factor = 2 if spacing > 1.5 * float(native.min()) else 1
        n = np.array(size) * factor
        to_voxels = np.diag(1 / native) @ turn * (spacing / factor)
        theta = np.concatenate(
            [
                (np.diag(2 / (shape - 1)) @ to_voxels @ np.diag((n - 1) / 2))[::-1, ::-1],
                (2 * centre / (shape - 1) - 1)[::-1, None],
            ],
            1,
        )
        placed = torch.from_numpy(np.ascontiguousarray(theta)).float()[None].to(self.device, non_blocking=True)
        grid = F.affine_grid(placed, [1, 1, *map(int, n)], align_corners=True)
        patch = F.grid_sample(image, grid, align_corners=True)
        return F.avg_pool3d(patch, 2) if factor == 2 else patch


# --- training by the clock


@dataclass
class Clock:
    """Steps for a number of seconds; yields how many steps were made, and the share of the time that is over."""

    seconds: float
    name: str

    def __iter__(self) -> Iterator[tuple[int, float]]:
        started, step, told = time.monotonic(), 0, 0.0
        while (over := (time.monotonic() - started) / self.seconds) < 1:
            yield step, over
            step += 1
            if over - told > 0.1:
                told = over
                say(f"{self.name}: step {step}, {(time.monotonic() - started) / step * 1000:.0f} ms a step")
        say(f"{self.name}: {step} steps in {time.monotonic() - started:.0f} s")


NOMINAL = 10_000
"""Schedules are told the time as steps of this many."""


class Student(Trainee):
    """A `Trainee` that never waits for the GPU: what is not finite counts as no gradient.

    All gradients lie in one tensor, which keeps its place, as graphs of launches need it.
    """

    def __init__(self, name: str, module: nn.Module, config: OptimizerConfig, steps: int) -> None:
        super().__init__(name, module, config, steps)
        self.gradients = torch.zeros(sum(p.numel() for p in self.parameters), device=self.parameters[0].device)
        start = 0
        for p in self.parameters:
            p.grad = self.gradients.as_strided(p.shape, p.stride(), start)
            start += p.numel()

    def learn(self, loss: Tensor) -> None:
        """Put a loss's gradients in place of those there are."""
        self.gradients.zero_()
        loss.backward()

    def apply_at(self, over: float) -> None:
        """One optimizer step at a share of the time."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(int(over * NOMINAL), NOMINAL)
        norm = self.gradients.norm()
        factor = (self.config.clip / norm).clamp(max=1)
        self.gradients.copy_(torch.where(norm.isfinite(), self.gradients * factor, 0.0))
        self.optimizer.step()

    def averaged(self, fresh: nn.Module) -> nn.Module:
        """A copy with the averaged weights."""
        fresh = placed(fresh, self.parameters[0].device)
        fresh.load_state_dict(self.ema.values)
        return fresh.eval().requires_grad_(False)


def placed(net: nn.Module, device: torch.device) -> nn.Module:
    """On the device, channels last."""
    return device_placed(net, device, torch.channels_last_3d)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device multiplies it."""
    dtype = resolve_precision("auto", device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def last(x: Tensor) -> Tensor:
    """Channels last."""
    return x.contiguous(memory_format=torch.channels_last_3d)


@dataclass
class Losses:
    """Running means, read only when somebody looks."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Note the terms of a step."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self.count += 1

    def read(self) -> str:
        """Say the means since the last time, in words."""
        words = " ".join(f"{name} {float(value) / max(self.count, 1):.4g}" for name, value in self.sums.items())
        self.sums, self.count = {}, 0
        return words


def train_autoencoder(
    source: PreparedFolder,
    device: torch.device,
    seconds: float,
    batch: int,
    size: int,
    share: float,
    out: Path,
    ready: Callable[[], None],
) -> Autoencoder:
    """From block PCA; L1 for the first part, then the decoder alone, with perceptual and adversarial losses.

    A share of the batches are whole bodies: one that knew patches around tissue alone made latents of twenty times the
    usual size beside bone, on one side, in whole heads, where group norms see another mixture of tissue and air.
    """
    patches = Patches(source, device, size)
    say(f"{len(patches.cases)} cases on the device")
    torch.manual_seed(0)
    rng, losses = np.random.default_rng(0), Losses()

    def drawn() -> Tensor:
        return last(patches.whole(batch * size**3, rng) if rng.random() < share else patches.batch(batch, rng))

    model = placed(Autoencoder(AUTOENCODER), device)
    assert isinstance(model, Autoencoder)
    start_as_components(model, torch.cat([patches.batch(batch, rng) for _ in range(20)]))
    say("block PCA:", judged(model, source, device))
    ready()
    muon = {"kind": "muon", "schedule": "cosine", "final_fraction": 0.02, "ema_decay": 0.998}
    student = Student("autoencoder", model, OptimizerConfig(learning_rate=3e-4, warmup_steps=300, **muon), NOMINAL)
    for step, over in Clock(0.72 * seconds, "autoencoder"):
        x = drawn()
        with autocast(device):
            found = model.encode(x)
            made = model.decode(found.mean + torch.exp(0.5 * found.log_variance) * torch.randn_like(found.mean))
        terms = {"l1": F.l1_loss(made.float(), x), "outsized": outsized(found.mean.float())}
        student.learn(torch.stack(list(terms.values())).sum())
        student.apply_at(over)
        student.ema.update(student.module, step)
        losses.add(terms)
        if step % 400 == 399:
            say(losses.read())
    model.load_state_dict(student.ema.values)
    say("autoencoder, before its decoder is sharpened:", judged(model, source, device))
    freeze_encoder(model)
    judge = placed(PatchDiscriminator(DiscriminatorConfig(channels=32, num_layers=2)), device)
    features = load_features("efficientnet-lite0")
    if isinstance(features, nn.Module):
        features.to(device)
    sharper = {**muon, "ema_decay": 0.995}
    student = Student("autoencoder", model, OptimizerConfig(learning_rate=1e-4, warmup_steps=300, **sharper), NOMINAL)
    critic = Student("judge", judge, OptimizerConfig(learning_rate=2e-4, betas=(0.5, 0.9), ema_decay=0.0), NOMINAL)
    for step, over in Clock(0.28 * seconds, "decoder"):
        x = drawn()
        weight = 0.1 * min(1.0, max(0.0, (over - 0.08) / 0.15))
        with torch.no_grad(), autocast(device):
            z = blurred(model.encode(x).mean)
        with autocast(device):
            made = model.decode(z).float()
            seen = perceptual(features, made, x, torch.rand(3))
            terms = {"l1": F.l1_loss(made, x), "perceptual": 0.3 * seen.float()}
            judge.requires_grad_(False)
            if weight:
                terms["adversarial"] = weight * adversarial(judge(made).float(), True)
        student.learn(sum(terms.values(), torch.zeros((), device=device)))
        student.apply_at(over)
        student.ema.update(student.module, step)
        judge.requires_grad_(True)
        if weight:
            with autocast(device):
                on_real, on_made = judge(x).float(), judge(made.detach()).float()
            terms["judge"] = 0.5 * (adversarial(on_real, True) + adversarial(on_made, False))
            critic.learn(terms["judge"])
            critic.apply_at(0.1)
        losses.add(terms)
        if step % 300 == 299:
            say(losses.read())
    model.load_state_dict(student.ema.values)
    say("autoencoder:", judged(model, source, device, out / "reconstructions.png"))
    save_network(out / "autoencoder.safetensors", model, storage="float16")
    return model.eval().requires_grad_(False)  # type: ignore[return-value]


def train_decoder(
    model: Autoencoder,
    banks: dict[tuple[int, ...], Bank],
    device: torch.device,
    seconds: float,
    renew: Callable[[], None],
    a: argparse.Namespace,
) -> Autoencoder:
    """The decoder alone, on whole views.

    One that knew patches around tissue alone made bone 33 HU too dark in whole heads, where group norms see another
    mixture of tissue and air. Squared errors tell means apart that absolute ones and features do not.
    """
    model.requires_grad_(True).train()
    freeze_encoder(model)
    features = load_features("efficientnet-lite0")
    if isinstance(features, nn.Module):
        features.to(device)
    config = OptimizerConfig(
        kind="muon", learning_rate=1e-4, schedule="cosine", final_fraction=0.02, warmup_steps=300, ema_decay=0.99
    )
    student = Student("decoder", model, config, NOMINAL)
    torch.manual_seed(a.seed)
    rng, losses = np.random.default_rng(a.seed), Losses()
    voxels = a.batch * a.patch**3 // AUTOENCODER.compression**3
    for step, over in Clock(seconds, "decoder on views"):
        bank = bank_of(banks, list(banks), rng)
        chosen = bank.chosen(voxels, rng, least=1)
        x, z = bank["image"][chosen].float(), blurred(bank.latents(chosen))
        with autocast(device):
            made = model.decode(last(z)).float()
            seen = perceptual(features, made, x, torch.rand(2))
        terms = {"l1": F.l1_loss(made, x), "squared": 25 * F.mse_loss(made, x), "perceptual": 0.1 * seen.float()}
        student.learn(torch.stack(list(terms.values())).sum())
        student.apply_at(over)
        student.ema.update(student.module, step)
        losses.add(terms)
        if step % 50 == 49:
            say(losses.read())
        renew()
    model.load_state_dict(student.ema.values)
    save_network(a.out / "autoencoder.safetensors", model, storage="float16")
    return model.eval().requires_grad_(False)  # type: ignore[return-value]


def outsized(z: Tensor) -> Tensor:
    """What latents beyond `LARGEST` standard deviations of their channel cost."""
    flat = z.transpose(0, 1).flatten(1)
    far = (flat - flat.mean(1, keepdim=True)).abs() / (flat.std(1, keepdim=True).detach() + 1e-6)
    return OUTSIZED * F.relu(far - LARGEST).square().mean()


def blurred(z: Tensor) -> Tensor:
    """Latents with noise, see `BLUR`."""
    return z + BLUR * z.std() * torch.rand(len(z), 1, 1, 1, 1, device=z.device) * torch.randn_like(z)


@torch.no_grad()
def judged(model: Autoencoder, source: PreparedFolder, device: torch.device, picture: Path | None = None) -> str:
    """PSNR of held-out cases, whole or their middle 160^3, and a picture of them."""
    words, columns = [], []
    for case in source.cases("validation"):
        image = source.image(case)
        cut = tuple(slice((n - m) // 2, (n - m) // 2 + m) for n in image.shape for m in [min(n, 160) // 4 * 4])
        x = torch.from_numpy(window_ct(np.asarray(image[cut])))[None, None].to(device)
        with autocast(device):
            y = model.decode(model.encode(last(x)).mean).float().clamp(0, 1)
        words.append(f"{case.id} {-10 * math.log10(float((x - y).square().mean())):.2f} dB")
        columns.append([t[0, 0, :, t.shape[3] // 2].flip(1).T.cpu() for t in (x, y)])
    if picture is not None:
        save_picture(picture, columns)
    return ", ".join(words)


def save_picture(path: Path, columns: list[list[Tensor]]) -> None:
    """Columns of gray pictures, padded to one size."""
    from PIL import Image

    high = max(t.shape[0] for column in columns for t in column)
    wide = max(t.shape[1] for column in columns for t in column)
    padded = [torch.cat([F.pad(t, (0, wide - t.shape[1], 0, high - t.shape[0])) for t in column]) for column in columns]
    pixels = (torch.cat(padded, 1).clamp(0, 1) * 255).byte().numpy()
    Image.fromarray(pixels).save(path)


TOLD = ("spacing", "top_region", "bottom_region", "modality")


@dataclass
class Bank:
    """Views of one size on the device, by name: latents float16, what goes with them, and what the U-Net is told."""

    tensors: dict[str, Tensor]
    crop: bool
    oldest: int = 0

    def __len__(self) -> int:
        return len(self.tensors["mean"])

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def clean(self) -> Tensor:
        """Numbers of the views that the U-Net learns: of whole bodies, without tumours."""
        return torch.nonzero(self["clean"]).flatten()

    def latents(self, chosen: Tensor) -> Tensor:
        """Latents of views, float32, drawn from their distributions."""
        mean, spread = self["mean"][chosen].float(), torch.exp(0.5 * self["log_variance"][chosen].float())
        return mean + spread * torch.randn_like(mean)

    def chosen(self, voxels: int, rng: np.random.Generator, clean: bool = False, least: int = 2) -> Tensor:
        """Numbers of a batch of views, `least` or more, of about as many latent voxels; `clean`: of those alone."""
        among = self.clean if clean else torch.arange(len(self))
        batch = max(least, voxels // self["mean"][0, 0].numel())
        return among[torch.from_numpy(rng.integers(0, len(among), batch))].to(self["mean"].device)

    def take(self, fresh: Bank, most: int) -> None:
        """Add views, or put them in the place of the oldest where there are as many as may be."""
        room = max(0, min(most - len(self), len(fresh)))
        into = (self.oldest + torch.arange(len(fresh) - room)) % len(self)
        self.oldest = (self.oldest + len(into)) % len(self)
        for name, own in self.tensors.items():
            own[into.to(own.device)] = fresh[name][room:]
            if room:
                self.tensors[name] = torch.cat([own, fresh[name][:room]])


@torch.no_grad()
def encoded(model: Autoencoder, views: list[DrawnView], device: torch.device) -> dict[tuple[int, ...], Bank]:
    """Encode views, those of one size together."""
    groups: dict[tuple[int, ...], list[DrawnView]] = {}
    for view in views:
        groups.setdefault(view.labels.shape, []).append(view)
    banks = {}
    for size, members in groups.items():
        means, spreads, images = [], [], []
        count = max(1, 8 * 1_000_000 // math.prod(size))
        for start in range(0, len(members), count):
            x = torch.from_numpy(np.stack([v.image for v in members[start : start + count]]))[:, None].to(device)
            with autocast(device):
                found = model.encode(last(x.float()))
            means.append(found.mean.half())
            spreads.append(found.log_variance.half())
            images.append(x)
        banks[size] = Bank(
            {
                "mean": torch.cat(means),
                "log_variance": torch.cat(spreads),
                "labels": torch.from_numpy(np.stack([v.labels for v in members])).to(device),
                "image": torch.cat(images),
                "region": torch.from_numpy(np.stack([v.region for v in members])).to(device),
                "clean": torch.tensor([v.clean for v in members]),
                **{name: t.to(device) for name, t in condition_tensors([v.conditions for v in members]).items()},
            },
            members[0].crop,
        )
    return banks


def share_of(size: tuple[int, ...]) -> float:
    """How often views of a size are drawn."""
    return sum(share for share, kind in KINDS if tuple(kind.size) == tuple(size))


def scale_for(banks: list[Bank]) -> float:
    """One over the deviation of all latents without tumours."""
    means = [bank["mean"][bank.clean.to(bank["mean"].device)].float() for bank in banks]
    count = sum(m.numel() for m in means)
    average = sum(float(m.sum().double()) for m in means) / count
    return 1 / math.sqrt(sum(float(m.square().sum().double()) for m in means) / count - average**2)


def bank_of(banks: dict[tuple[int, ...], Bank], sizes: list[tuple[int, ...]], rng: np.random.Generator) -> Bank:
    """One of some sizes, as often as its views are drawn."""
    chances = np.array([share_of(size) for size in sizes])
    return banks[sizes[int(rng.choice(len(sizes), p=chances / chances.sum()))]]


def noised(
    bank: Bank, chosen: Tensor, scale: float, rng: np.random.Generator, generator: torch.Generator
) -> list[Tensor]:
    """Noisy latents, drawn from their distributions and scaled, times, target, and what they are `TOLD`.

    One in ten is told no regions.
    """
    hide = torch.from_numpy(rng.random(len(chosen)) < 0.1).to(chosen.device)
    told = [bank[name][chosen] for name in TOLD]
    told = [
        t.masked_fill(hide[:, None], 0.0) if name.endswith("region") else t for name, t in zip(TOLD, told, strict=True)
    ]
    z = bank.latents(chosen) * scale
    times = PROCESS.draw_times(len(z), z[0, 0].numel(), generator)
    noisy, target = PROCESS.perturb(z, torch.randn_like(z), times)
    return [last(noisy), times.to(z.device), last(target), *told]


@torch.no_grad()
def importance(model: Autoencoder, banks: dict[tuple[int, ...], Bank]) -> Tensor:
    """See `channel_weights`."""
    z = max(banks.values(), key=len)["mean"][:4].float()
    with autocast(z.device):
        weights = channel_weights(lambda z: model.decode(last(z)), z)
    say("weights of channels:", " ".join(f"{w:.2f}" for w in weights.flatten().tolist()))
    return weights


def train_unet(
    banks: dict[tuple[int, ...], Bank],
    weights: Tensor,
    device: torch.device,
    seconds: float,
    renew: Callable[[], None],
    a: argparse.Namespace,
) -> tuple[UNet, float]:
    """On views without tumours, crops left out. Returns the network and the scale factor (of what was `begun`, its)."""
    torch.manual_seed(1)
    if a.begun is None:
        net = UNet(UNET)
        soften_conditions(net)
    else:
        net = loaded(a.begun, device, UNet).requires_grad_(True).train()
    placed(net, device)
    config = OptimizerConfig(
        kind="muon", learning_rate=a.rate, schedule="cosine", final_fraction=0.03, warmup_steps=200, ema_decay=0.999
    )
    student = Student("unet", net, config, NOMINAL)
    whole = [size for size, bank in banks.items() if not bank.crop and len(bank.clean)]
    scale = scale_for([banks[size] for size in whole]) if a.begun is None else scale_of(a.begun)
    say(f"scale factor {scale:.4f};", ", ".join(f"{s}: {len(b.clean)} of {len(b)} views" for s, b in banks.items()))
    torch.manual_seed(a.seed)
    rng, generator, losses = np.random.default_rng(a.seed), torch.Generator().manual_seed(a.seed), Losses()

    @CudaGraphs
    def learn(noisy: Tensor, times: Tensor, target: Tensor, *told: Tensor) -> Tensor:
        with autocast(device):
            prediction = net(noisy, times, **dict(zip(TOLD, told, strict=True)))
        loss: Tensor = (weights * (prediction.float() - target).square()).mean()
        student.learn(loss)
        return loss.detach()

    for step, over in Clock(seconds, "unet"):
        bank = bank_of(banks, whole, rng)
        chosen = bank.chosen(a.voxels, rng, clean=True)
        loss = learn(*noised(bank, chosen, scale, rng, generator))
        student.apply_at(over)
        student.ema.update(student.module, step)
        losses.add({"loss": loss})
        if step % 400 == 399:
            say(losses.read())
            if a.device == "cpu":
                in_parts(student.averaged(UNet(net.config)), a.out / "so-far.safetensors", scale)
        renew()
    averaged = student.averaged(UNet(net.config))
    in_parts(averaged, a.out / "unet.safetensors", scale)
    return averaged, scale  # type: ignore[return-value]


def train_controlnet(
    unet: UNet,
    scale: float,
    banks: dict[tuple[int, ...], Bank],
    weights: Tensor,
    device: torch.device,
    seconds: float,
    renew: Callable[[], None],
    a: argparse.Namespace,
) -> ControlNet:
    """On all views; half of the items inpaint."""
    run = read_yaml(ControlNetRun, Path(__file__).with_name("controlnet.yaml"))
    shared = {name: getattr(unet.config, name) for name in TrunkConfig.model_fields}
    config = ControlNetConfig(
        **shared, image_channels=2, mask_encoder_channels=run.mask_encoder_channels, told_as=run.told_as or {}
    )
    torch.manual_seed(2)
    if a.begun_controlnet is None:
        net = ControlNet.from_unet(unet, config)
    else:
        net = loaded(a.begun_controlnet, device, ControlNet)
    net.requires_grad_(True).train()
    placed(net, device)
    settings = OptimizerConfig(
        kind="muon", learning_rate=a.rate, schedule="cosine", final_fraction=0.03, warmup_steps=200, ema_decay=0.998
    )
    student = Student("controlnet", net, settings, NOMINAL)
    table = torch.from_numpy(config.told_table()).to(device)
    weights_of = torch.ones(256, device=device)
    weights_of[list(run.weighted_labels)] = run.label_weight
    sizes = list(banks)
    torch.manual_seed(a.seed + 1)
    rng, generator = np.random.default_rng(a.seed + 1), torch.Generator().manual_seed(a.seed + 1)
    losses = Losses()

    @CudaGraphs
    def learn(
        noisy: Tensor, times: Tensor, target: Tensor, labels: Tensor, image: Tensor, paint: Tensor, *told: Tensor
    ) -> Tensor:
        bits = inpainting_mask(mask_tensor(table[labels.long()]).bfloat16(), image, paint)
        weight = F.adaptive_max_pool3d(weights_of[labels.long()][:, None], tuple(noisy.shape[2:]))
        named = dict(zip(TOLD, told, strict=True))
        with autocast(device):
            residuals = net(noisy, times, last(bits), modality=named["modality"])
            prediction = unet(noisy, times, residuals=residuals, **named)
        errors = weight * weights * (prediction.float() - target).square()
        loss: Tensor = errors.sum() / (weight.sum() * target.shape[1])
        student.learn(loss)
        return loss.detach()

    for step, over in Clock(seconds, "controlnet"):
        bank = bank_of(banks, sizes, rng)
        chosen = bank.chosen(a.voxels // 2, rng)
        noisy, times, target, *told = noised(bank, chosen, scale, rng, generator)
        everywhere = torch.from_numpy(rng.random(len(chosen)) >= run.inpainting).to(device).view(-1, 1, 1, 1, 1)
        paint = bank["region"][chosen][:, None] | everywhere
        loss = learn(noisy, times, target, bank["labels"][chosen], bank["image"][chosen], paint, *told)
        student.apply_at(over)
        student.ema.update(student.module, step)
        losses.add({"loss": loss})
        if step % 200 == 199:
            say(losses.read())
            if a.device == "cpu":
                in_parts(student.averaged(ControlNet(config)), a.out / "so-far.safetensors", scale)
        renew()
    averaged = student.averaged(ControlNet(config))
    in_parts(averaged, a.out / "controlnet.safetensors", scale)
    return averaged  # type: ignore[return-value]


PART_BYTES = 15 * 2**20


def in_parts(net: nn.Module, path: Path, scale: float) -> None:
    """Write float16 weights, and the process and scale factor they are for; in files of 15 MiB that `cat` joins."""
    metadata = {"maisi.scale_factor": repr(scale), "maisi.process": json.dumps(PROCESS.config())}
    save_network(path, net, metadata=metadata, storage="float16")
    data = path.read_bytes()
    if len(data) > PART_BYTES:
        for number, start in enumerate(range(0, len(data), PART_BYTES)):
            path.with_name(f"{path.name}.{number}").write_bytes(data[start : start + PART_BYTES])
        path.unlink()
    say(f"{path.name}: {len(data) / 1e6:.1f} MB")


@torch.no_grad()
def pictures(
    model: Autoencoder,
    unet: UNet,
    control: ControlNet | None,
    scale: float,
    banks: dict[tuple[int, ...], Bank],
    device: torch.device,
    out: Path,
) -> None:
    """Columns of a real image, one of the U-Net alone, and with a ControlNet one under the real one's label map."""
    columns = []
    for size, count in (((112, 80, 80), 6), ((128, 128, 128), 3), ((144, 112, 112), 2)):
        for index in range(min(count, len(banks[size])) if size in banks else 0):
            bank = banks[size]
            told = {name: bank[name][index : index + 1] for name in TOLD}
            masks: list[Tensor | None] = [None]
            if control is not None:
                table = torch.from_numpy(control.config.told_table()).to(device)
                masks.append(last(inpainting_mask(mask_tensor(table[bank["labels"][index : index + 1].long()]))))
            noise = torch.randn(1, *bank["mean"].shape[1:], generator=torch.Generator().manual_seed(index))
            rows = [bank["image"][index, 0].float()]
            for mask in masks:

                def denoise(x: Tensor, t: Tensor, mask: Tensor | None = mask, told: Any = told) -> Tensor:
                    with autocast(device):
                        residuals = None
                        if control is not None and mask is not None:
                            residuals = control(last(x), t, mask, modality=told["modality"])
                        return torch.as_tensor(unet(last(x), t, residuals=residuals, **told).float())

                z = sample(PROCESS, denoise, noise.to(device), steps=20)
                with autocast(device):
                    rows.append(model.decode(last(z / scale))[0, 0].float())
            columns.append([r[:, r.shape[1] // 2].flip(1).T.cpu() for r in rows])
    save_picture(out / "samples.png", columns)


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=470, help="in all, from the start of the program")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stages", default=",".join(STAGES), help="to train; the networks of others must be given")
    parser.add_argument(
        "--batch", type=int, default=16, help="patches of the autoencoder; of as many voxels are its decoder's views"
    )
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--whole", type=float, default=0.5, help="share of the autoencoder's batches that are bodies")
    parser.add_argument("--voxels", type=int, default=400_000, help="latent voxels of a batch of the U-Net")
    parser.add_argument("--autoencoder", type=Path, help="one trained already")
    parser.add_argument("--unet", type=Path, help="one trained already")
    parser.add_argument("--begun", type=Path, help="a U-Net to go on with")
    parser.add_argument("--begun-controlnet", type=Path, help="a ControlNet to go on with")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of U-Net and ControlNet")
    parser.add_argument("--seed", type=int, default=1, help="of views, noise and order")
    parser.add_argument("--cut", type=float, default=0.0, help="share of views of heads without shoulders")
    parser.add_argument("--most", type=int, default=5000, help="views on the GPU at a time, of 5 MB each")
    parser.add_argument("--renew", type=float, default=15, help="seconds after which views drawn since are taken")
    parser.add_argument("--views", type=Path, default=Path("/tmp/maisi-views"), help="where drawn views wait")
    parser.add_argument("--waiting", type=int, default=300, help="views on the disk, and in memory, at most")
    parser.add_argument(
        "--draw", type=float, default=0, help="seconds to draw views, at least, before a first stage that needs them"
    )
    a = parser.parse_args()
    stages = [stage for stage in STAGES if stage in a.stages.split(",")]
    a.out.mkdir(parents=True, exist_ok=True)
    a.views.mkdir(parents=True, exist_ok=True)
    (a.views / "stop").unlink(missing_ok=True)
    device = torch.device(a.device)
    source = PreparedFolder(a.prepared)
    spawn = multiprocessing.get_context("spawn")
    warming = spawn.Process(target=warm_up, args=(device,), daemon=True)
    warming.start()
    with spawn.Pool(max(1, a.workers)) as pool:
        facts = dict(pool.map(facts_of, [(a.prepared, case.id) for case in source.cases("train")], chunksize=4))
    say(f"facts of {len(facts)} cases")
    jobs = [
        spawn.Process(
            target=draw_views, args=(a.prepared, a.views, n, a.workers, a.waiting, a.seed, a.cut, facts), daemon=True
        )
        for n in range(a.workers)
    ]
    for job in jobs:
        job.start()
    views: list[DrawnView] = []

    def keep_gathering() -> None:
        with ThreadPoolExecutor(4) as pool:
            while not (a.views / "stop").exists():
                paths = sorted(a.views.glob("??????.npz"))[: max(0, min(100, a.waiting - len(views)))]
                views.extend(pool.map(read_view, paths))
                for path in paths:
                    path.unlink()
                time.sleep(0.0 if paths else 0.5)

    def gathered() -> list[DrawnView]:
        taken = views[:]
        del views[: len(taken)]
        return taken

    def seconds_for(stage: str, spare: float) -> float:
        left = a.seconds - (time.monotonic() - STARTED) - spare
        return left * SHARES[stage] / sum(SHARES[other] for other in stages[stages.index(stage) :])

    reader = ThreadPoolExecutor(1)
    reading = reader.submit(keep_gathering)
    try:
        if "autoencoder" in stages:
            seconds = seconds_for("autoencoder", 40)
            model = train_autoencoder(source, device, seconds, a.batch, a.patch, a.whole, a.out, warming.join)
        else:
            model = trained(a.autoencoder, device, Autoencoder)
        if stages == ["autoencoder"]:
            return
        banks: dict[tuple[int, ...], Bank] = {}
        renewed = time.monotonic()

        def renew(after: float = a.renew) -> None:
            nonlocal renewed
            if time.monotonic() - renewed < after:
                return
            for size, fresh in encoded(model, gathered(), device).items():
                if size in banks:
                    banks[size].take(fresh, int(a.most * share_of(size)))
                else:
                    banks[size] = fresh
            renewed = time.monotonic()

        time.sleep(a.draw)
        while not banks:
            renew(0)
            time.sleep(1)
        say(f"{sum(len(bank) for bank in banks.values())} views")
        if "decoder" in stages:
            model = train_decoder(model, banks, device, seconds_for("decoder", 25), renew, a)
            if stages[-1] == "decoder":
                return
        weights = importance(model, banks)
        if "unet" in stages:
            unet, scale = train_unet(banks, weights, device, seconds_for("unet", 25), renew, a)
        else:
            unet, scale = trained(a.unet, device, UNet), scale_of(a.unet)
        if "controlnet" not in stages:
            pictures(model, unet, None, scale, banks, device, a.out)
            return
        say(f"{sum(len(bank) for bank in banks.values())} views")
        control = train_controlnet(unet, scale, banks, weights, device, seconds_for("controlnet", 12), renew, a)
        pictures(model, unet, control, scale, banks, device, a.out)
    finally:
        (a.views / "stop").touch()
    reading.result()
    say("done")


def loaded(path: Path, device: torch.device, kind: type[NetworkT]) -> NetworkT:
    """Load a network that an earlier run trained, in float32."""
    net = load_network(path, device)
    assert isinstance(net, kind)
    return net.float()


def trained(path: Path, device: torch.device, kind: type[NetworkT]) -> NetworkT:
    """As `loaded`, to be used as it is."""
    return placed(loaded(path, device, kind), device).eval().requires_grad_(False)  # type: ignore[return-value]


def scale_of(path: Path) -> float:
    """The scale factor that a U-Net's file tells."""
    scale = read_header(path).scale_factor
    assert scale is not None
    return scale


def warm_up(device: torch.device) -> None:
    """One step of each network on small maps, so that Triton's kernels lie on the disk when they are needed."""
    if device.type != "cuda":
        return
    told = {name: value.to(device) for name, value in condition_tensors([Conditions((3.0,) * 3, HEADS, "ct")]).items()}
    model, unet = placed(Autoencoder(AUTOENCODER), device), placed(UNet(UNET), device)
    x, times = last(torch.rand(1, UNET.in_channels, 16, 16, 16, device=device)), torch.full((1,), 500.0, device=device)
    with autocast(device):
        made, _ = model(last(torch.rand(1, 1, 32, 32, 32, device=device)))
        made.float().mean().backward()
        unet(x, times, **told).float().mean().backward()
    with torch.no_grad(), autocast(device):
        model(last(torch.rand(1, 1, 32, 32, 32, device=device)))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
