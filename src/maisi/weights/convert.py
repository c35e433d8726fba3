"""Conversion between the released `.pt` files and ours, in both directions, by a table of names.

The released networks wrap layers in layers; ours do not, so a convolution called `conv1.conv.conv.weight`
there is `conv1.weight` here. `key_table.json` says so row by row; this module only applies it. Released
layout: the autoencoder is a plain state dict (or stands under `unet_state_dict`), a U-Net stands under
`unet_state_dict` beside its `scale_factor`, a ControlNet under `controlnet_state_dict`.

Networks that evaluations look through (`FEATURE_NETWORKS`) come from files that others published, by `published`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maisi.errors import MaisiError
from maisi.io.files import atomic_path
from maisi.weights.infer import Shapes, infer_config
from maisi.weights.load import (
    FEATURE_NETWORKS,
    NETWORKS,
    NetworkHeader,
    build_network,
    load_network,
    read_header,
    require_shapes,
    save_network,
)
from maisi.weights.published import Form, form_of, head_names
from maisi.weights.released import read_released
from maisi.weights.storage import require_finite

if TYPE_CHECKING:
    from torch import Tensor, nn

Direction = Literal["to_ours", "to_released"]


_HELD = ("maisi.network", "maisi.config", "maisi.scale_factor", "maisi.note")
"""Metadata that the released layout holds, or that only says where a file comes from."""


@dataclass(frozen=True)
class _Row:
    """One rule of the table: a name that `pattern` matches becomes `template` filled with its groups."""

    pattern: re.Pattern[str]
    template: str
    weight_axes: int | None

    def apply(self, name: str, shapes: Shapes) -> str | None:
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        weight = shapes.get(name.rpartition(".")[0] + ".weight", ())
        if self.weight_axes is not None and len(weight) != self.weight_axes:
            return None
        return self.template.format(**match.groupdict())


def convert(
    official: Path,
    out: Path,
    *,
    as_network: str | None = None,
    settings: Mapping[str, Any] | None = None,
    heads: Path | None = None,
) -> NetworkHeader:
    """Convert a released `.pt` file, one of the same layout and other sizes, or a published feature network.

    Args:
        official: the `.pt` file; read without running anything that is in it.
        out: the `.safetensors` file to write.
        as_network: one of `NETWORKS` or `FEATURE_NETWORKS`; None to tell from the names of the tensors.
        settings: configuration values that shapes cannot tell, where they are not the released ones:
            `norm_groups`, `head_channels`, an autoencoder's `upsampling`.
        heads: the file of LPIPS's learned weights, where `official` is the ImageNet network that they belong to.

    Returns:
        What the new file says of itself.

    Raises:
        MaisiError: the file is no such file, is truncated, holds anything but plain tensors, or does not fit
            `as_network` or `settings`; nothing is written then.
    """
    official = Path(official)
    if as_network not in (None, *NETWORKS, *FEATURE_NETWORKS):
        words = ", ".join((*NETWORKS, *FEATURE_NETWORKS))
        raise MaisiError(f"There is no network '{as_network}'; choose one of {words}.")
    containers = [entry["container"] for entry in key_table()["networks"].values() if entry["container"]]
    released = read_released(official, containers)
    state = released.state
    form = None if as_network in NETWORKS else form_of(_shapes(state), as_network, official, heads)
    metadata = {"maisi.note": f"converted from {official.name}"}
    if form is None:
        network = as_network or _detect(state, official)
        names = rename(network, _shapes(state), "to_ours", str(official))
        module = _fill(network, {names[name]: tensor for name, tensor in state.items()}, settings or {}, official)
    else:
        module = _fill_published(form, state, heads, settings or {}, official)
        metadata["maisi.note"] += f" and {heads.name}" if heads else ""
    if released.scale_factor is not None:
        metadata["maisi.scale_factor"] = repr(released.scale_factor)
    save_network(out, module, metadata=metadata)
    return read_header(out)


def export_official(path: Path, out: Path) -> dict[str, Any]:
    """Write one of our files in the released layout; the reverse of `convert`.

    Returns:
        What the file says that the layout has no place for, and whoever loads it must be told: values of the
        configuration that `convert` takes as `settings`, and further metadata, by name.

    Raises:
        MaisiError: `path` is not a network of ours, or one that the layout cannot hold, or `out` cannot be written.
    """
    import torch

    header = read_header(path)
    if header.network not in NETWORKS:
        raise MaisiError(f"{path} holds '{header.network}', which others published; use the file it was made from.")
    if header.config.get("told_as"):
        raise MaisiError(
            f"{path} is told groups of ids as one (told_as), which the released layout has no place for; "
            "use it as it is."
        )
    module = load_network(path, dtype=_stored_dtype(header))
    state = module.state_dict()
    names = rename(header.network, {n: tuple(t.shape) for n, t in state.items()}, "to_released", str(path))
    official = {names[name]: tensor.clone() for name, tensor in state.items()}
    container = key_table()["networks"][header.network]["container"]
    content: dict[str, Any] = official if container is None else {container: official}
    if container is not None and header.scale_factor is not None:
        content["scale_factor"] = torch.tensor(header.scale_factor)
    with atomic_path(out) as part, part.open("wb") as file:
        torch.save(content, file)
    return _unsaid(header, module)


def _unsaid(header: NetworkHeader, module: nn.Module) -> dict[str, Any]:
    config: Any = module.config
    usual = {name: field.get_default() for name, field in type(config).model_fields.items()}
    told = usual | infer_config(header.network, _shapes(module.state_dict()))
    apart = {name: value for name, value in dict(config).items() if value != told[name]}
    more = {n.removeprefix("maisi."): text for n, text in header.metadata.items() if n not in _HELD}
    return apart | more


def rename(network: str, shapes: Shapes, direction: Direction, source: str) -> dict[str, str]:
    """Give each tensor its name on the other side.

    Args:
        network: one of `NETWORKS`.
        shapes: shape of each tensor of the network, by name.
        direction: whether `shapes` has released names or ours.
        source: what the error message calls the file.

    Raises:
        MaisiError: the table has no row, or more than one, for a name, or two names become one.
    """
    result: dict[str, str] = {}
    for name in shapes:
        found = [new for row in _rows(network, direction) if (new := row.apply(name, shapes)) is not None]
        if len(found) != 1:
            raise MaisiError(f"{source}: '{name}' is no tensor of the network '{network}'; give a released file.")
        result[name] = found[0]
    if len(set(result.values())) != len(result):
        raise MaisiError(f"{source}: two tensors of the network '{network}' have one meaning; give a released file.")
    return result


@cache
def key_table() -> dict[str, Any]:
    """Return the content of `key_table.json`."""
    table: dict[str, Any] = json.loads((files("maisi.weights") / "key_table.json").read_text(encoding="utf-8"))
    return table


@cache
def _rows(network: str, direction: Direction) -> tuple[_Row, ...]:
    table = key_table()
    rows = [row for section in table["networks"][network]["sections"] for row in table["rows"][section]]
    start, end = (0, 1) if direction == "to_ours" else (1, 0)
    return tuple(_Row(_compile(row[start]), row[end], row[2] if len(row) > 2 else None) for row in rows)


def _compile(template: str) -> re.Pattern[str]:
    """Turn "{half}.blocks.{n}" into a pattern with the named groups `half` and `n`."""
    patterns = key_table()["patterns"]
    pieces = re.split(r"\{(\w+)\}", template)
    literal = [re.escape(piece) for piece in pieces[0::2]]
    groups = [f"(?P<{word}>{patterns[word]})" for word in pieces[1::2]]
    return re.compile("".join(a + b for a, b in zip(literal, [*groups, ""], strict=True)))


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _detect(state: Mapping[str, Tensor], path: Path) -> str:
    for network, entry in key_table()["networks"].items():
        if entry["marker"] in state:
            return str(network)
    words = ", ".join((*NETWORKS, *FEATURE_NETWORKS))
    raise MaisiError(f"{path} holds none of the networks {words}; give a released or published .pt file.")


def _fill(network: str, state: Mapping[str, Tensor], settings: Mapping[str, Any], path: Path) -> nn.Module:
    """Build the network that the shapes describe, check it against them, and give it the tensors."""
    try:
        config = infer_config(network, _shapes(state)) | dict(settings)
    except (KeyError, IndexError):
        raise MaisiError(f"{path} lacks tensors of the network '{network}'; get a complete copy.") from None
    return _built(network, config, state, path)


def _fill_published(
    form: Form, state: Mapping[str, Tensor], heads: Path | None, settings: Mapping[str, Any], path: Path
) -> nn.Module:
    """So for a feature network, with its heads where they have a file of their own."""
    tensors = {form.rename(name): tensor for name, tensor in state.items() if not form.drops(name)}
    if heads is not None:
        learned = read_released(heads, ()).state
        tensors |= {new: learned[name] for name, new in head_names(learned, heads).items()}
    return _built(form.network, {**settings, "variant": form.variant}, tensors, path)


def _built(network: str, config: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> nn.Module:
    module = build_network(network, config, str(path))
    require_shapes(module, _shapes(state), path)
    require_finite(state, str(path))
    module.load_state_dict(dict(state), strict=True, assign=True)
    return module


def _stored_dtype(header: NetworkHeader) -> Any:
    """A dtype that holds all of the file's tensors, so that an export does not change what was stored."""
    import torch

    if "float64" in header.storage:
        return torch.float64
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(header.storage, torch.float32)
