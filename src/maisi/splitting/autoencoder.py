"""Encoding and decoding on cut maps: the autoencoder's own results, part by part. Knows no file and no budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from maisi.networks.autoencoder import Autoencoder, LatentDistribution
from maisi.splitting.execution import Execution
from maisi.splitting.maps import FIRST_SPATIAL_DIM, FeatureMap, Whole

Piece = tuple[int, int, Tensor]
"""First row, the row after the last, and the rows `B C X Y Z`."""

Result = TypeVar("Result")


def decoded(autoencoder: Autoencoder, latent: Tensor | FeatureMap, execution: Execution, axis: int) -> Iterator[Piece]:
    """Decode and hand out the image part by part, float32 (in float64 weights: float64).

    Args:
        autoencoder: unchanged; its weights decide the precision of the feature maps.
        latent: `B latent X/4 Y/4 Z/4`, or a map of it that may be read more than once.
        execution: how; its first device is where small things are computed.
        axis: 0, 1 or 2: the cut axis.
    """
    source = Whole(latent, axis) if isinstance(latent, Tensor) else latent
    blocks = [autoencoder.post_quant_conv, *autoencoder.decoder.blocks]
    execution = _by_latent(execution, source.size)
    return execution.pieces(execution.run(blocks, source, _output_dtype(autoencoder)))


def encoded(autoencoder: Autoencoder, image: Tensor | FeatureMap, execution: Execution, axis: int) -> Iterator[Piece]:
    """Encode and hand out mean and log-variance part by part, `B 2*latent`, float32; arguments as for `decoded`.

    The image's rows are a multiple of the compression and are read once.
    """
    source = Whole(image, axis) if isinstance(image, Tensor) else image
    execution = _by_latent(execution, source.size // autoencoder.config.compression)
    last = execution.run(list(autoencoder.encoder.blocks), source)
    for start, stop, h in execution.pieces(last):
        mean = cast(nn.Module, autoencoder.quant_conv_mu)(h)
        log_variance = cast(nn.Module, autoencoder.quant_conv_log_sigma)(h).clamp(-30.0, 20.0)
        yield start, stop, torch.cat([mean, log_variance], 1).to(_output_dtype(autoencoder))


def brought(pieces: Iterator[Piece], bring: Callable[[int, Tensor], Result]) -> Iterator[Result]:
    """What `bring`, which takes parts to the CPU, makes of first row and rows; a CUDA device computes meanwhile."""
    waiting: tuple[int, Tensor, torch.cuda.Event] | None = None
    stream_on = cache(torch.cuda.Stream)

    def fetched(start: int, rows: Tensor, ready: torch.cuda.Event) -> Result:
        aside = stream_on(rows.device)
        aside.wait_event(ready)
        with torch.cuda.stream(aside):
            return bring(start, rows)

    for start, _, rows in pieces:
        if rows.device.type != "cuda":
            yield bring(start, rows)
            continue
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(rows.device))
        if waiting is not None:
            yield fetched(*waiting)
        waiting = start, rows, ready
    if waiting is not None:
        yield fetched(*waiting)


def decode(autoencoder: Autoencoder, latent: Tensor, execution: Execution, axis: int) -> Tensor:
    """As `Autoencoder.decode`: the whole image (of a process: its rows)."""
    return _joined(decoded(autoencoder, latent, execution, axis), axis)


def encode(autoencoder: Autoencoder, image: Tensor, execution: Execution, axis: int) -> LatentDistribution:
    """As `Autoencoder.encode`: the whole latent (of a process: its rows)."""
    mean, log_variance = _joined(encoded(autoencoder, image, execution, axis), axis).chunk(2, dim=1)
    return LatentDistribution(mean, log_variance)


def _joined(pieces: Iterator[Piece], axis: int) -> Tensor:
    return torch.cat([rows for _, _, rows in pieces], FIRST_SPATIAL_DIM + axis)


def _by_latent(execution: Execution, latent_rows: int) -> Execution:
    """Give each process of a group a stretch of latent rows: the same share of every map, on whole voxels."""
    group = execution.group
    if group is None:
        return execution
    start, stop = (latent_rows * rank // group.size for rank in (group.rank, group.rank + 1))
    return replace(execution, share=(start, stop), denominator=latent_rows)


def _output_dtype(autoencoder: Autoencoder) -> torch.dtype:
    dtype = next(autoencoder.parameters()).dtype
    return dtype if dtype == torch.float64 else torch.float32
