"""The recipe of the carried model: its case list, its settings, its assembly."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from maisi.data.manifest import read_cases
from maisi.generation.latent_views import ViewsFile
from maisi.generation.pipeline import load
from maisi.training.runs import _run_class
from maisi.weights.load import load_network, save_network

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "tiny"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPE / f"{name}.py")
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
        ("mask-autoencoder", "mask-generator/autoencoder"),
        ("mask-diffusion", "mask-generator/diffusion"),
    ],
)
def test_settings_are_valid(stage: str, file: str) -> None:
    _run_class(stage).model_validate(yaml.safe_load((RECIPE.parent / f"{file}.yaml").read_text()))


def test_views_suit_the_networks() -> None:
    kinds = ViewsFile.model_validate(yaml.safe_load((RECIPE / "latents.yaml").read_text())).views
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
    script("assemble").main(networks["autoencoder"], unet, networks["controlnet"], tmp_path / "made")
    model = load(tmp_path / "made")
    assert (model.name, model.folder.config.scale_factor, model.folder.config.size_multiple) == ("tiny", 0.5, 16)
    stored = load_network(tmp_path / "made" / "unet.safetensors").state_dict()
    for name, value in load_network(unet).state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=1e-3, atol=1e-6)
    item = model.generate(region="chest", size=(32, 32, 32), spacing=(8, 8, 8), steps=1)
    assert item.image.shape == (32, 32, 32)
