"""Settings, weights and data that do not belong together are refused when a stage starts, in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maisi.data.prepared import PreparedFolder
from maisi.data.views import ViewConfig, cache_latents
from maisi.diffusion.ddpm import DDPM
from maisi.diffusion.rectified_flow import RectifiedFlow
from maisi.errors import MaisiError
from maisi.io.files import INDEX, write_json
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.training.autoencoder import AutoencoderRun, AutoencoderStage
from maisi.training.controlnet import ControlNetRun, ControlNetStage
from maisi.training.denoising import _decode
from maisi.training.diffusion import DiffusionRun, DiffusionStage
from maisi.training.loop import run
from maisi.training.mask_autoencoder import MaskAutoencoderRun, MaskAutoencoderStage
from maisi.weights.load import load_network, save_network


def stored_again(path: Path, folder: Path, **metadata: str) -> Path:
    """The network of a file in another one that says more of itself."""
    again = folder / f"again-{path.name}"
    save_network(again, load_network(path), metadata={f"maisi.{name}": text for name, text in metadata.items()})
    return again


@pytest.mark.parametrize("known", [DDPM(), RectifiedFlow(base_voxels=1024), RectifiedFlow(num_train_timesteps=500)])
def test_a_controlnet_learns_its_unets_process(controlnet_run: ControlNetRun, tmp_path: Path, known: Any) -> None:
    unet = stored_again(controlnet_run.unet, tmp_path, process=json.dumps(known.config()))
    other = controlnet_run.model_copy(update={"unet": unet})
    with pytest.raises(MaisiError, match="trained with another process") as refused:
        ControlNetStage(other)
    assert json.dumps(known.config()) in str(refused.value)
    ControlNetStage(ControlNetRun(**{**dict(other), "process": known}))


def test_a_controlnet_may_visit_times_otherwise_if_it_says_so(controlnet_run: ControlNetRun, tmp_path: Path) -> None:
    unet = stored_again(controlnet_run.unet, tmp_path, process=json.dumps(RectifiedFlow(base_voxels=1024).config()))
    ControlNetStage(ControlNetRun(**{**dict(controlnet_run), "unet": unet, "process": RectifiedFlow()}))
    with pytest.raises(MaisiError, match="trained with another process"):
        ControlNetStage(ControlNetRun(**{**dict(controlnet_run), "unet": unet, "process": DDPM()}))


def test_a_controlnet_that_starts_from_one_that_inpaints_goes_on(
    inpainting_run: ControlNetRun, controlnet_run: ControlNetRun, tmp_path: Path
) -> None:
    ControlNetStage(inpainting_run).export(tmp_path)
    first = tmp_path / "controlnet.safetensors"
    stage = ControlNetStage(
        controlnet_run.model_copy(update={"init": first, "unet": controlnet_run.unet, "mask_encoder_channels": None})
    )
    assert stage.network.config.image_channels == 2
    assert stage.update(stage.batch(0), 0)["loss"] > 0
    with pytest.raises(MaisiError, match="another mask encoder"):
        ControlNetStage(controlnet_run.model_copy(update={"init": first, "mask_encoder_channels": (8, 8, 8)}))


def test_a_controlnet_of_another_unet_is_refused(controlnet_run: ControlNetRun, tmp_path: Path) -> None:
    ControlNetStage(controlnet_run).export(tmp_path)
    unet = load_network(controlnet_run.unet)
    config: Any = unet.config
    wider = type(unet)(config.model_copy(update={"channels": (16, 16)}))
    save_network(tmp_path / "wider.safetensors", wider)
    change = {"init": tmp_path / "controlnet.safetensors", "unet": tmp_path / "wider.safetensors"}
    with pytest.raises(MaisiError, match=r"not of the same make .*channels"):
        ControlNetStage(controlnet_run.model_copy(update={**change, "mask_encoder_channels": None}))


@pytest.mark.parametrize("change", [{"out_channels": 1}, {"in_channels": 8, "out_channels": 8}])
def test_latents_need_a_network_of_their_channels(diffusion_run: DiffusionRun, change: dict[str, int]) -> None:
    with pytest.raises(MaisiError, match="The latents have 4 channels"):
        DiffusionStage(diffusion_run.model_copy(update={"model": diffusion_run.model.model_copy(update=change)}))


def test_latents_need_to_halve(diffusion_run: DiffusionRun) -> None:
    deep = {"channels": (8, 8, 8, 8), "num_res_blocks": (1,) * 4, "attention_levels": (False,) * 4}
    with pytest.raises(MaisiError, match="do not halve 3 times"):
        DiffusionStage(diffusion_run.model_copy(update={"model": diffusion_run.model.model_copy(update=deep)}))


def test_weights_to_start_from_say_what_the_network_is(diffusion_run: DiffusionRun, unet_file: Path) -> None:
    values = {**dict(diffusion_run), "init": unet_file}
    DiffusionStage(DiffusionRun(**values))  # which names the same
    del values["model"]
    assert DiffusionStage(DiffusionRun(**values)).network.config == diffusion_run.model
    values["model"] = diffusion_run.model.model_copy(update={"channels": (16, 16)})
    with pytest.raises(MaisiError, match="leave 'model' out"):
        DiffusionStage(DiffusionRun(**values))


def test_mask_autoencoders_start_from_their_own_kind(mask_autoencoder_run: MaskAutoencoderRun, tmp_path: Path) -> None:
    MaskAutoencoderStage(mask_autoencoder_run).export(tmp_path)
    values = {**dict(mask_autoencoder_run), "init": tmp_path / "mask_autoencoder.safetensors"}
    MaskAutoencoderStage(MaskAutoencoderRun(**values))
    values["model"] = mask_autoencoder_run.model.model_copy(update={"channels": (4, 4)})
    with pytest.raises(MaisiError, match="leave 'model' out"):
        MaskAutoencoderStage(MaskAutoencoderRun(**values))


@pytest.mark.parametrize(
    ("size", "equivariance", "said"),
    [((15, 16, 16), 0.0, "multiples of 2"), ((18, 26, 26), 0.1, "multiples of 4"), ((8, 16, 16), 0.0, "needs 12"),
     ((16, 16, 16), 0.1, "needs 24")],
)  # fmt: skip
def test_patches_fit_the_networks(autoencoder_run: AutoencoderRun, size: Any, equivariance: float, said: str) -> None:
    change = {
        "patches": autoencoder_run.patches.model_copy(update={"size": size}),
        "losses": autoencoder_run.losses.model_copy(update={"equivariance": equivariance}),
    }
    with pytest.raises(MaisiError, match=said):
        AutoencoderStage(autoencoder_run.model_copy(update=change))


def test_patches_may_be_small_where_no_discriminator_joins(autoencoder_run: AutoencoderRun) -> None:
    change = {
        "patches": autoencoder_run.patches.model_copy(update={"size": (8, 8, 8)}),
        "losses": autoencoder_run.losses.model_copy(update={"adversarial_start": autoencoder_run.loop.steps}),
    }
    AutoencoderStage(autoencoder_run.model_copy(update=change))


def test_validation_needs_cases(autoencoder_run: AutoencoderRun, prepared: Path, tmp_path: Path) -> None:
    index = PreparedFolder(prepared).index
    for path in prepared.glob("*.npy"):
        (tmp_path / path.name).symlink_to(path)
    alone = index.model_copy(update={"cases": tuple(case for case in index.cases if case.split == "train")})
    write_json(tmp_path / INDEX, alone.model_dump(mode="json"))
    without = autoencoder_run.model_copy(update={"data": tmp_path})
    with pytest.raises(MaisiError, match=r"no validation cases; .*loop\.validate_every to 0"):
        AutoencoderStage(without)
    never = without.model_copy(update={"loop": without.loop.model_copy(update={"validate_every": 0})})
    assert run(AutoencoderStage(never), never.loop, never, tmp_path / "run") == 4


def test_what_fails_in_validation_costs_no_step(diffusion_run: DiffusionRun, tmp_path: Path) -> None:
    stage = DiffusionStage(diffusion_run)

    def validate(step: int) -> Any:
        raise MemoryError

    stage.validate = validate  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        run(stage, diffusion_run.loop, diffusion_run, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.safetensors"]


def test_logs_are_json_whatever_happens(diffusion_run: DiffusionRun, tmp_path: Path) -> None:
    stage = DiffusionStage(diffusion_run)
    plain = stage.update

    def update(batch: Any, step: int) -> Any:
        return {**plain(batch, step), "gradient": float("nan")}

    stage.update = update  # type: ignore[method-assign]
    run(stage, diffusion_run.loop, diffusion_run, tmp_path)

    def refuse(word: str) -> Any:
        raise AssertionError(word)

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["gradient"] for line in lines if line["group"] == "train"] == [None] * 4


def test_pictures_are_decoded_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=(16, 16), num_res_blocks=(1, 1), norm_groups=4)
    autoencoder = Autoencoder(config).eval().requires_grad_(False)
    z = torch.randn(2, config.latent_channels, 24, 20, 16)
    asked = []

    def budget(*arguments: Any) -> int:
        asked.append(arguments)
        return 62 * 2**20  # 14 MiB beside what is always counted

    whole = autoencoder.decode(z)
    monkeypatch.setattr("maisi.splitting.plan.budget_beside", budget)
    assert torch.allclose(_decode(autoencoder, torch.device("cpu"), z), whole, atol=1e-5)
    assert asked


def test_too_little_memory_for_pictures_does_not_stop_a_training(
    diffusion_run: DiffusionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoencoderConfig(channels=(16, 16, 16), num_res_blocks=(1, 1, 1), norm_groups=4)
    save_network(tmp_path / "autoencoder.safetensors", Autoencoder(config))
    shown = diffusion_run.model_copy(update={"autoencoder": tmp_path / "autoencoder.safetensors", "sample_steps": 1})
    assert set(DiffusionStage(shown).validate(0)[1]) == {"sample"}
    monkeypatch.setattr("maisi.splitting.plan.budget_beside", lambda *arguments: 1000)
    with pytest.warns(UserWarning, match="No validation pictures: To decode"):
        metrics, pictures = DiffusionStage(shown).validate(0)
    assert metrics
    assert not pictures


def test_views_of_all_sizes_are_looked_at(diffusion_run: DiffusionRun, prepared: Path, tmp_path: Path) -> None:
    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool3d(image, 4)[0].expand(4, -1, -1, -1).contiguous()
        return mean, torch.full_like(mean, -6.0)

    kinds = [ViewConfig(size=(16, 16, 16), spacing_mm=(6, 6)), ViewConfig(size=(16, 16, 20), spacing_mm=(6, 6))]
    cache_latents(PreparedFolder(prepared), kinds, encode, "0" * 64, tmp_path)
    with pytest.raises(MaisiError, match="Latents of 4 x 4 x 5 do not halve 1 times"):
        DiffusionStage(diffusion_run.model_copy(update={"data": tmp_path}))
