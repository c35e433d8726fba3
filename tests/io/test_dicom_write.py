import sys
import warnings
from datetime import UTC, datetime

import highdicom
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from maisi.errors import MaisiError
from maisi.io.dicom_structures import read_structures
from maisi.io.dicom_write import About, write_ct, write_segmentation
from maisi.io.nifti import read_volume
from maisi.volume import Volume

ABOUT = About("case-1", "a CT", "SYNTHETIC", "tiny", datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC), "key")
NAMES = {1: "liver", 26: "hepatic tumor", 200: "body"}


def written(folder, volume):
    folder.mkdir()
    return write_ct(folder, volume, ABOUT)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(2, 5)),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
    degrees=st.floats(0, 30),
)
def test_written_and_read(tmp_path_factory, seed, shape, spacing, degrees):
    rng = np.random.default_rng(seed)
    axes = rng.permutation(3)
    affine = np.eye(4)
    turn = Rotation.from_rotvec(np.radians(degrees) * np.array([0.6, 0, 0.8])).as_matrix()
    affine[:3, :3] = turn @ np.diag(rng.choice([-1, 1], 3))[:, axes] @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    volume = Volume(rng.integers(-1024, 3072, np.array(shape)).astype(np.int16), affine)
    if volume.to_ras().shape[2] < 2:
        return
    folder = tmp_path_factory.mktemp("a") / "ct"
    slices = written(folder, volume)
    made, wanted = read_volume(folder).to_ras(), volume.to_ras()
    np.testing.assert_array_equal(made.array, wanted.array)
    np.testing.assert_allclose(made.affine, wanted.affine, atol=1e-5)
    other = highdicom.get_volume_from_series(slices)
    index = np.stack(np.meshgrid(*map(np.arange, wanted.shape), indexing="ij"), -1).reshape(-1, 3)
    to_other = np.linalg.inv(np.diag([-1.0, -1.0, 1.0, 1.0]) @ other.affine) @ wanted.affine
    there = np.rint(index @ to_other[:3, :3].T + to_other[:3, 3]).astype(int)
    np.testing.assert_array_equal(other.array[tuple(there.T)], wanted.array[tuple(index.T)])


def test_what_a_file_says(tmp_path):
    volume = Volume(np.full((4, 3, 2), 7, np.int16), np.diag([2.0, 2, 3, 1]))
    written(tmp_path / "ct", volume)
    files = sorted((tmp_path / "ct").iterdir())
    assert [file.name for file in files] == ["0001.dcm", "0002.dcm"]
    low, high = map(pydicom.dcmread, files)
    assert low.SyntheticData == "YES"
    assert low.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
    assert (low.PatientName, low.PatientID, low.StudyDate, low.StudyTime) == ("case-1^", "case-1", "20260203", "040506")
    assert low.ImageComments == "SYNTHETIC"
    assert low.SeriesInstanceUID == high.SeriesInstanceUID
    assert low.SOPInstanceUID != high.SOPInstanceUID
    assert all(pydicom.uid.UID(low[name].value).is_valid for name in ("SOPInstanceUID", "StudyInstanceUID"))
    assert float(high.ImagePositionPatient[2]) - float(low.ImagePositionPatient[2]) == 3
    assert ABOUT.uid("ct") != About(**{**vars(ABOUT), "key": "other"}).uid("ct")


def test_long_and_odd_names_stay_different(tmp_path):
    volume = Volume(np.zeros((4, 3, 2), np.int16), np.eye(4))
    told = []
    for n in range(2):
        about = About(**{**vars(ABOUT), "case": "a" * 80 + f"-{n}", "model": "m\\" + "x" * 80, "key": str(n)})
        (tmp_path / str(n)).mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            slices = write_ct(tmp_path / str(n), volume, about)
            labels = volume.with_array(np.ones((4, 3, 2), np.uint8))
            write_segmentation(tmp_path / f"{n}.dcm", labels, {1: "a\\b\t" + "c" * 90}, slices, about, ())
        told.append(slices[0])
    assert told[0].PatientID != told[1].PatientID
    assert max(len(made.PatientID) for made in told) <= 64
    assert max(len(str(made.PatientName)) for made in told) <= 64
    assert pydicom.dcmread(tmp_path / "0.dcm").SegmentSequence[0].SegmentLabel.startswith("a b c")


def test_other_labels_have_other_identifiers(tmp_path):
    labels = Volume(np.arange(24, dtype=np.uint8).reshape(4, 3, 2) % 3, np.eye(4))
    slices = written(tmp_path / "ct", labels.with_array(labels.array.astype(np.int16)))
    uids = []
    for n, names in enumerate(({1: "liver"}, {2: "spleen"}, {1: "spleen"})):
        write_segmentation(tmp_path / f"{n}.dcm", labels, names, slices, ABOUT, ())
        uids.append(pydicom.dcmread(tmp_path / f"{n}.dcm").SOPInstanceUID)
    assert len(set(uids)) == 3


def test_fractions_of_hu(tmp_path):
    with pytest.raises(MaisiError, match="not of whole HU"):
        written(tmp_path / "ct", Volume(np.full((4, 3, 2), 1234.7, np.float32), np.eye(4)))


def test_no_right_angles(tmp_path):
    affine = np.diag([2.0, 2, 3, 1])
    affine[0, 2] = 1
    with pytest.raises(MaisiError, match="not at right angles"):
        written(tmp_path / "ct", Volume(np.zeros((4, 3, 2), np.int16), affine))
    with pytest.raises(MaisiError, match="a single slice"):
        written(tmp_path / "flat", Volume(np.zeros((4, 3, 1), np.int16), np.eye(4)))


def test_segmentation(tmp_path):
    rng = np.random.default_rng(0)
    affine = np.array([[0, -2.0, 0, 10], [2.5, 0, 0, 20], [0, 0, 3, -40], [0, 0, 0, 1]])
    labels = Volume(rng.choice([0, 1, 26, 77, 200], (7, 6, 5)).astype(np.uint8), affine)
    ct = labels.with_array(labels.array.astype(np.int16))
    slices = written(tmp_path / "ct", ct)
    for name in ("a.dcm", "b.dcm"):
        write_segmentation(tmp_path / name, labels, NAMES, slices, ABOUT, tumors={26})
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    found = read_structures(tmp_path / "a.dcm", ct)
    assert list(found.names.values()) == list(NAMES.values())
    made = found.painted()
    assert made.same_grid(labels)
    for number, id in enumerate(NAMES, 1):
        np.testing.assert_array_equal(made.array == number, labels.array == id)
    made = pydicom.dcmread(tmp_path / "a.dcm")
    assert made.SyntheticData == "YES"
    kinds = [s.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning for s in made.SegmentSequence]
    assert kinds == ["Anatomical Structure", "Morphologically Abnormal Structure", "Anatomical Structure"]
    assert [s.SegmentedPropertyTypeCodeSequence[0].CodeValue for s in made.SegmentSequence] == ["1", "26", "200"]
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert made.FrameOfReferenceUID == slices[0].FrameOfReferenceUID


def test_segmentations_want_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    labels = Volume(np.ones((4, 3, 2), np.uint8), np.eye(4))
    with pytest.raises(MaisiError, match=r"pip install 'maisi\[dicom\]'"):
        write_segmentation(tmp_path / "a.dcm", labels, NAMES, [], ABOUT, tumors=())
    assert not list(tmp_path.iterdir())
