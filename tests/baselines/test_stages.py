"""Both baselines from settings to volumes: they resume to the bit, learn, and make each item by its number alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml

from maisi.baselines.ddpm import DdpmRun, DdpmStage
from maisi.baselines.hagan import HaganRun, HaganStage, Stretch, small_of
from maisi.baselines.methods import METHODS, Baseline, example_yaml, method, train
from maisi.baselines.trained import FILE, save_trained
from maisi.cli import run as maisi
from maisi.errors import MaisiError
from maisi.evaluation.volumes import find_entries
from maisi.request import item_seed
from maisi.training.loop import run
from maisi.training.state import load_checkpoint, newest_checkpoint


def trained(name: str, config: Any, folder: Path, steps: int = 4) -> dict[str, torch.Tensor]:
    """Train up to `steps` of a schedule of 4, by an interrupt where that is sooner; return all that is remembered."""
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # the global generator must not matter
    stage: Any = method(name).stage(config)
    plain = stage.update

    def update(batch: Any, step: int) -> Any:
        if step + 1 == steps < 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(batch, step)

    stage.update = update
    if steps < 4:
        with pytest.raises(KeyboardInterrupt):
            run(stage, config.loop, config, folder)
    else:
        assert run(stage, config.loop, config, folder) == steps
    path = newest_checkpoint(folder / "checkpoints")
    assert path is not None
    return dict(load_checkpoint(path).tensors)


@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config = request.getfixturevalue(f"{name}_run")
    whole = trained(name, config, tmp_path / "whole")
    part = trained(name, config, tmp_path / "parts", 3)
    resumed = trained(name, config, tmp_path / "parts")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert any(not torch.equal(whole[key], part[key]) for key in whole)
    assert (tmp_path / "whole" / FILE).read_bytes() == (tmp_path / "parts" / FILE).read_bytes()
    assert list((tmp_path / "whole" / "pictures").glob("sample-*.png"))


@pytest.mark.parametrize("name", METHODS)
def test_from_settings_to_volumes(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """By the command line; item 1 of two has the bytes of item 1 made alone, and the evaluation finds both."""
    path, folder = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(request.getfixturevalue(f"{name}_values")))
    assert maisi(["baseline", "train", name, str(path), "-o", str(folder)]) == 0
    how = ["--seed", "5", "--device", "cpu", "--precision", "fp32", *(["--steps", "2"] if name == "ddpm" else [])]
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert maisi(["baseline", "generate", str(folder), "-n", "2", *how, "-o", str(both)]) == 0
    assert maisi(["baseline", "generate", str(folder), "--first", "1", *how, "-o", str(alone)]) == 0
    images = [nibabel.load(f / "image.nii.gz") for f in (both / "0000", both / "0001", alone / "0001")]
    zero, one, again = (np.asarray(image.dataobj) for image in images)
    assert one.dtype == np.int16
    assert one.shape == (16, 16, 32)
    np.testing.assert_array_equal(one, again)
    assert (zero != one).any()
    assert images[0].header.get_zooms() == (8.0, 8.0, 8.0)
    record = json.loads((both / "0000" / "record.json").read_text())
    assert (record["synthetic"], record["baseline"], record["seed"]) == (True, name, item_seed(5, 0))
    assert (both / "0000" / "preview.png").is_file()
    assert [entry.name for entry in find_entries([both]).entries] == ["0000", "0001"]


def test_ddpm_learns_to_see_the_noise(ddpm_values: dict[str, Any]) -> None:
    """On held-out images of balls the noise is told apart better than by the best constant, its mean (L1 0.798)."""
    values = ddpm_values | {"loop": ddpm_values["loop"] | {"steps": 40}, "validation_batches": 4}
    stage = DdpmStage(DdpmRun.model_validate(values))
    assert stage.validate(0)[0]["loss"] == pytest.approx(np.sqrt(2 / np.pi), abs=0.01)  # it starts at zero
    for step in range(40):
        stage.update(stage.batch(step), step)
    assert stage.validate(40)[0]["loss"] < 0.5


def test_hagan_finds_the_way_back(hagan_values: dict[str, Any]) -> None:
    """The reconstruction of held-out images falls, both ways."""
    values = hagan_values | {"loop": hagan_values["loop"] | {"steps": 60}, "reconstruction_weight": 5.0}
    values |= {"optimizer": {"learning_rate": 2e-3, "betas": [0.0, 0.999], "ema_decay": 0.9}}
    stage = HaganStage(HaganRun.model_validate(values))
    before = stage.validate(0)[0]
    for step in range(60):
        stage.update(stage.batch(step), step)
    after = stage.validate(60)[0]
    air = float((stage.held_out.batch(0, 2) + 1).abs().mean())  # error of the best constant
    assert all(after[name] < 0.6 * min(air, before[name]) for name in after)


def test_generators_listen_to_reconstruction_only_if_asked(hagan_run: HaganRun) -> None:
    """With no word from the discriminators, they move by the reconstruction or not at all."""
    for weight in (0.0, 1.0):
        stage = HaganStage(hagan_run.model_copy(update={"adversarial_weight": 0.0, "reconstruction_weight": weight}))
        before = {name: value.clone() for name, value in stage.generator.state_dict().items()}
        stage.update(stage.batch(0), 0)
        after = stage.generator.state_dict()
        assert any(not torch.equal(after[name], before[name]) for name in before) == (weight > 0)


def test_discriminators_learn_to_tell(hagan_run: HaganRun) -> None:
    """Against generators that stand still their loss falls below that of a coin, 2 log 2."""
    still = hagan_run.optimizer.model_copy(update={"learning_rate": 1e-12})
    stage = HaganStage(hagan_run.model_copy(update={"optimizer": still}))
    losses = [stage.update(stage.batch(step), step)["critic"] for step in range(25)]
    assert losses[0] == pytest.approx(2 * np.log(2), abs=0.3)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


def test_a_stretch_of_image_and_features_is_the_same_place() -> None:
    image = torch.arange(24.0).expand(1, 1, 4, 4, 24)
    stretch = Stretch(first=2, rows=3, all_rows=6)
    assert stretch.of_image(image)[0, 0, 0, 0].tolist() == list(range(8, 20))
    torch.testing.assert_close(small_of(stretch.of_image(image)), stretch.of_features(small_of(image)))
    assert [Stretch(k, 3, 6).place for k in (0, 3)] == [0, 1]
    assert Stretch(0, 6, 6).place == 0


@pytest.mark.parametrize("name", METHODS)
def test_example_is_valid_and_complete(name: str) -> None:
    values = yaml.safe_load(example_yaml(name))
    assert method(name).run.model_validate(values)
    assert set(values) == set(method(name).run.model_fields)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("ddpm", {"grid": {"size": [16, 16, 15]}}, "multiples of 2"),
        ("ddpm", {"model": {"in_channels": 4}}, "must be 1"),
        ("ddpm", {"model": {"in_channels": 1, "out_channels": 1, "region_input": True}}, "no conditions"),
        ("ddpm", {"batchsize": 2}, r"unknown key 'batchsize' \(did you mean 'batch_size'\?\)"),
        ("ddpm", {"process": {"kind": "rectified_flow"}}, "process.kind"),
        ("hagan", {"grid": {"size": [16, 16, 40]}}, r"multiple of model.stretch \(16\)"),
        ("hagan", {"grid": {"size": [16, 12, 32]}}, "multiples of 8"),
        ("hagan", {"optimizer": {"accumulate": 2}}, "accumulate"),
        ("hagan", {"data": "absent"}, "does not exist"),
    ],
)
def test_bad_settings_are_a_sentence(
    name: str, change: dict[str, Any], match: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(request.getfixturevalue(f"{name}_values") | change))
    with pytest.raises(MaisiError, match=match):
        train(name, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_at_the_door(
    ddpm_run: DdpmRun, hagan_run: HaganRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "ddpm").mkdir()
    (tmp_path / "hagan").mkdir()
    save_trained(tmp_path / "ddpm", "ddpm", {}, ddpm_run)
    save_trained(tmp_path / "hagan", "hagan", {}, hagan_run)
    for words, sentence in (
        (["train", "gan", "run.yaml"], "There is no baseline 'gan'"),
        (["train", "ddpm"], "The run's settings are missing"),
        (["generate", str(tmp_path), "-o", out], f"holds no {FILE}"),
        (["generate", str(tmp_path / "ddpm"), "--steps", "2000", "-o", out], "2000"),
        (["generate", str(tmp_path / "ddpm"), "--solver", "euler", "-o", out], "'euler' is no solver for DDPM"),
        (["generate", str(tmp_path / "hagan"), "--steps", "5", "-o", out], "in one go"),
        (["generate", str(tmp_path / "hagan"), "--first", "-1", "-o", out], "cannot be number -1"),
    ):
        assert maisi(["baseline", *words]) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.startswith("maisi: ")
    assert not Path(out).exists()
    assert Baseline(tmp_path / "hagan", "cpu").request(1, 2).size == (16, 16, 32)
