"""A model of the real kind, with random weights and few channels: every path in seconds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from maisi.volume import Volume

# workers that run beside each other share the cores, and so do the commands that they start
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
torch = pytest.importorskip("torch")


@pytest.fixture
def real_data() -> Path:
    """The folder of real CT that MAISI_DATA names; tests that need it are skipped, and say so, where there is none."""
    if not os.environ.get("MAISI_DATA"):
        pytest.skip("MAISI_DATA does not name the folder of real CT")
    return Path(os.environ["MAISI_DATA"])


def _shaken(module, seed):
    """Give every parameter a value: layers that start at zero would hide what is behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


def build_model(folder: Path, name: str = "small", controlnet: bool = True) -> Path:
    """Write a model folder: channels 8, regions, spacing and modality as inputs, rectified flow."""
    from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
    from maisi.networks.controlnet import ControlNet, ControlNetConfig
    from maisi.networks.unet import UNet, UNetConfig
    from maisi.weights.load import save_network, sha256

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    trunk = {"channels": (8, 8, 8), "num_res_blocks": (1, 1, 1), "attention_levels": (False, False, True)}
    trunk |= {"head_channels": 8, "norm_groups": 4, "num_modalities": 128}
    code = AutoencoderConfig(channels=(8, 8, 8), num_res_blocks=(1, 1, 1), norm_groups=4, upsampling="nearest")
    unet = _shaken(UNet(UNetConfig(**trunk, region_input=True, spacing_input=True)), 1)
    files = {"autoencoder": _shaken(Autoencoder(code), 2), "unet": unet}
    if controlnet:
        files["controlnet"] = _shaken(ControlNet(ControlNetConfig(**trunk)), 3)
    for part, module in files.items():
        save_network(folder / f"{part}.safetensors", module)
    values = {
        "name": name,
        **{part: f"{part}.safetensors" for part in files},
        "scale_factor": 0.8,
        "process": {"kind": "rectified_flow"},
        "sha256": {f"{part}.safetensors": sha256(folder / f"{part}.safetensors") for part in files},
        "size_multiple": 16,
        "field_of_view": [
            {"regions": ["head-neck"], "size": [32, 32, 32], "spacing_mm": [8, 8, 8], "share": 0.4},
            {"regions": ["chest"], "size": [48, 32, 32], "spacing_mm": [8, 8, 8], "share": 0.6},
        ],
        "default_steps": 2,
        "solver": "euler",
    }
    (folder / "model.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def model(model_folder):
    from maisi.generation.pipeline import load

    return load(model_folder, device="cpu", precision="fp32")


@pytest.fixture
def chest_labels() -> Volume:
    """A chest as boxes, with a tumour in the left upper lobe; no axis alike, stored as LPS."""
    array = np.zeros((34, 26, 20), np.uint8)
    array[2:-2, 2:-2, :] = 200
    array[5:15, 6:20, 2:18] = 28
    array[20:30, 6:20, 2:18] = 32
    array[8:12, 10:14, 6:10] = 23
    affine = np.diag([-8.0, -9.0, 10.0, 1.0])
    affine[:3, 3] = (130, 120, -50)
    return Volume(array, affine)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Stand-ins for published feature networks (`published.FILES`) by name, through the converter; each made once."""
    from published import FILES

    from maisi.weights.convert import convert

    folder = tmp_path_factory.mktemp("published")

    def make(name: str) -> Path:
        out = folder / f"{name}.safetensors"
        if not out.exists():
            kind, variant = name.split()
            torch.save(FILES[name](), folder / "theirs.pt")
            if kind == "trunk":
                torch.save(FILES[f"heads {variant}"](), folder / "heads.pt")
            convert(folder / "theirs.pt", out, heads=folder / "heads.pt" if kind == "trunk" else None)
            (folder / "theirs.pt").unlink()
        return out

    yield make
    shutil.rmtree(folder)  # half a gigabyte
