from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from maisi.data.phantom import phantom
from maisi.data.quality import carried_ranges
from maisi.data.tumor_masks import grow_tumors
from maisi.errors import MaisiError
from maisi.generation.inpaint import (
    MARGIN_MM,
    Crop,
    _blend,
    _matched,
    changed_parts,
    inpaint_item,
    make_crop,
    new_labels,
    painted,
)
from maisi.generation.inpaint_job import make_inpaint_job
from maisi.generation.pipeline import Model
from maisi.generation.tumor_contrast import GUIDANCE_RANGE, Setting
from maisi.networks.controlnet import ControlNet, inpainting_mask, with_image_input
from maisi.request import Request
from maisi.tumors import parse_tumors
from maisi.volume import Volume
from maisi.weights.registry import KindPainting

LESS = KindPainting(mask_guidance=-0.8)


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def abdomen() -> tuple[Volume, Volume]:
    """Coarse along z and stored as LPS, as scans are."""
    image, labels = phantom((72, 64, 30), (4.0, 4.2, 6.0), ("abdomen",), 1)
    affine = np.diag([-4.0, -4.2, 6.0, 1.0])
    affine[:3, 3] = (140, 130, 50)
    return tuple(Volume(np.ascontiguousarray(v.array[::-1, ::-1]), affine) for v in (image, labels))


def job_of(model, abdomen, **wishes):
    image, labels = abdomen
    request = Request.parse(**{"tumor": "liver:30mm", "retries": 0, "steps": 2} | wishes)
    return make_inpaint_job(request, model.folder.config, image, labels)


@pytest.mark.parametrize("by", ["network", "rules"])
def test_outside_the_painted_region_every_bit_stays(model, abdomen, by) -> None:
    job = job_of(model, abdomen, by=by)
    item = inpaint_item(model if by == "network" else None, job, 0, silent)
    image, labels = abdomen
    tumor = item.labels.array == 26
    assert item.image.same_grid(image)
    assert item.image.array.dtype == image.array.dtype
    distance = ndimage.distance_transform_edt(~tumor, sampling=image.spacing_mm)
    far = distance > max(MARGIN_MM, 2 * max(image.spacing_mm))
    assert np.array_equal(item.image.array[far], image.array[far])
    assert (item.image.array[tumor] != image.array[tumor]).mean() > 0.5
    assert np.array_equal(item.labels.array[~tumor], labels.array[~tumor])
    assert (labels.array[tumor] == 1).all()
    assert item.details["tumors"][0]["diameter_mm"] == pytest.approx(30, rel=0.05)
    assert item.details["painted_by"] == by


def test_the_steps_are_the_models_unless_told(model, abdomen) -> None:
    def steps(told: int | None = None, **values: int) -> int:
        request = Request.parse(tumor="liver:30mm", steps=told)
        return make_inpaint_job(request, model.folder.config.model_copy(update=values), *abdomen).steps

    assert (steps(), steps(mask_steps=7), steps(mask_steps=7, inpaint_steps=9)) == (2, 7, 9)
    assert steps(3, inpaint_steps=9) == 3


def test_a_host_that_the_model_hardly_knows_is_guided_less(model, abdomen) -> None:
    image, labels = abdomen
    config = model.folder.config.model_copy(update={"inpaint_kinds": {"liver": LESS}})
    job = make_inpaint_job(Request.parse(tumor="liver:30mm"), config, image, labels)
    new, _ = new_labels(job, 0)
    tumor = new.array == 26
    (part,) = changed_parts(tumor, 5.0, labels.spacing_mm)
    assert make_crop(model, job, new, part, 5.0).job.mask_guidance == -0.8
    # taken out again, and of another kind
    removal = make_inpaint_job(Request.parse(tumor="none"), config, image, new)
    assert make_crop(model, removal, labels, part, 5.0).job.mask_guidance == -0.8
    other = labels.with_array(np.where(tumor, np.uint8(140), labels.array))
    assert make_crop(model, job, other, part, 5.0).job.mask_guidance == 0
    assert make_crop(model, job_of(model, abdomen), new, part, 5.0).job.mask_guidance == 0
    usual, less = (inpaint_item(model, replace(job, kinds=kinds), 0, silent) for kinds in ({}, {"liver": LESS}))
    assert (usual.image.array != less.image.array)[tumor].any()
    assert less.details["kinds"] == {"liver": {"mask_guidance": -0.8, "temperature": 1.0}}


def test_the_temperature_is_that_of_the_kind_unless_told(model, abdomen, monkeypatch) -> None:
    """It multiplies all noise: what painting starts from, and what the known is put back with."""
    calm = {"liver": KindPainting(temperature=0.5)}

    def made(kinds: dict[str, KindPainting], **wishes: Any) -> np.ndarray:
        job = replace(job_of(model, abdomen, retries=0, **wishes), kinds=kinds)
        return inpaint_item(model, job, 0, silent).image.array

    usual, own, told = made({}), made(calm), made({}, temperature=0.5)
    assert np.array_equal(own, told)
    assert np.array_equal(made(calm, temperature=1.0), usual)
    assert (own != usual).any()
    draw = type(model).noise

    def calmer(self: Model, *args: Any) -> Any:
        noise, generator = draw(self, *args)
        return 0.5 * noise, generator

    monkeypatch.setattr(type(model), "noise", calmer)
    assert np.array_equal(made({}), own)


def test_what_is_painted_together_is_painted_as_what_needs_most(model, abdomen) -> None:
    kinds = {"liver": KindPainting(mask_guidance=-0.8, temperature=0.5), "colon": KindPainting(mask_guidance=-0.5)}
    job = replace(job_of(model, abdomen), kinds=kinds)
    assert job.painting(["liver"]) == kinds["liver"]
    assert job.painting(["liver", "colon"]) == KindPainting(mask_guidance=-0.5)
    assert job.painting(["liver", "lung"]) == job.painting(["lung"]) == job.painting([]) == KindPainting()


def test_an_item_depends_on_seed_and_number_alone(model, abdomen) -> None:
    one = inpaint_item(model, job_of(model, abdomen, seed=4, count=5), 3, silent)
    two = inpaint_item(model, job_of(model, abdomen, seed=4), 3, silent)
    other = inpaint_item(model, job_of(model, abdomen, seed=4), 2, silent)
    assert np.array_equal(one.image.array, two.image.array)
    assert not np.array_equal(one.labels.array, other.labels.array)


def test_two_tumours_far_apart_are_painted_on_two_crops(model, abdomen) -> None:
    job = job_of(model, abdomen, tumor=["liver:20mm", "kidney:16mm"])
    labels, placed = new_labels(job, 0)
    assert [tumor.kind for tumor in placed] == ["liver", "kidney"]
    seen = []
    changed = labels.array != job.labels.array
    result = painted(model, job, labels, changed, 0, Setting(), lambda stage, done, total: seen.append((stage, total)))
    assert ("inpaint", 2) in seen
    assert (result.array != job.image.array)[labels.array == 140].any()


def test_a_crop_shows_what_lies_there(model, abdomen) -> None:
    image, labels = abdomen
    job = job_of(model, abdomen)
    new, _ = new_labels(job, 0)
    changed = new.array != labels.array
    (part,) = changed_parts(changed, 12.0, labels.spacing_mm)
    assert part.inside.sum() == changed.sum()
    crop = make_crop(model, job, new, part, 12.0)
    assert all(n % model.folder.config.size_multiple == 0 for n in crop.job.size)
    assert crop.job.labels.same_grid(crop.image)
    tumor = crop.job.labels.array == 26
    assert tumor.sum() * np.prod(crop.image.spacing_mm) == pytest.approx(
        changed.sum() * np.prod(image.spacing_mm), rel=0.15
    )
    assert crop.region[tumor].all()
    world = crop.image.affine[:3, :3] @ np.argwhere(tumor).mean(0) + crop.image.affine[:3, 3]
    wanted = image.affine[:3, :3] @ np.argwhere(changed).mean(0) + image.affine[:3, 3]
    assert np.abs(world - wanted).max() < 3


def test_removal_takes_the_tumours_out_of_the_labels(model, abdomen) -> None:
    job = job_of(model, abdomen)
    with_tumor = inpaint_item(None, job_of(model, abdomen, by="rules"), 0, silent)
    removal = make_inpaint_job(
        Request.parse(tumor="none", steps=2), model.folder.config, with_tumor.image, with_tumor.labels
    )
    item = inpaint_item(model, removal, 0, silent)
    assert np.array_equal(item.labels.array, job.labels.array)
    assert item.details["removed"] is True
    assert (item.image.array != with_tumor.image.array).any()
    with pytest.raises(MaisiError, match="no tumour to remove"):
        job_of(model, abdomen, tumor="none")
    with pytest.raises(MaisiError, match="Rules paint tumours and take none away"):
        job_of(model, abdomen, tumor="none", by="rules")


def test_parts_whose_boxes_overlap_leave_each_other_whole(model) -> None:
    ct = Volume.from_spacing(np.random.default_rng(0).normal(50, 5, (48, 48, 48)).astype(np.int16), (1.0, 1.0, 1.0))
    places = np.moveaxis(np.indices(ct.shape), 0, -1)
    balls = [np.linalg.norm(places - middle, axis=-1) <= 9 for middle in (15, 32)]
    parts = changed_parts(balls[0] | balls[1], 4.0, ct.spacing_mm)
    assert len(parts) == 2
    result = ct.array.copy()
    crop = Crop(None, ct.with_array(ct.array.astype(np.float32)), None)  # type: ignore[arg-type]
    for part in parts:
        _blend(result, ct, part, crop, np.full(ct.shape, -400, np.float32), 4.0, np.random.default_rng(1))
    assert all((result[ball] < -300).all() for ball in balls)


def test_fractions_of_hu_are_told_and_the_item_is_no_synthetic_one(model, abdomen) -> None:
    image, labels = abdomen
    request, config = Request.parse(tumor="liver:30mm", by="rules", retries=0), model.folder.config
    whole = image.with_array(image.array.astype(np.float32))
    assert make_inpaint_job(request, config, whole, labels).notes == ()
    job = make_inpaint_job(request, config, image.with_array(whole.array + 0.25), labels)
    assert job.notes == ("The CT holds fractions of HU, which are rounded when it is written.",)
    assert inpaint_item(None, job, 0, silent).synthetic is False


def test_an_item_keeps_the_names_of_the_models_own_classes(model, abdomen) -> None:
    image, labels = abdomen
    own = labels.with_array(np.where(labels.array == 3, 150, labels.array).astype(np.uint8))
    config = model.folder.config.model_copy(update={"custom_labels": {150: "stent"}})
    job = make_inpaint_job(Request.parse(tumor="liver:30mm", by="rules", retries=0), config, image, own)
    assert inpaint_item(None, job, 0, silent).custom_labels == {150: "stent"}


def test_attempts_are_bounded_and_the_best_is_kept(model, abdomen) -> None:
    item = inpaint_item(model, job_of(model, abdomen, retries=2, guidance=0.5), 1, silent)
    assert 1 <= item.details["attempts"] <= 3
    low, high = GUIDANCE_RANGE
    assert low <= item.details["guidance"] <= high
    alone = inpaint_item(model, job_of(model, abdomen, retries=0, guidance=0.5), 1, silent)
    assert np.array_equal(item.labels.array, alone.labels.array)


def test_bad_orders_are_refused_before_any_network(model, abdomen) -> None:
    image, labels = abdomen
    config = model.folder.config
    shifted = Volume(labels.array, labels.affine + np.array([[0, 0, 0, 9.0]] + [[0.0] * 4] * 3))
    for wishes, ct, mask, sentence in (
        ({}, image, labels, "No tumour is asked for"),
        ({"tumor": "liver:25mm"}, None, labels, "no CT to paint into"),
        ({"tumor": "liver:25mm"}, image.with_array(image.array + 1024), labels, "offset by 1024; subtract that"),
        ({"tumor": "liver:25mm"}, image, shifted, "lie on different grids"),
        ({"tumor": "liver:190mm"}, image, labels, "ask for at most"),
        (
            {"tumor": "lung:9mm"},
            image,
            labels.with_array(np.where(labels.array == 1, 1, 200).astype(np.uint8)),
            "grows",
        ),
    ):
        with pytest.raises(MaisiError, match=sentence):
            make_inpaint_job(Request.parse(**wishes), config, ct, mask)


def test_a_network_that_looks_at_the_image_starts_as_one_that_does_not(model) -> None:
    import torch

    plain = model.folder.load("controlnet")
    assert isinstance(plain, ControlNet)
    wider = with_image_input(plain).eval()
    generator = torch.Generator().manual_seed(0)
    x, bits = torch.randn(1, 4, 8, 8, 4, generator=generator), torch.ones(1, 8, 32, 32, 16)
    image, region = torch.rand(1, 1, 32, 32, 16, generator=generator), torch.zeros(1, 1, 32, 32, 16)
    region[..., 4:9] = 1
    told = inpainting_mask(bits, image, region)
    assert torch.equal(told[:, 8:9] * region, torch.zeros_like(region))
    times, modality = torch.tensor([400.0]), torch.tensor([1])
    with torch.no_grad():
        a, b = plain(x, times, bits, modality=modality), wider(x, times, told, modality=modality)
        c = wider(x, times, inpainting_mask(bits), modality=modality)
    assert torch.allclose(a.middle, b.middle, atol=1e-6)
    assert torch.allclose(a.middle, c.middle, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), margin=st.floats(1, 8))
def test_parts_cover_what_changed_and_keep_their_distance(seed, margin) -> None:
    changed = np.random.default_rng(seed).random((20, 18, 16)) > 0.997
    parts = changed_parts(changed, margin, (1.0, 1.5, 2.0))
    again = np.zeros_like(changed)
    for part in parts:
        assert not (again[part.box] & part.inside).any()
        again[part.box] |= part.inside
        rest = changed.copy()
        rest[part.box] &= ~part.inside
        if rest.any():
            away = ndimage.distance_transform_edt(~rest, sampling=(1.0, 1.5, 2.0))
            assert away[part.box][part.inside].min() > margin
    assert np.array_equal(again, changed)


def test_ranges_of_real_tumours_decide_on_attempts_too(model, abdomen, tmp_path) -> None:
    """Contrasts painted by rule are usual; ranges that say otherwise have all attempts made, if real cases say so."""
    ranges = carried_ranges().model_dump(mode="json") | {"source": "x"}
    ranges["tumors"]["hepatic tumor"] = {"low": 200, "high": 300}
    request = {"tumor": "liver:30mm", "retries": 2, "by": "rules"}

    def made(cases: int | None):
        ranges["tumors"]["hepatic tumor"]["cases"] = cases
        path = tmp_path / f"{cases}.json"
        path.write_text(json.dumps(ranges))
        job = make_inpaint_job(Request.parse(**request, ranges=path), model.folder.config, *abdomen)
        return inpaint_item(None, job, 0, silent)

    told = made(12)
    assert told.details["attempts"] == 3
    finding = told.details["quality"]["findings"][0]
    assert (finding["of"], finding["passed"], finding["low"]) == ("hepatic tumor", False, 200)
    assert finding["value"] == pytest.approx(told.details["contrast_hu"]["26"], abs=0.1)
    free = made(0)
    assert (free.details["attempts"], free.details["quality"]["findings"]) == (1, [])


def test_labels_whose_sides_are_swapped_are_refused(model, abdomen) -> None:
    image, labels = abdomen
    mirrored = labels.with_array(np.ascontiguousarray(labels.array[::-1]))
    with pytest.raises(MaisiError, match=r"mirrored|swapped"):
        job_of(model, (image, mirrored))


def test_labels_stored_along_other_axes_are_brought_to_the_ct(model, abdomen) -> None:
    image, labels = abdomen
    turned = labels.to_ras()
    assert not turned.same_grid(image)
    assert (job_of(model, (image, turned)).labels.array == labels.array).all()
    shifted = Volume(labels.array, labels.affine + np.array([[0, 0, 0, 2.0]] + [[0.0] * 4] * 3))
    with pytest.raises(MaisiError, match=r"CT \(.*from 140, 130, 50, LPS\) and labels \(.*from 142, 130, 50, LPS\)"):
        job_of(model, (image, shifted))


def test_a_ct_that_its_file_cannot_hold_is_refused_before_any_network(model, abdomen) -> None:
    image, labels = abdomen
    array = image.array.astype(np.int32)
    array[3, 3, 3] = 60_000
    with pytest.raises(MaisiError, match=r"from -\d+ to 60000, more than files of CT"):
        job_of(model, (image.with_array(array), labels))


def padded(image: Volume, labels: Volume, value: int) -> Volume:
    """The CT with its scan cut through the body, a third of the way into it."""
    columns = np.flatnonzero((labels.array > 0).any(axis=(1, 2)))
    array = image.array.copy()
    array[: columns[0] + (columns[-1] - columns[0]) // 3] = value
    return image.with_array(array)


@pytest.mark.parametrize("by", ["network", "rules"])
def test_padding_is_left_alone_and_does_not_matter(model, abdomen, by) -> None:
    image, labels = abdomen
    made = {}
    for value in (-1100, -3024, -32768):
        job = job_of(model, (padded(image, labels, value), labels), by=by)
        assert any("padding" in note for note in job.notes)
        item = inpaint_item(model if by == "network" else None, job, 0, silent)
        padding = job.image.array == value
        assert (item.image.array[padding] == value).all()
        assert not (item.labels.array[padding] > 0).any()
        made[value] = np.where(padding, 0, item.image.array)
    assert np.array_equal(made[-1100], made[-3024])
    assert np.array_equal(made[-1100], made[-32768])


def test_metal_beside_what_is_painted_stays(model, abdomen) -> None:
    image, labels = abdomen
    tumor = new_labels(job_of(model, abdomen), 0)[0].array == 26
    beside = ~tumor & (ndimage.distance_transform_edt(~tumor, sampling=image.spacing_mm) < 14)
    metal = beside & (np.indices(image.shape).sum(axis=0) % 3 == 0)
    job = job_of(model, (image.with_array(np.where(metal, np.int16(3071), image.array)), labels))
    made = inpaint_item(model, job, 0, silent).image.array
    assert (made[metal] == 3071).all()
    assert (made[tumor] != image.array[tumor]).mean() > 0.5


@pytest.mark.parametrize("disturbance", [3071, 20_000, -3024, -32768])
def test_what_networks_cannot_know_shifts_nothing(model, abdomen, disturbance) -> None:
    """Networks that are right as far as their window reaches are not corrected."""
    _, labels = abdomen
    job = job_of(model, abdomen)
    new, _ = new_labels(job, 0)
    (part,) = changed_parts(new.array != labels.array, MARGIN_MM, labels.spacing_mm)
    crop = make_crop(model, job, new, part, MARGIN_MM)
    known = crop.image.array.copy()
    known[~crop.region & (np.indices(known.shape).sum(axis=0) % 4 == 0)] = disturbance
    crop = replace(crop, image=crop.image.with_array(known))
    decoded = np.clip(known, -1000, 1000)
    assert np.abs(_matched(decoded, crop) - decoded)[crop.region].max() < 1e-3
    assert _matched(decoded - 30, crop)[crop.region] == pytest.approx(decoded[crop.region], abs=1)


def test_a_tumour_smaller_than_the_crops_voxels_is_in_the_crop(model) -> None:
    config = model.folder.config.model_copy(update={"crop_spacing_mm": (4.0, 8.0)})
    shown = SimpleNamespace(folder=SimpleNamespace(config=config))
    labels = Volume.from_spacing(np.ones((40, 36, 30), np.uint8), (1.0, 1.0, 1.2))
    image = labels.with_array(np.where(np.arange(30) < 2, -1000, 60) + np.zeros(labels.shape, np.int16))
    for number in range(8):
        x, y, z = 9 + number, 12 + number, 8 + 2 * number
        array = labels.array.copy()
        array[x, y, z] = 26
        (part,) = changed_parts(array == 26, MARGIN_MM, labels.spacing_mm)
        job = job_of(model, (image, labels), tumor="liver:4mm")
        crop = make_crop(shown, job, labels.with_array(array), part, MARGIN_MM)
        seen = np.argwhere(crop.job.labels.array == 26)
        assert len(seen) == 1
        there = crop.image.affine[:3, :3] @ seen[0] + crop.image.affine[:3, 3]
        wanted = labels.affine[:3, :3] @ (x, y, z) + labels.affine[:3, 3]
        assert np.abs(there - wanted).max() <= 2.001
        assert crop.region[tuple(seen[0])]


def test_contrast_is_that_of_the_new_tumour_alone(model, abdomen) -> None:
    image, labels = abdomen
    old, _ = grow_tumors(labels, parse_tumors(["liver:30mm"]), np.random.default_rng(3))
    job = job_of(model, (image, old), tumor="liver:15mm", by="rules", retries=2)  # the old one looks like the liver
    item = inpaint_item(None, job, 0, silent)
    assert item.details["contrast_as_usual"]
    assert item.details["attempts"] == 1
    assert item.details["contrast_hu"]["26"] < -15


def test_painted_voxels_are_those_that_differ_in_the_file(model, abdomen) -> None:
    image, labels = abdomen
    exact = image.with_array(image.array.astype(np.float32))
    item = inpaint_item(None, job_of(model, (exact, labels), by="rules"), 0, silent)
    assert item.details["painted_voxels"] == np.count_nonzero(np.rint(item.image.array) != image.array)


@pytest.mark.parametrize(
    "wishes",
    [
        {"keep": "liver"},
        {"anatomy_size": {"liver": 0.5}},
        {"size": (32, 32, 32)},
        {"mask_guidance": 2.0},
        {"strengthen": {"liver": 2.0}},
        {"structure": "liver"},
        {"fov": "auto", "region": "abdomen"},
    ],
)
def test_wishes_that_inpainting_has_no_use_for_are_refused(model, abdomen, wishes) -> None:
    with pytest.raises(MaisiError, match=f"Inpainting has no use for {next(iter(wishes))}"):
        job_of(model, abdomen, **wishes)
