"""Does a model do what its conditions say? Regions, spacing and size varied (the paper's Fig. 5), measured by rules.

A model that is deaf to the spacing draws the same voxels whatever it is told, so its bodies grow with the spacing. One
that listens draws bodies of the same millimetres: with 1.5 times the spacing, 1.5 times fewer voxels across.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import LUNGS, REGIONS
from maisi.data.segmentation import AIRWAY, NECK_AREA_MM2, segment
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.pictures import WIDE, Tile, draw_sheet
from maisi.evaluation.result import Result
from maisi.generation.job import make_job, weights_used
from maisi.generation.output import IMAGE
from maisi.io.nifti import read_volume
from maisi.request import Request
from maisi.volume import Volume
from maisi.weights.registry import ModelConfig

if TYPE_CHECKING:
    from maisi.generation.pipeline import Model

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
Mask = NDArray[np.bool_]

SPACING_FACTOR, SIZE_FACTOR = 1.5, 2
AS_ASKED, SPACING_UP, SIZE_UP = "as asked", f"spacing x {SPACING_FACTOR:g}", f"size x {SIZE_FACTOR}"

SHOWN_PLANES = ("coronal", "sagittal")
SHEET_PX = 1600

LUNG_ML = 300.0  # less is no chest
AIRWAY_ML = 2.0  # less air above the lungs is no throat
ABDOMEN_MM = 60.0  # so much trunk without lung is an abdomen
LEGS_MM = 30.0
SMALLER_LEG = 0.3  # share of the section that the thinner of two legs has at least


@dataclass(frozen=True)
class Ask:
    """What one volume is asked to show.

    Attributes:
        change: `AS_ASKED`, or what is changed against that.
        regions: from top to bottom.
        size: voxels along X, Y, Z.
        spacing_mm: along X, Y, Z.
    """

    change: str
    regions: tuple[str, ...]
    size: Triple
    spacing_mm: Spacing

    @property
    def fov_mm(self) -> Spacing:
        """Extent of the volume along X, Y, Z."""
        x, y, z = (n * s for n, s in zip(self.size, self.spacing_mm, strict=True))
        return (x, y, z)

    @property
    def caption(self) -> str:
        """Two lines: regions and change; size and spacing."""
        size = " x ".join(str(n) for n in self.size)
        spacing = " x ".join(f"{s:.3g}" for s in dict.fromkeys(self.spacing_mm))
        return f"{' + '.join(self.regions)}, {self.change}\n{size} voxels of {spacing} mm"


@dataclass(frozen=True)
class Shown:
    """What the rules of `data.segmentation` find in a volume.

    Attributes:
        fov_mm: extent of the volume.
        body_mm: width, depth and height of the body; width and depth are medians over the slices looked at.
        body_voxels: the same in voxels.
        cut: along which axes the body reaches the edge of the volume, so that its extent is not known.
        lungs_ml: volume of the lungs.
        regions: those that the rules tell.
    """

    fov_mm: Spacing
    body_mm: Spacing
    body_voxels: Spacing
    cut: tuple[bool, bool, bool]
    lungs_ml: float
    regions: tuple[str, ...]


def asks(
    model: ModelConfig, regions: Sequence[str] = (), size: Triple | None = None, spacing_mm: Spacing | None = None
) -> tuple[tuple[Ask, ...], ...]:
    """Decide the volumes: for each region one as asked, one with 1.5 times the spacing, one of twice the size.

    Args:
        model: content of `model.json`.
        regions: () is all that the model's table of views names, or else all there are.
        size: voxels; None is what suits region and spacing.
        spacing_mm: None is what suits region and size.

    Raises:
        MaisiError: the model cannot make one of them.
    """
    known = {region for view in model.field_of_view for region in view.regions}
    chosen = regions or [region for region in REGIONS if region in known] or REGIONS
    return tuple(_varied(model, region, size, spacing_mm) for region in dict.fromkeys(chosen))


def _varied(model: ModelConfig, region: str, size: Triple | None, spacing_mm: Spacing | None) -> tuple[Ask, ...]:
    base = _checked(model, Ask(AS_ASKED, (region,), size, spacing_mm))  # type: ignore[arg-type]
    x, y, z = (round(s * SPACING_FACTOR, 6) for s in base.spacing_mm)
    i, j, k = (n * SIZE_FACTOR for n in base.size)
    wider = replace(base, change=SPACING_UP, spacing_mm=(x, y, z))
    return (base, _checked(model, wider), _checked(model, replace(base, change=SIZE_UP, size=(i, j, k))))


def _checked(model: ModelConfig, ask: Ask) -> Ask:
    """The ask with what was open filled in."""
    try:
        job = make_job(_request(ask, model.name, 0), model)
    except MaisiError as error:
        raise MaisiError(f"{', '.join(ask.regions)}, {ask.change}: {error}") from None
    return replace(ask, regions=job.conditions.regions, size=job.size, spacing_mm=job.conditions.spacing_mm)


def _request(ask: Ask, model: str, seed: int) -> Request:
    return Request.parse(region=ask.regions, size=ask.size, spacing=ask.spacing_mm, seed=seed, model=model)


def respond(
    model: Model,
    rows: Sequence[Sequence[Ask]],
    seed: int,
    cache: Cache,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Result, Callable[[Any], None]]:
    """Generate and measure; return the result and what draws its picture.

    Args:
        model: to be judged.
        rows: what `asks` decided.
        seed: of the noise; the same for all.
        cache: keeps the volumes.
        progress: told the stage, volumes done, volumes in all.
    """
    tell = progress or (lambda stage, done, total: None)
    total, done = sum(map(len, rows)), 0
    volumes: list[list[Volume]] = []
    for row in rows:
        volumes.append([])
        for ask in row:
            volumes[-1].append(_generated(model, ask, seed, cache))
            done += 1
            tell("generate", done, total)
    found = [[look(ct, within_mm=row[0].fov_mm[2] / 2) for ct in cts] for row, cts in zip(rows, volumes, strict=True)]
    settings = {
        "model": model.name,
        "weights_sha256": weights_used(model.folder, masked=False),
        "seed": seed,
        "device": str(model.device),
        "precision": str(model.dtype).removeprefix("torch."),
    }
    tiles = [
        [tile for ask, ct in zip(row, cts, strict=True) for tile in _tiles(ask, ct)]
        for row, cts in zip(rows, volumes, strict=True)
    ]
    title = f"Synthetic CT, {model.name}, seed {seed}"
    return summed_up(rows, found, settings), lambda figure: draw_sheet(
        figure, tiles, title=title, px_per_mm=sheet_scale(tiles)
    )


def _tiles(ask: Ask, ct: Volume) -> list[Tile]:
    """A volume's planes; the first bears the caption, which is wider than a narrow tile."""
    return [Tile(ct, plane, "" if number else ask.caption, WIDE) for number, plane in enumerate(SHOWN_PLANES)]


def _generated(model: Model, ask: Ask, seed: int, cache: Cache) -> Volume:
    request = _request(ask, model.name, seed)
    weights, settings = weights_used(model.folder, masked=False), model.folder.config.model_dump(mode="json")
    key = ["response", request.model_dump(mode="json"), weights, settings, str(model.device), str(model.dtype)]

    def make(path: Any) -> None:
        item = model.generate(region=ask.regions, size=ask.size, spacing=ask.spacing_mm, seed=seed)
        item.save(path)

    return read_volume(cache.path(key, make) / IMAGE)


def look(ct: Volume, within_mm: float = float("inf")) -> Shown:
    """Measure by rules what a CT in HU shows.

    Args:
        ct: any orientation.
        within_mm: width and depth are measured in the slices of so many mm about the middle: those that a volume of
            another height shows too.
    """
    labels = segment(ct).to_ras()
    spacing = labels.spacing_mm
    body = labels.array > 0
    middle = _middle(body, within_mm / spacing[2])
    width, cut_x = _across(middle.max(axis=1))
    depth, cut_y = _across(middle.max(axis=0))
    slices = np.flatnonzero(body.any(axis=(0, 1)))
    height = float(slices[-1] - slices[0] + 1) if slices.size else 0.0
    cut_z = bool(body[:, :, 0].any() or body[:, :, -1].any())
    lung = np.isin(labels.array, list(LUNGS))
    return Shown(
        fov_mm=_times(labels.shape, spacing),
        body_mm=_times((width, depth, height), spacing),
        body_voxels=(width, depth, height),
        cut=(cut_x, cut_y, cut_z),
        lungs_ml=float(np.count_nonzero(lung) * np.prod(spacing) / 1000),
        regions=_regions(body, lung, labels.array == AIRWAY, spacing),
    )


def _middle(body: Mask, slices: float) -> Mask:
    count = body.shape[2]
    wanted = max(1, min(count, round(min(slices, count))))
    start = (count - wanted) // 2
    return body[:, :, start : start + wanted]


def _across(shadow: Mask) -> tuple[float, bool]:
    """Median extent in voxels over the slices (columns) that hold anything, and whether most reach an edge."""
    held = shadow[:, shadow.any(axis=0)]
    if not held.size:
        return 0.0, False
    first = held.argmax(axis=0)
    last = held.shape[0] - 1 - held[::-1].argmax(axis=0)
    edge = (first == 0) | (last == held.shape[0] - 1)
    return float(np.median(last - first + 1)), bool(edge.mean() > 0.5)


def _regions(body: Mask, lung: Mask, airway: Mask, spacing: Spacing) -> tuple[str, ...]:
    """The regions of a body: lungs tell the chest, air above them the head, trunk below them the abdomen, legs."""
    ml = float(np.prod(spacing)) / 1000
    lung_slices = np.flatnonzero(lung.any(axis=(0, 1)))
    has_lungs = np.count_nonzero(lung) * ml >= LUNG_ML
    low, high = (int(lung_slices[0]), int(lung_slices[-1]) + 1) if has_lungs else (body.shape[2], 0)
    throat = np.count_nonzero(airway[:, :, high:]) * ml >= AIRWAY_ML
    below = body[:, :, :low] if has_lungs or not throat else body[:, :, :0]
    legs = np.array([_is_legs(below[:, :, z]) for z in range(below.shape[2])], dtype=bool)
    area = below.sum(axis=(0, 1)) * spacing[0] * spacing[1]
    trunk = (area >= NECK_AREA_MM2) & ~legs
    told = {
        "head-neck": throat,
        "chest": has_lungs,
        "abdomen": np.count_nonzero(trunk) * spacing[2] >= ABDOMEN_MM,
        "lower-body": np.count_nonzero(legs) * spacing[2] >= LEGS_MM,
    }
    return tuple(region for region in REGIONS if told[region])


def _is_legs(section: Mask) -> bool:
    """Whether an axial section is two parts of like size."""
    parts, count = ndimage.label(section)
    if count < 2:
        return False
    sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1]
    return bool(sizes[1] >= SMALLER_LEG * sizes[:2].sum())


def scale_found(base: Shown, changed: Shown) -> float | None:
    """How many times fewer voxels the body is wide and deep in `changed`; None where an edge cuts both ways."""
    ratios = [
        base.body_voxels[axis] / changed.body_voxels[axis]
        for axis in (0, 1)
        if not (base.cut[axis] or changed.cut[axis]) and base.body_voxels[axis] and changed.body_voxels[axis]
    ]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else None


def summed_up(rows: Sequence[Sequence[Ask]], found: Sequence[Sequence[Shown]], settings: dict[str, Any]) -> Result:
    """Compare what was asked with what was found."""
    items: list[dict[str, Any]] = []
    for row, shown in zip(rows, found, strict=True):
        for ask, one in zip(row, shown, strict=True):
            items.append(_item(ask, one, row[0], shown[0]))
    hits = [region in item["regions found"] for item in items for region in item["regions asked"]]
    summary = {"volumes": float(len(items)), "asked regions found": float(np.mean(hits))}
    summary["largest error of the field of view, mm"] = max(item["fov error mm"] for item in items)
    means: dict[str, float | None] = {}
    for change in (SPACING_UP, SIZE_UP):
        ratios = [item["asked / found"] for item in items if item["change"] == change]
        known = [ratio for ratio in ratios if ratio is not None]
        means[f"{change}: scale asked / found"] = float(np.mean(known)) if known else None
    return Result(
        "response",
        {**summary, **means},
        items,
        settings,
        columns=(
            *("change", "regions asked", "regions found", "fov mm", "body mm", "cut along", "lungs ml"),
            *("scale asked", "scale found", "asked / found"),
        ),
        notes=NOTES,
    )


NOTES = (
    "All volumes are synthetic.",
    "Scale: how many times fewer voxels the body is to be wide and deep than in the volume as asked; a model that is "
    f"deaf to the spacing has asked / found = {SPACING_FACTOR:g} there, one that listens 1. It is left open where the "
    "volume's edge cuts the body.",
    "Regions are told by rules: lungs, air in the throat above them, trunk below them, two legs. A volume may show "
    "more than was asked, since its field of view may reach further.",
)


def _item(ask: Ask, shown: Shown, base: Ask, base_shown: Shown) -> dict[str, Any]:
    asked = ask.spacing_mm[0] / base.spacing_mm[0]
    scale = None if ask is base else scale_found(base_shown, shown)
    return {
        "change": ask.change,
        "regions asked": list(ask.regions),
        "regions found": list(shown.regions),
        "size": list(ask.size),
        "spacing mm": list(ask.spacing_mm),
        "fov mm": _rounded(shown.fov_mm),
        "fov error mm": float(np.abs(np.subtract(shown.fov_mm, ask.fov_mm)).max()),
        "body mm": _rounded(shown.body_mm),
        "cut along": [axis for axis, cut in zip("XYZ", shown.cut, strict=True) if cut],
        "lungs ml": round(shown.lungs_ml, 1),
        "scale asked": None if ask is base else asked,
        "scale found": scale,
        "asked / found": None if scale is None else asked / scale,
    }


def sheet_scale(rows: Sequence[Sequence[Tile]]) -> float:
    """Pixels per mm at which the widest row is `SHEET_PX` wide, at most 1."""
    widest = max(sum(tile.size_mm[0] for tile in row) for row in rows)
    return min(1.0, SHEET_PX / widest)


def _times(counts: Iterable[float], spacing: Spacing) -> Spacing:
    x, y, z = (float(n * s) for n, s in zip(counts, spacing, strict=True))
    return (x, y, z)


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 1) for value in values]
