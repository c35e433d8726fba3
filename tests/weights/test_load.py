import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.networks.controlnet import ControlNet
from maisi.networks.discriminator import DiscriminatorConfig, PatchDiscriminator
from maisi.networks.unet import UNet, UNetConfig
from maisi.weights.load import load_network, read_header, save_network
from maisi.weights.tensor_file import write_tensors


def networks() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            channels=(8, 16), num_res_blocks=(1, 1), attention_levels=(False, True), head_channels=8, norm_groups=4
        )
    )
    autoencoder = Autoencoder(AutoencoderConfig(channels=(4, 8), num_res_blocks=(1, 1), norm_groups=4))
    return {"autoencoder": autoencoder, "unet": unet, "controlnet": ControlNet.from_unet(unet)}


@pytest.fixture(params=["autoencoder", "unet", "controlnet"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, torch.nn.Module, Path]:
    module = networks()[request.param]
    path = tmp_path / f"{request.param}.safetensors"
    save_network(path, module, metadata={"maisi.scale_factor": "0.75", "maisi.note": "a note"})
    return request.param, module, path


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_round_trip(saved):
    name, module, path = saved
    loaded = load_network(path, network=name)
    assert type(loaded) is type(module)
    assert loaded.config == module.config
    assert same(loaded, module)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_header_says_what_the_file_is(saved):
    name, module, path = saved
    header = read_header(path)
    assert header.network == name
    assert header.scale_factor == 0.75
    assert header.metadata["maisi.note"] == "a note"
    assert type(module.config)(**header.config) == module.config
    assert {n: shape for n, (_, shape) in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in module.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_half_precision_is_cast_to_what_is_wanted(tmp_path: Path, dtype: torch.dtype):
    module = networks()["unet"]
    save_network(tmp_path / "a", copy.deepcopy(module).to(dtype))
    assert (tmp_path / "a").stat().st_size < 2.3 * sum(p.numel() for p in module.parameters()) + 20_000
    loaded = load_network(tmp_path / "a")
    expected = {n: t.to(dtype).float() for n, t in module.state_dict().items()}
    assert all(torch.equal(t, expected[n]) for n, t in loaded.state_dict().items())
    assert {p.dtype for p in load_network(tmp_path / "a", dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert read_header(tmp_path / "a").storage == str(dtype).removeprefix("torch.")


def test_loaded_weights_can_be_trained_without_changing_the_file(saved):
    _, _, path = saved
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in load_network(path).parameters():
            parameter.add_(1)
    assert path.read_bytes() == before


def test_same_weights_same_bytes(tmp_path: Path):
    for name in ("a", "b"):
        save_network(tmp_path / name, networks()["unet"], metadata={"maisi.note": "x", "maisi.scale_factor": "1.0"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_network_than_wanted(saved):
    name, _, path = saved
    other = "unet" if name == "autoencoder" else "autoencoder"
    with pytest.raises(MaisiError, match=f"holds the network '{name}'"):
        load_network(path, network=other)


def rewritten(path: Path, module: torch.nn.Module, config: Any = None, **tensors: torch.Tensor | None) -> Path:
    """The module's file with another configuration, or tensors replaced, added or (None) left out."""
    state = {**module.state_dict(), **{n.replace("__", "."): t for n, t in tensors.items()}}
    text = module.config.model_dump_json() if config is None else config
    kept = {n: t for n, t in state.items() if t is not None}
    write_tensors(path, kept, {"maisi.network": "unet", "maisi.config": text})
    return path


def test_loading_is_strict(tmp_path: Path):
    module, path = networks()["unet"], tmp_path / "a"
    for match, tensors in {
        r"1 tensors do not fit .*time_embed.0.bias, missing in place of": {"time_embed__0__bias": None},
        r"1 tensors do not fit .*extra, \(2,\) in place of nothing": {"extra": torch.ones(2)},
        r"1 tensors do not fit .*time_embed.0.bias, \(3,\) in place of \(32,\)": {"time_embed__0__bias": torch.ones(3)},
    }.items():
        rewritten(path, module, **tensors)
        with pytest.raises(MaisiError, match=match):
            load_network(path)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("{", "damaged metadata"),
        ("[]", "damaged metadata"),
        ('{"chanels": [8, 16]}', "did you mean 'channels'"),
        ('{"channels": [8, 17]}', "one entry for each level"),
    ],
)
def test_wrong_configuration_in_the_file(tmp_path: Path, config: str, match: str):
    with pytest.raises(MaisiError, match=match):
        load_network(rewritten(tmp_path / "a", networks()["unet"], config))


@pytest.mark.parametrize("scale", ["x", "nan", "0", "-1", "inf"])
def test_wrong_scale_factor_in_the_file(tmp_path: Path, scale: str):
    metadata = {"maisi.network": "unet", "maisi.config": "{}", "maisi.scale_factor": scale}
    write_tensors(tmp_path / "a", {}, metadata)
    with pytest.raises(MaisiError, match="damaged metadata"):
        read_header(tmp_path / "a")


def test_foreign_files(tmp_path: Path):
    write_tensors(tmp_path / "a", {"w": torch.ones(2)}, {"format": "pt"})
    with pytest.raises(MaisiError, match="does not say which network"):
        load_network(tmp_path / "a")
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(MaisiError, match=r"convert a released \.pt file first"):
        load_network(tmp_path / "a.pt")


def test_whole_numbers_are_no_weights(tmp_path: Path):
    from safetensors.torch import save_file

    module = networks()["unet"]
    state = {**module.state_dict(), "conv_in.bias": torch.zeros(8, dtype=torch.int64)}
    save_file(state, tmp_path / "a", {"maisi.network": "unet", "maisi.config": module.config.model_dump_json()})
    with pytest.raises(MaisiError, match=r"conv_in\.bias is not floating-point"):
        load_network(tmp_path / "a")


def test_truncated_file(saved):
    _, _, path = saved
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MaisiError, match="get a complete copy"):
        load_network(path)


def test_saving_what_is_no_network_of_a_model(tmp_path: Path):
    with pytest.raises(ValueError, match="none of the networks"):
        save_network(tmp_path / "a", PatchDiscriminator(DiscriminatorConfig(channels=4)))
    assert not list(tmp_path.iterdir())


def test_metadata_cannot_lie_about_the_network(tmp_path: Path):
    save_network(tmp_path / "a", networks()["unet"], metadata={"maisi.network": "autoencoder", "maisi.config": "{}"})
    header = read_header(tmp_path / "a")
    assert header.network == "unet"
    assert json.loads(header.metadata["maisi.config"])["channels"] == [8, 16]
