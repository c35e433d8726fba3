"""The stages by name: start one from a YAML file, and print a commented example of such a file."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import pydantic

from maisi.config import Config, read_yaml
from maisi.errors import MaisiError

if TYPE_CHECKING:
    from maisi.training.loop import Stage

StageName = Literal["autoencoder", "diffusion", "controlnet", "mask-autoencoder", "mask-diffusion"]
STAGES: tuple[str, ...] = get_args(StageName)

PLACEHOLDERS = {
    "data": "prepared",
    "autoencoder": "runs/mask-autoencoder/mask_autoencoder.safetensors",
    "unet": "runs/diffusion/unet.safetensors",
    "steps": 10000,
}
"""Values shown for settings that have no default."""


def run_stage(stage: str, path: Path, folder: Path) -> int:
    """Train `stage` as the YAML file says, in `folder`; resume what is there. Return the step reached.

    Raises:
        MaisiError: the file has a wrong or unknown key, data is missing, or the folder holds another run.
    """
    return start(_run_class(stage), _stage_class(stage), path, folder)


def start(run_class: type[Config], stage: Callable[[Any], Stage], path: Path, folder: Path) -> int:
    """As `run_stage`, for any stage: `run_class` is its configuration, of which `stage` makes what is trained."""
    from maisi.training.loop import LoopConfig, run

    config = read_yaml(run_class, path)
    missing = [str(p) for p in _paths(config) if not p.exists()]
    if missing:
        raise MaisiError(f"{path} names what does not exist: {', '.join(missing)}; correct the paths.")
    loop = config.loop  # type: ignore[attr-defined]
    assert isinstance(loop, LoopConfig)
    return run(stage(config), loop, config, folder)


def example_yaml(stage: str) -> str:
    """Return a YAML file with every setting of a stage, its default and what it means."""
    return example_of(_run_class(stage), f"maisi train {stage}")


def example_of(run_class: type[Config], command: str) -> str:
    """Return a YAML file with every setting of a run that `command` starts."""
    head = f"# {command} RUN.yaml -o FOLDER\n# Settings that are left out take the values shown.\n\n"
    return head + "\n".join(_example_lines(run_class, "")) + "\n"


def example_views() -> str:
    """Return a YAML file of views for `maisi prepare --views`, with every setting and what it means."""
    from maisi.data.views import TumorViews, ViewConfig

    kind = ViewConfig(size=(96, 80, 80), spacing_mm=(3.6, 4.8), views=2, rotate_degrees=8, tumors=TumorViews())
    lines = "\n".join(_example_lines(ViewConfig, "    ", kind))
    head = "# maisi prepare PREPARED --views VIEWS.yaml --autoencoder FILE -o LATENTS\n"
    head += "# Kinds of views: each is drawn of every case that it suits. Most settings may be left out.\n"
    return f"{head}\nviews:\n  -\n{lines}\n# of sizes, places and turns\nseed: 0\n"


def _run_class(stage: str) -> type[Config]:
    if stage not in STAGES:
        raise MaisiError(f"There is no stage '{stage}'; choose one of {', '.join(STAGES)}.")
    return getattr(_module(stage), f"{_camel(stage)}Run")  # type: ignore[no-any-return]


def _stage_class(stage: str) -> Callable[[Any], Stage]:
    return getattr(_module(stage), f"{_camel(stage)}Stage")  # type: ignore[no-any-return]


def _module(stage: str) -> ModuleType:
    """Only the stage's own module is imported, since each imports what it trains."""
    return import_module(f"maisi.training.{stage.replace('-', '_')}")


def _camel(stage: str) -> str:
    return "ControlNet" if stage == "controlnet" else "".join(word.capitalize() for word in stage.split("-"))


def _paths(config: Config) -> list[Path]:
    return [value for name in type(config).model_fields if isinstance(value := getattr(config, name), Path)]


def _example_lines(cls: type[pydantic.BaseModel], indent: str, values: pydantic.BaseModel | None = None) -> list[str]:
    """Lines for each field of `cls`: the meaning as a comment, then name and value."""
    meanings = _meanings(cls)
    lines = []
    for name, field in cls.model_fields.items():
        if name in meanings:
            lines.append(f"{indent}# {meanings[name]}")
        value = getattr(values, name) if values is not None else field.get_default(call_default_factory=True)
        nested = value if isinstance(value, pydantic.BaseModel) else None
        annotation = field.annotation
        if nested is not None:
            lines += [f"{indent}{name}:", *_example_lines(type(nested), indent + "  ", nested)]
        elif field.is_required() and values is None and isinstance(annotation, type) and issubclass(annotation, Config):
            lines += [f"{indent}{name}:", *_example_lines(annotation, indent + "  ")]
        elif field.is_required() and values is None:
            lines.append(f"{indent}{name}: {json.dumps(_placeholder(cls, name))}")
        else:
            lines.append(f"{indent}{name}: {_yaml(value)}")
    return lines


def _placeholder(cls: type[pydantic.BaseModel], name: str) -> object:
    from maisi.training.denoising import DenoisingRun

    return "latents" if name == "data" and issubclass(cls, DenoisingRun) else PLACEHOLDERS[name]


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, float):
        # YAML reads 1e-05 as text: it wants a point in the mantissa.
        text = repr(value)
        return re.sub(r"^(-?\d+)e", r"\1.0e", text)
    if isinstance(value, dict):
        return json.dumps(value)
    return json.dumps(value if value is None or isinstance(value, (bool, int, str)) else str(value))


def _meanings(cls: type) -> dict[str, str]:
    """Explanations of fields, from the 'Attributes:' part of the docstrings of `cls` and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, part = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", part, re.MULTILINE):
            found[match[1]] = " ".join(match[2].split())
    return found
