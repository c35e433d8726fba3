from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from maisi.anatomy import LUNGS, SKELETON, TUMORS, label_id, label_name
from maisi.data import quality
from maisi.data.phantom import phantom
from maisi.data.quality import (
    ORGANS,
    Finding,
    QualityRanges,
    QualityReport,
    carried_ranges,
    check,
    judge,
    medians,
    read_ranges,
)
from maisi.data.tumor_masks import grow_tumors
from maisi.errors import MaisiError
from maisi.tumors import parse_tumors
from maisi.volume import Volume

PAPER = {  # median HU of the major organs in MAISI's training data: percentile 0.5, 99.5, sigma 6 low, high
    "liver": (9.53, 162.0, -21.596464, 156.278815),
    "spleen": (16.925, 184.075, -43.133892, 177.40495),
    "pancreas": (-29.0, 145.92, -56.593825, 149.506274),
    "kidney": (-40.0, 254.62, -130.563756, 267.281635),
    "lung": (-937.0, -366.95, -1088.558384, -551.850335),
    "bone": (136.455, 551.635, 71.39902, 471.995762),
    "brain": (-951.0, 126.25, -304.820824, 369.511854),
}


@pytest.fixture(scope="module")
def trunk() -> tuple[Volume, Volume]:
    return phantom((84, 60, 72), (5.0, 5.0, 5.0), ("chest", "abdomen"), seed=1)


def found(report: QualityReport, kind: str, of: str = "") -> Finding:
    return next(finding for finding in report.findings if (finding.kind, finding.of) == (kind, of))


def changed(volume: Volume, where: np.ndarray, by: float) -> Volume:
    array = volume.array.astype(np.float32)
    array[where] += by
    return volume.with_array(array)


@pytest.mark.parametrize("organ", PAPER)
def test_ranges_are_those_of_the_paper_by_hand(organ) -> None:
    low, high, sigma_low, sigma_high = PAPER[organ]
    carried = carried_ranges().organs[organ]
    assert carried.low == pytest.approx(min(low, sigma_low))
    assert carried.high == pytest.approx(1000 if organ == "bone" else max(high, sigma_high))


def test_organs_are_those_of_the_paper() -> None:
    ids = {"liver": [1], "spleen": [3], "pancreas": [4], "kidney": [5, 14], "lung": [*range(28, 33)], "brain": [22]}
    assert {name: sorted(ORGANS[name]) for name in ids} == ids
    assert sorted(SKELETON) == [*range(33, 57), *range(63, 98), 120, 122, 127]
    assert set(SKELETON) <= set(ORGANS["bone"])
    assert carried_ranges().organs.keys() == ORGANS.keys()


def test_every_label_has_a_median_by_hand(trunk) -> None:
    image, labels = trunk
    told = medians(image, labels, 1.0)
    for id in set(np.unique(labels.array)) - {0}:
        if id in TUMORS or (labels.array == id).sum() * np.prod(image.spacing_mm) < 1000:
            assert label_name(id) not in told
        elif label_name(id) not in ORGANS:
            padded = np.pad(labels.array == id, 1)
            core = np.all([np.roll(padded, step, axis) for axis in range(3) for step in (-1, 0, 1)], axis=0)
            core = core[1:-1, 1:-1, 1:-1]
            assert told[label_name(id)] == np.median(image.array[core if core.any() else labels.array == id])
        else:
            assert told[label_name(id)] == np.median(image.array[labels.array == id])
    lungs = image.array[np.isin(labels.array, LUNGS)]
    assert told["lung"] == np.median(lungs)
    assert medians(image, labels, 1e6) == {}


def test_structures_are_judged_where_the_ranges_know_them(trunk) -> None:
    image, labels = trunk
    aorta = {"low": -50.0, "high": 400.0}
    ranges = QualityRanges(**{**carried_ranges().model_dump(), "structures": {"aorta": aorta, "prostate": aorta}})
    report = judge(image, labels, ranges)
    assert found(report, "median", "aorta").passed
    assert not any(finding.of == "prostate" for finding in report.findings)
    off = judge(changed(image, labels.array == label_id("aorta"), 500), labels, ranges)
    assert not found(off, "median", "aorta").passed
    assert not any(finding.of == "aorta" for finding in judge(image, labels).findings)
    with pytest.raises(ValueError, match="aotra"):
        QualityRanges(**{**carried_ranges().model_dump(), "structures": {"aotra": aorta}})
    with pytest.raises(ValueError, match="'aorta' ends below its start"):
        QualityRanges(**{**carried_ranges().model_dump(), "structures": {"aorta": {"low": 1, "high": 0}}})


@given(organ=st.sampled_from(sorted(PAPER)), hu=st.integers(-1024, 1200))
def test_a_median_passes_exactly_in_the_range(organ, hu) -> None:
    labels = Volume.from_spacing(np.full((6, 6, 6), ORGANS[organ][0], np.uint8), (4.0, 4.0, 4.0))
    array = np.full((6, 6, 6), hu, np.int16)
    array.flat[:100] = 3000  # a median does not mind
    carried = carried_ranges().model_copy(update={"agreement": {}})
    report = judge(labels.with_array(array), labels, carried)
    low, high, sigma_low, sigma_high = PAPER[organ]
    top = 1000 if organ == "bone" else max(high, sigma_high)
    assert found(report, "median", organ).passed == (min(low, sigma_low) <= hu <= top)
    assert {finding.of for finding in report.findings if finding.kind == "median"} == {organ}  # the absent pass


def test_a_phantom_passes_everything(trunk) -> None:
    report = check(*trunk)
    assert report.failed == ()
    assert (report.passed, report.score) == (True, 0)
    kinds = {finding.kind for finding in report.findings}
    assert kinds == set(quality.NAMES) - {"contrast"}


def test_orientation_does_not_matter(trunk) -> None:
    image, labels = (
        Volume(
            np.flip(v.array, 0).transpose(2, 0, 1),
            v.affine @ [[0, -1, 0, 83], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]],
        )
        for v in trunk
    )
    assert image.to_ras().same_grid(trunk[0])
    assert check(image, labels) == check(*trunk)


def organ_off(image: Volume, labels: Volume) -> Volume:
    return changed(image, labels.array == 1, 200)


def flat(image: Volume, labels: Volume) -> Volume:
    return image.with_array(np.where(labels.array == 1, 60, image.array))


def noise(image: Volume, labels: Volume) -> Volume:
    generator = np.random.default_rng(0)
    return image.with_array(image.array + np.where(labels.array == 1, generator.normal(0, 150, image.shape), 0))


def fog(image: Volume, labels: Volume) -> Volume:
    return changed(image, labels.array == 0, 350)


def split(image: Volume, labels: Volume) -> Volume:
    return changed(image, (np.indices(image.shape)[2] >= 40) & (labels.array > 0), 150)


def holes(image: Volume, labels: Volume) -> Volume:
    array = image.array.astype(np.float32)
    array[0, 0, 0], array[1, 1, 1] = np.nan, np.inf
    return image.with_array(array)


def beyond(image: Volume, labels: Volume) -> Volume:
    return changed(image, np.indices(image.shape).sum(axis=0) == 0, -2000)


def burnt(image: Volume, labels: Volume) -> Volume:
    return image.with_array(np.where(np.isin(labels.array, SKELETON), 1000, image.array))


def full_lungs(image: Volume, labels: Volume) -> Volume:
    return image.with_array(np.where(np.isin(labels.array, LUNGS), 30, image.array))


@pytest.mark.parametrize(
    ("spoil", "kind", "of"),
    [
        (organ_off, "median", "liver"),
        (flat, "spread", "liver"),
        (noise, "spread", "liver"),
        (fog, "stray", ""),
        (split, "seam", "Z"),
        (holes, "not finite", ""),
        (beyond, "not HU", ""),
        (burnt, "saturated", ""),
        (full_lungs, "dice", "lungs"),
    ],
)
def test_each_fault_is_found(trunk, spoil, kind, of) -> None:
    finding = found(check(spoil(*trunk), trunk[1]), kind, of)
    assert not finding.passed
    assert finding.violation > 0
    assert "but should not be" in finding.sentence
    assert found(check(*trunk), kind, of).passed


def test_padding_and_metal_of_real_scans_are_no_fault(trunk) -> None:
    image, labels = trunk
    air = labels.array == 0
    array = image.array.copy()
    array[air & (np.indices(image.shape)[1] < 8)] = -2000  # the blurred edge of the padding, had this been resampled
    array[air & (np.indices(image.shape)[1] < 7)] = -3024
    metal = np.argwhere(labels.array == 200)[:5]
    array[tuple(metal.T)] = 20_000
    assert check(image.with_array(array), labels).passed == check(image, labels).passed
    assert found(check(image.with_array(array), labels), "not HU").passed


def test_many_values_beyond_what_scanners_measure_are_no_metal(trunk) -> None:
    image, labels = trunk
    assert not found(check(image.with_array(image.array.astype(np.int32) * 5), labels), "not HU").passed


def test_a_spread_fails_at_both_ends(trunk) -> None:
    flat_one, noisy = (found(check(spoil(*trunk), trunk[1]), "spread", "liver") for spoil in (flat, noise))
    assert flat_one.value == 0
    assert noisy.value > 100


def test_tumors_stand_out_in_the_right_direction(trunk) -> None:
    image, labels = trunk
    places = np.argwhere(labels.array == 28)
    inside = (np.abs(np.indices(image.shape) - np.median(places, axis=0)[:, None, None, None]).max(axis=0) <= 2) & (
        labels.array == 28
    )
    mask = labels.with_array(np.where(inside, 23, labels.array).astype(np.uint8))
    assert not found(check(image, mask), "contrast", "lung tumor").passed
    assert found(check(changed(image, inside, 800), mask), "contrast", "lung tumor").passed
    dark = QualityRanges.model_validate(
        {**carried_ranges().model_dump(), "tumors": {"lung tumor": {"low": -100, "high": -1, "smallest": 0}}}
    )
    assert not found(check(changed(image, inside, 800), mask, dark), "contrast", "lung tumor").passed


def test_a_contrast_may_need_a_size_whatever_its_sign() -> None:
    values = {-60.0: True, -10.0: False, 0.0: False, 29.0: False, 60.0: True, 950.0: False}
    for value, passes in values.items():
        assert Finding("contrast", "bone lesion", value, -900, 900, smallest=30).passed == passes


def test_without_a_body_in_the_mask_air_is_not_judged(trunk) -> None:
    image, labels = trunk
    bare = labels.with_array(np.where(labels.array == 200, 0, labels.array))
    told = {(f.kind, f.of) for f in check(image, bare).findings}
    whole = {(f.kind, f.of) for f in check(image, labels).findings}
    assert whole - told == {("stray", ""), ("dice", "body")}


def test_without_a_mask_only_values_and_seams_are_judged(trunk) -> None:
    kinds = [finding.kind for finding in judge(trunk[0], None).findings]
    assert kinds == ["not finite", "not HU", "saturated", "seam", "seam", "seam"]
    assert [f.kind for f in judge(trunk[0], None, in_hu=False).findings] == ["not finite", "seam", "seam", "seam"]
    assert not judge(split(*trunk), None).passed


@given(st.integers(-2000, 2000), st.integers(0, 500), st.integers(1, 500))
def test_the_violation_grows_with_the_distance(low, width, further) -> None:
    near, far = (Finding("median", "liver", low + width + d, low, low + width) for d in (further, 2 * further))
    assert Finding("median", "liver", low + width / 2, low, low + width).passed
    assert 0 < near.violation < far.violation
    assert QualityReport((near,)).score <= QualityReport((far,)).score <= 10
    assert QualityReport((near, far)).score > QualityReport((near,)).score


def test_the_score_by_hand() -> None:
    report = QualityReport(
        (
            Finding("median", "liver", 150, 0, 100),  # half a range out: 1.5
            Finding("dice", "lungs", 0.4, low=0.8),  # half the bound out: 1.5
            Finding("not finite", "", 0.0, high=0.0),
            Finding("median", "spleen", 1e9, 0, 1),  # 10 at most
        )
    )
    assert report.score == pytest.approx(13)
    assert [finding.passed for finding in report.findings] == [False, False, True, False]
    told = report.as_json()
    assert told == json.loads(json.dumps(told, allow_nan=False))
    assert told["findings"][0]["sentence"] == "Liver: median HU is 150, but should not be: 0 to 100."


@pytest.mark.parametrize(
    ("image", "labels", "word"),
    [
        (lambda i, m: i, lambda i, m: m.with_array(np.zeros_like(m.array)), "empty"),
        (lambda i, m: i, lambda i, m: Volume(m.array, m.affine @ np.diag([1, 1, 1.1, 1])), "different grids"),
        (lambda i, m: i, lambda i, m: Volume(m.array[1:], m.affine), "different grids"),
        (lambda i, m: i, lambda i, m: m.with_array(m.array.astype(int) + 256), "other than ids from 0 to 255"),
        (lambda i, m: i.with_array(i.array + 1024), lambda i, m: m, "are no HU"),
        (lambda i, m: i.with_array((i.array + 1000) / 2000), lambda i, m: m, "are no HU"),
        (lambda i, m: i.with_array(np.clip(i.array // 8 + 128, 0, 255)), lambda i, m: m, "are no HU"),
        (lambda i, m: i.with_array(np.full(i.shape, np.nan)), lambda i, m: m, "holds no number"),
    ],
)
def test_what_cannot_be_compared_gets_one_sentence(trunk, image, labels, word) -> None:
    with pytest.raises(MaisiError, match=word) as caught:
        check(image(*trunk), labels(*trunk))
    assert "\n" not in str(caught.value)


def test_ranges_are_read_back_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "ranges.json"
    values = carried_ranges().model_dump(mode="json")
    file.write_text(json.dumps(values))
    assert read_ranges(file) == carried_ranges()
    faults = {
        "did you mean 'seam'": values | {"seem": 3},
        "nothing is called 'livr'": values | {"organs": {"livr": values["organs"]["liver"]}},
        "nothing is called 'wart'": values | {"tumors": {"wart": {"low": 0, "high": 1}}},
        "ends below its start": values | {"tumors": {"lung tumor": {"low": 3, "high": 1}}},
        "'organs' is missing": {"source": "me"},
    }
    for word, wrong in faults.items():
        file.write_text(json.dumps(wrong))
        with pytest.raises(MaisiError, match=word):
            read_ranges(file)
    file.write_text("{")
    with pytest.raises(MaisiError, match="not JSON"):
        read_ranges(file)
    with pytest.raises(MaisiError, match="maisi quality learn"):
        read_ranges(tmp_path / "none.json")


def test_a_tumour_that_is_missing_is_found_beside_one_that_is_there(trunk) -> None:
    image, labels = trunk
    grown, _ = grow_tumors(labels, parse_tumors(["lung:40mm", "lung:15mmx2"]), np.random.default_rng(0))
    pieces, count = ndimage.label(grown.array == 23, np.ones((3, 3, 3)))
    assert count == 3
    largest = np.bincount(pieces.ravel())[1:].argmax() + 1
    all_there = check(changed(image, grown.array == 23, 850), grown)
    one_there = check(changed(image, pieces == largest, 850), grown)
    assert found(all_there, "contrast", "lung tumor").passed
    finding = found(one_there, "contrast", "lung tumor")
    assert not finding.passed
    assert "the worst of 3" in finding.sentence


def test_edges_that_were_resampled_overshoot_a_little(trunk) -> None:
    image, labels = trunk
    few, many = (image.array.copy() for _ in range(2))
    few.reshape(-1)[::2000] = -1200
    many.reshape(-1)[::200] = -1200
    assert found(check(image.with_array(few), labels), "not HU").passed
    assert not found(check(image.with_array(many), labels), "not HU").passed
