"""Training on cut maps: the same losses, gradients and updates; the way that fits a memory; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maisi.device import parse_memory
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting.execution import Recomputed
from maisi.training.autoencoder import AutoencoderRun, AutoencoderStage
from maisi.training.loop import run
from maisi.training.runs import run_stage
from maisi.training.splitting import FIXED_BYTES, Coding, SplittingConfig, coding_for, step_bytes

CPU = torch.device("cpu")
MODEL = AutoencoderConfig(channels=(8, 16), num_res_blocks=(1, 0), norm_groups=4)
SHAPE = (1, 1, 64, 64, 64)


def split(whole: AutoencoderRun, splitting: SplittingConfig) -> AutoencoderRun:
    return whole.model_copy(update={"splitting": splitting})


@pytest.mark.parametrize("equivariance", [0.0, 1.0])
@pytest.mark.parametrize(
    "splitting",
    [SplittingConfig(parts=3, axis=2), SplittingConfig(parts=4, recompute=True)],
    ids=["parts", "recompute"],
)
def test_a_step_is_the_unsplit_one(
    autoencoder_run: AutoencoderRun, splitting: SplittingConfig, equivariance: float
) -> None:
    losses = autoencoder_run.losses.model_copy(update={"equivariance": equivariance})
    patches = autoencoder_run.patches.model_copy(update={"size": (24, 24, 24), "batch_size": 1})
    whole = autoencoder_run.model_copy(update={"losses": losses, "patches": patches})
    step = 2  # the discriminator has joined
    stages = [AutoencoderStage(whole), AutoencoderStage(split(whole, splitting))]
    assert stages[0].coding.execution is None
    assert stages[1].coding.execution is not None
    gradients: list[list[torch.Tensor]] = [[], []]
    for stage, seen in zip(stages, gradients, strict=True):
        plain = stage.trainee.apply

        def spied(at: int, plain=plain, stage=stage, seen=seen) -> float:  # type: ignore[no-untyped-def]
            seen += [torch.clone(p.grad) for p in stage.model.parameters() if p.grad is not None]
            return plain(at)

        stage.trainee.apply = spied  # type: ignore[method-assign]
    terms = [stage.update(stage.batch(step), step) for stage in stages]
    assert terms[0].keys() == terms[1].keys()
    assert terms[1] == pytest.approx(dict(terms[0]), rel=1e-5)
    largest = max(float(g.abs().max()) for g in gradients[0])
    assert largest > 0
    parameters = zip(*(stage.model.parameters() for stage in stages), strict=True)
    for (one, other), mine, theirs in zip(parameters, *gradients, strict=True):
        # not 1e-5: the losses' networks, in float32 themselves, make this of outputs that differ by 3e-6. Against a
        # step in float64 both were equally near (2.5e-5 split, 2.2e-5 whole); splitting by itself is the next test's
        assert float((mine - theirs).abs().max()) < 5e-5 * largest
        # Adam turns a gradient of rounding errors into a full step of either sign: those are left out
        real = mine.abs() > 1e-3 * largest
        assert float((one - other)[real].detach().abs().max() if real.any() else 0.0) < 1e-5


@pytest.mark.parametrize("splitting", [SplittingConfig(parts=3), SplittingConfig(parts=99, axis=0, recompute=True)])
def test_gradients_are_nearer_to_exact_ones_than_the_unsplit(splitting: SplittingConfig) -> None:
    """Of what is handed back to the autoencoder, the same everywhere; by the largest of each tensor. 99: all rows."""
    torch.manual_seed(0)
    model, exact = Autoencoder(MODEL), Autoencoder(MODEL).double()
    exact.load_state_dict(model.state_dict())
    image = torch.rand(1, 1, 24, 24, 24)
    signs = torch.sign(torch.rand_like(image) - 0.45)  # as an L1 loss hands them back

    def gradients(model: Autoencoder, coding: Coding) -> list[torch.Tensor]:
        model.zero_grad()
        latent = coding.encode(model, image.to(next(model.parameters()).dtype))
        made = coding.decode(model, latent.mean + 0.1 * latent.log_variance)
        (made * signs).mean().backward()
        return [p.grad.double() for p in model.parameters() if p.grad is not None]

    shape = (1, 1, 24, 24, 24)
    truth = gradients(exact, Coding())
    split_coding = coding_for(splitting, MODEL, shape, CPU, torch.float32)
    largest = max(float(g.abs().max()) for g in truth)
    found = []
    for coding in (Coding(), split_coding):
        made = gradients(model, coding)
        # where a norm follows, a bias has no effect and its exact gradient is 0: there by the largest of all
        scales = [own if (own := float(t.abs().max())) > 1e-6 * largest else largest for t in truth]
        found.append(max(float((m - t).abs().max()) / s for m, t, s in zip(made, truth, scales, strict=True)))
    whole, cut = found
    assert cut < min(whole, 1e-5)


def test_a_resumed_run_may_be_split_otherwise(autoencoder_run: AutoencoderRun, tmp_path: Path) -> None:
    run(AutoencoderStage(autoencoder_run), autoencoder_run.loop, autoencoder_run, tmp_path)
    longer = autoencoder_run.model_copy(update={"loop": autoencoder_run.loop.model_copy(update={"steps": 5})})
    other = split(longer, SplittingConfig(parts=2))
    assert run(AutoencoderStage(other), other.loop, other, tmp_path) == 5


def test_less_memory_more_parts_until_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maisi.training.splitting.PARTS", (2, 4))

    def bytes_of(coding: Coding) -> int:
        return step_bytes(MODEL, SHAPE, coding, CPU, torch.float32)

    def coding(budget: int) -> Coding:
        return coding_for(SplittingConfig(memory=f"{budget}B", axis=2), MODEL, SHAPE, CPU, torch.float32)

    whole = bytes_of(Coding())
    assert coding(whole).execution is None
    ways: list[tuple[Recomputed, int]] = []
    taken = whole
    while not (ways and ways[-1][0] == "inner"):
        found = coding(taken - 1)
        assert found.execution is not None
        assert found.axis == 2
        assert bytes_of(found) < taken
        ways.append((found.execution.recompute, found.execution.parts))
        taken = bytes_of(found)
    assert ways == sorted(ways, key=lambda way: (way[0] == "inner", way[1])), (
        "a slower way is taken before a quicker one is exhausted"
    )
    assert ways[0] == ("none", 2)
    assert taken - FIXED_BYTES < (whole - FIXED_BYTES) / 2
    with pytest.raises(MaisiError, match=r"64 x 64 x 64 voxels takes the autoencoder at least [\d.]+ GiB"):
        coding(FIXED_BYTES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{memory: much}", r"splitting: 'much' is no amount of memory"),
        ("{memory: 1GiB, parts: 2}", r"memory decides parts and recompute"),
        ("{recompute: true}", r"recompute needs parts of 2 or more"),
        ("{axis: 3}", r"'splitting.axis' is 3"),
        ("{part: 3}", r"unknown key 'splitting.part' \(did you mean 'parts'\?\)"),
    ],
)
def test_faults_are_named(values: str, message: str, prepared: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {prepared}\nloop: {{steps: 4}}\nsplitting: {values}\n")
    with pytest.raises(MaisiError, match=message):
        run_stage("autoencoder", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_memory_that_is_too_small_is_refused_before_anything_is_made(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maisi.training.splitting.PARTS", (2,))
    assert parse_memory("64MiB") == 2**26
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {prepared}\nloop: {{steps: 4, device: cpu}}\nsplitting: {{memory: 64MiB}}\n"
        "model: {channels: [8, 8], num_res_blocks: [1, 1], norm_groups: 4}\npatches: {size: [64, 64, 64]}\n"
        "losses: {perceptual_features: gradients}\n"
    )
    with pytest.raises(MaisiError, match="64MiB; give more, or smaller patches"):
        run_stage("autoencoder", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
