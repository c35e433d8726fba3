import pytest
import torch
from monai.networks.nets.patchgan_discriminator import PatchDiscriminator as Reference

from maisi.networks.discriminator import DiscriminatorConfig, PatchDiscriminator


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_smallest_size_gives_at_least_one_score(num_layers: int):
    config = DiscriminatorConfig(channels=4, num_layers=num_layers)
    net = PatchDiscriminator(config)
    size = config.smallest_size
    scores = net(torch.randn(1, 1, size, size, 2 * size, generator=torch.Generator().manual_seed(0)))
    assert scores.shape == (1, 1, 1, 1, 2 * size // 2**num_layers - 2)
    with pytest.raises(ValueError, match="below"):
        net(torch.zeros(1, 1, size - 1, size, size))


def test_same_scores_as_the_reference():
    torch.manual_seed(0)
    reference = Reference(spatial_dims=3, channels=4, in_channels=2, num_layers_d=3, norm="INSTANCE").eval()
    ours = PatchDiscriminator(DiscriminatorConfig(in_channels=2, channels=4)).eval()
    tensors = list(reference.state_dict().values())
    ours.load_state_dict(dict(zip(ours.state_dict(), tensors, strict=True)))
    x = torch.randn(2, 2, 24, 32, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), reference(x)[-1], rtol=1e-4, atol=1e-5)


def test_gradient_reaches_the_image():
    x = torch.randn(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    PatchDiscriminator(DiscriminatorConfig(channels=4)).train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
