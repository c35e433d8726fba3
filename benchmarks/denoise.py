"""A denoising step beside the reference: U-Net or ControlNet, released DDPM configuration, same weights, same input.

    python benchmarks/denoise.py --network unet --latent 32 --rounds 3 -o benchmarks/results/denoise-unet-32.json
    python benchmarks/denoise.py --network controlnet --latent 64,64,32

A step is one after the first: as in generation, ours has then encoded the mask once for all steps (and only the time
embedding changes; the conditions' small layers take less than a thousandth). How things are measured: beside.py.
"""

from __future__ import annotations

from pathlib import Path

import beside
import numpy as np
import reference
import torch

from maisi.device import feature_layout, keep_freed_memory, resolve_precision
from maisi.generation.codec import fast_layout
from maisi.generation.pipeline import RememberingEncoder
from maisi.weights.load import load_network

TIME = 500.0


def prepare(folder: Path, settings: beside.Settings) -> None:
    net = (
        reference.unet(settings["small"]) if settings["network"] == "unet" else reference.controlnet(settings["small"])
    )
    reference.save(net, settings["network"], folder)
    generator = torch.Generator().manual_seed(1)
    latent = settings["latent"]
    x = torch.randn(1, 4, *latent, generator=generator)
    mask = torch.randint(0, 2, (1, 8, *(4 * n for n in latent)), generator=generator).to(torch.uint8)
    np.savez(folder / "input.npz", x=x.numpy(), mask=mask.numpy())


def conditions(device: torch.device) -> dict[str, torch.Tensor]:
    values = {"spacing": [80.0, 80.0, 250.0], "top_region": [0.0, 100, 0, 0], "bottom_region": [0.0, 0, 100, 0]}
    return {name: torch.tensor([value], device=device) for name, value in values.items()}


@torch.inference_mode()
def one_run(kind: str, folder: Path, settings: beside.Settings) -> tuple[np.ndarray, beside.Cost]:
    """One step; of the ControlNet all that it gives to the U-Net."""
    device, network = torch.device(settings["device"]), settings["network"]
    if device.type == "cpu":
        keep_freed_memory()
    given = np.load(folder / "input.npz")
    x, mask = (torch.from_numpy(given[name]).float().to(device) for name in ("x", "mask"))
    times, told = torch.tensor([TIME], device=device), conditions(device)
    if kind == "reference":
        fresh = reference.unet if network == "unet" else reference.controlnet
        net = reference.load(fresh(settings["small"]), network, folder, device)
        names = {"spacing": "spacing_tensor"}
        theirs = {names.get(name, f"{name}_index_tensor"): value for name, value in told.items()}

        def work() -> tuple[torch.Tensor, ...]:
            if network == "unet":
                return (net(x, times, **theirs),)
            down, middle = net(x, times, controlnet_cond=mask)
            return (*down, middle)
    else:
        dtype = resolve_precision(kind, device)
        layout = feature_layout(device, dtype)
        ours = fast_layout(load_network(folder / f"{network}.safetensors", device, dtype, network=network))
        x, mask = (t.to(dtype).contiguous(memory_format=layout) for t in (x, mask))
        if network == "controlnet":
            ours.mask_encoder = RememberingEncoder(ours.mask_encoder)

        def work() -> tuple[torch.Tensor, ...]:
            if network == "unet":
                return (ours(x, times, **told),)
            residuals = ours(x, times, mask)
            return (*residuals.down, residuals.middle)

    made, cost = beside.measured(work, device, settings["repeats"])
    return torch.cat([t.float().cpu().flatten() for t in made]).numpy(), cost


def main() -> None:
    parser = beside.options((__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=("unet", "controlnet"), default="unet")
    parser.add_argument("--latent", default="32", help="voxels of the latent: one number or three")
    parser.add_argument("--repeats", type=int, default=3, help="steps in each process; the first is left out")
    a = parser.parse_args()
    if beside.answered(a, one_run):
        return
    latent = beside.sizes(a.latent)
    settings = {"network": a.network, "latent": latent, "repeats": a.repeats}
    result = beside.compared(__file__, prepare, a, settings)
    configuration = "small" if a.small else "released DDPM"
    beside.report(f"{a.network} step, latent 4 x {' x '.join(map(str, latent))}, {configuration}", result, a.out)


if __name__ == "__main__":
    main()
