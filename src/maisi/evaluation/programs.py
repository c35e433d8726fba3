"""Programs of somebody else's that may run for days: found, logged, watched, and stopped when we are. Knows no task."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from maisi.errors import MaisiError
from maisi.io.files import writing

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0
_ERROR_CHARACTERS = 300


def find_program(name: str) -> str | None:
    """Return the path of a program, beside the running Python or else on PATH; None where it is not installed."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def run_program(
    words: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[str], None] | None = None,
) -> None:
    """Run a program to its end; whatever ends this ends it and all that it started, too.

    Args:
        words: of its command line; no shell reads them.
        log: file that all its output is added to.
        environment: variables that it has beside ours.
        watch: told each line of its output.

    Raises:
        MaisiError: it does not start, or fails; the sentence names the log and what it said last.
    """
    with writing(log), log.open("a", encoding="utf-8") as output:
        output.write(f"$ {' '.join(words)}\n")
        output.flush()
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            raise MaisiError(f"The program '{words[0]}' does not start ({error.strerror}); install it anew.") from None
        try:
            code = _watched(process, log, output.tell(), watch or (lambda line: None))
        finally:
            _stop(process)
    if code:
        raise MaisiError(
            f"'{Path(words[0]).name}' failed with code {code}: {_last_line(log)}; all it said is in {log}."
        )


def _watched(process: subprocess.Popen[bytes], log: Path, start: int, watch: Callable[[str], None]) -> int:
    with log.open(encoding="utf-8", errors="replace") as said:
        said.seek(start)
        while True:
            try:
                code = process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            for line in _new_lines(said):
                watch(line)
            if code is not None:
                return code


def _new_lines(said: IO[str]) -> Iterator[str]:
    """Yield the lines that are there as a whole; half a line waits for its rest."""
    while True:
        place = said.tell()
        line = said.readline()
        if not line.endswith("\n"):
            said.seek(place)
            return
        yield line.rstrip()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it and the processes it started, politely at first; nothing where all have ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")[-_ERROR_CHARACTERS:]
