"""Three versions of one CT with a lung tumour of 15 to 25 mm: python examples/inpaint_tumors.py OUT_FOLDER [MODEL].

A phantom stands in for the CT; files will do as well: maisi.inpaint("ct.nii.gz", "labels.nii.gz", tumor=...).
"""

import sys
from pathlib import Path

import maisi
from maisi.data.phantom import phantom

if len(sys.argv) < 2:
    sys.exit(__doc__)
out, name = Path(sys.argv[1]), (sys.argv[2:] or ["tiny"])[0]
ct, labels = phantom((96, 80, 64), (4, 4, 5), ("chest",), seed=1)
model = maisi.load(name)
out.mkdir(parents=True, exist_ok=True)
for number in range(3):
    item = maisi.inpaint(ct, labels, tumor="lung:15-25mm", model=model, item=number)
    print(item.details["tumors"], item.details["contrast_hu"], item.save(out / f"{number:04d}"))
