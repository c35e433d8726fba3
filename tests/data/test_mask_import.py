"""Import of foreign masks: translation, priority, sides, vocabularies, grids, envelopes; on phantoms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from maisi.anatomy import BODY, LUNGS, OPPOSITE, label_id, label_names
from maisi.data.label_maps import custom_vocabulary, ids_in, translated, vocabulary
from maisi.data.mask_import import GROWN_MM, Source, census, hull, import_masks, read_our_labels, sides_fault
from maisi.data.phantom import phantom
from maisi.data.preprocess import hu_fault
from maisi.data.segmentation import body_envelope, envelope
from maisi.errors import MaisiError
from maisi.io.nifti import read_label_names, read_labels, read_volume, write_volume
from maisi.volume import Volume

SPACING = (5.0, 5.0, 5.0)


@pytest.fixture(scope="module")
def torso() -> tuple[Volume, Volume]:
    return phantom((88, 60, 80), SPACING, ("chest", "abdomen"), seed=1)


@pytest.fixture(scope="module")
def foreign(torso: tuple[Volume, Volume]) -> Volume:
    """The phantom's labels as TotalSegmentator would number them: no body."""
    theirs = {ours: id for id, ours in vocabulary("totalsegmentator").to.items()}
    labels = torso[1]
    return labels.with_array(translated(labels.array, {id: theirs.get(id, 0) for id in range(256)}))


def source(labels: Volume, name: str = "totalsegmentator", **more: object) -> Source:
    return Source(labels, vocabulary(name), **more)  # type: ignore[arg-type]


def mirrored_names(labels: Volume, words: str = "totalsegmentator") -> Volume:
    """Left called right and the other way round."""
    to = vocabulary(words).to
    theirs = {ours: id for id, ours in to.items()}
    swap = {id: theirs.get(OPPOSITE.get(ours, ours), id) for id, ours in to.items()}
    return labels.with_array(translated(labels.array, swap))


# ---- what comes out ----------------------------------------------------------------------------------------------


def test_with_a_ct_the_phantom_comes_back(torso: tuple[Volume, Volume], foreign: Volume) -> None:
    ct, truth = torso
    mask, report = import_masks([source(foreign)], ct)
    named = foreign.array != 0
    np.testing.assert_array_equal(mask.array[named], truth.array[named])
    assert np.mean((mask.array != 0) == (truth.array != 0)) > 0.995
    assert set(np.unique(mask.array[~named])) <= {0, BODY}
    assert report.body == "ct"
    assert not report.warnings
    assert report.pairs > 20
    (one,) = report.sources
    assert len(one.mapped) == len(np.unique(foreign.array)) - 1
    assert not one.dropped


def test_the_result_may_have_another_spacing(torso: tuple[Volume, Volume], foreign: Volume) -> None:
    """Its voxels are the nearest of what comes out without, along the patient's axes however the mask is stored."""
    ct, _ = torso
    whole, before = import_masks([source(foreign)], ct)
    turned = [Volume(v.array.transpose(2, 0, 1), v.affine[:, [2, 0, 1, 3]]) for v in (foreign, ct)]
    finer, report = import_masks([source(turned[0])], turned[1], spacing_mm=(2.5, 5.0, 5.0))
    assert report.shape == finer.shape == (176, 60, 80)
    assert report.spacing_mm == finer.spacing_mm == (2.5, 5.0, 5.0)
    np.testing.assert_array_equal(finer.array[::2], whole.array)
    np.testing.assert_array_equal(finer.array[1::2], whole.array)
    assert report.structures == before.structures
    assert not report.warnings

    coarse, lossy = import_masks([source(foreign)], ct, spacing_mm=(60.0, 60.0, 60.0))
    voxel_ml = 60.0**3 / 1000
    for structure in lossy.structures:
        assert structure.ml == pytest.approx(np.count_nonzero(coarse.array == structure.id) * voxel_ml)
    lost = set(np.unique(whole.array)) - set(np.unique(coarse.array))
    assert lost
    assert {f"{before.names[id]} is too small for this spacing and was lost" for id in lost} == set(lossy.warnings)


def test_volumes_and_names_are_those_of_the_mask(torso: tuple[Volume, Volume], foreign: Volume) -> None:
    mask, report = import_masks([source(foreign)], torso[0])
    for structure in report.structures:
        assert structure.ml == pytest.approx(np.count_nonzero(mask.array == structure.id) * 0.125)
    assert report.names[1] == "liver"
    assert report.structures[-1].id == BODY
    assert json.loads(json.dumps(report.as_json()))["shape"] == list(mask.shape)
    assert any("liver" in line for line in report.lines())


def test_without_a_ct_the_labels_make_a_body(torso: tuple[Volume, Volume], foreign: Volume) -> None:
    mask, report = import_masks([source(foreign)])
    truth = torso[1].array != 0
    found = mask.array != 0
    assert report.body == "labels"
    assert any("guess" in warning for warning in report.warnings)
    assert all(structure.outside is None for structure in report.structures)
    assert found[foreign.array != 0].all()
    assert 2 * np.count_nonzero(found & truth) / (np.count_nonzero(found) + np.count_nonzero(truth)) > 0.85


def test_a_body_in_the_mask_is_kept_unless_a_ct_knows_better(torso: tuple[Volume, Volume]) -> None:
    ct, truth = torso
    alone, report = import_masks([source(truth, "maisi")])
    np.testing.assert_array_equal(alone.array, truth.array)
    assert report.body == "given"
    everything = truth.with_array(np.where(truth.array == 0, np.uint8(BODY), truth.array))
    with_ct, _ = import_masks([source(everything, "maisi")], ct)
    assert np.mean((with_ct.array != 0) == (truth.array != 0)) > 0.995


def test_a_table_and_a_tube_are_no_body(torso: tuple[Volume, Volume], foreign: Volume) -> None:
    ct, truth = torso
    hu = ct.array.copy()
    back = int(np.argmax((truth.array != 0).any(axis=(0, 2))))
    hu[8:-8, back - 4 : back - 2, :] = 300
    hu[4:6, 50:52, :] = 200
    mask, _ = import_masks([source(foreign)], ct.with_array(hu))
    assert not (mask.array[8:-8, back - 4 : back - 2, :] != 0).any()
    assert not mask.array[4:6, 50:52, :].any()


def test_earlier_goes_over_later_and_a_tumor_over_both(foreign: Volume) -> None:
    liver = foreign.array == 5
    place = tuple(int(i) for i in np.argwhere(liver)[np.count_nonzero(liver) // 2])
    near = tuple(slice(i - 1, i + 2) for i in place)
    second = np.zeros(foreign.shape, np.int32)
    second[liver] = 7
    second[near] = 1000
    words = custom_vocabulary({"7": "spleen", "1000": "hepatic tumor"}, "t.json")
    mask, report = import_masks([source(foreign), Source(foreign.with_array(second), words, "second")])
    assert (mask.array[near] == 26).all()
    assert (mask.array[liver] == 1).sum() == np.count_nonzero(liver) - np.count_nonzero(liver[near])
    other, _ = import_masks([Source(foreign.with_array(second), words, "second"), source(foreign)])
    assert not (other.array[liver] == 1).any()
    assert report.sources[1].mapped == {"7": 3, "1000": 26}


def test_own_classes_and_dropped_ones_are_reported(foreign: Volume) -> None:
    array = np.where(foreign.array == 5, np.uint8(3), np.uint8(0))
    array[0, 0, 0] = 9
    words = custom_vocabulary(
        {"3": {"id": 150, "name": "graft"}, "dropped": {"9": "the couch", "10": "not there"}}, "t"
    )
    mask, report = import_masks([Source(foreign.with_array(array), words)])
    assert report.names == {150: "graft", BODY: "body"}
    assert report.sources[0].dropped == {"9": "the couch"}
    assert mask.array[0, 0, 0] == 0


def test_two_names_for_one_id_are_refused(foreign: Volume) -> None:
    sources = [Source(foreign, custom_vocabulary({"1": {"id": 150, "name": name}}, "t")) for name in ("a", "b")]
    with pytest.raises(MaisiError, match="both 'a' and 'b'"):
        import_masks(sources)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_swapped_sides_are_refused_and_mended(foreign: Volume, torso: tuple[Volume, Volume]) -> None:
    swapped = mirrored_names(foreign)
    with pytest.raises(MaisiError, match="--swap-sides"):
        import_masks([source(swapped)])
    mask, report = import_masks([source(swapped)], swap_sides=True)
    assert report.sources[0].swapped
    kidneys = np.isin(torso[1].array, (label_id("left kidney"), label_id("right kidney")))
    np.testing.assert_array_equal(mask.array[kidneys], torso[1].array[kidneys])
    untouched, report = import_masks([source(foreign)], swap_sides=True)
    assert not report.sources[0].swapped
    np.testing.assert_array_equal(untouched.array[kidneys], torso[1].array[kidneys])


def test_orientation_in_memory_is_no_swap(foreign: Volume, torso: tuple[Volume, Volume]) -> None:
    affine = foreign.affine.copy()
    affine[:3, 3] += affine[:3, 0] * (foreign.shape[0] - 1)
    affine[:3, 0] *= -1
    flipped = Volume(foreign.array[::-1].transpose(2, 0, 1), affine[:, [2, 0, 1, 3]])
    straight, _ = import_masks([source(foreign)], torso[0])
    mask, report = import_masks([source(flipped)], torso[0])  # the same grid, so nothing is resampled
    np.testing.assert_array_equal(mask.array, straight.array)
    assert not report.sources[0].resampled


def test_a_mirrored_header_is_told_from_swapped_names(foreign: Volume) -> None:
    with pytest.raises(MaisiError, match="mirrored"):
        import_masks([source(foreign.with_array(foreign.array[::-1]))], swap_sides=True)


def test_one_pair_on_the_wrong_side_is_a_warning(foreign: Volume) -> None:
    array = translated(foreign.array, {id: {2: 3, 3: 2}.get(id, id) for id in range(256)})
    _, report = import_masks([source(foreign.with_array(array))])
    assert "left kidney lies to the right of its counterpart" in report.warnings
    assert not any("vena" in warning for warning in report.warnings)


@pytest.mark.parametrize("said", ["vista3d", "maisi", "openkbp"])
def test_the_right_vocabulary_is_named(foreign: Volume, said: str) -> None:
    with pytest.raises(MaisiError, match="--from totalsegmentator"):
        import_masks([source(foreign, said)])


def test_a_few_labels_that_only_another_vocabulary_puts_in_order() -> None:
    array = np.zeros((9, 4, 4), np.uint8)
    array[1, :2], array[7], array[1, 2:] = 2, 3, 4  # cord, right and left parotid gland of OpenKBP
    with pytest.raises(MaisiError, match=r"--swap-sides.*or say --from openkbp"):
        import_masks([source(Volume.from_spacing(array, SPACING))])


def test_names_in_the_file_tell_the_vocabulary() -> None:
    labels = Volume.from_spacing(np.full((4, 4, 4), 5, np.uint8), SPACING)
    with pytest.raises(MaisiError, match="as totalsegmentator does"):
        import_masks([source(labels, "vista3d", names={5: "liver"})])
    import_masks([source(labels, "vista3d", names={5: "right kidney"})])


def test_names_that_no_vocabulary_has_are_refused_and_single_ones_told(foreign: Volume) -> None:
    vessels = foreign.with_array(np.where(np.isin(foreign.array, (1, 2)), foreign.array, 0).astype(np.uint8))
    with pytest.raises(
        MaisiError, match=r"otherwise than totalsegmentator \(1 is 'lung_vessels' there, 'spleen' here\)"
    ):
        import_masks([source(vessels, names={1: "lung_vessels", 2: "lung_trachea_bronchia"})])
    names = {id: name for id, name in vocabulary("totalsegmentator").names.items() if id in np.unique(foreign.array)}
    assert not any("there, '" in warning for warning in import_masks([source(foreign, names=names)])[1].warnings)
    told = import_masks([source(foreign, names=names | {1: "milt"})])[1].warnings
    assert any("1 is 'milt' there, 'spleen' here" in warning for warning in told)


def test_a_mirrored_mask_without_pairs_is_refused(torso: tuple[Volume, Volume]) -> None:
    labels = torso[1]
    kept = labels.with_array(np.where(np.isin(labels.array, (1, 3, 6, 7, 12)), labels.array, 0).astype(np.uint8))
    import_masks([source(kept, "maisi")])
    with pytest.raises(MaisiError, match="is mirrored: its unpaired organs lie on the wrong side"):
        import_masks([source(kept.with_array(kept.array[::-1]), "maisi")])


def test_ids_of_no_vocabulary_want_a_table(foreign: Volume) -> None:
    with pytest.raises(MaisiError, match=r"lacks \(254\).*TABLE.json"):
        import_masks([source(foreign.with_array(np.full(foreign.shape, 254, np.uint8)))])


def test_nothing_to_import_is_refused(foreign: Volume) -> None:
    with pytest.raises(MaisiError, match="is empty"):
        import_masks([source(foreign.with_array(np.zeros(foreign.shape, np.uint8)))])
    with pytest.raises(MaisiError, match="at least one"):
        import_masks([])
    noise = np.arange(np.prod(foreign.shape), dtype=np.int32).reshape(foreign.shape)
    with pytest.raises(MaisiError, match="different values"):
        import_masks([source(foreign.with_array(noise))])


def test_another_grid_needs_asking(foreign: Volume, torso: tuple[Volume, Volume]) -> None:
    coarse = Volume(foreign.array[::2, ::2, ::2], foreign.affine @ np.diag([2.0, 2, 2, 1]))
    with pytest.raises(MaisiError, match="--resample"):
        import_masks([source(coarse)], torso[0])
    mask, report = import_masks([source(coarse)], torso[0], to_grid=True)
    assert mask.same_grid(torso[0])
    assert report.sources[0].resampled
    assert report.sources[0].kept == pytest.approx(1, abs=0.1)
    liver = foreign.array == 5
    assert np.mean(mask.array[liver] == 1) > 0.85
    half = Volume(torso[0].array[:, :, :40], torso[0].affine)
    _, report = import_masks([source(foreign)], half, to_grid=True)
    below = np.count_nonzero(foreign.array[:, :, :40]) / np.count_nonzero(foreign.array)
    assert report.sources[0].kept == pytest.approx(below)
    apart = foreign.affine.copy()
    apart[0, 3] += 5000
    with pytest.raises(MaisiError, match="same place"):
        import_masks([source(Volume(foreign.array, apart))], torso[0], to_grid=True)


def test_labels_outside_the_body_stay_and_are_reported(foreign: Volume, torso: tuple[Volume, Volume]) -> None:
    array = foreign.array.copy()
    array[0, :, :] = 5
    mask, report = import_masks([source(foreign.with_array(array))], torso[0])
    assert (mask.array[0] == 1).all()
    outside = next(s.outside for s in report.structures if s.id == 1)
    air = np.count_nonzero(torso[1].array[0] == 0)
    assert outside == pytest.approx(air / np.count_nonzero(array == 5), abs=0.01)
    assert any("liver lie outside" in warning for warning in report.warnings)


def test_values_that_are_no_hu_are_explained(foreign: Volume, torso: tuple[Volume, Volume]) -> None:
    hu = torso[0].array
    assert hu_fault(hu) is None
    assert hu_fault(np.full((8, 8, 8), 1000, np.int16)) is None  # metal alone: nothing to tell by
    with pytest.raises(MaisiError, match="offset by 1024"):
        import_masks([source(foreign)], torso[0].with_array(np.maximum(hu, -1024) + 1024))
    with pytest.raises(MaisiError, match="scaled"):
        import_masks([source(foreign)], torso[0].with_array(((hu + 1024) / 4095).astype(np.float32)))
    with pytest.raises(MaisiError, match="grey values"):
        import_masks([source(foreign)], torso[0].with_array(np.clip((hu + 160) / 400 * 255, 0, 255).astype(np.uint8)))


# ---- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_census_counts_and_places_every_id(dtype: type, order: str) -> None:
    rng = np.random.default_rng(0)
    array = np.array(rng.integers(0, 4, (5, 7, 6)) * 60, dtype, order=order)  # type: ignore[call-overload]
    affine = np.array([[0, 2.0, 0, 5], [-1, 0, 0, 3], [0, 0, 3, -7], [0, 0, 0, 1]])
    found = census(Volume(array, affine))
    assert set(found) == {60, 120, 180}
    for id, one in found.items():
        places = np.argwhere(array == id)
        assert one.voxels == len(places)
        np.testing.assert_allclose(one.centre, affine[:3, :3] @ places.mean(axis=0) + affine[:3, 3])


def test_the_hull_of_a_ball_is_a_larger_ball_and_legs_stay_apart() -> None:
    x, y, _ = np.meshgrid(*[np.arange(n) * 3.0 for n in (80, 50, 20)], indexing="ij")
    array = np.zeros(x.shape, np.uint8)
    array[np.hypot(x - 60, y - 75) < 30] = 93
    array[np.hypot(x - 180, y - 75) < 30] = 94
    array[:, :, 8:12] = 0  # slices without labels
    body = hull(Volume.from_spacing(array, (3.0, 3.0, 3.0)))
    assert not body[40].any()
    radius = np.sqrt(np.count_nonzero(body[:40, :, 10]) * 9 / np.pi)
    assert radius == pytest.approx(30 + GROWN_MM, abs=2.5)
    assert body[array != 0].all()


@pytest.mark.parametrize(("step", "count"), [(0.8, 50), (1.25, 102)])
def test_a_hull_reaches_the_first_and_the_last_section(step: float, count: int) -> None:
    labels = np.zeros((60, 60, count), np.uint8)
    labels[20:40, 20:40] = 1
    found = hull(Volume.from_spacing(labels, (3.0, 3.0, step)))
    areas = found.sum(axis=(0, 1))
    assert areas.min() > 0.9 * areas.max()


def test_a_fine_envelope_is_the_coarse_one_with_the_skin_of_the_fine_scan() -> None:
    ct, labels = phantom((176, 120, 40), (2.5, 2.5, 5.0), ("chest",), seed=2)
    fine = Volume(np.repeat(np.repeat(ct.array, 3, 0), 3, 1), ct.affine @ np.diag([1 / 3, 1 / 3, 1, 1]))
    found = envelope(fine).array
    assert found.shape == fine.shape
    exact = np.repeat(np.repeat(body_envelope(ct.array, ct.spacing_mm), 3, 0), 3, 1)
    assert 2 * np.count_nonzero(found & exact) / (np.count_nonzero(found) + np.count_nonzero(exact)) > 0.99
    truth = np.repeat(np.repeat(labels.array != 0, 3, 0), 3, 1)
    assert 2 * np.count_nonzero(found & truth) / (np.count_nonzero(found) + np.count_nonzero(truth)) > 0.99


# ---- real CT -----------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_a_real_abdomen_with_61_classes(real_data: Path) -> None:
    folder = real_data / "totalsegmentator"
    path = folder / "abdomen_pelvis_labels.nii.gz"
    names, labels, ct = read_label_names(path), read_labels(path), read_volume(folder / "abdomen_pelvis_ct.nii.gz")
    assert names == dict(vocabulary("totalsegmentator").names)
    mask, report = import_masks([source(labels, names=names)], ct)
    (one,) = report.sources
    assert len(one.mapped) == 61
    assert not one.dropped
    lungs = [s for s in report.structures if s.id in LUNGS]
    assert len(lungs) == 3
    assert all(s.outside is not None and s.outside < 0.02 for s in report.structures if s.id != BODY)
    assert not report.warnings
    body, tissue = mask.to_ras().array != 0, ct.to_ras().array > -500
    rear = np.argmax(body, axis=1)  # of each column, as far as there is body in it
    behind = np.arange(body.shape[1])[None, :, None] < rear[:, None] - 2
    assert np.count_nonzero(tissue & behind) > 5000  # the table: it is there, behind all that is body
    assert np.mean(ct.to_ras().array[body] < -500) < 0.05
    for said in ("vista3d", "maisi", "openkbp"):
        with pytest.raises(MaisiError, match="totalsegmentator"):
            import_masks([source(labels, said)], ct)


def test_a_body_that_stands_on_its_head_is_refused(torso: tuple[Volume, Volume]) -> None:
    labels = torso[1]
    reversed_ = labels.with_array(np.ascontiguousarray(labels.array[:, :, ::-1]))
    assert sides_fault(labels) is None
    assert "stands on its head" in str(sides_fault(reversed_))
    assert sides_fault(Volume(reversed_.array, reversed_.affine @ np.diag([1, 1, -1, 1]))) is None


def test_our_labels_are_read_and_others_told(torso: tuple[Volume, Volume], tmp_path: Path) -> None:
    labels = torso[1]
    write_volume(tmp_path / "ours.nii.gz", labels, names=label_names(ids_in(labels.array)))
    assert (read_our_labels(tmp_path / "ours.nii.gz").array == labels.array).all()
    theirs = labels.with_array(np.where(labels.array == 1, 5, np.where(labels.array == 3, 1, 0)).astype(np.uint8))
    write_volume(tmp_path / "theirs.nii.gz", theirs, names={5: "liver", 1: "spleen"})
    with pytest.raises(MaisiError, match="names its classes as totalsegmentator does, not maisi"):
        read_our_labels(tmp_path / "theirs.nii.gz")
