"""Plans: the quickest that fits, monotonic in the budget, and true: the forecast is what the tensors take."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from maisi.errors import MaisiError
from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting import plan as planning
from maisi.splitting.autoencoder import decode, encode
from maisi.splitting.execution import Recomputed
from maisi.splitting.maps import Storage, Store, Waiting
from maisi.splitting.plan import CUDA_VALUES, FIXED_BYTES, Plan, foreseen, free_on_disk, largest_tensor, make_plan

CPU = torch.device("cpu")
CONFIG = AutoencoderConfig(channels=(8, 16, 16), num_res_blocks=(1, 1, 1), norm_groups=4, upsampling="nearest")
SIZE = (80, 64, 64)


def plan(budget: float, task: str = "decode") -> Plan:
    return make_plan(CONFIG, task, SIZE, int(budget), device=CPU, dtype=torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["encode", "decode"])
def test_less_memory_more_parts_until_nothing_fits(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CPU_PART", 16 * CONFIG.channels[0])  # several parts at once, not first a whole
    first = plan(1e12, task)
    assert (first.parts, first.storage, first.recompute, first.axis) == (6, "device", "none", 0)
    found = [first]
    for percent in (80, 55, 40, 30, 20, 10):
        budget = FIXED_BYTES + (first.peak_bytes - FIXED_BYTES) * percent // 100
        try:
            found.append(plan(budget, task))
        except MaisiError:
            break
        assert found[-1].peak_bytes <= budget
    speed = [(storage, anew) for storage in ("device", "disk") for anew in ("none", "upsampled", "inner")]
    order = [(speed.index((p.storage, p.recompute)), p.parts) for p in found]
    assert order == sorted(order), "a slower way is taken before a quicker one is exhausted"
    assert found[-1].storage == "disk"
    with pytest.raises(MaisiError, match=r"takes at least .* GiB and .* give more memory"):
        plan(FIXED_BYTES, task)


def test_between_32_parts_and_one_for_each_row_lie_64() -> None:
    size = (512, 16, 16)
    many = foreseen(CONFIG, Plan("decode", size, 0, 64, "disk", "none"), CPU, torch.float32)
    found = make_plan(CONFIG, "decode", size, many.peak_bytes, device=CPU, dtype=torch.float32)
    assert (found.parts, found.storage) == (64, "disk")


def test_parts_on_a_cpu_have_few_rows_and_those_elsewhere_as_many_as_fit() -> None:
    def parts(device: str, length: int, channels: int = 64) -> int:
        config = CONFIG.model_copy(update={"channels": (channels, 64, 64)})
        size = (length, 16, 16)
        return make_plan(config, "decode", size, 10**12, device=torch.device(device), dtype=torch.float32).parts

    assert [parts("cpu", n) for n in (16, 32, 64, 128, 512, 1024)] == [1, 2, 4, 8, 32, 32]
    assert [parts("cpu", 128, channels) for channels in (8, 32, 128)] == [1, 4, 16], "wider maps, fewer rows"
    assert [parts("cuda", n) for n in (16, 512)] == [1, 1]


def test_the_refusal_names_a_budget_that_does() -> None:
    with pytest.raises(MaisiError) as refusal:
        plan(1)
    named = re.search(r"at least ([\d.]+) GiB", str(refusal.value))
    assert named is not None
    assert plan((float(named[1]) + 0.01) * 2**30).storage == "disk"


def test_on_cuda_no_tensor_has_more_values_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 channels of 2**28 voxels are 2**32 values; two parts have rows of each other, so it takes three."""
    size = (1024, 512, 512)
    monkeypatch.setattr(planning, "CPU_PART", 10**6)

    def made(device: str) -> Plan:
        return make_plan(CONFIG, "decode", size, 10**15, device=torch.device(device), dtype=torch.bfloat16)

    there = made("cuda")
    assert made("cpu").parts == 1
    assert (there.parts, there.storage) == (3, "device")
    two, three = (largest_tensor(CONFIG, replace(there, parts=n), torch.device("cuda"), torch.bfloat16) for n in (2, 3))
    assert three < CUDA_VALUES <= two


def test_what_cuda_cannot_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CUDA_VALUES", 1000)
    monkeypatch.setattr(planning, "PARTS", (1, 4))
    with pytest.raises(MaisiError, match=r"more than 1000 values, .* use a smaller size, or the CPU"):
        make_plan(CONFIG, "decode", SIZE, 10**12, device=torch.device("cuda"), dtype=torch.float32)


def test_the_longest_axis_is_cut() -> None:
    for size, axis in (((64, 64, 96), 2), ((64, 96, 96), 1), ((64, 64, 64), 0)):
        made = make_plan(CONFIG, "decode", size, 10**12, device=CPU, dtype=torch.float32)
        assert made.axis == axis


def test_an_image_that_is_pulled_is_not_counted() -> None:
    """Cut into parts, of the image (float32) only those rows are there that are asked for."""
    cut = Plan("encode", SIZE, 0, 8, "disk", "none")
    whole, pulled = (
        foreseen(CONFIG, replace(cut, streamed=streamed), CPU, torch.float32).peak_bytes for streamed in (False, True)
    )
    image = 80 * 64 * 64 * 4
    assert 0.5 * image < whole - pulled <= image


@pytest.mark.parametrize("task", ["encode", "decode"])
def test_processes_share_the_memory_and_the_rows(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CPU_PART", 10**6)  # all of them whole, to be compared

    def shared(processes: int) -> Plan:
        return make_plan(CONFIG, task, SIZE, 10**12, device=CPU, dtype=torch.float32, processes=processes)  # type: ignore[arg-type]

    one, two, five = ((shared(n).peak_bytes - FIXED_BYTES) for n in (1, 2, 5))
    assert 0.5 * one < two < 0.75 * one
    assert 0.2 * one < five < 0.5 * one
    assert "in each of 2 processes" in str(shared(2))
    assert shared(20).parts == 1
    with pytest.raises(MaisiError, match=r"21 processes cannot share 80 x 64 x 64 voxels, .* start at most 20"):
        shared(21)


@pytest.mark.parametrize(
    ("task", "processes", "upsampling", "expected"),
    [
        ("decode", 1, "trilinear", {"none", "upsampled", "inner"}),
        ("decode", 2, "trilinear", {"none"}),
        ("decode", 2, "nearest", {"none", "upsampled"}),
        ("encode", 1, "nearest", {"none", "inner"}),
        ("encode", 2, "nearest", {"none"}),
    ],
)
def test_processes_compute_nothing_anew_that_takes_two_rows_of_a_neighbour(
    task: str, processes: int, upsampling: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: set[str] = set()

    def too_much(config: AutoencoderConfig, plan: Plan, device: torch.device, dtype: torch.dtype) -> Plan:
        tried.add(plan.recompute)
        return replace(plan, peak_bytes=10**15)

    monkeypatch.setattr(planning, "foreseen", too_much)
    config = AutoencoderConfig(**CONFIG.model_dump() | {"upsampling": upsampling})
    with pytest.raises(MaisiError, match="takes at least"):
        make_plan(config, task, SIZE, 1, device=CPU, dtype=torch.float32, processes=processes)  # type: ignore[arg-type]
    assert tried == expected


def test_a_gpu_computes_all_of_the_finest_resolution_anew_before_its_maps_leave_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "PARTS", (8, 64))
    size, gpu = (512, 512, 512), torch.device("cuda")
    config = AutoencoderConfig(**CONFIG.model_dump() | {"num_res_blocks": (2, 2, 2)})
    least = {
        recompute: foreseen(config, Plan("decode", size, 0, 64, "device", recompute), gpu, torch.bfloat16).peak_bytes
        for recompute in ("inner", "finest")
    }
    assert least["finest"] < 0.9 * least["inner"]
    found = make_plan(config, "decode", size, least["finest"], device=gpu, dtype=torch.bfloat16)
    assert (found.storage, found.recompute) == ("device", "finest")
    assert "all that lies between the finest maps computed anew" in str(found)


@pytest.mark.parametrize("task", ["encode", "decode"])
def test_a_small_disk_makes_more_be_computed_anew_and_one_too_small_is_refused(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "PARTS", (8,))
    config = AutoencoderConfig(**CONFIG.model_dump() | {"num_res_blocks": (2, 2, 2)})
    least = FIXED_BYTES + (plan(1e12, task).peak_bytes - FIXED_BYTES) // 4

    def on_disk(free: int) -> Plan:
        room: dict[Storage, int] = {"disk": free}
        return make_plan(config, task, SIZE, least, device=CPU, dtype=torch.float32, room=room)  # type: ignore[arg-type]

    roomy = on_disk(10**12)
    assert (roomy.storage, roomy.recompute) == ("disk", "none")
    small = on_disk(roomy.waiting_bytes - 1)
    assert small.waiting_bytes < roomy.waiting_bytes
    while small.recompute != "inner":
        small = on_disk(small.waiting_bytes - 1)
    assert small.waiting_bytes < 0.7 * roomy.waiting_bytes
    with pytest.raises(MaisiError, match=r"must wait on disk, and [\d.]+ GiB are free in .*; set TMPDIR"):
        on_disk(small.waiting_bytes // 2)


@pytest.mark.parametrize("recompute", ["none", "upsampled", "inner", "finest"])
@pytest.mark.parametrize("task", ["encode", "decode"])
def test_as_much_waits_on_disk_as_was_foreseen(
    task: str, recompute: Recomputed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = foreseen(CONFIG, Plan(task, (40, 16, 16), 0, 5, "disk", recompute), CPU, torch.float32)  # type: ignore[arg-type]
    found = [0]
    put = Store.put

    def counted(store: Store, tensor: torch.Tensor, axis: int) -> Waiting:
        waiting = put(store, tensor, axis)
        waiting.rows(0, 1, CPU)  # which waits until all of them are written
        found.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
        return waiting

    monkeypatch.setattr(Store, "put", counted)
    model, execution = Autoencoder(CONFIG), made.execution(CPU, tmp_path)
    with torch.inference_mode():
        if task == "decode":
            decode(model, torch.randn(1, 4, 10, 4, 4), execution, 0)
        else:
            encode(model, torch.rand(1, 1, 40, 16, 16), execution, 0)
    assert max(found) == made.waiting_bytes


def test_maps_of_bfloat16_end_in_float32_with_any_number_of_channels() -> None:
    for out_channels in (1, 5):
        config = AutoencoderConfig(**CONFIG.model_dump() | {"out_channels": out_channels})
        assert make_plan(config, "decode", SIZE, 10**12, device=CPU, dtype=torch.bfloat16).peak_bytes > FIXED_BYTES


def test_a_plan_says_what_it_is() -> None:
    text = str(Plan("decode", SIZE, 2, 7, "disk", "upsampled", 3 * 2**30, 5 * 2**30))
    assert "7 parts along Z, 5.00 GiB on disk, the widest map computed anew; about 3.00 GiB" in text


def test_the_forecast_counts_what_lives_at_once() -> None:
    """By hand: a network of one convolution in float32 holds its input and its output, and here nothing else."""
    flat = AutoencoderConfig(channels=(8,), num_res_blocks=(0,), norm_groups=4)
    made = make_plan(flat, "decode", (32, 32, 32), 10**12, device=CPU, dtype=torch.float32)
    voxels = 32**3 * 4
    # latents; after the first convolution two maps of 4 channels or 4 and 8; the widest moment is norm input and output
    assert 2 * 8 * voxels <= made.peak_bytes - FIXED_BYTES <= 4 * 8 * voxels


def test_a_folder_in_memory_is_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mounted(kind: str) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(mountpoint="/", fstype="ext4"),
            SimpleNamespace(mountpoint=str(tmp_path), fstype=kind),
            SimpleNamespace(mountpoint=f"{tmp_path}/other", fstype="tmpfs"),
        ]

    (tmp_path / "below").mkdir()
    for kind, room in (("ext4", True), ("tmpfs", False), ("ramfs", False)):
        monkeypatch.setattr("psutil.disk_partitions", lambda all, kind=kind: mounted(kind))
        assert (free_on_disk(tmp_path / "below") > 0) == room
