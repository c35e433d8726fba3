"""Commands under torchrun: two processes make what one makes, one of them speaks, a lost one is told in a sentence."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maisi import cli
from maisi.cli.group import processes, speaks
from maisi.data.latents import load_latent
from maisi.errors import MaisiError
from maisi.io.nifti import read_volume, write_volume
from maisi.volume import Volume

SIZE = (30, 22, 38)


@pytest.fixture
def ct(tmp_path) -> Path:
    hu = np.random.default_rng(0).integers(-1000, 1000, SIZE).astype(np.int16)
    write_volume(tmp_path / "ct.nii.gz", Volume(hu, np.diag([-2.0, 2, 3, 1])))
    return tmp_path / "ct.nii.gz"


@pytest.fixture
def options(model_folder) -> list[str]:
    return ["--model", str(model_folder), "--device", "cpu", "--precision", "fp32"]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    order = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "maisi"]
    return subprocess.run(
        [sys.executable, *order, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=240
    )


def test_two_processes_make_what_one_makes(ct, options, tmp_path) -> None:
    z, y = tmp_path / "z.safetensors", tmp_path / "y.nii.gz"
    assert cli.run(["encode", str(ct), "-o", str(z), *options]) == 0
    assert cli.run(["decode", str(z), "-o", str(y), *options]) == 0
    shared_z, shared_y = tmp_path / "shared.safetensors", tmp_path / "shared.nii.gz"
    for command, source, out, said in (
        ("encode", ct, shared_z, f"{shared_z}: 4 x 8 x 6 x 10\n"),
        ("decode", z, shared_y, f"{shared_y}: 30 x 22 x 38\n"),
    ):
        done = torchrun(command, source, "-o", out, *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout == said
    one, two = load_latent(z), load_latent(shared_z)
    np.testing.assert_allclose(two.mean, one.mean, atol=1e-5)
    np.testing.assert_allclose(two.log_variance, one.log_variance, atol=1e-5)
    assert (two.size, two.notes) == (one.size, one.notes)
    image, shared = read_volume(y), read_volume(shared_y)
    assert shared.same_grid(image)
    assert np.abs(shared.array.astype(int) - image.array).max() <= 1
    assert not list(tmp_path.glob("*.part-*"))


DEAD = """
import os, torch.distributed as dist
dist.init_process_group("gloo")
os._exit(1)
"""


def test_a_lost_process_is_told_in_a_sentence_and_leaves_nothing(ct, options, tmp_path) -> None:
    z = tmp_path / "z.safetensors"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    group = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    other = subprocess.Popen([sys.executable, "-c", DEAD], env=group | {"RANK": "1"}, stderr=subprocess.DEVNULL)
    order = [sys.executable, "-m", "maisi", "encode", str(ct), "-o", str(z), *options]
    first = subprocess.run(order, env=group | {"RANK": "0"}, capture_output=True, text=True, check=False, timeout=240)
    other.wait()
    assert first.returncode == 2, first.stderr
    assert re.search(r"^maisi: Another process .* start all of them again\.$", first.stderr, re.MULTILINE)
    assert "Traceback" not in first.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii.gz"]


@pytest.mark.parametrize(("rank", "heard"), [("0", True), ("1", False)])
def test_of_two_that_are_refused_one_says_so(rank, heard, ct, options, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (["-o", "z.txt"], ["-o", str(tmp_path / "z.safetensors"), "--modality", "mri"], ["--wrong"]):
        assert cli.run(["encode", str(ct), *arguments, *options]) == 2
        assert bool(capsys.readouterr().err) == heard


def test_who_speaks(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some schedulers set it without a group
    assert (processes(), speaks()) == (1, True)
    monkeypatch.setenv("RANK", "3")
    assert (processes(), speaks()) == (8, False)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(MaisiError, match="WORLD_SIZE=many"):
        processes()


def test_a_disk_that_fills_while_an_image_is_written(ct, options, tmp_path, capsys) -> None:
    resource = pytest.importorskip("resource")
    z, y = tmp_path / "z.safetensors", tmp_path / "y.nii"
    assert cli.run(["encode", str(ct), "-o", str(z), *options]) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert cli.run(["decode", str(z), "-o", str(y), *options]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Cannot write" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii.gz", "z.safetensors"]
