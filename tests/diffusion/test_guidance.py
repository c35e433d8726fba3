import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maisi.diffusion import guided, noisier
from maisi.diffusion.guidance import NOISIER, NOISIEST_SHARE
from maisi.errors import MaisiError

X, TIMES = torch.linspace(-1, 1, 24).reshape(2, 3, 4), torch.tensor([10.0, 900.0])


def conditional(x: Tensor, times: Tensor) -> Tensor:
    return 2 * x + times[:, None, None] / 1000


def unconditional(x: Tensor, times: Tensor) -> Tensor:
    return x - 1


@settings(deadline=None)
@given(scale=st.floats(-6, 20), shares=st.floats(0, 1))
def test_guidance_is_linear_in_the_scale(scale: float, shares: float) -> None:
    ends = [guided(conditional, (unconditional, s))(X, TIMES) for s in (0.0, scale)]
    between = guided(conditional, (unconditional, shares * scale))(X, TIMES)
    torch.testing.assert_close(between, torch.lerp(ends[0], ends[1], shares), rtol=1e-4, atol=1e-4)


def test_guidance_moves_away_from_the_unconditional() -> None:
    guess = guided(conditional, (unconditional, 3.0))(X, TIMES)
    torch.testing.assert_close(guess, 4 * conditional(X, TIMES) - 3 * unconditional(X, TIMES))


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_equal_branches_make_guidance_vanish(scale: float) -> None:
    torch.testing.assert_close(guided(conditional, (conditional, scale))(X, TIMES), conditional(X, TIMES))


def test_guidance_away_from_two_adds_up() -> None:
    wanted = conditional(X, TIMES)
    expected = wanted + 3 * (wanted - unconditional(X, TIMES)) - 0.5 * (wanted - X)
    guess = guided(conditional, (unconditional, 3.0), (lambda x, times: x, -0.5))(X, TIMES)
    torch.testing.assert_close(guess, expected)


def test_scale_zero_asks_the_conditional_alone() -> None:
    def never(x: Tensor, times: Tensor) -> Tensor:
        raise AssertionError("the unconditional branch was asked")

    assert torch.equal(guided(conditional, (never, 0))(X, TIMES), conditional(X, TIMES))


@pytest.mark.parametrize("scale", [float("-inf"), float("nan"), float("inf")])
def test_meaningless_scales_are_refused(scale: float) -> None:
    with pytest.raises(MaisiError, match="guidance scale"):
        guided(conditional, (unconditional, scale))


def test_scale_minus_one_is_the_unconditional_alone() -> None:
    torch.testing.assert_close(guided(conditional, (unconditional, -1.0))(X, TIMES), unconditional(X, TIMES))


def test_a_weaker_self_is_told_more_noise_but_no_more_than_there_can_be() -> None:
    weaker = noisier(conditional, 1000.0)
    for told, meant in ((10.0, 10 * NOISIER), (800.0, 1000.0), (NOISIEST_SHARE * 1000, 1000.0)):
        seen = weaker(X, torch.tensor([10.0, told]))
        assert seen is not None
        torch.testing.assert_close(seen, conditional(X, torch.tensor([10 * NOISIER, meant])))


def test_in_nearly_pure_noise_there_is_no_weaker_self_and_no_network_runs_for_it() -> None:
    asked = []

    def watched(x: Tensor, times: Tensor) -> Tensor:
        asked.append(times)
        return conditional(x, times)

    noise = torch.tensor([950.0, 1000.0])
    assert noisier(watched, 1000.0)(X, noise) is None
    assert torch.equal(guided(watched, (noisier(watched, 1000.0), 2.0))(X, noise), conditional(X, noise))
    assert len(asked) == 1


def test_each_item_of_a_batch_has_the_weaker_self_of_its_own_time() -> None:
    guess = guided(conditional, (noisier(conditional, 1000.0), 2.0))
    both = guess(X, torch.tensor([400.0, 950.0]))
    for item, time in enumerate((400.0, 950.0)):
        torch.testing.assert_close(both[item], guess(X, torch.full((2,), time))[item])


def test_a_denoiser_that_does_not_look_at_the_time_has_no_weaker_self() -> None:
    assert torch.equal(guided(unconditional, (noisier(unconditional, 1000.0), 2.0))(X, TIMES), unconditional(X, TIMES))
