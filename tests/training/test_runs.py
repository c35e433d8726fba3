"""The printed examples are complete and valid; faults in a run file are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from maisi.cli import run
from maisi.config import read_yaml
from maisi.data.views import TumorViews, ViewConfig
from maisi.errors import MaisiError
from maisi.generation.latent_views import ViewsFile
from maisi.training.autoencoder import AutoencoderRun
from maisi.training.runs import STAGES, example_yaml, run_stage


@pytest.mark.parametrize("stage", STAGES)
def test_example_is_valid_and_names_every_setting(stage: str, tmp_path: Path) -> None:
    text = example_yaml(stage)
    values = yaml.safe_load(text)
    assert values["loop"]["steps"] == 10000
    assert text.count("#") > 10
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(MaisiError, match=r"names what does not exist|name a prepared folder"):
        run_stage(stage, path, tmp_path / "out")


def test_example_shows_the_defaults() -> None:
    values = yaml.safe_load(example_yaml("autoencoder"))
    defaults = AutoencoderRun.model_validate({"data": "prepared", "loop": {"steps": 10000}})
    assert AutoencoderRun.model_validate(values) == defaults


def test_unknown_key_gets_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: x\nloop: {stepz: 4}\n")
    with pytest.raises(MaisiError, match=r"unknown key 'loop.stepz' \(did you mean 'steps'\?\)"):
        run_stage("autoencoder", path, tmp_path / "out")


def test_unknown_stage_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(MaisiError, match="autoencoder, diffusion, controlnet, mask-autoencoder, mask-diffusion"):
        run_stage("vae", tmp_path / "run.yaml", tmp_path / "out")


def test_the_example_of_views_is_whole_and_valid(tmp_path: Path, capsys) -> None:
    assert run(["prepare", "--example"]) == 0
    path = tmp_path / "views.yaml"
    path.write_text(capsys.readouterr().out)
    (kind,) = read_yaml(ViewsFile, path).views
    named = yaml.safe_load(path.read_text())["views"][0]
    assert set(named) == set(ViewConfig.model_fields)
    assert set(named["tumors"]) == set(TumorViews.model_fields)
    assert kind.tumors == TumorViews()
