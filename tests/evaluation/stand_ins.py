"""Small programs that stand in for nnU-Net v2 and for Auto3DSeg: the same commands, arguments and folders.

They check the layout that they are given, learn the median HU of each class, and find what is near it. What is
checked and written here was compared with nnU-Net 2 itself, see `test_the_real_nnunet`.
"""

from __future__ import annotations

import sys
from pathlib import Path

SHARED = """
import gzip, json, os, sys, time
from pathlib import Path
import numpy as np

TYPES = {2: np.uint8, 4: np.int16}

def read(path):
    raw = gzip.decompress(Path(path).read_bytes())
    shape = np.frombuffer(raw, "<i2", 3, 42)
    offset, kind = int(np.frombuffer(raw, "<f4", 1, 108)[0]), int(np.frombuffer(raw, "<i2", 1, 70)[0])
    return np.frombuffer(raw, TYPES[kind], offset=offset).reshape(shape, order="F"), raw[:offset]

def write(path, array, header):
    header = bytearray(header)
    header[70:74] = np.array([2, 8], "<i2").tobytes()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(gzip.compress(bytes(header) + array.astype(np.uint8).tobytes(order="F"), 1))

def learn(pairs, classes):
    voxels = [[] for _ in range(classes)]
    for image, labels in pairs:
        (hu, first), (classified, second) = read(image), read(labels)
        assert hu.dtype == np.int16 and classified.dtype == np.uint8 and hu.shape == classified.shape
        assert first[76:108] == second[76:108] and first[252:328] == second[252:328], "two grids"
        assert classified.max() < classes, "a label beyond dataset.json"
        for number in range(classes):
            voxels[number].append(hu[classified == number])
    return [float(np.median(np.concatenate(v))) for v in voxels]

def segment(means, image, place):
    hu, header = read(image)
    found = np.zeros(hu.shape, np.uint8)
    for number, mean in enumerate(means[1:], 1):
        found[np.abs(hu - mean) < 75] = number
    write(place, found, header)
"""

NNUNET = """
command, words = Path(sys.argv[0]).name, sys.argv[1:]
raw, preprocessed, results = (Path(os.environ[f"nnUNet_{n}"]) for n in ("raw", "preprocessed", "results"))
Path(os.environ["STAND_IN"], "calls.txt").open("a").write(" ".join([command, *words]) + chr(10))

def option(name):
    return words[words.index(name) + 1]

def described(number):
    (folder,) = raw.glob(f"Dataset{int(number):03d}_*")
    about = json.loads((folder / "dataset.json").read_text())
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (folder / "labelsTr").iterdir())
    assert about["channel_names"] == {"0": "CT"} and about["file_ending"] == ".nii.gz"
    assert about["labels"]["background"] == 0
    assert sorted(about["labels"].values()) == list(range(len(about["labels"])))
    assert about["numTraining"] == len(cases)
    assert sorted(p.name for p in (folder / "imagesTr").iterdir()) == [f"{c}_0000.nii.gz" for c in cases]
    return folder, about, cases

if command == "nnUNetv2_plan_and_preprocess":
    folder, about, cases = described(option("-d"))
    assert "--verify_dataset_integrity" in words and option("-c") == "3d_fullres"
    print("Fingerprint extraction...")
    here = preprocessed / folder.name
    here.mkdir(parents=True)
    (here / "nnUNetPlans.json").write_text("{}")
elif command == "nnUNetv2_train":
    number, configuration, fold = words[:3]
    folder, about, cases = described(number)
    assert (preprocessed / folder.name / "nnUNetPlans.json").is_file(), "plan first"
    here = results / folder.name / f"{option('-tr')}__nnUNetPlans__{configuration}"
    there = here / f"fold_{fold}"
    there.mkdir(parents=True, exist_ok=True)
    assert ("--c" in words) == (there / "checkpoint_latest.pth").exists()
    if not (there / "checkpoint_latest.pth").exists():
        print("2026-01-01 00:00:00.000000: Epoch 0", flush=True)
        (there / "checkpoint_latest.pth").write_text("half")
        if Path(os.environ["STAND_IN"], "hang").exists():
            Path(os.environ["STAND_IN"], "pid").write_text(str(os.getpid()))
            time.sleep(60)
        if Path(os.environ["STAND_IN"], "fail").exists():
            sys.exit("RuntimeError: CUDA out of memory")
    if configuration == "3d_fullres":
        pairs = [(folder / "imagesTr" / f"{c}_0000.nii.gz", folder / "labelsTr" / f"{c}.nii.gz") for c in cases]
        for name in ("dataset.json", "plans.json"):
            (here / name).write_text(json.dumps(about))
        (there / "checkpoint_final.pth").write_text(json.dumps(learn(pairs, len(about["labels"]))))
        (there / "validation").mkdir()
elif command == "nnUNetv2_predict_from_modelfolder":
    model = Path(option("-m"))
    assert (model / "dataset.json").is_file() and (model / "plans.json").is_file()
    means = json.loads((model / f"fold_{option('-f')}" / "checkpoint_final.pth").read_text())
    for image in Path(option("-i")).glob("*_0000.nii.gz"):
        segment(means, image, Path(option("-o")) / image.name.replace("_0000", ""))
"""

AUTO3DSEG = """
import yaml

verb, words = sys.argv[1], sys.argv[2:]
# its algorithms are run as plain `python`
assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))

def listed(task):
    return json.loads(Path(task["datalist"]).read_text())

if verb == "AutoRunner":
    task = yaml.safe_load(Path(flags["input"]).read_text())
    assert words[-1] == "run" and task["modality"] == "CT" and task["ensemble"] is False
    cases = listed(task)["training"]
    folds = {case["fold"] for case in cases}
    assert folds == set(range(len(folds)))
    root = Path(task["dataroot"])
    pairs = [(root / case["image"], root / case["label"]) for case in cases]
    means = learn(pairs, len(task["class_names"]) + 1)
    for algorithm in task.get("algos", ["dints", "segresnet"]):
        for fold in folds:
            place = Path(flags["work_dir"]) / f"{algorithm}_{fold}" / "model"
            place.mkdir(parents=True, exist_ok=True)
            (place / "model.pt").write_text(json.dumps({"means": means, **json.loads(flags.get("params", "{}"))}))
elif verb == "EnsembleRunner":
    task = yaml.safe_load(Path(flags["data_src_cfg_name"]).read_text())
    assert words[-1] == "ensemble"
    models = sorted(Path(flags["work_dir"]).glob("*_*/model/model.pt"))
    assert {int(m.parent.parent.name.split("_")[1]) for m in models} == set(range(int(flags["num_fold"])))
    for case in listed(task)["testing"]:
        name = case["image"].replace(".nii.gz", "_ensemble.nii.gz")
        means = json.loads(models[0].read_text())["means"]
        segment(means, Path(task["dataroot"]) / case["image"], Path(flags["output_dir"]) / name)
"""


def install_nnunet(folder: Path) -> Path:
    """Put the three commands into `folder`/bin, which is to stand on PATH."""
    place = folder / "bin"
    place.mkdir()
    for name in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict_from_modelfolder"):
        (place / name).write_text(f"#!{sys.executable}\n{SHARED}\n{NNUNET}")
        (place / name).chmod(0o755)
    return place


def install_auto3dseg(folder: Path) -> Path:
    """Put a package `monai` into `folder`/modules, which is to stand first where the other Python looks."""
    place = folder / "modules"
    inside = place / "monai" / "apps" / "auto3dseg"
    inside.mkdir(parents=True)
    for package in (place / "monai", place / "monai" / "apps", inside):
        (package / "__init__.py").touch()
    (inside / "__main__.py").write_text(SHARED + AUTO3DSEG)
    return place
