"""Bytes counted by hand: what lives at once, what has died, and what kernels take beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting.autoencoder import decoded, encoded
from maisi.splitting.execution import Execution
from maisi.splitting.forecast import counted, forecast, scratch_of

SHAPE = (1, 4, 8, 8, 8)
BYTES = 4 * 4 * 8**3


def nothing(source: torch.Tensor, weight: torch.Tensor, result: torch.Tensor, trained: bool) -> tuple[int, int]:
    return 0, 0


def given(layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.empty(SHAPE, device="meta").contiguous(memory_format=layout)


def test_what_lives_at_once_is_the_peak() -> None:
    def run() -> None:
        x = given()
        for _ in range(5):
            x = x + 1  # the old one lives until the new one is there

    assert forecast(run, nothing) == 2 * BYTES


def test_the_largest_tensor_is_measured_in_values() -> None:
    def run() -> None:
        x = given()
        _ = (torch.cat([x, x]), x[:, :2])

    assert counted(run, nothing).largest == 2 * BYTES // 4


def test_views_cost_nothing() -> None:
    def run() -> None:
        x = given()
        _ = (x[:, :2], x.flatten(), x.transpose(1, 2))

    assert forecast(run, nothing) == BYTES


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("layout", "copies"), [(torch.contiguous_format, 2), (torch.channels_last_3d, 0)])
def test_convolutions_on_a_cpu_copy_maps_that_are_not_channels_last(
    inference: bool, layout: torch.memory_format, copies: int
) -> None:
    weight = torch.empty(4, 4, 3, 3, 3, device="meta")

    def run() -> None:
        F.conv3d(given(layout), weight, padding=1)

    with torch.inference_mode(inference), torch.no_grad():
        assert forecast(run, scratch_of(torch.device("cpu"))) == (2 + copies) * BYTES
        assert forecast(run, scratch_of(torch.device("cuda"))) == 2 * BYTES


@pytest.mark.parametrize(
    ("dtype", "stride", "copies"), [(torch.float32, 1, 0), (torch.float32, 2, 1), (torch.bfloat16, 1, 1)]
)
def test_large_float32_convolutions_take_any_layout_as_it_is(dtype: torch.dtype, stride: int, copies: int) -> None:
    weight = torch.empty(64, 64, 3, 3, 3, device="meta", dtype=dtype)
    x = torch.empty(1, 64, 8, 64, 64, device="meta", dtype=dtype)
    made = F.conv3d(x, weight, stride=stride, padding=1)

    def run() -> None:
        F.conv3d(x.contiguous(memory_format=torch.channels_last_3d).contiguous(), weight, stride=stride, padding=1)

    with torch.inference_mode():
        peak = forecast(run, scratch_of(torch.device("cpu")))
    # while the layout is changed there are two maps; then one and the result, and twice the weights at the points
    kept = 0 if copies else 2 * weight.nbytes
    assert peak == max(2 * x.nbytes, (1 + copies) * (x.nbytes + made.nbytes) + kept)


@pytest.mark.parametrize("stride", [1, 2])
def test_only_what_winograd_computes_keeps_kernels(stride: int) -> None:
    weight = torch.empty(64, 64, 3, 3, 3, device="meta")
    x = torch.empty(1, 64, 8, 64, 64, device="meta").contiguous(memory_format=torch.channels_last_3d)

    def convolve() -> None:
        F.conv3d(x, weight, stride=stride, padding=1)

    def double() -> None:
        F.conv_transpose3d(x, weight, stride=2, padding=1, output_padding=1)

    cpu, cuda = (scratch_of(torch.device(name)) for name in ("cpu", "cuda"))
    with torch.inference_mode():
        assert forecast(convolve, cpu) - forecast(convolve, cuda) == (2 * weight.nbytes if stride == 1 else 0)
        assert forecast(double, cpu) == forecast(double, cuda)


def test_what_stays_beside_weights_counts_once_and_as_long_as_they_live() -> None:
    def kept(source: torch.Tensor, weight: torch.Tensor, result: torch.Tensor, trained: bool) -> tuple[int, int]:
        return 0, 1000

    def run() -> None:
        x = given()
        weights = [torch.empty(4, 4, 1, 1, 1, device="meta") for _ in range(2)]
        for weight in weights * 3:
            F.conv3d(x, weight)

    with torch.inference_mode():
        counter = counted(run, kept)
    assert counter.peak == 2 * BYTES + 2 * (4 * 4 * 4 + 1000)
    assert counter.live == 0


@pytest.mark.parametrize(("z", "columns"), [(8, 27), (700, 27)])
def test_small_maps_in_training_are_written_out_for_the_slow_kernel(z: int, columns: int) -> None:
    """Each voxel's 27 values of each channel; what Z is does not matter, many voxels in X and Y end it."""

    def peak(shape: tuple[int, ...]) -> float:
        x = torch.empty(shape, device="meta")

        def run() -> None:
            F.conv3d(x, weight, padding=1)

        map_bytes = 4 * x.numel()
        return (forecast(run, scratch_of(torch.device("cpu"))) - map_bytes) / map_bytes

    weight = torch.empty(4, 4, 3, 3, 3, device="meta", requires_grad=True)
    assert peak((1, 4, 8, 8, z)) == columns
    assert peak((2, 4, 8, 8, z)) == peak((1, 4, 72, 72, z)) == 2


@pytest.mark.parametrize("task", [encoded, decoded])
@pytest.mark.parametrize("upsampling", ["nearest", "transposed"])
def test_in_channels_last_a_forecast_counts_what_data_take(task, upsampling) -> None:
    config = AutoencoderConfig(channels=(16, 32), num_res_blocks=(1, 1), norm_groups=8, upsampling=upsampling)
    shape = (1, 1, 32, 16, 16) if task is encoded else (1, 4, 16, 8, 8)
    peaks = []
    for device in (torch.device("cpu"), torch.device("meta")):
        with device:
            network = Autoencoder(config).bfloat16().requires_grad_(False).to(memory_format=torch.channels_last_3d)
        given = torch.zeros(shape, dtype=torch.bfloat16, device=device).contiguous(memory_format=torch.channels_last_3d)

        def run(network: Autoencoder = network, given: Tensor = given, device: torch.device = device) -> None:
            for _ in task(network, given, Execution(2, (device,)), 0):
                pass

        with torch.inference_mode():
            peaks.append(counted(run, scratch_of(torch.device("cpu"))).peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)
