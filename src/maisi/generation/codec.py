"""Volumes to latents and back with an autoencoder: intensities, orientation, padding. Knows no file.

Latents are those of the volume in RAS+ orientation, padded at the far end of each axis to a multiple of the compression
(so the affine's origin stays), by air in CT and by the lowest value in MR.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maisi.config import parse_config
from maisi.data.latents import Latent
from maisi.data.preprocess import fault_of_values, pad_to_multiple, unwindow_ct, window_ct, window_mr
from maisi.device import feature_layout, resolve_device, resolve_precision
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting.autoencoder import brought, decoded, encoded
from maisi.splitting.execution import Execution
from maisi.splitting.maps import Pulled
from maisi.splitting.plan import Plan, Task, Triple, coding_plan
from maisi.volume import Volume
from maisi.weights.load import load_network, read_header

if TYPE_CHECKING:
    from maisi.splitting.processes import Processes

MR_UNIT = 1000.0
"""MR has no physical unit: the models' 1 (the 99.5 percentile of a training image) becomes this stored value."""

STORED = np.dtype(np.int16)
"""Type of stored intensities."""


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


def file_plan(
    path: Path,
    task: Task,
    size: Triple,
    device: str = "auto",
    precision: str = "auto",
    memory: int | None = None,
    *,
    streamed: bool = False,
    processes: int = 1,
) -> Plan:
    """As `coding_plan`, for an autoencoder's file that is not loaded yet."""
    header = read_header(path)
    config = parse_config(AutoencoderConfig, header.config, str(path))
    place = resolve_device(device)
    dtype = resolve_precision(precision, place)
    weights = header.parameters * dtype.itemsize
    return coding_plan(config, task, size, place, dtype, memory, weights, streamed=streamed, processes=processes)


class Rows(Protocol):
    """A CT in RAS+ that is asked for a few rows at a time; `io.slabs.RasRows` is one."""

    shape: Triple
    affine: NDArray[np.float64]

    def rows(self, axis: int, start: int, stop: int) -> NDArray[Any]:
        """HU, (X, Y, Z), rows start to stop - 1 of an axis."""


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


LOOKED_AT = 16
"""Sections of a CT that is never whole, at most, by which it is told whether it holds HU."""


def rows_fault(ct: Rows) -> str | None:
    """As `preprocess.hu_fault`, by some sections spread over a CT that is never whole."""
    count = ct.shape[2]
    chosen = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).round().astype(int))
    sections = np.concatenate([ct.rows(2, int(z), int(z) + 1) for z in chosen], axis=2)
    return fault_of_values(sections)


@torch.inference_mode()
def encode_rows(
    autoencoder: Autoencoder,
    ct: Rows,
    plan: Plan,
    notes: Mapping[str, str] | None = None,
    group: Processes | None = None,
    modality: str = "ct",
) -> Latent | None:
    """As `encode`, of a CT that is never whole in memory; in a group each process encodes its share of the rows.

    Returns:
        The latent; None for all but the first process of a group.
    """
    device, dtype = place_of(autoencoder)
    layout, multiple, axis = layout_of(autoencoder), autoencoder.config.compression, plan.axis
    last = ct.shape[axis]

    def fetch(start: int, stop: int) -> Tensor:
        shape = [-(-n // multiple) * multiple for n in ct.shape]
        shape[axis] = stop - start
        values = np.zeros(shape, np.float32)
        if start < last:
            held = window_ct(ct.rows(axis, start, min(stop, last)))
            values[tuple(slice(0, n) for n in held.shape)] = held
        return torch.from_numpy(values)[None, None].to(device, dtype).contiguous(memory_format=layout)

    image = Pulled(axis, -(-last // multiple) * multiple, fetch)
    execution = plan.execution(device, group=group)
    coded: Tensor | None = torch.cat([part[0] for _, _, part in encoded(autoencoder, image, execution, axis)], 1 + axis)
    if group is not None and coded is not None:
        coded = group.gathered(coded, 1 + axis)
    if coded is None:
        return None
    mean, log_variance = (half.contiguous().numpy() for half in coded.cpu().chunk(2))
    return Latent(mean, log_variance, ct.affine, ct.shape, modality, dict(notes or {}))


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


def decode_slabs(
    autoencoder: Autoencoder, latent: Latent, plan: Plan, group: Processes | None = None
) -> Iterator[NDArray[np.int16]]:
    """As `decode`, in slabs along the plan's axis; of a group the first process is given those of all, the others none.

    Raises:
        MaisiError: as `decode`.
    """
    require_decodable(autoencoder.config, latent)
    given = torch.from_numpy(latent.mean)[None]
    slabs = _decoded_slabs(autoencoder, given, latent.modality, plan, group)
    inside = (cropped for start, slab in slabs if (cropped := _inside(slab, latent.size, plan.axis, start)).size)
    return inside if group is None else group.in_order(inside)


def _inside(slab: NDArray[np.int16], size: Triple, axis: int, start: int) -> NDArray[np.int16]:
    """Without what lies beyond `size`; the slab's first row of the axis is `start`."""
    ends = [max(0, n - start) if a == axis else n for a, n in enumerate(size)]
    return slab[tuple(slice(0, n) for n in ends)]


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
    """Image `1 1 X Y Z` in [0, 1] -> mean and log-variance, float32 on the CPU, `C X/4 Y/4 Z/4` each."""
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
    """Latent `1 C X/4 Y/4 Z/4` (unscaled) -> stored intensities (X, Y, Z), see `intensities`."""
    axis = 0 if plan is None else plan.axis
    image = np.empty([n * autoencoder.config.compression for n in latent.shape[2:]], np.int16)
    for start, slab in _decoded_slabs(autoencoder, latent, modality, plan):
        place = (*[slice(None)] * axis, slice(start, start + slab.shape[axis]))
        image[place] = slab
    return image


@torch.inference_mode()
def _decoded_slabs(
    autoencoder: Autoencoder, latent: Tensor, modality: str, plan: Plan | None, group: Processes | None = None
) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """First row and stored intensities of each part."""
    device, dtype = place_of(autoencoder)
    axis, execution = _execution(plan, device, group)
    latent = latent.to(device, dtype).contiguous(memory_format=layout_of(autoencoder))

    def bring(start: int, rows: Tensor) -> tuple[int, NDArray[np.int16]]:
        return start, intensities(rows[0, 0].cpu().numpy(), modality)

    yield from brought(decoded(autoencoder, latent, execution, axis), bring)


def _execution(plan: Plan | None, device: torch.device, group: Processes | None = None) -> tuple[int, Execution]:
    """The cut axis and how to run; without a plan, whole."""
    return (0, Execution(devices=(device,))) if plan is None else (plan.axis, plan.execution(device, group=group))


def normalised(array: NDArray[Any], modality: str) -> NDArray[np.float32]:
    """Stored intensities to those the networks know: the HU window for CT, percentiles for MR."""
    return window_mr(array) if is_mr(modality) else window_ct(array)


def intensities(values: NDArray[np.float32], modality: str) -> NDArray[np.int16]:
    """The networks' values to int16: HU for CT, `MR_UNIT` times the value (not below 0) for MR.

    Raises:
        MaisiError: some are no numbers; rounded to int16 they would be 0, which is water.
    """
    require_numbers(bool(np.isfinite(values).all()))
    if is_mr(modality):
        stored: NDArray[np.int16] = np.rint(np.clip(values * MR_UNIT, 0, np.iinfo(np.int16).max)).astype(np.int16)
        return stored
    return unwindow_ct(values)


def require_numbers(finite: bool) -> None:
    """Refuse what networks gave where not all of it is finite.

    Raises:
        MaisiError: so.
    """
    if not finite:
        raise MaisiError(
            "What the networks gave is no number (NaN): their weights are damaged, or the arithmetic overflowed; "
            "try --precision fp32, or get fresh weights."
        )


def is_mr(modality: str) -> bool:
    """Whether a member of `anatomy.MODALITIES` is a kind of MR."""
    return modality.startswith("mri")
