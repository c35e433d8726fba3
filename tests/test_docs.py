"""The code in README and docs runs as it stands: Python blocks, and shell blocks line by line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from maisi.cli import run

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, text) for page in PAGES for text in pattern.findall(page.read_text(encoding="utf-8"))]


def test_there_is_something_to_run() -> None:
    assert len(blocks("python")) >= 1
    assert len(blocks("bash")) >= 2


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value[:20])
def test_python_blocks(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize(("page", "code"), blocks("bash"), ids=lambda value: value[:20])
def test_shell_blocks(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "maisi", f"{page}: {line}"
        assert run(words[1:]) == 0, f"{page}: {line}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
