"""Put the trained networks together.

    python recipes/tiny/assemble.py AUTOENCODER UNET CONTROLNET MASK_AUTOENCODER MASK_UNET RANGES LIBRARY FOLDER

LIBRARY is what a model without one made (`-` leaves it out): see run.sh.

Weights are stored in 8 bits, a quarter of the size; `evaluate.py` measures the stored model, so its numbers
include that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from maisi.weights.assemble import assemble
from maisi.weights.registry import PARTS, FieldOfView, KindPainting


def view(share: float, size: tuple[int, int, int], spacing_mm: float, *regions: str) -> FieldOfView:
    """One kind of volume the networks were trained on; see KINDS in on_gpu.py."""
    return FieldOfView(regions=regions, size=size, spacing_mm=(spacing_mm,) * 3, share=share)


VIEWS = (
    view(0.30, (112, 80, 80), 4.4, "head-neck"),
    view(0.12, (112, 80, 80), 4.4, "head-neck", "chest"),
    view(0.07, (144, 112, 112), 3.3, "head-neck"),
    view(0.03, (144, 112, 112), 3.3, "head-neck", "chest"),
    view(0.06, (80, 64, 64), 6.0, "head-neck"),
    view(0.02, (80, 64, 64), 6.0, "head-neck", "chest"),
    view(0.05, (128, 128, 128), 3.0, "chest"),
    view(0.03, (128, 128, 128), 3.0, "chest", "abdomen"),
    view(0.02, (128, 128, 128), 3.0, "abdomen"),
    view(0.05, (96, 80, 80), 4.2, "chest"),
    view(0.04, (128, 96, 64), 3.0, "chest"),
    view(0.03, (80, 64, 64), 6.0, "chest"),
    view(0.02, (96, 80, 80), 4.2, "chest", "abdomen"),
    view(0.02, (96, 80, 80), 4.2, "abdomen"),
    view(0.01, (128, 96, 64), 3.0, "abdomen"),
    view(0.02, (80, 64, 64), 6.0, "abdomen"),
)


def main(networks: Sequence[Path], ranges: Path, library: Path | None, folder: Path) -> None:
    """Write weights, hashes and `model.json`; the model card is written by hand."""
    config = assemble(
        dict(zip(PARTS, networks, strict=True)),
        folder,
        "tiny",
        views=VIEWS,
        modalities=("ct",),
        steps=6,
        mask_steps=10,
        inpaint_steps=20,
        solver="ancestral",
        mask_solver="euler",
        mask_guidance=1.0,
        self_guidance=1.0,
        mask_self_guidance=0.5,
        mask_temperature=0.85,
        maps_temperature=0.7,
        # the ControlNet makes the middle of what it paints into soft organs bone, of which it knows one patient's
        inpaint_kinds=dict.fromkeys(
            ("liver", "pancreas", "kidney", "colon"), KindPainting(mask_guidance=-0.8, temperature=0.5)
        ),
        storage="int8",
        crop_spacing_mm=(1.8, 3.2),
        ranges=ranges,
        library=library,
    )
    size = sum((folder / file).stat().st_size for file in config.files.values())
    print(f"{folder}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    *networks, ranges, library, folder = sys.argv[1:]
    main([Path(name) for name in networks], Path(ranges), None if library == "-" else Path(library), Path(folder))
