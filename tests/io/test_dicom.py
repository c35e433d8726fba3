import warnings

import highdicom
import numpy as np
import pytest
from dicom_files import PATIENT, datasets, enhanced, save
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1, JPEGLSLossless, RLELossless
from scipy.spatial.transform import Rotation

from maisi.errors import MaisiError
from maisi.io.dicom import open_series
from maisi.io.nifti import opened_rows, read_header, read_label_names, read_volume, volume_sha256, write_volume

AFFINE = np.array([[-0.7, 0, 0, 90], [0, -0.8, 0, 70], [0, 0, 2.5, -300], [0, 0, 0, 1.0]])
"""Rows toward the patient's left, columns toward his back, slices upward: as most CTs are."""


@pytest.fixture
def hu():
    return np.random.default_rng(0).integers(-1024, 3072, (7, 6, 5)).astype(np.int16)


@pytest.fixture
def series(tmp_path, hu):
    return save(tmp_path / "series", datasets(hu + 1024, AFFINE, bits=12, RescaleIntercept=-1024))


def test_a_series_is_a_volume(series, hu):
    volume = read_volume(series)
    np.testing.assert_array_equal(volume.array, hu)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-9)
    assert volume.array.dtype == np.int16


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(2, 5)),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
    downward=st.booleans(),
)
def test_any_place_in_the_patient_as_highdicom_has_it(tmp_path_factory, seed, shape, spacing, downward):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(rng=seed).as_matrix() @ np.diag([*spacing[:2], spacing[2] * (1 - 2 * downward)])
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    stored = rng.integers(0, 4096, shape)
    slices = datasets(stored, affine)
    volume = read_volume(save(tmp_path_factory.mktemp("series"), slices))
    other = highdicom.get_volume_from_series(slices)
    shown = np.diag([-1.0, -1.0, 1.0, 1.0]) @ other.affine
    # both hold the same values at the same places; highdicom indexes slice, row, column
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    there = np.linalg.inv(shown) @ volume.affine @ np.c_[index, np.ones(len(index))].T
    found = other.array[tuple(np.rint(there[:3]).astype(int))]
    np.testing.assert_allclose(there[:3], np.rint(there[:3]), atol=1e-4)
    np.testing.assert_array_equal(volume.array[tuple(index.T)], found)


@pytest.mark.parametrize(
    ("bits", "signed", "slope", "intercept", "dtype"),
    [
        (12, False, 1, -1024, np.int16),
        (16, True, 1, 0, np.int16),
        (16, False, 1, -1024, np.int32),
        (12, False, 2, 0, np.int16),
        (12, False, 0.5, -1024, np.float32),
    ],
)
def test_values(tmp_path, bits, signed, slope, intercept, dtype):
    stored = np.random.default_rng(1).integers(-2048 if signed else 0, 2048, (4, 3, 2))
    slices = datasets(stored, AFFINE, signed=signed, bits=bits, RescaleSlope=slope, RescaleIntercept=intercept)
    volume = read_volume(save(tmp_path / "s", slices))
    np.testing.assert_array_equal(volume.array, (stored * slope + intercept).astype(dtype))
    assert volume.array.dtype == dtype


def test_slices_with_slopes_of_their_own(tmp_path):
    slices = datasets(np.full((2, 2, 3), 10), AFFINE)
    for z, slice_ in enumerate(slices):
        slice_.RescaleSlope = z + 0.5
    np.testing.assert_array_equal(read_volume(save(tmp_path / "s", slices)).array[0, 0], (5, 15, 25))


def test_all_slices_in_one_file(tmp_path, hu):
    folder = save(tmp_path / "enhanced", [enhanced(hu + 1024, AFFINE, -1024)])
    for path in (folder, next(folder.iterdir())):
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array, hu)
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-9)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed(tmp_path, hu, syntax):
    slices = datasets(hu + 1024, AFFINE, RescaleIntercept=-1024)
    for slice_ in slices:
        slice_.compress(syntax)
    np.testing.assert_array_equal(read_volume(save(tmp_path / "s", slices)).array, hu)


def test_rows_without_the_whole(series):
    whole = read_volume(series).to_ras()
    with opened_rows(series) as rows:
        assert rows.shape == whole.shape
        for axis in range(3):
            np.testing.assert_array_equal(rows.rows(axis, 1, 3), np.take(whole.array, range(1, 3), axis))


def test_a_file_names_its_series(tmp_path, series, hu):
    save(tmp_path / "both", datasets(hu + 1024, AFFINE, series="1.2.3", RescaleIntercept=-1024))
    second = datasets(hu[:, :, :3] * 0 + 7, AFFINE, series="1.2.4")
    for n, slice_ in enumerate(second):
        slice_.save_as(tmp_path / "both" / f"second-{n}.dcm", enforce_file_format=True)
    with pytest.raises(
        MaisiError, match=r"holds 2 series; give one of their files: IM0\d+ \(CT, 5 .*second-0.dcm \(CT, 3"
    ):
        read_header(tmp_path / "both")
    assert read_header(tmp_path / "both" / "second-1.dcm").shape == (7, 6, 3)
    assert read_header(tmp_path / "both" / "IM00002").shape == (7, 6, 5)


def test_what_is_no_slice_is_passed_over(tmp_path, hu):
    folder = save(tmp_path / "study" / "a" / "b", datasets(hu + 1024, AFFINE, RescaleIntercept=-1024))
    for n, localizer in enumerate(datasets(hu[:, :, :2], AFFINE, series="1.5")):
        localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        localizer.save_as(folder / f"scout-{n}", enforce_file_format=True)
    (report,) = datasets(hu[:, :, :1], AFFINE, series="1.6")
    for name in ("ImagePositionPatient", "PixelData", "Rows"):
        delattr(report, name)
    report.save_as(folder / "report", enforce_file_format=True)
    (folder / "DICOMDIR.txt").write_text("no DICOM")
    (tmp_path / "study" / "empty").touch()
    np.testing.assert_array_equal(read_volume(tmp_path / "study").array, hu)
    with pytest.raises(MaisiError, match=r"report holds no slices \(CT\)"):
        read_volume(folder / "report")


def test_copies_count_once(series, hu):
    for path in list(series.iterdir()):
        (series / f"copy-{path.name}").write_bytes(path.read_bytes())
    np.testing.assert_array_equal(read_volume(series).array, hu)


def moved(slices, z, mm):
    x, y, height = slices[z].ImagePositionPatient
    slices[z].ImagePositionPatient = [x, y, float(height) + mm]


def tilted(slices, degrees):
    for z, slice_ in enumerate(slices):
        x, y, height = slice_.ImagePositionPatient
        slice_.ImagePositionPatient = [x, float(y) + z * 2.5 * np.tan(np.radians(degrees)), height]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(2), "slices are missing .2.5 mm apart, but 5 between the slices at -297.5 and -292.5"),
        (lambda s: moved(s, 1, 2.5), "several slices at one place"),
        (lambda s: moved(s, 1, 0.6), "not evenly spaced .1.9 to 3.1 mm"),
        (lambda s: tilted(s, 12), "gantry tilted by 12.0 degrees"),
        (lambda s: s.__delitem__(slice(1, None)), "a single slice"),
        (lambda s: setattr(s[1], "PixelSpacing", [1.0, 1.0]), "differ in size, direction or spacing"),
        (lambda s: setattr(s[1], "ImageOrientationPatient", [0, 1, 0, 1, 0, 0]), "differ in size, direction"),
        (lambda s: [setattr(d, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]) for d in s], "rows and columns are dama"),
        (lambda s: [setattr(d, "PixelSpacing", [0, 0]) for d in s], "spacing of its pixels is 0 mm"),
        (lambda s: delattr(s[1], "PixelSpacing"), "damaged DICOM header"),
        (lambda s: setattr(s[1], "SamplesPerPixel", 3), "holds colours"),
        (lambda s: setattr(s[1], "PhotometricInterpretation", "PALETTE COLOR"), "holds colours"),
        (lambda s: setattr(s[1], "HighBit", 11), "in a way that is not read"),
        (lambda s: setattr(s[1], "RescaleSlope", 0), "damaged DICOM header .a rescale slope of 0"),
        (lambda s: setattr(s[1], "SOPInstanceUID", s[0].SOPInstanceUID) or moved(s, 1, 0.6), "not evenly spaced"),
        (lambda s: setattr(s[1], "PixelData", s[1].PixelData[:20]), "cut short or damaged"),
    ],
)
def test_series_that_are_no_volume(tmp_path, hu, change, message):
    slices = datasets(hu + 1024, AFFINE)
    change(slices)
    with pytest.raises(MaisiError, match=message) as told:
        read_volume(save(tmp_path / "series", slices))
    assert PATIENT not in str(told.value)


def test_rounded_places_and_a_little_tilt_are_no_fault(tmp_path, hu):
    slices = datasets(hu + 1024, AFFINE, RescaleIntercept=-1024)
    moved(slices, 1, 0.1)
    tilted(slices, 0.5)
    volume = read_volume(save(tmp_path / "series", slices))
    np.testing.assert_array_equal(volume.array, hu)
    np.testing.assert_allclose(volume.spacing_mm, (0.7, 0.8, 2.5), atol=2e-3)


def test_the_hash_of_a_slice_is_that_of_all(series):
    before = volume_sha256(series)
    assert volume_sha256(series / "IM00001") == before
    (series / "notes.txt").write_text("no part of it")
    assert volume_sha256(series) == before
    content = bytearray((series / "IM00003").read_bytes())
    content[-1] ^= 1
    (series / "IM00003").write_bytes(content)
    assert volume_sha256(series / "IM00001") != before


def test_budgets_come_before_pixels(series, monkeypatch):
    monkeypatch.setattr("pydicom.pixels.utils.pixel_array", lambda *_, **__: pytest.fail("a pixel was read"))
    assert read_header(series).shape == (7, 6, 5)
    assert read_label_names(series) == {}
    with pytest.raises(MaisiError, match="asks for 7 x 6 x 5 voxels of int16"):
        read_volume(series, budget_bytes=100)


def test_lossless_jpeg_wants_a_package(tmp_path, hu, monkeypatch):
    class Missing:
        is_available = False

    slices = datasets(hu + 1024, AFFINE)
    for slice_ in slices:
        slice_.PixelData = encapsulate([slice_.PixelData])
        slice_["PixelData"].is_undefined_length = True
        slice_.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    monkeypatch.setattr("pydicom.pixels.decoders.base.get_decoder", lambda _: Missing())
    with pytest.raises(MaisiError, match=r"coded as JPEG Lossless.* pip install 'maisi\[dicom\]'"):
        open_series(save(tmp_path / "s", slices))


def test_a_deflated_file_is_not_inflated(tmp_path, series, hu):
    slices = datasets(hu + 1024, AFFINE)
    slices[0].file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    with pytest.raises(MaisiError, match="is a deflated DICOM file"):
        read_volume(save(tmp_path / "s", slices))
    slices[0].save_as(series / "other", enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(series / "IM00001").array, hu)


def test_doses_and_frames_without_a_place_are_no_slices(series, hu):
    (dose,) = datasets(hu[:, :, :1], AFFINE, series="1.7")
    dose.Modality = "RTDOSE"
    dose.save_as(series / "dose", enforce_file_format=True)
    (cine,) = datasets(hu[:, :, :1], AFFINE, series="1.8")
    cine.NumberOfFrames, cine.PixelData = 2, cine.PixelData * 2
    cine.save_as(series / "cine", enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(series).array, hu)


def test_all_slices_in_one_file_with_one_that_has_no_place(tmp_path, hu):
    image = enhanced(hu + 1024, AFFINE, -1024)
    del image.PerFrameFunctionalGroupsSequence[-1]
    with pytest.raises(MaisiError, match="5 frames, of which 4 have a place"):
        read_volume(save(tmp_path / "enhanced", [image]))


def test_rescaled_as_a_whole(tmp_path, hu):
    image = enhanced(hu + 1024, AFFINE, -1024)
    del image.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    image.RescaleSlope, image.RescaleIntercept = 1, -1024
    np.testing.assert_array_equal(read_volume(save(tmp_path / "enhanced", [image])).array, hu)


def test_thin_slices_at_rounded_places(tmp_path):
    affine = np.diag([0.7, 0.8, 0.625, 1])
    slices = datasets(np.zeros((2, 2, 40), int), affine)
    for slice_ in slices:
        x, y, height = slice_.ImagePositionPatient
        slice_.ImagePositionPatient = [x, y, f"{float(height):.1f}"]
    assert read_volume(save(tmp_path / "s", slices)).spacing_mm[2] == pytest.approx(0.625, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_ends_in_one_sentence(tmp_path_factory, data):
    stored = np.random.default_rng(0).integers(0, 4096, (4, 3, 3))
    folder = save(tmp_path_factory.mktemp("series"), datasets(stored, AFFINE))
    path = folder / "IM00001"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(1, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = ""
        try:
            read_volume(folder)
        except MaisiError as error:
            told = str(error)
    assert PATIENT not in told


def test_folders_and_files_that_hold_none(tmp_path, hu):
    with pytest.raises(MaisiError, match="holds no DICOM images; give a folder with a series"):
        read_volume(tmp_path)
    (tmp_path / "a.dcm").write_bytes(b"short")
    with pytest.raises(MaisiError, match=r"a\.dcm is not a DICOM file, or damaged"):
        read_volume(tmp_path / "a.dcm")
    with pytest.raises(MaisiError, match=r"Cannot read .*none.dcm"):
        read_volume(tmp_path / "none.dcm")
    with pytest.raises(MaisiError, match=r"volumes are written as \.nii\.gz"):
        write_volume(tmp_path / "a.dcm", read_volume(save(tmp_path / "s", datasets(hu + 1024, AFFINE))))
