"""How much memory coding a volume takes, known before it is taken. The one home of the estimate; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maisi.errors import MaisiError

Triple = tuple[int, int, int]

MAPS = 3.6
"""Feature maps of the widest layer at full resolution that live at once.

Measured as the peak of the resident memory, on a CPU, PyTorch 2.13: decoders 2.6 to 3.5 and encoders 3.0 to 3.5, for
channels 16-32-64, 32-64-128 and 64-128-256, volumes of 48 to 128 voxels an axis, float32 and bfloat16.
"""

OTHER_BYTES_PER_VOXEL = 64
"""Image, label map and its bits, in float32."""


def decoding_bytes(channels: Sequence[int], itemsize: int, voxels: int) -> int:
    """Peak of decoding to `voxels`; the decoder is widest where the last upsampling has brought level 1 up."""
    return _bytes(max(channels[:2]), itemsize, voxels)


def encoding_bytes(channels: Sequence[int], itemsize: int, voxels: int) -> int:
    """Peak of encoding `voxels`."""
    return _bytes(channels[0], itemsize, voxels)


def require_memory(needed: int, free: int, size: Triple, multiple: int, what: str) -> None:
    """Refuse what does not fit, and say which size would.

    Args:
        needed: bytes that `size` takes; they grow with its voxels.
        free: bytes there are.
        size: padded size.
        multiple: sizes are multiples of this.
        what: for the message, "Generating" or the like.

    Raises:
        MaisiError: more is needed than is free.
    """
    if needed <= free:
        return
    shrink = (free / needed) ** (1 / 3)
    x, y, z = (int(n * shrink) // multiple * multiple for n in size)
    mend = f"a size of {_show((x, y, z))} would fit" if min(x, y, z) > 0 else "free some memory"
    raise MaisiError(
        f"{what} {_show(size)} voxels takes about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; {mend}."
    )


def _bytes(width: int, itemsize: int, voxels: int) -> int:
    return math.ceil(voxels * (MAPS * width * itemsize + OTHER_BYTES_PER_VOXEL))


def _show(size: Triple) -> str:
    return ",".join(str(n) for n in size)
