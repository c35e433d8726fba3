from typing import Any

import pydantic
import pytest
import torch

from maisi.networks.unet import ControlResiduals, TrunkConfig, UNet, UNetConfig

NARROW: dict[str, Any] = {
    "channels": (8, 16, 24),
    "num_res_blocks": (1, 2, 1),
    "attention_levels": (False, False, True),
    "head_channels": 12,
    "norm_groups": 4,
}
CARRIED = UNetConfig(**NARROW, region_input=True, spacing_input=True, num_modalities=8)


def randomised(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    net = UNet(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return net.eval()


def conditions() -> dict[str, torch.Tensor]:
    return {
        "spacing": torch.tensor([[100.0, 100.0, 250.0]]),
        "top_region": torch.tensor([[0.0, 100.0, 0.0, 0.0]]),
        "bottom_region": torch.tensor([[0.0, 0.0, 100.0, 0.0]]),
        "modality": torch.tensor([1]),
    }


def latent(*size: int) -> torch.Tensor:
    return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))


TIMES = torch.tensor([321.5])


def test_fresh_network_predicts_zero():
    assert torch.count_nonzero(UNet(CARRIED)(latent(4, 4, 8), TIMES, **conditions())) == 0


def test_narrow_network_with_all_inputs_keeps_the_size():
    out = randomised(CARRIED)(latent(4, 8, 12), TIMES, **conditions())
    assert out.shape == (1, 4, 4, 8, 12)


@pytest.mark.parametrize("name", ["spacing", "top_region", "bottom_region", "modality"])
def test_each_condition_changes_the_output_and_must_be_there(name: str):
    net, given = randomised(CARRIED), conditions()
    other = given[name].flip(-1) + (1 if name == "modality" else 0)
    assert not torch.allclose(
        net(latent(4, 4, 4), TIMES, **given), net(latent(4, 4, 4), TIMES, **{**given, name: other})
    )
    with pytest.raises(ValueError, match=name):
        net(latent(4, 4, 4), TIMES, **{**given, name: None})


def test_conditions_without_an_input_are_not_used():
    net = randomised(UNetConfig(**NARROW))
    assert torch.equal(net(latent(4, 4, 4), TIMES, **conditions()), net(latent(4, 4, 4), TIMES))


def test_samples_of_a_batch_do_not_influence_each_other():
    net = randomised(CARRIED)
    x = torch.cat([latent(4, 4, 4), latent(4, 4, 4).flip(2)])
    times = torch.tensor([1.0, 900.0])
    both = {n: torch.cat([v, v.flip(-1)]) for n, v in conditions().items()}
    second = net(x[1:], times[1:], **{n: v[1:] for n, v in both.items()})
    torch.testing.assert_close(net(x, times, **both)[1:], second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_residual_resampling_runs_in_bfloat16(layout: torch.memory_format):
    net = randomised(UNetConfig(**NARROW, residual_resampling=True))
    with torch.inference_mode():
        exact = net(latent(4, 8, 4), TIMES)
        x = latent(4, 8, 4).bfloat16().contiguous(memory_format=layout)
        made = net.to(torch.bfloat16, memory_format=layout)(x, TIMES)
    assert float((made.float() - exact).norm() / exact.norm()) < 0.1


def test_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        randomised(CARRIED)(latent(4, 6, 4), TIMES, **conditions())


def test_gradients_reach_every_parameter():
    net = randomised(UNetConfig(**NARROW, region_input=True, spacing_input=True, num_modalities=2)).train()
    net(latent(4, 4, 4), TIMES, **conditions()).square().sum().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # One voxel at the deepest level: attention to itself alone is its value, whatever query and key say.
    assert all(".to_q." in name or ".to_k." in name for name in without)


def test_each_control_residual_is_used():
    net = randomised(UNetConfig(**NARROW))
    x = latent(4, 4, 4)
    skips = net.encode(net.conv_in(x), net.embed_time(TIMES, None, x.dtype), None)
    assert [s.shape[1] for s in skips] == list(net.config.skip_channels)
    zeros = [torch.zeros_like(s) for s in skips]
    usual = net(x, TIMES)
    assert torch.equal(net(x, TIMES, residuals=ControlResiduals(tuple(zeros), zeros[-1])), usual)
    for index in range(len(skips) + 1):
        residuals = [z + (i == index) for i, z in enumerate([*zeros, zeros[-1]])]
        control = ControlResiduals(tuple(residuals[:-1]), residuals[-1])
        assert not torch.allclose(net(x, TIMES, residuals=control), usual), index
        assert torch.equal(net(x, TIMES, residuals=control.scaled(0.0)), usual)


def test_too_few_residuals_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        randomised(UNetConfig(**NARROW))(
            latent(4, 4, 4), TIMES, residuals=ControlResiduals((torch.zeros(1),), torch.zeros(1))
        )


def test_bfloat16_and_channels_last_stay_close():
    net = randomised(UNetConfig(**NARROW))
    expected = net(latent(8, 8, 8), TIMES)
    half = net.to(dtype=torch.bfloat16, memory_format=torch.channels_last_3d)
    found = half(latent(8, 8, 8).to(torch.bfloat16, memory_format=torch.channels_last_3d), TIMES)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": (8, 16)}, "one entry for each level"),
        ({"channels": (8, 16, 22)}, "multiple of norm_groups"),
        ({"head_channels": 16}, "multiples of head_channels"),
        ({"channels": (9, 18, 27), "norm_groups": 9}, "even"),
        ({"channels": (8, 16, 0)}, "greater than 0"),
        ({"chanels": (8, 16, 24)}, "chanels"),
    ],
)
def test_wrong_sizes_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(pydantic.ValidationError, match=message):
        UNetConfig(**{**NARROW, **values})


def test_widths_follow_the_configuration():
    assert TrunkConfig(**NARROW).skip_channels == (8, 8, 8, 16, 16, 16, 24)
    assert CARRIED.embedding_width == 4 * 32
    assert CARRIED.size_multiple == 4
