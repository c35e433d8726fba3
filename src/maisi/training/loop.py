"""The one training loop: steps, logs, validation, checkpoints, resume. Knows no network and no loss.

A stage turns a step number into an update; everything random in it is drawn from generators that depend on the seed
and the step alone, so a resumed run repeats the uninterrupted one to the bit on a CPU.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from pydantic import Field

from maisi.config import Config
from maisi.device import keep_freed_memory
from maisi.errors import MaisiError
from maisi.io.files import locked, make_folder, remove, write_json
from maisi.training.state import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint

FREE_SETTINGS = ("loop.", "splitting.")
"""Settings that a resumed run may change: they say when and where things happen, not what is learned."""

FIXED_SETTINGS = ("loop.seed",)
"""Of these the ones that it may not: data and noise are drawn by the seed and the step."""


class LoopConfig(Config):
    """When the loop does what. All `every` values are in optimizer steps; 0 is never.

    Attributes:
        steps: optimizer steps of the whole run.
        seed: of every random draw in the run.
        minutes: stop (with a checkpoint) after this wall time; 0 is no limit. Resuming starts the clock anew.
        device: `auto` takes CUDA, then the CPU.
        precision: `bf16` runs forward and backward under autocast; weights and optimizers stay fp32.
        threads: CPU threads; 0 leaves PyTorch's choice.
    """

    steps: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=20, ge=1)
    validate_every: int = Field(default=500, ge=0)
    checkpoint_every: int = Field(default=500, ge=1)
    minutes: float = Field(default=0.0, ge=0.0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = Field(default=0, ge=0)

    @property
    def dtype(self) -> torch.dtype:
        """Type of feature maps."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self, device: torch.device) -> torch.autocast:
        """Forward passes at the precision asked for."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")


class Stage(Protocol):
    """What the loop trains."""

    def batch(self, step: int) -> Any:
        """Load the batch of a step; called ahead of time in a second thread, depends on the step alone."""

    def update(self, batch: Any, step: int) -> Mapping[str, float]:
        """Make one optimizer step and return what to log."""

    def validate(self, step: int) -> tuple[Mapping[str, float], Mapping[str, torch.Tensor]]:
        """Return metrics on cases not trained on, and pictures (3 H W in [0, 1]) by name."""

    def checkpoint(self) -> Checkpoint:
        """Everything the stage must remember."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `checkpoint`."""

    def export(self, folder: Path) -> None:
        """Write the trained networks as weights that generation loads."""


def run(stage: Stage, config: LoopConfig, resolved: Config, folder: Path) -> int:
    """Train until `config.steps`, the time limit, or an interrupt; return the step reached.

    Args:
        stage: what is trained.
        config: when what happens.
        resolved: the complete configuration of the run; written to `folder/run.json` and into checkpoints.
        folder: the run's folder; a checkpoint found there is resumed if its configuration is the same.

    Raises:
        KeyboardInterrupt: so it ended, with a checkpoint.
    """
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    make_folder(folder)
    with locked(folder, f"Another training is writing to {folder}; wait for its end, or choose another folder."):
        for leftover in (folder / "checkpoints").glob("*.part-*"):  # of a training that was killed
            remove(leftover)
        return _run(stage, config, resolved, folder)


def _run(stage: Stage, config: LoopConfig, resolved: Config, folder: Path) -> int:
    from torch.utils.tensorboard import SummaryWriter

    step = _resume(stage, resolved, folder / "checkpoints")
    write_json(folder / "run.json", resolved.model_dump(mode="json"))
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
    started = time.monotonic()
    with _Interrupt() as interrupt, _reporter(config.steps, step) as report, ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(stage.batch, step)
        while step < config.steps and not interrupt.wanted:
            batch = upcoming.result()
            upcoming = loader.submit(stage.batch, step + 1)
            metrics = stage.update(batch, step)
            step += 1
            if step % config.log_every == 0 or step == config.steps:
                report(step, metrics)
                _log(writer, folder, step, "train", metrics)
            out_of_time = bool(config.minutes) and time.monotonic() - started > 60 * config.minutes
            if step % config.checkpoint_every == 0 or step == config.steps or out_of_time or interrupt.wanted:
                _save(stage, resolved, folder / "checkpoints", step)  # first: validation, too, may run out of memory
            if config.validate_every and (step % config.validate_every == 0 or step == config.steps):
                _validate(stage, writer, folder, step, report)
            if out_of_time:
                break
    writer.close()
    stage.export(folder)
    if interrupt.wanted and step < config.steps:
        raise KeyboardInterrupt(f"Stopped at step {step} of {config.steps}; the same command goes on from there.")
    return step


def _resume(stage: Stage, resolved: Config, folder: Path) -> int:
    path = newest_checkpoint(folder)
    if path is None:
        return 0
    checkpoint = load_checkpoint(path)
    mine, theirs = resolved.model_dump(mode="json"), checkpoint.facts["config"]
    changed = sorted(
        {
            name
            for name, _ in _flat(mine).items() ^ _flat(theirs).items()
            if name in FIXED_SETTINGS or not name.startswith(FREE_SETTINGS)
        }
    )
    if changed:
        names = ", ".join(changed)
        raise MaisiError(
            f"{folder.parent} holds a run with other settings ({names}); continue with its own or choose a new folder."
        )
    stage.restore(checkpoint)
    return int(checkpoint.facts["step"])


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): json.dumps(values)}
    return {k: v for key, value in values.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def _save(stage: Stage, resolved: Config, folder: Path, step: int) -> None:
    own = stage.checkpoint()
    facts = {**own.facts, "step": step, "config": resolved.model_dump(mode="json")}
    save_checkpoint(folder, step, Checkpoint(own.tensors, facts))


def _validate(stage: Stage, writer: Any, folder: Path, step: int, report: Any) -> None:
    from PIL import Image

    metrics, pictures = stage.validate(step)
    report(step, metrics)
    _log(writer, folder, step, "validation", metrics)
    for name, picture in pictures.items():
        writer.add_image(f"validation/{name}", picture, step)
        (folder / "pictures").mkdir(exist_ok=True)
        pixels = (picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(folder / "pictures" / f"{name}-{step:08d}.png")


def _log(writer: Any, folder: Path, step: int, group: str, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        writer.add_scalar(f"{group}/{name}", value, step)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        file.write(json.dumps({"step": step, "group": group, **known}) + "\n")


class _Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop after the step; the second one is obeyed at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the caller's signals are the caller's
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


@contextmanager
def _reporter(steps: int, first: int) -> Iterator[Any]:
    """A progress bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        started = time.monotonic()

        def plain(step: int, metrics: Mapping[str, float]) -> None:
            pace = (time.monotonic() - started) / max(step - first, 1)
            words = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"step {step}/{steps}  {pace:.2f} s/step  {words}", file=sys.stderr, flush=True)

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=steps, completed=first)

        def bar(step: int, metrics: Mapping[str, float]) -> None:
            words = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            progress.update(task, completed=step, description=words)

        yield bar
