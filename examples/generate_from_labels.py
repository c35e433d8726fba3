"""Make two CTs that follow one label map: python examples/generate_from_labels.py OUT_FOLDER [MODEL].

The label map is a phantom's here; any NIfTI file whose ids are those of `maisi labels` will do (mask="labels.nii.gz").
"""

import sys
from pathlib import Path

import maisi
from maisi.data.phantom import phantom

if len(sys.argv) < 2:
    sys.exit(__doc__)
out, name = Path(sys.argv[1]), (sys.argv[2:] or ["tiny"])[0]
_, labels = phantom((64, 48, 48), (6, 6, 6), ("chest",), seed=0)
model = maisi.load(name)
out.mkdir(parents=True, exist_ok=True)
for item in model.generate_many(2, mask=labels, seed=0):
    print(item.save(out / f"{item.number:04d}"), item.timings_s)
