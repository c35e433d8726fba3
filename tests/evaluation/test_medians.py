from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from maisi.cli import run
from maisi.data.phantom import phantom
from maisi.data.quality import ORGANS, StructureRange, carried_ranges, medians
from maisi.data.quality_learning import PRIOR_CASES
from maisi.errors import MaisiError
from maisi.evaluation.medians import learned, summed_up
from maisi.io.nifti import write_volume
from maisi.volume import Volume


def test_shares_by_hand() -> None:
    ranges = {"aorta": StructureRange(low=100, high=200, cases=12), "spleen": StructureRange(low=0, high=90)}
    found = {"a": {"aorta": 100.0, "heart": 3.0}, "b": {"aorta": 99.0, "spleen": 50.0}, "c": {"aorta": 150.0}}
    result = summed_up(found, ranges, {})
    assert result.summary == {"share within": 0.75, "aorta, within": pytest.approx(2 / 3), "spleen, within": 1.0}
    rows = {row["structure"]: row for row in result.items}
    assert rows["aorta"]["outside"] == ["b"]
    assert (rows["aorta"]["lowest"], rows["aorta"]["middle"], rows["aorta"]["highest"]) == (99, 100, 150)
    assert rows["heart"]["within"] is None
    assert result.notes[1].endswith(": heart.")
    assert "| aorta | 100 to 200 HU | 12 | 3 | 0.6667 |" in result.table()
    assert "| heart | - | - | 1 | - |" in result.table()
    with pytest.raises(MaisiError, match="known from real cases"):
        summed_up({"a": {"heart": 3.0}}, ranges, {})


def test_ranges_are_those_of_the_real_cases_by_hand() -> None:
    hu = np.random.default_rng(0).normal(120, 10, PRIOR_CASES)
    real = {f"{i}": {"aorta": h, "liver": 60.0} | ({"heart": 40.0} if i else {}) for i, h in enumerate(hu)}
    ranges = learned(real)
    assert ranges.keys() == {"aorta", "liver"}  # the heart is seen once too rarely
    assert ranges["aorta"].low == pytest.approx(min(hu.mean() - 3 * hu.std(ddof=1), np.percentile(hu, 0.5)), abs=1e-3)
    carried = carried_ranges().organs["liver"]
    prior = ((carried.sigma_6_high - carried.sigma_6_low) / 6) ** 2
    deviation = (PRIOR_CASES * prior / (2 * PRIOR_CASES - 1)) ** 0.5
    assert ranges["liver"].high == pytest.approx(60 + 3 * deviation, abs=1e-3)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Two items, the second with the liver 200 HU too dense, and one real case."""
    root = tmp_path_factory.mktemp("medians")
    image, labels = phantom((50, 40, 36), (7, 7, 7), ("abdomen",), seed=1)
    off = image.with_array(image.array + 200 * (labels.array == 1).astype(np.int16))
    for number, ct in enumerate((image, off)):
        folder = root / "out" / f"{number:04d}"
        folder.mkdir(parents=True)
        write_volume(folder / "image.nii.gz", ct)
        write_volume(folder / "labels.nii.gz", labels)
    write_volume(root / "real.nii.gz", image, synthetic=False)
    write_volume(root / "mask.nii.gz", labels, synthetic=False)
    row = {"id": "r", "patient": "r", "image": "real.nii.gz", "labels": "mask.nii.gz"}
    (root / "cases.json").write_text(json.dumps({"version": 1, "cases": [row]}))
    (root / "ranges.json").write_text(carried_ranges().model_dump_json())
    return root


@pytest.mark.parametrize("source", [["--real", "cases.json"], ["--ranges", "ranges.json"]])
def test_the_command_finds_the_wrong_liver(sets, tmp_path, source) -> None:
    words = ["evaluate", "medians", str(sets / "out"), source[0], str(sets / source[1])]
    assert run([*words, "-o", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["summary"]["liver, within"] == 0.5
    rows = {row["structure"]: row for row in result["items"]}
    assert rows["liver"]["outside"] == ["0001"]
    image, labels = phantom((50, 40, 36), (7, 7, 7), ("abdomen",), seed=1)
    for name, hu in medians(image, labels, 1.0).items():
        assert rows[name]["values"][0] == pytest.approx(hu, abs=1)
        known = name in ORGANS if source[0] == "--real" else name in carried_ranges().organs
        assert (rows[name]["within"] is not None) == known
    assert not (tmp_path / "out.cache").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give either --real or --ranges"),
        (["--real", "cases.json", "--ranges", "ranges.json"], "give either --real or --ranges"),
        (["--ranges", "cases.json"], "cases.json"),
        (["--real", "absent"], "absent does not exist"),
        (["--real", "cases.json", "--split", "train"], "holds no CT for train"),
        (["--ranges", "ranges.json", "--split", "train"], "--split is of --real"),
    ],
)
def test_refusals(sets, tmp_path, capsys, words, said) -> None:
    places = [str(sets / word) if not word.startswith("-") and word != "train" else word for word in words]
    assert run(["evaluate", "medians", str(sets / "out"), *places, "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_small_structures_are_left_out_as_the_ranges_say(sets, tmp_path) -> None:
    words = ["evaluate", "medians", str(sets / "out"), "--ranges", str(tmp_path / "ranges.json")]

    def judged(smallest_ml: float) -> int:
        (tmp_path / "ranges.json").write_text(
            carried_ranges().model_copy(update={"smallest_ml": smallest_ml}).model_dump_json()
        )
        assert run([*words, "-o", str(tmp_path / str(smallest_ml))]) == 0
        return len(json.loads((tmp_path / str(smallest_ml) / "result.json").read_text())["items"])

    assert 0 < judged(500.0) < judged(1.0)


def test_images_without_labels_are_refused(sets, tmp_path, capsys) -> None:
    words = ["evaluate", "medians", str(sets / "real.nii.gz"), "--ranges", str(sets / "ranges.json")]
    assert run([*words, "-o", str(tmp_path / "out")]) == 2
    assert "None of the 1 generated images has labels" in capsys.readouterr().err


def test_ids_beyond_the_vocabulary_are_refused_and_unknown_ones_left_out(sets, tmp_path, capsys) -> None:
    image, labels = phantom((30, 30, 20), (9, 9, 9), ("chest",), seed=1)
    for number, id in enumerate((255, 300)):
        array = labels.array.astype(np.int32)
        array[10:20, 10:20, 5:15] = id
        folder = tmp_path / str(id)
        folder.mkdir()
        write_volume(folder / "image.nii.gz", image)
        write_volume(folder / "labels.nii.gz", Volume(array.astype((np.uint8, np.int16)[number]), labels.affine))
    words = ["--ranges", str(sets / "ranges.json"), "-o", str(tmp_path / "out")]
    assert run(["evaluate", "medians", str(tmp_path / "300"), *words]) == 2
    assert "beyond 0 to 255" in capsys.readouterr().err
    assert run(["evaluate", "medians", str(tmp_path / "255"), *words]) == 0
