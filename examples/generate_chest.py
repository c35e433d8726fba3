"""Make one synthetic chest CT and write it with its preview: python examples/generate_chest.py OUT_FOLDER [MODEL]."""

import sys

import maisi

if len(sys.argv) < 2:
    sys.exit(__doc__)
out, name = sys.argv[1], (sys.argv[2:] or ["tiny"])[0]
model = maisi.load(name)
item = model.generate(region=("chest",), fov="auto", seed=0)
print("HU from", item.image.array.min(), "to", item.image.array.max(), "at", item.image.spacing_mm, "mm")
item.save(out)
