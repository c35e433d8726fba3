"""Losses against closed forms."""

from __future__ import annotations

import pytest
import torch

from maisi.training.losses import (
    adversarial,
    channel_weights,
    classification,
    perceptual,
    region_contrastive,
    slices,
    weighted_mean,
)
from maisi.training.optimizer import OptimizerConfig
from maisi.training.perceptual import load_features
from maisi.training.state import ExponentialMovingAverage, step_generator


def test_weighted_mean_weights_voxels() -> None:
    difference = torch.ones(1, 2, 2, 1, 1)
    weight = torch.tensor([1.0, 100.0]).view(1, 1, 2, 1, 1)
    assert float(weighted_mean(difference)) == 1
    assert float(weighted_mean(difference, weight)) == pytest.approx(50.5)


def test_channel_weights_are_what_a_channel_changes_in_the_image() -> None:
    factors = torch.tensor([3.0, 1.0, 0.0]).view(1, 3, 1, 1, 1)
    z = torch.randn(4, 3, 8, 8, 8)
    weights = channel_weights(lambda z: (factors * z).sum(1, keepdim=True), z)
    assert weights.shape == (1, 3, 1, 1, 1)
    shares = torch.tensor([9.0, 1.0, 0.0]) / (10 / 3)
    torch.testing.assert_close(weights.flatten(), (shares + 0.5) / 1.5, rtol=0.1, atol=0.01)


def test_region_contrastive_wants_difference_inside_and_agreement_outside() -> None:
    region = torch.zeros(1, 1, 4, 1, 1)
    region[0, 0, 0] = 1
    base = torch.zeros(1, 3, 4, 1, 1)
    inside, far_inside, outside = base.clone(), base.clone(), base.clone()
    inside[:, :, 0], far_inside[:, :, 0], outside[:, :, 1:] = 1.5, 9.0, 1.5
    assert float(region_contrastive(inside, base, region, 2.0)) == pytest.approx(-1.5)
    assert float(region_contrastive(far_inside, base, region, 2.0)) == pytest.approx(-2.0)
    assert float(region_contrastive(outside, base, region, 2.0)) == pytest.approx(1.5)


def test_slices_cross_each_axis() -> None:
    volume = torch.arange(2 * 3 * 4.0).view(1, 1, 2, 3, 4)
    x, y, z = slices(volume, torch.tensor([0.0, 0.99]))
    assert x.shape == (2, 1, 3, 4)
    assert y.shape == (2, 1, 2, 4)
    assert torch.equal(z[1, 0], volume[0, 0, :, :, 3])


@pytest.mark.parametrize("name", ["efficientnet-lite0", "gradients"])
def test_perceptual_is_zero_for_equals_and_grows_with_blur(name: str) -> None:
    features = load_features(name)  # type: ignore[arg-type]
    image = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0.3, 0.7])
    mild = torch.lerp(image, image.mean(), 0.1).requires_grad_()
    strong = torch.lerp(image, image.mean(), 0.6)
    assert float(perceptual(features, image, image, positions)) == 0
    loss = perceptual(features, mild, image, positions)
    loss.backward()
    assert mild.grad is not None
    assert float(mild.grad.abs().sum()) > 0
    assert 0 < float(loss.detach()) < float(perceptual(features, strong, image, positions))


@pytest.mark.parametrize("size", [8, 160])
def test_dice_counts_every_voxel_of_large_maps(size: int) -> None:
    logits = torch.zeros(1, 3, size, size, size)
    logits[:, 0].uniform_(1.5, 5, generator=torch.Generator().manual_seed(0))
    classes = torch.zeros(1, size, size, size, dtype=torch.uint8)
    classes[..., : size // 8] = 1
    chances, dice = logits.double().softmax(1)[0], []
    for number in (0, 1):
        own = (classes[0] == number).double()
        dice.append(2 * (chances[number] * own).sum() / (chances[number].sum() + own.sum()))
    found = classification(logits.requires_grad_(), classes, 2.0)["dice"]
    assert float(found.detach()) == pytest.approx(2 * (1 - float(torch.stack(dice).mean())), abs=1e-5)
    assert torch.isfinite(torch.autograd.grad(found, logits)[0]).all()


def test_adversarial_loss_is_least_squares() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0])
    assert float(adversarial(scores, True)) == pytest.approx(2 / 3)
    assert float(adversarial(scores, False)) == pytest.approx(5 / 3)


def test_learning_rates_follow_their_shapes() -> None:
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=10, final_fraction=0.1)
    assert [cosine.rate(s, 110) for s in (0, 9)] == pytest.approx([0.1, 1.0])
    assert cosine.rate(60, 110) == pytest.approx(0.55)
    assert cosine.rate(110, 110) == pytest.approx(0.1)
    polynomial = OptimizerConfig(learning_rate=1.0, schedule="polynomial")
    assert [polynomial.rate(s, 100) for s in (0, 50, 100)] == pytest.approx([1.0, 0.25, 0.0])


def test_moving_average_is_the_recursion() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = ExponentialMovingAverage(module, 0.5)
    expected = 0.0
    for step, value in enumerate((1.0, 2.0, 3.0, 4.0)):
        module.weight.data.fill_(value)
        average.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert float(average.values["weight"]) == pytest.approx(expected)


def test_step_generators_differ_by_seed_step_and_stream() -> None:
    draws = {
        float(torch.rand(1, generator=step_generator(*key))) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    }
    assert len(draws) == 4
    assert torch.equal(
        torch.rand(3, generator=step_generator(5, 6, 7)), torch.rand(3, generator=step_generator(5, 6, 7))
    )
