from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from maisi import cli
from maisi.data.phantom import phantom
from maisi.data.preprocess import unwindow_ct, window_ct
from maisi.errors import MaisiError
from maisi.evaluation.hooks import PythonReconstructor
from maisi.io.nifti import write_volume
from maisi.volume import Volume

THEIRS = """
import neighbour

def halves(image):
    return image * neighbour.SHARE
"""


@pytest.fixture
def ct() -> Volume:
    return phantom((20, 18, 16), (14.0, 14.0, 14.0), ("chest",), seed=0)[0].to_ras()


def hook(folder: Path, text: str, function: str = "halves") -> PythonReconstructor:
    (folder / "theirs.py").write_text(text)
    return PythonReconstructor.find(f"{folder / 'theirs.py'}:{function}")


def test_a_function_of_a_file_gets_the_windowed_ct_and_gives_hu(tmp_path, ct) -> None:
    (tmp_path / "neighbour.py").write_text("SHARE = 0.5")
    found = hook(tmp_path, THEIRS)
    made = found(ct)
    assert made.same_grid(ct)
    np.testing.assert_array_equal(made.array, unwindow_ct(window_ct(ct.array) / 2))
    first = found.identity
    assert hook(tmp_path, THEIRS + "# changed\n").identity != first


def test_it_runs_without_gradients_and_what_comes_back_is_clipped(tmp_path, ct) -> None:
    text = "import torch\ndef halves(x):\n    assert not torch.is_grad_enabled()\n    return x.double() * 0 + 7"
    assert set(np.unique(hook(tmp_path, text)(ct).array)) == {1000}


def test_a_function_of_a_module(monkeypatch, tmp_path) -> None:
    (tmp_path / "somebodys.py").write_text("def same(image):\n    return image\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = PythonReconstructor.find("somebodys:same")
    assert found.identity["python"] == "somebodys:same"
    assert found.function(torch.ones(1)) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("theirs.py", "names no function"),
        ("theirs.py:", "names no function"),
        (":halves", "names no function"),
        ("absent.py:halves", "absent.py does not exist"),
        ("theirs.py:absent", "has no function 'absent'"),
        ("theirs.py:number", "has no function 'number'"),
        ("broken.py:halves", "cannot be imported: ZeroDivisionError: division by zero (broken.py, line 2)"),
        ("leaves.py:halves", "cannot be imported: SystemExit"),
        ("no.such.module:halves", "cannot be imported: ModuleNotFoundError: No module named 'no'"),
    ],
)
def test_what_is_no_function_is_refused(tmp_path, monkeypatch, name, said) -> None:
    (tmp_path / "theirs.py").write_text("number = 3")
    (tmp_path / "broken.py").write_text("\n1 / 0\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaisiError, match=re.escape(said)):
        PythonReconstructor.find(name)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('too\\n large.')", "ValueError: too large (theirs.py, line 2); correct it there."),
        ("return image[..., 1:]", "made (1, 1, 20, 18, 15) of a tensor of (1, 1, 20, 18, 16)"),
        ("return image.numpy()", "made ndarray of a tensor"),
        ("return image / 0", "values that are no numbers"),
    ],
)
def test_what_goes_wrong_in_it_is_said(tmp_path, ct, body, said) -> None:
    found = hook(tmp_path, f"def halves(image):\n    {body}\n")
    with pytest.raises(MaisiError, match=re.escape(said)):
        found(ct)


def evaluate(*arguments: object) -> int:
    return cli.run(["evaluate", "reconstruction", *map(str, arguments), "--lpips-features", "gradients"])


def test_the_example_of_the_docs_judges_another_autoencoder(tmp_path, monkeypatch, ct, capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```python\n(# theirs\.py\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "theirs.py").write_text(text)
    odd = Volume(ct.array[:-1, :, 1:], ct.affine)
    write_volume(tmp_path / "ct.nii.gz", odd)
    monkeypatch.chdir(tmp_path)
    assert evaluate("ct.nii.gz", "--python", "theirs.py:reconstruct", "-o", "out") == 0
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    assert values["settings"]["python"] == "theirs.py:reconstruct"
    assert len(values["settings"]["python_sha256"]) == 64
    assert values["items"][0]["size"] == "19x18x15"
    assert values["summary"]["mae_hu"] > 0
    capsys.readouterr()
    for words, said in (
        (("--python", "theirs.py:reconstruct", "--model", "tiny"), "leave one of them out"),
        (("--python", "theirs.py:nothing"), "has no function 'nothing'"),
    ):
        assert evaluate("ct.nii.gz", *words, "-o", "no") == 2
        assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} >= {"ct.nii.gz", "out", "theirs.py"}
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "no.cache").exists()
