"""Files of feature networks that others published: how each is told, and what its tensors are called here.

`published_keys.json` says so, form by form; this module only applies it. Reads no file and builds no network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from maisi.errors import MaisiError
from maisi.weights.infer import Shapes
from maisi.weights.load import FEATURE_NETWORKS

_Row = tuple[re.Pattern[str], str]


@dataclass(frozen=True)
class Form:
    """One kind of published file.

    Attributes:
        network: one of `FEATURE_NETWORKS`.
        variant: of its configuration.
        about: what the file is called where it is published.
        tells: tensors, with their shapes, that tell it.
        dropped: patterns of names that are not needed.
        rows: patterns of names, and what these become.
        heads: whether LPIPS's learned weights come in a file of their own.
    """

    network: str
    variant: str
    about: str
    tells: Mapping[str, tuple[int, ...]]
    dropped: tuple[re.Pattern[str], ...]
    rows: tuple[_Row, ...]
    heads: bool

    def fits(self, shapes: Shapes) -> bool:
        """Whether a file with these tensors is of this form."""
        return all(shapes.get(name) == shape for name, shape in self.tells.items())

    def drops(self, name: str) -> bool:
        """Whether a tensor is not needed."""
        return any(pattern.fullmatch(name) for pattern in self.dropped)

    def rename(self, name: str) -> str:
        """What a tensor is called here."""
        found = (match.expand(ours) for pattern, ours in self.rows if (match := pattern.fullmatch(name)))
        return next(found, name)


def form_of(shapes: Shapes, network: str | None, source: Path, heads: Path | None) -> Form | None:
    """Tell which published file has tensors of these names and shapes.

    Args:
        shapes: of the file's tensors, by name.
        network: what it has to hold (one of `FEATURE_NETWORKS`); None for any.
        source: what messages call it.
        heads: the file of LPIPS's learned weights that comes with it.

    Returns:
        None where it is none of them, and `network` asks for none.

    Raises:
        MaisiError: it is not what `network` asks for, or heads are missing or of no use.
    """
    form = next((form for form in forms() if form.fits(shapes)), None)
    if form is None and _only_heads(shapes):
        raise MaisiError(
            f"{source} has LPIPS's learned weights alone; give the file of its network, and this one as its heads."
        )
    if network is not None and (form is None or form.network != network):
        known = "; ".join(one.about for one in forms() if one.network == network)
        raise MaisiError(f"{source} is no published file of '{network}'; give one of these: {known}.")
    if heads is not None and not (form and form.heads):
        raise MaisiError(f"{source} takes no heads; leave {heads} out, or give the network that it belongs to.")
    if form and form.heads and heads is None:
        raise MaisiError(f"{source} is a network without LPIPS's learned weights; give their file with --lpips-heads.")
    return form


def head_names(names: Iterable[str], source: Path) -> dict[str, str]:
    """What the tensors in a file of LPIPS's learned weights are called here.

    Raises:
        MaisiError: there are others in it.
    """
    pattern, ours = re.compile(_table()["heads"][0]), _table()["heads"][1]
    matches = {name: pattern.fullmatch(name) for name in names}
    foreign = [name for name, match in matches.items() if match is None]
    if foreign:
        raise MaisiError(
            f"{source}: '{foreign[0]}' is no learned weight of LPIPS; give alex.pth, vgg.pth or squeeze.pth."
        )
    return {name: match.expand(ours) for name, match in matches.items() if match}


@cache
def forms() -> tuple[Form, ...]:
    """All published files that can be converted."""
    return tuple(_form(**entry) for entry in _table()["forms"])


def _form(
    network: str,
    variant: str,
    about: str,
    tells: Mapping[str, list[int]],
    dropped: Iterable[str] = (),
    rows: Iterable[tuple[str, str]] = (),
    heads: bool = False,
) -> Form:
    assert network in FEATURE_NETWORKS, network
    return Form(
        network,
        variant,
        about,
        {name: tuple(shape) for name, shape in tells.items()},
        tuple(re.compile(pattern) for pattern in dropped),
        tuple((re.compile(pattern), ours) for pattern, ours in rows),
        heads,
    )


def _only_heads(shapes: Shapes) -> bool:
    return bool(shapes) and all(re.fullmatch(_table()["heads"][0], name) for name in shapes)


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((files("maisi.weights") / "published_keys.json").read_text(encoding="utf-8"))
    return table
