from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from maisi.anatomy import BODY
from maisi.data.phantom import phantom
from maisi.data.tumor_masks import KEPT, deform_tumor, deform_tumors, equivalent_diameter_mm, grow_tumors, with_hosts
from maisi.errors import MaisiError
from maisi.tumors import KINDS, TumorWish, parse_tumors
from maisi.volume import Volume

WITH_EVERY_HOST = ("liver:24mm", "pancreas:12mm", "lung:12mm", "colon:14mm", "bone:10mm", "kidney:16mm")


@pytest.fixture(scope="module")
def torso() -> Volume:
    return phantom((128, 112, 96), (2.6, 2.6, 3.5), ("chest", "abdomen"), 2)[1]


def ball_host(radius_mm: float = 30, spacing=(2.0, 2.5, 3.0), size=(40, 32, 28)) -> Volume:
    """A liver like a ball in a body that fills the map."""
    steps = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing, strict=True)]
    x, y, z = np.meshgrid(*steps, indexing="ij")
    array = np.where(x**2 + y**2 + z**2 <= radius_mm**2, 1, BODY).astype(np.uint8)
    return Volume.from_spacing(array, spacing)


@pytest.mark.parametrize("wish", WITH_EVERY_HOST)
def test_a_tumour_has_its_size_stays_in_its_host_and_is_one_piece(torso, wish) -> None:
    kind = KINDS[parse_tumors([wish])[0].kind]
    grown, placed = grow_tumors(torso, parse_tumors([wish]), np.random.default_rng(5))
    new = grown.array != torso.array
    assert (grown.array[new] == kind.id).all()
    assert np.isin(torso.array[new], kind.hosts).all()
    assert ndimage.label(new)[1] == 1
    diameter = equivalent_diameter_mm(int(new.sum()), torso.spacing_mm)
    assert diameter == pytest.approx(placed[0].diameter_mm, abs=1e-3)
    assert diameter == pytest.approx(placed[0].asked_mm, rel=0.05)
    assert placed[0].volume_ml == pytest.approx(math.pi / 6 * diameter**3 / 1000, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), diameter=st.floats(6, 60), count=st.integers(1, 4))
def test_growth_is_bounded_and_never_leaves_the_host(seed, diameter, count) -> None:
    host = ball_host()
    wish = TumorWish(kind="liver", diameter_mm=(diameter, diameter), count=count)
    try:
        grown, placed = grow_tumors(host, [wish], np.random.default_rng(seed))
    except MaisiError as error:
        if "ask for" not in str(error):
            raise
        return
    new = grown.array != host.array
    assert len(placed) == count
    assert (host.array[new] == 1).all()
    assert set(np.unique(grown.array)) <= {1, 26, BODY}
    for tumor in placed:
        assert tumor.diameter_mm == pytest.approx(diameter, rel=0.04)


def test_the_same_seed_grows_the_same_tumour_and_another_does_not(torso) -> None:
    wishes = parse_tumors(["liver:20mm", "lung:10-20mmx2"])
    first, second, other = (grow_tumors(torso, wishes, np.random.default_rng(s))[0].array for s in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_place_is_kept_to(torso) -> None:
    liver = np.argwhere(torso.array == 1).mean(axis=0)
    wanted = torso.affine[:3, :3] @ liver + torso.affine[:3, 3]
    wish = TumorWish(kind="liver", diameter_mm=(20, 20), centre_mm=(wanted[0], wanted[1], wanted[2]))
    _, placed = grow_tumors(torso, [wish], np.random.default_rng(0))
    assert np.linalg.norm(np.array(placed[0].centre_mm) - wanted) < 20


def test_a_place_outside_the_mask_is_refused(torso) -> None:
    wish = TumorWish(kind="liver", diameter_mm=(20, 20), centre_mm=(500.0, 500.0, 500.0))
    with pytest.raises(MaisiError, match=r"@500,500,500 lies outside the mask, which reaches from -?\d+ to"):
        grow_tumors(torso, [wish], np.random.default_rng(0))


def test_orientation_does_not_matter_to_the_world(torso) -> None:
    """A map stored the other way round gets tumours of the same size in the same host."""
    affine = torso.affine @ np.diag([-1.0, -1, 1, 1])
    affine[:3, 3] = torso.affine[:3, :3] @ [torso.shape[0] - 1, torso.shape[1] - 1, 0] + torso.affine[:3, 3]
    flipped = Volume(np.ascontiguousarray(torso.array[::-1, ::-1]), affine)
    centre = (60.0, 20.0, 300.0)
    wish = TumorWish(kind="liver", diameter_mm=(20, 20), centre_mm=centre)
    (one,), (two,) = (grow_tumors(v, [wish], np.random.default_rng(0))[1] for v in (torso, flipped))
    assert np.linalg.norm(np.array(one.centre_mm) - np.array(two.centre_mm)) < 8
    assert one.diameter_mm == pytest.approx(two.diameter_mm, rel=0.02)


def test_what_does_not_fit_is_told_with_what_would(torso) -> None:
    host = ball_host()
    with pytest.raises(MaisiError, match=r"up to \d+ mm, not of 120 mm") as told:
        grow_tumors(host, parse_tumors(["liver:120mm"]), np.random.default_rng(0))
    fits = re.search(r"up to (\d+) mm", str(told.value))
    assert fits is not None
    assert float(fits[1]) == pytest.approx(60 / 0.7, rel=0.1)
    with pytest.raises(MaisiError, match="grows in pancreas, which the mask does not hold"):
        grow_tumors(host, parse_tumors(["pancreas:10mm"]), np.random.default_rng(0))
    with pytest.raises(MaisiError, match=r"smaller than a voxel of 2 x 2\.5 x 3 mm"):
        grow_tumors(host, parse_tumors(["liver:2mm"]), np.random.default_rng(0))


def test_without_a_size_the_tumour_fits_whatever_the_host() -> None:
    small = ball_host(radius_mm=8)
    _, (tumor,) = grow_tumors(small, parse_tumors(["liver"]), np.random.default_rng(3))
    assert tumor.diameter_mm < 24


def test_tumours_grow_anywhere_for_training() -> None:
    host = ball_host()
    soft = host.array == BODY
    soft[:, :, :14] = False
    bare = host.with_array(np.full(host.shape, BODY, np.uint8))
    grown, _ = grow_tumors(bare, parse_tumors(["kidney:15mm"]), np.random.default_rng(0), anywhere=soft)
    assert (grown.array == 140).any()
    assert not (grown.array == 140)[~soft].any()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_deformed_tumour_keeps_its_volume_and_its_host(seed) -> None:
    host = ball_host()
    labels = grow_tumors(host, parse_tumors(["liver:20mm"]), np.random.default_rng(1))[0].array
    rng = np.random.default_rng(seed)
    deformed = deform_tumor(labels, 26, (1,), host.spacing_mm, rng)
    assert (deformed == 26).sum() >= KEPT * (labels == 26).sum()
    assert np.array_equal(np.isin(deformed, (1, 26)), host.array == 1)
    assert not np.array_equal(deformed, labels)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 3))
def test_the_nearest_host_is_found_in_a_box_or_far_away(seed, count) -> None:
    rng, spacing = np.random.default_rng(seed), (3.0, 2.0, 5.0)
    labels = np.full((30, 34, 24), BODY, np.uint8)
    for id in rng.integers(1, 4, count):
        corner = [int(rng.integers(0, n - 3)) for n in labels.shape]
        labels[tuple(slice(c, c + 3) for c in corner)] = id
    inside = np.zeros(labels.shape, bool)
    corner = [int(rng.integers(0, n - 5)) for n in labels.shape]
    inside[tuple(slice(c, c + 5) for c in corner)] = True
    labels[inside] = 26
    found = with_hosts(labels, inside, (1, 2, 3), spacing, BODY)
    assert np.array_equal(found[~inside], labels[~inside])
    hosts = np.argwhere(np.isin(labels, (1, 2, 3)))
    for place in np.argwhere(inside):
        if not len(hosts):
            assert found[tuple(place)] == BODY
            continue
        far = np.linalg.norm((hosts - place) * spacing, axis=1)
        nearest = {int(labels[tuple(host)]) for host in hosts[far <= far.min() + 1e-6]}
        assert int(found[tuple(place)]) in nearest


def test_a_map_without_the_tumour_cannot_deform_it() -> None:
    host = ball_host()
    with pytest.raises(MaisiError, match="no hepatic tumor to deform"):
        deform_tumor(host.array, 26, (1,), host.spacing_mm, np.random.default_rng(0))
    with pytest.raises(MaisiError, match="no tumours to deform"):
        deform_tumors(host, np.random.default_rng(0))


def test_tumours_of_every_kind_are_deformed(torso) -> None:
    grown, _ = grow_tumors(torso, parse_tumors(["liver:24mm", "lung:14mm"]), np.random.default_rng(0))
    deformed = deform_tumors(grown, np.random.default_rng(1))
    hosts = {26: (1, 26), 23: (28, 29, 30, 31, 32, 23)}
    for tumor, ids in hosts.items():
        before, after = grown.array == tumor, deformed.array == tumor
        assert after.sum() >= KEPT * before.sum()
        assert (before != after).any()
        assert np.isin(grown.array[after], ids).all()
    elsewhere = ~np.isin(grown.array, [id for ids in hosts.values() for id in ids])
    np.testing.assert_array_equal(deformed.array[elsewhere], grown.array[elsewhere])


@pytest.mark.parametrize("wish", ["liver:10mmx3@0,0,0", "liver:12mmx4"])
def test_tumours_at_one_place_stay_apart(wish) -> None:
    for seed in range(8):
        grown, placed = grow_tumors(ball_host(), parse_tumors([wish]), np.random.default_rng(seed))
        assert ndimage.label(grown.array == 26, np.ones((3, 3, 3)))[1] == len(placed)


def test_a_place_far_from_any_host_is_refused() -> None:
    host = ball_host(20)
    with pytest.raises(
        MaisiError, match=r"From the place @36,30,30 it is \d+ mm to where a liver tumour of 10 mm could"
    ):
        grow_tumors(host, parse_tumors(["liver:10mm@36,30,30"]), np.random.default_rng(0))
    _, (placed,) = grow_tumors(host, parse_tumors(["liver:10mm@24,0,0"]), np.random.default_rng(0))
    assert placed.centre_mm[0] == pytest.approx(14, abs=4)  # beside the liver: the nearest place inside


def test_a_bone_tumour_ends_at_the_joint_and_a_lung_tumour_not_at_a_fissure() -> None:
    array = np.full((40, 24, 24), BODY, np.uint8)
    array[4:36, 6:18, 6:18] = 93  # two bones that touch
    array[20:36, 6:18, 6:18] = 95
    bones = Volume.from_spacing(array, (2.0, 2.0, 2.0))
    lungs = bones.with_array(np.where(array == 93, 28, np.where(array == 95, 29, array)).astype(np.uint8))
    across = []
    for kind, host, other in (("bone", bones, (93, 95)), ("lung", lungs, (28, 29))):
        together = []
        for seed in range(12):
            grown, _ = grow_tumors(host, parse_tumors([f"{kind}:16mm@0,0,0"]), np.random.default_rng(seed))
            new = host.array[grown.array != host.array]
            together.append(len({*new.tolist()} & {*other}) == 2)
        across.append(sum(together))
    assert across[0] == 0
    assert across[1] > 6


def lesions(labels: np.ndarray, tumor: int = 26) -> list[np.ndarray]:
    parts, count = ndimage.label(labels == tumor, np.ones((3, 3, 3)))
    return [parts == number for number in range(1, count + 1)]


@pytest.mark.parametrize("seed", range(6))
def test_each_of_several_tumours_is_deformed_by_itself(seed: int) -> None:
    grown, _ = grow_tumors(ball_host(), parse_tumors(["liver:24mm", "liver:8mmx3"]), np.random.default_rng(seed))
    deformed = deform_tumors(grown, np.random.default_rng([seed, 1])).array
    before, after = lesions(grown.array), lesions(deformed)
    assert len(before) == len(after) == 4
    for old in before:  # each keeps its place and its volume, whichever other moved
        nearest = max(after, key=lambda new: np.count_nonzero(new & old))
        assert np.count_nonzero(nearest & old)
        assert np.count_nonzero(nearest) >= KEPT * np.count_nonzero(old)
    assert (deformed != grown.array).any()


def test_what_a_tumour_without_a_host_leaves_is_body_or_nothing() -> None:
    array = np.full((30, 30, 30), BODY, np.uint8)
    array[10:20, 10:20, 10:20] = 128
    made = deform_tumor(array, 128, (128, *KINDS["bone"].hosts), (2.0, 2.0, 2.0), np.random.default_rng(0))
    assert set(np.unique(made)) == {128, BODY}
    bare = deform_tumor(np.where(array == 128, array, 0), 128, (128,), (2.0, 2.0, 2.0), np.random.default_rng(0))
    assert set(np.unique(bare)) == {0, 128}
