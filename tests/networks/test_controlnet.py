from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays

from maisi.networks.controlnet import ControlNet, ControlNetConfig
from maisi.networks.unet import UNet, UNetConfig

NARROW: dict[str, Any] = {
    "channels": (8, 16),
    "num_res_blocks": (1, 2),
    "attention_levels": (False, True),
    "head_channels": 8,
    "norm_groups": 4,
}
TIMES = torch.tensor([321.5, 7.0])
MODALITY = torch.tensor([0, 1])


def unet(**inputs: Any) -> UNet:
    torch.manual_seed(0)
    net = UNet(UNetConfig(**NARROW, **inputs))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return net


def latent() -> torch.Tensor:
    return torch.randn(2, 4, 4, 2, 4, generator=torch.Generator().manual_seed(1))


def mask() -> torch.Tensor:
    return torch.randint(0, 2, (2, 8, 16, 8, 16), generator=torch.Generator().manual_seed(2)).float()


def test_fresh_controlnet_leaves_the_unet_as_it_is():
    net = unet(num_modalities=2)
    control = ControlNet.from_unet(net)
    residuals = control(latent(), TIMES, mask(), modality=MODALITY)
    assert [tuple(r.shape[:2]) for r in residuals.down] == [(2, c) for c in net.config.skip_channels]
    controlled = net(latent(), TIMES, modality=MODALITY, residuals=residuals)
    assert torch.equal(controlled, net(latent(), TIMES, modality=MODALITY))


def test_copy_computes_the_unets_features():
    """With the mask encoder still at zero, the copied half gives what the U-Net's own half gives."""
    net = unet(num_modalities=2, residual_resampling=True, attention_out_projection=True)
    control = ControlNet.from_unet(net)
    ours = control.encode(control.conv_in(latent()), control.embed_time(TIMES, MODALITY, torch.float32), None)
    theirs = net.encode(net.conv_in(latent()), net.embed_time(TIMES, MODALITY, torch.float32), None)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_copy_of_a_unet_with_regions_reads_the_time_as_it_did():
    net = unet(region_input=True, spacing_input=True)
    control = ControlNet.from_unet(net)
    wide, narrow = net.middle_block.resnet_1.time_emb_proj, control.middle_block.resnet_1.time_emb_proj
    time = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    nothing = torch.zeros(1, 96)
    torch.testing.assert_close(narrow(time), wide(torch.cat([time, nothing], dim=1)))


def test_copy_shares_no_memory_and_trains():
    net = unet()
    control = ControlNet.from_unet(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD(control.parameters(), lr=0.1)
    for _ in range(3):  # zero convolutions first, then what lies before them
        optimizer.zero_grad()
        residuals = control(latent(), TIMES, mask())
        (net(latent(), TIMES, residuals=residuals) - 1).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert control.mask_encoder.conv_out.weight.abs().max() > 0
    assert control(latent(), TIMES, mask()).down[-1].abs().max() > 0
    changed = control(latent(), TIMES, 1 - mask()).middle
    assert not torch.equal(changed, control(latent(), TIMES, mask()).middle)


def test_zero_is_where_training_starts():
    control = ControlNet(ControlNetConfig(**NARROW))
    zeros = [control.zero_conv_middle, control.mask_encoder.conv_out, *control.zero_convs]
    assert all(not p.any() for module in zeros for p in module.parameters())


def test_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"needs \(16, 8, 16\)"):
        ControlNet(ControlNetConfig(**NARROW))(latent(), TIMES, mask()[..., :12])


def test_other_encoder_half_is_refused():
    with pytest.raises(ValueError, match="sizes"):
        ControlNet.from_unet(unet(), ControlNetConfig(**{**NARROW, "num_res_blocks": (1, 1)}))
    with pytest.raises(ValueError, match="context"):
        ControlNet.from_unet(unet(context_channels=10))


def test_wider_mask_encoder_compresses_more():
    config = ControlNetConfig(**NARROW, mask_channels=3, mask_encoder_channels=(4, 6, 8, 10))
    assert config.mask_compression == 8
    residuals = ControlNet(config)(latent(), TIMES, torch.ones(2, 3, 32, 16, 32))
    assert residuals.middle.shape == (2, 16, 2, 1, 2)


@given(labels=arrays(np.uint8, (3, 4, 5)))
def test_ids_are_told_as_the_group_that_names_them(labels: np.ndarray):
    told = ControlNetConfig(**NARROW, told_as={95: (133, 33, 95), 79: (138,)}).told(labels)
    for id in range(256):
        group = {133: 95, 33: 95, 138: 79}.get(id, id)
        assert (told[labels == id] == group).all()
    assert np.array_equal(ControlNetConfig(**NARROW).told(labels), labels)


def test_an_id_cannot_be_told_as_two():
    with pytest.raises(ValueError, match="more than once: 33"):
        ControlNetConfig(**NARROW, told_as={95: (33,), 28: (33, 29)})
    with pytest.raises(ValueError, match="less than or equal to 255"):
        ControlNetConfig(**NARROW, told_as={95: (256,)})
