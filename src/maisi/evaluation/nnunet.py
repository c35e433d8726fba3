"""nnU-Net v2 as a trainer: its raw layout, its commands, run as programs of their own and never imported.

The facts are from its documentation (how_to_use_nnunet.md, dataset_format.md) and from running it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from maisi.config import Config
from maisi.device import resolve_device
from maisi.errors import MaisiError
from maisi.evaluation.external_trainer import LOG, mirrored_sides
from maisi.evaluation.programs import find_program, run_program
from maisi.evaluation.segmentation_cases import Structures
from maisi.evaluation.trainer import Report
from maisi.generation.export import Dataset

CLASSES: Mapping[int, str] = MappingProxyType(
    {1: "nnUNetTrainer_1epoch", 1000: "nnUNetTrainer"}
    | {n: f"nnUNetTrainer_{n}epochs" for n in (5, 10, 20, 50, 100, 250, 500, 750, 2000, 4000, 8000)}
)
"""Epochs -> the class of trainer that takes so many: nnU-Net has no option for their number."""

_PLAN, _TRAIN, _PREDICT = "nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict_from_modelfolder"
_ID, _NAME, _PLANS = 501, "Dataset501_Study", "nnUNetPlans"
_FOLD = "all"
"""All cases are for training; the study itself knows the cases of the test."""

_PREPARED = "prepared"
_CHECKPOINT, _FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"
_PROCESSES = 4
_UNUSED = ("training_log_*.txt", "progress.png", "debug.json", "validation", "checkpoint_best.pth", _CHECKPOINT)


class NnunetConfig(Config):
    """What decides a training of nnU-Net, but for the cases.

    Attributes:
        configuration: of those that its planner makes; it makes no '3d_lowres' for small images.
        trainer_class: its class of trainer, which decides the number of epochs, see `CLASSES`.
        device: member of `device.DEVICES`.
    """

    configuration: Literal["2d", "3d_lowres", "3d_fullres"] = "3d_fullres"
    trainer_class: str = Field(default=CLASSES[1000], pattern=r"^[A-Za-z_]\w*$")
    device: str = "auto"


def class_of(epochs: int) -> str:
    """Return the class of trainer for a number of epochs.

    Raises:
        MaisiError: nnU-Net ships none.
    """
    if epochs not in CLASSES:
        known = ", ".join(map(str, sorted(CLASSES)))
        raise MaisiError(f"nnU-Net ships no trainer of {epochs} epochs; give --epochs one of {known}.")
    return CLASSES[epochs]


@dataclass(frozen=True)
class Nnunet:
    """An `external_trainer.Tool`."""

    config: NnunetConfig

    name = "nnunet"
    layout = "nnunet"
    folds = 1
    fewest = 1

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Tool`."""
        return self.config.model_dump(mode="json")

    @property
    def effort(self) -> str:
        """See `Tool`."""
        return f"{self._epochs} epoch(s) of nnU-Net's {self.config.trainer_class}, which has no seed"

    def cautions(self, structures: Structures) -> tuple[str, ...]:
        """See `Tool`."""
        if "NoMirroring" in self.config.trainer_class:
            return ()
        return mirrored_sides(structures, "nnU-Net", "; give --trainer-class nnUNetTrainerNoMirroring")

    def version(self) -> str:
        """See `Tool`."""
        for command in (_PLAN, _TRAIN, _PREDICT):
            if find_program(command) is None:
                raise MaisiError(f"nnU-Net is not installed here ({command} is not found); pip install nnunetv2.")
        try:
            return f"nnU-Net {version('nnunetv2')}"
        except PackageNotFoundError:
            return "nnU-Net of unknown version"  # it lives in another environment

    def dataset_folder(self, work: Path) -> Path:
        """See `Tool`."""
        return work / "raw" / _NAME

    def train(self, work: Path, dataset: Dataset, report: Report | None) -> None:
        """See `Tool`."""
        how = self.config.configuration
        if not (work / _PREPARED).exists():
            shutil.rmtree(work / "preprocessed", ignore_errors=True)
            few = str(min(_PROCESSES, os.cpu_count() or 1))
            self._run(work, _PLAN, "-d", str(_ID), "-c", how, "--verify_dataset_integrity", "-np", few, "-npfp", few)
            (work / _PREPARED).touch()
        if report:
            report("plan", 1, 1)
        fold = self._trained(work) / f"fold_{_FOLD}"
        if (fold / _FINAL).exists():
            return
        words = [str(_ID), how, _FOLD, "-tr", self.config.trainer_class, "-device", self._device]
        self._run(work, _TRAIN, *words, *(["--c"] if (fold / _CHECKPOINT).exists() else []), report=report)

    def keep(self, work: Path, model: Path) -> None:
        """See `Tool`; the model folder is whole by itself, so it may lie anywhere."""
        shutil.copytree(self._trained(work), model, ignore=shutil.ignore_patterns(*_UNUSED))

    def weights(self, model: Path) -> list[Path]:
        """See `Tool`."""
        return [model / f"fold_{_FOLD}" / _FINAL]

    def segment(self, model: Path, place: Path, image: Path, log: Path) -> Path | None:
        """See `Tool`."""
        given, found = place / "given", place / "found"
        given.mkdir()
        image.rename(given / "case_0000.nii.gz")
        words = ["-i", str(given), "-o", str(found), "-m", str(model), "-f", _FOLD, "-npp", "1", "-nps", "1"]
        run_program([_program(_PREDICT), *words, "-device", self._device], log, _folders(place))
        written = found / "case.nii.gz"
        return written if written.is_file() else None

    def _run(self, work: Path, command: str, *words: str, report: Report | None = None) -> None:
        epochs = self._epochs

        def watch(line: str) -> None:
            if report and (match := re.search(r"Epoch (\d+)$", line)):
                report("train", min(int(match[1]), epochs - 1), epochs)

        run_program([_program(command), *words], work / LOG, _folders(work), watch)
        if report:
            report("train", epochs, epochs)

    def _trained(self, work: Path) -> Path:
        """Where nnU-Net puts what it trains."""
        return work / "results" / _NAME / f"{self.config.trainer_class}__{_PLANS}__{self.config.configuration}"

    @property
    def _device(self) -> str:
        return resolve_device(self.config.device).type

    @property
    def _epochs(self) -> int:
        """As the name of the class says."""
        match = re.search(r"_(\d+)epochs?", self.config.trainer_class)
        return int(match[1]) if match else 1000


def _program(command: str) -> str:
    return find_program(command) or command


def _folders(work: Path) -> dict[str, str]:
    """The variables in which nnU-Net looks for its folders."""
    return {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
