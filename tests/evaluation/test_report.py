"""The page is taken apart again: well-formed, whole in itself, and every picture decodes to the one that went in."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from maisi.cli import run
from maisi.errors import MaisiError
from maisi.evaluation.report import markdown_as_html, render, sections_of
from maisi.evaluation.result import Result, write_result

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def folders(tmp_path):
    result = Result(
        name="fid <2.5D>",
        summary={"fid": 4.25, "mmd": None},
        items=({"case": "a & b", "fid": 1.5}, {"case": "c", "fid": -2.0}),
        settings={"seed": 1, "note": "</pre><script>alert(1)</script>"},
        notes=("Two volumes were resampled.",),
    )
    write_result(tmp_path / "fid", result, lambda figure: figure.add_subplot().plot([1, 2]))
    for number in range(2):
        item = tmp_path / "out" / f"{number:04d}"
        item.mkdir(parents=True)
        Image.fromarray(np.full((20, 30, 3), 40 * number, np.uint8)).save(item / "preview.png")
        record = {"synthetic": True, "request": {"seed": 7, "region": ["chest"]}, "item": number}
        record |= {"regions": ["chest"], "size": [8, 9, 10], "spacing_mm": [1.5, 1.5, 2.0]}
        (item / "record.json").write_text(json.dumps(record))
    return tmp_path


def test_the_page_is_whole_in_itself(folders, capsys) -> None:
    output = folders / "report.html"
    assert run(["report", str(folders / "fid"), str(folders / "out"), "-o", str(output), "--title", "A & B"]) == 0
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert not re.search(r"(?:src|href)=\"(?!data:image/png;base64,|#)", text)
    assert "@import" not in text
    assert "url(" not in text
    files = [folders / "fid" / "figure.png", *sorted(folders.glob("out/*/preview.png"))]
    for image, file in zip(page.all("img"), files, strict=True):
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert data == file.read_bytes()
        Image.open(io.BytesIO(data)).load()
        assert image["alt"]
    said = " ".join(page.words)
    assert "synthetic" in said
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    for words in ("fid <2.5D> (fid)", "a & b", "Two volumes were resampled.", "8 x 9 x 10 voxels of 1.5 x 1.5 x 2 mm"):
        assert words in said
    targets = {attributes["href"].removeprefix("#") for attributes in page.all("a")}
    assert targets == {attributes["id"] for attributes in page.all("section")}
    assert len(page.all("details")) == 3
    assert run(["report", str(folders / "fid"), "-o", str(output)]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_table_comes_through_cell_by_cell() -> None:
    lines = "\n".join(markdown_as_html("| a | b |\n|---|---|\n| x<y | 1.5e-3 |\n| - | z |\n\nNote one.\nNote two."))
    assert re.findall(r"<th[^>]*>(.*?)</th>", lines) == ["a", "b"]
    assert re.findall(r"<td[^>]*>(.*?)</td>", lines) == ["x&lt;y", "1.5e-3", "-", "z"]
    assert re.findall(r"<p>(.*?)</p>", lines) == ["Note one.", "Note two."]
    Page(lines)


def test_pictures_of_real_people_are_said_to_be_so(tmp_path) -> None:
    result = Result("memorisation", {}, (), {"shows_real_images": True})
    write_result(tmp_path / "m", result, lambda figure: None)
    assert "real patients" in render(sections_of([tmp_path / "m"]))
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "record.json").write_text(json.dumps({"request": {"image": "ct.nii.gz"}}))
    assert "painted into a real CT" in render(sections_of([tmp_path / "i"]))
    (tmp_path / "i" / "record.json").write_text(json.dumps({"synthetic": False, "request": {"image": None}}))
    assert "painted into a real CT" in render(sections_of([tmp_path / "i"]))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"request": {"size": [8, 9, 10], "spacing": [2.0, 2.0, 2.5]}}, "8 x 9 x 10 voxels of 2 x 2 x 2.5 mm"),
        ({"size": 5, "spacing_mm": "thin", "regions": None}, "region not given; size not known; seed"),
    ],
)
def test_items_say_what_their_records_say(tmp_path, record, said) -> None:
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert said in render(sections_of([tmp_path]))


def test_what_is_no_result(tmp_path) -> None:
    with pytest.raises(MaisiError, match="holds neither"):
        sections_of([tmp_path])
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(MaisiError, match="cannot be read"):
        sections_of([tmp_path])
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "figure.png").write_text("no picture")
    with pytest.raises(MaisiError, match="no PNG"):
        sections_of([tmp_path])
