"""Label maps from nothing: the same for an item whatever its company, argmax by parts = argmax of the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maisi.anatomy import KNOWN_IDS
from maisi.cli import run
from maisi.data.anatomy_sizes import SIZED, TRAINING_KEY, MaskCase, MaskTraining
from maisi.data.mask_codes import METADATA_KEY
from maisi.data.mask_postprocess import clean
from maisi.errors import MaisiError
from maisi.generation.codec import fast_layout
from maisi.generation.mask_generator import MaskGenerator, decode_classes, make_order, painted, score_parts
from maisi.io.nifti import read_label_names, read_labels
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.networks.unet import UNet, UNetConfig
from maisi.request import Request
from maisi.splitting.plan import coding_plan
from maisi.weights.assemble import assemble
from maisi.weights.load import load_network, save_network
from maisi.weights.registry import find_model

LABELS = (0, 1, 4, 28, 129, 200)
SIZE, SPACING = (32, 16, 16), (8.0, 9.0, 10.0)


def shaken(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter a value: layers that start at zero would hide what is behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


@pytest.fixture(scope="module")
def networks(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model's files with mask networks of random weights, told regions."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    code = AutoencoderConfig(
        in_channels=8,
        out_channels=len(LABELS),
        channels=(4, 8, 8),
        num_res_blocks=(1, 1, 1),
        norm_groups=4,
        upsampling="transposed",
    )
    trunk = UNetConfig(
        channels=(8, 8),
        num_res_blocks=(1, 1),
        attention_levels=(False, True),
        head_channels=4,
        norm_groups=4,
        context_channels=10,
        region_input=True,
    )
    sizes = tuple(0.5 if id == 1 else -1.0 for id in SIZED)
    training = MaskTraining(
        size=SIZE,
        spacing_mm=SPACING,
        largest_ml=(100.0,) * 10,
        cases=(MaskCase(regions=("chest",), sizes=sizes), MaskCase(regions=("abdomen",), sizes=sizes)),
    )
    save_network(
        folder / "mask_autoencoder.safetensors",
        shaken(Autoencoder(code), 1),
        metadata={METADATA_KEY: json.dumps(LABELS)},
    )
    save_network(
        folder / "mask_unet.safetensors",
        shaken(UNet(trunk), 2),
        metadata={
            TRAINING_KEY: training.model_dump_json(),
            "maisi.scale_factor": "0.9",
            "maisi.process": '{"kind": "ddpm"}',
        },
    )
    unet = folder / "unet.safetensors"
    save_network(unet, load_network(model_folder / "unet.safetensors"), metadata={"maisi.scale_factor": "0.8"})
    return {
        "autoencoder": model_folder / "autoencoder.safetensors",
        "unet": unet,
        **{part: folder / f"{part}.safetensors" for part in ("mask_autoencoder", "mask_unet")},
    }


@pytest.fixture(scope="module")
def folder(networks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "with-masks"
    assemble(networks, made, "with-masks")  # type: ignore[arg-type]
    return made


def maps(folder: Path, numbers: range, **wishes: object) -> list[np.ndarray]:
    wanted = wishes.pop("wanted", {1: 0.6})
    request = Request.parse(**({"region": "abdomen", "steps": 2, "seed": 4} | wishes))
    order = make_order(request, wanted, find_model(folder))  # type: ignore[arg-type]
    generator = MaskGenerator(find_model(folder), "cpu", "fp32")
    plan = generator.prepare(order)
    return [generator.item(order, plan, number).labels.array for number in numbers]


def test_an_item_depends_on_seed_and_number_alone(folder: Path) -> None:
    both = maps(folder, range(2), count=2)
    alone = maps(folder, range(1, 2))
    assert both[0].shape == SIZE
    assert (both[1] == alone[0]).all()
    assert (both[0] != both[1]).any()
    assert (maps(folder, range(1), seed=5)[0] != both[0]).any()


def test_only_ids_with_a_name_come_out(folder: Path) -> None:
    for made in maps(folder, range(3)):
        assert set(np.unique(made).tolist()) <= set(LABELS) & KNOWN_IDS


def test_what_is_absent_is_not_there(folder: Path) -> None:
    """The network of random weights makes pancreas unless it must not; liver is asked for."""
    assert any((made == 4).any() for made in maps(folder, range(3), wanted={1: 0.6, 4: 0.5}))
    assert not any((made == 4).any() for made in maps(folder, range(3), wanted={1: 0.6, 4: -1.0}))


def test_the_sizes_reach_the_network(folder: Path) -> None:
    order = make_order(Request.parse(region="abdomen", steps=2), {1: 0.6}, find_model(folder))
    generator = MaskGenerator(find_model(folder), "cpu", "fp32")
    generator.prepare(order)
    told = []

    def note(*inputs: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        told.append(conditions)
        return torch.zeros_like(inputs[0])

    generator.unet = note  # type: ignore[assignment]
    generator._latent(order, order.sizes(0), 0, lambda *_: None)
    context = told[0]["context"]
    assert context.shape == (1, 1, 10)
    assert dict(zip(SIZED, context[0, 0].tolist(), strict=True))[1] == pytest.approx(0.6)
    assert told[0]["top_region"].tolist() == [[0, 0, 100, 0]]
    assert told[0]["spacing"].tolist() == [[800, 900, 1000]]


def test_the_temperature_is_the_models_unless_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = find_model(folder)
    wishes = {"region": "abdomen", "steps": 2}
    told, usual = (make_order(Request.parse(**wishes, **more), {}, model) for more in ({"temperature": 0.5}, {}))
    calm = replace(usual, masks=usual.masks.model_copy(update={"temperature": 0.5}))
    generator = MaskGenerator(model, "cpu", "fp32")
    generator.prepare(usual)
    made = [generator._latent(order, order.sizes(0), 0, lambda *_: None) for order in (told, calm, usual)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **kinds: 0.5 * draw(*size, **kinds))
    assert torch.equal(generator._latent(usual, usual.sizes(0), 0, lambda *_: None), made[0])


def test_what_is_decoded_is_unscaled_and_cleaned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = make_order(Request.parse(region="abdomen", steps=2), {1: 0.6}, find_model(folder))
    generator = MaskGenerator(find_model(folder), "cpu", "fp32")
    plan, given = generator.prepare(order), []

    def note(autoencoder: Autoencoder, latent: torch.Tensor, never: tuple[int, ...], plan: object) -> np.ndarray:
        given.append((latent, never))
        return decode_classes(autoencoder, latent, never)

    monkeypatch.setattr("maisi.generation.mask_generator.decode_classes", note)
    made = generator.item(order, plan, 0).labels.array
    with torch.inference_mode():
        latent = generator._latent(order, order.sizes(0), 0, lambda *_: None)
        torch.testing.assert_close(given[0][0], latent / 0.9)
        classes = decode_classes(generator.autoencoder, latent / 0.9, given[0][1])
    assert (made == clean(np.array(LABELS, np.uint8)[classes])).all()


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_argmax_by_parts_is_that_of_the_whole(networks: dict[str, Path], parts: int) -> None:
    autoencoder = fast_layout(load_network(networks["mask_autoencoder"], dtype=torch.float64))
    assert isinstance(autoencoder, Autoencoder)
    latent = torch.randn(1, 4, 8, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        scores = autoencoder.decode(latent)[0]
        plan = coding_plan(autoencoder.config, "decode", SIZE, torch.device("cpu"), torch.float64)
        made = decode_classes(autoencoder, latent, (), replace(plan, parts=parts))
        assert (made == scores.argmax(0).numpy()).all()
        fewer = decode_classes(autoencoder, latent, (1, 3), replace(plan, parts=parts))
    assert (fewer == torch.tensor([0, 2, 4, 5])[scores[[0, 2, 4, 5]].argmax(0)].numpy()).all()


def test_released_scores_are_never_whole() -> None:
    assert score_parts((256, 256, 256), 125) == 32  # of 8.4 GB
    assert score_parts((64, 48, 64), 44) == 1


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mask", "generate", "--region", "belly", "--anatomy-size", "liver=0.6", "--model", str(folder)]
    words += ["--steps", "2", "--seed", "4", "--device", "cpu", "--precision", "fp32"]
    out = tmp_path / "out"
    assert run([*words, "-n", "2", "-o", str(out)]) == 0
    for number, expected in enumerate(maps(folder, range(2))):
        item = out / f"{number:04d}"
        assert {path.name for path in item.iterdir()} == {"labels.nii.gz", "preview.png", "record.json"}
        labels = read_labels(item / "labels.nii.gz")
        assert (labels.array == expected).all()
        assert read_label_names(item / "labels.nii.gz")[200] == "body"
        assert labels.spacing_mm == pytest.approx(SPACING)
        record = json.loads((item / "record.json").read_text())
        assert record["anatomy_sizes"]["liver"] == 0.6
        assert record["missing"] == ([] if (labels.array == 1).any() else ["liver"])
        assert record["weights_sha256"].keys() == {"mask_autoencoder.safetensors", "mask_unet.safetensors"}
        assert record["synthetic"]
    capsys.readouterr()
    assert run([*words, "-n", "2", "-o", str(out)]) == 0
    assert "2 of them from before" in capsys.readouterr().out
    finer = tmp_path / "finer"
    assert run([*words, "--spacing", "4,4.5,5", "-o", str(finer)]) == 0
    assert read_labels(finer / "0000" / "labels.nii.gz").shape == (64, 32, 32)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--anatomy-size", "liver=2"], "0 to 1"),
        (["--region", "knee"], "Unknown region"),
        (["--solver", "euler"], "no solver for ddpm"),
        (["--first", "-1"], "numbered from 0"),
    ],
)
def test_refusals(
    folder: Path, words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["mask", "generate", "--model", str(folder), *words, "-o", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_map_that_would_be_too_large_is_refused_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("maisi.generation.mask_generator.MAX_VOXELS", 64 * 32 * 32)
    words = ["mask", "generate", "--model", str(folder), "-o", str(tmp_path / "out"), "--spacing"]
    assert run([*words, "0.3,0.3,0.3"]) == 2
    assert "million; give a coarser spacing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*words, "4,4.5,5"]) == 0


def test_a_model_without_mask_networks_makes_none(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["mask", "generate", "--model", str(model_folder), "--region", "chest", "-o", str(tmp_path / "out")]
    assert run(words) == 2
    assert "makes no label maps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_notes_say_what_the_network_does_not_know(folder: Path) -> None:
    model = find_model(folder)
    assert make_order(Request.parse(region="abdomen"), {}, model).notes == ()
    assert "knows abdomen, chest" in make_order(Request.parse(region="head"), {}, model).notes[0]


def test_assembling_wants_both_networks_and_the_right_ones(networks: dict[str, Path], tmp_path: Path) -> None:
    for change, match in (
        ({"mask_unet": None}, "or neither"),
        ({"mask_unet": networks["unet"]}, "network of images"),
        ({"mask_autoencoder": networks["autoencoder"]}, "autoencoder of images"),
        ({"mask_autoencoder": networks["mask_unet"]}, "not autoencoder"),
    ):
        files = {part: path for part, path in (networks | change).items() if path is not None}
        with pytest.raises(MaisiError, match=match):
            assemble(files, tmp_path / "made", "made")  # type: ignore[arg-type]
    assert not (tmp_path / "made").exists()


def test_assembled_by_command(networks: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    options = [word for part, path in networks.items() for word in (f"--{part.replace('_', '-')}", str(path))]
    assert run(["weights", "assemble", *options, "--name", "x", "--storage", "float16", "-o", str(tmp_path / "x")]) == 0
    masks = find_model(tmp_path / "x").config.masks
    assert masks is not None
    assert masks == find_model(folder).config.masks
    assert (masks.scale_factor, masks.process["kind"], masks.default_steps) == (0.9, "ddpm", 50)
    assert maps(tmp_path / "x", range(1))[0].shape == SIZE


def test_painted() -> None:
    assert painted(np.array([0, 28, 200, 1, 33], np.uint8)).tolist() == [-1000, -850, -60, 50, 500]
