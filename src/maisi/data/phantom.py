"""A body of simple shapes: CT and label map of any region, size and spacing, for tests and examples.

Coordinates are millimetres in RAS+: x to the patient's right, y anterior, z superior, 0 at the hip joints. Most
shapes stand in `phantom_shapes.json`; spine, ribs and lungs follow rules. It is anatomy for programs, not for eyes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import BODY, REGIONS, label_id, sort_regions
from maisi.errors import MaisiError
from maisi.volume import Volume

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]
Point = Sequence[float] | NDArray[np.floating[Any]]

REGION_SPAN_MM: Mapping[str, tuple[float, float]] = {
    "head-neck": (560.0, 830.0),
    "chest": (300.0, 560.0),
    "abdomen": (70.0, 300.0),
    "lower-body": (-220.0, 70.0),
}
"""Lower and upper end of each region along z."""

DESCRIPTION = "phantom made by maisi"
"""What the files of a phantom say of themselves."""

AIR_HU, FAT_HU = -1000.0, -100.0
BLUR_VOXELS = 0.45


def phantom(
    size: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    regions: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Volume, Volume]:
    """Draw a phantom.

    Args:
        size: voxels along X, Y, Z.
        spacing_mm: of the voxels. Size times spacing is the field of view; what of the body lies in it is drawn.
        regions: the field of view is centred on them; () is the whole body.
        seed: build, pose, sizes, contrast medium and noise follow from it, whatever size and spacing.

    Returns:
        CT (int16 HU, -1024 to 3071) and labels (uint8: released ids, 200 for the rest of the body), RAS+,
        on the same grid in the world.

    Raises:
        MaisiError: unknown region, or size or spacing that are not positive.
    """
    return _drawn(size, spacing_mm, regions, seed, None).volumes(np.random.default_rng((seed, 1)))


def phantom_labels(
    size: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    regions: Sequence[str] = (),
    seed: int = 0,
    centre_mm: tuple[float, float, float] | None = None,
) -> Volume:
    """Draw the label map of `phantom` alone; with `centre_mm` the field of view is centred on that place in the world.

    Raises:
        MaisiError: as `phantom`.
    """
    return _drawn(size, spacing_mm, regions, seed, centre_mm).label_volume()


def _drawn(
    size: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    regions: Sequence[str],
    seed: int,
    centre_mm: Point | None,
) -> _Canvas:
    if min(size) < 1 or not all(np.isfinite(s) and s > 0 for s in spacing_mm):
        raise MaisiError(f"A phantom of {size} voxels of {spacing_mm} mm is impossible; give positive numbers.")
    build = _Build(np.random.default_rng((seed, 0)))
    canvas = _Canvas(size, spacing_mm, build.place(_centre(regions)) if centre_mm is None else centre_mm, build)
    _draw_body(canvas)
    _draw(canvas, "soft")
    _draw_lungs(canvas)
    _draw(canvas, "chest", "vessels", "head")
    _draw_spine(canvas)
    _draw_ribs(canvas)
    _draw(canvas, "bones", "air")
    return canvas


def _centre(regions: Sequence[str]) -> tuple[float, float, float]:
    names = sort_regions(regions) or REGIONS
    return (0.0, 0.0, (REGION_SPAN_MM[names[0]][1] + REGION_SPAN_MM[names[-1]][0]) / 2)


@lru_cache
def _table() -> dict[str, Any]:
    text = resources.files("maisi.data").joinpath("phantom_shapes.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


class _Build:
    """What makes one body differ from another, drawn once, before any shape."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.scale = generator.uniform([0.9, 0.9, 0.94], [1.08, 1.12, 1.05])
        self.tilt = generator.uniform(-0.03, 0.03, size=2)  # lean to the side and forwards: mm per mm of height
        self.twist = float(generator.uniform(-0.06, 0.06))  # radians about z
        self.fat_mm = float(generator.uniform(6, 26))
        self.contrast = float(generator.choice([0.0, generator.uniform(0.5, 1.0)]))
        self.jitter = generator.uniform(-1, 1, size=(512, 4))
        self.tissue_shift = generator.normal(0, 0.35, size=64)

    def place(self, points: Any) -> NDArray[np.float64]:
        """Points (..., 3) of the mean body -> this body's."""
        moved = np.asarray(points, dtype=np.float64) * self.scale
        cos, sin = np.cos(self.twist), np.sin(self.twist)
        x, y, z = moved[..., 0], moved[..., 1], moved[..., 2]
        x, y = cos * x - sin * y, sin * x + cos * y
        middle = 350.0
        return np.stack([x + self.tilt[0] * (z - middle), y + self.tilt[1] * (z - middle), z], axis=-1)

    def hu(self, tissue: str) -> tuple[float, float]:
        """Mean and texture of a tissue: between the table's plain and enhanced value, shifted a little."""
        rows = _table()["tissues"]
        plain, enhanced, texture = rows[tissue]
        shift = self.tissue_shift[list(rows).index(tissue)] * texture
        return plain + self.contrast * (enhanced - plain) + shift, texture


class _Canvas:
    """A grid on which shapes are drawn, each inside its bounding box; later shapes cover earlier ones."""

    def __init__(self, size: Sequence[int], spacing_mm: Sequence[float], centre: Point, build: _Build) -> None:
        self.build = build
        self.spacing_mm = (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2]))
        self.axes = [
            ((np.arange(n) - (n - 1) / 2) * s + c).astype(np.float32)
            for n, s, c in zip(size, spacing_mm, centre, strict=True)
        ]
        self.labels = np.zeros(tuple(size), np.uint8)
        self.hu = np.full(tuple(size), AIR_HU, np.float32)
        self.texture = np.full(tuple(size), 4.0, np.float32)
        self.drawn = 0

    def box(self, low: Point, high: Point) -> Box | None:
        """Slices of the voxels whose centres lie between two corners; None where there are none."""
        ends = [np.searchsorted(axis, pair) for axis, pair in zip(self.axes, zip(low, high, strict=True), strict=True)]
        if any(stop <= start for start, stop in ends):
            return None
        x, y, z = (slice(int(start), int(stop)) for start, stop in ends)
        return (x, y, z)

    def grid(self, box: Box) -> tuple[Floats, Floats, Floats]:
        """Coordinates of a box's voxels, ready to broadcast."""
        x, y, z = (axis[part] for axis, part in zip(self.axes, box, strict=True))
        return x[:, None, None], y[None, :, None], z[None, None, :]

    def paint(self, box: Box, mask: Mask, label: int | None, hu: float, texture: float) -> None:
        """Set HU, texture and (unless None) the label where `mask` (of the box) is true."""
        self.hu[box][mask] = hu
        self.texture[box][mask] = texture
        if label is not None:
            self.labels[box][mask] = label

    def ellipsoid(self, shape: Mapping[str, Any], centre: Point, radii: Point, yaw: float) -> None:
        """Draw |x/rx|^p + |y/ry|^p + |z/rz|^p < 1, turned by `yaw` degrees about z."""
        middle = self.build.place(centre)
        rx, ry, rz = np.asarray(radii, dtype=np.float64) * self.build.scale * self._size_jitter()
        reach = max(rx, ry) if yaw else 0.0
        half = np.array([max(rx, reach), max(ry, reach), rz])
        box = self.box(middle - half, middle + half)
        if box is None:
            return
        x, y, z = (axis - np.float32(c) for axis, c in zip(self.grid(box), middle, strict=True))
        angle = np.radians(yaw)
        u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        power = shape.get("power", 2)
        level = np.abs(u / rx) ** power + np.abs(v / ry) ** power + np.abs(z / rz) ** power
        depth = (1 - level ** (1 / power)) * min(rx, ry, rz)
        if "above" in shape:
            depth = np.where(self.grid(box)[2] > shape["above"] * self.build.scale[2], depth, -1)
        if "within" in shape:
            depth = np.where(_profile(self, shape["within"], box) < 1, depth, -1)
        self._fill(shape, box, depth, min(rx, ry, rz))

    def tube(self, shape: Mapping[str, Any], points: Sequence[Point], radii: Sequence[float]) -> None:
        """Draw capsules along a line of points, the radius going from one to the next."""
        nodes = self.build.place(points)
        widths = np.asarray(radii, dtype=np.float64) * float(self.build.scale[:2].mean()) * self._size_jitter()
        pieces = [
            self._capsule(a, b, ra, rb)
            for a, b, ra, rb in zip(nodes[:-1], nodes[1:], widths[:-1], widths[1:], strict=True)
        ]
        for box, depth, radius in [piece for piece in pieces if piece]:
            self._fill({**shape, "core": None}, box, depth, radius)
        for box, depth, radius in [piece for piece in pieces if piece and shape.get("core")]:
            self._fill_core(shape, box, depth, radius)

    def _capsule(
        self, a: NDArray[np.float64], b: NDArray[np.float64], ra: float, rb: float
    ) -> tuple[Box, Floats, float] | None:
        """Depth below the surface of one capsule, in its bounding box."""
        radius = max(ra, rb)
        box = self.box(np.minimum(a, b) - radius, np.maximum(a, b) + radius)
        if box is None:
            return None
        grid = self.grid(box)
        line = b - a
        along = sum((axis - np.float32(s)) * np.float32(d) for axis, s, d in zip(grid, a, line, strict=True))
        t = np.clip(along / max(float(np.dot(line, line)), 1e-6), 0, 1)
        square = sum((axis - (s + t * d)) ** 2 for axis, s, d in zip(grid, a, line, strict=True))
        depth = (ra + t * (rb - ra)) - np.sqrt(square)
        return box, np.asarray(depth, dtype=np.float32), radius

    def _fill(self, shape: Mapping[str, Any], box: Box, depth: Floats, radius: float) -> None:
        """Paint where depth > 0: bones get a cortex around trabecular bone, other shapes perhaps a core."""
        label = label_id(shape["label"]) if shape["label"] else None
        if "hu" in shape:
            self.paint(box, depth > 0, label, shape["hu"], 12.0)
            return
        self.paint(box, depth > 0, label, *self.build.hu(shape["tissue"]))
        if shape["tissue"] == "bone":
            self.paint(box, depth > min(3.0, 0.45 * radius), None, *self.build.hu("trabecular"))
        if shape.get("core"):
            self._fill_core(shape, box, depth, radius)

    def _fill_core(self, shape: Mapping[str, Any], box: Box, depth: Floats, radius: float) -> None:
        share, hu = shape["core"]
        self.paint(box, depth > (1 - share) * radius, None, hu, 20.0)

    def _size_jitter(self) -> float:
        """Next of the factors 0.94 to 1.06: a property of the shape, drawn or not, so that views agree."""
        self.drawn += 1
        return 1 + 0.06 * float(self.build.jitter[self.drawn % len(self.build.jitter), 0])

    def volumes(self, generator: np.random.Generator) -> tuple[Volume, Volume]:
        """Blur the edges as a scanner does, add texture and noise, and wrap both arrays."""
        noise = generator.standard_normal(self.hu.shape, dtype=np.float32)
        image = ndimage.gaussian_filter(self.hu, BLUR_VOXELS, mode="nearest", truncate=2.5)
        image += ndimage.gaussian_filter(noise, 0.7, mode="wrap", truncate=2.0) * self.texture * 2
        np.clip(np.rint(image, out=image), -1024, 3071, out=image)
        labels = self.label_volume()
        return labels.with_array(image.astype(np.int16)), labels

    def label_volume(self) -> Volume:
        """Wrap the label map with its place in the world."""
        origin = (float(self.axes[0][0]), float(self.axes[1][0]), float(self.axes[2][0]))
        return Volume.from_spacing(self.labels, self.spacing_mm, origin)


def _draw(canvas: _Canvas, *groups: str) -> None:
    """Draw groups of the table in order; a pair's mirror image follows each shape."""
    for shape in (shape for group in groups for shape in _table()["groups"][group]):
        _draw_shape(canvas, shape)
        if shape.get("pair"):
            _draw_shape(canvas, _mirrored(shape))


def _draw_shape(canvas: _Canvas, shape: Mapping[str, Any]) -> None:
    if shape["kind"] == "tube":
        canvas.tube(shape, shape["points"], shape["radius"])
    else:
        canvas.ellipsoid(shape, shape["centre"], shape["radii"], shape.get("yaw", 0.0))


def _mirrored(shape: Mapping[str, Any]) -> Mapping[str, Any]:
    flip = np.array([-1, 1, 1])
    mirrored = dict(shape) | {"label": shape["label"].replace("left", "right"), "yaw": -shape.get("yaw", 0.0)}
    for key in {"points", "centre"} & set(shape):
        mirrored[key] = (np.array(shape[key]) * flip).tolist()
    return mirrored


def _profile(canvas: _Canvas, name: str, box: Box, shrink_mm: float = 0.0) -> Floats:
    """Level (0 at the axis, 1 at the wall) of a cross-section that changes with z, `body` or `cavity`."""
    table = np.array(_table()[name])
    build = canvas.build
    x, y, z = canvas.grid(box)
    heights = z[0, 0] / build.scale[2]
    wide, deep, front = (np.interp(heights, table[:, 0], column) for column in table[:, 1:].T)
    axis = build.place(np.stack([np.zeros_like(front), front, heights], axis=-1))
    outside = (heights < table[0, 0]) | (heights > table[-1, 0])
    rx = np.where(outside, 1e-3, np.maximum(wide * build.scale[0] - shrink_mm, 1e-3)).astype(np.float32)
    ry = np.where(outside, 1e-3, np.maximum(deep * build.scale[1] - shrink_mm, 1e-3)).astype(np.float32)
    u = (x - axis[:, 0].astype(np.float32)) / rx
    v = (y - axis[:, 1].astype(np.float32)) / ry
    return u * u + v * v


_LIMBS = (
    ([[-166, -2, 498], [-188, -6, 380], [-208, -10, 225]], [48, 45, 42]),
    ([[-92, -4, 10], [-98, 0, -80], [-102, 8, -430]], [88, 84, 68]),
)
"""Arms and thighs: the left ones."""


def _draw_body(canvas: _Canvas) -> None:
    """Skin and fat, the muscle beneath, and the fat of the abdominal cavity; all of it is body."""
    everything = (slice(None), slice(None), slice(None))
    fat, fat_texture = canvas.build.hu("fat")
    muscle = canvas.build.hu("muscle")
    canvas.paint(everything, _profile(canvas, "body", everything) < 1, BODY, fat, fat_texture)
    limbs = [(np.array(points) * [side, 1, 1], np.array(radii)) for points, radii in _LIMBS for side in (1, -1)]
    for points, radii in limbs:
        canvas.tube({"label": "body", "tissue": "fat"}, points.tolist(), radii.tolist())
    for points, radii in limbs:
        canvas.tube({"label": "body", "tissue": "muscle"}, points.tolist(), (radii - canvas.build.fat_mm / 2).tolist())
    # the fat of head and neck is thin
    heights = canvas.axes[2] / canvas.build.scale[2]
    for low, high, depth in ((-1000.0, 560.0, canvas.build.fat_mm), (560.0, 1000.0, 4.0)):
        start, stop = np.searchsorted(heights, (low, high))
        part = (slice(None), slice(None), slice(int(start), int(stop)))
        canvas.paint(part, _profile(canvas, "body", part, depth) < 1, BODY, *muscle)
    start, stop = np.searchsorted(heights, (-30.0, 330.0))
    part = (slice(None), slice(None), slice(int(start), int(stop)))
    cavity = _profile(canvas, "body", part, canvas.build.fat_mm + 12) < 1
    canvas.paint(part, cavity & (canvas.grid(part)[1] > -45), BODY, fat, fat_texture)


def _draw_lungs(canvas: _Canvas) -> None:
    """Lobes between chest wall, diaphragm and mediastinum, the mediastinum's fat, and vessels in the lungs."""
    build = canvas.build
    low, high = (float(build.place([0, 0, end])[2]) for end in (215, 540))
    box = canvas.box([-1e4, -1e4, low], [1e4, 1e4, high])
    if box is not None:
        _draw_lobes(canvas, box)
    _draw_lung_vessels(canvas)


def _draw_lobes(canvas: _Canvas, box: Box) -> None:
    build = canvas.build
    x, y, z = canvas.grid(box)
    level = _profile(canvas, "cavity", box)
    height = z / np.float32(build.scale[2])
    lean = x - np.float32(build.tilt[0]) * (z - 350)
    dome = np.where(lean > 0, np.float32(352), np.float32(340)) - 90 * level
    chest = (level < 1) & (height > dome)
    canvas.paint(box, chest, BODY, *build.hu("fat"))
    middle = np.interp(height, [300, 360, 420, 480, 540], [34, 34, 26, 22, 16]).astype(np.float32)
    texture = build.hu("lung")
    oblique = height - 385 + 0.9 * y  # above and in front of the oblique fissure
    horizontal = height - 405
    for label, part in (
        ("left lung upper lobe", (lean < -middle) & (oblique >= 0)),
        ("left lung lower lobe", (lean < -middle) & (oblique < 0)),
        ("right lung upper lobe", (lean > middle) & (oblique >= 0) & (horizontal >= 0)),
        ("right lung middle lobe", (lean > middle) & (oblique >= 0) & (horizontal < 0)),
        ("right lung lower lobe", (lean > middle) & (oblique < 0)),
    ):
        canvas.paint(box, chest & part, label_id(label), *texture)


def _draw_lung_vessels(canvas: _Canvas) -> None:
    """Branches from each hilum outwards; they keep the label of the lobe."""
    generator = np.random.default_rng(0)
    for side in (-1, 1):
        hilum = np.array([side * 42.0, -14.0, 410.0])
        for _ in range(16):
            tip = hilum + generator.normal(size=3) * [22, 34, 48] + [side * 34, 0, 0]
            middle = (hilum + tip) / 2 + generator.normal(size=3) * 5
            canvas.tube({"label": "", "tissue": "blood"}, [hilum, middle, tip], [4.0, 2.8, 1.2])


_VERTEBRAE = ("L5", "L4", "L3", "L2", "L1", *(f"T{n}" for n in range(12, 0, -1)), *(f"C{n}" for n in range(7, 0, -1)))
_VERTEBRA_HEIGHTS = np.cumsum(
    [100, 36, 36, 36, 35, 31, 27, 26, 25, 24, 24, 23, 22, 22, 21, 20, 20, 19, 18, 17, 17, 17, 17, 18]
)


def _draw_spine(canvas: _Canvas) -> None:
    """S1 and the vertebrae with arch and processes, the canal and the cord."""
    for name, height in zip(("S1", *_VERTEBRAE), (64, *_VERTEBRA_HEIGHTS), strict=True):
        _draw_vertebra(canvas, f"vertebrae {name}", float(height))
    canal = [[0.0, _spine_y(h) - _body_size(h)[1] - 9, float(h)] for h in range(60, 690, 30)]
    canvas.tube({"label": "", "tissue": "csf"}, canal, [9.0] * len(canal))
    cord = canal[6:]  # it ends at L1
    canvas.tube({"label": "spinal cord", "tissue": "cord"}, cord, [6.5] * len(cord))


def _draw_vertebra(canvas: _Canvas, label: str, height: float) -> None:
    rx, ry, rz = _body_size(height)
    y = _spine_y(height)
    bone = {"label": label, "tissue": "bone", "power": 4}
    canvas.ellipsoid(bone, [0, y, height], [rx, ry, rz], 0.0)
    back = y - ry - 18
    for side in (-1, 1):
        canvas.tube(
            bone, [[side * 0.7 * rx, y - ry, height], [side * 13, back + 4, height], [0, back, height - 3]], [4.5, 4, 4]
        )
        canvas.tube(bone, [[side * 13, back + 6, height], [side * (13 + rx), back + 2, height]], [4, 3.5])
    canvas.tube(bone, [[0, back, height - 3], [0, back - ry, height - 0.6 * rz - 4]], [4, 3.5])


def _spine_y(height: float) -> float:
    table = np.array(_table()["spine"])
    return float(np.interp(height, table[:, 0], table[:, 1]))


def _body_size(height: float) -> tuple[float, float, float]:
    """Half axes of a vertebral body: they shrink upwards."""
    knots = [60, 100, 244, 300, 528, 560, 655]
    columns = ([26, 25, 23, 18, 13, 12, 14], [17, 17, 16, 14, 10, 8, 7], [13, 14, 14, 11.5, 8, 6.5, 6.5])
    rx, ry, rz = (float(np.interp(height, knots, column)) for column in columns)
    return rx, ry, rz


def _draw_ribs(canvas: _Canvas) -> None:
    """Twelve pairs along the wall of the chest, and the cartilages of the upper ten."""
    for number in range(1, 13):
        for side, word in ((-1, "left"), (1, "right")):
            points = _rib_points(number, side)
            canvas.tube({"label": f"{word} rib {number}", "tissue": "bone"}, points, [5.5] * len(points))
            if number <= 10:
                end = np.array([side * 14.0, 97.0, max(495 - 17.0 * number, 385.0)])
                bend = (np.array(points[-1]) + end) / 2 + [side * 8.0, 4.0, -4.0]
                canvas.tube({"label": "costal cartilages", "tissue": "cartilage"}, [points[-1], bend, end], [5, 5, 5])


def _rib_points(number: int, side: int) -> list[list[float]]:
    """Arc from the vertebra around the chest, sinking to the front."""
    table = np.array(_table()["cavity"])
    start = float(_VERTEBRA_HEIGHTS[17 - number]) + 4
    end_angle = {8: 0.7, 9: 0.66, 10: 0.6, 11: 0.44, 12: 0.32}.get(number, 0.78)
    drop = 30 + 6.5 * number
    points = []
    for angle in np.linspace(0.07, end_angle, 12) * np.pi:
        z = start - drop * (angle / np.pi / 0.8) ** 1.3
        wide, deep, front = (float(np.interp(max(z, 235), table[:, 0], column)) for column in table[:, 1:].T)
        points.append([side * (wide + 6) * float(np.sin(angle)), front - (deep + 6) * float(np.cos(angle)), z])
    return points
