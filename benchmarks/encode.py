"""Encoding beside the reference: MONAI's autoencoder and ours, same random weights, same image, one process each.

    python benchmarks/encode.py --size 64 --rounds 2 -o benchmarks/results/encode.json

Compared is the latent's mean. How things are measured: beside.py.
"""

from __future__ import annotations

import coding

if __name__ == "__main__":
    coding.main(__file__, "encode", (__doc__ or "").splitlines()[0])
