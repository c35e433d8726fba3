"""Generate heads and necks from the label maps of prepared cases, with the real CTs beside them on the same grids.

    python recipes/tiny/from_labels.py --data PREPARED_FOLDER -o OUT                   of patients kept out of training
    python recipes/tiny/from_labels.py --data PREPARED_FOLDER -o OUT --bent --split train --count 32 \
        --spacing 4.5 4.5 4.5 --size 112 80 80 --least 378 270 270 --structures mandible,brainstem

Items are first attempts with the model's defaults, unless `--retries` makes them as `maisi generate` does.
OUT/real/cases.json is for `maisi evaluate fidelity OUT/generated --real OUT/real/cases.json`, OUT/generated for
`maisi evaluate medians` and `fid`, too. What is there stays, so an interrupted run goes on; `--part 1/2` makes every
other case, for a second process, and an item is the same either way.
Bent label maps (`maisi.data.mask_deform`, default ranges) have no real CT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maisi.data.manifest import Case, CaseList, Split, write_cases
from maisi.data.mask_deform import DeformationRanges, deform, draw_deformation
from maisi.data.prepared import PreparedCase, PreparedFolder
from maisi.data.preprocess import HU_MAX, HU_MIN, crop_or_pad, resample
from maisi.errors import MaisiError
from maisi.evaluation.segmentation_cases import parse_structures
from maisi.evaluation.volumes import ct_of
from maisi.generation.pipeline import Model, load
from maisi.io.nifti import write_volume
from maisi.volume import Volume


def main() -> None:
    """Read the command line and generate; a fault of the input ends with code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny", help="carried model or model folder")
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--split", default="validation", choices=("train", "validation"))
    parser.add_argument("--spacing", nargs=3, type=float, default=(3.0, 3.0, 3.0), help="mm")
    parser.add_argument("--size", nargs=3, type=int, help="voxels; as large as each case is if left out")
    parser.add_argument("--least", nargs=3, type=float, default=(0.0,) * 3, help="mm a case must cover")
    parser.add_argument("--structures", default="", help="those that a case must have, with commas")
    parser.add_argument("--bent", action="store_true", help="bend the label maps; cases in random turn")
    parser.add_argument("--count", type=int, help="label maps; all cases once if left out")
    parser.add_argument("--part", default="0/1", help="as 0/2 and 1/2 for two processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retries", type=int, default=0, help="as of `maisi generate`")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    a = parser.parse_args()
    try:
        run(a)
    except MaisiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(a: argparse.Namespace) -> None:
    """Generate and write what the command line asks for."""
    folder = PreparedFolder(a.data)
    cases = suited(folder, a.split, a.least, a.structures)
    if not cases:
        raise MaisiError(f"No head and neck of the split '{a.split}' has label maps of that extent and structures.")
    order = np.random.default_rng(a.seed).permutation(len(cases)) if a.bent else np.arange(len(cases))
    chosen = [cases[order[number % len(cases)]] for number in range(a.count or len(cases))]
    if not a.bent:
        write_real(folder, chosen, a)
    first, step = map(int, a.part.split("/"))
    model = load(a.model, precision=a.precision)
    for number in range(first, len(chosen), step):
        name = f"{number:04d}" if a.bent else chosen[number].id
        path = a.out / "generated" / name
        if not path.exists():
            labels = on_grid(labels_of(folder, chosen[number]), a, order=0)
            if a.bent:
                rng = np.random.default_rng((a.seed, number))
                labels = deform(labels, draw_deformation(rng, DeformationRanges(), labels))
            generate(model, labels, a, number, path)
            print(f"{number + 1}/{len(chosen)}: {path}", flush=True)


def generate(model: Model, labels: Volume, a: argparse.Namespace, number: int, path: Path) -> None:
    """Write what is made from one label map."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model.generate(mask=labels, seed=a.seed, item=number, retries=a.retries).save(path)


def suited(folder: PreparedFolder, split: Split, least_mm: Sequence[float], structures: str) -> list[PreparedCase]:
    """Heads and necks of a split with label maps, of an extent and structures."""
    wanted = list(parse_structures([structures]).values()) if structures else []
    found = []
    for case in folder.cases(split):
        if not (case.is_ct and case.labels and "head-neck" in case.regions):
            continue
        present = set(np.unique(folder.labels(case)).tolist()) if wanted else set()
        large = (np.multiply(case.shape, case.spacing_mm) >= least_mm).all()
        if large and all(present & set(ids) for ids in wanted):
            found.append(case)
    return found


def labels_of(folder: PreparedFolder, case: PreparedCase) -> Volume:
    """The label map of a case in its place."""
    return Volume(np.asarray(folder.labels(case)).astype(np.uint8), np.array(case.affine))


def on_grid(volume: Volume, a: argparse.Namespace, order: int) -> Volume:
    """A case's volume on the grid that is generated on: `--size`, or its own extent in full steps of 16 voxels."""
    there = resample(volume, a.spacing, order=order)
    size = a.size or [-(-n // 16) * 16 for n in there.shape]
    return crop_or_pad(there, (size[0], size[1], size[2]), value=HU_MIN if order else 0)


def write_real(folder: PreparedFolder, cases: Sequence[PreparedCase], a: argparse.Namespace) -> None:
    """The real CTs and label maps on the grids that are generated on, as a case list."""
    out: Path = a.out / "real"
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases:
        image, labels = out / f"{case.id}_ct.nii.gz", out / f"{case.id}_labels.nii.gz"
        if not labels.exists():
            ct = on_grid(ct_of(folder, case), a, order=1)
            write_volume(image, ct.with_array(np.clip(ct.array, HU_MIN, HU_MAX)), synthetic=False)
            write_volume(labels, on_grid(labels_of(folder, case), a, order=0), synthetic=False)
        rows.append(Case(id=case.id, patient=case.patient, image=image, labels=labels, split="validation"))
    write_cases(out / "cases.json", CaseList(cases=tuple(rows)))


if __name__ == "__main__":
    main()
