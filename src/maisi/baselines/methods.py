"""The baselines by name: train one, print its settings, make volumes with it. Imports no torch until it is asked to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maisi.baselines.trained import FILE, Maker, trained_in
from maisi.config import Config, parse_config
from maisi.device import peak_memory, resolve_device, resolve_precision
from maisi.errors import MaisiError
from maisi.generation.output import Item
from maisi.io.files import sha256
from maisi.request import Request, item_seed
from maisi.volume import Volume

if TYPE_CHECKING:
    import torch

    from maisi.training.loop import Stage

METHODS = ("ddpm", "hagan")

Report = Callable[[str, int, int], None]
"""Called with a stage's name, steps done and steps in all."""


@dataclass(frozen=True)
class Method:
    """What a baseline is made of.

    Attributes:
        run: configuration of its training.
        stage: makes of that what the loop trains.
        maker: makes of that, of weights, device and type what makes volumes.
        check: refuses steps and a solver that the method cannot have; takes the configuration, too.
    """

    run: type[Config]
    stage: Callable[[Any], Stage]
    maker: Callable[..., Maker]
    check: Callable[[Any, int | None, str | None], None]


def method(name: str) -> Method:
    """Find a baseline (this imports torch).

    Raises:
        MaisiError: there is none of that name.
    """
    if name == "ddpm":
        from maisi.baselines.ddpm import DdpmMaker, DdpmRun, DdpmStage, check_sampling

        return Method(DdpmRun, DdpmStage, DdpmMaker, check_sampling)
    if name == "hagan":
        from maisi.baselines.hagan import HaganMaker, HaganRun, HaganStage, refuse_sampling

        return Method(HaganRun, HaganStage, HaganMaker, refuse_sampling)
    raise MaisiError(f"There is no baseline '{name}'; choose one of {', '.join(METHODS)}.")


def train(name: str, path: Path, folder: Path) -> int:
    """Train a baseline as the YAML file says, in `folder`; resume what is there. Return the step reached.

    Raises:
        MaisiError: as `maisi.training.runs.run_stage`.
    """
    from maisi.training.runs import start

    found = method(name)
    return start(found.run, found.stage, path, folder)


def example_yaml(name: str) -> str:
    """Return a YAML file with every setting of a baseline, its default and what it means."""
    from maisi.training.runs import example_of

    return example_of(method(name).run, f"maisi baseline train {name}")


class Baseline:
    """A trained baseline. Weights load when the first volume is made."""

    def __init__(self, folder: Path, device: str = "auto", precision: str = "auto") -> None:
        """Open a run's folder.

        Raises:
            MaisiError: it holds no trained baseline, or there is no such device or precision.
        """
        self.folder = folder
        self.name, settings = trained_in(folder)
        self.method = method(self.name)
        run: Any = parse_config(self.method.run, settings, str(folder / FILE))
        self.run = run
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device)

    def request(self, seed: int, count: int, steps: int | None = None, solver: str | None = None) -> Request:
        """The order for volumes, which are all of the baseline's own grid.

        Raises:
            MaisiError: a value is out of range, or the method has no such steps or solver.
        """
        self.method.check(self.run, steps, solver)
        spacing = (self.run.grid.spacing_mm,) * 3
        wishes: dict[str, Any] = {"size": self.run.grid.size, "spacing": spacing, "steps": steps, "solver": solver}
        return Request.parse(seed=seed, count=count, model=f"baseline {self.name}", **wishes)

    @property
    def weights_sha256(self) -> dict[str, str]:
        """File name -> hash of the weights."""
        return {FILE: sha256(self.folder / FILE)}

    @cached_property
    def maker(self) -> Maker:
        """The networks, ready on the device."""
        from safetensors.torch import load_file

        return self.method.maker(self.run, load_file(self.folder / FILE), self.device, self.dtype)

    def item(self, request: Request, number: int, report: Report) -> Item:
        """Make one volume: its bytes depend on the request's seed and `number`, not on the others."""
        import torch

        started = time.perf_counter()
        seed = item_seed(request.seed, number)
        with torch.inference_mode():
            values = self.maker.make(
                torch.Generator().manual_seed(seed),
                request.steps,
                request.solver,
                lambda done, steps: report("make", done, steps),
            )
        return Item(
            image=self._volume(values),
            labels=None,
            request=request,
            number=number,
            seed=seed,
            timings_s={"total": time.perf_counter() - started},
            weights_sha256=self.weights_sha256,
            peak_memory_bytes=peak_memory(self.device),
            details={
                "baseline": self.name,
                "device": str(self.device),
                "precision": str(self.dtype).removeprefix("torch."),
            },
        )

    def _volume(self, values: torch.Tensor) -> Volume:
        from maisi.baselines.images import to_hu

        spacing = float(self.run.grid.spacing_mm)
        return Volume.from_spacing(to_hu(values), (spacing, spacing, spacing))
