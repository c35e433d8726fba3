"""Volumes to latents and back with an autoencoder: intensities, orientation, padding. Knows no file.

Latents are those of the volume in RAS+ orientation, padded at the far end of each axis to a multiple of the compression
(so the affine's origin stays), by air in CT and by the lowest value in MR.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maisi.config import parse_config
from maisi.data.latents import Latent
from maisi.data.preprocess import pad_to_multiple, unwindow_ct, window_ct, window_mr
from maisi.device import feature_layout, resolve_device, resolve_precision
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting.autoencoder import decoded, encoded
from maisi.splitting.execution import Execution
from maisi.splitting.plan import Plan, Task, Triple, budget_beside, make_plan
from maisi.volume import Volume
from maisi.weights.load import load_network, read_header

MR_UNIT = 1000.0
"""MR has no physical unit: the models' 1 (the 99.5 percentile of a training image) becomes this stored value."""


def load_autoencoder(path: Path, device: str = "auto", precision: str = "auto") -> Autoencoder:
    """Load an autoencoder's file to run it: device and precision as in `maisi.load`.

    Raises:
        MaisiError: the file holds something else or is damaged; the device is not there.
    """
    place = resolve_device(device)
    network = load_network(path, place, resolve_precision(precision, place), network="autoencoder")
    return cast(Autoencoder, fast_layout(network))


def fast_layout(network: nn.Module) -> nn.Module:
    """Put a network's weights into the layout in which 3D convolutions run fastest, and freeze them."""
    network = cast(Any, network).to(memory_format=layout_of(network))
    frozen: nn.Module = network.requires_grad_(False)
    return frozen


def layout_of(network: nn.Module) -> torch.memory_format:
    """Layout of the feature maps of a network where it is."""
    return feature_layout(*place_of(network))


def place_of(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and precision of a network."""
    parameter = next(network.parameters())
    return parameter.device, parameter.dtype


def coding_plan(
    config: AutoencoderConfig,
    task: Task,
    size: Triple,
    device: torch.device,
    dtype: torch.dtype,
    memory: int | None = None,
    weights: int = 0,
) -> Plan:
    """How a volume will be encoded or decoded; this loads and computes nothing.

    Args:
        size: of the volume, before padding.
        memory: bytes that the process may use on the device; None: all that is free there.
        weights: bytes of networks still to be loaded.

    Raises:
        MaisiError: the memory does not suffice.
    """
    multiple = config.compression
    x, y, z = (-(-n // multiple) * multiple for n in size)
    # encoding: the values in [0, 1]; decoding: the stored image
    beside = x * y * z * (4 if task == "encode" else 2) if device.type == "cpu" else 0
    budget = budget_beside(weights + beside, memory, device)
    return make_plan(config, task, (x, y, z), budget, device=device, dtype=dtype)


def file_plan(
    path: Path, task: Task, size: Triple, device: str = "auto", precision: str = "auto", memory: int | None = None
) -> Plan:
    """As `coding_plan`, for an autoencoder's file that is not loaded yet."""
    header = read_header(path)
    config = parse_config(AutoencoderConfig, header.config, str(path))
    place = resolve_device(device)
    dtype = resolve_precision(precision, place)
    return coding_plan(config, task, size, place, dtype, memory, header.parameters * dtype.itemsize)


@torch.inference_mode()
def encode(
    autoencoder: Autoencoder,
    volume: Volume,
    modality: str = "ct",
    notes: Mapping[str, str] | None = None,
    plan: Plan | None = None,
) -> Latent:
    """Encode a volume (CT in HU, or MR in any unit), on the autoencoder's device and in its precision.

    `notes` are kept with the latent; without a `plan` one is made for the memory that is free.

    Raises:
        MaisiError: the memory does not suffice, or an MR image without contrast.
    """
    ras = volume.to_ras()
    plan = plan or coding_plan(autoencoder.config, "encode", ras.shape, *place_of(autoencoder))
    values, _ = pad_to_multiple(normalised(ras.array, modality), autoencoder.config.compression)
    coded = encode_tensor(autoencoder, torch.from_numpy(values)[None, None], plan)
    mean, log_variance = (t.numpy() for t in coded)
    return Latent(mean, log_variance, ras.affine, ras.shape, modality, dict(notes or {}))


@torch.inference_mode()
def decode(autoencoder: Autoencoder, latent: Latent, plan: Plan | None = None) -> Volume:
    """Decode the mean of a volume's latents: int16, RAS+, of the volume's own size and affine; `plan` as above.

    Raises:
        MaisiError: latents of another autoencoder's shape, or the memory does not suffice.
    """
    require_decodable(autoencoder.config, latent)
    plan = plan or coding_plan(autoencoder.config, "decode", latent.size, *place_of(autoencoder))
    values = decode_tensor(autoencoder, torch.from_numpy(latent.mean)[None], latent.modality, plan)
    inside = tuple(slice(0, n) for n in latent.size)
    return Volume(np.ascontiguousarray(values[inside]), latent.affine)


def require_decodable(config: AutoencoderConfig, latent: Latent) -> None:
    """Refuse latents that an autoencoder cannot have made.

    Raises:
        MaisiError: so.
    """
    channels, *latent_size = latent.mean.shape
    padded = [n * config.compression for n in latent_size]
    if channels != config.latent_channels or any(n > p for n, p in zip(latent.size, padded, strict=True)):
        raise MaisiError(
            f"The latent has shape {tuple(latent.mean.shape)} for a volume of {latent.size}, which this autoencoder "
            "does not make; give the autoencoder that it was encoded with."
        )


@torch.inference_mode()
def encode_tensor(autoencoder: Autoencoder, image: Tensor, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """Image `1 1 X Y Z` in [0, 1] -> mean and log-variance, float32 on the CPU, `4 X/4 Y/4 Z/4` each."""
    device, dtype = place_of(autoencoder)
    axis, execution = _execution(plan, device)
    image = image.to(device, dtype).contiguous(memory_format=layout_of(autoencoder))
    rows = [part[0].cpu() for _, _, part in encoded(autoencoder, image, execution, axis)]
    mean, log_variance = torch.cat(rows, 1 + axis).chunk(2)
    return mean.contiguous(), log_variance.contiguous()


@torch.inference_mode()
def decode_tensor(
    autoencoder: Autoencoder, latent: Tensor, modality: str, plan: Plan | None = None
) -> NDArray[np.int16]:
    """Latent `1 4 X/4 Y/4 Z/4` (unscaled) -> stored intensities (X, Y, Z), see `intensities`."""
    device, dtype = place_of(autoencoder)
    axis, execution = _execution(plan, device)
    latent = latent.to(device, dtype).contiguous(memory_format=layout_of(autoencoder))
    image = np.empty([n * autoencoder.config.compression for n in latent.shape[2:]], np.int16)
    for start, stop, rows in decoded(autoencoder, latent, execution, axis):
        place = (*[slice(None)] * axis, slice(start, stop))
        image[place] = intensities(rows[0, 0].cpu().numpy(), modality)
    return image


def _execution(plan: Plan | None, device: torch.device) -> tuple[int, Execution]:
    """The cut axis and how to run; without a plan, whole."""
    return (0, Execution(devices=(device,))) if plan is None else (plan.axis, plan.execution(device))


def normalised(array: NDArray[Any], modality: str) -> NDArray[np.float32]:
    """Stored intensities to those the networks know: the HU window for CT, percentiles for MR."""
    return window_mr(array) if is_mr(modality) else window_ct(array)


def intensities(values: NDArray[np.float32], modality: str) -> NDArray[np.int16]:
    """The networks' values to int16: HU for CT, `MR_UNIT` times the value (not below 0) for MR."""
    if is_mr(modality):
        stored: NDArray[np.int16] = np.rint(np.clip(values * MR_UNIT, 0, np.iinfo(np.int16).max)).astype(np.int16)
        return stored
    return unwindow_ct(values)


def is_mr(modality: str) -> bool:
    """Whether a member of `anatomy.MODALITIES` is a kind of MR."""
    return modality.startswith("mri")
