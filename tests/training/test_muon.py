"""Muon: orthogonal updates, who gets them, and the rest is PyTorch's Adam."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maisi.training.muon import NEWTON_SCHULZ, MuonAdam, orthogonal


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 40), columns=st.integers(2, 200), seed=st.integers(0, 1000))
def test_singular_values_come_near_one(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    [result] = orthogonal([matrix])
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(result)
    # The iteration keeps singular vectors; tiny singular values may need more than five rounds.
    assert float(values.max()) < 1.3
    large = s > 0.05 * s.norm()
    assert float(values[: int(large.sum())].min()) > 0.5
    assert float((u.T @ result @ v.T).diagonal()[large].min()) > 0.5


@pytest.mark.parametrize("shape", [(16, 432), (432, 16), (128, 1152)])
def test_gram_matrices_give_what_iterating_on_the_matrix_gives(shape: tuple[int, int]) -> None:
    a, b, c = NEWTON_SCHULZ
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = matrix / matrix.norm()
    x = x.T if shape[0] > shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    x = x.T if shape[0] > shape[1] else x
    assert torch.allclose(orthogonal([matrix])[0], x, atol=1e-4)


def test_small_and_embedded_parameters_follow_adam() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"norm": nn.GroupNorm(2, 4), "table": nn.Embedding(16, 16), "last": nn.Conv3d(16, 1, 3)})
    twin = nn.ModuleDict({"norm": nn.GroupNorm(2, 4), "table": nn.Embedding(16, 16), "last": nn.Conv3d(16, 1, 3)})
    twin.load_state_dict(module.state_dict())
    ours = MuonAdam(module, lr=1e-2, adam_fraction=1.0)
    theirs = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for step in range(5):
        for (_, a), (_, b) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-5, atol=1e-7, msg=name)


def test_convolutions_are_moved_by_the_scaled_orthogonal_matrix() -> None:
    convolution = nn.Conv3d(8, 16, 3, bias=False)
    before = convolution.weight.detach().clone()
    convolution.weight.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    MuonAdam(convolution, lr=0.1).step()
    moved = (convolution.weight.detach() - before).reshape(16, -1)
    expected = -0.1 * 0.2 * (8 * 27) ** 0.5 * orthogonal([convolution.weight.grad.reshape(16, -1)])[0]
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)


def test_a_linear_map_is_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(512, 32, generator=generator), torch.randn(32, 32, generator=generator)
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False)
    optimizer = MuonAdam(layer, lr=0.1)
    losses = []
    for _ in range(150):
        loss = (layer(inputs) - inputs @ wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]
