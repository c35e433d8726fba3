"""Cohorts as tables: a row is a request, made by hand or drawn from what a YAML file says. Imports no torch.

A column is a field of `Request`, or one structure's number in a field that has many (`anatomy_size.liver`). Cells are
what the command line takes; several words of one cell have ';' between.

Drawn columns are spread evenly: each row has its own part of the distribution (Latin hypercube sampling, McKay et al.
1979), so that 20 rows of a uniform spacing have no gap, and shares come out exact to one row. A column's values depend
on the seed, the number of rows and the column's name alone.
"""

from __future__ import annotations

import csv
import io
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maisi.config import Config, parse_config, read_yaml
from maisi.errors import MaisiError
from maisi.request import SEED_LIMIT, Request, item_seed
from maisi.weights.registry import carried_models

CASE = "case"
"""The column with the rows' names, which are those of their folders."""

REMARK = "#"
"""Columns whose names begin so are for people."""

MOST_ROWS = 100_000
MARK, TABLE, ITEMS, OVERVIEW, TUMORS = "cohort.json", "cohort.csv", "items.csv", "overview.png", "tumors.csv"
"""What a cohort's folder holds beside its rows, which can have none of these names: what says that it is one, the last
table, what came of it, where tumours lie."""

_LISTS = ("region", "structure", "tumor", "keep")
_BY_STRUCTURE = ("anatomy_size", "strengthen")
_PATHS = ("mask", "image", "library", "ranges")
_TRIPLES = ("size", "spacing")
_DRAWN_SEED_LIMIT = 2**31
"""Seeds in tables are small enough for programs that keep numbers as floats."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHOWN = 5

Cell = str | int | float | bool
Row = dict[str, str]


class Draw(Config):
    """How a column's values are drawn: one of `choice`, `uniform`, `log_uniform` and `normal`.

    Attributes:
        choice: values to choose from.
        weights: how often each is chosen, relative to the others; () is equally often.
        uniform: smallest and largest.
        log_uniform: smallest and largest; as many below their geometric mean as above.
        normal: mean and standard deviation.
        within: smallest and largest of a normal one.
        whole: rounded to whole numbers.
    """

    choice: tuple[Cell, ...] = ()
    weights: tuple[float, ...] = ()
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    normal: tuple[float, float] | None = None
    within: tuple[float, float] | None = None
    whole: bool = False

    @model_validator(mode="after")
    def _check(self) -> Draw:
        given = [name for name in ("choice", "uniform", "log_uniform", "normal") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("give one of choice, uniform, log_uniform and normal")
        if self.weights and (len(self.weights) != len(self.choice) or min(self.weights) < 0 or not sum(self.weights)):
            raise ValueError(f"give a weight for each of the {len(self.choice)} choices, 0 or more")
        if self.within is not None and self.normal is None:
            raise ValueError("'within' bounds a normal one; leave it out, or give normal")
        if self.whole and self.choice:
            raise ValueError("'whole' rounds numbers that are drawn; leave it out beside choice")
        given_numbers = (*self.weights, *(self.normal or ()))
        if not all(map(math.isfinite, given_numbers)):
            raise ValueError("weights, means and standard deviations are finite numbers")
        for low, high in (ends for ends in (self.uniform, self.log_uniform, self.within) if ends is not None):
            if not low <= high or not math.isfinite(high - low):
                raise ValueError(f"{low:g} to {high:g} is no range; give the smaller first")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform needs numbers above 0")
        if self.normal is not None and not self.normal[1] > 0:
            raise ValueError("the standard deviation of normal must be above 0")
        return self

    def values(self, places: NDArray[np.float64]) -> list[str]:
        """Cells for places from 0 to 1 in the distribution."""
        if self.choice:
            weights = np.array(self.weights or [1.0] * len(self.choice))
            ends = np.cumsum(weights) / weights.sum()
            chosen = np.minimum(np.searchsorted(ends, places, side="right"), len(ends) - 1)
            return [_cell(self.choice[int(n)]) for n in chosen]
        if self.normal is not None:
            from scipy.stats import norm

            mean, deviation = self.normal
            least, most = self.within or (-math.inf, math.inf)
            low, high = norm.cdf((least - mean) / deviation), norm.cdf((most - mean) / deviation)
            numbers = np.clip(mean + deviation * norm.ppf(low + places * (high - low)), least, most)
        elif self.log_uniform is not None:
            low, high = np.log(self.log_uniform)
            numbers = np.exp(low + places * (high - low))
        else:
            low, high = self.uniform or (0.0, 0.0)
            numbers = low + places * (high - low)
        if self.whole:
            return [str(round(float(number))) for number in numbers]
        low, high = self.uniform or self.log_uniform or self.within or (-math.inf, math.inf)
        return [f"{min(max(float(f'{number:.5g}'), low), high):.12g}" for number in numbers]


class CohortSpec(Config):
    """What a cohort is drawn from.

    Attributes:
        count: rows.
        seed: another seed, other rows.
        columns: name -> a value for all rows, or how it is drawn.
    """

    count: int = Field(ge=1, le=MOST_ROWS)
    seed: int = Field(default=0, ge=0, lt=SEED_LIMIT)
    columns: dict[str, Draw | Cell]


EXAMPLE = """\
# maisi cohort draw cohort.yaml -o cohort.csv, then maisi cohort make cohort.csv -o out/cohort
count: 8
seed: 0
columns:                    # fields of a request, as the options of maisi generate
  region: chest
  size: {choice: ["96,80,80", "96,80,96"], weights: [3, 1]}
  spacing: {uniform: [3.5, 4.5]}              # a number is for all three axes
  structure: heart
  tumor: {choice: ["", "lung:20-40mm"]}       # half of the rows have one; its diameter is drawn for each item
  anatomy_size.heart: {normal: [1, 0.15], within: [0.7, 1.4]}
  retries: 1
"""


@dataclass(frozen=True)
class CohortRow:
    """One row of a table.

    Attributes:
        case: its name.
        request: what it asks for.
    """

    case: str
    request: Request


def draw_cohort(spec: CohortSpec, source: str = "The cohort") -> list[Row]:
    """Draw the rows of a cohort; each has a seed of its own, unless `spec` has a column for it.

    Raises:
        MaisiError: a column that is none, or values that make no request.
    """
    count, columns = spec.count, dict(spec.columns)
    drawn: dict[str, list[str]] = {}
    if CASE not in columns:
        drawn[CASE] = [f"case-{n:04d}" for n in range(count)]
    for name, how in columns.items():
        cells = how.values(_places(spec, name, how)) if isinstance(how, Draw) else [_cell(how)] * count
        drawn[name] = [",".join([cell] * 3) if name in _TRIPLES and _is_number(cell) else cell for cell in cells]
    if "seed" not in columns:
        drawn["seed"] = [str(item_seed(spec.seed, n) % _DRAWN_SEED_LIMIT) for n in range(count)]
    rows = [dict(zip(drawn, cells, strict=True)) for cells in zip(*drawn.values(), strict=True)]
    parse_rows(rows, source, Path())
    return rows


def read_spec(path: Path) -> CohortSpec:
    """Read what a cohort is drawn from, YAML.

    Raises:
        MaisiError: it cannot be read, or is not what `CohortSpec` says.
    """
    return read_yaml(CohortSpec, path)


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, which have the same keys, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_cohort(path: Path) -> list[CohortRow]:
    """Read and check a table; paths in it are relative to its folder.

    Raises:
        MaisiError: it cannot be read, a column that is none, or rows that make no request or share a name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MaisiError(f"Cannot read {path}: {error.strerror}; give the path of a CSV file.") from None
    except UnicodeDecodeError:
        raise MaisiError(f"{path} is no text in UTF-8; save it as CSV (UTF-8).") from None
    head = text.partition("\n")[0]
    separator = ";" if head.count(";") > head.count(",") else ","
    try:
        reader = csv.DictReader(io.StringIO(text), delimiter=separator, strict=True)
        columns = [column.strip() for column in reader.fieldnames or ()]
        columns = [column.lower() if column.lower() == CASE else column for column in columns]
        reader.fieldnames = columns
        rows = [dict(row) for row in reader if any(cell and cell.strip() for cell in _cells(row))]
    except csv.Error as error:
        raise MaisiError(f"{path} is no CSV ({error}); mend it.") from None
    twice = [column for column in columns if columns.count(column) > 1]
    if twice:
        raise MaisiError(f"{path} has two columns called '{twice[0]}'; rename or remove one.")
    if not rows:
        raise MaisiError(f"{path} has no rows; write one for each request below a line with the columns' names.")
    if any(None in row or None in row.values() for row in rows):
        raise MaisiError(f"{path} has rows with more or fewer cells than columns; put cells with commas in quotes.")
    return parse_rows(rows, str(path), path.parent)


def _cells(row: Mapping[Any, Any]) -> Iterable[str]:
    """All cells of a row, those beyond the columns and those that lack among them."""
    for cell in row.values():
        yield from cell if isinstance(cell, list) else [cell or ""]


def parse_rows(rows: Sequence[Row], source: str, folder: Path) -> list[CohortRow]:
    """Make requests of rows; all faults in one sentence, the first few named.

    Raises:
        MaisiError: as `read_cohort`.
    """
    if len(rows) > MOST_ROWS:
        raise MaisiError(f"{source} has {len(rows):,} rows; stay within {MOST_ROWS:,}.")
    _check_columns(rows[0], source)
    made: list[CohortRow] = []
    faults: list[str] = []
    for place, row in enumerate(rows):
        case = row.get(CASE, "").strip() or f"case-{place:04d}"
        try:
            if not _NAME.fullmatch(case) or case.lower() in (MARK, TABLE, ITEMS, OVERVIEW, TUMORS):
                raise MaisiError(f"'{case}' is no name for a folder; use letters, digits, '.', '_' and '-'.")
            made.append(CohortRow(case, _request(row, place, folder)))
        except MaisiError as error:
            faults.append(f"row {place + 1} ({case}): {error}")
    if faults:
        more = f" And {len(faults) - _SHOWN} more rows." if len(faults) > _SHOWN else ""
        raise MaisiError(f"{source}: {' '.join(faults[:_SHOWN])}{more}")
    _require_different(made, source)
    return made


def _check_columns(row: Iterable[str], source: str) -> None:
    fields = [name for name in Request.model_fields if name not in _BY_STRUCTURE and name != "removal"]
    for column in row:
        name, _, structure = column.partition(".")
        if column.startswith(REMARK):
            continue
        if column not in (CASE, *fields) and not (name in _BY_STRUCTURE and structure):
            from difflib import get_close_matches

            near = get_close_matches(column, [CASE, *fields, *(f"{name}.liver" for name in _BY_STRUCTURE)], n=1)
            mend = f"did you mean '{near[0]}'?" if near else f"columns are {CASE} and fields of a request."
            raise MaisiError(f"{source} has a column '{column}', which is none; {mend}")


def _request(row: Row, place: int, folder: Path) -> Request:
    wishes: dict[str, Any] = {"seed": place}
    for column, cell in row.items():
        text, (name, _, structure) = cell.strip(), column.partition(".")
        if not text or column == CASE or column.startswith(REMARK):
            continue
        if name in _BY_STRUCTURE:
            wishes.setdefault(name, {})[structure] = text
        elif name in _LISTS:
            words = [word.strip() for word in text.split(";") if word.strip()]
            wishes[name] = "none" if words == ["none"] else words
        elif name in _PATHS:
            wishes[name] = str(folder / text)
            if not (folder / text).exists():
                raise MaisiError(f"There is no {folder / text}; correct the path of its {name}.")
        elif name == "model" and text not in carried_models() and (folder / text).is_dir():
            wishes[name] = str((folder / text).resolve())
        else:
            wishes[name] = text
    return parse_config(Request, wishes, "the request")


def _require_different(rows: Sequence[CohortRow], source: str) -> None:
    names: dict[str, str] = {}
    for row in rows:
        if row.case.lower() in names:
            raise MaisiError(f"{source} has two rows called '{row.case}'; names are those of folders, so rename one.")
        names[row.case.lower()] = row.case


def _places(spec: CohortSpec, column: str, how: Draw) -> NDArray[np.float64]:
    """For each row a place from 0 to 1, one in each of as many equal parts; equally far apart for a choice.

    (So no share differs by a row or more from what it should be: both ends of a share are cut off alike.)
    """
    rng = np.random.default_rng([spec.seed, zlib.crc32(column.encode())])
    order = rng.permutation(spec.count)
    within: NDArray[np.float64] = np.asarray(rng.random(1 if how.choice else spec.count))
    return (order + within) / spec.count


def _cell(value: Cell) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
