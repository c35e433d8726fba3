"""Attention over the voxels of a feature map, on any device. Mathematics only.

Feature maps are `B C X Y Z`; inside, voxels are tokens `B N C` with N = X * Y * Z.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from maisi.layers.convolution import conv1
from maisi.layers.norm import GroupNorm


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to context tokens of another width."""

    def __init__(
        self,
        channels: int,
        head_channels: int,
        *,
        context_channels: int | None = None,
        qkv_bias: bool,
        out_projection: bool,
    ) -> None:
        super().__init__()
        self.head_channels = head_channels
        keys_from = channels if context_channels is None else context_channels
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(keys_from, channels, bias=qkv_bias)
        self.to_v = nn.Linear(keys_from, channels, bias=qkv_bias)
        self.out_proj = nn.Linear(channels, channels) if out_projection else nn.Identity()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`B N C` and, for attention to a context, `B M Cctx` -> `B N C`."""
        source = x if context is None else context
        q, k, v = self._heads(self.to_q(x)), self._heads(self.to_k(source)), self._heads(self.to_v(source))
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """`B N C` -> `B heads N head_channels`."""
        batch, count, channels = x.shape
        heads = channels // self.head_channels
        return x.reshape(batch, count, heads, self.head_channels).transpose(1, 2)


class SpatialAttention(nn.Module):
    """Self-attention among all voxels, added to the input."""

    def __init__(
        self, channels: int, head_channels: int, norm_groups: int, norm_eps: float, *, out_projection: bool
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, norm_eps)
        self.attn = Attention(channels, head_channels, qkv_bias=True, out_projection=out_projection)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`B C X Y Z` -> the same; there is no attention to a context here, so `context` must be None."""
        if context is not None:
            raise ValueError("this network has no attention to a context")
        out: Tensor = x + voxels(self.attn(tokens(self.norm(x))), x)
        return out


class GatedFeedForward(nn.Module):
    """Two linear layers with a GELU gate between them (Shazeer 2020, GEGLU)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, 2 * 4 * channels)
        self.linear2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`B N C` -> `B N C`."""
        value, gate = self.linear1(x).chunk(2, dim=-1)
        out: Tensor = self.linear2(value * F.gelu(gate))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each normed first and added to its input."""

    def __init__(self, channels: int, head_channels: int, context_channels: int, *, out_projection: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, head_channels, qkv_bias=False, out_projection=out_projection)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(
            channels, head_channels, context_channels=context_channels, qkv_bias=False, out_projection=True
        )
        self.norm3 = nn.LayerNorm(channels)
        self.ff = GatedFeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`B N C`, `B M Cctx` -> `B N C`."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over all voxels with attention to a context, added to the input.

    The last projection starts at zero, so a fresh one is the identity.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int,
        norm_groups: int,
        norm_eps: float,
        *,
        context_channels: int,
        num_blocks: int,
        out_projection: bool,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, norm_eps)
        self.proj_in = conv1(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, head_channels, context_channels, out_projection=out_projection)
            for _ in range(num_blocks)
        )
        self.proj_out = zeroed(conv1(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`B C X Y Z`, `B M Cctx` -> `B C X Y Z`."""
        if context is None:
            raise ValueError("this network needs a context")
        h = tokens(self.proj_in(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, context)
        out: Tensor = x + self.proj_out(voxels(h, x))
        return out


def tokens(x: Tensor) -> Tensor:
    """`B C X Y Z` -> `B N C`."""
    return x.flatten(2).transpose(1, 2)


def voxels(x: Tensor, like: Tensor) -> Tensor:
    """`B N C` -> `B C X Y Z` with the spatial size of `like`."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *like.shape[2:])


def zeroed(conv: nn.Conv3d) -> nn.Conv3d:
    """Set a convolution's weight and bias to zero and return it."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
