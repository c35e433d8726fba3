"""maisi: synthetic 3D CT with labels. `maisi.load("tiny").generate(...)` is the shortest way in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Conditions", "MaisiError", "Request", "Volume", "__version__", "inpaint", "load"]

if TYPE_CHECKING:
    from maisi.conditions import Conditions
    from maisi.errors import MaisiError
    from maisi.generation.inpaint import inpaint
    from maisi.generation.pipeline import load
    from maisi.request import Request
    from maisi.volume import Volume

_HOMES = {
    "Conditions": "maisi.conditions",
    "MaisiError": "maisi.errors",
    "Request": "maisi.request",
    "Volume": "maisi.volume",
    "inpaint": "maisi.generation.inpaint",
    "load": "maisi.generation.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import maisi` needs neither numpy nor torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'maisi' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
