"""Models: folders with a `model.json` that says which networks belong together. Imports no torch."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from maisi.config import Config, parse_config
from maisi.errors import MaisiError
from maisi.io.files import INDEX, sha256
from maisi.tumors import KINDS
from maisi.weights.load import load_network, read_header
from maisi.weights.released_models import released_models

if TYPE_CHECKING:
    import torch
    from torch import nn

CARRIED = Path(__file__).resolve().parent.parent / "models"
"""The folder of the models that the package carries, one folder each."""

Part = Literal["autoencoder", "unet", "controlnet", "mask_autoencoder", "mask_unet"]
PARTS: tuple[Part, ...] = ("autoencoder", "unet", "controlnet", "mask_autoencoder", "mask_unet")


def network_of(part: Part) -> str:
    """Return the kind of network (of `load.NETWORKS`) that a part of a model is."""
    return part.removeprefix("mask_")


class FieldOfView(Config):
    """One kind of volume that a model was trained on.

    Attributes:
        regions: what the volumes show, top to bottom.
        size: median number of voxels along X, Y, Z.
        spacing_mm: median spacing in mm.
        share: part of the training volumes, 0-1.
    """

    regions: tuple[str, ...]
    size: tuple[PositiveInt, PositiveInt, PositiveInt]
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    share: float = Field(default=1.0, ge=0, le=1)


class MaskModel(Config):
    """The networks of a model that make label maps; their process and latents are their own.

    Attributes:
        autoencoder: file name of the mask autoencoder, in the model's folder.
        unet: file name of the mask diffusion network.
        scale_factor: latents are multiplied by this before diffusion.
        process: the diffusion process, as `diffusion` reads it.
        default_steps: sampling steps unless told otherwise.
        solver: sampling method unless told otherwise.
        temperature: standard deviation of the noise unless told otherwise; see `Request`.
    """

    autoencoder: str
    unet: str
    scale_factor: PositiveFloat
    process: dict[str, Any]
    default_steps: PositiveInt
    solver: str
    temperature: PositiveFloat = 1.0

    @field_validator("autoencoder", "unet")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        return plain_name(value)


class KindPainting(Config):
    """How a model inpaints tumours of one kind, and healthy tissue in their place.

    Attributes:
        mask_guidance: guidance by the labels. Below 0 it goes back to what the U-Net makes of what is around: a
            ControlNet may hardly know a host.
        temperature: standard deviation of the noise. Below 1 tissue is smoother: a U-Net that knows little of an organ
            makes other things of strong noise.
    """

    mask_guidance: float = Field(default=0.0, ge=-1, le=100)
    temperature: float = Field(default=1.0, gt=0, le=2)


class ModelConfig(Config):
    """The content of `model.json`.

    Attributes:
        name: what the model is called.
        autoencoder: file name of the autoencoder, in the model's folder.
        unet: file name of the denoising network.
        controlnet: file name of the network that follows masks; None for a model without.
        scale_factor: latents are multiplied by this before diffusion.
        process: the diffusion process, as `diffusion` reads it.
        sha256: the hash of each of the files above, by file name.
        size_multiple: image axes must be multiples of this many voxels; the pipeline pads.
        field_of_view: what the model was trained on; may be empty.
        modalities: that the model was trained on; empty: not said, and all that its networks can be told are taken.
        custom_labels: classes of the user's own that the model was trained on, id -> name.
        crop_spacing_mm: finest and coarsest voxel at which the model inpaints; None: that of any image.
        default_steps: sampling steps unless the request says otherwise.
        mask_steps: the same with a mask; None: `default_steps`.
        inpaint_steps: the same in inpainting; None: those with a mask.
        solver: sampling method unless the request says otherwise.
        mask_solver: the same with a mask, inpainting included; None: `solver`.
        mask_guidance: of generation from a mask, unless the request says otherwise; see `Request`.
        self_guidance: of generation without a mask, unless the request says otherwise; see `Request`.
        mask_self_guidance: the same from a mask.
        mask_temperature: of generation from a mask, unless the request says otherwise; see `Request`. 1 without a mask.
        inpaint_kinds: kind of tumour -> how such are painted or taken out, where that is not as usual.
        strengthen: structures of a mask, unless the request says otherwise of them; see `Request`.
        card: file name of the model card.
        masks: the networks that make label maps; None for a model without.
        ranges: file name of the quality ranges that its images are judged by; None: those that the package carries.
        library: name of the folder of label maps that come with the model; None for a model without. The hash of its
            index stands in `sha256`, those of the maps stand in the index.
    """

    name: str
    autoencoder: str
    unet: str
    controlnet: str | None = None
    scale_factor: PositiveFloat
    process: dict[str, Any]
    sha256: dict[str, str]
    size_multiple: PositiveInt
    field_of_view: tuple[FieldOfView, ...] = ()
    modalities: tuple[str, ...] = ()
    custom_labels: dict[int, str] = Field(default={})
    crop_spacing_mm: tuple[PositiveFloat, PositiveFloat] | None = None
    default_steps: PositiveInt
    mask_steps: PositiveInt | None = None
    inpaint_steps: PositiveInt | None = None
    solver: str
    mask_solver: str | None = None
    mask_guidance: NonNegativeFloat = 0.0
    self_guidance: NonNegativeFloat = 0.0
    mask_self_guidance: NonNegativeFloat = 0.0
    mask_temperature: PositiveFloat = 1.0
    inpaint_kinds: dict[str, KindPainting] = Field(default={})
    strengthen: dict[str, PositiveFloat] = Field(default={})
    card: str = "MODEL_CARD.md"
    masks: MaskModel | None = None
    ranges: str | None = None
    library: str | None = None

    @field_validator("autoencoder", "unet", "controlnet", "card", "ranges", "library")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        return None if value is None else plain_name(value)

    @field_validator("inpaint_kinds")
    @classmethod
    def _known_kinds(cls, value: dict[str, KindPainting]) -> dict[str, KindPainting]:
        unknown = [name for name in value if name not in KINDS]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is no kind of tumour; these are: {', '.join(KINDS)}")
        return value

    @model_validator(mode="after")
    def _every_file_pinned(self) -> ModelConfig:
        more = [name for name in (self.ranges, self.library_index) if name is not None]
        for file in (*self.files.values(), *more):
            pin = self.sha256.get(file, "")
            if len(pin) != 64 or any(c not in "0123456789abcdef" for c in pin):
                raise ValueError(f"sha256 has no hash (64 hexadecimal digits) of '{file}'")
        return self

    @property
    def library_index(self) -> str | None:
        """Where the index of its label maps is, below the model's folder."""
        return None if self.library is None else f"{self.library}/{INDEX}"

    def usual_steps(self, masked: bool) -> int:
        """Sampling steps where the request says none."""
        return self.mask_steps if masked and self.mask_steps is not None else self.default_steps

    def usual_inpaint_steps(self) -> int:
        """Sampling steps of inpainting where the request says none."""
        return self.usual_steps(masked=True) if self.inpaint_steps is None else self.inpaint_steps

    def usual_solver(self, masked: bool) -> str:
        """Name of the solver where the request names none."""
        return self.mask_solver if masked and self.mask_solver is not None else self.solver

    def usual_self_guidance(self, masked: bool) -> float:
        """Strength of self-guidance where the request says none."""
        return self.mask_self_guidance if masked else self.self_guidance

    def usual_temperature(self, masked: bool) -> float:
        """Standard deviation of the noise where the request says none."""
        return self.mask_temperature if masked else 1.0

    @property
    def files(self) -> dict[Part, str]:
        """File name of each network that the model has."""
        names: dict[Part, str] = {"autoencoder": self.autoencoder, "unet": self.unet}
        if self.controlnet is not None:
            names["controlnet"] = self.controlnet
        if self.masks is not None:
            names |= {"mask_autoencoder": self.masks.autoencoder, "mask_unet": self.masks.unet}
        return names


def plain_name(value: str) -> str:
    """Return the name of a file; ValueError for a path."""
    if value in ("", ".", "..") or Path(value).name != value or "\\" in value:
        raise ValueError(f"'{value}' is not the name of a file in the model's folder")
    return value


@dataclass(frozen=True)
class ModelFolder:
    """A model that was found: its folder and its validated `model.json`."""

    folder: Path
    config: ModelConfig

    def path(self, part: Part) -> Path:
        """Where the file of one network is.

        Raises:
            MaisiError: the model has no such network.
        """
        if part not in self.config.files:
            raise MaisiError(f"The model '{self.config.name}' has no {part}; choose a model that has one.")
        return self.folder / self.config.files[part]

    def verify(self, part: Part) -> None:
        """Compare a file with its hash in `model.json`.

        Raises:
            MaisiError: they differ.
        """
        self._pinned(self.path(part).name)

    def ranges(self) -> Path | None:
        """Where the file of its quality ranges is, compared with its hash; None for a model without.

        Raises:
            MaisiError: the file is missing, or not the one that `model.json` was written for.
        """
        if self.config.ranges is None:
            return None
        return self._pinned(self.config.ranges)

    def library(self) -> Path | None:
        """Where the folder of its label maps is, its index compared with its hash; None for a model without.

        Raises:
            MaisiError: as `ranges`.
        """
        index = self.config.library_index
        return None if index is None else self._pinned(index).parent

    def _pinned(self, name: str) -> Path:
        path = self.folder / name
        if sha256(path) != self.config.sha256[name]:
            raise MaisiError(f"{path} is not the file that model.json was written for; get a fresh copy of both.")
        return path

    def load(self, part: Part, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """Load one network after its hash was checked; `device` and `dtype` as in `load_network`."""
        self.verify(part)
        return load_network(self.path(part), device, dtype, network=network_of(part))


def carried_models() -> tuple[str, ...]:
    """Names of the models that the package carries."""
    return tuple(sorted(path.parent.name for path in CARRIED.glob("*/model.json")))


def find_model(name_or_folder: str | Path) -> ModelFolder:
    """Find a model by the name of a carried one, or by its folder; read and check everything but the tensors.

    Raises:
        MaisiError: there is no such model, `model.json` is wrong, or a file is missing, truncated or of
            another network.
    """
    folder = _folder(name_or_folder)
    source = folder / "model.json"
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise MaisiError(f"Cannot read {source}: {error.strerror}; give a folder with a model.json.") from None
    except (ValueError, RecursionError):
        raise MaisiError(f"{source} is not JSON; get a fresh copy.") from None
    model = ModelFolder(folder, parse_config(ModelConfig, values, str(source)))
    for part in model.config.files:
        held = read_header(model.path(part)).network
        if held != network_of(part):
            wanted = network_of(part)
            raise MaisiError(f"{model.path(part)} holds the network '{held}' in place of '{wanted}'; correct {source}.")
    model.ranges()
    model.library()
    return model


def _folder(name_or_folder: str | Path) -> Path:
    """A carried model's name wins over a folder of the same name: the name then means the same everywhere."""
    names = carried_models()
    if str(name_or_folder) in names:
        return CARRIED / str(name_or_folder)
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    if str(name_or_folder) in released_models():
        raise MaisiError(
            f"The released weights '{name_or_folder}' are not here yet: `maisi weights fetch {name_or_folder} -o "
            "FOLDER` brings them, then give that folder."
        )
    near = difflib.get_close_matches(str(name_or_folder), names, n=1)
    guess = f" (did you mean '{near[0]}'?)" if near else ""
    known = ", ".join(names) or "none"
    raise MaisiError(
        f"There is no model '{name_or_folder}'{guess}; give a carried model ({known}) or a model's folder."
    )
