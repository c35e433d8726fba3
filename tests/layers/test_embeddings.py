import math

import torch

from maisi.layers.embeddings import embedding_mlp, timestep_embedding


def test_timestep_embedding_is_cosines_then_sines_of_falling_rates():
    found = timestep_embedding(torch.tensor([0.0, 2.5]), 6)
    rates = [10000 ** (-i / 3) for i in range(3)]
    expected = [[1, 1, 1, 0, 0, 0], [math.cos(2.5 * r) for r in rates] + [math.sin(2.5 * r) for r in rates]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_timestep_embedding_keeps_single_precision_for_half_precision_times():
    assert timestep_embedding(torch.tensor([3.0], dtype=torch.bfloat16), 8).dtype == torch.float32


def test_embedding_mlp_is_linear_silu_linear():
    mlp = embedding_mlp(3, 5)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    h = x @ mlp[0].weight.T + mlp[0].bias
    expected = (h * torch.sigmoid(h)) @ mlp[2].weight.T + mlp[2].bias
    torch.testing.assert_close(mlp(x), expected)
