"""Choose, of a prepared folder, the cases of one region that is seen whole: what baselines are compared on.

python recipes/baselines/cases.py PREPARED OUT [NAMES] makes OUT/index.json, which points to the arrays where they lie.
NAMES, separated by commas, are structures that all of them must have.
"""

from __future__ import annotations

import sys
from pathlib import Path

from maisi.anatomy import label_id
from maisi.data.label_maps import ids_in
from maisi.data.prepared import PreparedFolder, PreparedIndex
from maisi.data.views import body_extent_mm
from maisi.io.files import INDEX, new_folder, write_json

REGIONS = ("head-neck",)
LEAST_BODY_MM = (390.0, 0.0, 200.0)
"""Leaves out scans of which only a part was kept."""


def main(prepared: Path, out: Path, names: str = "") -> None:
    """Write the index of the chosen cases."""
    folder = PreparedFolder(prepared)
    needed = {label_id(name) for name in names.split(",") if name}
    home = prepared.resolve()
    chosen = []
    for case in folder.index.cases:
        if case.regions != REGIONS or case.labels is None or not needed <= set(ids_in(folder.labels(case))):
            continue
        extent = body_extent_mm(folder.labels(case), case.spacing_mm)
        if all(have >= least for have, least in zip(extent, LEAST_BODY_MM, strict=True)):
            files = {"image": str(home / case.image), "labels": str(home / case.labels)}
            chosen.append(case.model_copy(update=files))
    with new_folder(out) as part:
        write_json(part / INDEX, PreparedIndex(cases=tuple(chosen)).model_dump(mode="json"))
    print(f"{out}: {sum(c.split == 'train' for c in chosen)} cases to train on, of {len(chosen)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
