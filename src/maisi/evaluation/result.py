"""What an evaluation leaves: `result.json`, `table.md` and `figure.png` in a folder of its own. Knows no measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maisi.evaluation.figure import save_figure
from maisi.io.files import new_folder, write_json

RESULT, TABLE, FIGURE = "result.json", "table.md", "figure.png"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """The outcome of one evaluation.

    Attributes:
        name: of the evaluation, as on the command line.
        summary: headline numbers by name, such as "psnr", "ssim", "fid"; None where one could not be had. The ends
            of an interval are called "psnr_low" and "psnr_high", and stand in the table beside the number.
        items: one row for each volume, or each pair of sets.
        settings: what decides the numbers: options, seeds, hashes.
        columns: keys of `items` that the table shows, in order; () is all of the first row.
        notes: sentences for the reader: what was resampled, skipped, not comparable.
        tables: further tables by title, rows with the same keys; shown before the items.
    """

    name: str
    summary: Mapping[str, float | None]
    items: Sequence[Row]
    settings: Mapping[str, Any]
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    def with_notes(self, *notes: str) -> Result:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "evaluation": self.name,
            "summary": dict(self.summary),
            "settings": dict(self.settings),
            "notes": list(self.notes),
            **(
                {"tables": {title: list(map(dict, rows)) for title, rows in self.tables.items()}} if self.tables else {}
            ),
            "items": [dict(row) for row in self.items],
        }

    def table(self) -> str:
        """The summary and the rows as Markdown."""
        lines = [f"# {self.name}", "", "| measure | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in self._with_intervals()]
        for title, rows in self.tables.items():
            lines += ["", f"## {title}", *_rows_as_markdown(rows, tuple(rows[0] if rows else ()))]
        lines += _rows_as_markdown(self.items, self.columns or tuple(self.items[0] if self.items else ()))
        return "\n".join([*lines, "", *self.notes]) + "\n"

    def _with_intervals(self) -> Iterator[tuple[str, str]]:
        """The summary's names and values as text, both ends of an interval behind the number."""
        ends = {name: [f"{name}_low", f"{name}_high"] for name in self.summary}
        inside = {end for pair in ends.values() if self.summary.keys() >= set(pair) for end in pair}
        for name, value in self.summary.items():
            low, high = (self.summary.get(end) for end in ends[name])
            reach = "" if low is None or high is None else f" ({shown(low)} to {shown(high)})"
            if name not in inside:
                yield name, shown(value) + reach


def _rows_as_markdown(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    if not columns:
        return []
    lines = ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(shown(row.get(name)) for name in columns) + " |" for row in rows]


def write_result(folder: Path, result: Result, draw: Callable[[Any], None]) -> None:
    """Make `folder` with all three files, or nothing.

    Args:
        folder: to make.
        result: what to write.
        draw: puts the picture onto a matplotlib figure.

    Raises:
        MaisiError: the folder exists or cannot be written to.
    """
    with new_folder(folder) as part:
        write_json(part / RESULT, result.as_json())
        (part / TABLE).write_text(result.table(), encoding="utf-8")
        save_figure(part / FIGURE, draw)


def shown(value: Any) -> str:
    """A value in a table: numbers short, None as a dash, several values in a row."""
    if value is None or value in ([], ()):
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(one) for one in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/")
