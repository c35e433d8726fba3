from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maisi.data import quality_learning
from maisi.data.manifest import read_cases
from maisi.data.phantom import phantom
from maisi.data.prepare import prepare
from maisi.data.quality import ORGANS, Finding, QualityReport, carried_ranges, check
from maisi.data.quality_learning import PRIOR_CASES, learn, pairs_of
from maisi.errors import MaisiError
from maisi.io.nifti import write_volume
from maisi.volume import Volume


def case(seed: int) -> tuple[Volume, Volume]:
    return phantom((84, 60, 48), (5.0, 5.0, 6.0), ("abdomen",), seed)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Volume, Volume]]:
    return [case(seed) for seed in range(4)]


def learned_from(medians: list[float], monkeypatch, kind: str = "median", of: str = "liver"):
    """What `learn` makes of cases that measure so."""
    reports = iter(
        [QualityReport((Finding(kind, of, m), Finding("spread", of, 20 + i))) for i, m in enumerate(medians)]
    )
    monkeypatch.setattr(quality_learning, "check", lambda image, labels: next(reports))
    monkeypatch.setattr(quality_learning, "structure_medians", lambda image, labels, smallest_ml: {})
    nothing = Volume(np.zeros((1, 1, 1), np.uint8), np.eye(4))
    return learn([(nothing, nothing)] * len(medians), "test")


def test_a_phantom_passes_ranges_of_phantoms_and_with_a_wrong_liver_does_not(pairs) -> None:
    ranges = learn(pairs[:3], "three phantoms")
    image, labels = pairs[3]
    assert check(image, labels, ranges).failed == ()
    wrong = image.with_array(np.where(labels.array == 1, image.array + 200, image.array))
    assert [(f.kind, f.of) for f in check(wrong, labels, ranges).failed] == [("median", "liver")]
    assert ranges.organs["liver"].cases == 3
    assert ranges.organs["brain"].cases == 0
    assert ranges.organs["brain"].low == carried_ranges().organs["brain"].low


def test_many_cases_speak_for_themselves_by_hand(monkeypatch) -> None:
    medians = [float(m) for m in np.random.default_rng(0).normal(55, 8, 4000)]
    liver = learned_from(medians, monkeypatch).organs["liver"]
    assert liver.percentile_0_5 == pytest.approx(np.percentile(medians, 0.5), abs=1e-3)
    assert liver.percentile_99_5 == pytest.approx(np.percentile(medians, 99.5), abs=1e-3)
    mean, deviation = np.mean(medians), np.std(medians, ddof=1)
    assert liver.sigma_6_low == pytest.approx(mean - 3 * deviation, abs=1)
    assert liver.sigma_6_high == pytest.approx(mean + 3 * deviation, abs=1)
    assert liver.cases == 4000


def test_one_case_is_as_wide_as_the_carried_range(monkeypatch) -> None:
    liver = learned_from([50.0], monkeypatch).organs["liver"]
    known = carried_ranges().organs["liver"]
    assert liver.sigma_6_high - liver.sigma_6_low == pytest.approx(known.sigma_6_high - known.sigma_6_low, abs=0.01)
    assert liver.sigma_6_high + liver.sigma_6_low == pytest.approx(100, abs=0.01)
    assert liver.spread == (10, 40)


def test_no_range_is_of_fewer_cases_than_asked_for(pairs) -> None:
    carried = carried_ranges()
    own, shy = (learn(pairs[:2], "x", least) for least in (2, 3))
    assert own.organs["liver"].cases == 2
    assert shy.organs["liver"] == carried.organs["liver"].model_copy(update={"cases": 0})
    assert shy.tumors == {name: entry.model_copy(update={"cases": 0}) for name, entry in carried.tumors.items()}


def test_the_pooled_variance_by_hand(monkeypatch) -> None:
    liver = learned_from([40.0, 60.0], monkeypatch).organs["liver"]
    known = carried_ranges().organs["liver"]
    prior = ((known.sigma_6_high - known.sigma_6_low) / 6) ** 2
    deviation = ((PRIOR_CASES * prior + 100 + 100) / (PRIOR_CASES + 1)) ** 0.5
    assert liver.sigma_6_low == pytest.approx(50 - 3 * deviation, abs=0.01)


@given(st.lists(st.floats(-200, 400), min_size=1, max_size=30), st.sampled_from(sorted(set(ORGANS) - {"bone"})))
def test_most_cases_lie_in_their_own_range(medians, organ) -> None:
    with pytest.MonkeyPatch.context() as patch:
        learned = learned_from(medians, patch, of=organ).organs[organ]
    assert learned.sigma_6_low >= -1024
    inside = [learned.low <= m <= learned.high for m in medians]
    assert sum(not i for i in inside) <= 2


def test_labels_are_learned_of_enough_cases_by_hand(monkeypatch, pairs) -> None:
    aorta = np.random.default_rng(1).normal(140, 30, PRIOR_CASES)
    told = iter({"aorta": hu, "liver": 55.0} | ({"spleen": 50.0} if i else {}) for i, hu in enumerate(aorta))
    report = check(*pairs[0])
    monkeypatch.setattr(quality_learning, "check", lambda image, labels: report)
    monkeypatch.setattr(quality_learning, "structure_medians", lambda image, labels, smallest_ml: next(told))
    structures = learn([pairs[0]] * PRIOR_CASES, "test").structures
    assert structures.keys() == {"aorta"}
    mean, deviation = np.mean(aorta), np.std(aorta, ddof=1)
    assert structures["aorta"].low == pytest.approx(min(mean - 3 * deviation, np.percentile(aorta, 0.5)), abs=1e-3)
    assert structures["aorta"].high == pytest.approx(max(mean + 3 * deviation, np.percentile(aorta, 99.5)), abs=1e-3)
    assert structures["aorta"].cases == PRIOR_CASES


def test_contrast_is_learned_for_each_tumor(monkeypatch) -> None:
    tumors = learned_from([-40.0, -30.0, -50.0], monkeypatch, "contrast", "hepatic tumor").tumors
    assert tumors["hepatic tumor"].cases == 3
    assert tumors["hepatic tumor"].low < -50
    assert tumors["hepatic tumor"].high > -30
    assert tumors["lung tumor"].cases == 0
    assert tumors["lung tumor"].low == carried_ranges().tumors["lung tumor"].low


def test_limits_are_loosened_by_need_only(monkeypatch) -> None:
    carried = carried_ranges()
    assert learned_from([0.01], monkeypatch, "stray", "").stray_share == carried.stray_share
    assert learned_from([0.4], monkeypatch, "stray", "").stray_share == 0.5
    assert learned_from([9.0], monkeypatch, "stray", "").stray_share == 1
    assert learned_from([4.0], monkeypatch, "seam", "Y").seam == 5
    assert learned_from([0.6], monkeypatch, "dice", "lungs").agreement["lungs"] == 0.5
    assert learned_from([0.95], monkeypatch, "dice", "lungs").agreement["lungs"] == carried.agreement["lungs"]


def test_a_list_and_a_prepared_folder_tell_nearly_the_same(tmp_path: Path, pairs) -> None:
    rows = []
    for number, (image, labels) in enumerate(pairs[:2]):
        write_volume(tmp_path / f"{number}.nii.gz", image)
        write_volume(tmp_path / f"{number}-mask.nii.gz", labels)
        row = {"id": f"c{number}", "patient": f"p{number}"}
        rows.append(row | {"image": f"{number}.nii.gz", "labels": f"{number}-mask.nii.gz"})
    listed = tmp_path / "cases.json"
    listed.write_text(json.dumps({"version": 1, "cases": rows}))
    prepare(read_cases(listed), tmp_path / "prepared")
    told: list[tuple[int, int]] = []
    from_list = learn(pairs_of(listed, lambda *step: told.append(step)), "x")
    from_folder = learn(pairs_of(tmp_path / "prepared"), "x")
    assert told == [(1, 2), (2, 2)]
    sides = {split: len(list(pairs_of(tmp_path / "prepared", split=split))) for split in ("train", "validation", None)}
    assert sides["train"] + sides["validation"] == sides[None] == 2
    index = json.loads((tmp_path / "prepared" / "index.json").read_text())
    assert sides["train"] == sum(row["split"] == "train" for row in index["cases"])
    for organ in ("liver", "kidney", "bone"):
        assert from_list.organs[organ] == from_folder.organs[organ]
        assert from_list.organs[organ].cases == 2


def test_a_list_with_own_classes_and_one_with_a_ct_that_is_not_in_hu(tmp_path: Path, pairs) -> None:
    image, labels = pairs[0]
    own = labels.with_array(np.where(labels.array == 3, 150, labels.array).astype(np.uint8))
    for name, ct in (("good", image), ("off", image.with_array(np.clip((image.array + 1000) // 10, 0, 255)))):
        write_volume(tmp_path / f"{name}.nii.gz", ct)
        write_volume(tmp_path / f"{name}-mask.nii.gz", own)
        row = {"id": name, "patient": name, "image": f"{name}.nii.gz", "labels": f"{name}-mask.nii.gz"}
        values = {"version": 1, "cases": [row], "custom_labels": {"150": "stent"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    ((_, found),) = pairs_of(tmp_path / "good.json")
    assert (found.array == 150).any()
    with pytest.raises(MaisiError, match="Case off does not hold HU"):
        list(pairs_of(tmp_path / "off.json"))


def test_no_case_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MaisiError, match="no CT with a label map"):
        learn([], "cases.json")
    with pytest.raises(MaisiError, match="maisi prepare"):
        learn(pairs_of(tmp_path), "x")


@pytest.mark.realdata
def test_real_cases_pass_their_own_ranges_and_with_a_wrong_liver_do_not(tmp_path: Path, real_data: Path) -> None:
    abdomen = {"id": "abdomen", "patient": "a", "vocabulary": "totalsegmentator"}
    for key, name in (("image", "ct"), ("labels", "labels")):
        abdomen[key] = str(real_data / "totalsegmentator" / f"abdomen_pelvis_{name}.nii.gz")
    chest = {"id": "chest", "patient": "b", "image": str(real_data / "torso" / "lungpetctdx_A0002_ct.nii.gz")}
    (tmp_path / "cases.json").write_text(json.dumps({"version": 1, "cases": [abdomen, chest]}))
    pairs = list(pairs_of(tmp_path / "cases.json"))
    own = learn(pairs, "two real cases")
    assert (own.organs["liver"].cases, own.organs["lung"].cases) == (1, 2)
    for image, labels in pairs:
        assert check(image, labels, own).failed == ()
    image, labels = pairs[0]
    wrong = image.with_array(np.where(labels.array == 1, image.array + 200, image.array))
    assert ("median", "liver") in [(f.kind, f.of) for f in check(wrong, labels, own).failed]
