import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.cli import run
from maisi.config import Config
from maisi.diffusion.rectified_flow import RectifiedFlow
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.networks.controlnet import ControlNet, ControlNetConfig
from maisi.networks.unet import UNet, UNetConfig
from maisi.weights.convert import convert, export_official, rename
from maisi.weights.infer import infer_config
from maisi.weights.load import build_network, load_network, read_header, save_network


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_converted_network_computes_what_the_reference_computes(reference, tmp_path: Path):
    official = reference.save(tmp_path / "official.pt")
    convert(official, tmp_path / "ours.safetensors")
    net = load_network(tmp_path / "ours.safetensors")
    with torch.no_grad():
        expected = reference.theirs(reference.net, reference.inputs)
        found = reference.ours(net, reference.inputs)
    assert len(expected) == len(found)
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs.shape == ours.shape
        assert theirs.abs().max() > 0
        assert relative_error(ours, theirs) < 1e-4


def changed(value):
    if isinstance(value, tuple):
        return tuple(changed(v) for v in value)
    return (value + 1) % 128 if value.dtype == torch.int64 else value.flip(0) + 0.5


def test_every_input_of_the_parity_test_matters(reference, tmp_path: Path):
    convert(reference.save(tmp_path / "official.pt"), tmp_path / "ours.safetensors")
    net = load_network(tmp_path / "ours.safetensors")
    with torch.no_grad():
        usual = reference.ours(net, reference.inputs)
        for name, value in reference.inputs.items():
            other = reference.ours(net, {**reference.inputs, name: changed(value)})
            assert any(relative_error(b, a) > 1e-3 for a, b in zip(usual, other, strict=True)), name


def test_there_and_back_gives_the_same_file_content(reference, tmp_path: Path):
    official = reference.save(tmp_path / "official.pt")
    header = convert(official, tmp_path / "ours.safetensors")
    assert header.metadata["maisi.note"] == "converted from official.pt"
    export_official(tmp_path / "ours.safetensors", tmp_path / "back.pt")
    before, after = (torch.load(p, weights_only=True) for p in (official, tmp_path / "back.pt"))
    if reference.container is not None:
        assert after.get("scale_factor") == before.get("scale_factor")
        before, after = before[reference.container], after[reference.container]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scale_factor_is_carried(small_ddpm, tmp_path: Path):
    header = convert(small_ddpm.save(tmp_path / "a.pt"), tmp_path / "a.safetensors")
    assert header.scale_factor == pytest.approx(0.9)
    assert header.network == "unet"


def test_autoencoder_under_unet_state_dict_is_told_by_its_names(tmp_path: Path):
    from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig

    torch.manual_seed(0)
    config = AutoencoderConfig(channels=(4, 4), num_res_blocks=(1, 1), norm_groups=2)
    save_network(tmp_path / "a.safetensors", Autoencoder(config))
    export_official(tmp_path / "a.safetensors", tmp_path / "a.pt")
    torch.save({"unet_state_dict": torch.load(tmp_path / "a.pt", weights_only=True)}, tmp_path / "b.pt")
    header = convert(tmp_path / "b.pt", tmp_path / "b.safetensors", settings={"norm_groups": 2})
    assert header.network == "autoencoder"
    assert AutoencoderConfig(**header.config) == config


def narrow_unet(tmp_path: Path, **values) -> tuple[Path, UNetConfig]:
    """A `.pt` file of a narrow network of ours, in the released layout."""
    torch.manual_seed(0)
    config = UNetConfig(
        **{
            "channels": (4, 8),
            "num_res_blocks": (1, 1),
            "attention_levels": (False, True),
            "head_channels": 4,
            "norm_groups": 2,
            **values,
        }
    )
    save_network(tmp_path / "narrow.safetensors", UNet(config), metadata={"maisi.scale_factor": "1.5"})
    export_official(tmp_path / "narrow.safetensors", tmp_path / "narrow.pt")
    return tmp_path / "narrow.pt", config


SETTINGS = {"norm_groups": 2, "head_channels": 4}


def shapes_of(network: str, config: Config) -> dict[str, tuple[int, ...]]:
    module = build_network(network, config.model_dump(), "the test")
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def there_and_back(network: str, config: Config) -> Config:
    """What the released names and shapes of a network say of its configuration."""
    ours = shapes_of(network, config)
    to_released = rename(network, ours, "to_released", "the test")
    released = {to_released[name]: shape for name, shape in ours.items()}
    to_ours = rename(network, released, "to_ours", "the test")
    assert {to_ours[name]: shape for name, shape in released.items()} == ours
    return type(config)(**infer_config(network, ours), **SETTINGS)


LEVELS = st.lists(st.tuples(st.sampled_from([4, 8, 12]), st.integers(1, 3), st.booleans()), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    levels=LEVELS,
    flags=st.fixed_dictionaries({name: st.booleans() for name in ("region_input", "spacing_input")}),
    resampling=st.booleans(),
    projection=st.booleans(),
    modalities=st.none() | st.integers(1, 5),
    context=st.none() | st.integers(1, 3),
    blocks=st.integers(1, 2),
    mask=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_any_configuration_is_told_by_its_names_and_shapes(
    levels, flags, resampling, projection, modalities, context, blocks, mask
):
    trunk = {
        "channels": tuple(c for c, _, _ in levels),
        "num_res_blocks": tuple(n for _, n, _ in levels),
        "attention_levels": tuple(a for _, _, a in levels),
        # Cannot be seen in a network that never resamples.
        "residual_resampling": resampling and len(levels) > 1,
        "attention_out_projection": projection,
        "num_modalities": modalities,
        **SETTINGS,
    }
    config = UNetConfig(**trunk, **flags, context_channels=context, transformer_blocks=blocks if context else 1)
    assert there_and_back("unet", config) == config
    control = ControlNetConfig(**trunk, mask_channels=mask[0], mask_encoder_channels=tuple(mask))
    assert there_and_back("controlnet", control) == control


def test_narrow_file_there_and_back(tmp_path: Path):
    path, config = narrow_unet(tmp_path, region_input=True, spacing_input=True, num_modalities=3)
    header = convert(path, tmp_path / "back.safetensors", settings=SETTINGS)
    assert UNetConfig(**header.config) == config
    assert header.scale_factor == 1.5
    first, second = (load_network(tmp_path / n).state_dict() for n in ("narrow.safetensors", "back.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_inpainting_controlnet_there_and_back(tmp_path: Path):
    config = ControlNetConfig(
        channels=(8, 16),
        num_res_blocks=(1, 1),
        attention_levels=(False, False),
        head_channels=8,
        norm_groups=4,
        image_channels=2,
    )
    save_network(tmp_path / "ours.safetensors", ControlNet(config))
    export_official(tmp_path / "ours.safetensors", tmp_path / "theirs.pt")
    header = convert(
        tmp_path / "theirs.pt", tmp_path / "back.safetensors", settings={"norm_groups": 4, "head_channels": 8}
    )
    assert (header.config["mask_channels"], header.config["image_channels"]) == (8, 2)
    told = ControlNet(config.model_copy(update={"told_as": {95: (33, 34)}}))
    save_network(tmp_path / "told.safetensors", told)
    with pytest.raises(MaisiError, match="told_as"):
        export_official(tmp_path / "told.safetensors", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_what_the_layout_cannot_say_is_told(tmp_path: Path, capsys):
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=(8, 16), num_res_blocks=(1, 1), norm_groups=4, upsampling="transposed")
    save_network(tmp_path / "ours.safetensors", Autoencoder(config))
    assert export_official(tmp_path / "ours.safetensors", tmp_path / "theirs.pt") == {
        "norm_groups": 4,
        "upsampling": "transposed",
    }
    words = ["weights", "convert", str(tmp_path / "theirs.pt"), "--norm-groups", "4", "--upsampling", "transposed"]
    assert run([*words, "-o", str(tmp_path / "back.safetensors")]) == 0
    z = torch.randn(1, 4, 6, 5, 4)
    first, second = (load_network(tmp_path / f"{name}.safetensors") for name in ("ours", "back"))
    assert torch.equal(first.decode(z), second.decode(z))

    process = RectifiedFlow(base_voxels=1024).config()
    small = UNetConfig(channels=(32, 32), num_res_blocks=(1, 1), attention_levels=(False, False))
    save_network(tmp_path / "unet.safetensors", UNet(small), metadata={"maisi.process": json.dumps(process)})
    assert run(["weights", "export", str(tmp_path / "unet.safetensors"), "-o", str(tmp_path / "unet.pt")]) == 0
    said = capsys.readouterr().err
    assert "no place for process" in said
    assert '"base_voxels": 1024' in said


def test_stored_half_precision_is_kept(tmp_path: Path):
    path, _ = narrow_unet(tmp_path)
    content = torch.load(path, weights_only=True)
    content["unet_state_dict"] = {n: t.half() for n, t in content["unet_state_dict"].items()}
    torch.save(content, path)
    convert(path, tmp_path / "half.safetensors", settings=SETTINGS)
    assert {dtype for dtype, _ in read_header(tmp_path / "half.safetensors").tensors.values()} == {"F16"}
    export_official(tmp_path / "half.safetensors", tmp_path / "back.pt")
    assert torch.load(tmp_path / "back.pt", weights_only=True)["unet_state_dict"]["out.2.conv.bias"].dtype == torch.half


def refuse(path: Path, out: Path, match: str, **options) -> None:
    """Conversion fails with a MaisiError and leaves nothing behind."""
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(MaisiError, match=match):
        convert(path, out, **options)
    assert sorted(p.name for p in out.parent.iterdir()) == before


def test_unknown_missing_and_misshapen_tensors_are_refused(tmp_path: Path):
    path, _ = narrow_unet(tmp_path)
    original = torch.load(path, weights_only=True)["unet_state_dict"]
    faults = {
        "'up_blocks.0.surprise.weight' is no tensor": {**original, "up_blocks.0.surprise.weight": torch.ones(1)},
        "missing in place of": {n: t for n, t in original.items() if n != "time_embed.2.bias"},
        "lacks tensors": {n: t for n, t in original.items() if n != "conv_in.conv.weight"},
        "in place of": {**original, "time_embed.2.bias": torch.ones(3)},
        "not a tensor of weights": {**original, "time_embed.2.bias": torch.ones(16, dtype=torch.int64)},
        "none of the networks": {n: t for n, t in original.items() if n != "out.2.conv.weight"},
    }
    for match, state in faults.items():
        torch.save({"unet_state_dict": state, "scale_factor": 1.0}, path)
        refuse(path, tmp_path / "out.safetensors", match, settings=SETTINGS)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path):
    path, _ = narrow_unet(tmp_path)
    refuse(path, tmp_path / "out.safetensors", "multiple of norm_groups")  # the released value, 32, does not fit
    refuse(path, tmp_path / "out.safetensors", "did you mean 'norm_groups'", settings={**SETTINGS, "norm_group": 2})
    refuse(path, tmp_path / "out.safetensors", "in place of", settings={**SETTINGS, "channels": (8, 8)})


def test_other_network_than_asked_for_is_refused(tmp_path: Path):
    path, _ = narrow_unet(tmp_path)
    refuse(path, tmp_path / "out.safetensors", "no tensor of the network 'autoencoder'", as_network="autoencoder")
    refuse(path, tmp_path / "out.safetensors", "There is no network 'vae'", as_network="vae")


def test_place_that_cannot_be_written_is_refused(tmp_path: Path):
    path, _ = narrow_unet(tmp_path)
    with pytest.raises(MaisiError, match="does not exist"):
        convert(path, tmp_path / "nowhere" / "out.safetensors", settings=SETTINGS)


@pytest.mark.parametrize(
    ("name", "network"),
    [("encoder.blocks.x.conv1.weight", "autoencoder"), ("out.1.weight", "unet"), ("zero_convs.01.bias", "controlnet")],
)
def test_names_that_only_resemble_the_table_are_refused(name: str, network: str):
    for direction in ("to_ours", "to_released"):
        with pytest.raises(MaisiError, match="is no tensor"):
            rename(network, {name: (3,)}, direction, "file")


def test_weights_that_are_no_numbers_are_not_converted(tmp_path: Path) -> None:
    path, _ = narrow_unet(tmp_path)
    content = torch.load(path)
    next(iter(content["unet_state_dict"].values())).view(-1)[3] = float("inf")
    torch.save(content, tmp_path / "broken.pt")
    with pytest.raises(MaisiError, match="has numbers that are not finite; get a fresh copy of"):
        convert(tmp_path / "broken.pt", tmp_path / "made.safetensors", settings=SETTINGS)
    assert not (tmp_path / "made.safetensors").exists()


def test_a_full_disk_while_exporting_is_one_sentence(tmp_path: Path) -> None:
    narrow_unet(tmp_path)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(MaisiError, match=r"Cannot write .*again\.pt: File too large; choose a disk"):
            export_official(tmp_path / "narrow.safetensors", tmp_path / "again.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("again*"))
