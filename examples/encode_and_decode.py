"""See what the autoencoder keeps of a CT: python examples/encode_and_decode.py IMAGE.nii.gz DECODED.nii.gz [MODEL]."""

import sys
from pathlib import Path

import numpy as np

import maisi
from maisi.generation import codec
from maisi.io.nifti import read_volume, write_volume

if len(sys.argv) < 3:
    sys.exit(__doc__)
source, target, name = Path(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:] or ["tiny"])[0]
image = read_volume(source).to_ras()
autoencoder = maisi.load(name).autoencoder
latent = codec.encode(autoencoder, image)
decoded = codec.decode(autoencoder, latent)
error = np.abs(decoded.array - np.clip(image.array, -1000, 1000)).mean()
print(f"{image.shape} voxels became {latent.mean.shape} numbers; mean error {error:.0f} HU")
write_volume(target, decoded, synthetic=False)
