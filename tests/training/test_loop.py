"""Resumed = uninterrupted, to the bit, for every stage; what is refused; what an interrupt leaves."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maisi.errors import MaisiError
from maisi.io.files import locked
from maisi.training.autoencoder import AutoencoderRun, AutoencoderStage
from maisi.training.controlnet import ControlNetRun, ControlNetStage
from maisi.training.diffusion import DiffusionRun, DiffusionStage
from maisi.training.loop import run
from maisi.training.mask_autoencoder import MaskAutoencoderStage
from maisi.training.mask_diffusion import MaskDiffusionStage
from maisi.training.optimizer import MOST_SKIPPED, OptimizerConfig, Trainee
from maisi.training.state import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint


def train(stage_class: Any, config: Any, folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Train up to `steps` of a schedule of 4 and return everything remembered."""
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # the global generator must not matter
    stopped = config.model_copy(update={"loop": config.loop.model_copy(update={"steps": 4})})
    stage = stage_class(stopped)
    if steps < 4:
        plain = stage.update

        def update(batch: Any, step: int) -> Any:
            if step + 1 == steps:
                os.kill(os.getpid(), signal.SIGINT)
            return plain(batch, step)

        stage.update = update
    if steps < 4:
        with pytest.raises(KeyboardInterrupt, match=f"Stopped at step {steps} of 4"):
            run(stage, stopped.loop, stopped, folder)
    else:
        assert run(stage, stopped.loop, stopped, folder) == steps
    path = newest_checkpoint(folder / "checkpoints")
    assert path is not None
    return dict(load_checkpoint(path).tensors)


NAMES = (
    *("autoencoder", "split_autoencoder", "diffusion", "controlnet", "inpainting"),
    *("mask_autoencoder", "mask_diffusion"),
)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    classes = {"autoencoder": AutoencoderStage, "diffusion": DiffusionStage, "split_autoencoder": AutoencoderStage}
    classes |= dict.fromkeys(("controlnet", "inpainting"), ControlNetStage)
    classes |= {"mask_autoencoder": MaskAutoencoderStage, "mask_diffusion": MaskDiffusionStage}
    config = request.getfixturevalue(f"{name}_run")
    whole = train(classes[name], config, tmp_path / "whole", 4)
    part = train(classes[name], config, tmp_path / "parts", 3)
    resumed = train(classes[name], config, tmp_path / "parts", 4)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert any(not torch.equal(whole[key], part[key]) for key in whole)
    exported = {"diffusion": "unet", "inpainting": "controlnet", "mask_diffusion": "mask_unet"}.get(name, name)
    exported = exported.removeprefix("split_")
    assert (tmp_path / "whole" / f"{exported}.safetensors").is_file()


def test_resuming_with_other_settings_is_refused(diffusion_run: DiffusionRun, tmp_path: Path) -> None:
    run(DiffusionStage(diffusion_run), diffusion_run.loop, diffusion_run, tmp_path)
    other = diffusion_run.model_copy(
        update={"optimizer": diffusion_run.optimizer.model_copy(update={"learning_rate": 5e-3})}
    )
    with pytest.raises(MaisiError, match=r"other settings \(optimizer.learning_rate\)"):
        run(DiffusionStage(other), other.loop, other, tmp_path)


def test_a_run_keeps_its_seed_and_may_take_longer(diffusion_run: DiffusionRun, tmp_path: Path) -> None:
    run(DiffusionStage(diffusion_run), diffusion_run.loop, diffusion_run, tmp_path)
    seed, steps = diffusion_run.loop.seed + 1, diffusion_run.loop.steps + 1
    for update in ({"seed": seed}, {"seed": seed, "steps": steps}):
        other = diffusion_run.model_copy(update={"loop": diffusion_run.loop.model_copy(update=update)})
        with pytest.raises(MaisiError, match=r"other settings \(loop.seed\)"):
            run(DiffusionStage(other), other.loop, other, tmp_path)
    longer = diffusion_run.model_copy(update={"loop": diffusion_run.loop.model_copy(update={"steps": steps})})
    assert run(DiffusionStage(longer), longer.loop, longer, tmp_path) == steps


def test_run_folder_tells_the_run(autoencoder_run: AutoencoderRun, tmp_path: Path) -> None:
    run(AutoencoderStage(autoencoder_run), autoencoder_run.loop, autoencoder_run, tmp_path)
    assert AutoencoderRun.model_validate_json((tmp_path / "run.json").read_text()) == autoencoder_run
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["group"] == "train"] == [1, 2, 3, 4]
    assert {"psnr", "mae_hu"} <= rows[-1].keys()
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) == 2
    assert list((tmp_path / "tensorboard").iterdir())


def test_damaged_checkpoint_is_named(diffusion_run: DiffusionRun, tmp_path: Path) -> None:
    run(DiffusionStage(diffusion_run), diffusion_run.loop, diffusion_run, tmp_path)
    path = newest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MaisiError, match="damaged"):
        run(DiffusionStage(diffusion_run), diffusion_run.loop, diffusion_run, tmp_path)


def test_time_limit_stops_with_a_checkpoint(diffusion_run: DiffusionRun, tmp_path: Path) -> None:
    short = diffusion_run.model_copy(update={"loop": diffusion_run.loop.model_copy(update={"minutes": 1e-6})})
    assert run(DiffusionStage(short), short.loop, short, tmp_path) == 1
    assert newest_checkpoint(tmp_path / "checkpoints") is not None


def test_a_failing_step_leaves_the_last_checkpoint_whole(diffusion_run: DiffusionRun, tmp_path: Path) -> None:
    stage = DiffusionStage(diffusion_run)
    plain = stage.update

    def update(batch: Any, step: int) -> Any:
        if step == 3:
            raise RuntimeError("broken")
        return plain(batch, step)

    stage.update = update  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        run(stage, diffusion_run.loop, diffusion_run, tmp_path)
    path = newest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    assert load_checkpoint(path).facts["step"] == 2


def test_training_lowers_the_loss(autoencoder_run: AutoencoderRun) -> None:
    quick = autoencoder_run.model_copy(
        update={
            "losses": autoencoder_run.losses.model_copy(update={"adversarial": 0.0, "perceptual": 0.0}),
            "optimizer": autoencoder_run.optimizer.model_copy(update={"learning_rate": 1e-2, "accumulate": 1}),
        }
    )
    stage = AutoencoderStage(quick)
    losses = [stage.update(stage.batch(step), step)["l1"] for step in range(40)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_inpainting_paints_a_region_of_some_items_and_all_of_the_others(inpainting_run: ControlNetRun) -> None:
    stage = ControlNetStage(inpainting_run)
    shares = [float(region.float().mean()) for step in range(12) for region in stage.batch(step)[0].region]
    whole = sum(share == 1 for share in shares)
    assert 4 <= whole <= 20
    assert all(0 < share <= 1 for share in shares)
    assert stage.network.config.image_channels == 2


def test_inpainting_needs_the_images(controlnet_run: ControlNetRun) -> None:
    stage = ControlNetStage(controlnet_run.model_copy(update={"inpainting": 0.5}))
    with pytest.raises(MaisiError, match="keep_image: true"):
        stage.batch(0)


def test_latents_of_a_controlnet_are_scaled_as_its_unet_knows_them(
    controlnet_run: ControlNetRun, diffusion_run: DiffusionRun, tmp_path: Path
) -> None:
    run(DiffusionStage(diffusion_run), diffusion_run.loop, diffusion_run, tmp_path / "unet")
    told = controlnet_run.model_copy(update={"unet": tmp_path / "unet" / "unet.safetensors"})
    ours, own = ControlNetStage(told).source, ControlNetStage(controlnet_run).source
    assert own.scale_factor == own.folder.scale_factor
    assert ours.scale_factor == DiffusionStage(diffusion_run).source.scale_factor
    assert torch.allclose(ours.batch(1).z / ours.scale_factor, own.batch(1).z / own.scale_factor)


def test_controlnet_leaves_the_unet_alone(controlnet_run: ControlNetRun) -> None:
    stage = ControlNetStage(controlnet_run)
    before = {name: value.clone() for name, value in stage.unet.state_dict().items()}
    for step in range(2):
        metrics = stage.update(stage.batch(step), step)
    assert "contrastive" in metrics
    assert all(torch.equal(value, before[name]) for name, value in stage.unet.state_dict().items())


def test_a_controlnet_learns_from_what_it_will_be_told(controlnet_run: ControlNetRun, tmp_path: Path) -> None:
    grouped = controlnet_run.model_copy(update={"told_as": {1: (26,)}})  # told its tumours as the liver
    stage = ControlNetStage(grouped)
    batch = stage.batch(0)[0]
    assert batch.labels is not None
    assert (batch.labels == 26).any()
    liver = replace(batch, labels=torch.where(batch.labels == 26, 1, batch.labels))
    for parameter in stage.network.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    times = torch.full((len(batch.z),), 500.0)
    told = stage.predict(stage.network, batch.z, times, batch)
    assert torch.equal(told, stage.predict(stage.network, batch.z, times, liver))
    plain = ControlNetStage(controlnet_run)
    plain.network.load_state_dict(stage.network.state_dict())
    assert not torch.equal(told, plain.predict(plain.network, batch.z, times, batch))
    run(stage, grouped.loop, grouped, tmp_path)
    goes_on = ControlNetStage(controlnet_run.model_copy(update={"init": tmp_path / "controlnet.safetensors"}))
    assert goes_on.network.config.told_as == {1: (26,)}


def test_a_decoder_trained_alone_keeps_latents_valid(autoencoder_run: AutoencoderRun) -> None:
    losses = autoencoder_run.losses.model_copy(update={"equivariance": 0.5, "adversarial": 0.0})
    stage = AutoencoderStage(autoencoder_run.model_copy(update={"decoder_only": True, "losses": losses}))
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    for step in range(3):
        stage.update(stage.batch(step), step)
    changed = {name for name, value in stage.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_equivariance_compares_at_half_the_size(autoencoder_run: AutoencoderRun, monkeypatch: Any) -> None:
    always = autoencoder_run.losses.model_copy(update={"equivariance": 1.0, "adversarial": 0.0})
    stage = AutoencoderStage(autoencoder_run.model_copy(update={"losses": always}))
    sizes = []
    decode = stage.model.decode
    monkeypatch.setattr(stage.model, "decode", lambda z: sizes.append(z.shape[2:]) or decode(z))
    batch = stage.batch(0)
    stage.update(batch, 0)
    factor = 2 * stage.model.config.compression
    assert set(sizes) == {torch.Size(n // factor for n in batch[0].shape[2:])}


def test_two_trainings_do_not_write_to_one_folder(diffusion_run: DiffusionRun, tmp_path: Path) -> None:
    with locked(tmp_path, "busy"), pytest.raises(MaisiError, match="Another training is writing to"):
        run(DiffusionStage(diffusion_run), diffusion_run.loop, diffusion_run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_training_left_half_written_goes(diffusion_run: DiffusionRun, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000002.safetensors.part-abc").write_bytes(b"half")
    train(DiffusionStage, diffusion_run, tmp_path, 4)
    assert not list((tmp_path / "checkpoints").glob("*.part-*"))


def test_gradients_that_stay_no_numbers_end_the_training(diffusion_run: DiffusionRun) -> None:
    trainee = Trainee("unet", torch.nn.Linear(2, 2), diffusion_run.optimizer, 1000)

    def step(number: int, loss: float) -> None:
        (trainee.module(torch.ones(1, 2)).sum() * loss).backward()
        trainee.apply(number)

    nan = float("nan")
    for number in range(2 * MOST_SKIPPED):
        step(number, 1.0 if number % 9 == 0 else nan)  # a bad batch now and then is skipped
    for number in range(MOST_SKIPPED - 1):
        step(number, nan)
    with pytest.raises(MaisiError, match=f"{MOST_SKIPPED} steps in a row are not finite"):
        step(MOST_SKIPPED, nan)


def test_a_full_disk_while_a_checkpoint_is_written_is_one_sentence(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(MaisiError, match=r"Cannot write .*: File too large; choose a disk"):
            save_checkpoint(tmp_path, 3, Checkpoint({"a": torch.zeros(10_000)}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_the_optimizers_state_keeps_the_layout_of_the_weights(kind: Any) -> None:
    def trained() -> Trainee:
        torch.manual_seed(0)
        net = torch.nn.Conv3d(4, 8, 3).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return Trainee("net", net, OptimizerConfig(kind=kind), 10)

    first, second = trained(), trained()
    first.module(torch.ones(1, 4, 3, 3, 3)).sum().backward()
    first.apply(0)
    second.restore({name: tensor.contiguous().clone() for name, tensor in first.tensors().items()})
    for weight, fields in second.optimizer.state.items():
        for value in fields.values():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                assert value.stride() == weight.stride()
