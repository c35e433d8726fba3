"""Two and three processes compute what one does, and a lost one is told in a sentence."""

from __future__ import annotations

import itertools
import os
import socket
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting import autoencoder as split
from maisi.splitting.execution import Execution
from maisi.splitting.processes import LostProcessError, Processes, joined


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def inputs(upsampling: str = "nearest") -> tuple[Autoencoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        channels=(8, 16, 16),
        num_res_blocks=(1, 1, 1),
        norm_groups=4,
        upsampling=upsampling,  # type: ignore[arg-type]
    )
    return Autoencoder(config), torch.randn(1, 4, 7, 3, 4), torch.rand(1, 1, 28, 12, 16)


def enter(rank: int, size: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def compute(rank: int, size: int, port: int, axis: int, upsampling: str, results: object) -> None:
    enter(rank, size, port)
    model, z, x = inputs(upsampling)
    with torch.inference_mode(), joined(torch.device("cpu")) as group:
        # what is interpolated cannot be computed anew by those who share it: see plan
        execution = Execution(parts=2, group=group, recompute="none" if upsampling == "trilinear" else "upsampled")
        assert group.agreed(lambda: f"of {group.rank}") == "of 0"
        slabs = ((rows[0, 0] * 1000).short().numpy() for _, _, rows in split.decoded(model, z, execution, axis))
        passed = list(group.in_order(slabs))
        image = group.gathered(split.decode(model, z, execution, axis), 2 + axis)
        latent = group.gathered(split.encode(model, x, execution, axis).mean, 2 + axis)
        if rank == 0:
            results.put((image.numpy(), latent.numpy(), np.concatenate(passed, axis)))  # type: ignore[attr-defined, union-attr]


@pytest.mark.parametrize(("size", "axis", "upsampling"), [(2, 0, "transposed"), (3, 0, "trilinear"), (3, 1, "nearest")])
def test_processes_agree_with_one(size: int, axis: int, upsampling: str) -> None:
    """Of 7 rows, and of 3: one for each of them."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    running = mp.spawn(compute, (size, free_port(), axis, upsampling, results), nprocs=size, join=False)
    image, latent, passed = results.get()
    running.join()
    model, z, x = inputs(upsampling)
    assert np.abs(passed - image[0, 0] * 1000).max() < 1.1
    with torch.inference_mode():
        assert torch.allclose(torch.from_numpy(image), model.decode(z), atol=1e-5)
        assert torch.allclose(torch.from_numpy(latent), model.encode(x).mean, atol=1e-5)


LOST = ("at once", "in the middle", "without a word")


def lose(rank: int, size: int, port: int, how: str, results: object) -> None:
    enter(rank, size, port)
    model, z, _ = inputs()
    seconds = 3 if how == "without a word" else 20
    with joined(torch.device("cpu"), timedelta(seconds=seconds)) as group:
        if rank == 1:
            go_away(group, how)
        try:
            with torch.inference_mode():
                split.decode(model, z, Execution(group=group), 0)
        except MaisiError as error:
            results.put(str(error))  # type: ignore[attr-defined]
            os._exit(0)


def go_away(group: Processes, how: str) -> None:
    """End at once, or when rows are exchanged for the fourth time; or stay, and answer no more."""
    if how == "at once":
        os._exit(0)
    exchange, turns = group.edges, itertools.count()

    def edges(first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if next(turns) == 3:
            if how == "without a word":
                time.sleep(8)
            os._exit(0)
        return exchange(first, last)

    group.edges = edges  # type: ignore[method-assign]


@pytest.mark.parametrize("how", LOST)
def test_a_lost_process_is_told(how) -> None:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    running = mp.spawn(lose, (2, free_port(), how, results), nprocs=2, join=False)
    started = time.monotonic()
    assert "start all of them again" in results.get()
    assert time.monotonic() - started < 60
    running.join()


@pytest.mark.parametrize(
    ("said", "kind"),
    [("CUDA out of memory. Tried to allocate 2.00 GiB", RuntimeError), ("Connection reset by peer", LostProcessError)],
)
def test_memory_that_ran_out_here_is_no_lost_process(monkeypatch, said, kind) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", fails)
    with pytest.raises((RuntimeError, MaisiError)) as raised:
        Processes(torch.device("cpu")).gathered(torch.zeros(1, 1, 2), 2)
    assert type(raised.value) is kind
    assert said in str(raised.value)


def test_each_process_keeps_to_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torchrun` starts the second of two on one machine; `cuda` was numbered before it joined, as the first GPU."""
    current = [0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: current.__setitem__(0, number))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with joined(torch.device("cuda", 0)) as group:
        assert (group.device, current) == (torch.device("cuda", 1), [1])
