"""HA-GAN's networks: shapes, and that a stretch is made as the whole is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.baselines.hagan_networks import REACH, SCALE, Critic, Encoder, Generator, HaganConfig

CONFIG = HaganConfig(latent=8, trunk=(16, 8), high=(8, 8), critic=(4, 8, 16), stretch=16, norm_groups=4)


@settings(max_examples=8, deadline=None)
@given(st.tuples(*[st.integers(1, 4)] * 3), st.integers(1, 3), st.sampled_from([(8,), (16, 8)]))
def test_shapes(factors: tuple[int, int, int], batch: int, trunk: tuple[int, ...]) -> None:
    config = CONFIG.model_copy(update={"trunk": trunk})
    x, y, z = (n * config.size_multiple for n in factors)
    z *= 4 // len(trunk)  # a multiple of the stretch
    generator, encoder, critic = (kind(config, (x, y, z)) for kind in (Generator, Encoder, Critic))
    features = generator.features(torch.randn(batch, config.latent))
    small, full = generator.small_image(features), generator.full_image(features[..., : config.rows])
    assert small.shape == (batch, 1, x // SCALE, y // SCALE, z // SCALE)
    assert full.shape == (batch, 1, x, y, config.stretch)
    assert encoder.features(full).shape == features[..., : config.rows].shape
    assert encoder(features).shape == (batch, config.latent)
    assert critic(small, full, 0.5).shape == (batch, 2)


def test_a_stretch_is_made_as_the_whole_is() -> None:
    torch.manual_seed(0)
    generator = Generator(CONFIG, (16, 16, 48)).double()
    features = generator.features(torch.randn(2, CONFIG.latent, dtype=torch.float64))
    whole = generator.full_image(features)
    for first in (0, 3, 8):  # at the bottom, inside, at the top
        stretch = generator.full_image(features[..., first : first + CONFIG.rows])
        same = whole[..., SCALE * first : SCALE * (first + CONFIG.rows)]
        cut_below, cut_above = first > 0, first + CONFIG.rows < features.shape[-1]
        inner = slice(REACH if cut_below else 0, CONFIG.stretch - (REACH if cut_above else 0))
        torch.testing.assert_close(stretch[..., inner], same[..., inner], rtol=0, atol=1e-12)
        # one voxel nearer to the cut it is not so: the reach is neither too small nor too large
        if cut_below:
            assert not torch.allclose(stretch[..., REACH - 1], same[..., REACH - 1], rtol=0, atol=1e-6)
        if cut_above:
            assert not torch.allclose(stretch[..., -REACH], same[..., -REACH], rtol=0, atol=1e-6)


def test_the_place_of_a_stretch_counts() -> None:
    torch.manual_seed(0)
    critic = Critic(CONFIG, (16, 16, 32)).eval()
    small, full = torch.randn(2, 1, 4, 4, 8), torch.randn(2, 1, 16, 16, 16)
    low, high = critic(small, full, 0.0), critic(small, full, 1.0)
    assert torch.equal(low[:, 0], high[:, 0])
    assert not torch.equal(low[:, 1], high[:, 1])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stretch": 8}, "stretch must be a multiple of 4 above 8"),
        ({"trunk": ()}, "trunk needs at least one"),
        ({"critic": (4, 8)}, "critic three"),
        ({"high": (8, 6)}, "multiple of norm_groups"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HaganConfig.model_validate(CONFIG.model_dump() | change)
