"""The released models by name: their files found, converted and put into a model folder. Runs nothing in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import maisi
from maisi.errors import MaisiError
from maisi.io.files import require_new, sha256
from maisi.weights.assemble import assemble
from maisi.weights.convert import convert
from maisi.weights.hub import Hub, HubFile
from maisi.weights.registry import PARTS, ModelConfig, Part
from maisi.weights.released_models import ReleasedModel, released_model
from maisi.weights.storage import Storage


class Source(Protocol):
    """Where released files come from."""

    def sizes(self, wanted: Mapping[Part, HubFile]) -> dict[Part, int]:
        """Return the bytes of each file, all of them made sure to be there."""

    def get(self, file: HubFile) -> tuple[Path, str, str]:
        """Return where a file is on this machine, a word for where it is from, and its SHA-256."""


class FromHub:
    """Files of the hub, each compared with the hash that the hub tells."""

    def __init__(self, hub: Hub) -> None:
        """Ask nothing yet."""
        self._hub = hub

    def sizes(self, wanted: Mapping[Part, HubFile]) -> dict[Part, int]:
        """See `Source`."""
        return {part: self._hub.listed(file).size for part, file in wanted.items()}

    def get(self, file: HubFile) -> tuple[Path, str, str]:
        """See `Source`."""
        listed = self._hub.listed(file)
        return self._hub.download(file), f"{file.repo} at {listed.commit}", listed.sha256


class FromFolder:
    """Files that are here already, in a folder or its `models`, as the reference's scripts leave them."""

    def __init__(self, folder: Path) -> None:
        """Look at nothing yet."""
        self._folder = folder

    def sizes(self, wanted: Mapping[Part, HubFile]) -> dict[Part, int]:
        """See `Source`."""
        found = {part: self._find(file) for part, file in wanted.items()}
        lacking = [Path(wanted[part].path).name for part, path in found.items() if path is None]
        if lacking:
            raise MaisiError(
                f"{self._folder} has no {', '.join(lacking)}; put {'them' if len(lacking) > 1 else 'it'} there, or "
                "leave --from out to download."
            )
        return {part: path.stat().st_size for part, path in found.items() if path is not None}

    def get(self, file: HubFile) -> tuple[Path, str, str]:
        """See `Source`."""
        path = self._find(file)
        assert path is not None, "sizes() has found it"
        return path, f"a file of that name ({file.repo} publishes one)", sha256(path)

    def _find(self, file: HubFile) -> Path | None:
        places = (self._folder / file.path, self._folder / Path(file.path).name)
        return next((place for place in places if place.is_file()), None)


def fetch(
    name: str, folder: Path, source: Source, *, storage: Storage | None = None, say: Callable[[str], None] = print
) -> ModelConfig:
    """Make the model folder of a released model.

    Args:
        name: a key of `released_models`.
        folder: to make; must not exist.
        source: where its files are.
        storage: how to store the weights; None for what the files have.
        say: takes a sentence on each step.

    Raises:
        MaisiError: there is no such model, a file cannot be had, or is not the network it should be.
    """
    model = released_model(name)
    require_new(folder)
    wanted = {part: model.files[part] for part in PARTS if part in model.files}
    sizes = source.sizes(wanted)
    say(f"{name}: {model.about}; {len(sizes)} files, {sum(sizes.values()) / 1e9:.2f} GB.")
    say(f"These weights are NVIDIA's, under the {model.licence}: {model.licence_url}")
    rows = []
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as scratch:
        converted: dict[Part, Path] = {}
        for part, file in wanted.items():
            say(f"{part}: {file.path}, {sizes[part] / 1e6:.0f} MB")
            path, origin, hash = source.get(file)
            converted[part] = Path(scratch) / f"{part}.safetensors"
            convert(path, converted[part])
            rows.append(f"| {part} | `{file.path}` | {origin} | `{hash}` |")
        return assemble(
            converted, folder, name, modalities=model.modalities, storage=storage, card=_card(name, model, rows)
        )


def _card(name: str, model: ReleasedModel, rows: list[str]) -> str:
    lines = [
        f"# Model card: {name}",
        "",
        f"{model.about[0].upper()}{model.about[1:]}. Weights that NVIDIA trained and released, converted by maisi "
        f"{maisi.__version__}. They are under the {model.licence} ({model.licence_url}).",
        "",
        "| network | file | from | SHA-256 of that file |",
        "|---|---|---|---|",
        *rows,
        "",
        *([model.advice, ""] if model.advice else []),
        "What this model makes is synthetic, and not fit for diagnosis.",
    ]
    return "\n".join(lines) + "\n"
