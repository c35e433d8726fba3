"""How weights are stored: as float32, as float16, or in 8 bits with a scale for each output channel.

In 8 bits a tensor NAME of two or more axes and at least `MIN_ELEMENTS` elements is int8, and NAME.scale holds, in
float32, what one step is worth in each entry of the first axis. Smaller tensors, and kernels of few channels
(`NARROW`), are float16 then. This module knows tensors by name, neither networks nor how a file is laid out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from maisi.errors import MaisiError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Storage = Literal["float32", "float16", "int8"]
STORAGES: tuple[Storage, ...] = get_args(Storage)

SCALE = ".scale"
"""Ends the name of the tensor of scales that belongs to a tensor in 8 bits."""

MIN_ELEMENTS = 1 << 15
"""Smaller tensors stay float16: they take little room, and the finest levels of narrow networks are made of them."""

NARROW = 16
"""Kernels that read or give so few channels (latents, images, bits) stay float16: rounding them moves whole images."""

STEPS = 127
"""The largest whole number used; -128 is not, so that both signs reach as far."""


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a tensor to whole steps so that the sum of each convolution kernel stays.

    Feature maps are smooth, so what a kernel does to them is mostly its sum. Rounded each for itself, 27 taps would
    move the sum by one and a half steps, every voxel of a map alike; so the taps that were nearest to the next step
    take it until the sum is half a step off at most.

    Args:
        weight: finite numbers, output channels along the first of at least two axes, kernels along all but two.

    Returns:
        The numbers of steps (int8) and what a step is worth in each channel (float32): a 127th of the channel's
        largest magnitude. An entry is at most a step off, half a step where there are no kernels. Zeros in a tensor
        without kernels stay zeros.
    """
    import torch

    wide = weight.detach().double()
    scale = (wide.abs().flatten(1).amax(1) / STEPS).float().clamp_min(torch.finfo(torch.float32).tiny)
    exact = wide / _along_channels(scale, wide)
    steps = exact.round().clamp(-STEPS, STEPS)
    if weight.dim() > 2:
        kernels = (exact - steps).flatten(2)
        missing = kernels.sum(2, keepdim=True)
        nearest = (kernels * missing.sign()).argsort(2, descending=True).argsort(2)
        moved = (nearest < missing.abs().round()) * missing.sign()
        steps = (steps + moved.view(steps.shape)).clamp(-STEPS, STEPS)
    return steps.to(torch.int8), scale


def dequantise(steps: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 tensor that `quantise` made these of."""
    return steps.float() * _along_channels(scale.float(), steps)


def packed(tensors: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Return what a file of that storage holds, by name.

    Raises:
        MaisiError: a tensor has numbers that are not finite, or would not be in that storage.
    """
    import torch

    require_finite(tensors)
    if storage != "int8":
        dtype = torch.float32 if storage == "float32" else torch.float16
        return _still_finite({name: tensor.to(dtype) for name, tensor in tensors.items()}, storage)
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        narrow = tensor.dim() > 2 and min(tensor.shape[:2]) <= NARROW
        if tensor.dim() < 2 or tensor.numel() < MIN_ELEMENTS or narrow:
            held[name] = tensor.to(torch.float16)
        else:
            held[name], held[name + SCALE] = quantise(tensor)
    return _still_finite(held, storage)


def require_finite(tensors: Mapping[str, Tensor], source: str = "") -> None:
    """Refuse weights that are no numbers; `source` is the file that they are from.

    Raises:
        MaisiError: so; the message names the first.
    """
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            mend = f"; get a fresh copy of {source}" if source else "; train or convert the network again"
            raise MaisiError(f"{name} has numbers that are not finite{mend}.")


def _still_finite(held: dict[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    try:
        require_finite(held)
    except MaisiError:
        raise MaisiError(f"Some weights are too large to be stored as {storage}; choose float32.") from None
    return held


def unpacked(held: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that a file holds, whatever its storage, in one dtype; scales are multiplied in."""
    import torch

    eight_bits = {name for name, tensor in held.items() if tensor.dtype == torch.int8}
    scales = {name + SCALE for name in eight_bits}
    return {
        name: (dequantise(tensor, held[name + SCALE]) if name in eight_bits else tensor).to(dtype)
        for name, tensor in held.items()
        if name not in scales
    }


def without_scales(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], path: Path
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Leave the scales out of what a header says (type and shape by name); they are no parameters.

    Raises:
        MaisiError: a tensor in 8 bits has no scale, or not one number for each channel.
    """
    kept = dict(tensors)
    for name, (word, shape) in tensors.items():
        if word != "I8":
            continue
        if name + SCALE not in kept:
            raise MaisiError(f"{path}: {name} is stored in 8 bits without {name}{SCALE}; get a fresh copy.")
        scale_word, scale_shape = kept.pop(name + SCALE)
        if scale_word not in ("F32", "F16") or not shape or scale_shape != shape[:1]:
            raise MaisiError(
                f"{path}: {name}{SCALE} is not one floating-point number for each channel of {name}; get a fresh copy."
            )
    return kept


def _along_channels(scale: Tensor, like: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (like.dim() - 1))
