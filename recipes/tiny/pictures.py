"""Draw the picture of the model card, items 0 to 11 as they come: `python recipes/tiny/pictures.py OUT.png [MODEL]`."""

from __future__ import annotations

import sys
from pathlib import Path

from maisi.evaluation.pictures import Tile, contact_sheet
from maisi.generation.pipeline import load
from maisi.io.preview import Window

COLUMNS = 6
WIDE = Window("wide", 1600, -200)


def main(out: Path, name: str = "tiny", count: int = 12) -> None:
    """Generate and draw."""
    model = load(name)
    items = list(model.generate_many(count, region="head-neck", size=(112, 80, 80), spacing=(4.5, 4.5, 4.5), seed=0))
    rows = [
        [Tile(item.image, plane, f"item {start + i}", WIDE) for i, item in enumerate(items[start : start + COLUMNS])]
        for start in range(0, count, COLUMNS)
        for plane in ("coronal", "sagittal")
    ]
    contact_sheet(out, rows, title=f"Synthetic, not selected: {model.name}, head and neck, seed 0", px_per_mm=0.4)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
