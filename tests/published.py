"""Stand-ins for published files of feature networks: their names and shapes, with weights made of a seed.

The files themselves are no part of the repository. Weights depend on a tensor's published name alone, so that other
implementations could be given the same ones: `tests/golden/feature_networks.json` has what torchvision, pytorch-fid,
radimagenet-models and lpips made of them.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from maisi.weights.load import build_network

State = dict[str, Tensor]

HEADS = {"alexnet": (64, 192, 384, 256, 256), "vgg16": (64, 128, 256, 512, 512)}
HEADS["squeezenet1_1"] = (64, 128, 256, 384, 384, 512, 512)
"""Channels of the maps that LPIPS compares."""

SLICES = {"alexnet": (2, 5, 8, 10, 12), "vgg16": (4, 9, 16, 23, 30), "squeezenet1_1": (2, 5, 8, 10, 11, 12, 13)}
"""Where lpips cuts a trunk's layers: the first layer that a slice no longer has."""

CLASSIFIERS = {
    "alexnet": {"classifier.1": (4096, 9216), "classifier.4": (4096, 4096), "classifier.6": (1000, 4096)},
    "vgg16": {"classifier.0": (4096, 25088), "classifier.3": (4096, 4096), "classifier.6": (1000, 4096)},
    "squeezenet1_1": {"classifier.1": (1000, 512, 1, 1)},
}

SEQUENCE = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
"""torchvision's ResNet as a sequence of its children."""


def images(side: int) -> Tensor:
    """Two grey images."""
    return torch.from_numpy(np.random.default_rng(side).random((2, 1, side, side), dtype=np.float32))


def seeded(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights of a tensor, by its published name: of a size that keeps activations moderate."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        values = rng.standard_normal(shape, dtype=np.float32) * math.sqrt(2 / math.prod(shape[1:]))
        return torch.from_numpy(np.abs(values) if name.startswith("lin") else values)
    if name.endswith(("running_var", "weight")):
        return torch.from_numpy(rng.uniform(0.5, 1.5, shape).astype(np.float32))
    return torch.from_numpy((0.1 * rng.standard_normal(shape)).astype(np.float32))


def layout(state: State) -> str:
    """A hash of names, shapes and types."""
    lines = sorted(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def ours(network: str, variant: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network of the package."""
    module = build_network(network, {"variant": variant}, "the test")
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def counted(names: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """With the counters that batch norms of torch keep."""
    for name, shape in names.items():
        yield name, shape
        if name.endswith("running_var"):
            yield name.removesuffix("running_var") + "num_batches_tracked", ()


def unused(shapes: dict[str, tuple[int, ...]]) -> State:
    """Layers that are not needed, as large as they are, without their memory."""
    weights = {f"{name}.weight": torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    return weights | {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}


def inception(variant: str) -> State:
    state = {name: seeded(name, shape) for name, shape in counted(ours("inception", variant))}
    if variant == "torchvision":
        convs = {"conv0": (128, 768, 1, 1), "conv1": (768, 128, 5, 5)}
        for name, shape in convs.items():
            state[f"AuxLogits.{name}.conv.weight"] = torch.zeros(1).expand(shape)
            for part in ("weight", "bias", "running_mean", "running_var"):
                state[f"AuxLogits.{name}.bn.{part}"] = torch.zeros(shape[0])
            state[f"AuxLogits.{name}.bn.num_batches_tracked"] = torch.tensor(7)
        return state | unused({"fc": (1000, 2048), "AuxLogits.fc": (1000, 768)})
    return state | unused({"fc": (1008, 2048)})


def radimagenet(variant: str) -> State:
    if variant == "keras":
        return {name: seeded(name, shape) for name, shape in counted(ours("radimagenet", variant))}
    renamed = {}
    for name, shape in ours("radimagenet", variant).items():
        first, _, rest = name.partition(".")
        renamed[f"backbone.{SEQUENCE[first]}.{rest}"] = shape
    return {name: seeded(name, shape) for name, shape in counted(renamed)}


def trunk(variant: str) -> State:
    """A file of torchvision."""
    features = {n: s for n, s in ours("lpips", variant).items() if n.startswith("features.")}
    return {name: seeded(name, shape) for name, shape in features.items()} | unused(CLASSIFIERS[variant])


def heads(variant: str) -> State:
    """A file of lpips."""
    names = {f"lin{n}.model.1.weight": (1, width, 1, 1) for n, width in enumerate(HEADS[variant])}
    return {name: seeded(name, shape) for name, shape in names.items()}


def whole_lpips(variant: str) -> State:
    """The state dict of an object of lpips, with the weights of `trunk` and `heads`."""
    state: State = {f"scaling_layer.{name}": torch.zeros(1, 3, 1, 1) for name in ("shift", "scale")}
    for name, tensor in trunk(variant).items():
        match = re.fullmatch(r"features\.(\d+)\.(.+)", name)
        if match:
            number = 1 + sum(int(match[1]) >= end for end in SLICES[variant])
            state[f"net.slice{number}.{match[1]}.{match[2]}"] = tensor
    for name, tensor in heads(variant).items():
        state[name] = tensor
        state[name.replace("lin", "lins.", 1)] = tensor
    return state


FILES: dict[str, Callable[[], State]] = {
    "inception fid": lambda: inception("fid"),
    "inception torchvision": lambda: inception("torchvision"),
    "radimagenet keras": lambda: radimagenet("keras"),
    "radimagenet torch": lambda: radimagenet("torch"),
    **{f"trunk {name}": lambda name=name: trunk(name) for name in HEADS},
    **{f"heads {name}": lambda name=name: heads(name) for name in HEADS},
    **{f"lpips {name}": lambda name=name: whole_lpips(name) for name in HEADS},
}
"""Every published file that can be converted."""

SIDES = {"inception": 150, "radimagenet": 64, "lpips": 64}
"""Of the images that golden numbers are of."""
