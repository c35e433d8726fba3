import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from maisi.diffusion import DDPM, Denoiser, Process, RectifiedFlow, sample
from maisi.errors import MaisiError

DETERMINISTIC = ["ddim", "heun", "dpm++"]
ORDERS = {"ddim": 1, "heun": 2, "dpm++": 2}


def zeros(x: Tensor, times: Tensor) -> Tensor:
    return torch.zeros_like(x)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_deterministic_solvers_converge_to_the_known_solution(
    solver: str, fine_process: Process, gaussian, normal: Callable[..., Tensor]
) -> None:
    """Halving the step halves the error of a first-order solver and quarters that of a second-order one."""
    noise, denoise = normal(1, 2, 4, 4, 4), gaussian.denoiser(fine_process)
    truth = gaussian.solution(fine_process, noise)
    errors = [
        (sample(fine_process, denoise, noise, steps=steps, solver=solver) - truth).abs().max().item()
        for steps in (40, 80, 160)
    ]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert errors[-1] < (0.06 if ORDERS[solver] == 1 else 0.003)
    for order in measured:
        assert order == pytest.approx(ORDERS[solver], abs=0.45)


def test_euler_is_ddim_on_a_straight_path(gaussian, normal: Callable[..., Tensor]) -> None:
    process, noise = RectifiedFlow(), normal(2, 1, 3, 3, 3)
    results = [sample(process, gaussian.denoiser(process), noise, steps=9, solver=s) for s in (None, "euler", "ddim")]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def two_peaks(process: Process) -> Denoiser:
    """The exact denoiser of an even mixture of N(-1, 0.2^2) and N(1, 0.2^2)."""

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        alpha, sigma = process.levels_like(x, times)
        spread = alpha**2 * 0.04 + sigma**2
        share = torch.sigmoid(2 * alpha * x / spread)  # of the peak at 1
        x0 = alpha * 0.04 / spread * x + (2 * share - 1) * (1 - alpha**2 * 0.04 / spread)
        return process.target(x0, (x - alpha * x0) / sigma)

    return denoise


@pytest.mark.parametrize(("kind", "few"), [("ddpm", 20), ("rectified_flow", 30)])
def test_few_second_order_steps_come_close_to_many(kind: str, few: int, normal: Callable[..., Tensor]) -> None:
    process: Process = DDPM() if kind == "ddpm" else RectifiedFlow(timestep_transform=False)
    noise, denoise = normal(1, 1, 16, 16, 16), two_peaks(process)
    many = sample(process, denoise, noise, steps=1000, solver="ddim")
    error = {
        solver: (sample(process, denoise, noise, steps=few, solver=solver) - many).abs().mean().item()
        for solver in ("ddim", "dpm++")
    }
    assert error["dpm++"] < error["ddim"] / 3
    assert error["dpm++"] < 0.02


@pytest.mark.parametrize(("steps", "tolerance"), [(1000, 0.02), (250, 0.06)])
def test_ancestral_sampling_has_the_mean_and_spread_of_the_data(
    steps: int, tolerance: float, process: Process, gaussian, normal: Callable[..., Tensor]
) -> None:
    """Longer strides replace more of the posterior by its mean, so they lose a little spread."""
    noise = normal(2, 4, 16, 16, 8, dtype=torch.float32)
    denoise = gaussian.denoiser(process)
    x = sample(process, denoise, noise, steps=steps, solver="ancestral", generators=generators(1, 2))
    assert x.mean().item() == pytest.approx(gaussian.mean, abs=0.02)
    assert x.std().item() == pytest.approx(gaussian.deviation, rel=tolerance)
    assert abs(torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1].item()) < 0.05


@pytest.mark.parametrize("solver", ["ancestral", *DETERMINISTIC])
@pytest.mark.parametrize("temperature", [0.5, 1.25])
def test_temperature_is_the_spread_about_what_is_usual(
    solver: str, temperature: float, process: Process, gaussian, normal: Callable[..., Tensor]
) -> None:
    """For Gaussian data each value moves so much further from, or nearer to, the value that no noise ends at."""
    noise, denoise = normal(1, 4, 6, 6, 6), gaussian.denoiser(process)

    def walk(temperature: float) -> Tensor:
        return sample(
            process, denoise, noise, steps=30, solver=solver, generators=generators(3), temperature=temperature
        )

    usual, warm = walk(1.0), walk(temperature)
    middle = (warm - temperature * usual) / (1 - temperature)
    assert torch.allclose(middle, middle.mean().expand_as(middle), atol=2e-4)
    assert middle.mean().item() == pytest.approx(gaussian.mean, abs=0.1)


def test_ddim_with_eta_one_is_ancestral(process: Process, gaussian, normal: Callable[..., Tensor]) -> None:
    noise, denoise = normal(1, 2, 3, 3, 3), gaussian.denoiser(process)
    ancestral, ddim = (
        sample(process, denoise, noise, steps=20, solver=solver, eta=eta, generators=generators(4))
        for solver, eta in (("ancestral", 0.0), ("ddim", 1.0))
    )
    assert torch.equal(ancestral, ddim)


@pytest.mark.parametrize("solver", ["ancestral", *DETERMINISTIC])
def test_an_item_does_not_depend_on_its_batch(
    solver: str, process: Process, gaussian, normal: Callable[..., Tensor]
) -> None:
    noise, denoise = normal(3, 2, 4, 3, 2, dtype=torch.float32), gaussian.denoiser(process)
    batch = sample(process, denoise, noise, steps=15, solver=solver, generators=generators(10, 11, 12))
    for item in range(3):
        alone = sample(
            process,
            denoise,
            noise[item : item + 1],
            steps=15,
            solver=solver,
            generators=generators(10 + item),
        )
        assert torch.equal(alone[0], batch[item])


@pytest.mark.parametrize("solver", ["ancestral", *DETERMINISTIC])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_denoiser_that_knows_the_data_finds_it_in_any_number_of_steps(
    solver: str, steps: int, process: Process, normal: Callable[..., Tensor]
) -> None:
    data, noise = normal(1, 2, 3, 3, 3, seed=7), normal(1, 2, 3, 3, 3)

    def oracle(x: Tensor, times: Tensor) -> Tensor:
        alpha, sigma = process.levels_like(x, times)
        return process.target(data, (x - alpha * data) / sigma)

    found = sample(process, oracle, noise, steps=steps, solver=solver, generators=generators(0))
    torch.testing.assert_close(found, data, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("solver", "calls"), [("ddim", 5), ("dpm++", 5), ("heun", 9)])
def test_the_denoiser_is_asked_as_often_as_stated(solver: str, calls: int, process: Process) -> None:
    asked = []

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        assert times.shape == (2,)
        assert times.dtype == torch.float32
        asked.append(times[0].item())
        return torch.zeros_like(x)

    sample(process, denoise, torch.ones(2, 1, 4, 4, 4), steps=5, solver=solver)
    assert len(asked) == calls
    assert asked[0] == process.sampling_times(1, 64)[0].item()


def test_progress_counts_every_step(process: Process) -> None:
    seen: list[tuple[int, int]] = []
    sample(
        process,
        zeros,
        torch.ones(1, 1, 2, 2, 2),
        steps=4,
        solver="ddim",
        progress=lambda *now: seen.append(now),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_after_step_can_hold_a_known_part(process: Process, gaussian, normal: Callable[..., Tensor]) -> None:
    """With the known half put back after each step, the denoiser sees that half at its true level."""
    noise, known = normal(2, 1, 4, 4, 4), normal(2, 1, 4, 4, 4, seed=1)
    exact = gaussian.denoiser(process)
    visited: list[float] = []

    def hold(x: Tensor, times: Tensor) -> Tensor:
        visited.append(times[0].item())
        return torch.cat([process.perturb(known, noise, times)[0][..., :2], x[..., 2:]], dim=-1)

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        if visited:
            torch.testing.assert_close(x[..., :2], process.perturb(known, noise, times)[0][..., :2])
        return exact(x, times)

    sample(process, denoise, noise, steps=6, solver="ddim", after_step=hold)
    assert visited == process.sampling_times(6, 64)[1:].tolist()


def test_the_result_is_float32_without_gradient_whatever_the_denoiser_returns(process: Process) -> None:
    weight = torch.ones((), requires_grad=True)

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return (x * weight).bfloat16()

    x = sample(process, denoise, torch.ones(1, 1, 2, 2, 2, dtype=torch.bfloat16), steps=3, solver="dpm++")
    assert x.dtype == torch.float32
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("process", "options", "words"),
    [
        (DDPM(), {"solver": "plms"}, ["'plms'", "ddpm", "ancestral, ddim, dpm++, heun"]),
        (DDPM(), {"solver": "euler"}, ["'euler'", "ddpm"]),
        (RectifiedFlow(), {"solver": "dpm"}, ["rectified_flow", "euler, heun, dpm++, ddim, ancestral"]),
        (RectifiedFlow(reference_rounding=True), {"solver": "dpm++"}, ["'dpm++'", "choose one of euler."]),
        (RectifiedFlow(), {"steps": 0}, ["0 steps", "at least 1"]),
        (DDPM(), {"steps": 2000, "solver": "dpm++"}, ["2000 steps", "1 to 1000"]),
        (RectifiedFlow(), {"eta": 0.5}, ["eta", "ddim", "euler"]),
        (DDPM(), {"eta": -0.1, "solver": "ddim"}, ["eta", "0 (deterministic) to 1"]),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_the_denoiser_is_asked(
    process: Process, options: dict[str, object], words: list[str]
) -> None:
    def never(x: Tensor, times: Tensor) -> Tensor:
        raise AssertionError("asked")

    with pytest.raises(MaisiError) as error:
        sample(process, never, torch.ones(1, 1, 2, 2, 2), **({"steps": 5} | options))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("given", [None, [], [1, 2, 3]])
def test_random_solvers_want_one_generator_for_each_item(given: list[int] | None) -> None:
    sources = None if given is None else generators(*given)
    with pytest.raises(ValueError, match="one for each item"):
        sample(DDPM(), zeros, torch.ones(2, 1, 2, 2, 2), steps=2, generators=sources)
