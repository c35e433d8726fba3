"""Weights of features that others published: which file goes with which features. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from maisi.config import Config
from maisi.errors import MaisiError
from maisi.io.files import sha256
from maisi.weights.load import FEATURE_NETWORKS, read_header

SLICE_NETWORKS = ("inception", "radimagenet")
"""Features of slices that need a file of weights."""

IMAGE_NETWORKS = ("lpips", "radimagenet")
"""Perceptual distances that need one."""


class FeatureWeights(Config):
    """A file of weights, and what it is known by; where it lies is no part of what is stored.

    Attributes:
        network: one of `FEATURE_NETWORKS`.
        variant: which of the published forms, as the network's configuration says.
        sha256: of the file.
        path: where it lies.
    """

    network: str
    variant: str
    sha256: str
    path: Path = Field(exclude=True)

    @classmethod
    def read(cls, path: Path) -> FeatureWeights:
        """Look at a file that `maisi weights convert` made.

        Raises:
            MaisiError: it is missing, foreign or damaged, or holds another kind of network.
        """
        header = read_header(path)
        if header.network not in FEATURE_NETWORKS:
            raise MaisiError(f"{path} holds '{header.network}', which gives no features; convert a published network.")
        return cls(
            network=header.network, variant=str(header.config.get("variant")), sha256=sha256(path), path=Path(path)
        )

    def __str__(self) -> str:
        return f"{self.variant}, sha256 {self.sha256[:12]}"


def choose_features(
    name: str | None, weights: Path | None, default: str, weighted: Sequence[str]
) -> tuple[str, FeatureWeights | None]:
    """Bring together the name of features and the file of their weights, each of which may be left out.

    Args:
        name: of the features; None for those of `weights`, or else `default`.
        weights: their file; None for features that need none.
        default: taken where nothing is given.
        weighted: features that need a file here.

    Raises:
        MaisiError: a file is missing, one too many, of another network, or as `FeatureWeights.read`.
    """
    if weights is None:
        name = name or default
        require_weights(name, None, weighted)
        return name, None
    read = FeatureWeights.read(weights)
    name = name or read.network
    require_weights(name, read, weighted)
    return name, read


def require_weights(name: str, weights: FeatureWeights | None, weighted: Sequence[str]) -> None:
    """Check that features have the weights that they need, and no others.

    Raises:
        MaisiError: they don't.
    """
    if weights is None:
        if name in weighted:
            raise MaisiError(
                f"Features '{name}' come from a published file; convert it by 'maisi weights convert' and give that."
            )
    elif weights.network not in weighted:
        raise MaisiError(
            f"{weights.path} holds '{weights.network}', which is of no use here; give one of {', '.join(weighted)}."
        )
    elif name != weights.network:
        raise MaisiError(f"{weights.path} holds '{weights.network}', not '{name}'; leave the file or the name out.")
