"""What is written is read again, by us and by others; rows are those of the whole; what is damaged is told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maisi.errors import MaisiError
from maisi.io import zarr_store
from maisi.io.nifti import (
    opened_rows,
    read_header,
    read_label_names,
    read_labels,
    read_volume,
    write_slabs,
    write_volume,
)
from maisi.io.slabs import Slabs
from maisi.volume import Volume

zarr = pytest.importorskip("zarr")

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
NAMES = {1: "liver", 5: "right kidney", 150: "a <b> & c"}


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Several chunks along each axis of small volumes, the last ones not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_store, "CHUNK", 4)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def edit(path: Path, change) -> None:
    """Change JSON in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def aligned(order, signs, spacing=(1.5, 2.0, 3.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.array(signs) * spacing)[:, order]
    affine[:3, 3] = (30.25, -40.5, 1000.0)
    return affine


@st.composite
def affines(draw):
    """Any order of axes, any direction, oblique and sheared."""
    matrix = draw(hnp.arrays(np.float64, (3, 3), elements=st.floats(-2, 2, width=32)))
    signs = draw(st.tuples(*[st.sampled_from([-7.0, 7.0])] * 3))
    affine = np.eye(4)
    affine[:3, :3] = (matrix + np.diag(signs))[:, draw(st.permutations(range(3)))]
    affine[:3, 3] = draw(hnp.arrays(np.float64, 3, elements=st.floats(-1000, 1000)))
    return affine


@st.composite
def volumes(draw):
    dtype = draw(st.sampled_from([np.int16, np.uint8]))
    array = draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)))
    return Volume(array, draw(affines()))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(volume=volumes(), ending=st.sampled_from(["zarr", "ome.zarr"]))
def test_there_and_back(tmp_path_factory, volume, ending):
    path = tmp_path_factory.mktemp("io") / f"a.{ending}"
    write_volume(path, volume)
    again = read_volume(path)
    np.testing.assert_array_equal(again.array, volume.array)
    np.testing.assert_array_equal(again.affine, volume.affine)
    assert again.array.dtype == volume.array.dtype
    header = read_header(path)
    assert (header.shape, header.dtype) == (volume.shape, volume.array.dtype)
    np.testing.assert_array_equal(header.affine, volume.affine)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    volume=volumes(),
    axis=st.integers(0, 2),
    parts=st.integers(1, 9),
)
def test_slabs_give_the_same_bytes_as_the_volume(tmp_path_factory, volume, axis, parts):
    folder = tmp_path_factory.mktemp("io")
    cut = np.array_split(volume.array, min(parts, volume.shape[axis]), axis)
    write_volume(folder / "whole.zarr", volume)
    write_slabs(folder / "slabs.zarr", Slabs(volume.shape, volume.affine, volume.array.dtype, axis, iter(cut)))
    assert contents(folder / "whole.zarr") == contents(folder / "slabs.zarr")
    assert sorted(path.name for path in folder.iterdir()) == ["slabs.zarr", "whole.zarr"]


def test_same_volume_same_bytes(tmp_path, oblique):
    for name in ("one.zarr", "two.ome.zarr"):
        write_volume(tmp_path / name, Volume(oblique.array.copy(order="F"), oblique.affine))
    assert contents(tmp_path / "one.zarr") == contents(tmp_path / "two.ome.zarr")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_whoever_knows_scale_and_translation_alone_finds_each_voxel_in_its_place(tmp_path, order, signs):
    """As ITK reads it: axes z, y, x toward S, P, L."""
    volume = Volume(np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7), aligned(order, signs))
    write_volume(tmp_path / "a.zarr", volume)
    group = zarr.open(str(tmp_path / "a.zarr"), mode="r")
    assert json.loads((tmp_path / "a.zarr" / ".zgroup").read_text()) == {"zarr_format": 2}
    (image,) = group.attrs["multiscales"]
    assert image["version"] == "0.4"
    assert [axis["name"] for axis in image["axes"]] == ["z", "y", "x"]
    assert {axis["unit"] for axis in image["axes"]} == {"millimeter"}
    assert [axis["orientation"]["value"] for axis in image["axes"]] == [
        "inferior-to-superior",
        "anterior-to-posterior",
        "right-to-left",
    ]
    scale, translation = (step[step["type"]] for step in image["datasets"][0]["coordinateTransformations"])
    stored = group[image["datasets"][0]["path"]][...]
    assert stored.dtype == np.int16
    for index in np.ndindex(stored.shape):
        lps = np.array(translation) + np.array(scale) * index
        given = np.linalg.inv(volume.affine) @ LPS @ [*lps[::-1], 1]
        assert volume.array[tuple(np.rint(given[:3]).astype(int))] == stored[index]


def test_the_array_is_one_that_all_readers_take(tmp_path, oblique):
    """tensorstore and zarrs refuse the compressor's 'checksum'; chunks are found under z/y/x."""
    write_volume(tmp_path / "a.zarr", oblique)
    metadata = json.loads((tmp_path / "a.zarr" / "0" / ".zarray").read_text())
    assert metadata["compressor"] == {"id": "zstd", "level": 3}
    assert not metadata["filters"]
    assert (metadata["zarr_format"], metadata["order"], metadata["dtype"]) == (2, "C", "<i2")
    assert metadata["dimension_separator"] == "/"
    assert (tmp_path / "a.zarr" / "0" / "1" / "0" / "1").is_file()


def test_notes(tmp_path, oblique):
    write_volume(tmp_path / "a.zarr", oblique, description="résumé", synthetic=False)
    own = json.loads((tmp_path / "a.zarr" / ".zattrs").read_text())["maisi"]
    assert (own["synthetic"], own["description"]) == (False, "résumé")
    assert own["made_by"].startswith("maisi ")


def test_label_names_are_kept_with_colours(tmp_path):
    labels = Volume(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.eye(4))
    write_volume(tmp_path / "a.zarr", labels, names=NAMES)
    assert read_label_names(tmp_path / "a.zarr") == NAMES
    np.testing.assert_array_equal(read_labels(tmp_path / "a.zarr").array, labels.array)
    write_volume(tmp_path / "b.zarr", labels)
    assert read_label_names(tmp_path / "b.zarr") == {}


def test_from_nifti_and_back(tmp_path, oblique):
    write_volume(tmp_path / "a.nii.gz", oblique)
    first = read_volume(tmp_path / "a.nii.gz")
    write_volume(tmp_path / "a.zarr", first)
    write_volume(tmp_path / "b.nii.gz", read_volume(tmp_path / "a.zarr"))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(volume=volumes(), axis=st.integers(0, 2), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_rows_are_those_of_the_volume_in_ras(tmp_path_factory, volume, axis, ends):
    path = tmp_path_factory.mktemp("io") / "a.zarr"
    write_volume(path, volume)
    whole = volume.to_ras()
    with opened_rows(path) as source:
        assert source.shape == whole.shape
        np.testing.assert_array_equal(source.affine, whole.affine)
        start, stop = sorted(int(end * (whole.shape[axis] - 1)) for end in ends)
        rows = source.rows(axis, start, stop + 1)
    assert rows.dtype == whole.array.dtype
    np.testing.assert_array_equal(rows, np.take(whole.array, range(start, stop + 1), axis))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_memory_is_that_of_slabs_and_layers(tmp_path, monkeypatch, axis):
    """8 MiB pass in slabs of 0.25 and come back in rows of as much; a layer of chunks has 1 MiB."""
    monkeypatch.setattr(zarr_store, "CHUNK", 32)
    shape = [128, 128, 128]
    shape[axis] = 256
    slab = np.random.default_rng(0).integers(0, 4000, [8 if a == axis else 128 for a in range(3)]).astype(np.int16)
    write_volume(tmp_path / "warm.zarr", Volume(slab, np.eye(4)))  # imports what is imported once
    tracemalloc.start()
    try:
        write_slabs(
            tmp_path / "a.zarr", Slabs(tuple(shape), np.eye(4), slab.dtype, axis, (slab + n for n in range(32)))
        )
        with opened_rows(tmp_path / "a.zarr") as rows:
            for n in range(32):
                np.testing.assert_array_equal(rows.rows(axis, 8 * n, 8 * n + 8), slab + n)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def foreign(path, array, zarr_format, axes, steps=(), image_steps=(), **own):
    """An OME-Zarr as another program writes it: version 0.4 with Zarr 2, 0.5 with Zarr 3; chunks of zeros left out."""
    version = "0.4" if zarr_format == 2 else "0.5"
    image = {"axes": axes, "datasets": [{"path": "scale0", "coordinateTransformations": list(steps)}]}
    image |= {"coordinateTransformations": list(image_steps)} if image_steps else {}
    image |= {"version": version} if zarr_format == 2 else {}
    ome = {"multiscales": [image]}
    attributes = (ome if zarr_format == 2 else {"ome": ome | {"version": version}}) | own
    group = zarr.create_group(store=str(path), zarr_format=zarr_format, attributes=attributes)
    made = group.create_array("scale0", shape=array.shape, chunks=(4,) * array.ndim, dtype=array.dtype, fill_value=0)
    made[...] = array
    return path


def space(names="zyx", unit="millimeter", **orientations):
    axes = [{"name": name, "type": "space", "unit": unit} for name in names]
    for axis in axes:
        if axis["name"] in orientations:
            axis["orientation"] = {"type": "anatomical", "value": orientations[axis["name"]]}
    return axes


RAS_AXES = {"x": "left-to-right", "y": "posterior-to-anterior", "z": "inferior-to-superior"}


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_images_of_others(tmp_path, zarr_format):
    array = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.int16)
    array[4:, :4, :4] = 0  # a chunk that is not there
    steps = [{"type": "scale", "scale": [3, 2, 1.5]}, {"type": "translation", "translation": [30, 20, 10]}]
    path = foreign(tmp_path / "a.zarr", array, zarr_format, space(), steps)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, array.transpose(2, 1, 0))
    expected = [[-1.5, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]]
    np.testing.assert_allclose(volume.affine, expected)
    with opened_rows(path) as rows:
        np.testing.assert_array_equal(rows.rows(2, 0, 5), volume.to_ras().array)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_further_axes_other_orders_units_and_two_levels_of_transformations(tmp_path, zarr_format):
    array = np.random.default_rng(0).integers(0, 3, (1, 1, 6, 7, 5)).astype(np.float32)
    axes = [{"name": "t", "type": "time", "unit": "second"}, {"name": "c", "type": "channel"}]
    axes += space("yxz", "micrometer")
    steps = [
        {"type": "scale", "scale": [1, 1, 200, 100, 300]},
        {"type": "translation", "translation": [0, 0, 20, 10, 30]},
    ]
    image_steps = [{"type": "scale", "scale": [1, 1, 10, 10, 10]}]
    volume = read_volume(foreign(tmp_path / "a.zarr", array, zarr_format, axes, steps, image_steps))
    np.testing.assert_array_equal(volume.array, array[0, 0].transpose(1, 0, 2))
    expected = [[-1, 0, 0, -0.1], [0, -2, 0, -0.2], [0, 0, 3, 0.3], [0, 0, 0, 1]]
    np.testing.assert_allclose(volume.affine, expected)


def test_orientations_of_others(tmp_path):
    """As 3D Slicer has it: the axes say where they run, translation is the first voxel's place in LPS+."""
    array = np.zeros((2, 3, 4), np.uint8)
    steps = [{"type": "scale", "scale": [3, 2, 1]}, {"type": "translation", "translation": [30, 20, 10]}]
    volume = read_volume(foreign(tmp_path / "a.zarr", array, 2, space(**RAS_AXES), steps))
    np.testing.assert_allclose(volume.affine, [[1, 0, 0, -10], [0, 2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])
    sagittal = {"x": "anterior-to-posterior", "y": "superior-to-inferior", "z": "left-to-right"}
    volume = read_volume(foreign(tmp_path / "b.zarr", array, 3, space(**sagittal), steps))
    np.testing.assert_allclose(volume.affine, [[0, 0, 3, -10], [-1, 0, 0, -20], [0, -2, 0, 30], [0, 0, 0, 1]])


def test_an_image_that_another_program_moved_is_read_where_it_was_put(tmp_path, oblique):
    path = tmp_path / "a.zarr"
    write_volume(path, Volume(oblique.array, np.eye(4)))

    def move(attributes):
        attributes["multiscales"][0]["datasets"][0]["coordinateTransformations"][1]["translation"] = [7.0, 0.0, 0.0]

    edit(path / ".zattrs", move)
    np.testing.assert_allclose(read_volume(path).affine, [[-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 7], [0, 0, 0, 1]])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "<f4", "<i4"])
def test_plain_arrays(tmp_path, oblique, zarr_format, dtype):
    array = np.abs(oblique.array % 200).astype(dtype)
    made = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=array.shape, chunks=(2, 3, 4), dtype=dtype, zarr_format=zarr_format
    )
    made[...] = array
    with pytest.raises(
        MaisiError, match=r"plain Zarr array whose place in the patient is unknown; save it as OME-Zarr"
    ):
        read_volume(tmp_path / "a.zarr")
    made.attrs["maisi"] = {"affine": oblique.affine.tolist()}
    volume = read_volume(tmp_path / "a.zarr")
    np.testing.assert_array_equal(volume.array, array)
    assert volume.array.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(volume.affine, oblique.affine)


def test_a_label_image_within_another(tmp_path):
    labels = np.ones((3, 4, 5), np.uint8)
    write_volume(tmp_path / "a.zarr", Volume(labels, np.eye(4)))
    write_volume(tmp_path / "seg.zarr", Volume(2 * labels, np.eye(4)), names={2: "liver"})
    (tmp_path / "a.zarr" / "labels").mkdir()
    shutil.move(tmp_path / "seg.zarr", tmp_path / "a.zarr" / "labels" / "seg")
    assert read_labels(tmp_path / "a.zarr" / "labels" / "seg").array.max() == 2
    assert read_label_names(tmp_path / "a.zarr" / "labels" / "seg") == {2: "liver"}
    assert read_labels(tmp_path / "a.zarr").array.max() == 1


@pytest.fixture
def written(tmp_path, oblique):
    path = tmp_path / "a.zarr"
    write_volume(path, oblique)
    return path


def image_of(attributes):
    return attributes["multiscales"][0]


def steps_of(attributes):
    return image_of(attributes)["datasets"][0]["coordinateTransformations"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("multiscales"), "is no Zarr image, or its metadata is damaged"),
        (lambda a: a.update(multiscales=[]), "is no Zarr image, or its metadata is damaged"),
        (lambda a: a.update(multiscales=7), "is no Zarr image, or its metadata is damaged"),
        (lambda a: image_of(a).update(datasets=[{"path": "5"}]), "is no Zarr image, or its metadata is damaged"),
        (lambda a: image_of(a).update(datasets=[{"path": "../../b"}]), "is no Zarr image, or its metadata is damaged"),
        (
            lambda a: image_of(a).update(axes=["z", "y", "x"], version="0.3"),
            "is OME-Zarr 0.3, and 0.4 and 0.5 are read",
        ),
        (lambda a: image_of(a).pop("axes"), "is OME-Zarr 0.4, and 0.4 and 0.5|convert it"),
        (lambda a: image_of(a)["axes"].pop(), "metadata is damaged"),
        (lambda a: image_of(a)["axes"][0].update(name="q"), r"has shape \(6, 7, 5\) along q, y, x; save one 3D volume"),
        (lambda a: image_of(a)["axes"][1].update(name="z"), "metadata is damaged|save one 3D volume"),
        (lambda a: image_of(a)["axes"][1].update(unit="parsec"), "lengths are in 'parsec', which is not known here"),
        (
            lambda a: image_of(a)["axes"][1].update(orientation={"value": "dorsal-to-ventral"}),
            "'dorsal-to-ventral' cannot",
        ),
        (lambda a: image_of(a)["axes"][1].pop("orientation"), "orientation '' cannot be placed"),
        (
            lambda a: a.pop("maisi") and image_of(a)["axes"][1].update(orientation={"value": "left-to-right"}),
            "singular",
        ),
        (lambda a: steps_of(a).pop(0), "does not say how large its voxels are"),
        (lambda a: steps_of(a).append({"type": "affine", "affine": []}), "transformation 'affine' is not read"),
        (lambda a: steps_of(a)[0].update(scale=[1, 2]), "metadata is damaged"),
        (lambda a: steps_of(a)[0].update(scale=[1, "a", 2]), "metadata is damaged"),
        (lambda a: a.pop("maisi") and steps_of(a)[0].update(scale=[1, 0, 2]), "singular"),
        (lambda a: a.pop("maisi") and steps_of(a)[0].update(scale=[1, float("nan"), 2]), "not a finite 4 x 4 matrix"),
        (lambda a: a["maisi"].update(affine=[[1, 2], [3, 4]]), "a.zarr: The affine is not a finite 4 x 4 matrix"),
        (lambda a: a["maisi"].pop("affine"), "metadata is damaged"),
        (lambda a: a["maisi"].update(affine=np.zeros((4, 4)).tolist()), "last row|singular"),
    ],
)
def test_damaged_attributes(written, change, message):
    edit(written / ".zattrs", change)
    with pytest.raises(MaisiError, match=message) as caught:
        read_volume(written)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(shape=[30000, 30000, 30000]), "asks for 30000 x 30000 x 30000 voxels of int16.*over the"),
        (lambda m: m.update(chunks=[30000, 30000, 30000]), "a single chunk of it holds 54,000.0 GB"),
        (lambda m: m.update(shape=[0, 7, 6]), "an axis has no voxels"),
        (lambda m: m.update(shape=[5, 7, 6, 2]), "metadata is damaged"),
        (lambda m: m.update(dtype="<c8", fill_value=None), "not single numbers"),
        (lambda m: m.update(dtype="nonsense"), "metadata is damaged"),
        (lambda m: m.update(compressor={"id": "nonsense"}), "metadata is damaged|cut short or damaged"),
        (lambda m: m.pop("chunks"), "metadata is damaged"),
    ],
)
def test_damaged_arrays(written, change, message):
    edit(written / "0" / ".zarray", change)
    for read in (read_volume, lambda path: opened_rows(path).__enter__()):
        if "30000" in message and read is not read_volume:
            continue
        with pytest.raises(MaisiError, match=message):
            read(written)


def test_the_budget_counts_the_voxels(written, oblique):
    assert read_volume(written, budget_bytes=oblique.array.nbytes).shape == oblique.shape
    with pytest.raises(MaisiError, match="over the"):
        read_volume(written, budget_bytes=oblique.array.nbytes - 1)


@pytest.mark.parametrize("name", [".zattrs", ".zgroup", "0/.zarray"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff"])
def test_metadata_that_is_gone_or_no_json(written, name, content):
    (written / name).unlink() if content is None else (written / name).write_bytes(content)
    with pytest.raises(MaisiError, match="is no Zarr image, or its metadata is damaged"):
        read_volume(written)


def damage(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


@pytest.mark.parametrize("change", [damage, lambda data: data[:-3], lambda data: b"", lambda data: b"nonsense"])
@pytest.mark.parametrize("chunk", ["0/0/0/0", "0/1/1/1"])
def test_damaged_chunks(written, chunk, change):
    (written / chunk).write_bytes(change((written / chunk).read_bytes()))
    with pytest.raises(MaisiError, match=r"a.zarr is cut short or damaged"):
        read_volume(written)
    with pytest.raises(MaisiError, match=r"a.zarr is cut short or damaged"), opened_rows(written):
        pass


def test_chunks_that_are_missing(written):
    for chunk in ("0/0/0/0", "0/1/1/1"):
        (written / chunk).unlink()
    with pytest.raises(MaisiError, match="2 of its chunks are missing; copy or export it again"):
        read_volume(written)
    with pytest.raises(MaisiError, match="2 of its chunks are missing"), opened_rows(written):
        pass
    assert read_header(written).shape == (5, 6, 7)


def test_every_chunk_is_written_where_all_is_zero(tmp_path):
    write_volume(tmp_path / "a.zarr", Volume(np.zeros((9, 9, 9), np.int16), np.eye(4)))
    assert (
        len([path for path in (tmp_path / "a.zarr" / "0").rglob("*") if path.name.isdigit() and path.is_file()]) == 27
    )
    assert not read_volume(tmp_path / "a.zarr").array.any()


def test_values_that_are_not_finite(tmp_path):
    array = np.zeros((5, 5, 5), np.float32)
    array[4, 4, 3:] = np.nan
    path = foreign(tmp_path / "a.zarr", array, 2, space(), [{"type": "scale", "scale": [1, 1, 1]}])
    with pytest.raises(MaisiError, match="2 of its voxels are not finite"):
        read_volume(path)
    with pytest.raises(MaisiError, match="2 of its voxels are not finite"), opened_rows(path):
        pass


def test_no_folder(tmp_path):
    with pytest.raises(MaisiError, match=r"Cannot read .*none.zarr: No such file or directory"):
        read_header(tmp_path / "none.zarr")
    (tmp_path / "file.zarr").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty.zarr").mkdir()
    for name in ("file.zarr", "empty.zarr"):
        with pytest.raises(MaisiError, match="is no Zarr image"):
            read_volume(tmp_path / name)


def test_nothing_that_exists_is_overwritten(written, oblique):
    before = contents(written)
    with pytest.raises(MaisiError, match=r"a.zarr exists; choose another"):
        write_volume(written, oblique)
    assert contents(written) == before


def test_slabs_that_do_not_make_up_the_shape_leave_nothing(tmp_path, oblique):
    for slabs in ([oblique.array[:3]], [oblique.array, oblique.array[:1]], []):
        with pytest.raises(ValueError, match="do not make up"):
            write_slabs(tmp_path / "a.zarr", Slabs(oblique.shape, oblique.affine, oblique.array.dtype, 0, slabs))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills(tmp_path, monkeypatch):
    """The kernel refuses the larger ones of the chunks."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(zarr_store, "CHUNK", 16)
    volume = Volume(np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20)).astype(np.int16), np.eye(4))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(MaisiError, match=r"Cannot write .*a.zarr: File too large; choose a disk"):
            write_volume(tmp_path / "a.zarr", volume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_place_that_may_not_be_written_to(tmp_path, oblique, monkeypatch):
    def refused(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(MaisiError, match=r"Cannot write .*a.zarr: Permission denied"):
        write_volume(tmp_path / "a.zarr", oblique)


@pytest.mark.parametrize("package", [None, types.ModuleType("zarr")], ids=["missing", "older"])
def test_without_the_package(written, oblique, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "zarr", package)
    for use in (
        lambda: read_volume(written),
        lambda: read_label_names(written),
        lambda: write_volume(written.with_name("b.zarr"), oblique),
    ):
        with pytest.raises(MaisiError, match=r"install it with: pip install 'maisi\[zarr\]'"):
            use()
    assert os.listdir(written.parent) == ["a.zarr"]
