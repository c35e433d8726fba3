"""Decoding beside the reference: MONAI's autoencoder and ours, same random weights, same latent, one process each.

    python benchmarks/decode.py --size 64 --rounds 2 -o benchmarks/results/decode.json
    python benchmarks/decode.py --size 96 --splits 1,2,4 --memory 1.5

Of the reference's `--splits` the quickest counts. How things are measured: beside.py.
"""

from __future__ import annotations

import coding

if __name__ == "__main__":
    coding.main(__file__, "decode", (__doc__ or "").splitlines()[0])
