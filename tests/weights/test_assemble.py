"""Model folders made of single files: they load and generate, and what does not belong is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maisi.cli import run
from maisi.data.mask_library import build
from maisi.data.phantom import phantom_labels
from maisi.data.quality import carried_ranges
from maisi.diffusion.ddpm import DDPM
from maisi.errors import MaisiError
from maisi.generation.pipeline import load
from maisi.io.nifti import write_volume
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.networks.controlnet import ControlNet
from maisi.weights.assemble import assemble, process_of
from maisi.weights.load import load_network, read_header, save_network
from maisi.weights.registry import find_model

BRAIN, MANDIBLE = 22, 138


@pytest.fixture
def parts(model_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """The files of a model; its U-Net says the scale factor, as converted ones do."""
    unet = tmp_path / "unet.safetensors"
    save_network(unet, load_network(model_folder / "unet.safetensors"), metadata={"maisi.scale_factor": "0.8"})
    return {
        "autoencoder": model_folder / "autoencoder.safetensors",
        "unet": unet,
        "controlnet": model_folder / "controlnet.safetensors",
    }


def test_assembled_by_command_generates_the_same(parts: dict[str, Path], model_folder: Path, tmp_path: Path) -> None:
    options = [word for part, path in parts.items() for word in (f"--{part}", str(path))]
    assert run(["weights", "assemble", *options, "--name", "mine", "-o", str(tmp_path / "mine")]) == 0
    wanted = {"region": "chest", "size": (32, 32, 32), "spacing": (8, 8, 8), "steps": 2, "solver": "euler"}
    made = load(tmp_path / "mine").generate(**wanted)
    assert (made.image.array == load(model_folder).generate(**wanted).image.array).all()
    assert find_model(tmp_path / "mine").config.default_steps == 30


def test_ranges_come_along(parts: dict[str, Path], tmp_path: Path) -> None:
    ranges = carried_ranges().model_copy(update={"source": "mine"})
    given = tmp_path / "learned.json"
    given.write_text(ranges.model_dump_json())
    options = [word for part, path in parts.items() for word in (f"--{part}", str(path))]
    command = ["weights", "assemble", *options, "--name", "mine", "--ranges"]
    assert run([*command, str(parts["unet"]), "-o", str(tmp_path / "mine")]) == 2
    assert not (tmp_path / "mine").exists()
    assert run([*command, str(given), "-o", str(tmp_path / "mine")]) == 0
    assert load(tmp_path / "mine").ranges == ranges


def test_label_maps_come_along_and_are_followed_where_they_show_what_is_asked(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    labels = phantom_labels((48, 40, 40), (8, 8, 8), ("head-neck",), seed=3)
    labels.array[labels.array == BRAIN] = MANDIBLE  # which no phantom has
    write_volume(tmp_path / "head.nii.gz", labels)
    build([tmp_path / "head.nii.gz"], tmp_path / "maps")
    options = [word for part, path in parts.items() for word in (f"--{part}", str(path))]
    command = ["weights", "assemble", *options, "--name", "mine", "--library"]
    assert run([*command, str(tmp_path), "-o", str(tmp_path / "mine")]) == 2
    assert not (tmp_path / "mine").exists()
    assert run([*command, str(tmp_path / "maps"), "-o", str(tmp_path / "mine")]) == 0
    model = load(tmp_path / "mine", device="cpu")
    asked = {"region": "head-neck", "size": (32, 32, 32), "spacing": (8, 8, 8), "steps": 1, "retries": 0}
    items = [model.generate(**asked, structure=["mandible"], item=number) for number in (0, 1)]
    for item in items:
        assert item.details["mask_source"].startswith("the model's library, mask 0001")
        assert item.labels is not None
        assert (item.labels.array == MANDIBLE).any()
    assert (items[0].labels.array != items[1].labels.array).any()  # each is bent in its own way
    abdomen = model.generate(**{**asked, "region": "abdomen"}, structure=["liver"])
    assert abdomen.details["mask_source"].startswith("phantom")


def test_half_is_half_the_size(parts: dict[str, Path], tmp_path: Path) -> None:
    assemble(parts, tmp_path / "whole", "whole")  # type: ignore[arg-type]
    assemble(parts, tmp_path / "half", "half", storage="float16")  # type: ignore[arg-type]
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("whole", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    headers = [read_header(tmp_path / n / "unet.safetensors") for n in ("whole", "half")]
    assert [header.storage for header in headers] == ["float32", "float16"]
    assert headers[0].metadata == headers[1].metadata


def test_eight_bits_generate_nearly_the_same(parts: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = Autoencoder(AutoencoderConfig(channels=(16, 16, 64), num_res_blocks=(1, 1, 1), norm_groups=4))
    save_network(tmp_path / "wide.safetensors", wide)
    parts["autoencoder"] = tmp_path / "wide.safetensors"
    options = [word for part, path in parts.items() for word in (f"--{part}", str(path))]
    command = ["weights", "assemble", *options, "--name", "mine"]
    assert run([*command, "-o", str(tmp_path / "whole")]) == 0
    assert run([*command, "--storage", "int8", "-o", str(tmp_path / "small")]) == 0
    assert run([*command, "--storage", "int4", "-o", str(tmp_path / "none")]) == 2
    assert read_header(tmp_path / "small" / "autoencoder.safetensors").storage == "int8"
    wanted = {"region": "chest", "size": (32, 32, 32), "spacing": (8, 8, 8), "steps": 2, "solver": "euler"}
    first, second = (load(tmp_path / n, device="cpu").generate(**wanted).image.array for n in ("whole", "small"))
    assert abs(first.astype(float) - second).mean() < 0.05 * first.std()


def test_what_is_stored_so_already_is_copied(parts: dict[str, Path], tmp_path: Path) -> None:
    assemble(parts, tmp_path / "half", "half", storage="float16")  # type: ignore[arg-type]
    halved = {part: tmp_path / "half" / f"{part}.safetensors" for part in parts}
    for storage in ("float16", None):
        assemble(halved, tmp_path / str(storage), "again", storage=storage)  # type: ignore[arg-type]
        for part, path in halved.items():
            assert (tmp_path / str(storage) / f"{part}.safetensors").read_bytes() == path.read_bytes()
    assemble(halved, tmp_path / "whole", "whole", storage="float32")  # type: ignore[arg-type]
    assert read_header(tmp_path / "whole" / "unet.safetensors").storage == "float32"


def test_the_released_inputs_tell_the_process(parts: dict[str, Path]) -> None:
    header = read_header(parts["unet"])
    assert process_of(header) == {"kind": "rectified_flow"}
    plain = type(header)(header.network, header.config | {"num_modalities": None}, header.metadata, header.tensors)
    assert process_of(plain) == {"kind": "ddpm"}


def test_what_does_not_belong_is_refused(parts: dict[str, Path], model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MaisiError, match="not unet"):
        assemble({**parts, "unet": parts["controlnet"]}, tmp_path / "a", "a")  # type: ignore[arg-type]
    with pytest.raises(MaisiError, match="scale factor"):
        assemble({**parts, "unet": model_folder / "unet.safetensors"}, tmp_path / "a", "a")  # type: ignore[arg-type]
    with pytest.raises(MaisiError, match="needs an autoencoder"):
        assemble({"unet": parts["unet"]}, tmp_path / "a", "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with pytest.raises(MaisiError, match="exists"):
        assemble(parts, tmp_path / "a", "a")  # type: ignore[arg-type]


def test_networks_that_do_not_fit_each_other_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    coder: Any = load_network(parts["autoencoder"])
    control: Any = load_network(parts["controlnet"])
    other = {name: tmp_path / f"{name}.safetensors" for name in ("latents", "trunk", "process")}
    save_network(other["latents"], Autoencoder(coder.config.model_copy(update={"latent_channels": 3})))
    levels = tuple(not on for on in control.config.attention_levels)
    save_network(other["trunk"], ControlNet(control.config.model_copy(update={"attention_levels": levels})))
    save_network(other["process"], control, metadata={"maisi.process": json.dumps(DDPM().config())})
    for change, said in (
        ({"autoencoder": other["latents"]}, "trained together"),
        ({"controlnet": other["trunk"]}, r"not of the same make .* attention_levels"),
        ({"controlnet": other["process"]}, "trained with another process"),
    ):
        with pytest.raises(MaisiError, match=said):
            assemble({**parts, **change}, tmp_path / "a", "a")  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
