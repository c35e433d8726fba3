"""An autoencoder judged on CTs: every measure, volume by volume and structure by structure. Knows no file format.

What is judged is a `Reconstructor`: any function from a CT to its reconstruction. `AutoencoderReconstructor` is one of
this package's autoencoders; `maisi.evaluation.hooks` makes one of a function of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

import maisi
from maisi.anatomy import label_names
from maisi.config import Config
from maisi.data.agreement import STRUCTURES
from maisi.data.label_maps import ids_in
from maisi.data.preprocess import resample
from maisi.errors import MaisiError
from maisi.evaluation.bootstrap import DRAWS, mean_interval
from maisi.evaluation.cache import Cache
from maisi.evaluation.feature_weights import FeatureWeights
from maisi.evaluation.perceptual import SLICES, ImageDistance, PerceptualName, load_distance, perceptual_distance
from maisi.evaluation.reconstruction import BLOCK, compare, compare_structures, mirror_hu
from maisi.evaluation.result import Result
from maisi.evaluation.volumes import Entry, Found, skipped
from maisi.generation import codec
from maisi.io.files import sha256
from maisi.networks.autoencoder import Autoencoder
from maisi.volume import Volume

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

MEASURES = ("psnr", "ssim", "mae_hu", "bias_hu", "grid_hu", "mirror_hu", "perceptual")
_NO_NAMES: Mapping[int, str] = MappingProxyType({})

_DECISIVE = {"spacing_mm", "features", "feature_weights", "slices", "mirror"}
"""What of the configuration decides a row."""

_DRAWN = 24
"""Structures in the picture, at most; the table has them all."""

COLUMNS = ("volume", "size", "spacing_mm", *MEASURES)


class Reconstructor(Protocol):
    """What is judged."""

    def __call__(self, ct: Volume) -> Volume:
        """Return a CT in HU (RAS+) as it comes out of the autoencoder: in HU, on the same grid."""
        ...


class AutoencoderReconstructor:
    """An autoencoder of this package, from its file; loaded when first needed."""

    def __init__(self, path: Path, device: str = "auto", precision: str = "auto") -> None:
        """Remember where it is and how to run it, as in `codec.load_autoencoder`."""
        self.path, self.device, self.precision = path, device, precision

    def __call__(self, ct: Volume) -> Volume:
        """See `Reconstructor`."""
        return codec.decode(self._autoencoder, codec.encode(self._autoencoder, ct))

    @cached_property
    def identity(self) -> dict[str, str]:
        """What decides the values that come out."""
        return {"autoencoder_sha256": sha256(self.path), "precision": self.precision, "device": self.device}

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        return codec.load_autoencoder(self.path, self.device, self.precision)


class ReconstructionConfig(Config):
    """How volumes are compared.

    Attributes:
        spacing_mm: that volumes are resampled to before; None takes them as they are.
        features: of the perceptual distance; 'none' leaves it out.
        feature_weights: their file, for those that others published.
        slices: of each plane, for the perceptual distance.
        mirror: reconstruct each volume's mirror image, too, see `reconstruction.mirror_hu`.
        seed: of the bootstrap.
        draws: of the bootstrap.
    """

    spacing_mm: tuple[float, float, float] | None = None
    features: PerceptualName | Literal["none"] = "efficientnet-lite0"
    feature_weights: FeatureWeights | None = None
    slices: int = Field(default=SLICES, ge=1)
    mirror: bool = False
    seed: int = Field(default=0, ge=0)
    draws: int = Field(default=DRAWS, ge=100)


@dataclass(frozen=True)
class ReconstructionStudy:
    """Judges volumes, one at a time.

    Attributes:
        reconstruct: what is judged.
        identity: JSON values that decide what it does; they are part of the cache's keys.
        config: how.
        cache: keeps finished volumes, or None.
    """

    reconstruct: Reconstructor
    identity: Mapping[str, Any]
    config: ReconstructionConfig
    cache: Cache | None = None

    def run(self, found: Found, skip_unreadable: bool = False, report: Report | None = None) -> Result:
        """Judge every volume and summarise.

        Raises:
            MaisiError: a volume can't be read (unless `skip_unreadable`), is too small, or comes back on another grid.
        """
        distance = self._distance
        rows: list[dict[str, Any]] = []
        faults: list[str] = []
        for done, entry in enumerate(found.entries):
            try:
                ct, labels = entry.pair()
            except MaisiError as error:
                faults.append(str(error))
                skipped(faults, 1, skip_unreadable)
            else:
                try:
                    rows.append(self._row(entry, partial(self.judge, ct, labels, distance, entry.label_names())))
                except MaisiError as error:
                    raise MaisiError(f"{entry.name}: {error}") from error
            if report:
                report("volumes", done + 1, len(found.entries))
        notes = (*found.notes, *skipped(faults, len(rows), skip_unreadable), *self._notes(rows))
        settings = {**self.config.model_dump(mode="json"), **self.identity, "maisi": maisi.__version__}
        return Result("reconstruction", self._summary(rows), rows, settings, COLUMNS, notes)

    def judge(
        self,
        ct: Volume,
        labels: Volume | None = None,
        distance: ImageDistance | None = None,
        names: Mapping[int, str] = _NO_NAMES,
    ) -> dict[str, Any]:
        """Return the row of one CT with its label map (RAS+, one grid); None stands for an infinite PSNR.

        `names` are those of label ids that the vocabulary lacks.

        Raises:
            MaisiError: it is too small, or the reconstruction lies on another grid.
        """
        stored_mm = ct.spacing_mm
        if self.config.spacing_mm is not None:
            # labels by the CT's affine: sizes are rounded, and the labels' own may be off by a hair
            labels = labels and resample(ct.with_array(labels.array), self.config.spacing_mm, order=0)
            ct = resample(ct, self.config.spacing_mm)
        made = self.reconstruct(ct)
        if not made.same_grid(ct):
            raise MaisiError(
                f"A CT of {ct.shape} came back as {made.shape} or at another place; "
                "give a reconstructor that keeps the grid."
            )
        whole = compare(ct.array, made.array)
        near = None if distance is None else perceptual_distance(ct.array, made.array, distance, self.config.slices)
        return {
            "size": "x".join(map(str, ct.shape)),
            "spacing_mm": _spacing(ct.spacing_mm),
            "stored_spacing_mm": _spacing(stored_mm),
            "psnr": _finite(whole.psnr_db),
            "ssim": whole.ssim,
            "mae_hu": whole.mae_hu,
            "bias_hu": whole.bias_hu,
            "grid_hu": whole.grid_hu,
            "mirror_hu": mirror_hu(ct.array, made.array, self._mirrored(ct)) if self.config.mirror else None,
            "perceptual": near,
            "structures": {} if labels is None else _structures(ct, made, labels, names),
        }

    def _mirrored(self, ct: Volume) -> NDArray[Any]:
        """What is made of a CT's mirror image, mirrored back; of whole blocks, so that both are cut into the same."""
        rows = max(BLOCK, len(ct.array) // BLOCK * BLOCK)
        made = self.reconstruct(ct.with_array(np.ascontiguousarray(ct.array[:rows][::-1])))
        return made.array[::-1]

    @cached_property
    def _distance(self) -> ImageDistance | None:
        config = self.config
        return None if config.features == "none" else load_distance(config.features, config.feature_weights)

    def _row(self, entry: Entry, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self.cache is None:
            return {"volume": entry.name, **compute()}
        settings = self.config.model_dump(mode="json", include=_DECISIVE)
        key = ["reconstruction", MEASURES, dict(self.identity), settings, entry.hash]
        return {"volume": entry.name, **self.cache.json(key, compute)}

    def _summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        summary: dict[str, float | None] = {"volumes": len(rows)}
        for measure in MEASURES:
            summary |= self._interval(measure, [row[measure] for row in rows])
        for name in dict.fromkeys(name for row in rows for name in row["structures"]):
            held = [row["structures"][name] for row in rows if name in row["structures"]]
            key = name.replace(" ", "_")
            summary[f"volumes_{key}"] = len(held)
            for measure in ("mae_hu", "bias_hu", "psnr"):
                summary |= self._interval(f"{measure}_{key}", [one[measure] for one in held])
        return summary

    def _interval(self, name: str, values: Sequence[float | None]) -> dict[str, float | None]:
        return mean_interval(values, self.config.seed, self.config.draws).named(name)

    def _notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        notes = []
        moved = sum(row["spacing_mm"] != row["stored_spacing_mm"] for row in rows)
        if moved:
            notes.append(f"{moved} of {len(rows)} volumes were resampled to {rows[0]['spacing_mm']} mm before.")
        equal = sum(row["psnr"] is None for row in rows)
        if equal:
            notes.append(f"{equal} volume(s) came back without any error; their infinite PSNR is not in the mean.")
        if self.config.features != "none":
            notes.append(self._perceptual_note())
        if len(rows) > 1:
            notes.append(f"Intervals: 95 %, percentile bootstrap over volumes, {self.config.draws} draws.")
        return notes

    def _perceptual_note(self) -> str:
        weights = self.config.feature_weights
        if self.config.features == "lpips":
            return (
                f"The perceptual distance is LPIPS 0.1 ({weights}) of {self.config.slices} grey slices of each plane, "
                "windowed to [-1000, 1000] HU; published numbers may be of other slices and windows."
            )
        features = f"'{self.config.features}'" + (f" ({weights})" if weights else "")
        return (
            f"The perceptual distance is LPIPS without learned weights on features {features}; "
            "it can't be compared with published LPIPS."
        )


def draw(result: Result, figure: Any) -> None:
    """Draw a reconstruction's result: every volume by PSNR and SSIM, and the error in HU by structure."""
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    rows = [row for row in result.items if row["psnr"] is not None]
    left.scatter([row["psnr"] for row in rows], [row["ssim"] for row in rows], s=18)
    left.set(xlabel="PSNR (dB)", ylabel="SSIM", title=f"{len(result.items)} volume(s)")
    structures = [key.removeprefix("volumes_") for key in result.summary if key.startswith("volumes_")]
    most = min(_DRAWN, len(structures))
    names = ["all voxels", *(name.replace("_", " ") for name in structures[:most])]
    keys = ["mae_hu", *(f"mae_hu_{name}" for name in structures[:most])]
    means = [result.summary[key] or 0.0 for key in keys]
    ends = [(result.summary[f"{key}_low"], result.summary[f"{key}_high"]) for key in keys]
    reach = [
        (0.0, 0.0) if low is None or high is None else (max(0.0, mean - low), max(0.0, high - mean))
        for mean, (low, high) in zip(means, ends, strict=True)
    ]
    right.barh(names, means, xerr=np.array(reach).T, color="0.75", ecolor="0.25", capsize=2)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=8)
    right.set(xlabel="mean absolute error (HU)", title=f"by structure, {most} of {len(structures)}")


def _structures(ct: Volume, made: Volume, labels: Volume, custom: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """Groups first, then every label by its name."""
    groups: dict[str, Sequence[int]] = {name: sorted(ids) for name, ids in STRUCTURES.items()}
    ids = ids_in(labels.array)
    names = {id: custom.get(id, f"label {id}") for id in ids if id} | label_names(ids)
    groups |= {name: [id] for id, name in sorted(names.items()) if name not in groups}
    found = compare_structures(ct.array, made.array, labels.array, groups)
    return {
        name: {"voxels": e.voxels, "mae_hu": e.mae_hu, "bias_hu": e.bias_hu, "psnr": _finite(e.psnr_db)}
        for name, e in found.items()
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _spacing(spacing_mm: tuple[float, float, float]) -> str:
    return "x".join(f"{mm:.4g}" for mm in spacing_mm)
