"""The command `maisi`. Each command turns its options into checked values and calls one function.

Imports stand inside the commands, and a command is imported when it is asked for: `maisi --help` and every refused
request answer without loading torch.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence

import click

import maisi
from maisi.cli.group import processes, speaks, tell
from maisi.cli.lazy import LazyGroup
from maisi.errors import MaisiError

BAD_INPUT = 2
INTERRUPTED = 130


def main() -> None:
    """Entry point: run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (one sentence on stderr), 130 when interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(cli.main(list(arguments), prog_name="maisi", standalone_mode=False) or 0)
    except MaisiError as error:
        return _refuse(str(error))
    except click.ClickException as error:
        if speaks():
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        why = "Interrupted" if processes() == 1 else "Stopped, or another process of the group was lost"
        tell(str(error) or f"{why}; nothing is left half-written.", err=True)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _refuse(f"The disk is full ({error.filename or 'writing'}); free some space or choose another disk.")
    except (MemoryError, RuntimeError) as error:
        from maisi.device import fault_of

        fault = fault_of(error)
        if fault is None:
            raise
        return _refuse(fault)


def _interrupt(number: int, frame: object) -> None:
    """A polite kill ends a run as Ctrl-C does: what is half-written gets removed."""
    raise KeyboardInterrupt


def _refuse(sentence: str) -> int:
    tell(f"maisi: {sentence}", err=True)
    return BAD_INPUT


HOMES = {
    "baseline": "maisi.cli.baseline",
    "cohort": "maisi.cli.cohort",
    "decode": "maisi.cli.images",
    "encode": "maisi.cli.images",
    "evaluate": "maisi.cli.evaluate",
    "export": "maisi.cli.exchange",
    "generate": "maisi.cli.generation",
    "inpaint": "maisi.cli.generation",
    "labels": "maisi.cli.knowledge",
    "mask": "maisi.cli.mask",
    "models": "maisi.cli.knowledge",
    "phantom": "maisi.cli.images",
    "prepare": "maisi.cli.training",
    "quality": "maisi.cli.quality",
    "report": "maisi.cli.report",
    "segment": "maisi.cli.images",
    "serve": "maisi.cli.serve",
    "train": "maisi.cli.training",
    "weights": "maisi.cli.weights",
}


@click.group(cls=LazyGroup, homes=HOMES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(maisi.__version__, prog_name="maisi")
def cli() -> None:
    """Synthetic 3D CT with labels: generate volumes, train the networks that do it, and judge the result."""
