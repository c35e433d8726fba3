"""From a request to a job: everything decided and checked, nothing computed. Imports no torch.

Any size will do: the networks need axes that are multiples of `size_multiple`, so a volume is generated on a padded
grid, the same number of voxels added at both ends of an axis (one more at the far end where that is odd), and cropped
to what was asked for. Without a mask the volume's centre is the world's origin; with one it lies where the mask does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.anatomy import BODY, KNOWN_IDS, TUMORS, label_id, regions_present
from maisi.conditions import Conditions
from maisi.data.label_maps import ids_in, rest_of
from maisi.data.mask_deform import scale_organs
from maisi.data.mask_import import sides_fault
from maisi.data.mask_sources import PHANTOM, find_mask
from maisi.data.preprocess import HU_MIN, resample_to_grid
from maisi.data.quality import QualityRanges, read_ranges
from maisi.data.quality_measures import select
from maisi.data.tumor_masks import PlacedTumor, grow_tumors, small_tumors
from maisi.errors import MaisiError
from maisi.generation.density import MOST
from maisi.generation.fov import Adviser
from maisi.generation.masks import bare_cords, is_phantom, only, read_mask, with_body_about_cords, without_tumors
from maisi.request import Request, item_seed
from maisi.tumors import KINDS
from maisi.volume import Array, Volume
from maisi.weights.registry import ModelConfig, ModelFolder, Part

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
Labels = NDArray[np.uint8]

DRAWN_SHARE = 0.5
"""Of the usual guidance by a mask, for masks that were drawn: phantoms'."""


@dataclass(frozen=True)
class Job:
    """A complete order for one or more volumes that differ only in their noise.

    Attributes:
        request: what was asked for.
        conditions: what the networks are told.
        size: voxels along X, Y, Z of the volume, RAS+.
        padded: voxels of the grid that the networks work on.
        labels: the mask as it was given or found (uint8, own orientation), or None.
        mask_source: where the mask is from, for the record.
        placed: tumours that were grown in it.
        carried: folder of the label maps that come with the model, or None.
        ranges: what the request says that items are judged by, or None.
        custom_labels: names of classes that only this model knows.
        steps: denoising steps.
        solver: name of the solver.
        mask_guidance: away from what the networks make without the mask; 0 is off.
        self_guidance: away from what the U-Net makes when it takes its input to be noisier than it is; 0 is off.
        temperature: standard deviation of the noise.
        strengthened: label id -> how far away from what the networks make with a mask that lacks it.
        usual_guidance: the model's `mask_guidance` and `self_guidance` where it follows a mask.
        notes: sentences for the user: what was filled in, what the model does not know.
    """

    request: Request
    conditions: Conditions
    size: Triple
    padded: Triple
    labels: Volume | None
    steps: int
    solver: str
    notes: tuple[str, ...] = ()
    mask_source: str = ""
    custom_labels: Mapping[int, str] = field(default_factory=dict)
    placed: tuple[PlacedTumor, ...] = ()
    ranges: QualityRanges | None = None
    carried: Path | None = None
    mask_guidance: float = 0.0
    self_guidance: float = 0.0
    temperature: float = 1.0
    strengthened: Mapping[int, float] = field(default_factory=dict)
    usual_guidance: tuple[float, float] = (0.0, 0.0)

    def of_item(self, number: int) -> Job:
        """The job of one item: its own mask where masks are found, organs of the sizes asked for, its own tumours.

        Raises:
            MaisiError: a tumour has no host or no room, or a structure cannot have that size.
        """
        request, labels, source = self.request, self.labels, self.mask_source
        if labels is None:
            return self
        seed = item_seed(request.seed, number)
        job = self
        if source and number:
            place = (self.size, self.conditions.spacing_mm, number, self.carried, self.custom_labels)
            labels, source = _found(request, *place)
            regions, _ = _regions(request, labels)
            mask_guidance, self_guidance = _guidance(request, self.usual_guidance, source.startswith(PHANTOM))
            job = replace(
                self,
                conditions=replace(self.conditions, regions=regions),
                mask_guidance=mask_guidance,
                self_guidance=self_guidance,
            )
        labels = scale_organs(labels, {label_id(name): factor for name, factor in request.anatomy_size.items()})
        labels, placed = grow_tumors(labels, request.tumor, np.random.default_rng([seed, 1]))
        strengthened = {id: scale for id, scale in self.strengthened.items() if (labels.array == id).any()}
        return replace(job, labels=labels, mask_source=source, placed=placed, strengthened=strengthened)

    def kept_labels(self) -> Volume | None:
        """The labels to write: those the image follows, filtered to the structures to `keep` (see `masks.only`)."""
        if self.labels is None or not self.request.keep:
            return self.labels
        ids = [label_id(name) for name in self.request.keep]
        return self.labels.with_array(only(self.labels.array, ids, self.labels.spacing_mm))

    def outside_body(self, image: Volume) -> Volume:
        """The image with air where a mask with a body says that there is none of it."""
        if self.labels is None or not (self.labels.array == BODY).any():
            return image
        return image.with_array(np.where(self.labels.array == 0, np.int16(HU_MIN), image.array))

    @property
    def margins(self) -> tuple[tuple[int, int], ...]:
        """Voxels added before and after each axis."""
        added = [p - n for p, n in zip(self.padded, self.size, strict=True)]
        return tuple((n // 2, n - n // 2) for n in added)

    @property
    def masks_told(self) -> int:
        """How many masks the ControlNet may be told: this one, that without tumours, those without structures."""
        if self.labels is None:
            return 1
        tumors = bool(self.request.tumor) or bool(TUMORS.keys() & set(ids_in(self.labels.array)))
        # further attempts may raise the guidance by tumours from 0, and correct densities
        healthy = tumors and (self.request.guidance != 0 or self.request.retries > 0)
        lacking = len(set(self.strengthened.values()))
        return 1 + healthy + (max(lacking, MOST) if self.request.retries else lacking)

    def padded_labels(self) -> Labels | None:
        """The mask as networks are told it, on the padded grid, RAS+ (X, Y, Z) uint8.

        The edge goes on beyond itself, so no body ends there; cords that hang in air have a body about them.
        """
        return self._told

    @cached_property
    def _told(self) -> Labels | None:
        # once a job: guidance asks for it again for each mask that lacks something
        if self.labels is None:
            return None
        ras = self.labels.to_ras()
        return np.pad(with_body_about_cords(ras.array, ras.spacing_mm), self.margins, mode="edge")

    def padded_labels_without_tumors(self) -> Labels | None:
        """As `padded_labels`, tumours replaced by their hosts; None too where there is no tumour."""
        labels = self.padded_labels()
        if labels is None or not TUMORS.keys() & set(ids_in(labels)):
            return None
        return without_tumors(labels, self.conditions.spacing_mm)

    def padded_labels_without(self, ids: Collection[int]) -> Labels | None:
        """As `padded_labels`, structures replaced by body; None too where none of them is there."""
        labels = self.padded_labels()
        if labels is None:
            return None
        gone = select(labels, ids)
        return np.where(gone, np.uint8(BODY), labels) if gone.any() else None

    def place(self, padded: Array) -> Volume:
        """Crop an array on the padded grid and give it its place in the world, and the mask's orientation."""
        inside = tuple(slice(low, low + n) for (low, _), n in zip(self.margins, self.size, strict=True))
        array = np.ascontiguousarray(padded[inside])
        if self.labels is None:
            return Volume.from_spacing(array, self.conditions.spacing_mm)
        return resample_to_grid(Volume(array, self.labels.to_ras().affine), self.labels, order=0)


def make_job(request: Request, model: ModelConfig, mask: Volume | None = None, carried: Path | None = None) -> Job:
    """Decide what a request leaves open, and check all that can be checked without the networks.

    Args:
        request: the order.
        model: content of the model's `model.json`.
        mask: a label map in memory, in place of `request.mask`.
        carried: folder of the label maps that come with the model; see `data.mask_sources.find_mask`.

    Raises:
        MaisiError: the mask cannot be used, differs from the size or spacing asked for, or the model has no ControlNet;
            size or spacing are open and nothing says what they should be; the ranges cannot be read; tumours are to be
            removed.
    """
    if model.modalities and request.modality not in model.modalities:
        raise MaisiError(
            f"The model '{model.name}' knows no {request.modality}, only {', '.join(model.modalities)}; "
            "leave the modality out, or choose another model."
        )
    if request.removal:
        raise MaisiError(
            "Generation takes no tumours away; leave --tumor none out, or remove them with `maisi inpaint`."
        )
    given, source = request.mask if mask is None else mask, ""
    wishes = bool(request.structure or request.tumor or request.anatomy_size or request.library)
    if (given is not None or wishes) and model.controlnet is None:
        raise MaisiError(
            f"The model '{model.name}' follows no masks; leave masks and structures out or choose another model."
        )
    adviser = Adviser.of(model)
    labels = None if given is None else read_mask(given, model.custom_labels)
    if labels is None and wishes:
        size, spacing = _grid(request, adviser)
        labels, source = _found(request, size, spacing, 0, carried, model.custom_labels)
    if labels is None:
        regions, notes = request.region, list[str]()
        size, spacing = _grid(request, adviser)
        if not regions:
            notes.append("No region is named, so what is shown is left to chance; name one (--region).")
    else:
        regions, notes = _regions(request, labels)
        size, spacing = _mask_grid(request, labels)
    if None in (request.size, request.spacing) or request.fov == "auto":
        notes.append(f"Size {_show(size)} at {_show(spacing)} mm.")
    if request.library is not None and source and not source.startswith("library"):
        notes.append(f"No label map of the library is used: {source}.")
    if labels is not None and given is not None and (fault := sides_fault(labels)):
        notes.append(fault)
    notes += adviser.warnings(regions, size, spacing)
    usual = model.usual_steps(masked=labels is not None)
    steps = usual if labels is not None else _steps_beyond(usual, adviser.beyond(regions, size, spacing), model.process)
    if steps != usual and request.steps is None:
        notes.append(f"{steps} steps in place of {usual}, for so large a field of view.")
    usual_guidance = (model.mask_guidance, model.usual_self_guidance(masked=True))
    if labels is None:
        _require_mask(request.mask_guidance)
        mask_guidance, own = 0.0, model.usual_self_guidance(masked=False)
        self_guidance = own if request.self_guidance is None else request.self_guidance
    else:
        drawn = source.startswith(PHANTOM) or is_phantom(given)
        mask_guidance, self_guidance = _guidance(request, usual_guidance, drawn)
    job = Job(
        request=request,
        conditions=Conditions(spacing, regions, request.modality),
        size=size,
        padded=padded_size(size, model.size_multiple),
        labels=labels,
        steps=request.steps or steps,
        solver=request.solver or model.usual_solver(masked=labels is not None),
        notes=tuple(notes),
        mask_source=source,
        custom_labels=model.custom_labels,
        carried=carried,
        mask_guidance=mask_guidance,
        self_guidance=self_guidance,
        usual_guidance=usual_guidance,
        temperature=request.temperature or model.usual_temperature(masked=labels is not None),
        strengthened=_strengthened(request.strengthen, model.strengthen, labels is not None),
        ranges=None if request.ranges is None else read_ranges(request.ranges),
    )
    first = job.of_item(0)
    _require_kept(request.keep, first.labels)
    return replace(job, notes=(*job.notes, *small_tumors(first.placed, spacing)))


def _require_kept(names: Sequence[str], labels: Volume | None) -> None:
    if not names:
        return
    if labels is None:
        raise MaisiError(
            "There is no label map of which to keep a part; give a mask or a structure, or leave --keep out."
        )
    present = ids_in(labels.array)
    missing = [name for name in names if label_id(name) not in present]
    if missing:
        raise MaisiError(f"The label map holds no {missing[0]}; leave it out of --keep.")


def _steps_beyond(usual: int, beyond: float, process: Mapping[str, Any]) -> int:
    """Steps for a volume that reaches so many times as far as the model knows, but not more than its process has times.

    Parts that lie further apart than any it has seen need more looks to agree: in few steps a head becomes two.
    """
    times = int(process.get("num_train_timesteps", 1000))  # as processes have them that do not say
    return max(usual, min(math.ceil(usual * beyond), times))


def _guidance(request: Request, usual: tuple[float, float], drawn: bool) -> tuple[float, float]:
    """Guidance by a mask and by itself: what is asked for, or the model's usual.

    Masks that were drawn have shapes unlike all that was trained on, which guidance exaggerates: they guide less.
    """
    mask, own = usual
    if drawn:
        mask *= DRAWN_SHARE
    asked = (request.mask_guidance, request.self_guidance)
    return (mask if asked[0] is None else asked[0], own if asked[1] is None else asked[1])


def _require_mask(asked: float | None) -> None:
    """Refuse guidance by a mask where there is none."""
    if asked:
        raise MaisiError(
            "Mask guidance strengthens a label map and there is none; give a mask or a structure, or leave it out."
        )


def _strengthened(asked: Mapping[str, float], usual: Mapping[str, float], masked: bool) -> dict[int, float]:
    """The model's usual and what is asked for, by id; nothing without a mask, and asking for it there is refused."""
    if asked and not masked:
        names = " and ".join(asked)
        raise MaisiError(f"There is no label map with {names} to strengthen; give a mask, or leave it out.")
    return {label_id(name): scale for name, scale in {**usual, **asked}.items() if scale} if masked else {}


def _found(
    request: Request, size: Triple, spacing: Spacing, number: int, carried: Path | None, custom: Container[int]
) -> tuple[Volume, str]:
    """A mask for an item that has none, with what is to be in it, and where it is from.

    Classes of a library that the model was not trained on count as the rest of the body.
    """
    hosts = tuple(KINDS[wish.kind].hosts for wish in request.tumor)
    ids = tuple(label_id(name) for name in (*request.structure, *request.anatomy_size))
    seed = item_seed(request.seed, number)
    labels, source = find_mask(request.region, ids, hosts, size, spacing, seed, request.library, carried)
    unknown = [id for id in ids_in(labels.array) if id not in KNOWN_IDS and id not in custom]
    if unknown:
        rest = np.uint8(rest_of(labels.array))
        labels = labels.with_array(np.where(np.isin(labels.array, unknown), rest, labels.array))
        source += f", its own classes {', '.join(map(str, unknown))} left out"
    return labels, source


def padded_size(size: Triple, multiple: int) -> Triple:
    """Round each axis up to a multiple."""
    x, y, z = (-(-n // multiple) * multiple for n in size)
    return (x, y, z)


def weights_used(folder: ModelFolder, masked: bool) -> dict[str, str]:
    """File name -> hash of the networks that are needed, with or without a mask to follow."""
    parts: tuple[Part, ...] = ("autoencoder", "unet", *(("controlnet",) if masked else ()))
    return {folder.config.files[part]: folder.config.sha256[folder.config.files[part]] for part in parts}


def _grid(request: Request, adviser: Adviser) -> tuple[Triple, Spacing]:
    """Size and spacing without a mask; `fov` 'auto' replaces those of the request."""
    given = (None, None) if request.fov == "auto" else (request.size, request.spacing)
    size, spacing = adviser.complete(request.region, *given)
    # What was filled in obeys the same bounds as what is given.
    Request.parse(size=size, spacing=spacing)
    return size, spacing


def _mask_grid(request: Request, labels: Volume) -> tuple[Triple, Spacing]:
    """Size and spacing of the mask in RAS+ order.

    Raises:
        MaisiError: they are out of bounds or not what the request says.
    """
    ras = labels.to_ras()
    Request.parse(size=ras.shape, spacing=ras.spacing_mm)
    if request.size is not None and request.size != ras.shape:
        raise MaisiError(
            f"The mask has {_show(ras.shape)} voxels, not {_show(request.size)}; leave the size out or resample it."
        )
    if request.spacing is not None and not np.allclose(request.spacing, ras.spacing_mm, rtol=0.01):
        raise MaisiError(
            f"The mask has a spacing of {_show(ras.spacing_mm)} mm, not {_show(request.spacing)}; "
            "leave the spacing out or resample the mask (`maisi mask import --spacing`)."
        )
    return ras.shape, ras.spacing_mm


def _regions(request: Request, labels: Volume) -> tuple[tuple[str, ...], list[str]]:
    """The regions asked for, or else those that the mask's structures show; and what to tell the user."""
    ids = ids_in(labels.array)
    notes = []
    if BODY not in ids:
        notes.append(f"The mask has no body ({BODY}) around its structures; the models expect one.")
    regions = request.region or regions_present(ids)
    if not regions:
        notes.append("No structure of the mask tells its region; name the region.")
    if request.guidance > 0 and not TUMORS.keys() & ids:
        notes.append("Guidance strengthens tumours; this mask has none, so it does nothing.")
    ras = labels.to_ras()
    if bare_cords(ras.array, ras.spacing_mm) is not None:
        notes.append(
            "The mask's body is cut away about the spinal cord; the networks are told of a neck there, and the image "
            "is cut as the mask is."
        )
    lacking = [name for name in request.strengthen if label_id(name) not in ids]
    if lacking:
        notes.append(f"The mask has no {' and no '.join(lacking)} to strengthen.")
    return regions, notes


def _show(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:.4g}" for number in numbers)
