"""The stages of the mask generator: they learn, say what they were trained on, and refuse what does not fit.

That a resumed run equals an uninterrupted one is tested with the other stages (`test_loop`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from maisi.conditions import CONDITION_SCALE
from maisi.data.anatomy_sizes import SIZED, measure_ml, training_of
from maisi.data.mask_codes import codes_of
from maisi.data.mask_maps import MaskMaps
from maisi.errors import MaisiError
from maisi.training.losses import classification
from maisi.training.mask_autoencoder import MaskAutoencoderRun, MaskAutoencoderStage, load_mask_autoencoder, mean_dice
from maisi.training.mask_diffusion import MaskDiffusionRun, MaskDiffusionStage
from maisi.weights.load import read_header


def test_loss_of_classes_is_what_formulas_say() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 4, 5, generator=generator, dtype=torch.float64)
    classes = torch.randint(3, (2, 3, 4, 5), generator=generator, dtype=torch.uint8)  # class 3 is nowhere
    terms = classification(logits, classes, 2.0)
    p = logits.softmax(1)
    hot = torch.nn.functional.one_hot(classes.long(), 4).movedim(-1, 1)
    dice = [2 * (p * hot)[:, c].sum() / (p[:, c].sum() + hot[:, c].sum()) for c in range(3)]
    torch.testing.assert_close(terms["dice"], 2 * (1 - torch.stack(dice).mean()))
    torch.testing.assert_close(terms["cross_entropy"], -(p.log() * hot).sum(1).mean())
    certain = classification(40.0 * hot.double(), classes, 2.0)
    assert all(value < 1e-6 for value in certain.values())


def test_mean_dice() -> None:
    truth = torch.tensor([0, 0, 1, 1, 200, 200], dtype=torch.uint8)
    other = torch.tensor([0, 1, 1, 1, 200, 0], dtype=torch.uint8)
    assert mean_dice(truth, other) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert mean_dice(truth[:2], other[:2]) == 1.0


@pytest.mark.parametrize("name", ["mask_autoencoder", "mask_diffusion"])
def test_one_batch_is_learnt(name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(f"{name}_run")
    run = run.model_copy(update={"loop": run.loop.model_copy(update={"steps": 40})})
    stage = MaskAutoencoderStage(run) if name == "mask_autoencoder" else MaskDiffusionStage(run)
    batch = stage.batch(0)
    losses = []
    for _ in range(30):
        terms = stage.update(batch, 0)
        losses.append(sum(value for key, value in terms.items() if key != "gradient"))
    assert losses[-1] < 0.8 * losses[0]


def test_exported_autoencoder_carries_its_table(mask_autoencoder_run: MaskAutoencoderRun, tmp_path: Path) -> None:
    stage = MaskAutoencoderStage(mask_autoencoder_run)
    metrics, pictures = stage.validate(0)
    assert 0 <= metrics["label_dice"] <= 1
    assert pictures["reconstruction"].shape[0] == 3
    stage.export(tmp_path)
    _, codes = load_mask_autoencoder(tmp_path / "mask_autoencoder.safetensors")
    assert codes == mask_autoencoder_run.codes
    again = mask_autoencoder_run.model_copy(update={"init": tmp_path / "mask_autoencoder.safetensors"})
    MaskAutoencoderStage(again)
    with pytest.raises(MaisiError, match="another table"):
        MaskAutoencoderStage(again.model_copy(update={"labels": (0, 1, 26, 200, 28)}))


def test_what_the_network_is_told(mask_diffusion_run: MaskDiffusionRun, tmp_path: Path) -> None:
    """Sizes are volumes on the grid over the largest, in the order of the released input; regions times 100."""
    run = mask_diffusion_run.model_copy(update={"drop_regions": 0.0, "batch_size": 4})
    stage = MaskDiffusionStage(run)
    maps = MaskMaps(run.maps, run.data, "train", run.loop.seed)
    volumes = np.array([measure_ml(maps[i].labels, (8, 8, 8)) for i in range(len(maps))])
    told = stage.batch(0)[0].conditions
    assert told["context"].shape == (4, 1, 10)
    liver, tumour, pancreas = (SIZED.index(id) for id in (1, 26, 4))
    expected = {round(v, 4) for v in (volumes[:, liver] / volumes[:, liver].max()).tolist()}
    assert {round(v, 4) for v in told["context"][:, 0, liver].tolist()} <= expected
    assert (told["context"][:, 0, pancreas] == -1).all()
    assert (told["context"][:, 0, tumour] > 0).all()
    assert told["top_region"].max() == CONDITION_SCALE
    stage.export(tmp_path)
    header = read_header(tmp_path / "mask_unet.safetensors")
    training = training_of(header.metadata, "it")
    assert training.largest_ml == tuple(volumes.max(0).tolist())
    assert (training.size, len(training.cases)) == ((16, 16, 16), len(maps))
    deviation = torch.stack([item.latent.mean for item in stage.source.latents]).std()  # type: ignore[attr-defined]
    assert header.scale_factor == pytest.approx(1 / float(deviation), rel=1e-5)
    metrics, pictures = stage.validate(0)
    assert metrics["loss"] > 0
    assert pictures["sample"].shape[0] == 3


def test_hidden_regions_are_hidden(mask_diffusion_run: MaskDiffusionRun) -> None:
    stage = MaskDiffusionStage(mask_diffusion_run.model_copy(update={"drop_regions": 1.0}))
    assert not stage.batch(0)[0].conditions["top_region"].any()
    assert stage.held_out.batch(0).conditions["top_region"].any()


def test_labels_without_a_channel(mask_autoencoder_run: MaskAutoencoderRun) -> None:
    model = mask_autoencoder_run.model.model_copy(update={"out_channels": 4})
    short = mask_autoencoder_run.model_copy(update={"labels": (0, 1, 26, 200), "model": model})
    with pytest.raises(MaisiError, match=r"without a channel \(\[28\]\)"):
        MaskAutoencoderStage(short).batch(0)
    coarse = MaskAutoencoderStage(short.model_copy(update={"coarsen": True})).batch(0)
    assert not any((labels == 28).any() for labels in coarse)


def test_refused_before_anything_runs(
    mask_autoencoder_run: MaskAutoencoderRun, mask_diffusion_run: MaskDiffusionRun
) -> None:
    values = mask_autoencoder_run.model_dump()
    for change, match in (
        ({"labels": (0, 1)}, "out_channels must be 2"),
        ({"patch": (8, 8, 7)}, "multiples of 2"),
        ({"patch": (8, 8, 32)}, "not be larger"),
        ({"model": values["model"] | {"in_channels": 1}}, "in_channels must be 8"),
        ({"maps": values["maps"] | {"phantom_regions": (("knee",),)}}, "knee"),
    ):
        with pytest.raises(ValueError, match=match):
            MaskAutoencoderRun.model_validate(values | change)
    with pytest.raises(ValueError, match="context_channels must be 10"):
        MaskDiffusionRun.model_validate(mask_diffusion_run.model_dump() | {"model": {}})
    odd = mask_diffusion_run.model_copy(
        update={"maps": mask_diffusion_run.maps.model_copy(update={"size": (16, 16, 18)})}
    )
    with pytest.raises(MaisiError, match="multiples of 4"):
        MaskDiffusionStage(odd)


def test_released_table_belongs_to_125_channels() -> None:
    assert MaskAutoencoderRun.model_validate({"loop": {"steps": 1}}).codes == codes_of({}, 125, "it")
