"""Split = unsplit: layers, blocks and whole autoencoders, values and gradients, any size, axis and number of parts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maisi.errors import MaisiError
from maisi.layers.blocks import Downsample, ResidualBlock, Upsample
from maisi.layers.convolution import conv3, convolved
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting import autoencoder as split
from maisi.splitting import layers
from maisi.splitting.execution import Execution, Recomputed
from maisi.splitting.maps import Pulled, Storage, Store, Whole

SMALL = AutoencoderConfig(channels=(8, 16, 16), num_res_blocks=(1, 2, 1), norm_groups=4, upsampling="nearest")

CHAINS: dict[str, list[nn.Module]] = {
    "convolution": [conv3(3, 4)],
    "pointwise": [nn.Conv3d(3, 4, kernel_size=1)],
    "downsampling": [Downsample(3)],
    "nearest": [Upsample(3, "nearest")],
    "trilinear": [Upsample(3, "trilinear")],
    "transposed": [Upsample(3, "transposed")],
    "norm": [conv3(3, 4), nn.GroupNorm(2, 4, 1e-6), conv3(4, 2)],
    "residual": [conv3(3, 4), ResidualBlock(4, 8, 2, 1e-6), ResidualBlock(8, 8, 4, 1e-6)],
    "all": [conv3(3, 4), ResidualBlock(4, 4, 2, 1e-6), Upsample(4, "nearest"), ResidualBlock(4, 4, 4, 1e-6)],
}


def unsplit(blocks: list[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def joined(blocks: list[nn.Module], x: Tensor, execution: Execution, axis: int) -> Tensor:
    last = execution.run(blocks, Whole(x, axis))
    return torch.cat([rows for _, _, rows in execution.pieces(last)], 2 + axis)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(sorted(CHAINS)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(1, 7)),
    axis=st.integers(0, 2),
    parts=st.integers(1, 40),
    batch=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    last=st.booleans(),
    recompute=st.sampled_from(["none", "upsampled", "inner", "finest"]),
)
def test_values_and_gradients_are_the_unsplit_ones(
    name: str,
    size: tuple[int, int, int],
    axis: int,
    parts: int,
    batch: int,
    dtype: torch.dtype,
    last: bool,
    recompute: Recomputed,
) -> None:
    blocks = CHAINS[name]
    shape = size[1 : 1 + axis] + size[:1] + size[1 + axis :]
    if name == "downsampling" and min(shape) < 2:
        shape = tuple(max(n, 2) for n in shape)
    torch.manual_seed(0)
    for block in blocks:
        block.to(dtype)
        for p in block.parameters():
            torch.nn.init.normal_(p, 0.0, 0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    x = torch.randn(batch, 3, *shape, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    execution = Execution(parts=parts, recompute=recompute)
    with torch.no_grad():
        assert relative(joined(blocks, x, execution, axis), unsplit(blocks, x)) < tolerance
    if name in ("norm", "residual", "all") and min(shape) < 2:
        return  # norms of next to nothing: gradients of rounding errors
    gradients = []
    for run in (lambda z: unsplit(blocks, z), lambda z: joined(blocks, z, execution, axis)):
        z = x.clone().requires_grad_()
        parameters = [p for block in blocks for p in block.parameters()]
        loss = run(z).sin().sum()
        gradients.append(torch.autograd.grad(loss, [z, *parameters]))
    scale = max(float(g.abs().max()) for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).abs().max()) < 10 * tolerance * scale


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
@pytest.mark.parametrize("recompute", ["none", "upsampled", "inner", "finest"])
def test_where_parts_wait_changes_nothing(tmp_path: Path, storage: Storage, recompute: Recomputed) -> None:
    torch.manual_seed(0)
    model = Autoencoder(SMALL)
    z, x = torch.randn(1, 4, 5, 3, 4), torch.rand(1, 1, 20, 12, 16)
    execution = Execution(parts=3, store=Store(storage, tmp_path), recompute=recompute)
    with torch.inference_mode():
        assert relative(split.decode(model, z, execution, 0), model.decode(z)) < 1e-5
        assert relative(split.encode(model, x, execution, 2).mean, model.encode(x).mean) < 1e-5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("upsampled", 2), ("inner", 2), ("finest", 3)])
def test_only_the_finest_maps_are_computed_anew(
    recompute: Recomputed, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last upsampled map: for its statistics and whenever the block after it is computed, not for its shortcut."""
    config = AutoencoderConfig(**SMALL.model_dump() | {"num_res_blocks": (2, 2, 2), "upsampling": "trilinear"})
    model = Autoencoder(config).requires_grad_(False)
    counts: Counter[int] = Counter()

    def counted(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
        counts[weight.data_ptr()] += 1
        return convolved(x, weight, *more)

    monkeypatch.setattr(layers, "convolved", counted)
    with torch.no_grad():
        split.decode(model, torch.randn(1, 4, 3, 4, 4), Execution(recompute=recompute), 0)
    blocks = list(model.decoder.blocks)
    last = max(i for i, block in enumerate(blocks) if isinstance(block, Upsample))
    coarser = {p.data_ptr() for block in blocks[:last] for p in block.parameters() if p.dim() == 5}
    assert all(counts[pointer] == 1 for pointer in coarser)
    conv, second = blocks[last].conv, blocks[last + 2]
    assert counts[conv.weight.data_ptr()] == times  # type: ignore[operator, union-attr]
    assert counts[second.conv1.weight.data_ptr()] == (2 if recompute in ("inner", "finest") else 1)  # type: ignore[operator, union-attr]


def test_files_of_waiting_parts_go_when_something_fails(tmp_path: Path) -> None:
    model = Autoencoder(SMALL)
    execution = Execution(parts=3, store=Store("disk", tmp_path))
    with torch.inference_mode():
        pieces = split.decoded(model, torch.randn(1, 4, 5, 3, 4), execution, 0)
        next(pieces)
        assert list(tmp_path.iterdir())
        pieces.close()
        del pieces
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_parts_wait(tmp_path: Path) -> None:
    """The kernel refuses to write on; the sentence names the folder, and no part is left in it."""
    resource = pytest.importorskip("resource")
    execution = Execution(parts=3, store=Store("disk", tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with torch.inference_mode(), pytest.raises(MaisiError, match=rf"Cannot write {tmp_path}: .*; choose"):
            split.decode(Autoencoder(SMALL), torch.randn(1, 4, 5, 3, 4), execution, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_rows_may_be_pulled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, asked = Autoencoder(SMALL), torch.rand(1, 1, 20, 12, 16), []

    def fetch(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return x[:, :, start:stop]

    with torch.inference_mode():
        pieces = split.encoded(model, Pulled(0, 20, fetch), Execution(parts=4), 0)
        made = torch.cat([rows for _, _, rows in pieces], 2)
        assert relative(made[:, :4], model.encode(x).mean) < 1e-5
    assert asked == [(0, 5), (3, 9), (7, 17), (15, 20)], "a row more on each side, and each part once"


def test_lower_precision_ends_in_float32() -> None:
    torch.manual_seed(0)
    model = Autoencoder(SMALL)
    z = torch.randn(1, 4, 5, 3, 4)
    with torch.inference_mode():
        exact = model.decode(z)
        made = split.decode(model.bfloat16(), z.bfloat16(), Execution(parts=2), 0)
    assert made.dtype == torch.float32
    assert float((made - exact).norm() / exact.norm()) < 0.03
    assert len(made.unique()) > 0.9 * made.numel(), "values are rounded to bfloat16"


def test_a_layer_it_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        Execution().run([nn.Linear(3, 3)], Whole(torch.zeros(1, 3, 4, 4, 4), 0))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 6, 7])
def test_the_released_configuration(axis: int, parts: int) -> None:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig())
    x = torch.rand(1, 1, 100, 84, 72)
    with torch.inference_mode():
        latent = model.encode(x)
        image = model.decode(latent.mean)
        found = split.encode(model, x, Execution(parts=parts), axis)
        made = split.decode(model, latent.mean, Execution(parts=parts), axis)
    assert relative(found.mean, latent.mean) < 1e-5
    assert relative(found.log_variance, latent.log_variance) < 1e-5
    assert relative(made, image) < 1e-5
