import numpy as np
import pytest
from dicom_files import circle, contour, datasets, rtstruct, save, seg
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from scipy.spatial.transform import Rotation

from maisi.errors import MaisiError
from maisi.io.dicom import read_dicom
from maisi.io.dicom_structures import holds_structures, inside_of, read_structures
from maisi.io.nifti import read_volume
from maisi.volume import Volume

AFFINE = np.array([[-2.0, 0, 0, 40], [0, -2.5, 0, 30], [0, 0, 3.0, -100], [0, 0, 0, 1.0]])


@pytest.fixture
def grid():
    return Volume(np.zeros((30, 26, 12), np.int16), AFFINE)


def inside(centre, radius, shape=(30, 26)):
    x, y = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2


def test_contours_are_filled(tmp_path, grid):
    ring = [c for z in (3, 4, 5) for c in (circle((14, 12), 9.3, z, AFFINE), circle((14, 12), 4.2, z, AFFINE))]
    small = [circle((14, 18), 2.4, 4, AFFINE)]
    path = rtstruct(tmp_path / "a.dcm", {"Ring": ring, "Nothing": [], "Node": small})
    assert holds_structures(path)
    found = read_structures(path, grid)
    assert dict(found.names) == {1: "Ring", 2: "Nothing", 3: "Node"}
    assert found.empty == (2,)
    labels = found.painted()
    assert labels.same_grid(grid)
    expected = np.zeros(grid.shape, np.uint8)
    expected[:, :, 3:6] = (inside((14, 12), 9.3) & ~inside((14, 12), 4.2))[:, :, None]
    expected[:, :, 4][inside((14, 18), 2.4)] = 3
    np.testing.assert_array_equal(labels.array, expected)
    covered = found.painted(lambda number: -number).array
    ring_alone = (inside((14, 12), 9.3) & ~inside((14, 12), 4.2))[:, :, None]
    np.testing.assert_array_equal(covered[:, :, 4:5], np.where(ring_alone, 1, expected[:, :, 4:5]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_contours_on_any_grid(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(rng=seed).as_matrix() @ np.diag(rng.uniform(0.5, 4, 3))
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    order = rng.permutation(3)
    turned = affine[:, [*order, 3]]
    shape = np.array((30, 26, 12))
    path = rtstruct(tmp_path_factory.mktemp("a") / "a.dcm", {"A": [circle((14, 12), 6.3, z, affine) for z in (3, 4)]})
    found = read_structures(path, Volume(np.zeros(shape[order], np.int16), turned)).painted().array
    expected = np.zeros(shape, np.uint8)
    expected[:, :, 3:5] = inside((14, 12), 6.3)[:, :, None]
    np.testing.assert_array_equal(found, expected.transpose(order))


def test_slices_left_out_by_rule_are_filled(tmp_path, grid):
    path = rtstruct(
        tmp_path / "a.dcm",
        {
            "Cone": [circle((14, 12), radius, z, AFFINE) for z, radius in ((1, 9), (4, 6), (7, 3))],
            "Halves": [circle((14, 12), 5, z, AFFINE) for z in (1, 2, 3, 7, 8)],
        },
    )
    found = read_structures(path, grid)
    areas = [int(found.pieces[1].inside[:, :, n].sum()) for n in range(7)]
    assert areas == sorted(areas, reverse=True)
    assert areas[1] == pytest.approx(np.pi * 64, rel=0.1)
    assert areas[5] == pytest.approx(np.pi * 16, rel=0.1)
    assert found.pieces[2].inside.any((0, 1)).tolist() == [True] * 3 + [False] * 3 + [True] * 2


def test_contours_beyond_the_grid(tmp_path, grid):
    far = [circle((28, 12), 6.1, z, AFFINE) for z in (-2, 0, 1, 11, 14)]
    found = read_structures(rtstruct(tmp_path / "a.dcm", {"A": far}), grid).painted().array
    np.testing.assert_array_equal(found[:, :, 1] > 0, inside((28, 12), 6.1))
    assert found.any((0, 1)).tolist() == [True, True] + [False] * 9 + [True]
    with pytest.raises(MaisiError, match="holds no structure with voxels in it on this grid"):
        read_structures(rtstruct(tmp_path / "b.dcm", {"A": [circle((90, 90), 6, 3, AFFINE)]}), grid)


@pytest.mark.parametrize(
    ("structures", "message"),
    [
        ({"A": []}, "holds no structure with voxels"),
        ({"A": [contour([[5, 5, 5]], AFFINE, "POINT")]}, "holds no structure with voxels"),
        ({"A": [contour([[5, 5, 5], [9, 5, 5]], AFFINE)]}, "holds no structure with voxels"),
    ],
)
def test_contours_that_are_refused(tmp_path, grid, structures, message):
    with pytest.raises(MaisiError, match=message):
        read_structures(rtstruct(tmp_path / "a.dcm", structures), grid)


@pytest.mark.parametrize(
    "odd", [circle((9, 9), 4, 3.5, AFFINE), contour([[1, 1, 1], [9, 1, 4], [9, 9, 8], [1, 9, 2]], AFFINE)]
)
def test_one_odd_structure_is_told_and_the_others_are_read(tmp_path, grid, odd):
    found = read_structures(rtstruct(tmp_path / "a.dcm", {"A": [odd], "B": [circle((9, 9), 4, 3, AFFINE)]}), grid)
    assert list(found.pieces) == [2]
    assert "'A' was not drawn on the slices of this CT" in found.faults[1]


def test_names_that_several_structures_have_are_numbered(tmp_path, grid):
    same = {name: [circle((9, 9), 4, z, AFFINE)] for z, name in enumerate(("Lesion", "lesion ", "", " "))}
    found = read_structures(rtstruct(tmp_path / "a.dcm", same), grid)
    assert list(found.names.values()) == ["Lesion", "lesion 2", "unnamed", "unnamed 2"]


def test_contours_of_finer_slices_and_those_drawn_twice(tmp_path, grid):
    finer = [circle((14, 12), 6.3, z / 3, AFFINE) for z in range(6, 22)]
    twice = [circle((14, 12), 6.3, z, AFFINE) for z in (3, 3, 4)]
    found = read_structures(rtstruct(tmp_path / "a.dcm", {"A": finer, "B": twice}), grid)
    disc = int(inside((14, 12), 6.3).sum())
    assert [int(n) for n in found.pieces[1].inside.sum((0, 1))] == [disc] * 6
    assert [int(n) for n in found.pieces[2].inside.sum((0, 1))] == [disc] * 2


def test_areas_with_a_common_edge_are_one_and_islands_in_holes_stay(tmp_path, grid):
    left = contour([[2, 2, 3], [8, 2, 3], [8, 9, 3], [2, 9, 3]], AFFINE)
    right = contour([[8, 2, 3], [14, 2, 3], [14, 9, 3], [8, 9, 3]], AFFINE)
    nested = [circle((14, 12), radius, 3, AFFINE) for radius in (9.3, 6.2, 3.1)]
    found = read_structures(rtstruct(tmp_path / "a.dcm", {"A": [left, right], "B": nested}), grid)
    assert found.pieces[1].inside.sum() == 12 * 7
    areas = [int(inside((14, 12), radius).sum()) for radius in (9.3, 6.2, 3.1)]
    assert found.pieces[2].inside.sum() == areas[0] - areas[1] + areas[2]


def test_two_islands_stay_two(tmp_path, grid):
    drawn = {"A": [(1,), (10,)], "B": [(1,), (5,), (10,)], "C": [(1,), (3,)]}
    path = rtstruct(
        tmp_path / "a.dcm", {name: [circle((9, 9), 5, z, AFFINE) for (z,) in slices] for name, slices in drawn.items()}
    )
    found = read_structures(path, grid)
    for piece, slices in zip(found.pieces.values(), drawn.values(), strict=True):
        shown = np.flatnonzero(piece.inside.any((0, 1))) + piece.start[2]
        assert shown.tolist() == [z for (z,) in slices]


def test_a_contour_too_long_for_its_kind_of_value(tmp_path, grid):
    path = rtstruct(tmp_path / "a.dcm", {"A": [circle((14, 12), 6.3, 3, AFFINE, 4000)]})
    assert path.stat().st_size > 1 << 16
    assert read_structures(path, grid).pieces[1].inside.sum() == inside((14, 12), 6.3).sum()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), count=st.integers(3, 12))
def test_polygons_pixel_by_pixel(seed, count):
    outline = np.random.default_rng(seed).uniform(-3, 14, (count, 2))
    pixels = np.stack(np.meshgrid(np.arange(12), np.arange(9), indexing="ij"), -1).reshape(-1, 2)
    around = np.zeros(len(pixels), bool)
    for (x, y), (next_x, next_y) in zip(outline, np.roll(outline, -1, 0), strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            at = y + (pixels[:, 0] - x) / (next_x - x) * (next_y - y)
        around ^= ((x <= pixels[:, 0]) != (next_x <= pixels[:, 0])) & (pixels[:, 1] > at)
    np.testing.assert_array_equal(inside_of(outline, (12, 9)).ravel(), around)


def test_contours_want_a_ct(tmp_path):
    path = rtstruct(tmp_path / "a.dcm", {"A": [circle((9, 9), 4, 3, AFFINE)]})
    with pytest.raises(MaisiError, match="filled on the grid of a CT; give it with --ct"):
        read_structures(path, None)
    with pytest.raises(MaisiError, match=r"no slices \(RTSTRUCT\); its structures come in by `maisi mask import`"):
        read_volume(path)


@pytest.fixture
def slices():
    return datasets(np.random.default_rng(0).integers(0, 2000, (9, 8, 7)), AFFINE)


@pytest.fixture
def masks():
    rng = np.random.default_rng(1)
    one, two = np.zeros((2, 9, 8, 7), bool)
    one[2:8, 1:7, 2:5] = rng.random((6, 6, 3)) < 0.7
    two[4:6, 2:4, 3:6] = True
    return {"Liver": one & ~two, "Tumour": two}


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_voxels(tmp_path, slices, masks, kind):
    path = seg(tmp_path / "seg.dcm", slices, masks, kind)
    assert holds_structures(path)
    found = read_structures(path, None)
    assert dict(found.names) == {1: "Liver", 2: "Tumour"}
    ct = read_volume(save(tmp_path / "ct", slices))
    labels = read_structures(path, ct).painted()
    assert labels.same_grid(ct)
    np.testing.assert_array_equal(labels.array, masks["Liver"] + 2 * masks["Tumour"].astype(np.uint8))
    for turned in (ct.to_ras(), Volume(ct.array[1:, :5, ::-1].transpose(2, 0, 1), _cut(ct.affine))):
        there = read_structures(path, turned).painted()
        assert there.same_grid(turned)
    np.testing.assert_array_equal(there.array, labels.array[1:, :5, ::-1].transpose(2, 0, 1))


def _cut(affine):
    """Of voxels [1:, :5, ::-1] of seven, with the axes (2, 0, 1)."""
    turn = np.array([[0, 1, 0, 1], [0, 0, 1, 0], [-1, 0, 0, 6], [0, 0, 0, 1.0]])
    return affine @ turn


def test_voxels_of_another_grid_stay_on_theirs(tmp_path, slices, masks):
    path = seg(tmp_path / "seg.dcm", slices, masks)
    other = Volume(np.zeros((20, 20, 20), np.int16), np.diag([1.0, 1, 1, 1]))
    assert read_structures(path, other).painted().spacing_mm == pytest.approx((2, 2.5, 3))


def test_overlapping_segments(tmp_path, slices, masks):
    both = masks | {"Liver": masks["Liver"] | masks["Tumour"]}
    found = read_structures(seg(tmp_path / "seg.dcm", slices, both), None)
    assert found.pieces[1].inside.sum() == both["Liver"].sum()
    assert (found.painted().array == 2).sum() == masks["Tumour"].sum()


def test_probabilities_count_from_a_half(tmp_path, slices, masks):
    weights = {name: mask * 0.7 for name, mask in masks.items()}
    weights["Tumour"] = masks["Tumour"] * 0.3
    found = read_structures(seg(tmp_path / "seg.dcm", slices, weights, "FRACTIONAL"), None)
    assert found.empty == (2,)
    assert found.pieces[1].inside.sum() == masks["Liver"].sum()


def test_slices_left_out_lie_where_the_ct_has_them(tmp_path, slices, masks):
    sparse = {"Liver": masks["Liver"] & np.isin(np.arange(7), (2, 4))}
    made = seg(tmp_path / "seg.dcm", slices, sparse)
    told = dcmread(made)
    for group in (*told.PerFrameFunctionalGroupsSequence, *told.SharedFunctionalGroupsSequence):
        for measures in group.get("PixelMeasuresSequence", ()):
            for name in ("SpacingBetweenSlices", "SliceThickness"):
                if name in measures:
                    delattr(measures, name)
    told.save_as(made)
    ct = read_volume(save(tmp_path / "ct", slices))
    found = read_structures(made, ct).painted()
    np.testing.assert_array_equal(found.array > 0, sparse["Liver"])
    assert found.same_grid(ct)


def test_segments_far_apart_take_no_memory(tmp_path, slices, masks):
    made = seg(tmp_path / "seg.dcm", slices, masks)
    told = dcmread(made)
    place = told.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence[0]
    place.ImagePositionPatient = [*place.ImagePositionPatient[:2], 2999900]
    told.save_as(made)
    with pytest.raises(MaisiError, match="the file is damaged"):
        read_structures(made, None)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_ends_in_one_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("a")
    path = rtstruct(folder / "a.dcm", {"A": [circle((9, 9), 4, 3, AFFINE, 12)]})
    content = bytearray(path.read_bytes())
    content = content[: data.draw(st.integers(200, len(content)))]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    grid = Volume(np.zeros((30, 26, 12), np.int16), AFFINE)
    try:
        if holds_structures(path):
            read_structures(path, grid)
    except MaisiError as error:
        assert "Nobody" not in str(error)  # noqa: PT017


def test_one_that_is_cut_within_its_contours_is_damaged(tmp_path, grid):
    path = rtstruct(tmp_path / "a.dcm", {"A": [circle((9, 9), 4, 3, AFFINE, 12)]})
    content = path.read_bytes()
    faults = 0
    for end in range(300, len(content), 7):
        path.write_bytes(content[:end])
        try:
            if holds_structures(path):
                read_structures(path, grid)
        except MaisiError:
            faults += 1
    assert faults > 20


def test_what_holds_no_structures(tmp_path, slices):
    folder = save(tmp_path / "ct", slices)
    assert not holds_structures(folder)
    assert not holds_structures(folder / "IM00001")
    assert not holds_structures(tmp_path / "none")
    (tmp_path / "a.nii").write_bytes(bytes(400))
    assert not holds_structures(tmp_path / "a.nii")
    assert read_dicom(tmp_path / "a.nii") is None
