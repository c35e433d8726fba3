"""Computations as CUDA graphs: recorded once for each set of shapes, then launched as a whole. Knows no network.

Python launches the kernels of a U-Net one by one; at small sizes a GPU works them off more quickly than that. What is
recorded reads and writes the same places of memory each time it is replayed, so it must not depend on anything but its
inputs, and tensors that it changes besides must stay where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass
class Recording:
    """A graph with the places of its inputs and of its result."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Tensor


@dataclass
class GraphMemory:
    """Memory that recordings have in common: of computations that run one after the other, each result copied first."""

    pool: Any = None


class CudaGraphs:
    """A function of tensors that lie on one device; where that is no CUDA device, it is called as it is.

    With shapes for the first time it is called, in which libraries look for their kernels; the second time it is
    recorded. Recordings share their memory, with those of other functions if they are given the same `memory`; it is
    held as long as one of them lives. Where nothing is trained and shapes cannot be recorded (memory for a second copy
    is missing, or a library refuses), it is called as it is.
    """

    def __init__(self, compute: Callable[..., Tensor], memory: GraphMemory | None = None) -> None:
        self.compute = compute
        self._memory = memory or GraphMemory()
        self._seen: set[Shapes] = set()
        self._recordings: dict[Shapes, Recording | None] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Call it, or launch what was recorded; the result is a tensor of its own."""
        if any(x.device.type != "cuda" for x in inputs):
            return self.compute(*inputs)
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        if shapes not in self._seen:
            self._seen.add(shapes)
            return self._aside(inputs) if torch.is_grad_enabled() else self.compute(*inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._recorded_or_not(inputs)
        recording = self._recordings[shapes]
        if recording is None:
            return self.compute(*inputs)
        for own, x in zip(recording.inputs, inputs, strict=True):
            own.copy_(x)
        recording.graph.replay()
        return recording.result.clone()

    def _aside(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Call it on another stream: what autograd keeps of a stream must not be of the one that others use."""
        main, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            result = self.compute(*inputs)
        main.wait_stream(aside)
        return result

    def _recorded_or_not(self, inputs: tuple[Tensor, ...]) -> Recording | None:
        """None where that fails; a training step that failed half-way may have changed something, so it raises."""
        if torch.is_grad_enabled():
            return self._recorded(inputs)
        try:
            return self._recorded(inputs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        torch.cuda.empty_cache()
        warnings.warn(f"CUDA records no graph here, so steps take longer: {reason}", stacklevel=3)
        return None

    def _recorded(self, inputs: tuple[Tensor, ...]) -> Recording:
        own = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the GPU meanwhile
        with torch.cuda.graph(graph, pool=self._memory.pool, capture_error_mode="thread_local"):
            result = self.compute(*own)
        self._memory.pool = graph.pool()
        return Recording(graph, own, result)
