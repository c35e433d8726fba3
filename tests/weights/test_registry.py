import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maisi.errors import MaisiError
from maisi.generation.retry import ranges_of
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.networks.unet import UNet, UNetConfig
from maisi.weights import registry
from maisi.weights.load import save_network, sha256
from maisi.weights.registry import carried_models, find_model


def write_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(channels=(4,), num_res_blocks=(1,), norm_groups=2))
    sizes = {"channels": (4,), "num_res_blocks": (1,), "attention_levels": (True,), "head_channels": 4}
    save_network(folder / "autoencoder.safetensors", autoencoder)
    save_network(folder / "unet.safetensors", UNet(UNetConfig(**sizes, norm_groups=2)))
    files = ["autoencoder.safetensors", "unet.safetensors"]
    values = {
        "name": folder.name,
        "autoencoder": files[0],
        "unet": files[1],
        "scale_factor": 1.25,
        "process": {"kind": "rectified_flow"},
        "sha256": {name: sha256(folder / name) for name in files},
        "size_multiple": 16,
        "field_of_view": [{"regions": ["chest"], "size": [128, 128, 96], "spacing_mm": [3, 3, 3.5]}],
        "default_steps": 20,
        "solver": "euler",
    }
    values = {k: v for k, v in {**values, **changes}.items() if v is not ...}
    (folder / "model.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "mine")


def test_model_in_a_folder(folder: Path):
    model = find_model(folder)
    assert model.config.name == "mine"
    assert model.config.field_of_view[0].spacing_mm == (3, 3, 3.5)
    assert model.path("unet") == folder / "unet.safetensors"
    assert type(model.load("unet")) is UNet
    assert next(model.load("autoencoder", dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert find_model(str(folder)) == model


def test_model_without_a_controlnet_says_so(folder: Path):
    with pytest.raises(MaisiError, match="'mine' has no controlnet"):
        find_model(folder).load("controlnet")


def test_carried_models_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "CARRIED", tmp_path / "models")
    write_model(tmp_path / "models" / "tiny")
    (tmp_path / "models" / "unfinished").mkdir()
    write_model(tmp_path / "here" / "tiny", name="another")
    monkeypatch.chdir(tmp_path / "here")
    assert carried_models() == ("tiny",)
    assert find_model("tiny").config.name == "tiny"  # not the folder of that name in the working directory
    assert find_model("./tiny").config.name == "another"
    with pytest.raises(MaisiError, match=r"no model 'tinny' \(did you mean 'tiny'\?\); give a carried model \(tiny\)"):
        find_model("tinny")


def test_every_carried_model_is_whole():
    for name in carried_models():
        model = find_model(name)
        for part in model.config.files:
            model.verify(part)
        assert ranges_of(model).organs
        assert (model.folder / model.config.card).is_file()


def test_changed_file_is_not_loaded(folder: Path):
    path = folder / "unet.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model = find_model(folder)
    with pytest.raises(MaisiError, match=r"not the file that model\.json was written for"):
        model.load("unet")
    model.load("autoencoder")


def test_exchanged_missing_and_truncated_networks(folder: Path):
    unet, autoencoder = folder / "unet.safetensors", folder / "autoencoder.safetensors"
    whole = unet.read_bytes()
    for data, match in ((autoencoder.read_bytes(), "in place of 'unet'"), (whole[:-2], "complete copy")):
        unet.write_bytes(data)
        with pytest.raises(MaisiError, match=match):
            find_model(folder)
    unet.unlink()
    with pytest.raises(MaisiError, match="No such file"):
        find_model(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"unet": ...}, "'unet' is missing"),
        ({"unnet": "x"}, "did you mean 'unet'"),
        ({"unet": "../unet.safetensors"}, "not the name of a file"),
        ({"unet": "/etc/passwd"}, "not the name of a file"),
        ({"card": ".."}, "not the name of a file"),
        ({"sha256": {}}, "no hash .* of 'autoencoder.safetensors'"),
        ({"controlnet": "controlnet.safetensors"}, "no hash .* of 'controlnet.safetensors'"),
        ({"scale_factor": 0}, "scale_factor"),
        ({"size_multiple": 0}, "size_multiple"),
        ({"inpaint_kinds": {"lever": {}}}, "'lever' is no kind of tumour; these are: .*liver"),
        ({"inpaint_kinds": {"liver": {"mask_guidance": -1.2}}}, "mask_guidance"),
        ({"inpaint_kinds": {"liver": {"temperature": 0.0}}}, "temperature"),
        ({"field_of_view": [{"regions": [], "size": [1, 2], "spacing_mm": [1, 1, 1]}]}, "size"),
    ],
)
def test_wrong_model_json(tmp_path: Path, changes: dict[str, Any], match: str):
    with pytest.raises(MaisiError, match=match):
        find_model(write_model(tmp_path / "mine", **changes))


def test_damaged_or_missing_model_json(folder: Path):
    (folder / "model.json").write_text("{")
    with pytest.raises(MaisiError, match="not JSON"):
        find_model(folder)
    (folder / "model.json").unlink()
    with pytest.raises(MaisiError, match=r"give a folder with a model\.json"):
        find_model(folder)


def test_quality_ranges_are_pinned_as_weights_are(folder: Path):
    assert find_model(folder).ranges() is None
    (folder / "ranges.json").write_text("{}")
    pins = json.loads((folder / "model.json").read_text())["sha256"]
    with pytest.raises(MaisiError, match=r"no hash .* of 'ranges\.json'"):
        find_model(write_model(folder, ranges="ranges.json"))
    pins["ranges.json"] = sha256(folder / "ranges.json")
    with pytest.raises(MaisiError, match="not the name of a file"):
        find_model(write_model(folder, ranges="../ranges.json"))
    write_model(folder, ranges="ranges.json", sha256=pins)
    assert find_model(folder).ranges() == folder / "ranges.json"
    (folder / "ranges.json").write_text("{ }")
    with pytest.raises(MaisiError, match=r"ranges\.json is not the file that model\.json was written for"):
        find_model(folder)
    (folder / "ranges.json").unlink()
    with pytest.raises(MaisiError, match=r"Cannot read .*ranges\.json"):
        find_model(folder)


def test_label_maps_that_come_along_are_pinned_by_their_index(folder: Path):
    assert find_model(folder).library() is None
    (folder / "maps").mkdir()
    index = folder / "maps" / "index.json"
    index.write_text("{}")
    with pytest.raises(MaisiError, match=r"no hash .* of 'maps/index\.json'"):
        find_model(write_model(folder, library="maps"))
    pins = json.loads((folder / "model.json").read_text())["sha256"] | {"maps/index.json": sha256(index)}
    with pytest.raises(MaisiError, match="not the name of a file"):
        find_model(write_model(folder, library="../maps", sha256=pins))
    assert find_model(write_model(folder, library="maps", sha256=pins)).library() == folder / "maps"
    index.write_text("{ }")
    with pytest.raises(MaisiError, match=r"index\.json is not the file that model\.json was written for"):
        find_model(folder)
