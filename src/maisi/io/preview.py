"""A PNG to look at: three planes in two windows, and the label map over them. Knows nothing of generation."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from maisi.anatomy import BACKGROUND, BODY, KNOWN_IDS, TUMORS, label_name
from maisi.errors import MaisiError
from maisi.io.files import atomic_path
from maisi.volume import Volume

Picture = NDArray[Any]
Color = tuple[float, float, float]
"""RGB in [0, 1]."""


@dataclass(frozen=True)
class Window:
    """A range of HU shown from black to white: `level` in the middle, `width` from end to end."""

    name: str
    width: float
    level: float

    def grey(self, hu: Picture) -> Picture:
        """Map HU to [0, 1]."""
        grey = (np.asarray(hu, dtype=np.float64) - self.level) / self.width + 0.5
        return np.clip(grey, 0.0, 1.0)

    def __str__(self) -> str:
        return f"{self.name}  W {self.width:g} L {self.level:g}"


SOFT_TISSUE = Window("soft tissue", 400, 40)
LUNG = Window("lung", 1200, -400)
"""Begins at -1000 HU, where the models' range begins, so that the air around the body is black."""
BONE = Window("bone", 1800, 400)

_WIDTH_PX = 1200
_HEIGHT_LIMIT_PX = 3000
_GAP_PX = 12
_TITLE_PX = 46
_CAPTION_PX = 26
_LEGEND_LINE_PX = 20
_LEGEND_COLUMNS = 5
_LEGEND_LIMIT = 40
_HUES = (0.07, 0.87)
_SWATCH_PX = 8
_TEXT_PX = 12
_SMALL_TEXT_PX = 11
_TITLE_TEXT_PX = 15
_AIR_HU = -500
_FILL = 0.35
_LIGHT: Color = (0.9, 0.9, 0.9)
_FAINT: Color = (0.6, 0.6, 0.6)
_FRAME: Color = (0.2, 0.2, 0.2)
_LUNG_SHARE = 0.05
_SLICE_PX = 512


@dataclass(frozen=True)
class Plane:
    """How a plane of a RAS+ array becomes a picture with rows from top to bottom.

    Attributes:
        name: for the caption.
        fixed: the array axis that is cut.
        across: the array axis along the picture's width; it is shown from its high end to its low end.
        down: the array axis along the picture's height, likewise: the high end (front, head) is on top.
        ends: letters at the left and right edge.
    """

    name: str
    fixed: int
    across: int
    down: int
    ends: tuple[str, str]

    def cut(self, array: Picture, index: int) -> Picture:
        """Return slice `index` as (rows, columns)."""
        flat: Picture = np.moveaxis(array, (self.fixed, self.down, self.across), (0, 1, 2))[index]
        return np.flip(flat)


# Radiological convention: one looks from the feet and from the front, so the patient's left is on the right.
PLANES = (
    Plane("axial", fixed=2, across=0, down=1, ends=("R", "L")),
    Plane("coronal", fixed=1, across=0, down=2, ends=("R", "L")),
    Plane("sagittal", fixed=0, across=1, down=2, ends=("A", "P")),
)


def preview(path: Path, image: Volume, labels: Volume | None = None, title: str = "") -> None:
    """Draw three planes of a CT as PNG: soft-tissue window, lung or bone window, labels over the first.

    The planes cut the middle of the body, or the largest tumour where `labels` has one. Distances are true,
    with one scale in mm for all. The patient's left is on the right of the picture.

    Args:
        path: file to make, atomically.
        image: CT in HU, any orientation.
        labels: label map on the same grid.
        title: one line for the top.

    Raises:
        MaisiError: `labels` lie on another grid, or the place cannot be written to.
    """
    if labels is not None and not image.same_grid(labels):
        raise MaisiError("The label map and the image lie on different grids; resample one onto the other.")
    ct = image.to_ras()
    mask = None if labels is None else labels.to_ras().array
    picture = _draw(ct, mask, title)
    with atomic_path(path) as part:
        picture.save(part, format="PNG")


def slice_png(image: Volume, plane: Plane, index: int, window: Window, labels: Volume | None = None) -> bytes:
    """One slice as a PNG with square pixels, as `preview` shows it, for viewers.

    Args:
        image: HU, RAS+.
        plane: one of `PLANES`.
        index: of the slice, from 0 to its axis' length - 1.
        window: what is black and what is white.
        labels: laid over it, on the same grid.
    """
    cut = plane.cut(image.array, index)
    height_mm, width_mm = cut.shape[0] * image.spacing_mm[plane.down], cut.shape[1] * image.spacing_mm[plane.across]
    per_mm = _SLICE_PX / max(height_mm, width_mm)
    size = (max(1, round(width_mm * per_mm)), max(1, round(height_mm * per_mm)))
    grey = Image.fromarray(_bytes(window.grey(cut))).resize(size, Image.Resampling.BILINEAR)
    picture = grey.convert("RGB")
    if labels is not None:
        over = Image.fromarray(_bytes(_overlay(plane.cut(labels.array, index), size)), "RGBA")
        picture.paste(over.convert("RGB"), mask=over.getchannel("A"))
    data = io.BytesIO()
    picture.save(data, "PNG", compress_level=1)
    return data.getvalue()


def choose_window(hu: Picture) -> Window:
    """Return the lung window where lungs fill 5 % and more of the volume's middle, else the bone window.

    Air outside the body is below -950 HU, fat and all else inside it above -650 HU.
    """
    x, y, z = (slice(n // 4, n - n // 4) for n in hu.shape)
    core = hu[x, y, z]
    share = np.count_nonzero((core > -950) & (core < -650)) / core.size
    return LUNG if share > _LUNG_SHARE else BONE


def label_color(label: int) -> Color:
    """Return the colour of a label id: always the same, bright, unlike its neighbours'; red is for tumours alone."""
    if label == BODY:
        return (0.75, 0.75, 0.75)
    if label in TUMORS:
        return (1.0, 0.32 if label % 2 else 0.1, 0.05 + 0.08 * sorted(TUMORS).index(label))
    low, high = _HUES
    # the golden section spreads successive ids over the circle
    hue = low + (high - low) * (label * 0.6180339887498949 % 1.0)
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.9, 0.6, 0.75)[label % 3], 1.0)
    lift = max(0.0, 0.5 - (0.3 * red + 0.6 * green + 0.1 * blue))  # blue alone is too dark to see on black
    return (red + (1 - red) * lift, green + (1 - green) * lift, blue + (1 - blue) * lift)


def rgb(color: Color) -> tuple[int, int, int]:
    """Return a colour's red, green and blue from 0 to 255."""
    red, green, blue = (round(255 * part) for part in color)
    return (red, green, blue)


@dataclass(frozen=True)
class _Layout:
    """Sizes of the panels: pixels per mm, and the volume's extents (X, Y, Z) in mm."""

    extents_mm: tuple[float, ...]
    scale: float

    @classmethod
    def fit(cls, extents_mm: tuple[float, ...], rows: int, other_px: int) -> _Layout:
        """Let three panels fill the width, unless the rows would then be too tall."""
        x, y, z = extents_mm
        by_width = (_WIDTH_PX - 4 * _GAP_PX) / (2 * x + y)
        by_height = (_HEIGHT_LIMIT_PX - other_px) / (rows * max(y, z))
        return cls(extents_mm, min(by_width, by_height))

    def panel(self, plane: Plane) -> tuple[int, int]:
        """Return width and height in pixels."""
        width, height = self.extents_mm[plane.across], self.extents_mm[plane.down]
        return (max(1, round(width * self.scale)), max(1, round(height * self.scale)))

    @property
    def row_px(self) -> int:
        """Height of the tallest panel."""
        return max(self.panel(plane)[1] for plane in PLANES)


def _draw(ct: Volume, mask: Picture | None, title: str) -> Image.Image:
    """Lay out, from the top: title, a row for each window, the labels and their legend."""
    cuts = _choose_cuts(ct.array, mask)
    slices = [plane.cut(ct.array, i) for plane, i in zip(PLANES, cuts, strict=True)]
    names = [] if mask is None else [plane.cut(mask, i) for plane, i in zip(PLANES, cuts, strict=True)]
    legend, untold = _legend_ids(names)
    windows = [SOFT_TISSUE, choose_window(ct.array)]
    rows = len(windows) + bool(names)
    legend_px = -(-(len(legend) + bool(untold)) // _LEGEND_COLUMNS) * _LEGEND_LINE_PX
    other_px = _TITLE_PX + rows * (_CAPTION_PX + _GAP_PX) + legend_px
    extents_mm = tuple(n * s for n, s in zip(ct.shape, ct.spacing_mm, strict=True))
    layout = _Layout.fit(extents_mm, rows, other_px)
    canvas = _Canvas(_WIDTH_PX, other_px + rows * layout.row_px, layout)
    canvas.title(title)
    for window in windows:
        canvas.row(str(window), [window.grey(flat) for flat in slices])
    if names:
        canvas.row("labels", [SOFT_TISSUE.grey(flat) for flat in slices], names)
        canvas.legend(legend, untold)
    return canvas.picture


class _Canvas:
    """A black picture that is filled in pixels from the top; `top` is where the next row begins.

    Drawn by Pillow: to import and set up matplotlib takes two seconds, a tenth of a small volume's generation.
    """

    def __init__(self, width: int, height: int, layout: _Layout) -> None:
        self.layout = layout
        self.top = _TITLE_PX
        self.picture = Image.new("RGB", (width, height))
        self.pen = ImageDraw.Draw(self.picture)

    def text(self, left: float, top: float, text: str, size: int, color: Color, anchor: str = "la") -> None:
        """Write a line, with a dark edge; `anchor` as Pillow has it, by default the place is the upper left corner."""
        font = _font(size)
        self.pen.text(
            (left, top), text, fill=rgb(color), font=font, anchor=anchor, stroke_width=1, stroke_fill=(0, 0, 0)
        )

    def title(self, title: str) -> None:
        """Write the title and the convention."""
        self.text(_GAP_PX, 8, title, _TITLE_TEXT_PX, _LIGHT)
        note = "patient's left is on the right (radiological convention)"
        self.text(_GAP_PX, 28, note, _SMALL_TEXT_PX, _FAINT)

    def row(self, caption: str, pictures: Sequence[Picture], names: Sequence[Picture] = ()) -> None:
        """Place the three planes side by side under their caption; `names` are label ids to draw over."""
        self.text(_GAP_PX, self.top + 4, caption, _TEXT_PX, _LIGHT)
        left = _GAP_PX
        for number, plane in enumerate(PLANES):
            size = self.layout.panel(plane)
            upper = self.top + _CAPTION_PX + (self.layout.row_px - size[1]) // 2
            overlay = _overlay(names[number], size) if names else None
            self._panel(left, upper, size, pictures[number], overlay)
            self._letters(left, upper, size, plane)
            left += size[0] + _GAP_PX
        self.top += self.layout.row_px + _CAPTION_PX + _GAP_PX

    def legend(self, ids: Sequence[int], untold: int = 0) -> None:
        """Write the names of the labels beside their colours, in columns; then how many are not told."""
        column_px = (self.picture.width - _GAP_PX) / _LEGEND_COLUMNS

        def place(number: int) -> tuple[int, int]:
            line, column = divmod(number, _LEGEND_COLUMNS)
            return round(_GAP_PX + column * column_px), self.top + line * _LEGEND_LINE_PX

        if untold:
            self.text(*place(len(ids)), f"and {untold} more", _SMALL_TEXT_PX, _LIGHT)
        for number, label in enumerate(ids):
            name = label_name(label) if label in KNOWN_IDS else "unnamed"
            left, top = place(number)
            color = label_color(label)
            self.pen.rectangle((left, top + 2, left + _SWATCH_PX, top + 2 + _SWATCH_PX), fill=rgb(color))
            self.text(left + _SWATCH_PX + 5, top, f"{label} {name}", _SMALL_TEXT_PX, color)

    def _panel(self, left: int, top: int, size: tuple[int, int], grey: Picture, overlay: Picture | None) -> None:
        smooth = Image.fromarray(grey.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        # Between voxels a cubic goes beyond black and white.
        self.picture.paste(Image.fromarray(_bytes(np.clip(np.asarray(smooth), 0, 1))), (left, top))
        if overlay is not None:
            layer = Image.fromarray(_bytes(overlay))
            self.picture.paste(layer, (left, top), mask=layer)
        self.pen.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=rgb(_FRAME))

    def _letters(self, left: int, top: int, size: tuple[int, int], plane: Plane) -> None:
        width, middle = size[0], top + size[1] / 2
        self.text(left + 4, middle, plane.ends[0], _TEXT_PX, _FAINT, "lm")
        self.text(left + width - 4, middle, plane.ends[1], _TEXT_PX, _FAINT, "rm")
        self.text(left + width / 2, self.top + 4, plane.name, _TEXT_PX, _FAINT, "ma")


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """DejaVu Sans out of matplotlib's files, which has more than Latin letters; Pillow's own font where it is not."""
    package = find_spec("matplotlib")  # imports nothing
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def _bytes(picture: Picture) -> NDArray[np.uint8]:
    """[0, 1] in bytes."""
    return np.round(255 * picture).astype(np.uint8)


def _choose_cuts(hu: Picture, mask: Picture | None) -> tuple[int, ...]:
    """Return the index at which each of `PLANES` cuts: most of the tumours, else half of what is not air."""
    tumors = None if mask is None else np.isin(mask, list(TUMORS))
    lesion = tumors is not None and bool(tumors.any())
    target = tumors if tumors is not None and lesion else hu > _AIR_HU
    cuts = []
    for plane in PLANES:
        profile = target.sum(axis=tuple(axis for axis in range(3) if axis != plane.fixed))
        cuts.append(int(profile.argmax()) if lesion else _median_index(profile))
    return tuple(cuts)


def _median_index(profile: Picture) -> int:
    """Return the index that halves the sum of `profile`; the middle where all is zero."""
    total = profile.sum()
    if total == 0:
        return len(profile) // 2
    return int(np.searchsorted(np.cumsum(profile), total / 2))


def _legend_ids(names: Sequence[Picture]) -> tuple[list[int], int]:
    """Return the ids that the cuts show, tumours first, the body last, at most `_LEGEND_LIMIT`; and how many others."""
    shown = {int(i) for flat in names for i in np.unique(flat)} - {BACKGROUND}
    ids = sorted(shown - {BODY}, key=lambda i: (i not in TUMORS, i))
    body = [BODY] if BODY in shown else []
    told = ids[: _LEGEND_LIMIT - len(body)]
    return told + body, len(ids) - len(told)


def _overlay(labels: Picture, size: tuple[int, int]) -> Picture:
    """Colour a cut of a label map, filled thinly and outlined fully: RGBA in [0, 1], (height, width, 4).

    It is brought to the size of the panel first, so that outlines are one pixel wide at any spacing. The
    body's envelope is only outlined: its inside is what the eye wants to see.
    """
    width, height = size
    rows = np.arange(height) * labels.shape[0] // height
    columns = np.arange(width) * labels.shape[1] // width
    names = labels[np.ix_(rows, columns)]
    picture = np.zeros((height, width, 4))
    edge = _edges(names)
    for label in np.unique(names):
        if label == BACKGROUND:
            continue
        here = names == label
        picture[here] = (*label_color(int(label)), 0.0 if label == BODY else _FILL)
        picture[here & edge, 3] = 1.0
    return picture


def _edges(names: Picture) -> NDArray[np.bool_]:
    """Say which pixels have a neighbour above, below, left or right with another label."""
    edge = np.zeros(names.shape, dtype=np.bool_)
    down, right = names[1:] != names[:-1], names[:, 1:] != names[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge
