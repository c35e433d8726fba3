from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maisi import cli
from maisi.data.phantom import phantom
from maisi.data.quality import carried_ranges, read_ranges
from maisi.io.nifti import read_volume, write_volume
from maisi.volume import Volume
from maisi.weights.registry import find_model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A phantom, its mask, the same with a wrong liver, another mask, a case list, and a file called learn."""
    folder = tmp_path_factory.mktemp("quality")
    image, labels = phantom((72, 52, 48), (6.0, 6.0, 6.0), ("chest", "abdomen"), seed=1)
    write_volume(folder / "image.nii.gz", image)
    write_volume(folder / "labels.nii.gz", labels)
    write_volume(folder / "wrong.nii.gz", image.with_array(image.array + 200 * (labels.array == 1).astype(np.int16)))
    write_volume(folder / "other.nii.gz", phantom((40, 40, 40), (6.0, 6.0, 6.0), ("chest",), seed=1)[1])
    row = {"id": "a", "patient": "a", "image": "image.nii.gz", "labels": "labels.nii.gz"}
    (folder / "cases.json").write_text(json.dumps({"version": 1, "cases": [row]}))
    return folder


def quality(*arguments: object) -> int:
    return cli.run(["quality", *map(str, arguments)])


@pytest.mark.parametrize("named", [[], ["check"]])
def test_a_good_image_passes_and_a_bad_one_does_not(files, capsys, named) -> None:
    assert quality(*named, files / "image.nii.gz", files / "labels.nii.gz") == 0
    assert "findings: passed" in capsys.readouterr().out
    assert quality(*named, files / "wrong.nii.gz", files / "labels.nii.gz") == 1
    told = capsys.readouterr().out
    assert [line.split()[1] for line in told.splitlines() if line.startswith("FAIL")] == ["liver:"]
    assert "1 did not pass" in told


@pytest.mark.parametrize("first", [True, False])
def test_the_report_as_json(files, capsys, first) -> None:
    pair = [files / "wrong.nii.gz", files / "labels.nii.gz"]
    assert quality(*(["--json", *pair] if first else [*pair, "--json"])) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["passed"]
    assert [finding["of"] for finding in told["findings"] if not finding["passed"]] == ["liver"]


def test_learned_ranges_are_used(files, tmp_path, capsys) -> None:
    made = tmp_path / "ranges.json"
    assert quality("learn", files / "cases.json", "-o", made) == 0
    told = capsys.readouterr().out
    assert "1 case(s)" in told
    assert "too few cases, carried range" in told
    assert read_ranges(made).organs["liver"].cases == 1
    pair = (files / "image.nii.gz", files / "labels.nii.gz")
    assert quality(*pair, "--ranges", made) == 0
    values = json.loads(made.read_text())
    values["organs"]["liver"] |= {"at_most": 20}
    strict = tmp_path / "strict.json"
    strict.write_text(json.dumps(values))
    assert quality(*pair, "--ranges", strict) == 1
    assert quality("learn", files / "cases.json", "-o", made) == 2
    assert "exists" in capsys.readouterr().err


def test_a_models_ranges_are_used(files, capsys) -> None:
    pair = [files / "image.nii.gz", files / "labels.nii.gz"]
    quality(*pair, "--json")
    carried = json.loads(capsys.readouterr().out)
    quality(*pair, "--model", "tiny", "--json")
    assert json.loads(capsys.readouterr().out) != carried
    assert quality(*pair, "--model", "tiny", "--ranges", files / "cases.json") == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_orientation_does_not_matter(files, tmp_path) -> None:
    image = read_volume(files / "image.nii.gz")
    affine = image.affine @ np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] += image.affine[:3, 0] * (image.shape[0] - 1)
    write_volume(tmp_path / "turned.nii.gz", Volume(np.ascontiguousarray(image.array[::-1]), affine))
    assert quality(tmp_path / "turned.nii.gz", files / "labels.nii.gz") == 0


def test_bad_input_gets_a_sentence_and_code_2(files, tmp_path, capsys) -> None:
    for arguments, word in (
        ((files / "image.nii.gz", files / "other.nii.gz"), "different grids"),
        ((files / "image.nii.gz", files / "none.nii.gz"), "none.nii.gz"),
        ((files / "image.nii.gz", files / "labels.nii.gz", "--ranges", tmp_path / "no.json"), "Cannot read"),
        (("learn", tmp_path / "no.json", "-o", tmp_path / "r.json"), "Cannot read"),
        (("learn", files / "cases.json", "-o", tmp_path / "r.txt"), "ends so"),
        ((files / "image.nii.gz",), "Missing argument"),
    ):
        assert quality(*arguments) == 2
        error = capsys.readouterr().err
        assert word in error
        assert "Traceback" not in error


def test_the_check_needs_no_torch(files) -> None:
    arguments = ["quality", str(files / "image.nii.gz"), str(files / "labels.nii.gz")]
    code = f"import sys; from maisi import cli; sys.exit(cli.run({arguments!r}) or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_an_item_is_judged_by_its_models_ranges(files, tmp_path, capsys) -> None:
    for name in ("image.nii.gz", "labels.nii.gz"):
        shutil.copy(files / name, tmp_path / name)
    assert quality(tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz") in (0, 1)
    carried = capsys.readouterr().out
    (tmp_path / "record.json").write_text(json.dumps({"request": {"model": "tiny"}}))
    quality(tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz")
    own = capsys.readouterr().out
    assert f"Ranges: {read_ranges(find_model('tiny').ranges()).source}" in own
    assert f"Ranges: {carried_ranges().source}" in carried
    for broken in ("{", '{"request": {"model": "gone"}}', "[]"):
        (tmp_path / "record.json").write_text(broken)
        quality(tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz")
        assert capsys.readouterr().out == carried
