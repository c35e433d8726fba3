"""Cases that are easy to segment: a bright ball and a dark one in a noisy body, in places that differ by case."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from maisi.anatomy import BODY, label_id
from maisi.io.nifti import write_volume
from maisi.volume import Volume

BRIGHT, DARK = label_id("mandible"), label_id("brainstem")
SHAPE, SPACING_MM = (24, 22, 20), (3.0, 3.0, 3.0)


def planted(seed: int, ids=(BRIGHT, DARK), spacing_mm=SPACING_MM) -> tuple[Volume, Volume]:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    labels = np.full(SHAPE, BODY, np.uint8)
    labels[:2] = labels[-2:] = 0
    for id, low in ((BRIGHT, (5, 6, 6)), (DARK, (14, 6, 6))):
        centre = np.array(low) + rng.integers(0, 5, 3)
        if id in ids:
            labels[np.linalg.norm(grid - centre, axis=-1) <= 3.6] = id
    hu = np.where(labels == 0, -1000, 40.0)
    hu[labels == BRIGHT], hu[labels == DARK] = 600, -120
    image = (hu + rng.normal(0, 15, SHAPE)).astype(np.int16)
    return tuple(Volume.from_spacing(array, spacing_mm) for array in (image, labels))


def write_item(folder: Path, seed: int, request: dict | None = None, **options) -> None:
    """As `maisi generate` leaves it."""
    folder.mkdir(parents=True)
    image, labels = planted(seed, **options)
    write_volume(folder / "image.nii.gz", image)
    write_volume(folder / "labels.nii.gz", labels)
    if request is not None:
        record = {"synthetic": True, "request": {"modality": "ct", **request}}
        (folder / "record.json").write_text(json.dumps(record))
