from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maisi.data.phantom import phantom
from maisi.data.tumor_masks import grow_tumors
from maisi.data.tumor_texture import contrasts, unlikeness, usual_contrast_hu
from maisi.generation.tumor_contrast import GUIDANCE_RANGE, Contrasts, Setting
from maisi.tumors import KINDS, parse_tumor
from maisi.volume import Volume

LIVER = KINDS["liver"]


@pytest.fixture(scope="module")
def abdomen() -> tuple[Volume, Volume]:
    """A phantom with a tumour in its liver, which looks like the liver yet."""
    image, labels = phantom((60, 50, 36), (5.0, 5.0, 5.0), ("abdomen",), seed=1)
    return image, grow_tumors(labels, [parse_tumor("liver:35mm")], np.random.default_rng(0))[0]


def shown(abdomen: tuple[Volume, Volume], hu: float) -> Volume:
    """The phantom with its tumour set to so many HU against the liver around it."""
    image, labels = abdomen
    tumor = labels.array == LIVER.id
    (found,) = contrasts(image.array, labels.array, LIVER.id, labels.spacing_mm)
    return image.with_array(np.where(tumor, found.host_hu + hu, image.array))


def test_a_contrast_is_brought_to_where_it_is_usual(abdomen) -> None:
    weak, strong, wrong = (Contrasts.of(shown(abdomen, hu), abdomen[1], {LIVER.id}) for hu in (-10, -400, 60))
    for each in (weak, strong):
        assert each.shortfall > 0
        mended = Contrasts.of(shown(abdomen, each.hu[LIVER.id] * each.ratio), abdomen[1], {LIVER.id})
        assert mended.shortfall == 0
        assert mended.ratio == 1
    assert weak.ratio > 1 > strong.ratio
    assert wrong.ratio == 0


def test_it_is_the_measure_of_the_tumour_table(abdomen) -> None:
    image, labels = shown(abdomen, -12), abdomen[1]
    found = Contrasts.of(image, labels, {LIVER.id, 23})  # no lung tumour is there
    (one,) = contrasts(image.array, labels.array, LIVER.id, labels.spacing_mm)
    assert found.hu == {LIVER.id: one.hu}
    assert found.shortfall == unlikeness(one, LIVER)
    assert found.ratio == pytest.approx(usual_contrast_hu(one, LIVER) / one.hu)
    assert found.off_hu == pytest.approx(one.hu - usual_contrast_hu(one, LIVER))
    assert Contrasts.of(image, labels, ()) == Contrasts({}, 0.0, 1.0)


@pytest.mark.parametrize(
    ("ratio", "guidance", "following"),
    [
        (0.5, 0.0, (-0.5, 3)),
        (2.0, 0.5, (2.0, 3)),
        (0.01, 0.0, (-0.8, 3)),
        (50.0, 0.0, (3.0, 3)),
        (50.0, 1.0, (6.0, 3)),
        (50.0, 6.0, (6.0, 4)),
        (0.0, 1.0, (2.5, 4)),
        (1.0, 0.5, (0.5, 4)),
    ],
)
def test_the_next_guidance_sets_the_contrast_or_other_noise_is_drawn(ratio, guidance, following) -> None:
    found = Contrasts({26: -100.0}, 0.3, ratio).next(Setting(guidance, 3))
    assert (found.guidance, found.noise) == pytest.approx(following)


@pytest.mark.parametrize(("ratio", "following"), [(0.8, -0.5), (0.5, -0.8), (2.0, 2.5)])
def test_guidance_by_the_label_map_counts_to_the_contrast(ratio, following) -> None:
    """1 + 0 + 1.5, times the ratio, is 1 + following + 1.5, as far as the range goes."""
    found = Contrasts({26: -100.0}, 0.3, ratio).next(Setting(0.0, 3, mask_guidance=1.5))
    assert (found.guidance, found.noise, found.mask_guidance) == (pytest.approx(following), 3, 1.5)


def test_guidance_away_from_the_label_map_counts_too() -> None:
    """1 + 0 - 0.8, times 3, is 0.6."""
    found = Contrasts({140: -10.0}, 0.3, 3.0).next(Setting(0.0, 3, mask_guidance=-0.8))
    assert (found.guidance, found.noise) == (pytest.approx(0.4), 3)


def test_two_attempts_show_how_far_guidance_goes(abdomen) -> None:
    """Whatever a contrast grows with, the third attempt has it where it is usual; also from a wrong sign."""
    labels = abdomen[1]

    def made(setting: Setting) -> Contrasts:
        return Contrasts.of(shown(abdomen, 5 - 180 * setting.guidance), labels, {LIVER.id})

    for guidances in ((0.0, 1.2), (1.2, 0.0), (0.05, 0.1)):
        before, now = (Setting(guidance, 2) for guidance in guidances)
        assert made(before).shortfall > 0 < made(now).shortfall
        following = made(now).next(now, [(made(before), before)])
        assert following.noise == 2
        assert made(following).shortfall == 0


@pytest.mark.parametrize(
    "change", [{"noise": 1}, {"mask_guidance": 0.5}, {"strengthened": {22: 1.0}}, {"guidance": 0.8}]
)
def test_attempts_that_differ_otherwise_show_nothing(change) -> None:
    now = Setting(0.8, 2)
    weak, strong = Contrasts({26: -10.0}, 0.3, 3.0, 20.0), Contrasts({26: -200.0}, 0.3, 0.5, -100.0)
    assert strong.next(now, [(weak, replace(Setting(0.0, 2), **change))]) == strong.next(now)
    assert strong.next(now, [(weak, Setting(0.0, 2))]) == Setting(pytest.approx(0.8 - 100 * 0.8 / 120), 2)


@given(
    ratio=st.floats(0, 100),
    guidance=st.floats(-0.8, 6),
    noise=st.integers(0, 10),
    off=st.floats(-1000, 1000),
    other=st.floats(-1000, 1000),
)
def test_no_attempt_repeats_another_and_none_leaves_the_range(ratio, guidance, noise, off, other) -> None:
    now = Setting(guidance, noise)
    following = Contrasts({26: 1.0}, 0.1, ratio, off).next(
        now, [(Contrasts({26: 1.0}, 0.1, 2.0, other), Setting(0.5, noise))]
    )
    assert following != now
    assert noise <= following.noise <= noise + 1
    assert GUIDANCE_RANGE[0] <= following.guidance <= GUIDANCE_RANGE[1]


def test_records_tell_of_tumours_alone() -> None:
    told = Contrasts({26: -41.26}, 0.0, 1.0).as_details(Setting(1.5))
    assert told == {"contrast_hu": {"26": -41.3}, "contrast_as_usual": True, "guidance": 1.5}
    assert Contrasts({}, 0.0, 1.0).as_details(Setting(1.5)) == {}
