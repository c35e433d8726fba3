"""From a request with an image to a checked job of inpainting; nothing is painted yet. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from maisi.anatomy import TUMORS
from maisi.data.label_maps import ids_in
from maisi.data.mask_import import GRID_TOLERANCE_MM, sides_fault
from maisi.data.preprocess import hu_fault, padding_of, turned_onto
from maisi.data.quality import QualityRanges, read_ranges
from maisi.data.segmentation import segment
from maisi.data.tumor_masks import grow_tumors
from maisi.errors import MaisiError
from maisi.generation.masks import read_mask
from maisi.io.nifti import read_volume
from maisi.request import Request
from maisi.volume import Volume
from maisi.weights.registry import KindPainting, ModelConfig

UNUSED = (
    *("keep", "anatomy_size", "structure", "library", "size", "spacing", "fov"),
    *("mask_guidance", "self_guidance", "strengthen"),
)
"""Attributes of a request that say nothing about tumours in a CT."""


@dataclass(frozen=True)
class InpaintJob:
    """A complete order for tumours in one CT; its items differ in where they grow and how they look.

    Attributes:
        request: what was asked for.
        image: the CT, HU, as it is stored.
        labels: its label map (uint8) on the same grid.
        steps: denoising steps.
        solver: name of the solver.
        kinds: kind of tumour -> how such are painted or taken out, where that is not as usual.
        notes: sentences for the user.
        ranges: what the request says that tumours are judged by, or None.
        custom_labels: names of the own classes of the labels, id -> name.
    """

    request: Request
    image: Volume
    labels: Volume
    steps: int
    solver: str
    kinds: Mapping[str, KindPainting] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ranges: QualityRanges | None = None
    custom_labels: Mapping[int, str] = field(default_factory=dict)

    @property
    def removal(self) -> bool:
        """Whether tumours are taken out rather than put in."""
        return self.request.removal

    def painting(self, kinds: Iterable[str]) -> KindPainting:
        """How tumours of these kinds are painted together: as that which needs most; the request has the last word."""
        each = [self.kinds.get(kind, KindPainting()) for kind in kinds] or [KindPainting()]
        return KindPainting(
            mask_guidance=max(one.mask_guidance for one in each),
            temperature=self.request.temperature or max(one.temperature for one in each),
        )


def make_inpaint_job(
    request: Request, model: ModelConfig, image: Volume | None = None, labels: Volume | None = None
) -> InpaintJob:
    """Check an order of inpainting.

    Args:
        request: with `image`, and `mask` for its labels; without labels lungs, bone and body are found by rules.
        model: content of the model's `model.json`.
        image: a CT in memory, in place of `request.image`.
        labels: label map in memory, in place of `request.mask`.

    Raises:
        MaisiError: nothing is asked for, the files cannot be used or lie on different grids, a tumour has no host or no
            room, there is nothing to remove, or rules are to do so, the model follows no masks, or the ranges cannot be
            read.
    """
    unused = [name for name in UNUSED if getattr(request, name) != Request.model_fields[name].get_default()]
    if unused:
        raise MaisiError(
            f"Inpainting has no use for {unused[0]}: the CT and its labels stay what they are; leave it out."
        )
    if not request.tumor and not request.removal:
        raise MaisiError(
            "No tumour is asked for; say which, such as --tumor liver:25mm, or --tumor none to remove some."
        )
    if request.removal and request.by == "rules":
        raise MaisiError("Rules paint tumours and take none away; leave out --by rules to have the networks do it.")
    if model.controlnet is None and request.by == "network":
        raise MaisiError(
            f"The model '{model.name}' follows no masks; choose one that does, or paint by rules (--by rules)."
        )
    ct = _image(request, image)
    if fault := hu_fault(ct.array):
        raise MaisiError(f"The CT does not hold HU: {fault}.")
    given, notes = request.mask if labels is None else labels, list[str]()
    if ct.array.dtype.kind == "f" and not np.array_equal(ct.array, np.rint(ct.array)):
        notes.append("The CT holds fractions of HU, which are rounded when it is written.")
    if given is None:
        notes.append("Without labels, lungs, airway, bone and body were found by rules; other organs are unknown.")
        mask = segment(ct)
    else:
        mask = _on_grid(read_mask(given, model.custom_labels), ct)
        if fault := sides_fault(mask):
            raise MaisiError(fault)
    padding = padding_of(ct.array)
    if padding is not None and (mask.array[padding] > 0).any():
        notes.append("Where the CT is padding its labels are left out: nothing was scanned there.")
        mask = mask.with_array(np.where(padding, np.uint8(0), mask.array))
    if request.removal:
        if not TUMORS.keys() & set(ids_in(mask.array)):
            raise MaisiError("The labels hold no tumour to remove; give labels with one.")
    else:
        grow_tumors(mask, request.tumor, np.random.default_rng(0))
    steps = request.steps or model.usual_inpaint_steps()
    solver = request.solver or model.usual_solver(masked=True)
    ranges = None if request.ranges is None else read_ranges(request.ranges)
    kinds = model.inpaint_kinds
    return InpaintJob(request, ct, mask, steps, solver, kinds, tuple(notes), ranges, model.custom_labels)


def _image(request: Request, image: Volume | None) -> Volume:
    """The CT, which must fit into the int16 that it is written as again."""
    if image is None:
        if request.image is None:
            raise MaisiError("There is no CT to paint into; give one.")
        image = read_volume(Path(request.image))
    low, high = float(image.array.min()), float(image.array.max())
    limits = np.iinfo(np.int16)
    if low < limits.min or high > limits.max:
        raise MaisiError(
            f"The CT holds values from {low:.6g} to {high:.6g}, more than files of CT (int16) can; clip it before."
        )
    return image


def _on_grid(mask: Volume, ct: Volume) -> Volume:
    """Labels on the CT's grid; their axes may be turned otherwise.

    Raises:
        MaisiError: they lie on another grid.
    """
    turned = turned_onto(mask, ct, GRID_TOLERANCE_MM)
    if turned is None:
        raise MaisiError(
            f"CT ({ct.grid}) and labels ({mask.grid}) lie on different grids; resample the labels to the CT's."
        )
    return turned
