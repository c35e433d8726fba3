import pytest
import torch

from maisi.layers.attention import Attention, SpatialAttention, SpatialTransformer, tokens, voxels


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("context_channels", [None, 5])
def test_attention_equals_softmax_written_out(context_channels):
    net = Attention(8, 4, context_channels=context_channels, qkv_bias=True, out_projection=True)
    x = torch.randn(2, 6, 8, generator=generator())
    context = None if context_channels is None else torch.randn(2, 3, context_channels, generator=generator())
    source = x if context is None else context
    parts = []
    for head in range(2):
        columns = slice(4 * head, 4 * head + 4)
        q, k, v = net.to_q(x)[..., columns], net.to_k(source)[..., columns], net.to_v(source)[..., columns]
        parts.append(torch.softmax(q @ k.transpose(1, 2) / 4**0.5, dim=-1) @ v)
    torch.testing.assert_close(net(x, context), net.out_proj(torch.cat(parts, dim=-1)))


def test_tokens_and_voxels_are_inverse():
    x = torch.randn(2, 3, 2, 4, 5, generator=generator())
    assert torch.equal(voxels(tokens(x), x), x)
    assert torch.equal(tokens(x)[1, 3 * 5 + 2], x[1, :, 0, 3, 2])


def test_spatial_attention_does_not_know_places():
    """Permuting the voxels permutes the output: there is no position in it."""
    net = SpatialAttention(8, 4, 2, 1e-6, out_projection=False)
    x = torch.randn(1, 8, 2, 2, 3, generator=generator())
    order = torch.randperm(12, generator=generator())
    shuffled = x.flatten(2)[:, :, order].reshape(x.shape)
    torch.testing.assert_close(net(shuffled).flatten(2), net(x).flatten(2)[:, :, order])


def test_spatial_attention_takes_no_context():
    with pytest.raises(ValueError, match="context"):
        SpatialAttention(8, 4, 2, 1e-6, out_projection=False)(torch.zeros(1, 8, 1, 1, 2), torch.zeros(1, 1, 3))


def test_fresh_spatial_transformer_is_the_identity_and_needs_its_context():
    net = SpatialTransformer(8, 4, 2, 1e-6, context_channels=3, num_blocks=2, out_projection=True)
    x = torch.randn(1, 8, 2, 1, 3, generator=generator())
    assert torch.equal(net(x, torch.ones(1, 1, 3)), x)
    with pytest.raises(ValueError, match="context"):
        net(x)


def test_attention_keeps_channels_last():
    net = SpatialAttention(8, 4, 2, 1e-6, out_projection=True)
    x = torch.randn(1, 8, 4, 4, 4, generator=generator())
    last = x.to(memory_format=torch.channels_last_3d)
    out = net(last)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(out, net(x))
