from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import BRIGHT, DARK, planted, write_item

from maisi.cli import run
from maisi.cli.evaluate_fidelity import _require_unseen
from maisi.config import parse_config
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.fidelity import agreement
from maisi.evaluation.segmentation_cases import PatchConfig, load_case
from maisi.evaluation.trainer import Lesson
from maisi.evaluation.volumes import find_entries
from maisi.volume import Volume

pytest.importorskip("monai")
from maisi.evaluation.trained_segmenter import SegmenterConfig, TrainedSegmenter, require_monai, train

STRUCTURES = {"mandible": frozenset({BRIGHT}), "brainstem": frozenset({DARK})}
CONFIG = SegmenterConfig(
    spacing_mm=(3.0, 3.0, 3.0), patch=PatchConfig(size=(16, 16, 16)), steps=70, blocks=(1, 1, 1), learning_rate=5e-3,
    background_weight=1.0, precision="fp32", device="cpu", checkpoint_every=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    for number in range(4):
        write_item(root / f"{number:04d}", number)
    return find_entries([root]).entries


@pytest.fixture(scope="module")
def cases(entries, tmp_path_factory):
    cache = Cache(tmp_path_factory.mktemp("c") / "cache")
    return [load_case(entry, STRUCTURES, CONFIG.spacing_mm, cache) for entry in entries]


@pytest.fixture(scope="module")
def learned(cases, entries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "segmenter"
    train(folder, CONFIG, STRUCTURES, cases, [entry.hash for entry in entries])
    return TrainedSegmenter.open(folder)


def test_it_learns_what_is_plain_to_see(learned) -> None:
    dice = agreement(*planted(100), learned)
    assert min(dice.values()) > 0.8, dice
    image, labels = planted(101, spacing_mm=(2.6, 3.3, 3.0))  # another spacing
    turned = [Volume(v.array[::-1].transpose(2, 0, 1), _turned(v.affine, v.shape)) for v in (image, labels)]
    found = agreement(*turned, learned)
    assert found == pytest.approx(agreement(image, labels, learned))
    assert min(found.values()) > 0.7, found


def _turned(affine, shape):
    """Of the array with X reversed and the axes in the order Z, X, Y."""
    result = affine.copy()
    result[:3, 3] += affine[:3, 0] * (shape[0] - 1)
    result[:3, :3] = np.stack([affine[:3, 2], -affine[:3, 0], affine[:3, 1]], axis=1)
    return result


@pytest.mark.parametrize("stop_at", [4])
def test_interrupted_is_uninterrupted(cases, tmp_path, stop_at) -> None:
    config = CONFIG.model_copy(update={"steps": 7})

    def stop(stage: str, done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    train(tmp_path / "whole", config, STRUCTURES, cases, ["h"])
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", config, STRUCTURES, cases, ["h"], report=stop)
    assert not (tmp_path / "parts").exists()
    steps: list[int] = []
    with pytest.raises(MaisiError, match="holds another training"):
        train(tmp_path / "parts", config.model_copy(update={"seed": 1}), STRUCTURES, cases, ["h"])
    train(tmp_path / "parts", config, STRUCTURES, cases, ["h"], report=lambda _, done, __: steps.append(done))
    assert steps == [4, 5, 6, 7]
    for name in ("segmenter.json", "segmenter.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_the_order_of_structures_is_theirs(entries, learned, tmp_path) -> None:
    cache, turned = Cache(tmp_path / "cache"), dict(reversed(STRUCTURES.items()))
    one, two = (load_case(entries[0], structures, CONFIG.spacing_mm, cache) for structures in (STRUCTURES, turned))
    swapped = np.array([0, 2, 1], np.uint8)
    assert (one.classes == 1).any()
    np.testing.assert_array_equal(two.classes, swapped[one.classes])

    def stop(stage: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", CONFIG, STRUCTURES, [one], ["h"], report=stop)
    with pytest.raises(MaisiError, match="holds another training"):
        train(tmp_path / "parts", CONFIG, turned, [two], ["h"])


def test_windows_are_put_together_where_the_image_lies(learned, monkeypatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def on_a_gpu(running: object, network: object, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 3, *images.shape[2:], device="cuda")

    monkeypatch.setattr(type(learned._network[0]), "logits", on_a_gpu)
    with FakeTensorMode():
        assert learned._logits(torch.zeros(1, 2, 16, 16, 16)).device.type == "cpu"


def test_a_patient_that_it_learned_from_is_not_judged(entries, cases, tmp_path) -> None:
    told = [replace(entry, patient=f"pt_{n}", affine=((1.0,) * 4,) * 4) for n, entry in enumerate(entries)]
    lesson = Lesson(tuple(told), STRUCTURES)
    train(tmp_path / "s", CONFIG.model_copy(update={"steps": 1}), STRUCTURES, cases, lesson.learned_from)
    judge = TrainedSegmenter.open(tmp_path / "s")
    again = replace(told[0], image=told[1].image, labels=told[2].labels)
    for seen in (told[0], again, replace(told[0], patient="x")):
        with pytest.raises(MaisiError, match="is trained on 1 of the real cases"):
            _require_unseen([seen], judge, None)
    _require_unseen([replace(again, patient="x"), replace(again, affine=None)], judge, None)
    assert "pt_" not in (tmp_path / "s" / "segmenter.json").read_text()


def test_refusals(learned, tmp_path, monkeypatch) -> None:
    with pytest.raises(MaisiError, match="give multiples of 8"):
        parse_config(SegmenterConfig, {"patch": {"size": (20, 64, 64)}}, "The segmenter")
    with pytest.raises(MaisiError, match="holds no readable segmenter"):
        TrainedSegmenter.open(tmp_path)
    broken = shutil.copytree(learned.folder, tmp_path / "broken")
    (broken / "segmenter.safetensors").write_bytes(b"no")
    with pytest.raises(MaisiError, match="train it anew"):
        TrainedSegmenter.open(broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MaisiError, match=r"maisi\[segmentation\]"):
        require_monai()


def test_fidelity_takes_it(learned, entries, tmp_path, capsys) -> None:
    for number in range(2):
        write_item(tmp_path / "out" / f"{number:04d}", 200 + number)
        write_item(tmp_path / "real" / f"r{number}", 300 + number)
    words = ["evaluate", "fidelity", str(tmp_path / "out"), "--segmenter", str(learned.folder)]
    seen = ["--real", str(entries[0].image.parent.parent), "-o", str(tmp_path / "f")]
    assert run([*words, *seen]) == 2
    assert "is trained on 4 of the real cases" in capsys.readouterr().err
    assert run([*words, "--real", str(tmp_path / "real"), "-o", str(tmp_path / "f")]) == 0
    assert "mandible, ratio:" in capsys.readouterr().out
    assert run([*words, "--train", str(tmp_path / "real"), "-o", str(tmp_path / "g")]) == 2
    assert "leave them out" in capsys.readouterr().err


def test_the_command_trains_one_and_fidelity_too(entries, tmp_path, capsys) -> None:
    real = entries[0].image.parent.parent
    how = ["--structure", "mandible", "--steps", "2", "--patch", "16,16,16", "--batch", "1"]
    assert run(["evaluate", "segmenter", str(real), *how, "-o", str(tmp_path / "s")]) == 0
    assert TrainedSegmenter.open(tmp_path / "s").structures == {"mandible": frozenset({BRIGHT})}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    write_item(tmp_path / "out" / "g", 7)
    words = ["evaluate", "fidelity", str(tmp_path / "out"), "--segmenter", "trained"]
    assert run([*words, "-o", str(tmp_path / "f")]) == 2
    assert "give --train" in capsys.readouterr().err
    assert run([*words, "--train", str(real), *how, "-o", str(tmp_path / "f")]) == 0
