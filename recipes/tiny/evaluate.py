"""Measure a model for its card: numbers as result.json and table.md, pictures of generated volumes as PNG.

    python recipes/tiny/evaluate.py --model tiny --data PREPARED_FOLDER -o OUT [--count 32]
    python recipes/tiny/evaluate.py --autoencoder FILE.safetensors --data PREPARED_FOLDER -o OUT

What is measured, on cases kept out of training unless said otherwise:

- autoencoder: PSNR, SSIM, MAE of decode(encode(CT)); head and neck at native spacing, the torso's centre crop;
- generated head-neck volumes, as often told of a chest as real ones show one, against real ones on the same grid (all
  splits: 32 patients are not enough for a distribution): 2.5D FID, HU histogram distance and air around the body, each
  beside the same distance between two halves of the real volumes with disjoint patients, averaged over several ways to
  halve them;
- volumes generated from the label maps of real cases: Dice of rule-based lungs, skeleton and body with the label map
  asked for, beside that of the real CT, which says how far the rules themselves can be trusted, and between two seeds.

Everything slow is cached in OUT/cache under a hash of model and data, so an interrupted run goes on where it stopped.
Only generated volumes are drawn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

import maisi
from maisi.data.agreement import dice_by_group, joint_counts
from maisi.data.prepared import PreparedCase, PreparedFolder
from maisi.data.preprocess import HU_MAX, HU_MIN, crop_or_pad, resample
from maisi.data.quality_measures import stray_share
from maisi.data.segmentation import segment
from maisi.data.views import region_extents, regions_of_box
from maisi.errors import MaisiError
from maisi.evaluation.fid import PLANES, FidConfig, SliceFid, fid, pooled
from maisi.evaluation.halves import compare_with_halves
from maisi.evaluation.intensity import HuHistogram, total_variation, wasserstein_hu
from maisi.evaluation.pictures import Tile, contact_sheet
from maisi.evaluation.reconstruction import compare
from maisi.evaluation.volumes import ct_of
from maisi.generation import codec
from maisi.generation.pipeline import Model, load
from maisi.io.files import INDEX, atomic_path, write_json
from maisi.io.preview import BONE, SOFT_TISSUE, Window
from maisi.networks.autoencoder import Autoencoder
from maisi.training.perceptual import FeatureName
from maisi.volume import Volume
from maisi.weights.load import sha256

Triple = tuple[int, int, int]

HEAD_NECK_ID = "pt_"
"""Ids of head-neck cases (OpenKBP) begin so; all other cases are of the torso."""

SIZE, SPACING_MM = (112, 80, 80), (4.5, 4.5, 4.5)
"""The grid of generated and real head-neck volumes."""

TORSO_CROP = (160, 160, 160)
TORSO_MASK_SPACING_MM, TORSO_MASK_SIZE = (3.0, 3.0, 3.0), (128, 128, 128)
WAYS_TO_HALVE = 5
PICTURED = 12
COLUMNS = 6


def main() -> None:
    """Read the command line and measure; a fault of the input ends with code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="carried model or model folder")
    parser.add_argument("--autoencoder", type=Path, help="measure this autoencoder alone")
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32, help="head-neck volumes to generate")
    parser.add_argument("--real", type=int, default=80, help="real volumes at most, 0 for all; 64 allow 32 a half")
    parser.add_argument("--masks", type=int, default=12, help="head-neck label maps to generate from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", type=float, default=0.75, help="share of the grid that a real case must fill")
    parser.add_argument(
        "--features",
        default="efficientnet-lite0",
        choices=get_args(FeatureName),
        help="of the FID; 'gradients' is quick",
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.autoencoder is None):
        parser.error("give either --model or --autoencoder")
    try:
        Evaluation(arguments).run()
    except MaisiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def say(text: str) -> None:
    """Print a line of progress with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Description:
    """What the comparison of two sets needs to know of one volume."""

    features: Mapping[str, NDArray[np.float32]]
    histogram: HuHistogram
    stray: float

    @classmethod
    def of(cls, ct: Volume, judge: SliceFid) -> Description:
        """Describe a CT in HU."""
        body = segment(ct).array > 0
        return cls(judge.describe(ct), HuHistogram.of(ct.array, body), stray_share(ct, body))

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """For a file."""
        return {"counts": self.histogram.counts, "stray": np.array(self.stray), **self.features}

    @classmethod
    def from_arrays(cls, stored: Mapping[str, NDArray[Any]]) -> Description:
        """Inverse of `as_arrays`."""
        features = {plane: stored[plane] for plane in PLANES}
        return cls(features, HuHistogram(stored["counts"]), float(stored["stray"]))


class Evaluation:
    """One run of the script; each section returns JSON values and keeps them in the cache."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        self.folder = PreparedFolder(arguments.data)
        self.index_hash = sha256(arguments.data / INDEX)
        self.judge_config = FidConfig(features=arguments.features)

    def run(self) -> None:
        """Measure everything and write result.json, table.md and the pictures."""
        self.out.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {"versions": versions(), "prepared_index_sha256": self.index_hash}
        weights = self.weights()
        own = self.cache(*weights.values(), self.arguments.precision)
        result |= {"model": self.arguments.model or str(self.arguments.autoencoder.name), "weights_sha256": weights}
        result["autoencoder"] = self.measure_autoencoder(own)
        if self.arguments.model:
            result["generation"] = self.measure_generation(own)
            result["masks"] = self.measure_masks(own)
        write_json(self.out / "result.json", result)
        with atomic_path(self.out / "table.md") as part:
            part.write_text(table(result), encoding="utf-8")
        say(f"done: {self.out / 'result.json'}, {self.out / 'table.md'}")

    @cached_property
    def model(self) -> Model:
        """The model that is measured."""
        return load(self.arguments.model, precision=self.arguments.precision)

    @cached_property
    def judge(self) -> SliceFid:
        """The feature extractor; loaded when first needed."""
        return SliceFid(self.judge_config)

    def weights(self) -> dict[str, str]:
        """Hash of every file that decides what is measured."""
        if self.arguments.autoencoder:
            return {self.arguments.autoencoder.name: sha256(self.arguments.autoencoder)}
        folder = self.model.folder
        return {"model.json": sha256(folder.folder / "model.json"), **folder.config.sha256}

    def cache(self, *parts: str) -> Path:
        """A folder for what depends on the data and on `parts`."""
        key = hashlib.sha256("\n".join((self.index_hash, *parts)).encode()).hexdigest()[:12]
        path = self.out / "cache" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def measure_autoencoder(self, own: Path) -> dict[str, Any]:
        """PSNR, SSIM and MAE of each validation case, and their means by part of the body."""
        cases = ct_cases(self.folder, "validation")
        rows = [kept_json(own / f"autoencoder-{case.id}.json", partial(self.reconstruction, case)) for case in cases]
        parts = sorted({row["part"] for row in rows})
        return {"cases": rows, "means": {part: means([r for r in rows if r["part"] == part]) for part in parts}}

    def reconstruction(self, case: PreparedCase) -> dict[str, Any]:
        """The measures of one case."""
        ct = ct_of(self.folder, case)
        if not is_head_neck(case):
            ct = crop_or_pad(ct, at_most(ct.shape, TORSO_CROP))
        made = codec.decode(self.autoencoder, codec.encode(self.autoencoder, ct))
        found = compare(ct.array, made.array)
        say(f"autoencoder: {case.id} {ct.shape} PSNR {found.psnr_db:.2f} SSIM {found.ssim:.4f}")
        return {"case": case.id, "part": part_of(case), "spacing_mm": ct.spacing_mm, "size": ct.shape, **asdict(found)}

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder on its own, or the model's."""
        if not self.arguments.autoencoder:
            return self.model.autoencoder
        return codec.load_autoencoder(self.arguments.autoencoder, precision=self.arguments.precision)

    def measure_generation(self, own: Path) -> dict[str, Any]:
        """Generated against real head-neck volumes; draws the generated ones."""
        folder = own / f"told-as-real-{self.arguments.seed}"
        folder.mkdir(exist_ok=True)
        volumes = list(self.generated(folder))
        self.draw(volumes[:PICTURED])
        made = [
            self.described(folder / f"{number:04d}.npz", partial(lambda ct: ct, ct))
            for number, ct in enumerate(volumes)
        ]
        cases = self.real_cases()
        say(f"{len(cases)} real head-neck volumes fill {self.arguments.coverage:.0%} of the grid")
        store = self.cache("real", self.judge_config.model_dump_json(), str((SIZE, SPACING_MM)))
        real = [self.described(store / f"{c.id}.npz", partial(self.on_grid, c)) for c in cases]
        return compare_sets(made, real, [case.patient for case in cases])

    def generated(self, folder: Path) -> Iterator[Volume]:
        """Items 0 to count - 1 of the seed, each told the regions of another real case; what `folder` has stays."""
        cases = self.real_cases()
        order = np.random.default_rng(self.arguments.seed).permutation(len(cases))
        for number in range(self.arguments.count):
            path = folder / f"{number:04d}.npy"
            if not path.exists():
                started = time.monotonic()
                item = self.model.generate(
                    region=self.regions(cases[order[number % len(order)]]),
                    size=SIZE,
                    spacing=SPACING_MM,
                    seed=self.arguments.seed,
                    item=number,
                )
                store(path, item.image.array)
                say(f"generated {number + 1}/{self.arguments.count} in {time.monotonic() - started:.1f} s")
            yield Volume.from_spacing(np.load(path, allow_pickle=False), SPACING_MM)

    def described(self, path: Path, ct: Callable[[], Volume]) -> Description:
        """The description kept at `path`, made of `ct()` if it is not there yet."""
        if not path.exists():
            say(f"describing {path.stem}")
            arrays: dict[str, Any] = Description.of(ct(), self.judge).as_arrays()
            with atomic_path(path) as part, part.open("wb") as file:
                np.savez(file, **arrays)
        with np.load(path, allow_pickle=False) as stored:
            return Description.from_arrays(stored)

    def real_cases(self) -> list[PreparedCase]:
        """Head-neck cases of both splits that fill enough of the grid along each axis, a random choice of them."""
        cases = [c for split in ("train", "validation") for c in ct_cases(self.folder, split)]
        full = [c for c in cases if is_head_neck(c) and self.fills_grid(c)]
        if not full:
            raise MaisiError(f"No head-neck case fills {self.arguments.coverage:.0%} of the grid; lower --coverage.")
        order = np.random.default_rng(0).permutation(len(full))[: self.arguments.real or None]
        return [full[i] for i in sorted(order)]

    def fills_grid(self, case: PreparedCase) -> bool:
        """Whether a case is a full view of head, neck and shoulders, not a slab."""
        have, wanted = np.multiply(case.shape, case.spacing_mm), np.multiply(SIZE, SPACING_MM)
        return bool((have >= self.arguments.coverage * wanted).all())

    def regions(self, case: PreparedCase) -> tuple[str, ...]:
        """What training would tell the networks of the view that `on_grid` is: where lungs begin, of the chest too."""
        affine = np.array(case.affine)
        extents = region_extents(np.asarray(self.folder.labels(case)), affine, case.regions)
        middle = affine[2, 3] + affine[2, 2] * case.shape[2] / 2
        reach = SIZE[2] * SPACING_MM[2] / 2
        return regions_of_box(extents, middle - reach, middle + reach)

    def on_grid(self, case: PreparedCase) -> Volume:
        """A real head-neck CT as the generated ones are: same grid, same window."""
        ct = crop_or_pad(resample(ct_of(self.folder, case), SPACING_MM), SIZE, value=HU_MIN)
        return ct.with_array(np.clip(ct.array, HU_MIN, HU_MAX).astype(np.int16))

    def draw(self, volumes: Sequence[Volume]) -> None:
        """Two sheets of generated volumes: soft-tissue and bone window."""
        for name, window in {"soft-tissue": SOFT_TISSUE, "bone": BONE}.items():
            title = f"Synthetic, not selected: head and neck, seed {self.arguments.seed}; {window}"
            path = self.out / f"generated-{name}.png"
            contact_sheet(path, sheet_rows(volumes, window), title=title, px_per_mm=0.5)
            say(f"drew {path}")

    def measure_masks(self, own: Path) -> dict[str, Any] | None:
        """Dice of what the rules find in volumes generated from validation label maps, by part of the body."""
        cases = [case for case in ct_cases(self.folder, "validation") if case.labels]
        if not cases or self.model.folder.config.controlnet is None:
            say("masks: the model has no ControlNet or the data no labels; left out")
            return None
        folder = own / f"masks-{self.arguments.seed}"
        folder.mkdir(exist_ok=True)
        head_neck = [c for c in cases if is_head_neck(c) and self.fills_grid(c)][: self.arguments.masks]
        torso = [c for c in cases if not is_head_neck(c)]
        groups = {"head-neck": head_neck, "torso": torso}
        return {part: self.mask_fidelity(chosen, folder) for part, chosen in groups.items() if chosen}

    def mask_fidelity(self, cases: Sequence[PreparedCase], folder: Path) -> dict[str, Any]:
        """Dice of generated and of real volumes with the label maps of some cases."""
        pairs = []
        for case in cases:
            path = folder / f"{case.id}.npy"
            if not path.exists():
                store(path, self.mask_counts(case))
            pairs.append(np.load(path, allow_pickle=False))
            say(f"mask of {case.id}: {dice_by_group(pairs[-1][0])}")
        sides = zip(("generated", "real", "two_seeds"), zip(*pairs, strict=True), strict=True)
        return {"cases": len(cases), **{name: dice_summary(counts) for name, counts in sides}}

    def mask_counts(self, case: PreparedCase) -> NDArray[np.int64]:
        """`joint_counts` (3, 256, 256) of what the rules find.

        Of a generated CT and of the real one with the label map, and of two generated with different seeds.
        """
        ct, labels = self.mask_pair(case)
        region = "head-neck" if is_head_neck(case) else ()
        first, second = (
            segment(
                self.model.generate(mask=labels, region=region, seed=self.arguments.seed + k, retries=0).image
            ).array
            for k in range(2)
        )
        pairs = ((labels.array, first), (labels.array, segment(ct).array), (first, second))
        return np.stack([joint_counts(a, b) for a, b in pairs])

    def mask_pair(self, case: PreparedCase) -> tuple[Volume, Volume]:
        """The CT and the label map of a case on the grid that is generated on."""
        ct = ct_of(self.folder, case)
        labels = Volume(np.asarray(self.folder.labels(case)), ct.affine)
        spacing = SPACING_MM if is_head_neck(case) else TORSO_MASK_SPACING_MM
        ct, labels = resample(ct, spacing), resample(labels, spacing, order=0)
        size = SIZE if is_head_neck(case) else at_most(ct.shape, TORSO_MASK_SIZE)
        return crop_or_pad(ct, size, value=HU_MIN), crop_or_pad(labels, size, value=0)


def compare_sets(made: Sequence[Description], real: Sequence[Description], patients: Sequence[str]) -> dict[str, Any]:
    """Distances of generated to real volumes, beside those between halves of the real ones."""
    found = compare_with_halves(made, real, patients, tuple, distances, WAYS_TO_HALVE)
    for number, way in enumerate(found.ways):
        apart, between = way.made_to_real["fid"], way.real_to_real["fid"]
        say(f"way {number + 1} to halve: FID {apart:.2f} generated, {between:.2f} real")
    names = found.ways[0].real_to_real
    return {
        "generated": len(made),
        "real": len(real),
        "count": found.count,
        "generated_to_real": {name: found.made_to_real(name) for name in names},
        "real_to_real": {name: found.real_to_real(name) for name in names},
        "fid_ratio": found.ratio("fid"),
        "fid_ratio_range": found.ratio_range("fid"),
        "stray_share": {"generated": stray(made), "real": stray(real)},
        "ways_to_halve": [
            {"generated_to_real": way.made_to_real, "real_to_real": way.real_to_real} for way in found.ways
        ],
    }


def distances(a: Sequence[Description], b: Sequence[Description]) -> dict[str, float]:
    """2.5D FID (average and planes) and the distances of the pooled HU histograms inside the body."""
    score = fid(pooled(d.features for d in a), pooled(d.features for d in b))
    one, other = (HuHistogram(np.sum([d.histogram.counts for d in descriptions], axis=0)) for descriptions in (a, b))
    return {
        "fid": score.average,
        **{f"fid_{plane}": float(getattr(score, plane)) for plane in PLANES},
        "wasserstein_hu": wasserstein_hu(one, other),
        "total_variation": total_variation(one, other),
    }


def stray(descriptions: Sequence[Description]) -> float:
    """Mean share of non-air voxels outside the body."""
    return float(np.mean([d.stray for d in descriptions]))


def dice_summary(counts: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    """Mean Dice of the cases that have a structure, how many those are, and Dice of all voxels together."""
    cases = [dice_by_group(c) for c in counts]
    together = dice_by_group(np.sum(counts, axis=0))
    summary = {}
    for name in together:
        values = [case[name] for case in cases if case[name] is not None]
        mean = float(np.mean(cast(Any, values))) if values else None
        summary[name] = {"mean": mean, "cases": len(values), "all_voxels": together[name]}
    return summary


def sheet_rows(volumes: Sequence[Volume], window: Window) -> list[list[Tile]]:
    """Three rows (axial, coronal, sagittal) for each `COLUMNS` volumes."""
    rows = []
    for start in range(0, len(volumes), COLUMNS):
        block = list(enumerate(volumes))[start : start + COLUMNS]
        for plane in ("axial", "coronal", "sagittal"):
            rows.append([Tile(ct, plane, f"item {number}, {plane}", window) for number, ct in block])
    return rows


def table(result: Mapping[str, Any]) -> str:
    """The numbers as Markdown."""
    lines = ["| measure | data | value |", "|---|---|---|"]
    for part, mean in result["autoencoder"]["means"].items():
        where = f"{part}, {mean['cases']} cases kept out"
        for name, unit in (("psnr_db", "PSNR (dB)"), ("ssim", "SSIM"), ("mae_hu", "MAE (HU)")):
            lines.append(f"| autoencoder {unit} | {where} | {mean[name]:.4g} |")
    if "generation" in result:
        lines += generation_lines(result["generation"])
    for part, found in (result.get("masks") or {}).items():
        for name, made in found["generated"].items():
            if made["mean"] is not None:
                real = found["real"][name]["mean"]
                where = f"{part}, {made['cases']} label maps kept out"
                lines.append(
                    f"| Dice of {name} with the mask asked for | {where} | {made['mean']:.3f} (real CT {real:.3f}) |"
                )
                seeds = found["two_seeds"][name]["mean"]
                shown = "-" if seeds is None else f"{seeds:.3f}"
                lines.append(f"| Dice of {name} between two seeds, one mask | {where} | {shown} |")
    return "\n".join(lines) + "\n"


def generation_lines(found: Mapping[str, Any]) -> list[str]:
    """Rows of the table for generated volumes."""
    made, real, low_high = found["generated_to_real"], found["real_to_real"], found["fid_ratio_range"]
    where = f"head-neck, {found['count']} volumes a side"
    ratio = f"{found['fid_ratio']:.2f} ({low_high[0]:.2f} to {low_high[1]:.2f})"
    lines = [
        f"| 2.5D FID, generated to real / half of real to other half | {where} | {ratio} |",
        f"| 2.5D FID | {where} | {made['fid']:.2f} (real to real {real['fid']:.2f}) |",
    ]
    for name, what in (("wasserstein_hu", "Wasserstein-1 (HU)"), ("total_variation", "total variation")):
        value = f"{made[name]:.3g} (real to real {real[name]:.3g})"
        lines.append(f"| HU histogram in the body, {what} | {where} | {value} |")
    stray_shares = found["stray_share"]
    value = f"{stray_shares['generated']:.2%} (real {stray_shares['real']:.2%})"
    everything = f"head-neck, {found['generated']} generated, {found['real']} real"
    return [*lines, f"| voxels outside the body that are not air | {everything} | {value} |"]


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each measure."""
    names = ("psnr_db", "ssim", "mae_hu")
    return {"cases": len(rows), **{name: float(np.mean([row[name] for row in rows])) for name in names}}


def ct_cases(folder: PreparedFolder, split: Any) -> list[PreparedCase]:
    """The CT cases of a split."""
    return [case for case in folder.cases(split) if case.modality.startswith("ct")]


def is_head_neck(case: PreparedCase) -> bool:
    """Whether a case shows the head and neck alone."""
    return case.id.startswith(HEAD_NECK_ID)


def part_of(case: PreparedCase) -> str:
    """'head-neck' or 'torso'."""
    return "head-neck" if is_head_neck(case) else "torso"


def at_most(size: Triple, most: Triple) -> Triple:
    """The smaller of both, axis by axis."""
    x, y, z = (min(pair) for pair in zip(size, most, strict=True))
    return (x, y, z)


def kept_json(path: Path, compute: Callable[[], Any]) -> Any:
    """JSON values kept at `path`, computed if they are not there yet."""
    if not path.exists():
        write_json(path, compute())
    return json.loads(path.read_text(encoding="utf-8"))


def store(path: Path, array: NDArray[Any]) -> None:
    """Write an array, whole or not at all."""
    with atomic_path(path) as part, part.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def versions() -> dict[str, str]:
    """What computed the numbers."""
    return {"maisi": maisi.__version__, "torch": torch.__version__, "numpy": np.__version__}


if __name__ == "__main__":
    main()
