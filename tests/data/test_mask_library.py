from __future__ import annotations

import gzip
import json
import shutil
import tracemalloc

import numpy as np
import pytest

from maisi.anatomy import label_id
from maisi.data.mask_deform import DeformationRanges
from maisi.data.mask_library import MARGIN_MM, MaskLibrary, _row, build
from maisi.data.phantom import phantom_labels
from maisi.errors import MaisiError
from maisi.io.files import tree_sha256
from maisi.io.nifti import read_label_names, read_labels, write_volume
from maisi.volume import Volume

LIVER, BRAIN, HEPATIC_TUMOR = 1, 22, 26


def planted() -> Volume:
    """An abdomen with a ball of 20 mm across planted into the liver, stored as LPS with a place in a scanner."""
    labels = phantom_labels((100, 80, 60), (4, 4, 4), ("abdomen",), seed=1)
    array = labels.array.copy()
    x, y, z = (labels.affine[a, 3] + 4 * np.arange(n) for a, n in enumerate(array.shape))
    places = np.nonzero(array == LIVER)
    a, b, c = (axis[int(np.median(place))] for axis, place in zip((x, y, z), places, strict=True))
    ball = (x[:, None, None] - a) ** 2 + (y[None, :, None] - b) ** 2 + (z[None, None, :] - c) ** 2 < 10**2
    array[ball] = HEPATIC_TUMOR
    affine = labels.affine @ np.diag([-1, -1, 1, 1])
    affine[:3, 3] = (120, 77, -900)
    return Volume(array[::-1, ::-1], affine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write_volume(folder / "Patient_Secret_1.nii.gz", phantom_labels((60, 50, 60), (6, 6, 5), ("chest",), 1))
    write_volume(folder / "Patient_Secret_2.nii.gz", planted(), description="Secret")
    write_volume(folder / "Patient_Secret_3.nrrd", phantom_labels((60, 50, 60), (5, 5, 5), ("head-neck",), 2))
    return folder


@pytest.fixture(scope="module")
def library(folder, tmp_path_factory) -> MaskLibrary:
    out = tmp_path_factory.mktemp("out") / "library"
    build(folder, out, note="phantoms")
    return MaskLibrary(out)


def found(library, **wish) -> list[str]:
    return [row.id for row in library.search(**wish).rows]


def test_rows_say_what_the_masks_hold(library) -> None:
    row, mask = library.rows[1], planted()
    assert "abdomen" in row.regions
    assert row.structures[LIVER] == pytest.approx((mask.array == LIVER).sum() * 0.064, abs=1e-3)
    assert row.tumors[HEPATIC_TUMOR] == pytest.approx(20, rel=0.1)
    assert row.note == "phantoms"
    for extent, size, spacing in zip(row.body_mm, row.size, row.spacing_mm, strict=True):
        assert extent <= size * spacing <= extent + 2 * MARGIN_MM + spacing


def test_nothing_of_the_original_is_left_but_its_labels(library, folder) -> None:
    for path in library.folder.rglob("*"):
        assert "Secret" not in path.name
        if path.is_file():
            data = path.read_bytes()
            assert b"Secret" not in (gzip.decompress(data) if path.suffix == ".gz" else data)
            assert b"900" not in data or path.suffix == ".gz"
    row = library.rows[1]
    loaded = library.load(row, row.size, row.spacing_mm).array
    original = planted().to_ras().array
    assert np.bincount(loaded.ravel(), minlength=256)[1:].tolist() == np.bincount(original.ravel(), minlength=256)[1:].tolist()  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("wish", "ids"),
    [
        ({}, ["0003", "0001", "0002"]),
        ({"regions": ("head-neck",)}, ["0003"]),
        ({"regions": ("abdomen",)}, ["0001", "0002"]),
        ({"structures": (LIVER,), "tumors": (HEPATIC_TUMOR,)}, ["0002"]),
        ({"structures": (BRAIN,)}, ["0003"]),
        ({"spacing": (4, 4, 4)}, ["0002", "0003", "0001"]),
        ({"spacing": (2.2, 2.2, 2.2)}, ["0002"]),
        ({"size_mm": (300, 300, 240)}, ["0002", "0003", "0001"]),
        ({"size_mm": (300, 300, 373)}, ["0001"]),
    ],
)
def test_search_by_every_criterion(library, wish, ids) -> None:
    assert found(library, **wish) == ids


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"structures": (LIVER, 138)}, ("None of the 3 masks has the structure 'mandible'", "nearest, 000")),
        ({"structures": (LIVER, BRAIN)}, ("meets all wishes at once", "lacks only the structure")),
        ({"spacing": (1, 1, 1)}, ("voxels of at most 2 x 2 x 2 mm", "0002")),
        ({"size_mm": (300, 300, 1000)}, ("a height of 800 mm", "0001")),
        ({"regions": ("lower-body",), "tumors": (23,)}, ("lower-body", "lung tumor")),
    ],
)
def test_why_nothing_fits(library, wish, words) -> None:
    result = library.search(**wish)
    assert result.rows == ()
    for word in words:
        assert word in result.reason
    assert result.reason.count(".") == 1


def test_a_view_is_centred_on_what_is_asked_for_within_the_mask(library) -> None:
    row = library.rows[1]
    view = library.load(row, (40, 30, 20), (4, 4, 4), centre_on=[HEPATIC_TUMOR])
    assert view.shape == (40, 30, 20)
    middle = np.argwhere(view.array == HEPATIC_TUMOR).mean(axis=0)
    np.testing.assert_allclose(middle, [19.5, 14.5, 9.5], atol=1.5)
    large = library.load(row, (200, 120, 100), (4, 4, 4), centre_on=[HEPATIC_TUMOR]).array
    filled = np.argwhere(large)
    np.testing.assert_allclose((filled.min(0) + filled.max(0)) / 2, [99.5, 59.5, 49.5], atol=3)
    assert not large[0].any()
    assert (large == HEPATIC_TUMOR).sum() == (planted().array == HEPATIC_TUMOR).sum()
    with pytest.raises(MaisiError, match="brain"):
        library.load(row, (8, 8, 8), (4, 4, 4), centre_on=[BRAIN])


def test_loading_with_a_deformation_follows_its_generator(library) -> None:
    def load(seed: int) -> bytes:
        generator = np.random.default_rng(seed)
        args = (library.rows[1], (40, 30, 20), (6, 6, 6), (LIVER,), DeformationRanges(), generator)
        return library.load(*args).array.tobytes()

    assert load(1) == load(1) != load(2)


def test_classes_of_ones_own_keep_their_names(tmp_path) -> None:
    mask = planted()
    mask.array[mask.array == LIVER] = 150
    write_volume(tmp_path / "a.nii.gz", mask, names={150: "stent"})
    build([tmp_path / "a.nii.gz"], tmp_path / "library")
    library = MaskLibrary(tmp_path / "library")
    assert 150 in library.rows[0].structures
    assert read_label_names(library.folder / library.rows[0].file)[150] == "stent"
    write_volume(tmp_path / "b.nii.gz", mask)
    with pytest.raises(MaisiError, match="150"):
        build([tmp_path / "b.nii.gz"], tmp_path / "other")


def test_building_takes_little_memory() -> None:
    labels = np.zeros((224, 224, 224), np.uint8)
    labels[4:-4, 4:-4, 4:-4] = 200
    mask = Volume.from_spacing(labels, (2.0, 2.0, 2.0))
    tracemalloc.start()
    try:
        row = _row("0001", "masks/0001.nii.gz", mask, "", "0" * 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert row.body_mm == (432, 432, 432)
    assert peak < 5 * labels.nbytes


def test_a_tampered_file_is_refused(folder, tmp_path) -> None:
    build([folder / "Patient_Secret_2.nii.gz"], tmp_path / "library")
    library = MaskLibrary(tmp_path / "library")
    path = library.folder / library.rows[0].file
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(MaisiError, match="was changed"):
        library.load(library.rows[0], (8, 8, 8), (4, 4, 4))
    path.unlink()
    with pytest.raises(MaisiError, match="missing"):
        library.load(library.rows[0], (8, 8, 8), (4, 4, 4))


def test_a_build_is_whole_or_not_at_all(folder, tmp_path) -> None:
    write_volume(tmp_path / "image.nii.gz", Volume.from_spacing(np.full((4, 4, 4), -500, np.int16), (1, 1, 1)))
    with pytest.raises(MaisiError, match="without a meaning"):
        build([folder / "Patient_Secret_2.nii.gz", tmp_path / "image.nii.gz"], tmp_path / "library")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.nii.gz"]
    (tmp_path / "library").mkdir()
    with pytest.raises(MaisiError, match="exists"):
        build(folder, tmp_path / "library")
    with pytest.raises(MaisiError, match="no label map"):
        build(tmp_path / "library", tmp_path / "other")
    with pytest.raises(MaisiError, match="not a folder"):
        build(tmp_path / "nowhere", tmp_path / "other")


def test_a_library_that_is_none(tmp_path) -> None:
    with pytest.raises(MaisiError, match="no mask library"):
        MaskLibrary(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(MaisiError, match="damaged"):
        MaskLibrary(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "masks": []}))
    with pytest.raises(MaisiError, match="version"):
        MaskLibrary(tmp_path)


def test_names_used_here() -> None:
    assert (label_id("liver"), label_id("brain"), label_id("hepatic tumor")) == (LIVER, BRAIN, HEPATIC_TUMOR)


def test_a_zarr_among_the_files_is_one_mask(folder, tmp_path) -> None:
    pytest.importorskip("zarr")
    (tmp_path / "masks").mkdir()
    write_volume(tmp_path / "masks" / "a.zarr", read_labels(folder / "Patient_Secret_2.nii.gz"))
    build(tmp_path / "masks", tmp_path / "library")
    build([folder / "Patient_Secret_2.nii.gz"], tmp_path / "other")
    assert MaskLibrary(tmp_path / "library").rows == MaskLibrary(tmp_path / "other").rows


@pytest.fixture
def nested(tmp_path, folder):
    """Masks in folders of folders, beside items and a file that is no mask."""
    source = tmp_path / "source"
    for place in ("first", "second/deeper"):
        (source / place).mkdir(parents=True)
    shutil.copy(folder / "Patient_Secret_1.nii.gz", source / "first" / "b.nii.gz")
    shutil.copy(folder / "Patient_Secret_2.nii.gz", source / "second" / "deeper" / "a.nii.gz")
    (source / "second" / "broken.nii.gz").write_bytes(b"no mask")
    (source / "first" / "circle").symlink_to(source)
    item = source / "out" / "0000"
    item.mkdir(parents=True)
    for name in ("image", "labels"):
        shutil.copy(folder / "Patient_Secret_2.nii.gz", item / f"{name}.nii.gz")
    return source


def test_folders_of_folders_are_looked_through_and_what_is_no_mask_is_left_out(nested, tmp_path) -> None:
    with pytest.raises(MaisiError, match="broken"):
        build(nested, tmp_path / "library")
    assert not (tmp_path / "library").exists()
    told = []
    built = build(nested, tmp_path / "one", skip_unreadable=True, report=lambda *counts: told.append(counts))
    assert [row.id for row in built.index.masks] == ["0001", "0002", "0004"]  # first, the item's labels, deeper
    assert len(built.left_out) == 1
    assert "broken.nii.gz" in built.left_out[0]
    assert told[-1] == (4, 4)
    build(nested, tmp_path / "two", skip_unreadable=True, workers=2)
    assert tree_sha256(tmp_path / "one") == tree_sha256(tmp_path / "two")
    (tmp_path / "bad").mkdir()
    shutil.copy(nested / "second" / "broken.nii.gz", tmp_path / "bad")
    with pytest.raises(MaisiError, match="None of 1 files can be used"):
        build(tmp_path / "bad", tmp_path / "three", skip_unreadable=True)
    assert not (tmp_path / "three").exists()
