from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import maisi
from maisi import cli
from maisi.data.phantom import phantom
from maisi.data.quality import carried_ranges, judge
from maisi.data.tumor_masks import grow_tumors
from maisi.errors import MaisiError
from maisi.generation import retry
from maisi.generation.output import Item
from maisi.generation.retry import best_of, count_attempts
from maisi.generation.tumor_contrast import Contrasts, Setting
from maisi.request import Request, item_seed
from maisi.tumors import parse_tumor
from maisi.volume import Volume
from maisi.weights.load import sha256

NOTHING_PASSES = carried_ranges().model_copy(update={"agreement": {}, "stray_share": 0.0, "seam": 1e-6})


@pytest.fixture(scope="module")
def chest() -> tuple[Volume, Volume]:
    return phantom((60, 44, 32), (7.0, 7.0, 7.0), ("chest",), seed=1)


def maker(chest: tuple[Volume, Volume], liver_off: list[int], masked: bool = True, modality: str = "ct"):
    """Attempt -> the phantom with so much noise in its liver; and the attempts asked for."""
    image, labels = chest
    asked: list[int] = []
    grain = np.random.default_rng(0).standard_normal(image.shape)

    def make(setting: Setting) -> Item:
        attempt = setting.noise
        asked.append(attempt)
        array = np.where(labels.array == 1, image.array + liver_off[attempt] * grain, image.array)
        request = Request.parse(seed=4, modality=modality)
        seed = item_seed(4, 2, attempt)
        timings = {"denoise": 1.0 + attempt, "total": 1.0 + attempt}
        return Item(image.with_array(array), labels if masked else None, request, 2, seed, timings, details={"a": 1})

    return make, asked


@pytest.mark.parametrize(
    ("liver_off", "retries", "attempts", "kept"),
    [
        ([0, 0, 0], 2, 1, 0),
        ([300, 0, 0], 2, 2, 1),
        ([300, 200, 400], 2, 3, 1),
        ([300, 200, 0], 1, 2, 1),
        ([300, 300, 300], 2, 3, 0),
        ([300, 0, 0], 0, 1, 0),
    ],
)
def test_the_best_attempt_is_kept(chest, liver_off, retries, attempts, kept) -> None:
    make, asked = maker(chest, liver_off)
    item = best_of(make, retries)
    assert asked == list(range(attempts))
    told = item.details["quality"]
    assert (told["attempts"], told["kept"]) == (attempts, kept)
    assert told["passed"] == (liver_off[kept] == 0)
    assert item.seed == item_seed(4, 2, kept)
    assert np.array_equal(item.image.array, make(Setting(noise=kept)).image.array)
    assert item.timings_s["denoise"] == 1 + kept
    assert item.timings_s["quality"] > 0
    assert item.details["a"] == 1


def test_the_score_kept_is_the_least_by_exhaustion(chest) -> None:
    liver_off = [int(off) for off in np.random.default_rng(0).integers(150, 900, 6)]
    make, _ = maker(chest, liver_off)
    scores = [judge(make(Setting(noise=n)).image, chest[1]).score for n in range(6)]
    told = best_of(make, 5).details["quality"]
    assert told["kept"] == int(np.argmin(scores))
    assert told["score"] == pytest.approx(min(scores), abs=1e-3)


def test_without_a_mask_it_is_judged_once(chest) -> None:
    make, asked = maker(chest, [0], masked=False)
    told = best_of(make, 10, NOTHING_PASSES).details["quality"]
    assert asked == [0]
    assert not told["passed"]
    assert {finding["kind"] for finding in told["findings"]} == {"not finite", "not HU", "saturated", "seam"}


def test_a_faint_tumour_is_made_again_from_the_same_noise_with_more_guidance(chest) -> None:
    image, labels = chest
    grown, _ = grow_tumors(labels, [parse_tumor("liver:35mm")], np.random.default_rng(0))
    asked = []

    def make(setting: Setting) -> Item:
        asked.append((round(setting.guidance, 2), setting.noise))
        host = np.median(image.array[labels.array == 1])
        faint = np.where(grown.array == 26, host - 4 * (1 + setting.guidance), image.array)
        return Item(image.with_array(faint), grown, Request.parse(seed=4), 0, item_seed(4, 0, setting.noise))

    item = best_of(make, 2, first=Setting(guidance=0.5))
    assert len(asked) == 2
    assert asked[0] == (0.5, 0)
    assert asked[1][0] > 1
    assert asked[1][1] == 0
    told = item.details
    assert (told["quality"]["kept"], told["contrast_as_usual"], round(told["guidance"], 2)) == (1, True, asked[1][0])
    assert best_of(make, 0).details["contrast_as_usual"] is False


@pytest.mark.parametrize(("halving", "asked"), [(True, [1.5, 0.75, 0.375]), (False, [1.5] * 3)])
def test_after_each_attempt_that_fails_the_label_map_guides_half_as_much(chest, halving, asked) -> None:
    make, _ = maker(chest, [300, 200, 400])
    settings = []

    def told(setting: Setting) -> Item:
        settings.append(setting)
        return make(setting)

    best_of(told, 2, first=Setting(mask_guidance=1.5), halving=halving)
    assert [setting.mask_guidance for setting in settings] == asked


def test_a_structure_too_dense_is_made_again_from_the_same_noise_towards_a_map_without_it(chest) -> None:
    image, labels = chest
    settings = []

    def make(setting: Setting) -> Item:
        settings.append(setting)
        off = 150 + 15 * setting.strengthened.get(1, 0.0)
        array = np.where(labels.array == 1, image.array + off, image.array)
        return Item(image.with_array(array), labels, Request.parse(seed=4), 0, item_seed(4, 0, setting.noise))

    first = Setting(mask_guidance=1.5)
    item = best_of(make, 3, first=first)
    assert item.details["quality"]["passed"]
    assert [(setting.noise, setting.mask_guidance) for setting in settings] == [(0, 1.5)] * len(settings)
    # the first step is a guess, the second what it showed: an eighth into the range, by hand
    normal = carried_ranges().medians["liver"]
    goal = normal.high - (normal.high - normal.low) / 8
    base = float(np.median(image.array[labels.array == 1])) + 150
    assert [setting.strengthened for setting in settings[:2]] == [{}, {1: -4.0}]
    assert len(settings) == 3
    assert settings[2].strengthened[1] == pytest.approx((goal - base) / 15, abs=0.01)
    # not where its strength was asked for
    settings.clear()
    best_of(make, 1, first=first, fixed=[1])
    assert [(setting.noise, setting.mask_guidance) for setting in settings] == [(0, 1.5), (1, 0.75)]


def test_mr_is_not_judged_as_hu(chest) -> None:
    make, _ = maker(chest, [900], modality="mri_t1")
    told = best_of(make, 0).details["quality"]
    assert {finding["kind"] for finding in told["findings"]} == {"not finite", "seam"}


def test_seeds_of_attempts_differ_and_the_first_is_the_item_s_own() -> None:
    assert item_seed(3, 5, 0) == item_seed(3, 5)
    seeds = {item_seed(seed, item, attempt) for seed in range(5) for item in range(5) for attempt in range(11)}
    assert len(seeds) == 5 * 5 * 11
    assert item_seed(5 + 7 * 2**32, 1) != item_seed(5, 7, 1)


@pytest.mark.parametrize("retries", [-1, 11, 1.5])
def test_retries_are_bounded(retries) -> None:
    with pytest.raises(MaisiError, match="retries"):
        Request.parse(retries=retries)
    assert Request.parse().retries == 2


def test_a_model_tries_again_and_repeats_itself(model, model_folder, chest_labels) -> None:
    """Random networks never pass: the item takes all its attempts, and the best is that of a search by hand."""
    job = model.job(chest_labels, seed=7, count=5, retries=1)
    among = list(model.run(job, [2, 3]))[1]
    again = maisi.load(model_folder, device="cpu", precision="fp32")
    alone = again.generate(mask=chest_labels, seed=7, item=3, retries=1)
    assert np.array_equal(among.image.array, alone.image.array)
    plan = model.prepare(job).decode
    setting, by_hand, scores = Setting(), [], []
    for _ in range(2):
        made = model._attempt(job, plan, 3, setting, lambda *told: None)
        contrasts = Contrasts.of(made.image, made.labels, {23})
        by_hand.append(made)
        report = judge(made.image, made.labels)
        assert {finding.kind for finding in report.failed} > {"median"}
        scores.append(report.score + contrasts.shortfall)
        setting = contrasts.next(setting)  # of two attempts the first has none before it
    assert not np.array_equal(by_hand[0].image.array, by_hand[1].image.array)
    kept = int(np.argmin(scores))
    assert (alone.details["quality"]["attempts"], alone.details["quality"]["kept"]) == (2, kept)
    assert alone.seed == among.seed == by_hand[kept].seed
    assert np.array_equal(alone.image.array, by_hand[kept].image.array)


def test_the_first_attempt_is_what_was_made_without_retries(model, chest_labels, monkeypatch) -> None:
    healthy = chest_labels.with_array(np.where(chest_labels.array == 23, 28, chest_labels.array).astype(np.uint8))
    first = model.generate(mask=healthy, seed=7, retries=0)
    assert first.details["quality"]["attempts"] == 1
    assert first.seed == item_seed(7, 0)
    report = judge(first.image, first.labels)
    monkeypatch.setattr(retry, "judge", lambda *told: replace(report, findings=()))
    content = model.generate(mask=healthy, seed=7)
    assert np.array_equal(content.image.array, first.image.array)
    assert content.details["quality"] == {
        **{"passed": True, "score": 0, "findings": [], "attempts": 1, "kept": 0},
        "ranges": carried_ranges().source,
    }


def test_a_model_is_judged_by_its_own_ranges_and_a_file_overrides(model_folder, chest_labels, tmp_path) -> None:
    anything = {"low": -2000, "high": 4000}
    lax = carried_ranges().model_dump(mode="json") | {"source": "lax", "structures": {"trachea": anything}}
    folder = tmp_path / "own"
    shutil.copytree(model_folder, folder)
    (folder / "ranges.json").write_text(json.dumps(lax))
    values = json.loads((folder / "model.json").read_text())
    values |= {"ranges": "ranges.json"}
    values["sha256"]["ranges.json"] = sha256(folder / "ranges.json")
    (folder / "model.json").write_text(json.dumps(values))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(lax | {"source": "other"}))
    own = maisi.load(folder, device="cpu", precision="fp32")
    told = {"mask": chest_labels, "retries": 0}
    assert own.generate(**told).details["quality"]["ranges"] == "lax"
    assert own.generate(**told, ranges=other).details["quality"]["ranges"] == "other"
    assert maisi.load(model_folder).generate(**told).details["quality"]["ranges"] == carried_ranges().source
    with pytest.raises(MaisiError, match="not JSON"):
        own.generate(**told, ranges=folder / "unet.safetensors")
    command = ["generate", "--model", str(folder), "--region", "chest", "--size", "16,16,16", "--spacing", "9,9,9"]
    assert cli.run([*command, "-o", str(tmp_path / "a")]) == 0
    assert cli.run([*command, "-o", str(tmp_path / "a"), "--ranges", str(other)]) == 2  # another order
    assert cli.run([*command, "-o", str(tmp_path / "b"), "--ranges", str(folder / "model.json")]) == 2
    assert not (tmp_path / "b").exists()
    assert json.loads((tmp_path / "a/request.json").read_text())["ranges_sha256"] == values["sha256"]["ranges.json"]


def test_progress_says_which_attempt_it_is() -> None:
    told: list[tuple[str, int, int]] = []
    attempts = count_attempts(lambda *words: told.append(words))
    for _ in range(3):
        next(attempts)("denoise", 1, 2)
    assert told == [("denoise", 1, 2), ("denoise, attempt 2", 1, 2), ("denoise, attempt 3", 1, 2)]
