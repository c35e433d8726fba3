"""Which files of which repositories make up each released model, and under which licence they are. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from maisi.config import Config
from maisi.errors import MaisiError
from maisi.weights.hub import HubFile


class ReleasedModel(Config):
    """What belongs to one released model.

    Attributes:
        about: what it makes.
        licence: that its weights are under.
        licence_url: where that can be read.
        modalities: that it was trained on.
        advice: what to say when asking it for images; may be empty.
        parts: network -> repository on the hub, and file in it.
    """

    about: str
    licence: str
    licence_url: str
    modalities: tuple[str, ...]
    advice: str
    parts: dict[str, tuple[str, str]]

    @property
    def files(self) -> dict[str, HubFile]:
        """Where each network is on the hub."""
        return {part: HubFile(*place) for part, place in self.parts.items()}


@cache
def released_models() -> Mapping[str, ReleasedModel]:
    """Return the released models by name."""
    text = (files("maisi.weights") / "released_models.json").read_text(encoding="utf-8")
    return {name: ReleasedModel.model_validate(values) for name, values in json.loads(text).items()}


def released_model(name: str) -> ReleasedModel:
    """Return one of `released_models`.

    Raises:
        MaisiError: there is none of that name.
    """
    models = released_models()
    if name not in models:
        raise MaisiError(f"There is no released model '{name}'; choose one of {', '.join(models)}.")
    return models[name]
