"""What regions, spacings and sizes do to the output: a figure like the paper's Fig. 5, all at one scale in mm.

    python recipes/tiny/conditions_figure.py -o conditions.png [--model tiny] [--seed 0]

First row: regions, with the same size, spacing and seed. Second row, from left to right: one region; the spacing
increased by half; then the number of voxels doubled.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from maisi.errors import MaisiError
from maisi.evaluation.pictures import WIDE, Tile, contact_sheet
from maisi.generation.pipeline import Model, load
from maisi.io.preview import Window


@dataclass(frozen=True)
class Panel:
    """What one column is asked for, and the planes it is shown in."""

    region: tuple[str, ...]
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    planes: tuple[str, ...] = ("sagittal",)
    window: Window = WIDE

    @property
    def caption(self) -> str:
        """Two lines: regions; size and spacing."""
        size = " x ".join(str(n) for n in self.size)
        spacing = " x ".join(f"{s:g}" for s in dict.fromkeys(self.spacing_mm))
        return f"{' + '.join(self.region)}\n{size} voxels of {spacing} mm"


BOTH = ("coronal", "sagittal")
REGIONS = (
    Panel(("head-neck",), (80, 64, 64), (6.0, 6.0, 6.0), BOTH),
    Panel(("chest",), (80, 64, 64), (6.0, 6.0, 6.0), BOTH),
    Panel(("chest", "abdomen"), (80, 64, 64), (6.0, 6.0, 6.0), BOTH),
    Panel(("abdomen",), (80, 64, 64), (6.0, 6.0, 6.0), BOTH),
)
SPACINGS = (
    Panel(("head-neck",), (112, 80, 80), (4.0, 4.0, 4.0), BOTH),
    Panel(("head-neck",), (112, 80, 80), (6.0, 6.0, 6.0), BOTH),
    Panel(("head-neck", "chest"), (80, 64, 128), (6.0, 6.0, 6.0), BOTH),
)


def tiles(model: Model, panel: Panel, seed: int) -> list[Tile]:
    """Generate a panel's volume and cut it."""
    started = time.monotonic()
    item = model.generate(region=panel.region, size=panel.size, spacing=panel.spacing_mm, seed=seed)
    seconds = time.monotonic() - started
    print(f"{panel.caption.replace(chr(10), ': ')} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    return [Tile(item.image, plane, panel.caption, panel.window) for plane in panel.planes]


def main() -> None:
    """Read the command line, generate, draw; a fault of the input ends with code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG to make")
    parser.add_argument("--model", default="tiny", help="carried model or model folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=0.5, help="pixels per mm")
    arguments = parser.parse_args()
    try:
        model = load(arguments.model)
        rows = [[tile for panel in row for tile in tiles(model, panel, arguments.seed)] for row in (REGIONS, SPACINGS)]
        title = f"Synthetic CT, {model.name}, seed {arguments.seed}"
        contact_sheet(arguments.out, rows, title=title, px_per_mm=arguments.scale)
    except MaisiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
