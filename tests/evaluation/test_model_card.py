"""The scripts that make the model card's numbers and pictures, run on a small random model and made-up cases."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from maisi.data.manifest import read_cases
from maisi.errors import MaisiError
from maisi.io.nifti import read_labels, read_volume
from maisi.volume import Volume

ROOT = Path(__file__).resolve().parents[2]
SHAPE, SPACING_MM = (40, 32, 32), (8.0, 8.0, 8.0)


def script(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def evaluate():
    module = script("recipes/tiny/evaluate.py")
    module.SIZE, module.SPACING_MM = (32, 32, 32), (8.0, 8.0, 8.0)
    module.WAYS_TO_HALVE = 2
    module.FidConfig = partial(module.FidConfig, side=32)
    return module


def body(seed):
    """An ellipsoid of tissue with two lungs and a spine, HU and labels."""
    rng = np.random.default_rng(seed)
    x, y, z = (np.linspace(-1, 1, n).reshape([-1 if a == b else 1 for b in range(3)]) for a, n in enumerate(SHAPE))
    width = rng.uniform(0.8, 0.9)
    inside = (x / width) ** 2 + (y / 0.7) ** 2 + 0 * z < 1
    labels = np.where(inside, 200, 0).astype(np.uint8)
    for middle, id in ((-0.4, 28), (0.4, 32)):
        labels[((x - middle) / 0.25) ** 2 + (y / 0.4) ** 2 + (z / 0.7) ** 2 < 1] = id
    labels[(x**2 + (y + 0.5) ** 2 < 0.02) & (z < 2)] = 133
    hu = np.choose(np.searchsorted([0, 28, 32, 133, 200], labels), [-1000, -800, -800, 600, 40])
    return (hu + rng.normal(0, 15, SHAPE)).astype(np.int16), labels


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    affine = np.diag([*SPACING_MM, 1.0]).tolist()
    cases = []
    for number, id in enumerate(["pt_1", "pt_2", "pt_3", "pt_4", "pt_5", "chest_1"]):
        hu, labels = body(number)
        np.save(folder / f"{id}.npy", hu)
        np.save(folder / f"{id}-labels.npy", labels)
        split = "train" if number < 3 else "validation"
        row = {"id": id, "patient": id, "split": split, "image": f"{id}.npy", "labels": f"{id}-labels.npy"}
        cases.append(row | {"affine": affine, "spacing_mm": SPACING_MM, "shape": SHAPE})
    (folder / "index.json").write_text(json.dumps({"version": 1, "cases": cases}))
    return folder


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def measured(evaluate, prepared, model_folder, tmp_path_factory):
    """Arguments and output folder of a finished run, and the tiles that it drew."""
    out = tmp_path_factory.mktemp("card") / "out"
    drawn = []
    sheet = evaluate.contact_sheet
    evaluate.contact_sheet = lambda path, rows, **look: (
        drawn.extend(t for r in rows for t in r),
        sheet(path, rows, **look),
    )
    arguments = ("--model", model_folder, "--data", prepared, "-o", out, "--count", 3, "--features", "gradients")
    with pytest.MonkeyPatch.context() as patch:
        run(evaluate, patch, *arguments, "--precision", "fp32")
    evaluate.contact_sheet = sheet
    return (*arguments, "--precision", "fp32"), out, drawn


def test_everything_is_measured(measured):
    result = json.loads((measured[1] / "result.json").read_text())
    assert set(result["autoencoder"]["means"]) == {"head-neck", "torso"}
    assert result["autoencoder"]["means"]["head-neck"]["cases"] == 2
    found = result["generation"]
    assert (found["generated"], found["real"], found["count"]) == (3, 5, 2)
    assert found["fid_ratio"] > 1  # an untrained model is not real
    assert found["generated_to_real"]["wasserstein_hu"] > 10 * found["real_to_real"]["wasserstein_hu"]
    assert result["masks"]["head-neck"]["cases"] == 2
    assert result["masks"]["torso"]["real"]["body"]["mean"] > 0.9
    assert set(result["weights_sha256"]) == {
        "model.json",
        *(f"{n}.safetensors" for n in ("autoencoder", "unet", "controlnet")),
    }


def test_the_table_tells_the_numbers(measured):
    result = json.loads((measured[1] / "result.json").read_text())
    lines = (measured[1] / "table.md").read_text().splitlines()
    assert all(line.count("|") == 4 for line in lines)
    ratio = next(line for line in lines if "half of real to other half" in line)
    assert f"{result['generation']['fid_ratio']:.2f}" in ratio
    assert sum("Dice" in line for line in lines) >= 4


def test_volumes_are_told_the_regions_that_training_tells_of_the_real_ones(evaluate, prepared, tmp_path, monkeypatch):
    told = []

    def generate(**wishes):
        told.append(wishes["region"])
        return SimpleNamespace(image=Volume.from_spacing(np.zeros(evaluate.SIZE, np.int16), evaluate.SPACING_MM))

    arguments = SimpleNamespace(
        data=prepared, out=tmp_path, features="gradients", coverage=0.5, real=0, seed=3, count=7
    )
    evaluation = evaluate.Evaluation(arguments)
    evaluation.model = SimpleNamespace(generate=generate)
    as_drawn = evaluation.folder.labels
    by_case = {case.id: ("chest",) if case.id == "pt_2" else ("head-neck",) for case in evaluation.real_cases()}
    without = {id for id, regions in by_case.items() if regions == ("head-neck",)}

    def labels(case):
        found = np.asarray(as_drawn(case))
        return np.where(np.isin(found, (28, 32)), 22 if case.id in without else found, found).astype(np.uint8)

    monkeypatch.setattr(evaluation.folder, "labels", labels)
    assert {case.id: evaluation.regions(case) for case in evaluation.real_cases()} == by_case
    assert len(list(evaluation.generated(tmp_path))) == 7
    once, again = told[:5], told[5:]
    assert sorted(once) == sorted(by_case.values()), "each case once, before any comes twice"
    assert again == once[:2]


def test_data_without_a_full_view_is_refused_before_anything_is_generated(evaluate, prepared, tmp_path):
    arguments = SimpleNamespace(data=prepared, out=tmp_path, features="gradients", coverage=3.0, real=0)
    with pytest.raises(MaisiError, match="No head-neck case fills 300% of the grid; lower --coverage"):
        next(evaluate.Evaluation(arguments).generated(tmp_path))


def test_only_generated_volumes_are_drawn(measured, evaluate):
    _, out, drawn = measured
    made = [np.load(path) for path in sorted(out.glob("cache/*/told-as-real-0/*.npy"))]
    assert len(made) == 3
    assert len(drawn) == 2 * 3 * 3
    assert all(any(np.array_equal(tile.ct.array, array) for array in made) for tile in drawn)
    assert {p.name for p in out.glob("**/*.png")} == {"generated-soft-tissue.png", "generated-bone.png"}


def test_a_second_run_computes_nothing_and_gives_the_same(measured, evaluate, monkeypatch):
    arguments, out, _ = measured
    before = (out / "result.json").read_bytes()
    for name in ("segment", "compare"):
        monkeypatch.setattr(evaluate, name, None)
    monkeypatch.setattr(evaluate.Model, "generate", None)
    run(evaluate, monkeypatch, *arguments)
    assert (out / "result.json").read_bytes() == before


def test_a_lost_volume_alone_is_made_again_with_the_same_bytes(measured, evaluate, monkeypatch):
    arguments, out, _ = measured
    path = next(out.glob("cache/*/told-as-real-0/0001.npy"))
    before = path.read_bytes()
    path.unlink()
    items = []
    generate = evaluate.Model.generate
    monkeypatch.setattr(evaluate.Model, "generate", lambda self, **w: (items.append(w["item"]), generate(self, **w))[1])
    run(evaluate, monkeypatch, *arguments)
    assert items == [1]
    assert path.read_bytes() == before


def test_an_autoencoder_can_be_measured_alone(evaluate, prepared, model_folder, tmp_path, monkeypatch):
    file = model_folder / "autoencoder.safetensors"
    run(evaluate, monkeypatch, "--autoencoder", file, "--data", prepared, "-o", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "generation" not in result
    assert len(result["autoencoder"]["cases"]) == 3


def test_faults_end_with_code_2(evaluate, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(evaluate, monkeypatch, "--model", "tiny", "--data", tmp_path, "-o", tmp_path / "out")
    assert stopped.value.code == 2
    assert "index.json" in capsys.readouterr().err


@pytest.fixture
def heads(prepared, tmp_path):
    """The same cases, all but the chest said to be heads and necks; the last of them has no lungs."""
    index = json.loads((prepared / "index.json").read_text())
    for row in index["cases"]:
        row["regions"] = ["head-neck"] if row["id"].startswith("pt_") else ["chest"]
        for name in (row["image"], row["labels"]):
            (tmp_path / name).symlink_to(prepared / name)
    labels = np.load(prepared / "pt_5-labels.npy")
    (tmp_path / "pt_5-labels.npy").unlink()
    np.save(tmp_path / "pt_5-labels.npy", np.where(np.isin(labels, (28, 32)), 200, labels).astype(np.uint8))
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path


def test_heads_from_held_out_label_maps_lie_beside_the_real_ones(heads, model_folder, tmp_path, monkeypatch):
    module = script("recipes/tiny/from_labels.py")
    told = ("--model", model_folder, "--data", heads, "--spacing", 9, 9, 9, "--precision", "fp32")
    run(module, monkeypatch, *told, "-o", tmp_path / "one")
    for part in ("1/2", "0/2"):
        run(module, monkeypatch, *told, "-o", tmp_path / "two", "--part", part)
    real = read_cases(tmp_path / "one" / "real" / "cases.json").cases
    assert [case.id for case in real] == ["pt_4", "pt_5"]
    for case in real:
        made = tmp_path / "one" / "generated" / case.id
        images = [read_volume(path) for path in (made / "image.nii.gz", case.image)]
        labels = [read_labels(path) for path in (made / "labels.nii.gz", case.labels)]
        assert {v.shape for v in (*images, *labels)} == {(48, 32, 32)}  # 36, 28, 28 in full steps of 16
        assert all(np.allclose(v.affine, images[0].affine) for v in (*images, *labels))
        np.testing.assert_array_equal(labels[0].array, labels[1].array)
        inside = labels[1].array == 133
        assert np.median(images[1].array[inside]) > 300
        other = tmp_path / "two" / "generated" / case.id / "image.nii.gz"
        np.testing.assert_array_equal(read_volume(other).array, images[0].array)


def test_bent_label_maps_are_of_the_cases_asked_for(heads, model_folder, tmp_path, monkeypatch, capsys):
    module = script("recipes/tiny/from_labels.py")
    told = ("--model", model_folder, "--data", heads, "--spacing", 9, 9, 9, "--size", 32, 32, 32, "--bent")
    run(module, monkeypatch, *told, "-o", tmp_path / "out", "--count", 3, "--structures", "lungs")
    items = sorted((tmp_path / "out" / "generated").iterdir())
    assert [item.name for item in items] == ["0000", "0001", "0002"]
    assert not (tmp_path / "out" / "real").exists()
    labels = [read_labels(item / "labels.nii.gz").array for item in items]
    assert all({28, 32} & set(np.unique(array)) for array in labels)  # of pt_4, since pt_5 has no lungs
    assert not np.array_equal(labels[0], labels[1])
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*"))]
    run(module, monkeypatch, *told, "-o", tmp_path / "out", "--count", 3, "--structures", "lungs")
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("*"))] == before
    with pytest.raises(SystemExit):
        run(module, monkeypatch, *told, "-o", tmp_path / "none", "--least", 999, 0, 0)
    assert "No head and neck of the split 'validation'" in capsys.readouterr().err


def test_the_conditions_figure_shows_every_panel(model_folder, tmp_path, monkeypatch):
    figure = script("recipes/tiny/conditions_figure.py")
    small = [(8, 16, 8), (16, 16, 16)]
    panels = tuple(figure.Panel(("chest",), size, (8.0, 8.0, 8.0), ("axial",)) for size in small)
    monkeypatch.setattr(figure, "REGIONS", panels)
    monkeypatch.setattr(figure, "SPACINGS", panels[:1])
    drawn = []
    monkeypatch.setattr(
        figure, "contact_sheet", lambda path, rows, **_: drawn.extend([t.size_mm for t in r] for r in rows)
    )
    run(figure, monkeypatch, "-o", tmp_path / "f.png", "--model", model_folder)
    assert drawn == [[(64.0, 128.0), (128.0, 128.0)], [(64.0, 128.0)]]
