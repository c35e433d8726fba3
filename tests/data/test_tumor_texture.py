from __future__ import annotations

import numpy as np
import pytest

from maisi.data.label_variants import vary_names
from maisi.data.phantom import phantom
from maisi.data.tumor_examples import inpainting_region, with_tumors
from maisi.data.tumor_masks import grow_tumors
from maisi.data.tumor_texture import Contrast, contrasts, draw_look, paint_tumors, unlikeness
from maisi.tumors import KINDS, parse_tumors


@pytest.fixture(scope="module")
def torso():
    return phantom((128, 112, 96), (2.6, 2.6, 3.5), ("chest", "abdomen"), 2)


@pytest.mark.parametrize("wish", ["liver:35mm", "lung:28mm", "kidney:24mm", "bone:20mm"])
def test_a_painted_tumour_looks_as_its_kind(torso, wish) -> None:
    image, labels = torso
    (parsed,) = parse_tumors([wish])
    kind = KINDS[parsed.kind]
    grown, _ = grow_tumors(labels, [parsed], np.random.default_rng(1))
    painted = paint_tumors(image, grown, np.random.default_rng(4))
    (measured,) = contrasts(painted.array, grown.array, kind.id, labels.spacing_mm)
    look = draw_look(kind, np.random.default_rng(4))
    low, high = look.contrast_hu or tuple(v - measured.host_hu for v in look.hu)
    # the mean without the border: partial volume and texture leave some room
    assert low - 0.25 * abs(low) - 15 <= measured.hu <= high + 0.25 * abs(high) + 15
    assert painted.array.dtype == image.array.dtype


def test_voxels_away_from_the_tumour_keep_every_bit(torso) -> None:
    image, labels = torso
    grown, _ = grow_tumors(labels, parse_tumors(["liver:30mm"]), np.random.default_rng(1))
    painted = paint_tumors(image, grown, np.random.default_rng(2))
    inside = np.argwhere(grown.array == 26)
    near = np.zeros(labels.shape, bool)
    near[tuple(slice(low - 3, high + 4) for low, high in zip(inside.min(0), inside.max(0), strict=True))] = True
    assert np.array_equal(painted.array[~near], image.array[~near])
    assert (painted.array[grown.array == 26] != image.array[grown.array == 26]).mean() > 0.9


def test_contrast_is_that_of_a_planted_step() -> None:
    labels = np.full((40, 40, 40), 1, np.uint8)
    labels[15:25, 15:25, 15:25] = 26
    image = np.where(labels == 26, 60, 100).astype(np.int16)
    (measured,) = contrasts(image, labels, 26, (1.0, 1.0, 1.0))
    assert (measured.tumor_hu, measured.host_hu, measured.hu) == (60, 100, -40)
    assert contrasts(image, labels, 24, (1, 1, 1)) == []
    assert contrasts(image, np.where(labels == 26, 26, 0).astype(np.uint8), 26, (1, 1, 1)) == []


def test_examples_have_tumours_in_image_and_labels_and_keep_the_rest(torso) -> None:
    image, labels = torso
    changed, names = with_tumors(image, labels, 3, True, np.random.default_rng(8))
    new = names != labels.array
    assert new.any()
    assert set(np.unique(names[new])) <= {kind.id for kind in KINDS.values()}
    assert (changed.array != image.array)[new].mean() > 0.5
    again = with_tumors(image, labels, 3, True, np.random.default_rng(8))
    assert np.array_equal(changed.array, again[0].array)
    assert np.array_equal(names, again[1])


def test_a_region_to_paint_holds_the_tumours_or_is_some_of_the_body() -> None:
    labels = np.full((24, 24, 24), 200, np.uint8)
    labels[10:14, 10:14, 10:14] = 26
    around = 0
    for seed in range(20):
        region = inpainting_region(labels, np.random.default_rng(seed))
        assert 0 < region.sum() < region.size
        around += bool(region[labels == 26].all()) and region.sum() < 14**3
    assert around >= 10
    assert inpainting_region(np.zeros((8, 8, 8), np.uint8), np.random.default_rng(0)).any()


def test_names_vary_but_not_what_they_stand_for() -> None:
    labels = np.full((40, 30, 30), 200, np.uint8)
    labels[3:14, 5:25, 3:27] = 28
    labels[24:36, 5:25, 3:27] = 32
    labels[18:22, 12:18] = 133
    varied = vary_names(labels, np.random.default_rng(0))
    assert set(np.unique(varied[labels == 28])) == {28, 29}
    assert set(np.unique(varied[labels == 32])) == {30, 31, 32}
    from maisi.anatomy import SKELETON

    assert set(np.unique(varied[labels == 133])) <= set(SKELETON)
    assert len(np.unique(varied[labels == 133])) > 3
    assert np.array_equal(varied == 200, labels == 200)
    # the upper lobe lies above the lower one
    heights = [np.nonzero(varied == id)[2].mean() for id in (29, 28)]
    assert heights[0] < heights[1]
    # and further to the front (+y), as the fissure falls that way
    for seed in range(20):
        varied = vary_names(labels, np.random.default_rng(seed))
        for lower, upper in ((29, 28), (32, 30)):
            assert np.nonzero(varied == lower)[1].mean() < np.nonzero(varied == upper)[1].mean()
    named = np.where(labels == 28, 29, labels)
    named[10, 10, 10] = 30
    assert set(np.unique(vary_names(named, np.random.default_rng(0))[named == 29])) == {29}


@pytest.mark.parametrize(
    ("kind", "tumor", "host", "like"),
    [
        ("liver", 60, 100, True),
        ("liver", 84, 100, True),
        ("liver", 86, 100, False),
        ("liver", 140, 100, False),
        ("liver", -120, 100, False),
        ("lung", 20, -850, True),
        ("lung", -740, -850, True),
        ("lung", -800, -850, False),
        ("bone", 100, 300, True),
        ("bone", 600, 300, True),
        ("bone", 290, 300, False),
    ],
)
def test_a_contrast_is_like_that_of_the_kind_or_not(kind, tumor, host, like) -> None:
    assert (unlikeness(Contrast(tumor, host), KINDS[kind]) == 0) is like


def test_each_tumour_is_measured_alone() -> None:
    labels = np.full((60, 40, 40), 1, np.uint8)
    labels[8:18, 15:25, 15:25] = 26
    labels[40:46, 17:23, 17:23] = 26
    labels[30, 20, 20] = 26  # a speck, which is no tumour to be seen
    image = np.full(labels.shape, 100, np.int16)
    image[8:18, 15:25, 15:25] = 60
    spacing = (1.0, 1.0, 1.0)
    assert [one.hu for one in contrasts(image, labels, 26, spacing)] == [-40, 0]
    among = np.zeros(labels.shape, bool)
    among[41, 18, 18] = True
    assert [one.hu for one in contrasts(image, labels, 26, spacing, among)] == [0]
    alone = np.where(np.arange(60)[:, None, None] == 30, labels, 1).astype(np.uint8)
    assert len(contrasts(image, alone, 26, spacing)) == 1
