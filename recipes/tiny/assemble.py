"""Put trained networks together as a model folder.

    python recipes/tiny/assemble.py AUTOENCODER UNET CONTROLNET|- FOLDER [NAME]

Weights are stored as float16, half the size; `evaluate.py` measures the stored model, so its numbers include that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from maisi.networks.autoencoder import Autoencoder
from maisi.networks.unet import UNet
from maisi.weights.load import load_network, read_header, save_network, sha256
from maisi.weights.registry import ModelConfig

VIEWS = (
    {"regions": ["head-neck"], "size": [112, 80, 80], "spacing_mm": [4.4, 4.4, 4.4], "share": 0.6},
    {"regions": ["chest"], "size": [128, 96, 64], "spacing_mm": [3.0, 3.0, 3.0], "share": 0.15},
    {"regions": ["chest", "abdomen"], "size": [128, 128, 128], "spacing_mm": [3.0, 3.0, 3.0], "share": 0.15},
    {"regions": ["abdomen"], "size": [128, 96, 64], "spacing_mm": [3.0, 3.0, 3.0], "share": 0.05},
    {"regions": ["head-neck", "chest"], "size": [112, 80, 80], "spacing_mm": [4.4, 4.4, 4.4], "share": 0.05},
)
"""Kinds of volumes the networks were trained on; see latents.yaml."""


def main(autoencoder: Path, unet: Path, controlnet: Path | None, folder: Path, name: str = "tiny") -> None:
    """Write weights, hashes and `model.json`; the model card is written by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"autoencoder": autoencoder, "unet": unet} | ({} if controlnet is None else {"controlnet": controlnet})
    hashes = {}
    for part, source in sources.items():
        header = read_header(source)
        kept = {k: v for k, v in header.metadata.items() if k in ("maisi.scale_factor", "maisi.process")}
        path = folder / f"{part}.safetensors"
        save_network(path, load_network(source), metadata=kept, dtype=torch.float16)
        hashes[path.name] = sha256(path)
    header = read_header(unet)
    image, denoiser = load_network(autoencoder), load_network(unet)
    assert isinstance(image, Autoencoder)
    assert isinstance(denoiser, UNet)
    config = ModelConfig.model_validate(
        {
            "name": name,
            **{part: f"{part}.safetensors" for part in sources},
            "scale_factor": float(header.metadata["maisi.scale_factor"]),
            "process": json.loads(header.metadata["maisi.process"]),
            "sha256": hashes,
            "size_multiple": image.config.compression * denoiser.config.size_multiple,
            "field_of_view": VIEWS,
            "default_steps": 20,
            "solver": "euler",
        }
    )
    (folder / "model.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    size = sum((folder / file).stat().st_size for file in hashes)
    print(f"{folder}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    first, second, third, place, *rest = sys.argv[1:]
    main(Path(first), Path(second), None if third == "-" else Path(third), Path(place), *rest)
