"""How much memory an execution will take: the execution itself, run on tensors without data, with its bytes counted.

There is no second description of the networks to keep true: layers, parts and storage are the real ones. What PyTorch's
kernels take beside their inputs and outputs is the only thing that is modelled here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maisi.layers import winograd
from maisi.layers.convolution import is_small

Scratch = Callable[[Tensor, Tensor, Tensor, bool], tuple[int, int]]
"""Bytes that a convolution, or its backward pass, takes beside its tensors, and those that stay beside its weights from
then on: from its input, weights and output, and whether it is trained."""

CONVOLUTIONS = frozenset({"aten::convolution", "aten::conv3d", "aten::conv_transpose3d.input"})
"""Names of the forward operation; in inference mode PyTorch does not take it apart, so others reach the counter."""


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of living tensors while it is active; `peak` is the most there were.

    `largest` is how many values the largest tensor has.

    Args:
        scratch: see `Scratch`.
    """

    def __init__(self, scratch: Scratch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scratch = scratch
        self.live = self.peak = self.largest = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._beside: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it makes."""
        result = func(*args, **(kwargs or {}))
        if func.name() in CONVOLUTIONS and result.is_meta and any(map(_is_channels_last, args[:2])):
            # without data PyTorch gives up the layout that it takes from a map or weights with data
            result = torch.empty_like(result, memory_format=torch.channels_last_3d)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._count(tensor.untyped_storage())
            self.largest = max(self.largest, tensor.numel())
        scratch = self._scratch_in(func.name(), args, made[0] if made else None)
        self.peak = max(self.peak, self.live + scratch)
        return result

    def _scratch_in(self, name: str, args: Sequence[Any], made: Tensor | None) -> int:
        if name == "aten::convolution_backward":
            result, source, weight, trained = *args[:3], True
        elif name in CONVOLUTIONS and made is not None:
            source, weight, result, trained = *args[:2], made, torch.is_grad_enabled()
        else:
            return 0
        taken, kept = self.scratch(source, weight, result, trained)
        self._keep(weight, kept)
        return taken

    def _keep(self, weight: Tensor, size: int) -> None:
        """Count what stays beside weights, once, until they go."""
        if size and id(weight) not in self._beside:
            self._beside.add(id(weight))
            self.live += size
            weakref.finalize(weight, self._let_go, id(weight), size)

    def _let_go(self, weight: int, size: int) -> None:
        self._beside.discard(weight)
        self.live -= size

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


def _is_channels_last(x: Tensor) -> bool:
    # by the strides: of one channel both layouts are contiguous
    return x.dim() == 5 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last_3d)


def forecast(run: Callable[[], object], scratch: Scratch) -> int:
    """Peak bytes of what `run` makes of tensors on the meta device; what lived before is not counted."""
    return counted(run, scratch).peak


def counted(run: Callable[[], object], scratch: Scratch) -> Counter:
    """Run on the meta device under a counter, as `forecast` does, and return it."""
    counter = Counter(scratch)
    with counter:
        run()
    return counter


def scratch_of(device: torch.device) -> Scratch:
    """What convolutions take on a device beside their input and output; unknown, so nothing, on all but CPUs."""
    return _cpu_scratch if device.type == "cpu" else lambda source, weight, result, trained: (0, 0)


def _cpu_scratch(source: Tensor, weight: Tensor, result: Tensor, trained: bool) -> tuple[int, int]:
    """In training small maps are left to a kernel that writes out what each voxel of the smaller map takes from.

    Else oneDNN computes in its own layouts: maps that are not channels-last are copied in and out. What Winograd's
    algorithm is for takes maps of any layout in small blocks, and keeps the weights' values at its points.
    """
    if trained and source.dtype == torch.float32 and is_small(source, weight):
        return weight[0].numel() * min(source[0, 0].numel(), result[0, 0].numel()) * source.itemsize, 0
    one_by_one = all(n - 2 <= to <= n for n, to in zip(source.shape[2:], result.shape[2:], strict=True))
    if not trained and one_by_one and winograd.is_large(source, weight, result.shape[2:]):
        return 0, winograd.kept_bytes(weight)
    plain = not source.is_contiguous(memory_format=torch.channels_last_3d)
    return (source.numel() * source.itemsize + result.numel() * result.itemsize) if plain else 0, 0
