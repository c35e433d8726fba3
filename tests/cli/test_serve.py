"""`maisi serve` as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from maisi import cli


def run(*arguments: object) -> int:
    return cli.run([*map(str, arguments)])


def test_it_serves_until_it_is_stopped(tmp_path: Path, model_folder: Path) -> None:
    words = ["serve", "--port", "0", "--model", str(model_folder), "--device", "cpu", "-o", str(tmp_path / "service")]
    with subprocess.Popen(
        [sys.executable, "-m", "maisi", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with urllib.request.urlopen(address + "api", timeout=20) as answer:
                assert json.load(answer)["models"] == [model_folder.name]
            assert run("serve", "--port", 0, "-o", tmp_path / "service") == 2  # one service a folder
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "none-such"), "none-such"),
        (("--most-upload", "much"), "much"),
        (("--memory", "little"), "little"),
        (("--host", "0.0.0.0", "--token", ""), "is not empty"),
        (("--token", "a b"), "A token is of letters"),
        (("--device", "gpu"), "gpu"),
        (("--precision", "half"), "half"),
        (("--model", "tiny", "--model", "tiny"), "Two models are called 'tiny'"),
        (("--host", "256.1.1.1"), "256.1.1.1"),
    ],
)
def test_bad_words(tmp_path: Path, capsys, words: tuple[str, ...], message: str) -> None:
    assert run("serve", "--port", 0, *words, "-o", tmp_path / "service") == 2
    assert message in capsys.readouterr().err


def test_folders_of_others(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    assert run("serve", "-o", tmp_path / "mine") == 2
    assert "is no folder of a service" in capsys.readouterr().err
    assert run("serve", "-o", tmp_path / "no" / "service") == 2
    assert "does not exist; make it first" in capsys.readouterr().err


def test_without_the_packages(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run("serve", "-o", tmp_path / "service") == 2
    assert "pip install 'maisi[service]'" in capsys.readouterr().err
    assert not (tmp_path / "service").exists()
