from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import BRIGHT, DARK, planted, write_item
from stand_ins import install_auto3dseg, install_nnunet

from maisi.cli import run
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.external_trainer import ExternalTrainer
from maisi.evaluation.fidelity import agreement
from maisi.evaluation.nnunet import CLASSES, Nnunet, NnunetConfig
from maisi.evaluation.programs import find_program
from maisi.evaluation.segmentation_cases import classes_of, ids_of
from maisi.evaluation.trainer import Lesson
from maisi.evaluation.trainers import make_trainer, open_segmenter
from maisi.evaluation.volumes import find_entries
from maisi.volume import Volume

STRUCTURES = {"mandible": frozenset({BRIGHT}), "brainstem": frozenset({DARK})}
EPOCHS_5 = NnunetConfig(trainer_class=CLASSES[5], device="cpu")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    for number in range(3):
        write_item(root / "real" / f"pt{number}", number)
    write_item(root / "pairs" / "0000", 50, {"mask": "masks/pt0.nii.gz"})
    write_item(root / "pairs" / "0001", 51, {"mask": "masks/nobody.nii.gz"})
    return root


@pytest.fixture
def nnunet(tmp_path, monkeypatch):
    """The stand-in on PATH; its folder has the calls."""
    monkeypatch.setenv("PATH", str(install_nnunet(tmp_path)), prepend=os.pathsep)
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "no" / "python"))  # a real one beside it stays unseen
    return tmp_path


def _calls(place):
    return [line.split()[0].removeprefix("nnUNetv2_") for line in (place / "calls.txt").read_text().splitlines()]


def _lesson(sets) -> Lesson:
    return Lesson(find_entries([sets / "real"]).entries, STRUCTURES)


@given(st.lists(st.lists(st.integers(1, 255), min_size=1, max_size=3), min_size=1, max_size=6), st.integers(0, 99))
def test_classes_there_and_back(groups, seed) -> None:
    taken: set[int] = set()
    structures = {}
    for number, ids in enumerate(groups):
        structures[f"s{number}"] = frozenset(ids) - taken
        taken |= set(ids)
    structures = {name: ids for name, ids in structures.items() if ids}
    labels = np.random.default_rng(seed).integers(0, 256, (4, 3, 5)).astype(np.uint8)
    classes = classes_of(labels, structures)
    back = ids_of(classes, structures)
    for number, ids in enumerate(structures.values(), 1):
        here = np.isin(labels, sorted(ids))
        np.testing.assert_array_equal(classes == number, here)
        assert (back[here] == min(ids)).all()
    assert (back[~np.isin(labels, sorted(taken))] == 0).all()
    with pytest.raises(MaisiError, match="train it anew"):
        ids_of(classes + np.uint8(len(structures) + 1), structures)


def test_nnunet_finds_what_it_was_shown_on_any_grid(sets, nnunet, tmp_path) -> None:
    seen = []
    trainer = ExternalTrainer(Nnunet(EPOCHS_5))
    cache = Cache(tmp_path / "cache")
    found = trainer.trained(_lesson(sets), cache, lambda *told: seen.append(told))
    assert seen == [("plan", 1, 1), ("train", 0, 5), ("train", 5, 5)]
    assert _calls(nnunet) == ["plan_and_preprocess", "train"]
    assert "501 3d_fullres all -tr nnUNetTrainer_5epochs -device cpu" in (nnunet / "calls.txt").read_text()
    image, labels = planted(100)
    dice = agreement(image, labels, found)
    assert min(dice.values()) > 0.95, dice
    turn = np.diag([-1.0, 1, 1, 1])
    turn[0, 3] = image.shape[0] - 1
    turned = [Volume(v.array[::-1].transpose(2, 0, 1), (v.affine @ turn)[:, [2, 0, 1, 3]]) for v in (image, labels)]
    assert agreement(*turned, found) == pytest.approx(dice)
    assert set(np.unique(found(image).array)) == {0, BRIGHT, DARK}
    again = trainer.trained(_lesson(sets), cache)
    assert again.name == found.name
    assert "nnUNetTrainer_5epochs" in found.name
    assert _calls(nnunet).count("train") == 1
    assert not list(cache.folder.glob("*.training"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_nnunet(sets, tmp_path) -> None:
    """It takes what the stand-in takes and leaves what the stand-in leaves."""
    if find_program("nnUNetv2_train") is None:
        pytest.skip("nnU-Net is not installed (pip install nnunetv2)")
    trainer = ExternalTrainer(Nnunet(NnunetConfig(trainer_class=CLASSES[1], device="cpu")))
    found = trainer.trained(_lesson(sets), Cache(tmp_path / "cache"))
    model = found.folder / "model"
    assert {"dataset.json", "plans.json", "fold_all"} <= {path.name for path in model.iterdir()}
    assert [path.name for path in (model / "fold_all").iterdir()] == ["checkpoint_final.pth"]
    dice = agreement(*planted(100), found)
    assert min(dice.values()) > 0.5, dice


def test_an_interrupted_training_ends_its_program_and_goes_on(sets, nnunet, tmp_path) -> None:
    trainer, cache = ExternalTrainer(Nnunet(EPOCHS_5)), Cache(tmp_path / "cache")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train":
            raise KeyboardInterrupt

    (nnunet / "hang").touch()
    with pytest.raises(KeyboardInterrupt):
        trainer.trained(_lesson(sets), cache, stop)
    # the pid is written after the line that was the cue, so it may be missing: then the program was ended before
    if (nnunet / "pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((nnunet / "pid").read_text()), 0)
    (nnunet / "hang").unlink()
    trainer.trained(_lesson(sets), cache)
    assert _calls(nnunet) == ["plan_and_preprocess", "train", "train"]
    last = (nnunet / "calls.txt").read_text().splitlines()[-1]
    assert last.endswith("--c")


def test_a_failure_names_the_log_and_what_was_said_last(sets, nnunet, tmp_path) -> None:
    (nnunet / "fail").touch()
    with pytest.raises(MaisiError, match=r"'nnUNetv2_train' failed with code 1: RuntimeError: CUDA out of .*log\.txt"):
        ExternalTrainer(Nnunet(EPOCHS_5)).trained(_lesson(sets), Cache(tmp_path / "cache"))
    (log,) = (tmp_path / "cache").glob("*.training/log.txt")
    assert "Fingerprint extraction" in log.read_text()


def _words(sets, output, *more):
    words = ["evaluate", "study", str(sets / "real"), "--pairs", str(sets / "pairs"), "--folds", "3"]
    return [*words, "--structure", "mandible,brainstem", *more, "-o", str(output)]


def test_a_study_with_nnunet(sets, nnunet, tmp_path) -> None:
    assert run(_words(sets, tmp_path / "s", "--trainer", "nnunet", "--epochs", "5", "--device", "cpu")) == 0
    values = json.loads((tmp_path / "s" / "result.json").read_text())
    assert len(values["items"]) == 6
    assert all(row["mandible, dice"] > 0.95 for row in values["items"])
    assert values["settings"]["trainer"] == "nnunet"
    assert values["settings"]["segmenter"]["trainer_class"] == "nnUNetTrainer_5epochs"
    notes = " ".join(values["notes"])
    assert "the same 5 epoch(s) of nnU-Net's nnUNetTrainer_5epochs" in notes
    assert "trained on together" in notes
    calls = _calls(nnunet)
    assert calls.count("plan_and_preprocess") == calls.count("train") == 6
    assert "left out of its training: " in notes
    assert sum(int(n) for n in notes.split("left out of its training: ")[1].split(" in ")[0].split(", ")) == 1
    assert not (tmp_path / "s.cache").exists()


def test_a_segmenter_by_nnunet_is_a_folder_that_fidelity_takes(sets, nnunet, tmp_path, capsys) -> None:
    how = ["--structure", "mandible", "--trainer", "nnunet", "--device", "cpu", "--epochs", "1"]
    assert run(["evaluate", "segmenter", str(sets / "real"), *how, "-o", str(tmp_path / "judge")]) == 0
    assert sorted(p.name for p in (tmp_path / "judge").iterdir()) == ["log.txt", "model", "segmenter.json"]
    assert [p.name for p in (tmp_path / "judge" / "model" / "fold_all").iterdir()] == ["checkpoint_final.pth"]
    words = ["evaluate", "fidelity", str(sets / "pairs" / "0001"), "--segmenter", str(tmp_path / "judge")]
    assert run([*words, "-o", str(tmp_path / "f")]) == 0
    assert "mandible, generated: 1" in capsys.readouterr().out
    (tmp_path / "judge" / "model" / "fold_all" / "checkpoint_final.pth").write_text("[0, 1]")
    with pytest.raises(MaisiError, match="train it anew"):
        open_segmenter(tmp_path / "judge")


def test_a_study_with_auto3dseg(sets, tmp_path, monkeypatch) -> None:
    pytest.importorskip("monai")
    monkeypatch.setattr("maisi.evaluation.auto3dseg.find_spec", lambda name: name)
    monkeypatch.setenv("PYTHONPATH", str(install_auto3dseg(tmp_path)), prepend=os.pathsep)
    how = ["--trainer", "auto3dseg", "--algorithms", "segresnet", "--epochs", "100"]
    assert run([*_words(sets, tmp_path / "s", *how), "--cache", str(tmp_path / "cache")]) == 0
    values = json.loads((tmp_path / "s" / "result.json").read_text())
    assert all(row["brainstem, dice"] > 0.95 for row in values["items"])
    (model, *_) = (tmp_path / "cache").glob("*.training/runner/segresnet_0/model/model.pt")
    assert json.loads(model.read_text())["num_epochs_per_validation"] == 2
    assert "100 epoch(s) of Auto3DSeg (segresnet)" in " ".join(values["notes"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--trainer", "unet"], "choose from segresnet, nnunet, auto3dseg"),
        (["--trainer", "nnunet", "--steps", "5"], "--steps is not for --trainer nnunet, which has --epochs"),
        (["--trainer", "nnunet", "--share", "0.3"], "trains on all cases together; leave it out"),
        (["--trainer", "nnunet", "--epochs", "7"], "no trainer of 7 epochs; give --epochs one of 1, 5"),
        (["--trainer", "nnunet", "--epochs", "5", "--trainer-class", "x"], "leave --epochs out"),
        (["--trainer", "nnunet", "--trainer-class", "../x"], "trainer_class"),
        (["--trainer", "nnunet", "--configuration", "4d"], "configuration"),
        (["--epochs", "5"], "--epochs is not for --trainer segresnet"),
        (["--trainer", "auto3dseg", "--templates", "none/here"], "is no folder"),
        (["--trainer", "auto3dseg", "--device", "cpu"], "--device is not for --trainer auto3dseg"),
    ],
)
def test_refusals(sets, nnunet, tmp_path, capsys, more, said) -> None:
    assert run(_words(sets, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.cache").exists()


def test_what_is_missing_is_said_before_any_work(sets, nnunet, tmp_path, capsys, monkeypatch) -> None:
    shutil.rmtree(nnunet / "bin")
    assert run(_words(sets, tmp_path / "out", "--trainer", "nnunet")) == 2
    assert "pip install nnunetv2" in capsys.readouterr().err
    monkeypatch.setattr("maisi.evaluation.auto3dseg.find_spec", lambda name: None if name == "fire" else name)
    assert run(_words(sets, tmp_path / "out", "--trainer", "auto3dseg")) == 2
    assert "fire is missing" in capsys.readouterr().err
    words = ["evaluate", "segmenter", str(sets / "real"), "--structure", "mandible", "--trainer", "auto3dseg"]
    assert run([*words, "-o", str(tmp_path / "out")]) == 2
    assert "for a study or fidelity alone" in capsys.readouterr().err


def test_too_few_cases_and_one_sided_structures(sets, nnunet, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("maisi.evaluation.auto3dseg.find_spec", lambda name: name)
    assert run(_words(sets, tmp_path / "out", "--trainer", "auto3dseg", "--real-count", "1")) == 2
    assert "has 1 training case(s), and auto3dseg needs 2" in capsys.readouterr().err
    trainer = make_trainer("nnunet", {"trainer_class": "nnUNetTrainer"})
    (said,) = trainer.cautions({"left parotid gland": frozenset({134}), "mandible": frozenset({BRIGHT})})
    assert "may confuse left parotid gland with the other side" in said
    assert not make_trainer("nnunet", {"trainer_class": "nnUNetTrainerNoMirroring"}).cautions(
        {"left parotid gland": frozenset({134})}
    )
    with pytest.raises(MaisiError, match="leave --share out"):
        trainer.trained(Lesson((), STRUCTURES, (1.0,)), Cache(tmp_path / "cache"))
