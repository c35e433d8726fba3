"""What a cohort's folder says of itself: a table of all items, and one picture of them. Imports no torch.

The folder has one for each row, which is what `maisi generate` (or `inpaint`) makes of that row's request.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import maisi
from maisi.errors import MaisiError
from maisi.generation.cohort_table import ITEMS, MARK, OVERVIEW, TABLE, TUMORS, CohortRow, table_text
from maisi.generation.output import DAMAGED, PREVIEW, items_in, record_in
from maisi.io.files import atomic_path, new_folder, write_json
from maisi.request import Request
from maisi.tumors import KINDS

_COLUMNS, _WIDTH, _MOST_SHOWN = 6, 300, 60


def begin_cohort(out: Path, table: Path) -> None:
    """Make the folder, or look whether it is a cohort's, and keep a copy of the table in it.

    Raises:
        MaisiError: it is something else, or cannot be made.
    """
    try:
        content = table.read_bytes()
    except OSError as error:
        raise MaisiError(f"Cannot read {table}: {error.strerror}; give the path of a CSV file.") from None
    if not out.exists():
        try:
            with new_folder(out) as part:
                write_json(part / MARK, {"made_by": f"maisi {maisi.__version__}"})
        except MaisiError:
            if not (out / MARK).is_file():  # else another process, with another part, was quicker
                raise
    if not (out / MARK).is_file():
        raise MaisiError(f"{out} exists and is no cohort's folder; choose another folder or remove it.")
    if not (out / TABLE).is_file() or (out / TABLE).read_bytes() != content:
        with atomic_path(out / TABLE) as part:
            part.write_bytes(content)


def finish_cohort(out: Path, rows: Sequence[CohortRow]) -> list[dict[str, Any]]:
    """Write the table of the items that are there, and their picture; return the table's rows.

    Raises:
        MaisiError: they cannot be written.
    """
    told: list[dict[str, Any]] = []
    records: list[Mapping[str, Any]] = []
    for row in rows:
        for item in items_in(out / row.case):
            record, faults = record_in(item) or ({}, [DAMAGED])
            told.append(_told(row, item.relative_to(out), record, faults))
            records.append(record)
    if told:
        with atomic_path(out / ITEMS) as part:
            part.write_text(table_text(told), encoding="utf-8")
        _draw(out / OVERVIEW, [(str(row["folder"]), row["passed"] == "yes") for row in told])
    if places := [place for record, row in zip(records, told, strict=True) for place in _tumors(record, row)]:
        with atomic_path(out / TUMORS) as part:
            part.write_text(table_text(places), encoding="utf-8")
    return told


def _tumors(record: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each tumour that was put into an item: where it lies (mm, RAS+), and how large it is."""
    for number, tumor in enumerate(record.get("tumors") or ()):
        x, y, z = tumor["centre_mm"]
        yield {
            **{name: row[name] for name in ("case", "folder", "passed")},
            "tumor": number,
            "kind": tumor["kind"],
            "label": KINDS[tumor["kind"]].id,
            **{"x_mm": x, "y_mm": y, "z_mm": z},
            **{name: tumor[name] for name in ("asked_mm", "diameter_mm", "volume_ml")},
        }


def _told(row: CohortRow, folder: Path, record: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    try:
        request = Request.model_validate(record["request"])
    except (KeyError, ValueError):
        request, faults = None, faults or [DAMAGED]
    return {
        "case": row.case,
        "folder": folder.as_posix(),
        "passed": "no" if faults else "yes",
        "faults": " ".join(faults),
        "regions": ";".join(record.get("regions") or ()),
        "size": ",".join(map(str, record.get("size") or ())),
        "spacing_mm": ",".join(f"{value:g}" for value in record.get("spacing_mm") or ()),
        "tumors": "" if request is None else ";".join(map(str, request.tumor)),
        "seed": record.get("seed", ""),
        "model": "" if request is None else request.model,
    }


def _draw(path: Path, items: Sequence[tuple[str, bool]]) -> None:
    """The previews of items, small, in rows, red where one does not pass; of many evenly chosen ones."""
    from PIL import Image, ImageDraw

    step = max(1.0, len(items) / _MOST_SHOWN)
    chosen = [items[int(n * step)] for n in range(min(len(items), _MOST_SHOWN))]
    small: list[tuple[str, str, Image.Image]] = []
    for name, passed in chosen:
        try:
            with Image.open(path.parent / name / PREVIEW) as opened:
                height = max(1, round(opened.height * _WIDTH / opened.width))
                color = "white" if passed else "tomato"
                small.append((name, color, opened.convert("RGB").resize((_WIDTH, height), Image.Resampling.LANCZOS)))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    if not small:
        return
    height = max(picture.height for _, _, picture in small) + 16
    columns = min(_COLUMNS, len(small))
    sheet = Image.new("RGB", (columns * _WIDTH, -(-len(small) // columns) * height), "black")
    draw = ImageDraw.Draw(sheet)
    for n, (name, color, picture) in enumerate(small):
        x, y = n % columns * _WIDTH, n // columns * height
        draw.text((x + 4, y + 2), name, fill=color)
        sheet.paste(picture, (x, y + 16))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    with atomic_path(path) as part:
        part.write_bytes(data.getvalue())
