"""The prepared folder: cases as arrays that training can map into memory, with one index. Knows no network.

`index.json` lists the cases; images are int16 HU (CT) or float32 in [0, 1] (MR), labels uint8, both `.npy` in RAS+
order (X, Y, Z), read without pickles.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maisi.config import Config, parse_config
from maisi.data.preprocess import window_ct
from maisi.errors import MaisiError
from maisi.io.files import INDEX
from maisi.volume import Array

Split = Literal["train", "validation"]

MOST_OPEN = 128
"""Arrays of a folder that stay mapped; each holds a file open, of which a process may often have no more than 1,024."""


class PreparedCase(Config):
    """One case of a prepared folder; paths are relative to the folder."""

    id: str
    patient: str
    split: Split
    image: str
    labels: str | None = None
    affine: tuple[tuple[float, float, float, float], ...]
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    regions: tuple[str, ...] = ()
    modality: str = "ct"
    weight: float = 1.0

    @property
    def is_ct(self) -> bool:
        """Whether the image is stored in HU; others are stored as networks see them."""
        return self.modality.startswith("ct")

    def network_values(self, stored: Array) -> NDArray[np.float32]:
        """Turn values of the stored image, any shape, into what networks see, float32."""
        return window_ct(stored) if self.is_ct else np.ascontiguousarray(stored, dtype=np.float32)


class PreparedIndex(Config):
    """What `index.json` holds; `custom_labels` as in `manifest.CaseList`."""

    version: Literal[1] = 1
    cases: tuple[PreparedCase, ...]
    custom_labels: dict[int, str] = Field(default={})


class PreparedFolder:
    """Read access to a prepared folder. Arrays are memory-mapped: a patch costs what it is large."""

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            MaisiError: there is no index, or it is not one.
        """
        self.folder = folder
        path = folder / INDEX
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise MaisiError(f"{folder} holds no readable {INDEX}; make one with 'maisi prepare'.") from None
        self.index = parse_config(PreparedIndex, values, str(path))

    def cases(self, split: Split) -> tuple[PreparedCase, ...]:
        """Cases of one split, in the order of the index."""
        return tuple(case for case in self.index.cases if case.split == split)

    @cached_property
    def _open(self) -> dict[str, Array]:
        return {}

    def image(self, case: PreparedCase) -> Array:
        """The image (X, Y, Z), mapped."""
        return self._map(case.image)

    def labels(self, case: PreparedCase) -> Array:
        """The label map (X, Y, Z) uint8, mapped."""
        if case.labels is None:
            raise MaisiError(f"Case {case.id} has no labels; prepare it with a label map.")
        return self._map(case.labels)

    def _map(self, name: str) -> Array:
        array = self._open.pop(name, None)
        if array is None:
            try:
                array = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError):
                raise MaisiError(f"{self.folder / name} is missing or damaged; prepare the data anew.") from None
        self._open[name] = array
        for oldest in tuple(self._open)[:-MOST_OPEN]:
            self._open.pop(oldest, None)
        return array
