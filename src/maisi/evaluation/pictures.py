"""Sheets of slices of several volumes, all at one scale in mm: what differs in size is seen to differ in size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maisi.io.files import atomic_path
from maisi.io.preview import PLANES, SOFT_TISSUE, Picture, Plane, Window
from maisi.volume import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = Window("wide", 1600, -200)
"""Lung, soft tissue and bone at once."""

_GAP_PX = 10
_LINE_PX = 15
_NARROWEST_PX = 130  # room for a caption under a small slice
_FOOT_PX = 34
_BAR_MM = 100
_DPI = 100


@dataclass(frozen=True)
class Tile:
    """One slice to draw: the middle one of a plane.

    Attributes:
        ct: HU, any orientation.
        plane: 'axial', 'coronal' or 'sagittal'.
        caption: lines written over it.
        window: range of HU from black to white.
    """

    ct: Volume
    plane: str
    caption: str = ""
    window: Window = SOFT_TISSUE

    def picture(self) -> Picture:
        """Return the slice in grey, [0, 1], rows from top to bottom, in radiological convention."""
        cut, ras = self._cut, self.ct.to_ras().array
        return self.window.grey(cut.cut(ras, ras.shape[cut.fixed] // 2))

    @property
    def size_mm(self) -> tuple[float, float]:
        """Width and height."""
        ras, cut = self.ct.to_ras(), self._cut
        extent = [n * s for n, s in zip(ras.shape, ras.spacing_mm, strict=True)]
        return extent[cut.across], extent[cut.down]

    @property
    def _cut(self) -> Plane:
        return next(plane for plane in PLANES if plane.name == self.plane)


def contact_sheet(path: Path, rows: Sequence[Sequence[Tile]], *, title: str = "", px_per_mm: float = 1.0) -> None:
    """Draw rows of tiles as one PNG, every tile at the same scale, with a bar of 100 mm.

    Args:
        path: file to make, atomically.
        rows: tiles from left to right, rows from top to bottom.
        title: one line for the top.
        px_per_mm: the scale.

    Raises:
        MaisiError: the place cannot be written to.
    """
    # Not pyplot: its global state is shared between threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=_DPI)
    FigureCanvasAgg(figure)
    draw_sheet(figure, rows, title=title, px_per_mm=px_per_mm)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=_DPI, facecolor="black", metadata={"Software": None})


def draw_sheet(figure: Figure, rows: Sequence[Sequence[Tile]], *, title: str = "", px_per_mm: float = 1.0) -> None:
    """Draw what `contact_sheet` writes onto an empty figure, which takes the size of the sheet."""
    scale = px_per_mm
    heading = _LINE_PX + 2 * _GAP_PX if title else _GAP_PX
    width = max(_GAP_PX + sum(_slot_px(tile, scale) for tile in row) for row in rows)
    height = heading + sum(_row_px(row, scale) for row in rows) + _FOOT_PX
    figure.set_size_inches(width / _DPI, height / _DPI)
    figure.set_facecolor("black")
    figure.set_layout_engine("none")  # places are in pixels
    # one pair of axes in pixels, y downwards, so that sizes need no second system of units
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(_GAP_PX, _GAP_PX, title, color="0.9", size=10, weight="bold", va="top", parse_math=False)
    top = float(heading)
    for row in rows:
        left = float(_GAP_PX)
        for tile in row:
            _place(axes, tile, left, top + _caption_px(row), scale)
            left += _slot_px(tile, scale)
        top += _row_px(row, scale)
    axes.plot([_GAP_PX, _GAP_PX + _BAR_MM * scale], [height - 10] * 2, color="0.9", linewidth=2)
    axes.text(_GAP_PX, height - 15, f"{_BAR_MM} mm", color="0.9", size=8, va="bottom")


def _place(axes: Axes, tile: Tile, left: float, top: float, scale: float) -> None:
    width, height = (mm * scale for mm in tile.size_mm)
    extent = (left, left + width, top + height, top)
    axes.imshow(tile.picture(), cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="bilinear")
    axes.text(left, top - 3, tile.caption, color="0.8", size=7.5, va="bottom", parse_math=False)


def _slot_px(tile: Tile, scale: float) -> float:
    return max(tile.size_mm[0] * scale, _NARROWEST_PX) + _GAP_PX


def _row_px(row: Sequence[Tile], scale: float) -> float:
    return _caption_px(row) + max(tile.size_mm[1] for tile in row) * scale + _GAP_PX


def _caption_px(row: Sequence[Tile]) -> int:
    return _LINE_PX * max(len(tile.caption.splitlines()) for tile in row)
