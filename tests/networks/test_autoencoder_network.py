import pydantic
import pytest
import torch

from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig, LatentDistribution

NARROW = {"channels": (8, 16, 16), "num_res_blocks": (1, 1, 1), "norm_groups": 4}


def image(*size: int) -> torch.Tensor:
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("upsampling", ["trilinear", "nearest", "transposed"])
def test_compression_is_four_along_each_axis_and_back(upsampling: str):
    torch.manual_seed(0)
    net = Autoencoder(AutoencoderConfig(**NARROW, upsampling=upsampling))
    latent = net.encode(image(8, 16, 12))
    assert latent.mean.shape == latent.log_variance.shape == (1, 4, 2, 4, 3)
    assert net.decode(latent.mean).shape == (1, 1, 8, 16, 12)


def test_sample_has_the_distributions_mean_and_spread():
    latent = LatentDistribution(torch.full((1, 4, 20, 20, 20), 2.0), torch.full((1, 4, 20, 20, 20), -1.0))
    drawn = latent.sample(torch.Generator().manual_seed(0))
    assert abs(float(drawn.mean()) - 2.0) < 0.02
    assert abs(float(drawn.std()) - torch.exp(torch.tensor(-0.5))) < 0.01
    assert torch.equal(drawn, latent.sample(torch.Generator().manual_seed(0)))


def test_kl_is_the_closed_form():
    mean, log_variance = torch.tensor([[[[[0.5]]]]]), torch.tensor([[[[[-0.7]]]]])
    found = LatentDistribution(mean, log_variance).kl()
    ours = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(found, expected)


def test_same_generator_same_reconstruction():
    torch.manual_seed(0)
    net = Autoencoder(AutoencoderConfig(**NARROW))
    first, _ = net(image(8, 8, 8), torch.Generator().manual_seed(3))
    second, _ = net(image(8, 8, 8), torch.Generator().manual_seed(3))
    assert torch.equal(first, second)


@pytest.mark.parametrize("values", [{"num_res_blocks": (1, 1)}, {"channels": (8, 16, 18)}, {"chanels": (8,)}])
def test_wrong_sizes_are_refused(values: dict[str, object]):
    with pytest.raises(pydantic.ValidationError):
        AutoencoderConfig(**{**NARROW, **values})
