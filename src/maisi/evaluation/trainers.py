"""Every trainer of segmenters by its name, and what they trained, opened from its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from maisi.config import parse_config
from maisi.errors import MaisiError
from maisi.evaluation.auto3dseg import Auto3dseg, Auto3dsegConfig
from maisi.evaluation.external_trainer import ExternalSegmenter, ExternalTrainer, Tool
from maisi.evaluation.nnunet import Nnunet, NnunetConfig
from maisi.evaluation.trainer import FolderSegmenter, Trainer, read_about

BUILT_IN = "segresnet"

_TOOLS: Mapping[str, Callable[[Mapping[str, Any]], Tool]] = MappingProxyType(
    {
        "nnunet": lambda settings: Nnunet(parse_config(NnunetConfig, settings, "nnU-Net")),
        "auto3dseg": lambda settings: Auto3dseg(parse_config(Auto3dsegConfig, settings, "Auto3DSeg")),
    }
)

TRAINERS = (BUILT_IN, *_TOOLS)


def make_trainer(name: str, settings: Mapping[str, Any]) -> Trainer:
    """Return a trainer that can be used here.

    Args:
        name: one of `TRAINERS`.
        settings: fields of its configuration; what is missing is as it has it.

    Raises:
        MaisiError: no such trainer, a setting that cannot be used, or it is not installed.
    """
    if name not in TRAINERS:
        raise MaisiError(f"Unknown trainer '{name}'; choose from {', '.join(TRAINERS)}.")
    if name != BUILT_IN:
        tool = _TOOLS[name](settings)
        tool.version()
        return ExternalTrainer(tool)
    from maisi.evaluation.trained_segmenter import SegmenterConfig, SegResNetTrainer, require_monai

    config = parse_config(SegmenterConfig, settings, "The segmenter")
    require_monai()
    return SegResNetTrainer(config)


def open_segmenter(folder: Path) -> FolderSegmenter:
    """Open what any of the trainers made.

    Raises:
        MaisiError: it is no segmenter, its files do not belong together, or its program is not installed.
    """
    values = read_about(folder)
    name = values.get("trainer") if isinstance(values, dict) else None
    if isinstance(name, str) and name in _TOOLS:
        return ExternalSegmenter.open(folder, _TOOLS[name](values.get("config", {})))
    from maisi.evaluation.trained_segmenter import TrainedSegmenter

    return TrainedSegmenter.open(folder)
