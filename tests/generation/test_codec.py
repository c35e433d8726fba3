from __future__ import annotations

import numpy as np
import pytest
import torch

from maisi.data.latents import Latent
from maisi.errors import MaisiError
from maisi.generation import codec
from maisi.generation.codec import intensities
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting import plan
from maisi.volume import Volume

SPACING = (1.5, 2.0, 3.0)
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture
def autoencoder(model):
    return model.autoencoder


def ct(size: tuple[int, int, int]) -> Volume:
    hu = np.random.default_rng(0).integers(-1000, 1000, size).astype(np.int16)
    return Volume.from_spacing(hu, SPACING)


def test_encoding_is_the_networks_own_of_the_padded_window(autoencoder) -> None:
    volume = ct((17, 20, 14))
    encoded = codec.encode(autoencoder, volume)
    assert encoded.mean.shape == encoded.log_variance.shape == (4, 5, 5, 4)
    assert encoded.mean.dtype == np.float32
    padded = np.full((20, 20, 16), -1000.0, np.float32)
    padded[:17, :20, :14] = volume.array
    with torch.no_grad():
        expected = autoencoder.encode(torch.from_numpy((padded + 1000) / 2000)[None, None])
    assert np.allclose(encoded.mean, expected.mean[0], atol=3e-5)
    assert np.allclose(encoded.log_variance, expected.log_variance[0], atol=3e-5)


def test_size_and_place_survive(autoencoder) -> None:
    volume = ct((17, 20, 14))
    decoded = codec.decode(autoencoder, codec.encode(autoencoder, volume))
    assert decoded.same_grid(volume)
    assert decoded.array.dtype == np.int16


def test_any_orientation_is_encoded_as_ras(autoencoder) -> None:
    volume = ct((16, 20, 12))
    flipped = Volume(volume.array[::-1, :, ::-1].copy(), volume.affine @ np.diag([-1.0, 1, -1, 1]))
    flipped = Volume(flipped.array, _shifted(flipped.affine, volume.affine @ [15, 0, 11, 1]))
    first, second = codec.encode(autoencoder, volume), codec.encode(autoencoder, flipped)
    assert np.array_equal(first.mean, second.mean)
    assert np.allclose(first.affine, second.affine)


def _shifted(affine, origin):
    moved = affine.copy()
    moved[:, 3] = origin
    return moved


def test_values_come_back_through_an_autoencoder_that_does_nothing(autoencoder, monkeypatch) -> None:
    values = torch.linspace(-0.1, 1.1, 16**3).reshape(1, 1, 16, 16, 16)
    parts = [(0, 6, values[:, :, :6]), (6, 16, values[:, :, 6:])]
    monkeypatch.setattr(codec, "decoded", lambda network, latent, execution, axis: iter(parts))
    latent = Latent(*np.zeros((2, 4, 4, 4, 4), np.float32), np.eye(4), (16, 16, 15))
    hu = codec.decode(autoencoder, latent)
    expected = np.clip(values[0, 0].numpy(), 0, 1)[:, :, :15] * 2000 - 1000
    assert np.abs(hu.array - expected).max() <= 0.5
    assert hu.shape == (16, 16, 15)


def test_mr_is_scaled_by_percentiles_and_has_no_hu(autoencoder) -> None:
    rng = np.random.default_rng(1)
    mr = Volume.from_spacing(rng.gamma(2.0, 50.0, (16, 16, 16)).astype(np.float32), SPACING)
    louder = Volume(mr.array * 7 + 100, mr.affine)
    quiet, loud = (codec.encode(autoencoder, volume, "mri_t1") for volume in (mr, louder))
    assert np.allclose(quiet.mean, loud.mean, atol=1e-4)
    assert not np.allclose(quiet.mean, codec.encode(autoencoder, mr, "ct").mean)
    assert codec.decode(autoencoder, quiet).array.min() >= 0
    values = np.array([-0.5, 0.25, 1.5], np.float32)
    assert codec.intensities(values, "mri").tolist() == [0, 250, 1500]
    assert codec.intensities(values, "ct").tolist() == [-1000, -500, 1000]


def test_latents_of_another_autoencoder_are_refused(autoencoder) -> None:
    for shape, size in (((8, 4, 4, 4), (16, 16, 16)), ((4, 4, 4, 4), (17, 16, 16))):
        latent = Latent(*np.zeros((2, *shape), np.float32), np.eye(4), size)
        with pytest.raises(MaisiError, match="autoencoder that it was encoded with"):
            codec.decode(autoencoder, latent)


def test_too_little_memory_is_told_before_it_is_taken(autoencoder, monkeypatch) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda device: 1_000_000)
    with pytest.raises(MaisiError, match=r"encode 32 x 32 x 32 voxels takes at least .* give more memory"):
        codec.encode(autoencoder, ct((32, 32, 32)))


def test_a_full_disk_is_told_before_anything_waits_there(autoencoder, monkeypatch) -> None:
    tight = plan.foreseen(autoencoder.config, plan.Plan("encode", (96, 32, 32), 0, 12, "disk", "none"), CPU, FP32)
    monkeypatch.setattr(plan, "budget_beside", lambda *given: tight.peak_bytes)
    volume = ct((96, 32, 32))
    assert codec.encode(autoencoder, volume).mean.shape == (4, 24, 8, 8)
    monkeypatch.setattr(plan, "waiting_room", lambda processes: {"disk": 1000})
    with pytest.raises(MaisiError, match=r"feature maps must wait on disk, and 0.00 GiB are free in .*; set TMPDIR"):
        codec.encode(autoencoder, volume)


def test_parts_change_nothing(autoencoder) -> None:
    volume = ct((40, 20, 14))
    whole, small = (plan.Plan("encode", (40, 20, 16), 0, n, "device", "none", 0) for n in (1, 5))
    one, other = (codec.encode(autoencoder, volume, plan=p) for p in (whole, small))
    assert np.allclose(one.mean, other.mean, atol=1e-5)
    again = plan.Plan("decode", (40, 20, 16), 2, 3, "disk", "upsampled", 0)
    made = codec.decode(autoencoder, one, again).array.astype(int)
    assert np.abs(made - codec.decode(autoencoder, one).array).max() <= 1


def test_an_autoencoder_file_says_what_it_is(model_folder) -> None:
    loaded = codec.load_autoencoder(model_folder / "autoencoder.safetensors", "cpu", "fp32")
    assert isinstance(loaded, Autoencoder)
    assert loaded.config == AutoencoderConfig(
        channels=(8, 8, 8), num_res_blocks=(1, 1, 1), norm_groups=4, upsampling="nearest"
    )
    with pytest.raises(MaisiError, match="holds the network 'unet'"):
        codec.load_autoencoder(model_folder / "unet.safetensors")


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_what_is_no_number_is_no_image(modality: str) -> None:
    values = np.full((4, 4, 4), 0.5, np.float32)
    intensities(values, modality)
    values[1, 2, 3] = np.nan
    with pytest.raises(MaisiError, match=r"no number \(NaN\).*try --precision fp32"):
        intensities(values, modality)
