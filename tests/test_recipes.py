"""The recipe of the carried model: its case list, its settings, its assembly."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from maisi.baselines.methods import METHODS, method
from maisi.cli import run
from maisi.data.anatomy_sizes import SIZED, TRAINING_KEY, MaskTraining
from maisi.data.manifest import read_cases
from maisi.data.mask_codes import METADATA_KEY, MaskCodes
from maisi.data.phantom import phantom
from maisi.data.prepared import PreparedFolder
from maisi.data.quality import carried_ranges
from maisi.errors import MaisiError
from maisi.generation.latent_views import ViewsFile
from maisi.generation.pipeline import load
from maisi.io.nifti import read_label_names, read_labels, write_volume
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig, LatentDistribution
from maisi.networks.unet import UNet, UNetConfig
from maisi.training.runs import _run_class
from maisi.weights.load import load_network, save_network

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RECIPE = RECIPES / "tiny"
NEW_STRUCTURE = RECIPES / "finetune-new-structure"
BASELINES = RECIPES / "baselines"


def script(name: str, folder: Path = RECIPE) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        *((stage, f"tiny/{stage}") for stage in ("autoencoder", "diffusion", "controlnet")),
        ("autoencoder", "tiny/decoder"),
        ("diffusion", "tiny/coarse"),
        *((f"mask-{stage}", f"tiny/mask_{stage}") for stage in ("autoencoder", "diffusion")),
        ("mask-autoencoder", "mask-generator/autoencoder"),
        ("mask-diffusion", "mask-generator/diffusion"),
        ("diffusion", "baselines/ldm"),
    ],
)
def test_settings_are_valid(stage: str, file: str) -> None:
    _run_class(stage).model_validate(yaml.safe_load((RECIPE.parent / f"{file}.yaml").read_text()))


def test_views_suit_the_networks() -> None:
    for file in (
        *(RECIPE / "latents.yaml", RECIPE / "pairs.yaml", NEW_STRUCTURE / "views.yaml"),
        BASELINES / "latents.yaml",
    ):
        kinds = ViewsFile.model_validate(yaml.safe_load(file.read_text())).views
        assert all(n % 16 == 0 for kind in kinds for n in kind.size)


def test_case_list_keeps_a_patient_on_one_side(tmp_path: Path) -> None:
    for name in ("openkbp/pt_1", "openkbp/pt_2", "torso/acrin_flt_001_a", "torso/acrin_flt_001_b", "torso/nlst_149872"):
        for ending in ("_ct.nii.gz", "_labels.nii.gz") if name == "openkbp/pt_1" else ("_ct.nii.gz",):
            path = tmp_path / "data" / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    script("cases").main(tmp_path / "data", tmp_path / "cases.json")
    cases = {case.id: case for case in read_cases(tmp_path / "cases.json").cases}
    assert cases["nlst_149872"].split == "validation"
    assert cases["acrin_flt_001_a"].patient == cases["acrin_flt_001_b"].patient == "acrin_flt_001"
    assert (cases["pt_1"].vocabulary, cases["pt_1"].labels is not None) == ("openkbp", True)
    assert cases["pt_2"].labels is None


def test_assembled_model_generates(model_folder: Path, tmp_path: Path) -> None:
    networks = {part: model_folder / f"{part}.safetensors" for part in ("autoencoder", "controlnet")}
    unet = tmp_path / "unet.safetensors"
    save_network(
        unet,
        load_network(model_folder / "unet.safetensors"),
        metadata={"maisi.scale_factor": "0.5", "maisi.process": '{"kind": "rectified_flow"}'},
    )
    ranges = tmp_path / "ranges.json"
    ranges.write_text(carried_ranges().model_dump_json())
    files = [networks["autoencoder"], unet, networks["controlnet"], *mask_networks(tmp_path)]
    script("assemble").main(files, ranges, None, tmp_path / "without")
    maps = tmp_path / "maps"
    assert run(["mask", "generate", "--steps", "1", "--model", str(tmp_path / "without"), "-o", str(maps)]) == 0
    assert run(["mask", "library", "build", str(maps), "-o", str(tmp_path / "library")]) == 0
    script("assemble").main(files, ranges, tmp_path / "library", tmp_path / "made")
    model = load(tmp_path / "made")
    assert (model.name, model.folder.config.scale_factor, model.folder.config.size_multiple) == ("tiny", 0.5, 16)
    stored = load_network(tmp_path / "made" / "unet.safetensors").state_dict()
    for name, value in load_network(unet).state_dict().items():
        step = value.flatten(1).abs().amax(1) / 127 if value.ndim > 1 else torch.zeros(())
        bound = (0.501 * step).view(-1, *[1] * (value.ndim - 1)) + 1e-3 * value.abs() + 1e-6
        assert ((stored[name] - value).abs() <= bound).all(), name
    item = model.generate(region="chest", size=(32, 32, 32), spacing=(8, 8, 8), steps=1)
    assert item.image.shape == (32, 32, 32)
    assert model.folder.library() == tmp_path / "made" / "label_maps"


def mask_networks(folder: Path) -> list[Path]:
    """Both networks that make label maps, too small to make good ones."""
    codes = MaskCodes((0, 200, 22, 138))
    torch.manual_seed(0)
    sizes = {"channels": (4, 8, 8), "num_res_blocks": (0, 0, 1), "norm_groups": 2, "upsampling": "nearest"}
    autoencoder = Autoencoder(AutoencoderConfig(in_channels=8, out_channels=len(codes.ids), **sizes))
    unet = UNet(
        UNetConfig(
            channels=(4, 8),
            num_res_blocks=(1, 1),
            attention_levels=(False, True),
            head_channels=4,
            norm_groups=2,
            context_channels=len(SIZED),
        )
    )
    training = MaskTraining(size=(32, 32, 32), spacing_mm=(8, 8, 8))
    told = {
        TRAINING_KEY: training.model_dump_json(),
        "maisi.scale_factor": "1",
        "maisi.process": '{"kind": "rectified_flow"}',
    }
    save_network(folder / "a.safetensors", autoencoder, metadata={METADATA_KEY: json.dumps(codes.ids)})
    save_network(folder / "u.safetensors", unet, metadata=told)
    return [folder / "a.safetensors", folder / "u.safetensors"]


def test_a_new_structure_from_masks_to_pairs(model_folder: Path, tmp_path: Path) -> None:
    """Every step of the recipe, on two phantoms and small networks: the class and its name arrive in the pairs."""
    cts, work = tmp_path / "cts", tmp_path / "work"
    cts.mkdir()
    work.mkdir()
    for seed in range(3):
        image, labels = phantom((32, 32, 24), (10.0, 9.0, 10.0), ("abdomen",), seed)
        write_volume(cts / f"p{seed}_ct.nii.gz", image, synthetic=False)
        liver = labels.with_array((labels.array == 1).astype(np.uint8) * 7)
        write_volume(cts / f"p{seed}_labels.nii.gz", liver, synthetic=False)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"7": {"id": 150, "name": "graft"}}))
    script("cases", NEW_STRUCTURE).main(cts, table, work)
    assert run(["prepare", str(work / "cases.json"), "-o", str(work / "prepared")]) == 0
    views = yaml.safe_load((NEW_STRUCTURE / "views.yaml").read_text())["views"][:1]
    views[0] |= {"size": [32, 32, 16], "spacing_mm": [9.0, 10.0], "views": 1}
    (work / "views.yaml").write_text(yaml.safe_dump({"views": views}))
    files = {part: model_folder / f"{part}.safetensors" for part in ("autoencoder", "unet", "controlnet")}
    autoencoder = ["--autoencoder", str(files["autoencoder"])]
    words = ["prepare", str(work / "prepared"), "--views", str(work / "views.yaml"), *autoencoder]
    assert run([*words, "-o", str(work / "latents")]) == 0
    settings = yaml.safe_load((NEW_STRUCTURE / "controlnet.yaml").read_text())
    settings |= {"data": str(work / "latents"), "unet": str(files["unet"]), "init": str(files["controlnet"])}
    settings["loop"] |= {"steps": 1, "precision": "fp32"}
    settings |= {"validation_batches": 1}
    (work / "controlnet.yaml").write_text(yaml.safe_dump(settings))
    assert run(["train", "controlnet", str(work / "controlnet.yaml"), "-o", str(work / "controlnet")]) == 0
    unet = work / "unet.safetensors"
    save_network(unet, load_network(files["unet"]), metadata={"maisi.scale_factor": "0.8"})
    words = ["weights", "assemble", *autoencoder, "--unet", str(unet), "--name", "mine", "-o", str(work / "model")]
    assert run([*words, "--controlnet", str(work / "controlnet" / "controlnet.safetensors")]) == 0
    mask = work / "masks" / "p0.nii.gz"
    words = ["generate", "--model", str(work / "model"), "--mask", str(mask), "--steps", "1", "--retries", "0"]
    assert run([*words, "-o", str(work / "pairs")]) == 0
    written = work / "pairs" / "0000" / "labels.nii.gz"
    assert (read_labels(written).array == 150).any()
    assert read_label_names(written)[150] == "graft"
    with pytest.raises(MaisiError, match="ids without a meaning: 150"):
        load(model_folder).generate(mask=mask)


def test_baselines_see_the_same() -> None:
    """One grid, one number of boxes, and no conditions, for all three; the carried model's grid is among them."""
    ddpm, hagan = (
        method(name).run.model_validate(yaml.safe_load((BASELINES / f"{name}.yaml").read_text())) for name in METHODS
    )
    (view,) = ViewsFile.model_validate(yaml.safe_load((BASELINES / "latents.yaml").read_text())).views
    ldm = _run_class("diffusion").model_validate(yaml.safe_load((BASELINES / "ldm.yaml").read_text()))
    assert ddpm.grid == hagan.grid  # type: ignore[attr-defined]
    grid = ddpm.grid  # type: ignore[attr-defined]
    assert (view.size, view.spacing_mm, view.views, view.mirror) == (
        *(grid.size, (grid.spacing_mm, grid.spacing_mm)),
        *(grid.views, grid.mirror),
    )
    model = ldm.model  # type: ignore[attr-defined]
    assert (model.region_input, model.spacing_input, model.num_modalities) == (False, False, None)


def test_cases_of_the_baselines_are_seen_whole(tmp_path: Path) -> None:
    """Of four cases the one of another region and the narrow one are left out; arrays stay where they are."""
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    rows = []
    for number, (width, region) in enumerate([(50, "head-neck"), (30, "head-neck"), (50, "chest"), (48, "head-neck")]):
        labels = np.zeros((60, 10, 30), np.uint8)
        labels[:width, 2:8, :25] = 200
        for name, array in ((f"p{number}", labels.astype(np.int16)), (f"p{number}-labels", labels)):
            np.save(prepared / f"{name}.npy", array)
        row = {"id": f"p{number}", "patient": f"p{number}", "split": "train", "regions": [region]}
        row |= {"image": f"p{number}.npy", "labels": f"p{number}-labels.npy", "spacing_mm": [9.0, 9.0, 9.0]}
        row |= {"affine": np.diag([9.0, 9.0, 9.0, 1.0]).tolist(), "shape": [60, 10, 30]}
        rows.append(row)
    (prepared / "index.json").write_text(json.dumps({"cases": rows}))
    script("cases", BASELINES).main(prepared, tmp_path / "chosen")
    chosen = PreparedFolder(tmp_path / "chosen")
    assert [case.id for case in chosen.cases("train")] == ["p0", "p3"]
    np.testing.assert_array_equal(chosen.labels(chosen.cases("train")[1]), np.load(prepared / "p3-labels.npy"))


def test_table_of_the_baselines(tmp_path: Path) -> None:
    for name, value in (("ddpm", 22.608), ("ldm", None)):
        (tmp_path / name).mkdir()
        planes = dict.fromkeys(("fid_axial", "fid_sagittal", "fid_coronal"), 1.0)
        summary = planes | {"fid": value, "fid_real_halves": 3.0 if name == "ldm" else None}
        (tmp_path / name / "result.json").write_text(json.dumps({"summary": summary}))
    assert script("table", BASELINES).table(tmp_path).splitlines()[2:] == [
        "| DDPM | 1.00 | 1.00 | 1.00 | 22.61 |",
        "| LDM | 1.00 | 1.00 | 1.00 | - |",
        "| real against real (halves) | - | - | - | 3.00 |",
    ]


def test_the_last_layer_is_found_again(tmp_path: Path) -> None:
    recipe = script("last_layer")
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=(8, 8, 16), num_res_blocks=(1, 1, 1), norm_groups=4, upsampling="transposed")
    network = Autoencoder(config).eval()
    save_network(tmp_path / "true.safetensors", network, storage="float16")
    images = [torch.rand(24, 20, 16) for _ in range(3)]
    true = load_network(tmp_path / "true.safetensors")
    with torch.no_grad():
        asked = [true.decode(true.encode(image[None, None]).mean)[0, 0] for image in images]
        latents = [true.encode(image[None, None]).mean for image in images]
    off = load_network(tmp_path / "true.safetensors")
    last = off.decoder.blocks[-1]
    with torch.no_grad():
        last.weight.mul_(0.9)
        last.bias.add_(0.1)
    known = iter(latents)
    off.encode = lambda _: LatentDistribution(next(known), torch.zeros(1))  # type: ignore[method-assign]
    recipe.fit(off, asked, 1e-6)
    for image, latent in zip(asked, latents, strict=True):
        assert (off.decode(latent)[0, 0] - image).detach().abs().max() < 1e-3
    recipe.store(off, tmp_path / "true.safetensors", tmp_path / "fitted.safetensors")
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("true", "fitted"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    end = f"decoder.blocks.{len(off.decoder.blocks) - 1}"
    assert changed <= {f"{end}.weight", f"{end}.bias"}
    assert all(before[name].dtype == after[name].dtype for name in before)
    with pytest.raises(MaisiError, match="no training case"):
        recipe.fit(off, [], 0.01)
