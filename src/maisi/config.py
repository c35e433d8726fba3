"""Frozen, strict configuration values: the base class, and reading them from YAML. Knows no configuration itself."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

import pydantic

from maisi.errors import MaisiError


class Config(pydantic.BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


ConfigT = TypeVar("ConfigT", bound=pydantic.BaseModel)


def parse_config(cls: type[ConfigT], values: object, source: str) -> ConfigT:
    """Validate `values` as `cls`; every fault found becomes one `MaisiError` that names `source` and the keys."""
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        raise MaisiError(f"{source}: {explain(error, cls)}") from None


def read_yaml(cls: type[ConfigT], path: Path) -> ConfigT:
    """Read one configuration from a YAML file."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MaisiError(f"Cannot read {path}: {error.strerror}; give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MaisiError(f"{path} is not YAML ({str(error).splitlines()[0]}); correct it there.") from None
    return parse_config(cls, {} if values is None else values, str(path))


def explain(error: pydantic.ValidationError, cls: type[pydantic.BaseModel]) -> str:
    """Turn a pydantic error into one readable sentence, with the nearest known name for an unknown key."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "the value"
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            near = difflib.get_close_matches(key, _all_keys(cls), n=1)
            parts.append(f"unknown key '{where}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        elif item["type"] == "missing":
            parts.append(f"'{where}' is missing")
        elif item["type"] == "value_error":
            parts.append(f"{where}: {item['ctx']['error']}" if item["loc"] else str(item["ctx"]["error"]))
        else:
            parts.append(f"'{where}' is {item['input']!r}, but {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(parts) + "."


def _all_keys(cls: type[pydantic.BaseModel]) -> list[str]:
    keys: list[str] = []
    for name, field in cls.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            keys += _all_keys(field.annotation)
    return keys
