"""Two CTs of the abdomen with a liver tumour of 30 mm each, and their label maps.

    python examples/tumor_pairs.py OUT_FOLDER [MODEL]

The label map is found: a phantom's, deformed, or one out of your own (library="FOLDER", see `maisi mask library`).
"""

import sys
from pathlib import Path

import maisi

if len(sys.argv) < 2:
    sys.exit(__doc__)
out, name = Path(sys.argv[1]), (sys.argv[2:] or ["tiny"])[0]
model = maisi.load(name)
out.mkdir(parents=True, exist_ok=True)
wishes = {
    "region": "abdomen",
    "structure": ["liver"],
    "tumor": "liver:30mm",
    "size": (80, 64, 48),
    "spacing": (5, 5, 5),
}
for item in model.generate_many(2, **wishes, seed=0):
    print(item.details["mask_source"], item.details["tumors"], item.save(out / f"{item.number:04d}"))
