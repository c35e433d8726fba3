import json

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.diffusion import DDPM, Process, RectifiedFlow, process_from_config
from maisi.errors import MaisiError

processes = st.sampled_from(
    [
        DDPM(),
        DDPM(num_train_timesteps=50, beta_start=0.01, beta_end=0.2),
        RectifiedFlow(),
        RectifiedFlow(timestep_transform=False, reference_rounding=True),
    ]
)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(lambda rest: (3, *rest))
seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=60)
@given(process=processes, shape=shapes, seed=seeds)
def test_estimate_inverts_perturb_given_the_true_target(process: Process, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    times = process.draw_times(3, 64, generator)
    x_t, target = process.perturb(x0, noise, times)
    x0_back, noise_back = process.estimate(x_t, target, times)
    torch.testing.assert_close(x0_back, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(noise_back, noise, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(process=processes, seed=seeds)
def test_an_estimate_explains_x_t_whatever_was_predicted(process: Process, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_t, prediction = (torch.randn((2, 3, 4), generator=generator, dtype=torch.float64) for _ in range(2))
    times = process.draw_times(2, 64, generator)
    x0, noise = process.estimate(x_t, prediction, times)
    torch.testing.assert_close(process.perturb(x0, noise, times)[0], x_t, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(process=processes, steps=st.integers(1, 50), voxels=st.integers(1, 10**7), even=st.booleans())
def test_sampling_times_descend_from_the_noisiest_and_steps_get_cleaner(
    process: Process, steps: int, voxels: int, even: bool
) -> None:
    times = process.sampling_times(steps, voxels, even)
    assert times.shape == (steps,)
    assert times.dtype == torch.float32
    assert times[0] in (process.num_train_timesteps, process.num_train_timesteps - 1)
    assert (times.diff() < 0).all()
    assert times[-1] >= 0
    (_, sigma), (alpha_end, sigma_end) = process.levels(times), process.step_ends(times)
    assert (sigma_end < sigma).all()
    assert (alpha_end[-1], sigma_end[-1]) == (1, 0)


@settings(deadline=None, max_examples=40)
@given(process=processes, voxels=st.integers(1, 10**7), seed=seeds)
def test_training_times_are_valid_and_repeatable(process: Process, voxels: int, seed: int) -> None:
    first, second = (process.draw_times(64, voxels, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (64,)
    assert first.dtype == torch.float32
    assert 0 <= first.min() <= first.max() <= process.num_train_timesteps


def test_coefficients_are_float32_and_keep_the_shape(process: Process) -> None:
    alpha, sigma = process.coefficients(torch.tensor([[0.0, 10.0], [500.0, 999.0]]))
    assert alpha.shape == sigma.shape == (2, 2)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert (alpha.flatten().diff() < 0).all()
    assert (sigma.flatten().diff() > 0).all()


def test_perturb_keeps_float32(process: Process) -> None:
    x0 = torch.zeros(2, 4, 2, 2, 2)
    x_t, target = process.perturb(x0, torch.ones_like(x0), torch.tensor([1.0, 999.0]))
    assert x_t.dtype == target.dtype == torch.float32
    assert x_t[0].max() < 0.06
    assert x_t[1].min() > 0.99


@settings(deadline=None, max_examples=30)
@given(process=processes)
def test_the_configuration_survives_json(process: Process) -> None:
    again = process_from_config(json.loads(json.dumps(process.config())))
    assert again == process
    assert type(again) is type(process)
    assert process.config()["kind"] == process.name


def test_processes_are_frozen(process: Process) -> None:
    with pytest.raises(pydantic.ValidationError):
        process.num_train_timesteps = 5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "dppm"}, ["'dppm'", "ddpm, rectified_flow"]),
        ({}, ["choose one of"]),
        ({"kind": "ddpm", "beta_ende": 0.1}, ["beta_ende", "did you mean 'beta_end'"]),
        ({"kind": "ddpm", "beta_start": 0.0}, ["beta_start"]),
        ({"kind": "rectified_flow", "transform_scale": -1}, ["transform_scale"]),
    ],
)
def test_wrong_configurations_say_what_is_wrong(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(MaisiError) as error:
        process_from_config(values, "model.json")
    for word in ["model.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps_are_refused(process: Process, steps: int) -> None:
    with pytest.raises(MaisiError, match=r"at least 1|1 to 1000"):
        process.sampling_times(steps, 64)
