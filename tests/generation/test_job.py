from __future__ import annotations

import numpy as np
import pytest

from maisi.anatomy import BODY, label_id, regions_present
from maisi.data.label_maps import ids_in
from maisi.data.mask_library import build
from maisi.data.phantom import DESCRIPTION, phantom_labels
from maisi.errors import MaisiError
from maisi.generation.job import make_job, padded_size
from maisi.generation.masks import without_tumors
from maisi.io.nifti import write_volume
from maisi.request import Request
from maisi.volume import Volume
from maisi.weights.registry import find_model


@pytest.fixture(scope="module")
def config(model_folder):
    return find_model(model_folder).config


def test_a_request_is_completed_from_the_model(config) -> None:
    job = make_job(Request.parse(region="chest"), config)
    assert (job.size, job.conditions.spacing_mm) == ((48, 32, 32), (8, 8, 8))
    assert (job.steps, job.solver) == (2, "euler")
    assert job.notes == ("Size 48,32,32 at 8,8,8 mm.",)


def test_auto_overrules_what_is_given(config) -> None:
    wishes = {"region": "head", "size": (9, 9, 9), "spacing": (1, 1, 1)}
    job = make_job(Request.parse(fov="auto", **wishes), config)
    assert (job.size, job.conditions.spacing_mm) == ((32, 32, 32), (8, 8, 8))
    given = make_job(Request.parse(**wishes), config)
    assert given.size == (9, 9, 9)
    assert len(given.notes) == 6


def test_the_padded_grid_holds_the_volume_in_its_middle(config) -> None:
    job = make_job(Request.parse(region="chest", size=(30, 16, 17), spacing=(1, 2, 3)), config)
    assert job.padded == padded_size((30, 16, 17), 16) == (32, 16, 32)
    assert job.margins == ((1, 1), (0, 0), (7, 8))
    padded = np.zeros(job.padded, np.int16)
    padded[1, 0, 7] = 5
    placed = job.place(padded)
    assert placed.shape == (30, 16, 17)
    assert placed.array[0, 0, 0] == 5
    centre = placed.affine @ [14.5, 7.5, 8, 1]
    assert np.allclose(centre, [0, 0, 0, 1])


def test_a_mask_decides_grid_and_regions(config, chest_labels) -> None:
    job = make_job(Request.parse(), config, chest_labels)
    assert job.size == chest_labels.shape
    assert job.conditions.spacing_mm == (8, 9, 10)
    assert job.conditions.regions == ("chest",)
    assert make_job(Request.parse(region="abdomen"), config, chest_labels).conditions.regions == ("abdomen",)


def test_what_comes_out_lies_where_the_mask_does(config, chest_labels) -> None:
    """Padded, turned to RAS+, cropped and turned back, the mask itself must come out voxel for voxel."""
    swapped = Volume(chest_labels.array.transpose(2, 0, 1), chest_labels.affine[:, [2, 0, 1, 3]])
    for labels in (chest_labels, swapped, chest_labels.to_ras()):
        job = make_job(Request.parse(), config, labels)
        padded = job.padded_labels()
        assert padded is not None
        assert padded.shape == job.padded
        placed = job.place(padded)
        assert placed.same_grid(labels)
        assert np.array_equal(placed.array, labels.array)


def test_the_mask_goes_on_beyond_its_edge(config, chest_labels) -> None:
    padded = make_job(Request.parse(), config, chest_labels).padded_labels()
    assert padded is not None
    (low, high) = (6, 6)  # 20 slices in 32
    assert np.array_equal(padded[:, :, 0], padded[:, :, low])
    assert np.array_equal(padded[:, :, -1], padded[:, :, -1 - high])
    assert padded[:, :, 0].any()


def test_tumors_can_be_taken_out(config, chest_labels) -> None:
    job = make_job(Request.parse(), config, chest_labels)
    healthy = job.padded_labels_without_tumors()
    assert healthy is not None
    changed = healthy != job.padded_labels()
    assert np.array_equal(changed, job.padded_labels() == 23)
    assert set(healthy[changed]) == {28}
    without = chest_labels.with_array(np.where(chest_labels.array == 23, 28, chest_labels.array))
    assert make_job(Request.parse(), config, without).padded_labels_without_tumors() is None


def test_structures_can_be_taken_out(config, chest_labels) -> None:
    job = make_job(Request.parse(), config, chest_labels)
    labels, lacking = job.padded_labels(), job.padded_labels_without({28, 32})
    assert labels is not None
    assert lacking is not None
    assert np.array_equal(lacking != labels, np.isin(labels, (28, 32)))
    assert set(lacking[lacking != labels]) == {BODY}
    assert job.padded_labels_without({label_id("brain")}) is None


def test_a_body_cut_away_about_the_cord_is_told_whole_and_cut_again(config) -> None:
    whole = np.full((32, 32, 16), BODY, np.uint8)
    whole[16, 16] = label_id("spinal cord")
    array = whole.copy()
    array[:, :, :6][whole[:, :, :6] == BODY] = 0
    affine = Volume.from_spacing(array, (4, 4, 4)).affine
    # the axis along the body may be any of the file's
    for axes in ((0, 1, 2), (2, 0, 1)):
        labels = Volume(array.transpose(axes), affine[:, [*axes, 3]])
        job = make_job(Request.parse(), config, labels)
        assert any("cut away about the spinal cord" in note for note in job.notes)
        told = job.padded_labels()
        assert told is not None
        assert (told[:, :, 0] == BODY).sum() > 250
        assert (told[array != 0] == array[array != 0]).all()
        lacking = job.padded_labels_without({label_id("spinal cord")})
        assert lacking is not None
        assert np.array_equal(lacking != told, told == label_id("spinal cord"))
        kept = job.kept_labels()
        assert kept is not None
        assert np.array_equal(kept.array, labels.array)
        image = job.outside_body(labels.with_array(np.full(labels.shape, 40, np.int16)))
        assert np.array_equal(image.array == -1000, labels.array == 0)
    job = make_job(Request.parse(), config, Volume(whole, affine))
    assert not any("cut away" in note for note in job.notes)
    told = job.padded_labels()
    assert told is not None
    assert np.array_equal(told, whole)


@pytest.mark.parametrize(
    ("wishes", "word"),
    [({"size": (20, 20, 20)}, "has 34,26,20 voxels, not 20,20,20"), ({"spacing": (3, 3, 3)}, "spacing of 8,9,10 mm")],
)
def test_a_mask_of_another_geometry_is_refused(config, chest_labels, wishes, word) -> None:
    with pytest.raises(MaisiError, match=word):
        make_job(Request.parse(**wishes), config, chest_labels)
    make_job(Request.parse(size=(34, 26, 20), spacing=(8, 9, 10)), config, chest_labels)


def test_a_mask_with_an_extreme_spacing_is_refused(config, chest_labels) -> None:
    far = Volume(chest_labels.array, np.diag([40.0, 40, 40, 1]))
    with pytest.raises(MaisiError, match="spacing"):
        make_job(Request.parse(), config, far)


def test_a_model_without_controlnet_follows_no_mask(config, chest_labels) -> None:
    with pytest.raises(MaisiError, match="follows no masks"):
        make_job(Request.parse(), config.model_copy(update={"controlnet": None}), chest_labels)


def test_only_what_the_mask_holds_can_be_kept(config, chest_labels) -> None:
    with pytest.raises(MaisiError, match="no label map of which to keep a part"):
        make_job(Request.parse(region="chest", size=(16, 16, 16), spacing=(5, 5, 5), keep="liver"), config)
    with pytest.raises(MaisiError, match="holds no pancreas; leave it out of --keep"):
        make_job(Request.parse(keep=("left lung upper lobe", "pancreas")), config, chest_labels)
    array = chest_labels.array
    assert (array == 23).any()
    job = make_job(Request.parse(keep="left lung upper lobe"), config, chest_labels)
    kept, bare = job.kept_labels(), without_tumors(array, chest_labels.spacing_mm)
    assert kept is not None
    np.testing.assert_array_equal(kept.array == 28, bare == 28)  # the tumour there counts as lung
    assert set(np.unique(kept.array)) == {0, 28}


def test_a_modality_that_the_model_does_not_know_is_refused(config, chest_labels) -> None:
    known = config.model_copy(update={"modalities": ("ct",)})
    make_job(Request.parse(), known, chest_labels)
    for more in ({}, {"region": "chest"}):
        with pytest.raises(MaisiError, match="knows no mri_t1, only ct"):
            make_job(Request.parse(modality="mri_t1", **more), known, chest_labels)
    make_job(Request.parse(modality="mri_t1"), config, chest_labels)


def test_generation_removes_no_tumours(config, chest_labels) -> None:
    with pytest.raises(MaisiError, match="remove them with `maisi inpaint`"):
        make_job(Request.parse(tumor="none"), config, chest_labels)


def test_odd_masks_are_pointed_out(config) -> None:
    lonely = Volume.from_spacing(np.full((48, 32, 32), 6, np.uint8), (8, 8, 8))
    notes = " ".join(make_job(Request.parse(guidance=2), config, lonely).notes)
    assert "no body (200)" in notes
    assert "name the region" in notes
    assert "Guidance" in notes


def test_a_mirrored_mask_is_noted(config) -> None:
    labels = phantom_labels((48, 40, 40), (8, 8, 8), ("chest",), seed=1)
    assert not any("side" in note for note in make_job(Request.parse(), config, labels).notes)
    mirrored = labels.with_array(np.ascontiguousarray(labels.array[::-1]))
    notes = make_job(Request.parse(), config, mirrored).notes
    assert any("lie on the wrong side" in note and "maisi mask import" in note for note in notes)


def test_a_library_that_fits_nothing_is_noted(config, tmp_path) -> None:
    labels = phantom_labels((48, 40, 40), (8, 8, 8), ("head-neck",), seed=1)
    write_volume(tmp_path / "head.nii.gz", labels)
    build([tmp_path / "head.nii.gz"], tmp_path / "maps")
    wish = {"library": tmp_path / "maps", "size": (32, 32, 32), "spacing": (8, 8, 8)}
    job = make_job(Request.parse(region="abdomen", structure=["liver"], **wish), config)
    assert any(note.startswith("No label map of the library is used: phantom") for note in job.notes)
    assert not any("library" in note for note in make_job(Request.parse(region="head-neck", **wish), config).notes)


def test_phantoms_guide_half_as_much_unless_it_is_asked_for(config, chest_labels, tmp_path) -> None:
    guided = config.model_copy(update={"mask_guidance": 1.0, "mask_self_guidance": 0.5})
    write_volume(tmp_path / "phantom.nii.gz", chest_labels, description=DESCRIPTION)
    write_volume(tmp_path / "patient.nii.gz", chest_labels)
    found = {"region": "chest", "structure": "heart", "size": (48, 40, 24), "spacing": (10, 10, 10)}
    for wishes, expected in (
        (found, (0.5, 0.5)),
        ({"mask": tmp_path / "phantom.nii.gz"}, (0.5, 0.5)),
        ({"mask": tmp_path / "patient.nii.gz"}, (1, 0.5)),
        ({**found, "mask_guidance": 0.7, "self_guidance": 0.2}, (0.7, 0.2)),
    ):
        job = make_job(Request.parse(**wishes), guided)
        assert (job.mask_guidance, job.self_guidance) == expected


def library_of(folder, *volumes):
    for number, labels in enumerate(volumes):
        write_volume(folder / f"{number}.nii.gz", labels, names={150: "stent"} if (labels.array == 150).any() else None)
    build([folder / f"{number}.nii.gz" for number in range(len(volumes))], folder / "library")
    return folder / "library"


def test_each_item_is_told_what_its_own_mask_shows(config, tmp_path) -> None:
    masks = [phantom_labels((40, 32, 20), (9, 9, 9), (region,), seed=2) for region in ("head-neck", "chest")]
    library = library_of(tmp_path, *masks)
    request = Request.parse(structure="spinal cord", size=(40, 32, 20), spacing=(9, 9, 9), library=library)
    job = make_job(request, config)
    seen = set()
    for number in range(12):
        own = job.of_item(number)
        assert own.conditions.regions == regions_present(ids_in(own.labels.array))
        seen.add(own.conditions.regions)
    assert len(seen) > 1


def test_guidance_of_an_item_is_that_of_its_own_mask(config, tmp_path, monkeypatch) -> None:
    guided = config.model_copy(update={"mask_guidance": 1.5, "mask_self_guidance": 0.5})
    labels = phantom_labels((40, 32, 32), (9, 9, 9), ("chest",), seed=2)
    sources = {0: "a phantom", 1: "library"}
    monkeypatch.setattr("maisi.generation.job._found", lambda *a: (labels, sources[a[3]]))
    monkeypatch.setattr("maisi.generation.job.PHANTOM", "a phantom")
    job = make_job(Request.parse(structure="heart", size=(40, 32, 32), spacing=(9, 9, 9)), guided)
    assert [(own.mask_guidance, own.self_guidance) for own in map(job.of_item, (0, 1))] == [(0.75, 0.5), (1.5, 0.5)]


def test_an_organ_made_smaller_in_a_mask_without_a_body_leaves_no_body(config, chest_labels) -> None:
    bare = chest_labels.with_array(np.where(chest_labels.array == BODY, 0, chest_labels.array).astype(np.uint8))
    job = make_job(Request.parse(anatomy_size={"left lung upper lobe": 0.7}), config, bare).of_item(0)
    assert (job.labels.array == 28).sum() < (bare.array == 28).sum()
    assert not (job.labels.array == BODY).any()
    image = job.labels.with_array(np.full(bare.shape, 40, np.int16))
    assert (job.outside_body(image).array == 40).all()


def test_classes_of_a_library_that_the_model_does_not_know_count_as_body(config, tmp_path) -> None:
    labels = phantom_labels((40, 32, 32), (9, 9, 9), ("chest",), seed=2)
    labels.array[labels.array == 115] = 150
    library = library_of(tmp_path, labels)
    request = Request.parse(structure="spinal cord", size=(32, 32, 32), spacing=(9, 9, 9), library=library)
    job = make_job(request, config)
    assert not (job.of_item(0).labels.array == 150).any()
    assert job.mask_source.endswith("its own classes 150 left out")
    (tmp_path / "bare").mkdir()
    bare = labels.with_array(np.where(labels.array == BODY, 0, labels.array).astype(np.uint8))
    request_bare = request.model_copy(update={"library": library_of(tmp_path / "bare", bare)})
    assert not (make_job(request_bare, config).of_item(0).labels.array == BODY).any()
    knows = make_job(request, config.model_copy(update={"custom_labels": {150: "stent"}}))
    assert (knows.of_item(0).labels.array == 150).any()


def test_a_tumour_that_will_hardly_be_seen_is_noted(config, chest_labels) -> None:
    small = make_job(Request.parse(tumor="lung:20mm"), config, chest_labels)
    assert any("A tumour of 20 mm has less than 3 voxels of 10 mm across" in note for note in small.notes)
    assert any("voxels of 6.7 mm would do" in note for note in small.notes)
    large = make_job(Request.parse(tumor="lung:35mm"), config, chest_labels)
    assert not any("across" in note for note in large.notes)


def test_without_a_region_it_is_said_what_that_means(config) -> None:
    asked = {"size": (32, 32, 32), "spacing": (8, 8, 8)}
    assert any("No region is named" in note for note in make_job(Request.parse(**asked), config).notes)
    assert not any("No region" in note for note in make_job(Request.parse(**asked, region="chest"), config).notes)
