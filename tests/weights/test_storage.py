"""Weights in 8 bits: rounded by half a step at most, small on disk, loaded like any others, refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load_file, save_file

from maisi.cli import run
from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.weights.convert import export_official
from maisi.weights.load import load_network, read_header, save_network
from maisi.weights.storage import MIN_ELEMENTS, NARROW, SCALE, STORAGES, Storage, dequantise, packed, quantise, unpacked

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(channels=(64, 128), num_res_blocks=(1, 1), norm_groups=4)).eval()


@pytest.fixture
def stored(autoencoder: Autoencoder, tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    save_network(path, autoencoder, metadata={"maisi.note": "a note"}, storage="int8")
    return path


def large_one(path: Path) -> str:
    """Name of the first tensor of a file that is stored in 8 bits."""
    return min(name for name, tensor in load_file(path).items() if tensor.dtype == torch.int8)


def columns(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scale.double().reshape(-1, *[1] * (like.dim() - 1))


@settings(max_examples=100, deadline=None)
@given(values=arrays(np.float32, array_shapes(min_dims=2, max_dims=5, max_side=4), elements=NUMBERS))
@example(values=np.zeros((2, 3), np.float32))
@example(values=np.array([[1e-45, 3e-45], [2.0**100, 1]], np.float32))
def test_a_step_at_most_and_half_a_step_without_kernels(values: np.ndarray) -> None:
    weight = torch.from_numpy(values)
    steps, scale = quantise(weight)
    assert steps.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == weight.shape[:1]
    assert int(steps.int().abs().max()) <= 127
    made = dequantise(steps, scale)
    # A product in float32 is itself rounded, by less than 1e-5 of a step.
    off = (made.double() - weight.double()) / columns(scale, weight)
    assert (off.abs() <= (0.5 if weight.dim() == 2 else 1) + 1e-5).all()
    again, _ = quantise(made)
    assert torch.equal(again, steps) or float(scale.min()) < 1e-30
    if weight.dim() == 2:
        assert (made[weight == 0] == 0).all()
        assert (made * weight >= 0).all()


@given(seed=st.integers(0, 2**31), taps=st.sampled_from([(1, 1, 1), (3, 3, 3), (4, 4, 4), (5,)]))
def test_sums_of_kernels_stay(seed: int, taps: tuple[int, ...]) -> None:
    weight = torch.randn(3, 4, *taps, generator=torch.Generator().manual_seed(seed))
    steps, scale = quantise(weight)
    off = (dequantise(steps, scale).double() - weight.double()).flatten(2).sum(2) / scale.double()[:, None]
    # the largest tap of a channel cannot take another step
    most = steps.int().abs().flatten(2).amax(2) == 127
    assert (off.abs()[~most] <= 0.5 + 1e-3).all()


def test_each_channel_has_its_own_scale() -> None:
    weight = torch.randn(3, 5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1e-4, 1, 1e4]).reshape(3, 1, 1, 1, 1)
    steps, scale = quantise(weight)
    assert torch.allclose(scale, weight.abs().flatten(1).amax(1) / 127)
    assert (steps.int().abs().flatten(1).amax(1) == 127).all()


def test_what_is_small_stays_float16() -> None:
    tensors = {
        "long": torch.ones(2 * MIN_ELEMENTS),
        "small": torch.ones(2, MIN_ELEMENTS // 2 - 1),
        "large": torch.ones(2, MIN_ELEMENTS // 2),
        "narrow": torch.ones(NARROW, MIN_ELEMENTS, 1, 1, 1),
        "wide": torch.ones(NARROW + 1, MIN_ELEMENTS, 1, 1, 1),
    }
    held = packed(tensors, "int8")
    assert {name: tensor.dtype for name, tensor in held.items()} == {
        "long": torch.float16,
        "small": torch.float16,
        "large": torch.int8,
        "large" + SCALE: torch.float32,
        "narrow": torch.float16,
        "wide": torch.int8,
        "wide" + SCALE: torch.float32,
    }
    made = unpacked(held, torch.bfloat16)
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name].float(), tensor) for name, tensor in tensors.items())


def test_what_is_not_finite_is_refused() -> None:
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(MaisiError, match=r"^w has numbers that are not finite; [^.]*\.$"):
            packed({"w": torch.full((2, MIN_ELEMENTS), wrong)}, "int8")


def test_the_choices_have_one_home() -> None:
    assert get_args(Storage) == STORAGES


def test_sizes_and_headers(autoencoder: Autoencoder, tmp_path: Path) -> None:
    sizes = {}
    for storage in STORAGES:
        path = tmp_path / storage
        save_network(path, autoencoder, storage=storage)
        header = read_header(path)
        assert header.storage == storage
        assert header.parameters == sum(p.numel() for p in autoencoder.parameters())
        assert {n: s for n, (_, s) in header.tensors.items()} == {
            n: tuple(t.shape) for n, t in autoencoder.state_dict().items()
        }
        sizes[storage] = path.stat().st_size - len(json.dumps(header.tensors))
    assert sizes["float16"] < 0.55 * sizes["float32"]
    assert sizes["int8"] < 0.55 * sizes["float16"]


def test_loaded_network_does_nearly_the_same(autoencoder: Autoencoder, stored: Path) -> None:
    loaded = load_network(stored, network="autoencoder")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())
    scales = {n: t for n, t in load_file(stored).items() if n.endswith(SCALE)}
    assert scales
    for name, weight in autoencoder.state_dict().items():
        error = (loaded.state_dict()[name] - weight).abs().double()
        bound = columns(scales[name + SCALE], weight) * (1 + 1e-5) if name + SCALE in scales else 1e-3
        assert (error <= bound).all(), name
    z = torch.randn(1, 4, 6, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, made = autoencoder.decode(z), loaded.decode(z)  # type: ignore[operator]
    assert float((made - wanted).std() / wanted.std()) < 0.03
    assert {p.dtype for p in load_network(stored, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_same_weights_same_bytes_and_stored_again(stored: Path, tmp_path: Path) -> None:
    save_network(tmp_path / "b", load_network(stored), metadata={"maisi.note": "a note"}, storage="int8")
    first, second = load_network(stored).state_dict(), load_network(tmp_path / "b").state_dict()
    assert all(torch.allclose(first[name], second[name], rtol=1e-6, atol=0) for name in first)
    save_network(tmp_path / "c", load_network(stored), metadata={"maisi.note": "a note"}, storage="int8")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_an_export_has_what_is_loaded(stored: Path, tmp_path: Path) -> None:
    export_official(stored, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {tensor.dtype for tensor in content.values()} == {torch.float32}


def test_the_command_shows_it(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["weights", "show", str(stored)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["storage"] == "int8"
    assert shown["parameters"] == read_header(stored).parameters
    assert shown["maisi.note"] == "a note"


@pytest.mark.parametrize(
    "change",
    [
        lambda scale: scale[:1],
        lambda scale: scale[0].clone(),
        lambda scale: scale[:, None],
        lambda scale: scale.to(torch.int32),
        lambda scale: scale.double(),
    ],
)
def test_wrong_scales_are_refused(stored: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors, name, metadata = load_file(stored), large_one(stored), dict(read_header(stored).metadata)
    tensors[name + SCALE] = change(tensors[name + SCALE])
    save_file(tensors, stored, metadata)
    refuse(stored, f"{name}{SCALE} is not one floating-point number for each channel of {name}")


def test_missing_scales_are_refused(stored: Path) -> None:
    tensors, name, metadata = load_file(stored), large_one(stored), dict(read_header(stored).metadata)
    del tensors[name + SCALE]
    save_file(tensors, stored, metadata)
    refuse(stored, f"{name} is stored in 8 bits without {name}{SCALE}")


def refuse(path: Path, what: str) -> None:
    """The header is refused already, in one sentence."""
    for read in (read_header, load_network):
        with pytest.raises(MaisiError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: {what}; get a fresh copy."


def test_scales_of_nothing_are_refused(stored: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(stored).items()}  # not read from a file written over
    name, metadata = large_one(stored), dict(read_header(stored).metadata)
    for changed in (
        {**tensors, name: tensors[name].float()},
        {n: t for n, t in tensors.items() if n != name},
        {**tensors, "nothing.scale": torch.ones(16)},
    ):
        save_file(changed, stored, metadata)
        with pytest.raises(
            MaisiError, match=r"do not fit the network's configuration .*in place of.*; get a fresh copy"
        ):
            load_network(stored)


def test_steps_of_another_shape_are_refused(stored: Path) -> None:
    tensors, name, metadata = load_file(stored), large_one(stored), dict(read_header(stored).metadata)
    tensors[name], tensors[name + SCALE] = torch.zeros(3, 2, dtype=torch.int8), torch.ones(3)
    save_file(tensors, stored, metadata)
    with pytest.raises(MaisiError, match=r"1 tensors do not fit .*\(3, 2\) in place of"):
        load_network(stored)


@pytest.mark.parametrize("storage", [None, *STORAGES])
def test_no_storage_takes_weights_that_are_no_numbers(storage: Storage | None, tmp_path: Path) -> None:
    broken = Autoencoder(AutoencoderConfig(channels=(4, 8), num_res_blocks=(1, 1), norm_groups=4))
    next(p for p in broken.parameters() if p.dim() == 1).data[0] = float("nan")  # in 16 bits where others have 8
    with pytest.raises(MaisiError, match="numbers that are not finite"):
        save_network(tmp_path / "a.safetensors", broken, storage=storage)
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_weights_beyond_16_bits_are_told(storage: Storage) -> None:
    with pytest.raises(MaisiError, match=f"too large to be stored as {storage}; choose float32"):
        packed({"w": torch.full((4,), 1e5)}, storage)
