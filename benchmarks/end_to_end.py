"""Noise to image beside the reference: N flow steps of the released U-Net, then decoding, same weights and noise.

    python benchmarks/end_to_end.py --size 64 --steps 4 --rounds 2 -o benchmarks/results/end-to-end.json

The reference walks by its own scheduler, ours by the rectified flow with the reference's rounding of the times, so that
the images agree up to rounding. How things are measured: beside.py.
"""

from __future__ import annotations

from pathlib import Path

import beside
import numpy as np
import reference
import torch

from maisi.device import feature_layout, keep_freed_memory, resolve_precision
from maisi.diffusion.rectified_flow import RectifiedFlow
from maisi.diffusion.sampler import sample
from maisi.generation import codec
from maisi.splitting import autoencoder as split
from maisi.splitting.plan import coding_plan
from maisi.weights.load import load_network

SPACING, MODALITY = [[80.0, 80.0, 250.0]], [1]


def prepare(folder: Path, settings: beside.Settings) -> None:
    reference.save(reference.unet(settings["small"], flow=True), "unet", folder)
    reference.save(reference.autoencoder(settings["small"]), "autoencoder", folder)
    compression = 2 if settings["small"] else 4
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, *(n // compression for n in settings["size"]), generator=generator)
    np.save(folder / "noise.npy", noise.numpy())


@torch.inference_mode()
def one_run(kind: str, folder: Path, settings: beside.Settings) -> tuple[np.ndarray, beside.Cost]:
    """The image's values before clipping."""
    device = torch.device(settings["device"])
    if device.type == "cpu":
        keep_freed_memory()
    noise = torch.from_numpy(np.load(folder / "noise.npy")).to(device)
    spacing, modality = torch.tensor(SPACING, device=device), torch.tensor(MODALITY, device=device)
    if kind == "reference":
        work = _theirs(folder, settings, noise, spacing, modality)
    else:
        work = _ours(kind, folder, settings, noise, spacing, modality)
    made, cost = beside.measured(work, device)
    return made.float().cpu().numpy(), cost


def _theirs(
    folder: Path, settings: beside.Settings, noise: torch.Tensor, spacing: torch.Tensor, modality: torch.Tensor
):
    from monai.networks.schedulers import RFlowScheduler

    unet = reference.load(reference.unet(settings["small"], flow=True), "unet", folder, noise.device)
    decoder = reference.load(reference.autoencoder(settings["small"]), "autoencoder", folder, noise.device)
    scheduler = RFlowScheduler(use_discrete_timesteps=False, use_timestep_transform=True)

    def work() -> torch.Tensor:
        scheduler.set_timesteps(settings["steps"], noise.device, input_img_size_numel=noise[0, 0].numel())
        times, x = scheduler.timesteps, noise
        for now, following in zip(times, [*times[1:], 0], strict=True):
            v = unet(x, now[None].float(), spacing_tensor=spacing, class_labels=modality)
            x, _ = scheduler.step(v, now, x, following)
        return decoder.decode(x)

    return work


def _ours(
    kind: str,
    folder: Path,
    settings: beside.Settings,
    noise: torch.Tensor,
    spacing: torch.Tensor,
    modality: torch.Tensor,
):
    device = noise.device
    dtype = resolve_precision(kind, device)
    layout = feature_layout(device, dtype)
    unet = codec.fast_layout(load_network(folder / "unet.safetensors", device, dtype, network="unet"))
    decoder = codec.load_autoencoder(folder / "autoencoder.safetensors", settings["device"], kind)
    plan = coding_plan(decoder.config, "decode", tuple(settings["size"]), device, dtype)

    def denoise(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        x = x.to(dtype).contiguous(memory_format=layout)
        return unet(x, times, spacing=spacing, modality=modality).float()

    def work() -> torch.Tensor:
        x = sample(RectifiedFlow(reference_rounding=True), denoise, noise, steps=settings["steps"])
        x = x.to(dtype).contiguous(memory_format=layout)
        return split.decode(decoder, x, plan.execution(device), plan.axis)

    return work


def main() -> None:
    parser = beside.options((__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="64", help="voxels of the image: one number or three, multiples of 32")
    parser.add_argument("--steps", type=int, default=4)
    a = parser.parse_args()
    if beside.answered(a, one_run):
        return
    size = beside.sizes(a.size)
    result = beside.compared(__file__, prepare, a, {"size": size, "steps": a.steps})
    configuration = "small" if a.small else "released rectified flow"
    beside.report(f"{a.steps} steps and decoding, {' x '.join(map(str, size))}, {configuration}", result, a.out)


if __name__ == "__main__":
    main()
