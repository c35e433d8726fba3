"""The metadata of OME-Zarr: where an image lies and what its labels are called, as JSON. Knows no file.

Written is version 0.4, the one of Zarr 2: ITK's reader takes nothing newer, and napari, 3D Slicer, ngff-zarr and
neuroglancer read it as well as 0.5. Axes are z, y, x, and the array runs toward Superior, Posterior, Left along them
whatever the volume's own axes are: ITK knows no orientation and takes that for granted, 3D Slicer reads it from the
axes (RFC-4), so all readers put the image in the same place. Scale and translation have no word for oblique axes. So
the attribute `maisi` holds the affine of the volume as it was given, from which the turn back follows.

Read are 0.4 and 0.5, level 0, axes x, y, z in any order and others of size 1, in any unit of length. Where our
attribute is missing, or no longer agrees with scale and translation, these place the image: translation is the first
voxel's place in LPS+, and axes that tell no orientation run toward Left, Posterior, Superior. So do ITK, ngff-zarr and
3D Slicer.

Specifications: https://ngff.openmicroscopy.org/0.4/, https://ngff.openmicroscopy.org/0.5/ and
https://ngff.openmicroscopy.org/rfc/4/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maisi.errors import MaisiError
from maisi.io.preview import label_color, rgb
from maisi.volume import RAS_TO_LPS, Turn, checked_affine, turn_to_ras

Json = Mapping[str, Any]
Triple = tuple[int, int, int]

ATTRIBUTE = "maisi"
"""Under this name stands what OME-Zarr has no word for."""

LEVEL = "0"
"""Path of the one level that is written."""

_VERSION = "0.4"
"""LPS+ to RAS+, and back."""

_MILLIMETRES = {
    None: 1.0,
    "meter": 1000.0,
    "centimeter": 10.0,
    "millimeter": 1.0,
    "micrometer": 1e-3,
    "nanometer": 1e-6,
}

_ORIENTATIONS = {
    "right-to-left": (1, 0, 0),
    "left-to-right": (-1, 0, 0),
    "anterior-to-posterior": (0, 1, 0),
    "posterior-to-anterior": (0, -1, 0),
    "inferior-to-superior": (0, 0, 1),
    "superior-to-inferior": (0, 0, -1),
}
"""Directions in LPS+."""

_WRITTEN = {"z": "inferior-to-superior", "y": "anterior-to-posterior", "x": "right-to-left"}
"""Axes as they are written, in the array's order."""


@dataclass(frozen=True)
class Place:
    """Where a volume lies in an array, and where in the world.

    Attributes:
        axes: for X, Y and Z of the volume, the array's axis.
        flipped: whether the array runs the other way along it.
        affine: of the volume, RAS+.
        complete: whether whoever wrote it wrote every chunk.
    """

    axes: Triple
    flipped: tuple[bool, bool, bool]
    affine: NDArray[np.float64]
    complete: bool = False


def stored_turn(shape: Triple, affine: NDArray[np.float64]) -> Turn:
    """How a volume is turned to be written: toward Left, Posterior, Superior; the turn's affine is LPS+."""
    return turn_to_ras(shape, RAS_TO_LPS @ affine)


def attributes_of(turn: Turn, affine: NDArray[np.float64], note: Json, names: Mapping[int, str]) -> dict[str, Any]:
    """Attributes of the group of an image whose chunks are all written.

    Args:
        turn: of `stored_turn`.
        affine: of the volume as it was given.
        note: more of our own.
        names: of labels, id -> name; {} for an image.
    """
    straight = _unturned(turn.affine)
    axes = [
        {"name": name, "type": "space", "unit": "millimeter", "orientation": {"type": "anatomical", "value": value}}
        for name, value in _WRITTEN.items()
    ]
    place = [
        {"type": "scale", "scale": straight.diagonal()[2::-1].tolist()},
        {"type": "translation", "translation": straight[2::-1, 3].tolist()},
    ]
    levels = [{"path": LEVEL, "coordinateTransformations": place}]
    image = {"version": _VERSION, "name": "labels" if names else "image", "axes": axes, "datasets": levels}
    return {
        "multiscales": [image],
        **({"image-label": _image_label(names)} if names else {}),
        ATTRIBUTE: {"affine": affine.tolist(), "every_chunk_written": True, **note},
    }


def level_path(attributes: Json) -> str:
    """Path of level 0 below an image's group.

    Raises:
        KeyError: (TypeError, IndexError, ...) the attributes are not what the specification says.
    """
    path: str = _image(attributes)["datasets"][0]["path"]
    return path


def place_of(path: Path, attributes: Json, shape: Sequence[int]) -> Place:
    """Where the volume of level 0 lies.

    Args:
        path: for messages.
        attributes: of the image's group.
        shape: of the array.

    Raises:
        MaisiError: another version, not one 3D volume, its place or the size of its voxels cannot be told.
        KeyError: (TypeError, ValueError, ...) the attributes are not what the specification says.
    """
    image = _image(attributes)
    _require_version(path, image, attributes)
    axes = _axes(path, image, shape)
    lps = _lps_affine(path, image, axes)
    own = attributes.get(ATTRIBUTE)
    if own is not None:
        affine = own_affine(path, own)
        x, y, z = (shape[axis] for axis in axes)
        turn = _turn_that_made((x, y, z), affine)
        if np.allclose(_unturned(turn.affine), lps, atol=1e-6):
            back = [turn.order.index(axis) for axis in range(3)]
            a, b, c = ((axes[i], turn.flipped[i]) for i in back)
            return Place((a[0], b[0], c[0]), (a[1], b[1], c[1]), affine, own.get("every_chunk_written") is True)
    return Place(axes, (False, False, False), RAS_TO_LPS @ lps)


def own_affine(path: Path, own: Json) -> NDArray[np.float64]:
    """The affine in our attribute.

    Raises:
        MaisiError: it is none.
    """
    try:
        return checked_affine(np.asarray(own["affine"], np.float64))
    except MaisiError as error:
        raise MaisiError(f"{path}: {error}") from None


def label_names(attributes: Json) -> dict[int, str]:
    """Names of labels, id -> name; {} where there are none or they are damaged."""
    try:
        rows = attributes.get("ome", attributes)["image-label"]["properties"]
        return {int(row["label-value"]): row["name"] for row in rows if isinstance(row["name"], str)}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _image(attributes: Json) -> Json:
    image: Json = attributes.get("ome", attributes)["multiscales"][0]
    return image


def _image_label(names: Mapping[int, str]) -> dict[str, Any]:
    colors = {id: rgb(label_color(id)) for id in sorted(names)}
    return {
        "version": _VERSION,
        "colors": [{"label-value": id, "rgba": [*color, 255]} for id, color in colors.items()],
        "properties": [{"label-value": id, "name": names[id]} for id in colors],
    }


def _require_version(path: Path, image: Json, attributes: Json) -> None:
    """Refuse versions that tell no units, or tell places in other words."""
    axes = image.get("axes")
    if not isinstance(axes, list) or not all(isinstance(axis, dict) for axis in axes):
        version = image.get("version") or attributes.get("ome", {}).get("version", "of an unknown version")
        raise MaisiError(f"{path} is OME-Zarr {version}, and 0.4 and 0.5 are read; convert it to one of those.")


def _axes(path: Path, image: Json, shape: Sequence[int]) -> Triple:
    """Where x, y, z are among the array's axes; all others must be single."""
    names = [axis["name"] for axis in image["axes"]]
    sizes = dict(zip(names, shape, strict=True))
    if not {"x", "y", "z"} <= sizes.keys() or any(n != 1 for name, n in sizes.items() if name not in {"x", "y", "z"}):
        raise MaisiError(f"{path} has shape {tuple(shape)} along {', '.join(names)}; save one 3D volume.")
    return (names.index("x"), names.index("y"), names.index("z"))


def _lps_affine(path: Path, image: Json, axes: Triple) -> NDArray[np.float64]:
    """Indices along x, y, z to mm, LPS+; the level's own transformations come before those of all levels."""
    count = len(image["axes"])
    scale, shift, told = np.ones(count), np.zeros(count), False
    for holder in (image["datasets"][0], image):
        for step in holder.get("coordinateTransformations", ()):
            if step["type"] == "scale":
                factors = _numbers(step["scale"], count)
                scale, shift, told = scale * factors, shift * factors, True
            elif step["type"] == "translation":
                shift = shift + _numbers(step["translation"], count)
            elif step["type"] != "identity":
                raise MaisiError(f"{path}: a transformation '{step['type']}' is not read; save scale and translation.")
    if not told:
        raise MaisiError(f"{path} does not say how large its voxels are; save it with a scale.")
    space = [image["axes"][axis] for axis in axes]
    unit = np.array([_millimetres(path, axis.get("unit")) for axis in space])
    affine = np.eye(4)
    affine[:3, :3] = _directions(path, space) * scale[list(axes)] * unit
    affine[:3, 3] = shift[list(axes)] * unit
    return affine


def _numbers(values: Any, count: int) -> NDArray[np.float64]:
    numbers = np.asarray(values, np.float64)
    if numbers.shape != (count,):
        raise ValueError(f"{values} for {count} axes")
    return numbers


def _millimetres(path: Path, unit: str | None) -> float:
    if unit not in _MILLIMETRES:
        raise MaisiError(f"{path}: its lengths are in '{unit}', which is not known here; save it in millimeter.")
    return _MILLIMETRES[unit]


def _directions(path: Path, space: Sequence[Json]) -> NDArray[np.float64]:
    """Where x, y, z run in LPS+, a column each."""
    values = [str((axis.get("orientation") or {}).get("value", "")) for axis in space]
    if not any(values):
        return np.eye(3)
    unknown = [value for value in values if value not in _ORIENTATIONS]
    if unknown:
        raise MaisiError(
            f"{path}: an axis with the orientation '{unknown[0]}' cannot be placed; name that of all three."
        )
    return np.array([_ORIENTATIONS[value] for value in values], np.float64).T


def _turn_that_made(stored: Triple, affine: NDArray[np.float64]) -> Turn:
    """`stored_turn`, of the volume that has this affine and, turned, the shape `stored`."""
    order = stored_turn((1, 1, 1), affine).order
    x, y, z = (stored[order.index(axis)] for axis in range(3))
    return stored_turn((x, y, z), affine)


def _unturned(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """What scale and translation say of an affine: the same voxels on axes that are not oblique."""
    straight = np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1.0])
    straight[:3, 3] = affine[:3, 3]
    return straight
