"""Results and generated items as one HTML file that needs nothing else: no network, no script, no second file.

It reads what `evaluation.result` and `generation.output` leave in folders, and measures nothing itself.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import maisi
from maisi.errors import MaisiError
from maisi.evaluation.result import FIGURE, RESULT, TABLE, shown
from maisi.generation.output import RECORD

PREVIEW = "preview.png"
_PNG = b"\x89PNG\r\n\x1a\n"
_RULE = re.compile(r"^\|(\s*:?-+:?\s*\|)+$")
_NUMBER = re.compile(r"-?[\d.]+(e[+-]?\d+)?|-")


@dataclass(frozen=True)
class Section:
    """One folder's part of a report.

    Attributes:
        title: of the section.
        markdown: table and notes; "" for none.
        picture: a PNG file, or None.
        caption: of the picture.
        details: folded away: name -> JSON values.
    """

    title: str
    markdown: str = ""
    picture: bytes | None = None
    caption: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def sections_of(folders: Sequence[Path]) -> list[Section]:
    """Read folders of evaluations, generated items, and generations (folders of items).

    Raises:
        MaisiError: a folder holds none of them, or a file in it is damaged.
    """
    return [section for folder in folders for section in _read(folder)]


def _read(folder: Path) -> Iterator[Section]:
    if (folder / RESULT).is_file():
        yield _evaluation(folder)
        return
    if (folder / RECORD).is_file():
        yield _item(folder)
        return
    items = [path.parent for path in sorted(folder.glob(f"*/{RECORD}")) if ".part-" not in path.parent.name]
    inner = [path.parent for path in sorted(folder.glob(f"*/{RESULT}"))]
    if not items and not inner:
        raise MaisiError(
            f"{folder} holds neither {RESULT} nor {RECORD}; give folders that maisi evaluate or maisi generate made."
        )
    yield from map(_evaluation, inner)
    yield from map(_item, items)


def _evaluation(folder: Path) -> Section:
    values = _json(folder / RESULT)
    table = _text(folder / TABLE) if (folder / TABLE).is_file() else ""
    title = re.match(r"# +(.+)", table)
    name = title[1] if title else str(values.get("evaluation", folder.name))
    settings = values.get("settings", {key: value for key, value in values.items() if not isinstance(value, list)})
    real = isinstance(settings, dict) and settings.get("shows_real_images") is True
    return Section(
        title=f"{name} ({folder.resolve().name})",
        markdown=table[title.end() :] if title else table,
        picture=_png(folder / FIGURE) if (folder / FIGURE).is_file() else None,
        caption="This picture shows images of real patients beside synthetic ones." if real else "",
        details={"Settings": settings},
    )


def _item(folder: Path) -> Section:
    record = _json(folder / RECORD)
    request = record.get("request")
    request = request if isinstance(request, dict) else {}
    painted = record.get("synthetic") is False or request.get("image") is not None
    regions = ", ".join(map(str, _listed(record, "regions") or _listed(request, "region"))) or "region not given"
    size = " x ".join(map(str, _listed(record, "size") or _listed(request, "size")))
    spacing = " x ".join(shown(value) for value in _listed(record, "spacing_mm") or _listed(request, "spacing"))
    origin = "Synthetic tissue painted into a real CT" if painted else "Synthetic: shows no real person"
    grid = (f"{size} voxels" if size else "size not known") + (f" of {spacing} mm" if spacing else "")
    return Section(
        title=f"Item {folder.resolve().name}",
        picture=_png(folder / PREVIEW) if (folder / PREVIEW).is_file() else None,
        caption=f"{origin}. {regions}; {grid}; seed {request.get('seed', 'not known')}.",
        details={"Record": record},
    )


def _listed(values: Mapping[str, Any], name: str) -> list[Any]:
    """What a record lists by a name; anything else is nothing."""
    found = values.get(name)
    return found if isinstance(found, list) else []


def render(sections: Iterable[Section], title: str = "maisi report") -> str:
    """Return the page."""
    parts = list(sections)
    contents = "".join(f'<li><a href="#s{i}">{_escaped(part.title)}</a></li>' for i, part in enumerate(parts))
    body = "\n".join(_section(part, f"s{i}") for i, part in enumerate(parts))
    return _PAGE.format(
        title=_escaped(title),
        style=_STYLE,
        contents=f"<nav><ul>{contents}</ul></nav>" if len(parts) > 1 else "",
        body=body,
        version=_escaped(maisi.__version__),
    )


def _section(part: Section, anchor: str) -> str:
    lines = [f'<section id="{anchor}">', f"<h2>{_escaped(part.title)}</h2>"]
    if part.picture is not None:
        data = base64.b64encode(part.picture).decode("ascii")
        caption = f"<figcaption>{_escaped(part.caption)}</figcaption>" if part.caption else ""
        alt = _escaped(f"Picture of {part.title}")
        lines.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">{caption}</figure>')
    elif part.caption:
        lines.append(f"<p>{_escaped(part.caption)}</p>")
    lines += markdown_as_html(part.markdown)
    for name, values in part.details.items():
        text = _escaped(json.dumps(values, indent=2, ensure_ascii=False))
        lines.append(f"<details><summary>{_escaped(name)}</summary><pre>{text}</pre></details>")
    return "\n".join([*lines, "</section>"])


def markdown_as_html(text: str) -> list[str]:
    """Turn headings, pipe tables, lists and paragraphs into HTML; everything else is shown as it is written."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        rows = [line.strip() for line in block.splitlines() if line.strip()]
        while rows and (heading := re.match(r"#+ +(.+)", rows[0])):
            lines.append(f"<h3>{_escaped(heading[1])}</h3>")
            rows = rows[1:]
        if len(rows) > 1 and rows[0].startswith("|") and _RULE.match(rows[1]):
            lines += _table(rows)
        elif rows and all(row.startswith("- ") for row in rows):
            lines += ["<ul>", *(f"<li>{_escaped(row[2:])}</li>" for row in rows), "</ul>"]
        else:
            lines += [f"<p>{_escaped(row)}</p>" for row in rows]
    return lines


def _table(rows: Sequence[str]) -> list[str]:
    head, _, *body = rows
    lines = ['<div class="wide"><table>', "<thead><tr>"]
    lines += [f'<th scope="col">{_escaped(cell)}</th>' for cell in _cells(head)]
    lines += ["</tr></thead>", "<tbody>"]
    for row in body:
        cells = (f'<td class="n">{c}</td>' if _NUMBER.fullmatch(c) else f"<td>{_escaped(c)}</td>" for c in _cells(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return [*lines, "</tbody></table></div>"]


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MaisiError(f"{path} cannot be read ({error}); make its folder anew.") from None
    if not isinstance(values, dict):
        raise MaisiError(f"{path} holds no result; make its folder anew.")
    return values


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MaisiError(f"{path} cannot be read ({error}); make its folder anew.") from None


def _png(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MaisiError(f"{path} cannot be read ({error.strerror}); make its folder anew.") from None
    if not data.startswith(_PNG):
        raise MaisiError(f"{path} is no PNG; make its folder anew.")
    return data


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c636b; --line: #d9dde2; --paper: #ffffff; --tint: #f4f6f8;
  --note: #fff6dc; --accent: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #343a41; --paper: #15181b; --tint: #1d2126; --note: #3a3318;
    --accent: #7db7f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 0 0 1rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p { margin: .6rem 0; max-width: 46rem; }
a { color: var(--accent); }
nav ul { padding-left: 1.1rem; columns: 2 18rem; }
.note { background: var(--note); border-radius: .4rem; padding: .7rem 1rem; }
section { border-top: 1px solid var(--line); margin-top: 2.2rem; padding-top: 1.6rem; }
figure { margin: 0 0 1.2rem; }
img { display: block; max-width: 100%; height: auto; border-radius: .3rem; background: #ffffff; }
figcaption, footer { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.n { text-align: right; white-space: nowrap; }
summary { cursor: pointer; color: var(--soft); }
pre { background: var(--tint); border-radius: .4rem; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; }
footer { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; background: #ffffff; color: #000000; }
  figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  nav, details:not([open]) { display: none; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="note">Generated images in this report are synthetic: they show no real person and must not be taken for
scans of patients.</p>
{contents}
</header>
<main>
{body}
</main>
<footer>Made by maisi {version}.</footer>
</body>
</html>
"""
