"""Ends that stream: the same image and latents as in memory, and never the whole of them there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maisi.data.latents import Latent
from maisi.errors import MaisiError
from maisi.generation import codec
from maisi.io.nifti import opened_rows, read_volume, write_slabs, write_volume
from maisi.io.slabs import Slabs
from maisi.splitting.plan import Plan
from maisi.volume import Volume

SIZE, PADDED = (38, 20, 14), (40, 20, 16)


@pytest.fixture
def autoencoder(model):
    return model.autoencoder


@pytest.fixture(params=["nii.gz", "zarr"])
def ct(request, tmp_path) -> Path:
    """Stored with two axes the other way and in another order."""
    hu = np.random.default_rng(0).integers(-1200, 1500, (20, 14, 38)).astype(np.int16)
    affine = np.array([[0, 0, -2.0, 9], [3, 0, 0, -5], [0, -1.5, 0, 7], [0, 0, 0, 1]])
    path = tmp_path / f"ct.{request.param}"
    if request.param == "zarr":
        pytest.importorskip("zarr")
    write_volume(path, Volume(hu, affine))
    return path


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("storage", ["device", "disk"])
def test_a_ct_read_in_parts_gives_the_latents_of_the_whole(autoencoder, ct, axis, storage) -> None:
    whole = codec.encode(autoencoder, read_volume(ct))
    plan = Plan("encode", PADDED, axis, 3, storage, "none", streamed=True)
    with opened_rows(ct) as rows:
        made = codec.encode_rows(autoencoder, rows, plan, {"a": "b"})
    assert made is not None
    assert made.size == whole.size == SIZE
    assert made.notes == {"a": "b"}
    np.testing.assert_array_equal(made.affine, whole.affine)
    np.testing.assert_allclose(made.mean, whole.mean, atol=1e-5)
    np.testing.assert_allclose(made.log_variance, whole.log_variance, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("parts", [1, 4])
def test_an_image_written_in_parts_has_the_bytes_of_the_whole(autoencoder, tmp_path, axis, parts) -> None:
    latent = Latent(*np.random.default_rng(1).standard_normal((2, 4, 10, 5, 4)).astype(np.float32), np.eye(4), SIZE)
    plan = Plan("decode", PADDED, axis, parts, "device", "none")
    write_volume(tmp_path / "whole.nii.gz", codec.decode(autoencoder, latent, plan))
    slabs = codec.decode_slabs(autoencoder, latent, plan)
    write_slabs(tmp_path / "slabs.nii.gz", Slabs(SIZE, latent.affine, codec.STORED, axis, slabs))
    assert (tmp_path / "slabs.nii.gz").read_bytes() == (tmp_path / "whole.nii.gz").read_bytes()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_image_written_in_parts_to_zarr_has_the_voxels_of_the_whole(autoencoder, tmp_path, axis) -> None:
    pytest.importorskip("zarr")
    affine = np.array([[0, 0, -2.0, 9], [3, 0, 0, -5], [0, -1.5, 0, 7], [0, 0, 0, 1]])
    latent = Latent(*np.random.default_rng(1).standard_normal((2, 4, 10, 5, 4)).astype(np.float32), affine, SIZE)
    plan = Plan("decode", PADDED, axis, 4, "device", "none")
    slabs = codec.decode_slabs(autoencoder, latent, plan)
    write_slabs(tmp_path / "slabs.ome.zarr", Slabs(SIZE, affine, codec.STORED, axis, slabs))
    made, whole = read_volume(tmp_path / "slabs.ome.zarr"), codec.decode(autoencoder, latent, plan)
    np.testing.assert_array_equal(made.array, whole.array)
    np.testing.assert_array_equal(made.affine, whole.affine)


def test_latents_of_another_autoencoder_are_refused_before_the_first_slab(autoencoder) -> None:
    latent = Latent(*np.zeros((2, 8, 4, 4, 4), np.float32), np.eye(4), (16, 16, 16))
    with pytest.raises(MaisiError, match="autoencoder that it was encoded with"):
        codec.decode_slabs(autoencoder, latent, Plan("decode", (16, 16, 16), 0, 1, "device", "none"))


ENDS = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from maisi.data.latents import Latent
from maisi.generation import codec
from maisi.io.nifti import opened_rows, write_slabs
from maisi.io.slabs import Slabs
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting.plan import Plan

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
network = Autoencoder(AutoencoderConfig(channels=(4, 4, 4), num_res_blocks=(0, 0, 0), norm_groups=4))

def decoded(network, latent, execution, axis):
    x, y, z = (4 * n for n in latent.shape[2:])
    for start, stop in execution.stretches(x):
        yield start, stop, torch.full((1, 1, stop - start, y, z), start / x)

def encoded(network, image, execution, axis):
    for start, stop in execution.stretches(image.size):
        mean = float(image.rows(start, stop, torch.device("cpu")).mean())
        yield start, stop, torch.full((1, 8, (stop - start) // 4, 1, 1), mean)

def there_and_back(path, x, y, z):
    latent = Latent(*np.zeros((2, 4, x // 4, y // 4, z // 4), np.float32), np.eye(4), (x, y, z))
    slabs = codec.decode_slabs(network, latent, Plan("decode", latent.size, 0, 32, "device", "none"))
    write_slabs(path, Slabs(latent.size, np.eye(4), codec.STORED, 0, slabs))
    with opened_rows(path) as rows:
        made = codec.encode_rows(network, rows, Plan("encode", latent.size, 0, 32, "device", "none", streamed=True))
    assert np.allclose(made.mean[0, ::2, 0, 0], np.arange(32) * 8 / x, atol=1e-3), made.mean[0, :, 0, 0]

codec.decoded, codec.encoded = decoded, encoded
small, large = map(Path, sys.argv[1:])
there_and_back(small, 256, 16, 16)  # loads what is loaded once
before = peak()
there_and_back(large, 256, 512, 384)
print(peak() - before)
"""


@pytest.mark.parametrize("ending", ["nii.gz", "zarr"])
def test_the_whole_image_is_never_in_memory(tmp_path, ending) -> None:
    """The ends alone, around a network that does nothing: an image of 96 MiB (as float32: 192) passes both ways."""
    pytest.importorskip("resource")
    if ending == "zarr":
        pytest.importorskip("zarr")
    command = [sys.executable, "-c", ENDS, f"small.{ending}", f"large.{ending}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 96 * 2**20  # 68 are taken; an end that held the image would take it beside those
