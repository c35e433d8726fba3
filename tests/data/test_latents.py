from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maisi.data.latents import Latent, load_latent, save_latent
from maisi.errors import MaisiError


@pytest.fixture
def latent() -> Latent:
    generator = np.random.default_rng(0)
    mean, log_variance = generator.normal(size=(2, 4, 3, 5, 2)).astype(np.float32)
    affine = np.array([[1.5, 0.1, 0, -3], [0, 1.5, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
    return Latent(mean, log_variance, affine, (11, 20, 8), "ct", {"b": "2", "a": "1"})


def test_what_is_saved_is_loaded(tmp_path: Path, latent: Latent) -> None:
    path = tmp_path / "a.safetensors"
    save_latent(path, latent)
    loaded = load_latent(path)
    np.testing.assert_array_equal(loaded.mean, latent.mean)
    np.testing.assert_array_equal(loaded.log_variance, latent.log_variance)
    np.testing.assert_array_equal(loaded.affine, latent.affine)
    assert (loaded.size, loaded.modality, loaded.notes) == (latent.size, latent.modality, latent.notes)
    np.testing.assert_allclose(loaded.spacing_mm, np.linalg.norm(latent.affine[:3, :3], axis=0))


def test_the_file_is_plain_safetensors_with_the_promised_names(tmp_path: Path, latent: Latent) -> None:
    path = tmp_path / "a.safetensors"
    save_latent(path, latent)
    tensors = load_file(path)
    assert set(tensors) == {"mean", "log_variance"}
    assert all(t.dtype == np.float32 and t.shape == (4, 3, 5, 2) for t in tensors.values())


def test_the_same_latent_gives_the_same_bytes(tmp_path: Path, latent: Latent) -> None:
    for name in ("a", "b"):
        save_latent(tmp_path / name, latent)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, latent: Latent) -> None:
    path = tmp_path / "a.safetensors"
    save_latent(path, latent)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(MaisiError, match="whole"):
        load_latent(path)


def test_foreign_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(MaisiError, match="not a latent"):
        load_latent(tmp_path / "w.safetensors")
    with pytest.raises(MaisiError, match="Cannot read"):
        load_latent(tmp_path / "none.safetensors")


def test_wrong_shapes_are_a_mistake_of_the_caller(latent: Latent) -> None:
    with pytest.raises(ValueError, match="shape"):
        Latent(latent.mean, latent.log_variance[:, 1:], latent.affine, latent.size)
    with pytest.raises(ValueError, match="float32"):
        Latent(latent.mean.astype(np.float16), latent.log_variance, latent.affine, latent.size)
