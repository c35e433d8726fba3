import numpy as np
import pytest
from PIL import Image

from maisi.anatomy import BODY, EXTENSION, LABELS, TUMORS
from maisi.errors import MaisiError
from maisi.io.preview import BONE, LUNG, PLANES, SOFT_TISSUE, choose_window, label_color, preview
from maisi.volume import Volume


def body(spot_mm=(-40, 20, 30), size=(48, 40, 32), spacing=(4.0, 4.0, 6.0)):
    """A column of water in air, with one dense ball, 20 mm in radius: at the patient's left front, near the head."""
    volume = Volume.from_spacing(np.zeros(size, np.int16), spacing)
    index = np.indices(size).reshape(3, -1)
    place = (volume.affine[:3, :3] @ index + volume.affine[:3, 3:]).reshape(3, *size)
    hu = np.where(np.hypot(place[0], place[1]) < 60, 40, -1000).astype(np.int16)
    hu[((place - np.reshape(spot_mm, (3, 1, 1, 1))) ** 2).sum(axis=0) < 20**2] = 2000
    return volume.with_array(hu)


def test_planes_turn_the_patient_the_radiological_way():
    array = np.zeros((4, 5, 6))
    left, front, head = 0, 4, 5  # RAS+: the left is at the low end of x
    array[left, front, head] = 1
    axial, coronal, sagittal = PLANES
    assert np.argwhere(axial.cut(array, head)).tolist() == [[0, 3]]  # top right
    assert np.argwhere(coronal.cut(array, front)).tolist() == [[0, 3]]  # top right
    assert np.argwhere(sagittal.cut(array, left)).tolist() == [[0, 0]]  # top left
    assert axial.cut(array, 0).shape == (5, 4)
    assert coronal.cut(array, 0).shape == (6, 4)
    assert sagittal.cut(array, 0).shape == (6, 5)


def test_windows():
    np.testing.assert_allclose(SOFT_TISSUE.grey(np.array([-1000, -160, 40, 240, 3000])), [0, 0, 0.5, 1, 1])
    assert LUNG.grey(np.array([-1000])).item() == 0  # air around the body is black
    assert BONE.grey(np.array([-1000])).item() == 0
    assert str(SOFT_TISSUE) == "soft tissue  W 400 L 40"


def test_lungs_choose_the_window():
    hu = np.full((32, 32, 32), 40, np.int16)
    assert choose_window(hu) is BONE
    hu[8:14, 8:24, 8:24] = -800
    assert choose_window(hu) is LUNG
    hu[hu == -800] = -1000
    assert choose_window(hu) is BONE


def test_neighbouring_labels_differ_in_colour():
    colors = {label.id: np.array(label_color(label.id)) for label in LABELS + EXTENSION}
    assert all(((c >= 0) & (c <= 1)).all() and c.max() > 0.5 for c in colors.values())
    for one in range(1, 132):
        assert np.abs(colors[one] - colors[one + 1]).max() > 0.2
    for tumor in TUMORS:
        apart = [np.abs(colors[tumor] - other).max() for id, other in colors.items() if id not in TUMORS]
        assert min(apart) > 0.15


def test_the_legend_says_how_many_it_leaves_out(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("maisi.io.preview._Canvas.text", lambda self, left, top, text, *more: written.append(text))
    ct = body((0, 0, 0), (60, 60, 60), (3.0, 3.0, 3.0))
    labels = ct.with_array(np.full(ct.shape, BODY, np.uint8))
    for id in range(1, 51):
        labels.array[:, :, id] = id
    preview(tmp_path / "a.png", ct, labels)
    assert "200 body" in written
    assert "and 11 more" in written


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_picture_is_black_with_true_proportions(tmp_path):
    preview(tmp_path / "a.png", body((0, 0, 0), (96, 80, 64), (2.0, 2.0, 3.0)), title="a $body$")
    picture = read(tmp_path / "a.png")
    assert picture.shape[1] == 1200
    assert (picture.max(axis=2) < 8).mean() > 0.45  # the air in and around the panels
    panels = (picture.min(axis=2) > 250)[75 : picture.shape[0] // 2]
    for left in (0, 410, 820):
        rows, columns = np.nonzero(panels[:, left : left + 380])
        assert np.ptp(rows) > 50
        assert abs(np.ptp(rows) - np.ptp(columns)) <= 0.15 * np.ptp(rows)  # a ball is round in every plane


def test_labels_are_coloured_where_they_lie(tmp_path):
    image = body()
    labels = np.zeros(image.shape, np.uint8)
    labels[image.array > -500] = BODY
    labels[image.array > 1000] = 26
    preview(tmp_path / "plain.png", image)
    preview(tmp_path / "labels.png", image, image.with_array(labels))
    plain, labelled = read(tmp_path / "plain.png"), read(tmp_path / "labels.png")
    assert labelled.shape[0] > plain.shape[0] * 1.4
    colored = np.ptp(labelled, axis=2) > 40
    assert not (np.ptp(plain, axis=2) > 40).any()
    rows, columns = np.nonzero(colored[:-40])
    assert rows.min() > labelled.shape[0] * 0.6
    assert columns.min() > 100  # the patient's left: nothing at the left edge of the axial panel


def test_the_cut_goes_through_the_tumour(tmp_path):
    image = body()
    labels = np.zeros(image.shape, np.uint8)
    labels[20:24, 20:24, 2:5] = 26
    preview(tmp_path / "a.png", image, image.with_array(labels))
    picture = read(tmp_path / "a.png")
    panels = (np.ptp(picture, axis=2) > 40)[:-40]
    thirds = [panels[:, i * 400 : (i + 1) * 400].any() for i in range(3)]
    assert thirds == [True, True, True]


def test_orientation_of_the_file_does_not_matter(tmp_path):
    image = body()
    flipped = Volume(
        image.array[::-1, :, ::-1],
        image.affine @ np.array([[-1, 0, 0, 47], [0, 1, 0, 0], [0, 0, -1, 31], [0, 0, 0, 1]]),
    )
    assert flipped.to_ras().same_grid(image)
    preview(tmp_path / "a.png", image)
    preview(tmp_path / "b.png", flipped)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 200, 2), (16, 16, 400)])
def test_odd_shapes(tmp_path, size):
    preview(tmp_path / "a.png", Volume.from_spacing(np.zeros(size, np.int16), (1, 1, 1)))
    height, width, _ = read(tmp_path / "a.png").shape
    assert width == 1200
    assert height <= 3100


def test_labels_on_another_grid(tmp_path):
    other = Volume.from_spacing(np.zeros((48, 40, 32), np.uint8), (4, 4, 5))
    with pytest.raises(MaisiError, match="different grids"):
        preview(tmp_path / "a.png", body(), other)
    assert list(tmp_path.iterdir()) == []
