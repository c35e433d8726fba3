"""From a request to what makes its items, whichever door it came through: generation, or inpainting into a CT.

Several requests after one another keep the model, as long as they name the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from maisi.generation.inpaint_job import make_inpaint_job
from maisi.generation.job import make_job, weights_used
from maisi.generation.output import Item
from maisi.io.files import INDEX
from maisi.io.nifti import volume_sha256
from maisi.request import Request
from maisi.weights.registry import ModelFolder, find_model

if TYPE_CHECKING:
    from maisi.generation.pipeline import Model

Report = Callable[[str, int, int], None]
"""Called with the stage, steps done and steps in all."""

MakeItem = Callable[[int, Report], Item]


@dataclass(frozen=True)
class Prepared:
    """A request that was checked.

    Attributes:
        order: JSON values that decide every byte of its items, see `output.destination`.
        notes: sentences for who asked.
        load: loads the networks (once) and returns what makes an item of its number.
        plan: says how much memory that takes, and how, and loads nothing; None for inpainting.
    """

    order: Mapping[str, Any]
    notes: tuple[str, ...]
    load: Callable[[], MakeItem]
    plan: Callable[[], str] | None = None


class Maker:
    """Prepares requests; loads a model when a first item is made, and the next when another is named."""

    def __init__(self, device: str = "auto", precision: str = "auto", memory: int | None = None) -> None:
        """`memory`: bytes that the process may use; None is what is free."""
        self._running = (device, precision, memory)
        self._model: tuple[str, Model] | None = None

    def prepare(self, request: Request, first: int = 0) -> Prepared:
        """Check a request whose items are numbered from `first`; nothing is loaded.

        Raises:
            MaisiError: something asked for cannot be made.
        """
        folder = find_model(request.model)
        kind = self._generation if request.image is None else self._inpainting
        return kind(request, folder, first)

    def _generation(self, request: Request, folder: ModelFolder, first: int) -> Prepared:
        job = make_job(request, folder.config, carried=folder.library())

        def load() -> MakeItem:
            model = self._loaded(request.model, folder)
            plan = model.prepare(job).decode
            return lambda number, report: model.item(job, plan, number, report)

        def plan() -> str:
            from maisi.diffusion.sampler import require_sampling

            model = self._loaded(request.model, folder)
            require_sampling(model.process, job.solver, job.steps)
            return str(model.footprint(job))

        return Prepared(order_of(request, first, folder, masked=job.labels is not None), tuple(job.notes), load, plan)

    def _inpainting(self, request: Request, folder: ModelFolder, first: int) -> Prepared:
        job, by_network = make_inpaint_job(request, folder.config), request.by == "network"

        def load() -> MakeItem:
            from maisi.generation.inpaint import inpaint_item

            return partial(inpaint_item, self._loaded(request.model, folder) if by_network else None, job)

        order = order_of(request, first, folder if by_network else None, masked=True)
        return Prepared(order, tuple(job.notes), load)

    def _loaded(self, name: str, folder: ModelFolder) -> Model:
        from maisi.generation.pipeline import Model

        if self._model is None or self._model[0] != name:
            self._model = None  # gone before the next is loaded
            self._model = (name, Model(folder, *self._running))
        return self._model[1]


def order_of(request: Request, first: int, folder: ModelFolder | None, masked: bool) -> dict[str, Any]:
    """What decides every byte of a folder's items, as JSON values; `folder` is the model's, where one is asked."""
    ranges = request.ranges or (None if folder is None else folder.ranges())
    given = {"mask_sha256": request.mask, "image_sha256": request.image, "ranges_sha256": ranges}
    libraries = {
        "library_sha256": request.library,
        "model_library_sha256": None if folder is None else folder.library(),
    }
    given |= {name: None if path is None else path / INDEX for name, path in libraries.items()}
    return {
        "request": request.model_dump(mode="json"),
        "first": first,
        **{name: None if path is None else volume_sha256(path) for name, path in given.items()},
        "model": {} if folder is None else folder.config.model_dump(mode="json", exclude={"name", "card", "sha256"}),
        "weights_sha256": {} if folder is None else weights_used(folder, masked),
    }
