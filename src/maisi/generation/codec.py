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

from maisi.data.latents import Latent
from maisi.data.preprocess import pad_to_multiple, unwindow_ct, window_ct, window_mr
from maisi.device import free_memory, resolve_device, resolve_precision
from maisi.errors import MaisiError
from maisi.generation.memory import decoding_bytes, encoding_bytes, require_memory
from maisi.networks.autoencoder import Autoencoder
from maisi.volume import Volume
from maisi.weights.load import load_network

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
    network = cast(Any, network).to(memory_format=torch.channels_last_3d)
    frozen: nn.Module = network.requires_grad_(False)
    return frozen


@torch.inference_mode()
def encode(
    autoencoder: Autoencoder, volume: Volume, modality: str = "ct", notes: Mapping[str, str] | None = None
) -> Latent:
    """Encode a volume (CT in HU, or MR in any unit), on the autoencoder's device and in its precision.

    `notes` are kept with the latent.

    Raises:
        MaisiError: the memory does not suffice, or an MR image without contrast.
    """
    ras = volume.to_ras()
    config, device, dtype = autoencoder.config, *_place_of(autoencoder)
    values, _ = pad_to_multiple(normalised(ras.array, modality), config.compression)
    x, y, z = values.shape
    needed = encoding_bytes(config.channels, dtype.itemsize, x * y * z)
    require_memory(needed, free_memory(device), (x, y, z), config.compression, "Encoding")
    mean, log_variance = (t.numpy() for t in encode_tensor(autoencoder, torch.from_numpy(values)[None, None]))
    return Latent(mean, log_variance, ras.affine, ras.shape, modality, dict(notes or {}))


@torch.inference_mode()
def decode(autoencoder: Autoencoder, latent: Latent) -> Volume:
    """Decode the mean of a volume's latents: int16, RAS+, of the volume's own size and affine.

    Raises:
        MaisiError: latents of another autoencoder's shape, or the memory does not suffice.
    """
    config, device, dtype = autoencoder.config, *_place_of(autoencoder)
    channels, *latent_size = latent.mean.shape
    x, y, z = (n * config.compression for n in latent_size)
    if channels != config.latent_channels or any(n > p for n, p in zip(latent.size, (x, y, z), strict=True)):
        raise MaisiError(
            f"The latent has shape {tuple(latent.mean.shape)} for a volume of {latent.size}, which this autoencoder "
            "does not make; give the autoencoder that it was encoded with."
        )
    needed = decoding_bytes(config.channels, dtype.itemsize, x * y * z)
    require_memory(needed, free_memory(device), (x, y, z), config.compression, "Decoding")
    values = decode_tensor(autoencoder, torch.from_numpy(latent.mean)[None].to(device))
    inside = tuple(slice(0, n) for n in latent.size)
    return Volume(np.ascontiguousarray(intensities(values[inside], latent.modality)), latent.affine)


@torch.inference_mode()
def encode_tensor(autoencoder: Autoencoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """Image `1 1 X Y Z` in [0, 1] -> mean and log-variance, float32 on the CPU, `4 X/4 Y/4 Z/4` each."""
    image = image.to(*_place_of(autoencoder)).contiguous(memory_format=torch.channels_last_3d)
    latent = autoencoder.encode(image)
    mean, log_variance = (t[0].float().cpu().contiguous() for t in (latent.mean, latent.log_variance))
    return mean, log_variance


def decode_tensor(autoencoder: Autoencoder, latent: Tensor) -> NDArray[np.float32]:
    """Latent `1 4 X/4 Y/4 Z/4` (unscaled) -> float32 (X, Y, Z), about 0 to 1, not clipped."""
    _, dtype = _place_of(autoencoder)
    image = autoencoder.decode(latent.to(dtype).contiguous(memory_format=torch.channels_last_3d))
    array: NDArray[np.float32] = image[0, 0].float().cpu().numpy()
    return array


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


def _place_of(autoencoder: Autoencoder) -> tuple[torch.device, torch.dtype]:
    parameter = next(autoencoder.parameters())
    return parameter.device, parameter.dtype
