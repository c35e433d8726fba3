"""Names and colours of labels for other programs: a NIfTI extension, and 3D Slicer's colour table.

The extension is that of TotalSegmentator's files: the XML of Caret's label tables, under the code 0. Readers such as
TotalSegmentator's own take the first extension, so it stands before every other. 3D Slicer does not read it; for that
there is the colour table, a text file:
https://slicer.readthedocs.io/en/latest/developer_guide/modules/colors.html. Knows no file.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping

from maisi.io.preview import label_color, rgb

EXTENSION_CODE = 0
"""NIfTI's code for an extension of unknown kind: the one that TotalSegmentator writes label tables under."""

_ROOT = "CaretExtension"
_LARGEST_XML = 1 << 20


def label_table_xml(names: Mapping[int, str]) -> bytes:
    """Return label ids, names and colours (`preview.label_color`) as the XML of Caret's label table."""
    root = ET.Element(_ROOT)
    information = ET.SubElement(root, "VolumeInformation", Index="0")
    table = ET.SubElement(information, "LabelTable")
    for id, name in sorted(names.items()):
        red, green, blue = (f"{channel:.4f}" for channel in label_color(id))
        label = ET.SubElement(table, "Label", Key=str(id), Red=red, Green=green, Blue=blue, Alpha="1")
        label.text = name
    ET.SubElement(information, "StudyMetaDataLinkSet")
    ET.SubElement(information, "VolumeType").text = "Label"
    ET.indent(root, " ")
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text


def names_in_xml(content: bytes) -> dict[int, str]:
    """Return the label ids and names of a label table; {} for anything else, damaged XML among it."""
    if len(content) > _LARGEST_XML or b"<!" in content.replace(b"<![CDATA[", b"") or _ROOT.encode() not in content:
        return {}  # a document type may define entities that grow without bound
    try:
        root = ET.fromstring(content.strip(b"\0 \r\n\t"))
        return {int(label.get("Key", "")): (label.text or "").strip() for label in root.iter("Label")}
    except (ET.ParseError, ValueError):
        return {}


def slicer_color_table(names: Mapping[int, str]) -> str:
    """Return label ids, names and colours as 3D Slicer's colour table (.ctbl); blanks in names become '_'."""
    rows = ["0 background 0 0 0 0"]
    for id, name in sorted(names.items()):
        red, green, blue = rgb(label_color(id))
        rows.append(f"{id} {'_'.join(name.split())} {red} {green} {blue} 255")
    return "\n".join(["# Color table file", f"# {len(rows)} values", *rows]) + "\n"
