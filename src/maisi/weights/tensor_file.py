"""The safetensors format: headers without their tensors, and the same bytes for the same tensors.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little-endian;
the header, JSON, which gives each tensor's type, shape and place; the tensors' bytes. Reading needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maisi.errors import MaisiError
from maisi.io.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 16 * 2**20
"""More than any network's header needs; a larger number means that the file is of another format."""

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

DTYPE_WORDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
"""The format's word for each type that can be written, by torch's name of it."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of itself.

    Attributes:
        metadata: free text by key.
        tensors: dtype (the format's word, such as "F32") and shape of each tensor, by name.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


def read_tensor_header(path: Path) -> TensorHeader:
    """Read and check the header; no tensor is touched.

    Raises:
        MaisiError: the file is missing, of another format, damaged, or not as long as its header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise MaisiError(_foreign(path))
            raw = file.read(length)
    except OSError as error:
        raise MaisiError(f"Cannot read {path}: {error.strerror}; give the path of a .safetensors file.") from None
    try:
        header, end = _parse(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MaisiError(_foreign(path)) from None
    if end != size - 8 - length:
        raise MaisiError(
            f"{path} has {size - 8 - length} bytes of tensors where its header promises {end}; get a complete copy."
        )
    return header


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors (of `DTYPE_WORDS`) and text, atomically; the same content always gives the same bytes.

    The library's own writer puts metadata in random order, which changes the file's hash from run to run.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    # The widest types come first so that each tensor starts at a multiple of its own type's width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPE_WORDS[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic_path(path) as part, part.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)


def _parse(raw: bytes) -> tuple[TensorHeader, int]:
    """Return the header and the number of bytes its tensors take; an exception means that it is no header."""
    values = json.loads(raw)
    metadata = values.pop("__metadata__", {})
    if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise ValueError("metadata that is not text")
    end = 0
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in sorted(values.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError("sizes that are no whole numbers")
        if start != end or stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise ValueError("tensors that overlap, leave gaps or differ from their sizes")
        tensors[name] = (dtype, shape)
        end = stop
    return TensorHeader(metadata, tensors), end


def _foreign(path: Path) -> str:
    return f"{path} is not a safetensors file; give one that maisi wrote, or convert a released .pt file first."
