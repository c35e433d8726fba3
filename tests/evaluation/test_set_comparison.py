from __future__ import annotations

import json

import numpy as np
import pytest

from maisi import cli
from maisi.data.phantom import phantom
from maisi.data.preprocess import window_ct
from maisi.errors import MaisiError
from maisi.evaluation import set_comparison, set_description
from maisi.evaluation.cache import Cache
from maisi.evaluation.fid import PLANES, FidConfig, SliceFid, fid
from maisi.evaluation.mmd import mmd
from maisi.evaluation.ms_ssim import ms_ssim
from maisi.evaluation.set_comparison import SetConfig, SetStudy, chosen_pairs
from maisi.evaluation.volumes import find_entries
from maisi.io.nifti import read_volume, write_volume
from maisi.volume import Volume

SIZE, SPACING = (24, 20, 16), (14.0, 14.0, 14.0)
SEEN = FidConfig(features="gradients", side=32)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Six real volumes; four 'generated' ones that are too dense by 150 HU, in item folders."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "real").mkdir()
    for number in range(6):
        write_volume(folder / "real" / f"{number}.nii.gz", phantom(SIZE, SPACING, ("chest",), seed=number)[0])
    for number in range(4):
        (folder / "made" / f"{number:04d}").mkdir(parents=True)
        ct = phantom(SIZE, SPACING, ("chest",), seed=100 + number)[0]
        dense = np.where(ct.array > -900, ct.array + 150, ct.array).astype(np.int16)
        write_volume(folder / "made" / f"{number:04d}" / "image.nii.gz", ct.with_array(dense))
    return folder


def run(made, real, folder, workers=1, skip=False, **how):
    config = SetConfig(**{"fid": SEEN, "ways": 2, "pairs": 3} | how)
    return SetStudy(config, Cache(folder / "cache"), workers).run(find_entries([made]), find_entries([real]), skip)[0]


@pytest.fixture(scope="module")
def result(sets):
    return run(sets / "made", sets / "real", sets.parent)


def volumes(folder, pattern):
    return [read_volume(path) for path in sorted(folder.glob(pattern))]


def test_the_numbers_are_those_of_the_parts(result, sets) -> None:
    judge = SliceFid(SEEN)
    made, real = volumes(sets / "made", "*/image.nii.gz"), volumes(sets / "real", "*")
    score = fid(judge.moments(made), judge.moments(real))
    assert result.summary["fid"] == pytest.approx(score.average, rel=1e-6)
    assert result.summary["fid_sagittal"] == pytest.approx(score.sagittal, rel=1e-6)
    vectors = [
        np.array([np.concatenate([judge.describe(ct)[plane].mean(0) for plane in PLANES]) for ct in side])
        for side in (made, real)
    ]
    assert result.summary["mmd"] == pytest.approx(mmd(*vectors), rel=1e-4, abs=1e-9)
    alike = [ms_ssim(*(window_ct(real[i].array) for i in pair)) for pair in chosen_pairs(6, 3, 0)]
    assert result.summary["ms_ssim_real"] == pytest.approx(np.mean(alike), abs=1e-6)


def test_a_wrong_density_is_farther_than_another_half(result) -> None:
    summary = result.summary
    assert (summary["generated"], summary["real"]) == (4, 6)
    assert summary["fid_ratio"] == pytest.approx(summary["fid_same_count"] / summary["fid_real_halves"])
    assert summary["fid_ratio"] > 3
    assert summary["fid_ratio_low"] <= summary["fid_ratio"] <= summary["fid_ratio_high"]
    assert summary["mmd"] > abs(summary["mmd_real_halves"])
    assert [row["set"] for row in result.items].count("generated") == 4
    assert any("Halves: 3 volumes a side" in note for note in result.notes)


def test_the_same_volumes_on_both_sides(sets, tmp_path) -> None:
    summary = run(sets / "real", sets / "real", tmp_path, metrics=("fid", "precision-recall")).summary
    assert summary["fid"] == pytest.approx(0, abs=1e-6)
    assert (summary["precision"], summary["recall"]) == (1.0, 1.0)
    assert not {"mmd", "ms_ssim_real"} & set(summary)


def test_one_worker_is_as_good_as_two(result, sets, tmp_path) -> None:
    other = run(sets / "made", sets / "real", tmp_path, workers=2)
    assert other.items == result.items
    assert other.notes == result.notes
    for name, value in result.summary.items():
        assert other.summary[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name


def test_a_finished_volume_is_not_looked_at_again(result, sets, monkeypatch) -> None:
    monkeypatch.setattr(set_description, "_described_arrays", None)
    monkeypatch.setattr(set_comparison, "ms_ssim", None)
    assert run(sets / "made", sets / "real", sets.parent) == result


def test_how_many_volumes_are_needed_is_said(sets, tmp_path) -> None:
    """18 features need 19 slices; two volumes of 4 central slices have 8, so 5 volumes would do."""
    (tmp_path / "two").mkdir()
    for number in range(2):
        ct = phantom((20, 20, 20), SPACING, ("chest",), seed=number)[0]
        write_volume(tmp_path / "two" / f"{number}.nii.gz", ct)
    seen = SEEN.model_copy(update={"centre_share": 0.2})
    found = run(tmp_path / "two", sets / "real", tmp_path, fid=seen)
    assert any("8 axial slices for covariances of 18 features; about 5 volumes" in note for note in found.notes)
    assert any("Precision and recall need 4 volumes" in note for note in found.notes)
    assert found.summary["precision"] is None
    few = run(sets / "real", tmp_path / "two", tmp_path, metrics=("fid",))
    assert few.summary["fid_ratio"] is None
    assert any("Halves of the real set need 4 volumes" in note for note in few.notes)
    (tmp_path / "two" / "0.nii.gz").unlink()
    with pytest.raises(MaisiError, match="needs 2 at least"):
        run(tmp_path / "two", sets / "real", tmp_path)


def test_other_grids_are_resampled_and_said(sets, tmp_path) -> None:
    (tmp_path / "lps").mkdir()
    for number in range(2):
        ct = phantom((20, 18, 30), (16.0, 16.0, 9.0), ("chest",), seed=number)[0]
        affine = ct.affine @ np.diag([-1.0, -1.0, 1.0, 1.0])
        affine[:3, 3] = ct.affine[:3, :3] @ [19, 17, 0] + ct.affine[:3, 3]
        write_volume(tmp_path / "lps" / f"{number}.nii.gz", Volume(ct.array[::-1, ::-1], affine))
    plain = run(tmp_path / "lps", sets / "real", tmp_path, metrics=("fid", "ms-ssim"))
    assert any("2 of 2 generated volumes are not stored as RAS+" in note for note in plain.notes)
    assert any("differ in spacing" in note for note in plain.notes)
    seen = SEEN.model_copy(update={"spacing_mm": (15.0, 15.0, 15.0), "size": (22, 18, 16)})
    found = run(tmp_path / "lps", sets / "real", tmp_path, metrics=("fid", "ms-ssim"), fid=seen)
    assert any("2 of 2 generated volumes were resampled" in note and "16x16x9 mm (2)" in note for note in found.notes)
    assert {row["slices"] for row in found.items} == {11 + 9 + 8}
    assert found.summary["fid"] < plain.summary["fid"]


def test_mixed_sizes_have_no_ms_ssim_but_a_note(sets, tmp_path) -> None:
    (tmp_path / "mixed").mkdir()
    for number in range(2):
        ct = phantom((20, 20, 20 + number), SPACING, ("chest",), seed=number)[0]
        write_volume(tmp_path / "mixed" / f"{number}.nii.gz", ct)
    found = run(tmp_path / "mixed", sets / "real", tmp_path, metrics=("ms-ssim",))
    assert found.summary["ms_ssim_generated"] is None
    assert any("MS-SSIM needs generated volumes of one size" in note for note in found.notes)


def test_damage_is_listed(sets, tmp_path) -> None:
    (tmp_path / "made").mkdir()
    for number in range(4):
        content = (sets / "real" / f"{number}.nii.gz").read_bytes()
        (tmp_path / "made" / f"{number}.nii.gz").write_bytes(content[: len(content) // (2 if number < 2 else 1)])
    with pytest.raises(MaisiError, match=r"0\.nii\.gz is cut short.*1\.nii\.gz is cut short.*--skip-unreadable"):
        run(tmp_path / "made", sets / "real", tmp_path)
    left = run(tmp_path / "made", sets / "real", tmp_path, skip=True, metrics=("fid",))
    assert left.summary["generated"] == 2
    assert sum("cut short" in note for note in left.notes) == 2


def test_pairs_are_different_and_drawn_from_the_seed() -> None:
    pairs = chosen_pairs(10, 20, 0)
    assert len(set(pairs)) == 20
    assert all(0 <= i < j < 10 for i, j in pairs)
    assert chosen_pairs(3, 20, 0) == [(0, 1), (0, 2), (1, 2)]
    assert chosen_pairs(10, 20, 1) != pairs == chosen_pairs(10, 20, 0)


def evaluate(*arguments: object) -> int:
    return cli.run(["evaluate", "fid", *map(str, arguments)])


def test_the_command(sets, tmp_path, capsys) -> None:
    common = (sets / "made", sets / "real", "--features", "gradients", "--side", 32, "--ways", 2, "--pairs", 2)
    assert evaluate(*common, "--spacing", "10,10,10", "--size", "32,28,22", "-o", tmp_path / "out") == 0
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    assert values["settings"]["fid"]["size"] == [32, 28, 22]
    assert values["summary"]["fid"] > 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"result.json", "table.md", "figure.png"}
    assert not (tmp_path / "out.cache").exists()
    capsys.readouterr()
    for wrong, word in (
        (("--metrics", "fid,is"), "is"),
        (("--metrics", " "), "metrics"),
        (("--center-slices", 2), "centre_share"),
        (("--size", 0), "size"),
    ):
        assert evaluate(*common, *wrong, "-o", tmp_path / "no") == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
