"""Print the table of methods from the evaluations in a folder: python recipes/baselines/table.py FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAMES = {"ddpm": "DDPM", "ldm": "LDM", "hagan": "HA-GAN", "maisi": "MAISI (carried model)"}
PLANES = ("axial", "sagittal", "coronal")
HALVES = "fid_real_halves"
"""The same distance between halves of the real set: what no method can be expected to beat."""


def table(folder: Path) -> str:
    """FID of each plane and their mean, a row for each method that was evaluated; lower is better."""
    found = {name: folder / name / "result.json" for name in NAMES}
    results = {name: json.loads(path.read_text())["summary"] for name, path in found.items() if path.is_file()}
    lines = [f"| method | {' | '.join(PLANES)} | mean |", "|---|" + "---:|" * (len(PLANES) + 1)]
    lines += [_row(NAMES[name], summary, "fid") for name, summary in results.items()]
    halves = [summary for summary in results.values() if summary.get(HALVES) is not None]
    lines += [_row("real against real (halves)", halves[0], HALVES)] if halves else []
    return "\n".join(lines)


def _row(name: str, summary: dict[str, float | None], key: str) -> str:
    values = [summary.get(f"{key}_{plane}") for plane in PLANES] + [summary.get(key)]
    return f"| {name} | " + " | ".join("-" if value is None else f"{value:.2f}" for value in values) + " |"


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
