"""Networks on disk: one safetensors file each, which says what network it is and how it is configured.

Metadata of a file: `maisi.network` (a key of `network_types`), `maisi.config` (JSON), and where they apply
`maisi.scale_factor` (a number), `maisi.process` (JSON), `maisi.custom_labels` (JSON) and `maisi.note`. How numbers
are stored is the business of `storage`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maisi.config import Config, parse_config
from maisi.device import numbered
from maisi.errors import MaisiError
from maisi.io.files import sha256
from maisi.weights.storage import Storage, packed, require_finite, unpacked, without_scales
from maisi.weights.tensor_file import DTYPE_WORDS, read_tensor_header, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "CUSTOM_LABELS_KEY",
    "FEATURE_NETWORKS",
    "NETWORKS",
    "NetworkHeader",
    "build_network",
    "load_network",
    "network_types",
    "read_header",
    "require_shapes",
    "save_network",
    "sha256",
]

CUSTOM_LABELS_KEY = "maisi.custom_labels"
"""Entry of a ControlNet's metadata: classes of the user's own, as JSON id -> name."""

NETWORKS = ("autoencoder", "unet", "controlnet")
"""The words for what a file of a model holds."""

FEATURE_NETWORKS = ("inception", "radimagenet", "lpips")
"""The words for networks published by others, which evaluations look through; the `variant` in their configuration
says which of several published forms they have."""


@dataclass(frozen=True)
class NetworkHeader:
    """What a network's file says of itself.

    Attributes:
        network: one of `NETWORKS` or `FEATURE_NETWORKS`.
        config: the network's configuration, not yet validated.
        metadata: all of the file's text entries.
        tensors: dtype (such as "F32") and shape of each tensor of the network, by name; scales of those in 8 bits are
            left out.
    """

    network: str
    config: dict[str, Any]
    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold altogether."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    @property
    def storage(self) -> str:
        """How the file stores the tensors: one of `storage.STORAGES`, or the names of other types, or of several."""
        known = {word: name for name, word in DTYPE_WORDS.items()}
        names = sorted({known.get(word, word) for word, _ in self.tensors.values()})
        return "int8" if "int8" in names else ", ".join(names)

    @property
    def scale_factor(self) -> float | None:
        """What latents are multiplied by before diffusion; None where the file does not say."""
        text = self.metadata.get("maisi.scale_factor")
        return None if text is None else float(text)


def network_types() -> dict[str, tuple[type[Config], type[nn.Module]]]:
    """Configuration and module class of each of `NETWORKS` and `FEATURE_NETWORKS` (imports torch)."""
    from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
    from maisi.networks.controlnet import ControlNet, ControlNetConfig
    from maisi.networks.inception import Inception, InceptionConfig
    from maisi.networks.lpips import Lpips, LpipsConfig
    from maisi.networks.radimagenet import RadImageNet, RadImageNetConfig
    from maisi.networks.unet import UNet, UNetConfig

    return {
        "autoencoder": (AutoencoderConfig, Autoencoder),
        "unet": (UNetConfig, UNet),
        "controlnet": (ControlNetConfig, ControlNet),
        "inception": (InceptionConfig, Inception),
        "radimagenet": (RadImageNetConfig, RadImageNet),
        "lpips": (LpipsConfig, Lpips),
    }


def read_header(path: Path) -> NetworkHeader:
    """Read what network a file holds, without torch and without its tensors.

    Raises:
        MaisiError: the file is missing, foreign, damaged or truncated, or no network written by maisi; tensors in 8
            bits do not fit their scales.
    """
    header = read_tensor_header(path)
    network = header.metadata.get("maisi.network", "")
    if network not in (*NETWORKS, *FEATURE_NETWORKS):
        raise MaisiError(f"{path} does not say which network it holds; give a file that maisi wrote or converted.")
    try:
        config = json.loads(header.metadata["maisi.config"])
        scale = float(header.metadata.get("maisi.scale_factor", "1"))
    except (KeyError, ValueError, RecursionError):
        raise MaisiError(f"{path} has damaged metadata; get a fresh copy or convert it again.") from None
    if not isinstance(config, dict) or not (math.isfinite(scale) and scale > 0):
        raise MaisiError(f"{path} has damaged metadata; get a fresh copy or convert it again.")
    return NetworkHeader(network, config, header.metadata, without_scales(header.tensors, path))


def build_network(network: str, config: Mapping[str, Any], source: str) -> nn.Module:
    """Build a network on the meta device (shapes, no memory) from unvalidated values.

    Raises:
        MaisiError: the values are no configuration of that network; the message names `source`.
    """
    import torch

    config_type, module_type = network_types()[network]
    validated = parse_config(config_type, dict(config), source)
    with torch.device("meta"):
        return module_type(validated)


def load_network(
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    network: str | None = None,
) -> nn.Module:
    """Build the network that a file describes and load its weights, strictly.

    Args:
        path: a file that `save_network` or the converter wrote.
        device: where the weights go.
        dtype: what they are cast to, however they are stored; None for float32.
        network: what the file has to hold (a key of `network_types`); None for anything.

    Returns:
        The network in evaluation mode; its configuration is `.config`.

    Raises:
        MaisiError: as `read_header`; another network than asked for; tensors that do not fit the
            configuration.
    """
    import torch
    from safetensors.torch import load_file

    header = read_header(path)
    if network is not None and header.network != network:
        raise MaisiError(f"{path} holds the network '{header.network}'; give a file with '{network}'.")
    module = build_network(header.network, header.config, str(path))
    require_shapes(module, {name: shape for name, (_, shape) in header.tensors.items()}, path)
    _require_floats(header, path)
    tensors = unpacked(load_file(path, device=str(numbered(torch.device(device)))), dtype or torch.float32)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval()


def save_network(
    path: Path,
    module: nn.Module,
    *,
    metadata: Mapping[str, str] | None = None,
    storage: Storage | None = None,
) -> None:
    """Write a network, atomically; the same weights and metadata always give the same bytes.

    Args:
        path: the file to write, ending in `.safetensors`.
        module: a network of `network_types`, with its configuration as `.config`.
        metadata: further text entries, such as `maisi.scale_factor` or `maisi.note`.
        storage: how to store the weights; None for the types that they are.

    Raises:
        MaisiError: the place cannot be written to; weights are not finite.
        ValueError: the module is of another class.
    """
    names = [name for name, (_, module_type) in network_types().items() if type(module) is module_type]
    if not names:
        raise ValueError(f"{type(module).__name__} is none of the networks {', '.join(network_types())}")
    config: Any = module.config
    own = {"maisi.network": names[0], "maisi.config": config.model_dump_json()}
    tensors: Mapping[str, Tensor] = module.state_dict()
    if storage is None:
        require_finite(tensors)
    else:
        tensors = packed(tensors, storage)
    write_tensors(path, tensors, {**(metadata or {}), **own})


def require_shapes(module: nn.Module, found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Compare names and shapes of the tensors in a file with those of the network that they are for.

    Raises:
        MaisiError: any differ, are missing, or are too many; the message names the first.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        raise MaisiError(
            f"{path}: {len(wrong)} tensors do not fit the network's configuration (first: {name}, "
            f"{found.get(name, 'missing')} in place of {wanted.get(name, 'nothing')}); get a fresh copy."
        )


def _require_floats(header: NetworkHeader, path: Path) -> None:
    foreign = sorted(name for name, (dtype, _) in header.tensors.items() if not dtype.startswith(("F", "BF", "I8")))
    if foreign:
        raise MaisiError(f"{path}: {foreign[0]} is not floating-point; get a fresh copy.")
