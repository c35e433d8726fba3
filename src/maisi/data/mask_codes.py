"""Label ids <-> output channels of a mask autoencoder. Knows no network; a network's file carries its table.

The released table stands in `mask_channels.json`. Networks trained here may have a table of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import ANY_BONE, BACKGROUND, BODY, KNOWN_IDS, UNNAMED_BONE
from maisi.errors import MaisiError

Labels = NDArray[np.uint8]

METADATA_KEY = "maisi.label_ids"
"""Entry of a mask autoencoder's file that holds its table, a JSON list of ids."""


@dataclass(frozen=True)
class MaskCodes:
    """The table of one mask autoencoder.

    Attributes:
        ids: label id of each channel, 0 among them, none twice.
    """

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the ids.

        Raises:
            MaisiError: an id twice, out of 0 to 255, or no background.
        """
        if len(set(self.ids)) != len(self.ids) or not set(self.ids) <= set(range(256)) or BACKGROUND not in self.ids:
            raise MaisiError("A table of label ids needs 0 (background) and each id once, from 0 to 255; correct it.")

    def channels(self, labels: Labels) -> Labels:
        """Turn ids (any shape) into channel indices.

        Raises:
            MaisiError: an id has no channel.
        """
        channels = self._channel_of[labels]
        if (channels < 0).any():
            missing = sorted({int(i) for i in np.unique(labels)} - set(self.ids))
            raise MaisiError(f"A label map holds ids without a channel ({missing}); list them, or set `coarsen`.")
        return channels.astype(np.uint8)

    def coarse(self, labels: Labels) -> Labels:
        """Replace ids that have no channel: bones by unnamed bone (133), what is left by body, what then is by 0."""
        table = np.arange(256, dtype=np.uint8)
        for group, general in ((ANY_BONE, UNNAMED_BONE), (range(1, 256), BODY), (range(1, 256), BACKGROUND)):
            if general in self.ids:
                table[[id for id in group if int(table[id]) not in self.ids]] = general
        coarse: Labels = table[labels]
        return coarse

    def labels(self, channels: NDArray[Any]) -> Labels:
        """Turn channel indices (any shape) back into ids."""
        labels: Labels = np.array(self.ids, np.uint8)[channels]
        return labels

    @cached_property
    def nameless(self) -> tuple[int, ...]:
        """Channels whose id means nothing in this package: never to be chosen when a map is decoded."""
        return tuple(channel for channel, id in enumerate(self.ids) if id not in KNOWN_IDS)

    @cached_property
    def _channel_of(self) -> NDArray[np.int16]:
        table = np.full(256, -1, np.int16)
        table[list(self.ids)] = np.arange(len(self.ids))
        return table


@lru_cache
def released_codes() -> MaskCodes:
    """Return the table of the released mask autoencoder: 125 channels."""
    text = resources.files("maisi.data").joinpath("mask_channels.json").read_text(encoding="utf-8")
    return MaskCodes(tuple(json.loads(text)["ids"]))


def codes_of(metadata: Mapping[str, str], channels: int, source: str) -> MaskCodes:
    """Return the table that a file's metadata holds; without one the released table, if it has as many channels.

    Raises:
        MaisiError: neither fits.
    """
    try:
        codes = MaskCodes(tuple(json.loads(metadata[METADATA_KEY]))) if METADATA_KEY in metadata else released_codes()
    except (ValueError, TypeError):
        raise MaisiError(f"{source} has a damaged table of label ids; get a fresh copy.") from None
    if len(codes.ids) != channels:
        raise MaisiError(f"{source} gives out {channels} channels and names {len(codes.ids)} labels; get a fresh copy.")
    return codes
