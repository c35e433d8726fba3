"""MONAI's Auto3DSeg as a trainer: its data list and its runner, run as a program of its own and never imported.

The facts are from MONAI 1.6 (`monai/apps/auto3dseg`). It needs templates of its algorithms, which it downloads from
GitHub unless it is given a folder of them. Its models know their own absolute paths, so they stay where they are made.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from maisi.config import Config
from maisi.errors import MaisiError
from maisi.evaluation.external_trainer import LOG, mirrored_sides
from maisi.evaluation.programs import run_program
from maisi.evaluation.segmentation_cases import Structures
from maisi.evaluation.trainer import Report
from maisi.generation.export import LAYOUTS, Dataset
from maisi.io.files import write_json

_COMMAND = (sys.executable, "-m", "monai.apps.auto3dseg")
_DATA, _RUNNER, _INPUT, _FOUND = "data", "runner", "input.yaml", "_ensemble.nii.gz"
_VALIDATIONS = 50
"""So often a training with a given number of epochs is validated, at most."""


class Auto3dsegConfig(Config):
    """What decides a training of Auto3DSeg, but for the cases.

    Attributes:
        epochs: of each of its trainings; None leaves it to its algorithms.
        algorithms: of its templates ('segresnet', 'dints', ...); () is all.
        templates: folder of templates; None has it download its own.
    """

    epochs: int | None = Field(default=None, ge=1)
    algorithms: tuple[str, ...] = ()
    templates: Path | None = None


@dataclass(frozen=True)
class Auto3dseg:
    """An `external_trainer.Tool`."""

    config: Auto3dsegConfig

    name = "auto3dseg"
    layout = "auto3dseg"
    folds = 5
    fewest = 2  # a fold to train on and one to validate on

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Tool`."""
        return self.config.model_dump(mode="json")

    @property
    def effort(self) -> str:
        """See `Tool`."""
        epochs = "epochs of its own choice" if self.config.epochs is None else f"{self.config.epochs} epoch(s)"
        which = ", ".join(self.config.algorithms) or "all its algorithms"
        return f"{epochs} of Auto3DSeg ({which}), in up to {self.folds} folds whose best models are averaged"

    def cautions(self, structures: Structures) -> tuple[str, ...]:
        """See `Tool`."""
        return mirrored_sides(structures, "Auto3DSeg", "")

    def version(self) -> str:
        """See `Tool`."""
        for module in ("monai", "fire"):
            if find_spec(module) is None:
                raise MaisiError(
                    f"Auto3DSeg is not installed here ({module} is missing); pip install 'monai[fire,nibabel,pyyaml]'."
                )
        try:
            return f"Auto3DSeg of MONAI {version('monai')}"
        except PackageNotFoundError:
            return "Auto3DSeg of an unknown MONAI"

    def dataset_folder(self, work: Path) -> Path:
        """See `Tool`."""
        return work / _DATA

    def train(self, work: Path, dataset: Dataset, report: Report | None) -> None:
        """See `Tool`; its runner itself leaves out what it finished before."""
        task: dict[str, Any] = {
            "name": dataset.name,
            "modality": "CT",
            "dataroot": str(work / _DATA),
            "datalist": str(work / _DATA / LAYOUTS[self.layout].index),
            "class_names": list(dataset.labels),
            "ensemble": False,
        }
        if self.config.algorithms:
            task["algos"] = list(self.config.algorithms)
        if self.config.templates is not None:
            task["templates_path_or_url"] = str(self.config.templates.resolve())
        (work / _INPUT).write_text(yaml.safe_dump(task), encoding="utf-8")
        words = ["AutoRunner", f"--work_dir={work / _RUNNER}", f"--input={work / _INPUT}", "-"]
        if self.config.epochs is not None:
            often = max(1, self.config.epochs // _VALIDATIONS)
            params = {"num_epochs": self.config.epochs, "num_epochs_per_validation": often}
            words += ["set_training_params", f"--params={json.dumps(params)}", "-"]
        run_program([*_COMMAND, *words, "run"], work / LOG, _environment())
        if not self.weights(work):
            raise MaisiError(f"Auto3DSeg ended without a trained model; see {work / LOG}.")
        if report:
            report("train", 1, 1)

    def keep(self, work: Path, model: Path) -> None:
        """See `Tool`."""
        os.symlink(work.resolve(), model, target_is_directory=True)

    def weights(self, model: Path) -> list[Path]:
        """See `Tool`."""
        return sorted((model / _RUNNER).glob("*/model*/*.pt"))

    def segment(self, model: Path, place: Path, image: Path, log: Path) -> Path | None:
        """See `Tool`."""
        training = json.loads((model / _DATA / LAYOUTS[self.layout].index).read_text(encoding="utf-8"))["training"]
        write_json(place / "datalist.json", {"training": [], "testing": [{"image": image.name}]})
        task = {"modality": "CT", "dataroot": str(place), "datalist": str(place / "datalist.json")}
        (place / _INPUT).write_text(yaml.safe_dump(task), encoding="utf-8")
        words = ["EnsembleRunner", f"--data_src_cfg_name={place / _INPUT}", f"--work_dir={model / _RUNNER}"]
        words += [f"--num_fold={1 + max(case['fold'] for case in training)}", "--mgpu=False"]
        run_program([*_COMMAND, *words, f"--output_dir={place / 'found'}", "-", "ensemble"], log, _environment())
        return next(iter((place / "found").rglob(f"*{_FOUND}")), None)


def _environment() -> dict[str, str]:
    """Its algorithms are run as `python`, which is to be the one that runs here."""
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}
