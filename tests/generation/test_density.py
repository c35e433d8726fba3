from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.anatomy import label_id
from maisi.data.quality import Finding, QualityReport
from maisi.generation.density import MOST, STRENGTH_RANGE, TRIAL, Made, corrected, ids_of
from maisi.generation.tumor_contrast import Setting

CORD, AIRWAY, BRAIN = label_id("spinal cord"), label_id("airway"), label_id("brain")
RANGES = {"spinal cord": (-40.0, 70.0), "airway": (-1024.0, -800.0), "brain": (10.0, 60.0), "liver": (40.0, 150.0)}


def report(other: bool = False, **medians: float) -> QualityReport:
    found = {name.replace("_", " "): value for name, value in medians.items()}
    findings = [Finding("median", name, value, *RANGES[name]) for name, value in found.items()]
    return QualityReport((*findings, Finding("seam", "X", 9.0 if other else 1.0, high=3.0)))


@settings(deadline=None, max_examples=300)
@given(value=st.floats(-400, 400), slope=st.floats(5, 200), sign=st.sampled_from([1, -1]), twist=st.floats(-0.1, 0.1))
def test_two_steps_bring_a_density_into_its_range(value: float, slope: float, sign: int, twist: float) -> None:
    """Whatever a unit of strength does, if it is about in proportion and enough of it may be given."""

    def made(strength: float) -> Made:
        setting = Setting(strengthened={CORD: strength} if strength else {})
        return Made(setting, report(spinal_cord=value + sign * slope * strength * (1 + twist * strength / 20)))

    attempts = [made(0.0)]
    for _ in range(2):
        strengths = corrected(attempts)
        if strengths is None:
            break
        assert all(STRENGTH_RANGE[0] <= strength <= STRENGTH_RANGE[1] for strength in strengths.values())
        attempts.append(made(strengths.get(CORD, 0.0)))
    goal = min(max(value, -26.25), 56.25)
    reach = abs(value - goal) < 0.5 * slope * STRENGTH_RANGE[1]
    assert not reach or attempts[-1].report.passed


def test_the_first_step_is_short_and_airs_get_darker_by_strength() -> None:
    # an eighth into the range: from 90 to 56.25 HU
    assert corrected([Made(Setting(), report(spinal_cord=90))]) == {CORD: -2.81}
    assert corrected([Made(Setting(), report(spinal_cord=-145))]) == {CORD: TRIAL}
    assert corrected([Made(Setting(), report(airway=-700))]) == {AIRWAY: TRIAL}
    # from what is asked for already
    assert corrected([Made(Setting(strengthened={CORD: 3.0}), report(spinal_cord=400))]) == {CORD: 3 - TRIAL}
    assert corrected([Made(Setting(strengthened={CORD: TRIAL}), report(spinal_cord=400))]) == {}


def test_what_cannot_be_mended_so_is_left_to_other_noise() -> None:
    assert corrected([Made(Setting(), report(spinal_cord=0))]) is None
    assert corrected([Made(Setting(), report(other=True))]) is None
    assert corrected([Made(Setting(), report(other=True, spinal_cord=90))]) is None
    assert corrected([Made(Setting(), report(spinal_cord=90))], fixed=[CORD]) is None
    deaf = [Made(Setting(), report(spinal_cord=90)), Made(Setting(strengthened={CORD: -2.0}), report(spinal_cord=89))]
    assert corrected(deaf) is None
    lowest = Setting(strengthened={CORD: STRENGTH_RANGE[0]})
    assert corrected([Made(Setting(), report(spinal_cord=400)), Made(lowest, report(spinal_cord=300))]) is None


@pytest.mark.parametrize("other", [{"noise": 1}, {"mask_guidance": 0.5}])
def test_attempts_made_otherwise_teach_nothing(other) -> None:
    first = Made(Setting(**other), report(spinal_cord=90))
    second = Made(Setting(strengthened={CORD: -2.0}), report(spinal_cord=89))
    assert corrected([first, second]) == {CORD: -4.73}


def test_the_worst_are_corrected_and_no_more_than_their_number() -> None:
    failing = report(spinal_cord=90, brain=400, airway=-100)
    alike = corrected([Made(Setting(), report(spinal_cord=90, brain=400, liver=900))])
    assert alike == {BRAIN: -TRIAL, label_id("liver"): -TRIAL}
    strengths = corrected([Made(Setting(), failing)])
    assert strengths is not None
    assert set(strengths) == {BRAIN, AIRWAY}
    assert len(strengths) == MOST
    # once two are set, they stay
    later = Made(Setting(strengthened={BRAIN: -2.0, AIRWAY: 1.5}), report(spinal_cord=90, brain=30, airway=-900))
    assert corrected([Made(Setting(), failing), later]) is None


def test_organs_of_several_labels_are_moved_as_one() -> None:
    assert len(ids_of("lung")) > 1
    assert ids_of("spinal cord") == (CORD,)
    strengths = corrected([Made(Setting(), QualityReport((Finding("median", "kidney", 300.0, 0.0, 200.0),)))])
    assert strengths == dict.fromkeys(ids_of("kidney"), -TRIAL)
