"""Networks that belong together, put into one model folder: hashes, process, scale factor. Trains nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from maisi.conditions import MASK_BITS
from maisi.config import Config, parse_config
from maisi.diffusion.process import process_from_config
from maisi.errors import MaisiError
from maisi.io.files import INDEX, new_folder, sha256, write_json
from maisi.networks.autoencoder import AutoencoderConfig
from maisi.networks.controlnet import ControlNetConfig
from maisi.networks.unet import TrunkConfig, UNetConfig
from maisi.weights.load import CUSTOM_LABELS_KEY, NetworkHeader, load_network, read_header, save_network
from maisi.weights.registry import PARTS, FieldOfView, KindPainting, MaskModel, ModelConfig, Part, network_of
from maisi.weights.storage import Storage

DEFAULT_STEPS = {"rectified_flow": (30, "euler"), "ddpm": (50, "dpm++")}
"""Steps and solver by process: the release's for flow; for DDPM few steps in place of its 1000."""

RANGES = "ranges.json"
"""What the file of quality ranges is called in a model folder."""

LIBRARY = "label_maps"
"""What the folder of label maps is called there."""


def assemble(
    files: Mapping[Part, Path],
    folder: Path,
    name: str,
    *,
    views: Sequence[FieldOfView] = (),
    modalities: Sequence[str] = (),
    steps: int | None = None,
    mask_steps: int | None = None,
    inpaint_steps: int | None = None,
    solver: str | None = None,
    mask_solver: str | None = None,
    mask_guidance: float = 0.0,
    self_guidance: float = 0.0,
    mask_self_guidance: float = 0.0,
    mask_temperature: float = 1.0,
    maps_temperature: float = 1.0,
    inpaint_kinds: Mapping[str, KindPainting] | None = None,
    strengthen: Mapping[str, float] | None = None,
    storage: Storage | None = None,
    crop_spacing_mm: tuple[float, float] | None = None,
    ranges: Path | None = None,
    library: Path | None = None,
    card: str | None = None,
) -> ModelConfig:
    """Make a model folder.

    Args:
        files: safetensors of the autoencoder, the U-Net and, if there are such, the ControlNet and both mask networks.
        folder: to make; must not exist.
        name: what the model is called; `ddpm-ct` and `rflow-ct` get the released models' table of views.
        views: what the model was trained on.
        modalities: likewise; () leaves it open.
        steps: default number of denoising steps.
        mask_steps: default number with a mask; None: the same.
        inpaint_steps: default number in inpainting; None: that with a mask.
        solver: default solver.
        mask_solver: default solver with a mask; None: the same.
        mask_guidance: default strength of label maps.
        self_guidance: default strength of guidance without them.
        mask_self_guidance: the same with them.
        mask_temperature: default standard deviation of the noise with them.
        maps_temperature: the same where label maps are made.
        inpaint_kinds: kind of tumour -> how such are inpainted.
        strengthen: default strengths of single structures of them.
        storage: how to store the weights; None for what the files have.
        crop_spacing_mm: finest and coarsest voxel at which the model inpaints.
        ranges: quality ranges that its images are to be judged by, as `maisi quality learn` makes them.
        library: folder of label maps that come with it, as `maisi mask library build` makes it.
        card: text of its model card, Markdown; None for none.

    Raises:
        MaisiError: a file is missing, damaged or another network, no scale factor is known, or the folder exists.
    """
    headers = _checked_headers(files)
    pins = {} if ranges is None else {RANGES: sha256(ranges)}
    if library is not None:
        pins[f"{LIBRARY}/{INDEX}"] = sha256(library / INDEX)
    scale_factor = _scale_factor(headers["unet"], files["unet"])
    process = process_of(headers["unet"])
    usual_steps, usual_solver = DEFAULT_STEPS[process["kind"]]
    masks = _mask_model(headers["mask_unet"], files["mask_unet"], maps_temperature) if "mask_unet" in files else None
    with new_folder(folder) as part_folder:
        for part, path in files.items():
            _store(path, headers[part], part_folder / f"{part}.safetensors", storage)
        if ranges is not None:
            shutil.copyfile(ranges, part_folder / RANGES)
        if library is not None:
            shutil.copytree(library, part_folder / LIBRARY)
        values: dict[str, Any] = {
            "name": name,
            **{part: f"{part}.safetensors" for part in PARTS if part in files and not part.startswith("mask_")},
            "masks": masks,
            "scale_factor": scale_factor,
            "process": process,
            "sha256": {f"{part}.safetensors": sha256(part_folder / f"{part}.safetensors") for part in files} | pins,
            "size_multiple": size_multiple(headers["autoencoder"], headers["unet"]),
            "field_of_view": [view.model_dump() for view in views],
            "modalities": list(modalities),
            "custom_labels": _own_classes(headers),
            "crop_spacing_mm": crop_spacing_mm,
            "default_steps": steps or usual_steps,
            "mask_steps": mask_steps,
            "inpaint_steps": inpaint_steps,
            "solver": solver or usual_solver,
            "mask_solver": mask_solver,
            "mask_guidance": mask_guidance,
            "self_guidance": self_guidance,
            "mask_self_guidance": mask_self_guidance,
            "mask_temperature": mask_temperature,
            "inpaint_kinds": {kind: how.model_dump() for kind, how in (inpaint_kinds or {}).items()},
            "strengthen": strengthen or {},
            "ranges": None if ranges is None else RANGES,
            "library": None if library is None else LIBRARY,
        }
        config = ModelConfig.model_validate(values)
        if card is not None:
            (part_folder / config.card).write_text(card, encoding="utf-8")
        write_json(part_folder / "model.json", config.model_dump(mode="json"))
    return config


def _checked_headers(files: Mapping[Part, Path]) -> dict[Part, NetworkHeader]:
    headers = {part: read_header(path) for part, path in files.items()}
    for part in ("autoencoder", "unet"):
        if part not in files:
            raise MaisiError(f"A model needs an {part}; name its file.")
    for part, header in headers.items():
        if header.network != network_of(part):
            wanted = network_of(part)
            raise MaisiError(
                f"{files[part]} is a network of the kind {header.network}, not {wanted}; name another file."
            )
    if ("mask_autoencoder" in files) != ("mask_unet" in files):
        raise MaisiError(
            "Label maps are made by two networks; name both --mask-autoencoder and --mask-unet, or neither."
        )
    if "mask_unet" in files:
        bits, context = (headers[p].config for p in ("mask_autoencoder", "mask_unet"))
        if bits.get("in_channels") != MASK_BITS:
            raise MaisiError(f"{files['mask_autoencoder']} is an autoencoder of images; name one of label maps.")
        if context.get("context_channels") is None:
            raise MaisiError(f"{files['mask_unet']} is a network of images; name a mask diffusion network.")
        _require_latents(headers, files, "mask_autoencoder", "mask_unet")
    _require_latents(headers, files, "autoencoder", "unet")
    if "controlnet" in files:
        _require_control(headers, files)
    return headers


def _require_latents(
    headers: Mapping[Part, NetworkHeader], files: Mapping[Part, Path], autoencoder: Part, unet: Part
) -> None:
    coded = _config_of(headers[autoencoder], AutoencoderConfig, files[autoencoder])
    made = _config_of(headers[unet], UNetConfig, files[unet])
    if not coded.latent_channels == made.in_channels == made.out_channels:
        raise MaisiError(
            f"{files[autoencoder]} has latents of {coded.latent_channels} channels, {files[unet]} takes "
            f"{made.in_channels} and gives {made.out_channels}; name networks that were trained together."
        )


def _require_control(headers: Mapping[Part, NetworkHeader], files: Mapping[Part, Path]) -> None:
    control = _config_of(headers["controlnet"], ControlNetConfig, files["controlnet"])
    require_trunk(control, _config_of(headers["unet"], UNetConfig, files["unet"]), files["controlnet"], files["unet"])
    if "maisi.process" in headers["controlnet"].metadata:
        mine, theirs = (
            process_from_config(process_of(headers[part]), str(files[part])) for part in ("controlnet", "unet")
        )
        if not mine.same_path(theirs):
            raise MaisiError(
                f"{files['controlnet']} was trained with another process than {files['unet']}; train it with the "
                "U-Net's."
            )


def require_trunk(control: ControlNetConfig, unet: UNetConfig, control_file: Path, unet_file: Path) -> None:
    """Refuse a ControlNet whose residuals a U-Net cannot take.

    Raises:
        MaisiError: so.
    """
    apart = [name for name in TrunkConfig.model_fields if getattr(control, name) != getattr(unet, name)]
    if apart:
        raise MaisiError(
            f"{control_file} is not of the same make as {unet_file} (they differ in {', '.join(apart)}); name the "
            "ControlNet of this U-Net."
        )


ConfigT = TypeVar("ConfigT", bound=Config)


def _config_of(header: NetworkHeader, kind: type[ConfigT], path: Path) -> ConfigT:
    return parse_config(kind, dict(header.config), str(path))


def _scale_factor(unet: NetworkHeader, path: Path) -> float:
    if unet.scale_factor is None:
        raise MaisiError(f"{path} tells no scale factor; convert or train the U-Net again.")
    return unet.scale_factor


def _mask_model(unet: NetworkHeader, path: Path, temperature: float) -> MaskModel:
    process = process_of(unet)
    steps, solver = DEFAULT_STEPS[process["kind"]]
    return MaskModel(
        autoencoder="mask_autoencoder.safetensors",
        unet="mask_unet.safetensors",
        scale_factor=_scale_factor(unet, path),
        process=process,
        default_steps=steps,
        solver=solver,
        temperature=temperature,
    )


def _own_classes(headers: Mapping[Part, NetworkHeader]) -> dict[int, str]:
    """Classes of the user's own that the ControlNet says it was trained on."""
    metadata = headers["controlnet"].metadata if "controlnet" in headers else {}
    return {int(id): name for id, name in json.loads(metadata.get(CUSTOM_LABELS_KEY, "{}")).items()}


def process_of(unet: NetworkHeader) -> dict[str, Any]:
    """Return the diffusion process a U-Net was trained for: as it says, or as the released ones' inputs tell."""
    if "maisi.process" in unet.metadata:
        stored: dict[str, Any] = json.loads(unet.metadata["maisi.process"])
        return stored
    return {"kind": "rectified_flow" if unet.config.get("num_modalities") else "ddpm"}


def size_multiple(autoencoder: NetworkHeader, unet: NetworkHeader) -> int:
    """Image axes must be multiples of this: the compression times the U-Net's factor."""
    levels = len(autoencoder.config["channels"]) + len(unet.config["channels"]) - 2
    return int(2**levels)


def _store(path: Path, header: NetworkHeader, target: Path, storage: Storage | None) -> None:
    """Copy a file bit by bit where it has that storage already, else write it anew."""
    if storage in (None, header.storage):
        shutil.copyfile(path, target)
        return
    kept = {k: v for k, v in header.metadata.items() if k not in ("maisi.network", "maisi.config")}
    save_network(target, load_network(path, network=header.network), metadata=kept, storage=storage)
