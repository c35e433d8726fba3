"""`Request`: what someone wants generated, checked once, whichever door it came through. Knows no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field

from maisi.anatomy import BACKGROUND, BODY, label_name, named_sides, parse_modality, sort_regions
from maisi.config import Config, parse_config
from maisi.errors import MaisiError
from maisi.tumors import TumorWish, parse_tumors

SPACING_RANGE_MM = (0.3, 10.0)
SIZE_RANGE = (1, 1024)
MAX_VOXELS = 2 * 512 * 512 * 768
"""Twice the largest volume of the paper."""

SEED_LIMIT = 2**63

ORGAN_SIZE_RANGE = (0.3, 2.0)
"""Factors on the volume of a structure that may be asked for."""


def _items(value: object) -> list[Any]:
    """Split '128,128,64', '128x128x64' or a sequence into a list; a lone value becomes a list of one."""
    if isinstance(value, str):
        return [part for part in re.split(r"[\s,;x]+", value.strip()) if part]
    if hasattr(value, "tolist"):  # an array: asked so, a request that is refused never waits for NumPy's import
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _numbers(value: object, what: str, mend: str) -> list[float]:
    items = _items(value)
    try:
        numbers = [float(item) for item in items]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is not {what}; {mend}") from None
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{value!r} is not {what}; {mend}")
    return numbers


def _size(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    low, high = SIZE_RANGE
    mend = f"give X, Y, Z as three whole numbers from {low} to {high}, such as 128,128,128"
    numbers = _numbers(value, "a size in voxels", mend)
    if not all(number.is_integer() and low <= number <= high for number in numbers):
        raise ValueError(f"{_show(numbers)} is not a size in voxels; {mend}")
    if math.prod(numbers) > MAX_VOXELS:
        raise ValueError(
            f"{_show(numbers)} is {math.prod(numbers) / 1e6:.0f} million voxels; "
            f"stay within {MAX_VOXELS / 1e6:.0f} million, such as 512,512,768"
        )
    return tuple(int(number) for number in numbers)


def _spacing(value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    low, high = SPACING_RANGE_MM
    mend = f"give X, Y, Z in mm, each from {low:g} to {high:g}, such as 1.5,1.5,2"
    numbers = _numbers(value, "a spacing", mend)
    if not all(low <= number <= high for number in numbers):
        raise ValueError(f"{_show(numbers)} is not a usable spacing; {mend}")
    return tuple(numbers)


def _regions(value: object) -> tuple[str, ...]:
    items = [] if value is None else [value] if isinstance(value, str) else _items(value)
    names = [part for item in items for part in re.split(r"[,;+]", str(item)) if part.strip()]
    try:
        return sort_regions(names)
    except MaisiError as error:
        raise ValueError(str(error).rstrip(".")) from None


def _modality(value: object) -> str:
    try:
        return parse_modality(str(value))
    except MaisiError as error:
        raise ValueError(str(error).rstrip(".")) from None


def _show(numbers: list[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _wishes(value: object) -> tuple[Any, ...]:
    items = [] if value is None else [value] if isinstance(value, str) else _sequence(value)
    for item in items:
        if not isinstance(item, (str, dict, TumorWish)):
            raise ValueError(f"{item!r} asks for no tumour; write it like liver:25mm")
    try:
        return parse_tumors(item if not isinstance(item, dict) else TumorWish.model_validate(item) for item in items)
    except MaisiError as error:
        raise ValueError(str(error).rstrip(".")) from None


def _names(value: object) -> tuple[str, ...]:
    """Label names, each as the vocabulary spells it."""
    items = [] if value is None else [value] if isinstance(value, str) else _sequence(value)
    names = [part.strip() for item in items for part in str(item).split(",") if part.strip()]
    try:
        return tuple(dict.fromkeys(label_name(id) for name in names for id in named_sides(name)))
    except MaisiError as error:
        raise ValueError(str(error).rstrip(".")) from None


def _organ_sizes(value: object) -> dict[str, float]:
    return _by_structure(value, parse_anatomy_sizes)


def _strengths(value: object) -> dict[str, float]:
    return _by_structure(value, partial(_parse_numbers, noun="strength", example="spinal cord=3", range_=(0.0, 100.0)))


def _by_structure(value: object, parse: Callable[[Any], dict[str, float]]) -> dict[str, float]:
    try:
        return parse(value if isinstance(value, Mapping) else _sequence(value or ()))
    except MaisiError as error:
        raise ValueError(str(error).rstrip(".")) from None


def parse_anatomy_sizes(wishes: Mapping[str, float] | Iterable[str]) -> dict[str, float]:
    """Read factors on the volumes of structures, {'pancreas': 0.7} or 'pancreas=0.7', by the vocabulary's names.

    'kidney' means both sides.

    Raises:
        MaisiError: no such structure, the same one twice, or a factor outside `ORGAN_SIZE_RANGE`.
    """
    return _parse_numbers(wishes, "size", "pancreas=0.7", ORGAN_SIZE_RANGE)


def _parse_numbers(
    wishes: Mapping[str, float] | Iterable[str], noun: str, example: str, range_: tuple[float, float]
) -> dict[str, float]:
    """Name of the vocabulary -> number, from a mapping or words such as `example`; `noun` is what the number is."""
    pairs = wishes.items() if isinstance(wishes, Mapping) else [str(text).partition("=")[::2] for text in wishes]
    numbers: dict[str, float] = {}
    low, high = range_
    for name, given in pairs:
        try:
            number = float(given)
        except (TypeError, ValueError, OverflowError):
            raise MaisiError(f"'{name}={given}' is no {noun} of a structure; write it as {example}.") from None
        if not low <= number <= high:
            raise MaisiError(f"The {noun} {given} of '{name}' is out of range; give a factor from {low:g} to {high:g}.")
        for id in named_sides(name.strip()):
            if id in (BACKGROUND, BODY):
                raise MaisiError(f"'{name}' has no {noun} of its own; name an organ.")
            if label_name(id) in numbers:
                raise MaisiError(f"'{label_name(id)}' is given two {noun}s; leave one of them out.")
            numbers[label_name(id)] = number
    return numbers


def _sequence(value: object) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{value!r} is no list of words")
    return list(value)


class Request(Config):
    """One order for synthetic volumes. Where it is written to is not part of it.

    Attributes:
        region: body regions to cover, kept from top to bottom; aliases such as 'thorax' are accepted.
        size: voxels along X, Y, Z; None leaves it to the model, or to the mask.
        spacing: mm along X, Y, Z; None as for `size`.
        seed: with the item's number it decides the noise, and so every byte of the item.
        count: how many items.
        mask: a label map that the image is to follow; its grid is then the image's. With `image`: that image's labels.
        structure: names of structures that the volume is to show; without `mask` one is found that has them.
            'kidney' means both sides, here and in `keep`.
        tumor: tumours to grow in the mask, see `maisi.tumors.parse_tumor`.
        anatomy_size: structure -> factor on its volume, 0.3 to 2.
        keep: names of the structures that the written labels keep; () is all.
        library: folder of label maps to find a mask in.
        image: a real CT to paint into (inpainting).
        removal: paint healthy tissue where the labels have tumours (inpainting); `tumor` "none" says the same.
        by: who paints (inpainting): the model's networks, or rules that need none.
        retries: how often an item that follows a mask is made again, at most, where its check does not pass.
        ranges: quality ranges that items are judged by (`maisi quality learn`); None: the model's, or the carried ones.
        model: the name of a carried model, or a model folder.
        steps: denoising steps; None takes the model's default.
        modality: a key of `anatomy.MODALITIES`.
        guidance: strength of classifier-free guidance; 0 is off.
        mask_guidance: how far to go away from what is made without the mask; 0 is off, None the model's default.
        self_guidance: how far to go away from what the model makes when it takes its input to be noisier than it is,
            for another run of the networks each step; 0 is off, None the model's default.
        temperature: standard deviation of the noise that it starts from (and of what some solvers add); below 1 items
            are smoother and more alike, above 1 more varied; None the model's default.
        strengthen: structure -> how far to go away from what is made with a mask that lacks it, for another run of
            the networks each step where the mask has it; 0 is off. The model's default holds for those not named, and
            further attempts may change that.
        fov: 'given' takes `size` and `spacing` as they are, 'auto' picks them from the regions.
        solver: name of a solver; None takes the model's default.
    """

    region: Annotated[tuple[str, ...], BeforeValidator(_regions)] = ()
    size: Annotated[tuple[int, int, int] | None, BeforeValidator(_size)] = None
    spacing: Annotated[tuple[float, float, float] | None, BeforeValidator(_spacing)] = None
    seed: int = Field(default=0, ge=0, lt=SEED_LIMIT)
    count: int = Field(default=1, ge=1, le=100_000)
    mask: Path | None = None
    structure: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    tumor: Annotated[tuple[TumorWish, ...], BeforeValidator(_wishes)] = ()
    anatomy_size: Annotated[dict[str, float], BeforeValidator(_organ_sizes)] = Field(default={})
    keep: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    library: Path | None = None
    image: Path | None = None
    removal: bool = False
    ranges: Path | None = None
    by: Literal["network", "rules"] = "network"
    model: str = Field(default="tiny", min_length=1)
    steps: int | None = Field(default=None, ge=1, le=1000)
    modality: Annotated[str, BeforeValidator(_modality)] = "ct"
    guidance: float = Field(default=0.0, ge=0, le=100, allow_inf_nan=False)
    mask_guidance: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    self_guidance: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    temperature: float | None = Field(default=None, gt=0, le=2, allow_inf_nan=False)
    strengthen: Annotated[dict[str, float], BeforeValidator(_strengths)] = Field(default={})
    fov: Literal["given", "auto"] = "given"
    solver: str | None = None
    retries: int = Field(default=2, ge=0, le=10)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _none_is_removal(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tumor") in ("none", ["none"], ("none",)):
            return {**values, "tumor": (), "removal": True}
        return values

    @pydantic.model_validator(mode="after")
    def _check_fov(self) -> Request:
        if self.fov == "auto" and not self.region and self.mask is None:
            raise ValueError("fov 'auto' picks size and spacing from the regions; name at least one region")
        if self.fov == "auto" and self.mask:
            raise ValueError("fov 'auto' picks size and spacing, which are the mask's here; leave one of them out")
        if self.mask and self.library:
            raise ValueError("the mask is given, so none is looked for in a library; leave one of them out")
        return self

    @classmethod
    def parse(cls, **values: Any) -> Request:
        """Check `values` and make a request of them.

        Raises:
            MaisiError: a value or a key cannot be used; one sentence names every fault.
        """
        return parse_config(cls, values, "The request")


def item_seed(seed: int, item: int, attempt: int = 0) -> int:
    """Return the seed of one item, from 0 to 2**63 - 1: whatever the batch, the device and the count.

    An item that is made again takes another `attempt`; the first is 0.

    Raises:
        MaisiError: the item's number is negative.
    """
    if item < 0:
        raise MaisiError(f"There is no item {item}; items are numbered from 0.")
    import numpy as np

    again = (attempt,) if attempt else ()
    state = np.random.SeedSequence((seed, item), spawn_key=again).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
