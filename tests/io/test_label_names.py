"""Label names in headers and colour tables, read again by another reader than ours."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.anatomy import EXTENSION, LABELS
from maisi.io.label_names import label_table_xml, names_in_xml, slicer_color_table
from maisi.io.nifti import read_label_names, read_labels, write_volume
from maisi.volume import Volume

NAMES = {1: "liver", 5: "right kidney", 150: "a <b> & c"}


@pytest.fixture
def labels() -> Volume:
    return Volume(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.diag([1.0, 2, 3, 1]))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(names=st.dictionaries(st.integers(1, 255), st.text("ab <>&\"'é-", min_size=1).map(str.strip), min_size=1))
def test_names_survive_xml(names: dict[int, str]) -> None:
    assert names_in_xml(label_table_xml(names)) == names


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_names_stand_first_in_the_header_as_nibabel_reads_it(tmp_path: Path, labels: Volume, ending: str) -> None:
    path = tmp_path / f"labels.{ending}"
    write_volume(path, labels, names=NAMES)
    image = nibabel.load(path)
    first, comment = image.header.extensions
    assert first.get_code() == 0
    assert comment.get_code() == 6
    table = ET.fromstring(first.get_content().strip(b"\0")).find("VolumeInformation/LabelTable")
    assert table is not None
    assert {int(row.attrib["Key"]): row.text for row in table} == NAMES
    np.testing.assert_array_equal(np.asarray(image.dataobj), labels.array)
    np.testing.assert_array_equal(read_labels(path).array, labels.array)
    assert read_label_names(path) == NAMES


def test_files_without_names_have_none(tmp_path: Path, labels: Volume) -> None:
    for name in ("a.nii.gz", "a.nrrd"):
        write_volume(tmp_path / name, labels, names=NAMES if name.endswith("nrrd") else None)
        assert read_label_names(tmp_path / name) == {}


@pytest.mark.parametrize("content", [b"", b"CaretExtension", b"<CaretExtension><Label>", b"<CaretExtension/>"])
def test_what_is_no_label_table_holds_no_names(content: bytes) -> None:
    assert names_in_xml(content) == {}


def test_entities_are_not_expanded() -> None:
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa">]>' + label_table_xml({1: "x"}).replace(b">x<", b">&a;<")
    assert names_in_xml(bomb) == {}


def test_a_damaged_extension_ends_the_search(tmp_path: Path, labels: Volume) -> None:
    path = tmp_path / "labels.nii"
    write_volume(path, labels, names=NAMES)
    data = bytearray(path.read_bytes())
    data[352:356] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    assert read_label_names(path) == {}


def test_the_color_table_of_slicer_has_a_color_for_each() -> None:
    names = {label.id: label.name for label in (*LABELS, *EXTENSION) if not label.free}
    lines = slicer_color_table(names).splitlines()
    assert lines[0] == "# Color table file"
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert lines[1] == f"# {len(rows)} values"
    assert rows[0] == ["0", "background", "0", "0", "0", "0"]
    assert all(len(row) == 6 and row[5] == "255" for row in rows[1:])
    assert {int(row[0]): row[1].replace("_", " ") for row in rows[1:]} == names
    assert len({tuple(row[2:5]) for row in rows}) == len(rows)
    assert all(0 <= int(value) <= 255 for row in rows for value in row[2:])
