from __future__ import annotations

import os
import sys
import time

import pytest

from maisi.errors import MaisiError
from maisi.evaluation.programs import find_program, run_program


def test_lines_are_told_as_they_come_and_all_is_kept(tmp_path) -> None:
    log, lines = tmp_path / "log.txt", []
    log.write_text("before\n")
    code = "import os, sys; print('one'); sys.stderr.write('half'); sys.stderr.flush(); print(' two', os.environ['X'])"
    run_program([sys.executable, "-c", code], log, {"X": "y"}, lines.append)
    assert lines == ["one", "half two y"]
    assert log.read_text().startswith("before\n$ ")


def test_failures_are_sentences(tmp_path) -> None:
    log = tmp_path / "log.txt"
    code = "import sys; print('fine'); sys.exit('no memory\\n\\n')"
    with pytest.raises(MaisiError, match=rf"failed with code 1: no memory; all it said is in {log}\."):
        run_program([sys.executable, "-c", code], log)
    with pytest.raises(MaisiError, match="does not start"):
        run_program([str(tmp_path / "nothing")], log)
    assert find_program("no-such-program") is None


def test_what_ends_us_ends_the_program_and_its_children(tmp_path) -> None:
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    start = f"p = subprocess.Popen([sys.executable, '-c', {child!r}])"
    code = f"import subprocess, sys; {start}; print(p.pid, flush=True); p.wait()"
    pids: list[int] = []

    def stop(line: str) -> None:
        if line == "up":
            raise KeyboardInterrupt
        pids.append(int(line))

    with pytest.raises(KeyboardInterrupt):
        run_program([sys.executable, "-c", code], tmp_path / "log.txt", watch=stop)
    for _ in range(100):  # a killed process takes a moment to be gone
        if not _running(pids[0]):
            return
        time.sleep(0.05)
    pytest.fail("the program's child is still there")


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split()[2] != "Z"  # killed, and nobody asked for its code yet
