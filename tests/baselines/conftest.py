"""A prepared folder of three bodies made of balls, and small runs on it: every path runs its real code in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maisi.baselines.ddpm import DdpmRun
from maisi.baselines.hagan import HaganRun
from maisi.data.prepared import PreparedCase, PreparedIndex
from maisi.io.files import INDEX, write_json

LOOP = {"steps": 4, "seed": 3, "log_every": 1, "validate_every": 2, "checkpoint_every": 2, "device": "cpu"}
GRID = {"size": [16, 16, 32], "spacing_mm": 8.0, "views": 2, "mirror": True}
UNET = {"in_channels": 1, "out_channels": 1, "channels": [8, 16], "num_res_blocks": [1, 1], "norm_groups": 4}
UNET |= {"attention_levels": [False, False], "head_channels": 8}
HAGAN = {"latent": 8, "trunk": [16, 8], "high": [8, 8], "critic": [4, 8, 16], "stretch": 16, "norm_groups": 4}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Balls of water in air, 4 mm voxels; the third is held out."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = []
    x, y, z = np.ogrid[:30, :34, :60]
    for number in range(3):
        ball = (x - 15) ** 2 + (y - 17) ** 2 + ((z - 30) / 2) ** 2 < (10 + number) ** 2
        np.save(folder / f"p{number}.npy", np.where(ball, 40, -1000).astype(np.int16))
        rows.append(
            PreparedCase(
                id=f"p{number}",
                patient=f"p{number}",
                split="validation" if number == 2 else "train",
                image=f"p{number}.npy",
                affine=((4, 0, 0, 0), (0, 4, 0, 0), (0, 0, 4, 0), (0, 0, 0, 1)),
                spacing_mm=(4, 4, 4),
                shape=(30, 34, 60),
                regions=("head-neck",),
            )
        )
    write_json(folder / INDEX, PreparedIndex(cases=tuple(rows)).model_dump(mode="json"))
    return folder


@pytest.fixture
def ddpm_values(prepared: Path) -> dict[str, Any]:
    """Settings as YAML has them."""
    values: dict[str, Any] = {"data": str(prepared), "loop": LOOP, "grid": GRID, "model": UNET, "batch_size": 2}
    return values | {"optimizer": {"learning_rate": 2e-3}, "validation_batches": 2, "sample_steps": 2}


@pytest.fixture
def hagan_values(prepared: Path) -> dict[str, Any]:
    """Settings as YAML has them."""
    values: dict[str, Any] = {"data": str(prepared), "loop": LOOP, "grid": GRID, "model": HAGAN, "batch_size": 2}
    return values | {"encoder_optimizer": {"learning_rate": 3e-3, "betas": [0.0, 0.999]}, "validation_batches": 2}


@pytest.fixture
def ddpm_run(ddpm_values: dict[str, Any]) -> DdpmRun:
    """A few steps of DDPM."""
    return DdpmRun.model_validate(ddpm_values)


@pytest.fixture
def hagan_run(hagan_values: dict[str, Any]) -> HaganRun:
    """A few steps of HA-GAN."""
    return HaganRun.model_validate(hagan_values)
