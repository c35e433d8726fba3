import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maisi.presets import PRESETS
from maisi.weights.convert import key_table, rename
from maisi.weights.infer import infer_config
from maisi.weights.load import NETWORKS, build_network

GOLDEN = Path(__file__).parent / "golden" / "released_shapes.json"
PARAMETERS = {  # in millions, as published
    "autoencoder": 20.9,
    "diffusion_ddpm": 169.4,
    "diffusion_rflow": 180.5,
    "controlnet_ddpm": 68.6,
    "controlnet_rflow": 72.0,
    "mask_autoencoder": 5.3,
    "mask_diffusion": 197.2,
}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The golden file nests names by their parts; leaves are shapes."""
    result: dict[str, tuple[int, ...]] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = tuple(value)
    return result


RELEASED = {name: flat(tree) for name, tree in json.loads(GOLDEN.read_text()).items()}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_every_released_network_has_a_preset():
    assert set(PRESETS) == set(RELEASED) == set(PARAMETERS)
    assert {preset.network for preset in PRESETS.values()} == set(NETWORKS) == set(key_table()["networks"])


@pytest.mark.parametrize("name", list(PRESETS))
def test_released_names_and_shapes_match_exactly_both_ways(name: str):
    preset, released = PRESETS[name], RELEASED[name]
    ours = shapes_of(build_network(preset.network, preset.config.model_dump(), name))
    to_ours = rename(preset.network, released, "to_ours", name)
    assert {to_ours[key]: shape for key, shape in released.items()} == ours
    to_released = rename(preset.network, ours, "to_released", name)
    assert {to_released[key]: shape for key, shape in ours.items()} == released


@pytest.mark.parametrize("name", list(PRESETS))
def test_configuration_is_told_by_the_released_shapes(name: str):
    preset = PRESETS[name]
    to_ours = rename(preset.network, RELEASED[name], "to_ours", name)
    shapes = {to_ours[key]: shape for key, shape in RELEASED[name].items()}
    assert type(preset.config)(**infer_config(preset.network, shapes)) == preset.config


@pytest.mark.parametrize("name", list(PRESETS))
def test_number_of_parameters(name: str):
    preset = PRESETS[name]
    module = build_network(preset.network, preset.config.model_dump(), name)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.05)


def test_every_row_of_the_key_table_is_used():
    """A row that no released network needs would be untested."""
    from maisi.weights.convert import _rows

    for network in NETWORKS:
        rows = _rows(network, "to_ours")
        used = set()
        for name, preset in PRESETS.items():
            if preset.network == network:
                for key in RELEASED[name]:
                    used |= {i for i, row in enumerate(rows) if row.apply(key, RELEASED[name]) is not None}
        unused = [rows[i].pattern.pattern for i in range(len(rows)) if i not in used]
        assert not unused, network
