"""Reading `.pt` files of the released layout without running anything that is in them.

PyTorch's restricted unpickler admits tensors and plain values. The released files were written with MONAI
loaded, so a scale factor may also be a tensor of MONAI's own class, with a description of the image it came
from; both are stood in for by classes that do nothing, and MONAI is not needed.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maisi.errors import MaisiError

if TYPE_CHECKING:
    from torch import Tensor

_DESCRIPTIONS = (
    "monai.utils.enums.MetaKeys",
    "monai.utils.enums.SpaceKeys",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
)


@dataclass(frozen=True)
class ReleasedFile:
    """What a `.pt` file holds.

    Attributes:
        state: the tensors, by released name, on the CPU.
        scale_factor: what latents are multiplied by before diffusion; None where the file does not say.
    """

    state: Mapping[str, Tensor]
    scale_factor: float | None


def read_released(path: Path, containers: Collection[str]) -> ReleasedFile:
    """Read a file; an archive of the usual kind is mapped, so that tensors are read when they are used.

    Args:
        path: the `.pt` file.
        containers: keys under which it may hold its tensors; without them it is itself the state dict.

    Raises:
        MaisiError: the file is missing, damaged, holds more than plain tensors, or no state dict.
    """
    path = Path(path)
    content = _load(path)
    inner = next((content[key] for key in containers if key in content), content)
    state = _without_counters(inner, path)
    _require_weights(state, path)
    return ReleasedFile(state, _scale_factor(content, path))


def _load(path: Path) -> Mapping[str, Any]:
    import torch

    try:
        with path.open("rb"):
            mapped = zipfile.is_zipfile(path)
    except OSError as error:
        raise MaisiError(f"Cannot read {path}: {error.strerror}; give the path of a .pt file.") from None
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins()):
            warnings.simplefilter("ignore")  # on pickle protocols; the error below says what matters
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception:  # the unpickler fails on foreign bytes in any way it likes
        raise MaisiError(
            f"{path} is damaged or holds more than plain tensors, so it is not opened; get a fresh file."
        ) from None
    if not isinstance(content, Mapping):
        raise MaisiError(f"{path} holds no state dict; give a released .pt file.")
    return content


def _stand_ins() -> list[Any]:
    """Classes under foreign names: a tensor that forgets its description, and things that hold nothing."""
    import torch

    def ignore(self: Any, *_: Any) -> None:
        """Take anything and keep nothing."""

    tensor = _named("monai.data.meta_tensor.MetaTensor", torch.Tensor, {"__setstate__": ignore})
    nothing = {"__init__": ignore, "__setstate__": ignore}
    return [tensor, *(_named(name, object, nothing) for name in _DESCRIPTIONS)]


def _named(full_name: str, base: type, members: Mapping[str, Any]) -> type:
    module, _, name = full_name.rpartition(".")
    return type(name, (base,), {**members, "__module__": module})


def _without_counters(state: Any, path: Path) -> dict[Any, Any]:
    """A state dict but for the batches that norms have counted in training."""
    if not isinstance(state, Mapping) or not state:
        raise MaisiError(f"{path} holds no state dict; give a released .pt file.")
    return {name: value for name, value in state.items() if not str(name).endswith(".num_batches_tracked")}


def _require_weights(state: Mapping[Any, Any], path: Path) -> None:
    import torch

    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise MaisiError(f"{path}: '{name}' is not a tensor of weights; give a released .pt file.")


def _scale_factor(content: Mapping[str, Any], path: Path) -> float | None:
    if "scale_factor" not in content:
        return None
    try:
        scale = float(content["scale_factor"])
    except (TypeError, ValueError, RuntimeError):
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise MaisiError(f"{path}: scale_factor is not a positive number; get a fresh copy.")
    return scale
