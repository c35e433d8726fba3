import matplotlib.image
import numpy as np
import pytest

from maisi.errors import MaisiError
from maisi.evaluation.pictures import Tile, contact_sheet
from maisi.io.preview import Window
from maisi.volume import Volume

FULL = Window("full", 2000, 0)


def solid(size, spacing, hu=1000):
    return Volume.from_spacing(np.full(size, hu, np.int16), spacing)


def white_boxes(path):
    """Width and height in pixels of each solid white box, from left to right."""
    from scipy import ndimage

    picture = matplotlib.image.imread(path)[..., :3]
    parts, _ = ndimage.label(picture.min(axis=2) > 0.97)
    boxes = sorted(ndimage.find_objects(parts), key=lambda b: b[1].start)
    return [(x.stop - x.start, y.stop - y.start) for y, x in boxes if y.stop - y.start > 20]


def test_tiles_have_the_same_scale_in_mm(tmp_path):
    tiles = [Tile(solid((50, 40, 30), (2, 2, 4)), plane, window=FULL) for plane in ("axial", "coronal", "sagittal")]
    tiles.append(Tile(solid((50, 40, 30), (1, 1, 1)), "axial", window=FULL))
    contact_sheet(tmp_path / "sheet.png", [tiles], px_per_mm=1.5)
    expected = [(150, 120), (150, 180), (120, 180), (75, 60)]
    for found, wanted in zip(white_boxes(tmp_path / "sheet.png"), expected, strict=True):
        assert found == pytest.approx(wanted, abs=2)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_corner_is_shown_where_the_convention_puts_it(plane):
    """Upper left is the patient's right (or front) and front (or top)."""
    hu = np.full((9, 9, 9), -1000, np.int16)
    hu[5:, 5:, 5:] = 1000  # right, anterior, superior
    hu[4] = hu[5]  # the middle slices cut through it
    hu[:, 4] = hu[:, 5]
    hu[:, :, 4] = hu[:, :, 5]
    picture = Tile(Volume.from_spacing(hu, (1, 1, 1)), plane, window=FULL).picture()
    assert picture[:5, :5].all()
    assert not picture[5:].any()
    assert not picture[:, 5:].any()


def test_stored_orientation_does_not_matter():
    rng = np.random.default_rng(0)
    ct = Volume.from_spacing(rng.integers(-200, 300, (7, 8, 9)).astype(np.int16), (1, 2, 3))
    turned = Volume(np.transpose(ct.array, (2, 0, 1)), ct.affine[:, [2, 0, 1, 3]])
    for plane in ("axial", "coronal", "sagittal"):
        np.testing.assert_array_equal(Tile(ct, plane).picture(), Tile(turned, plane).picture())
        assert Tile(ct, plane).size_mm == Tile(turned, plane).size_mm


def test_the_same_tiles_give_the_same_bytes(tmp_path):
    tiles = [
        [Tile(solid((20, 20, 20), (3, 3, 3), 40), "axial", "one\ntwo")],
        [Tile(solid((9, 9, 9), (3, 3, 3)), "axial")],
    ]
    for name in ("a", "b"):
        contact_sheet(tmp_path / f"{name}.png", tiles, title="price: $5 and $6")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_missing_folder_is_explained(tmp_path):
    with pytest.raises(MaisiError, match="does not exist"):
        contact_sheet(tmp_path / "no" / "sheet.png", [[Tile(solid((9, 9, 9), (1, 1, 1)), "axial")]])
