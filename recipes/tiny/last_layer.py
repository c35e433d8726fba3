"""Fit the last convolution of an autoencoder's decoder, in closed form, on whole views of the training cases.

    python recipes/tiny/last_layer.py AUTOENCODER.safetensors --data PREPARED_FOLDER -o FITTED.safetensors

What a decoder learned from patches is off in whole views: too dark in dense tissue, and by a pattern that repeats with
its upsampling. Its last layer is linear in what comes before, so the one that suits whole views best is a problem of
least squares, here with a pull towards the weights that are there: what the data does not ask for stays as it was. All
other tensors, and so the latents, stay to the bit. Takes some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from maisi.data.prepared import PreparedFolder
from maisi.data.preprocess import HU_MIN, crop_or_pad, resample
from maisi.errors import MaisiError
from maisi.evaluation.volumes import ct_of
from maisi.generation import codec
from maisi.networks.autoencoder import Autoencoder
from maisi.weights.tensor_file import read_tensor_header, write_tensors

HEAD_NECK_ID = "pt_"
"""Ids of head-neck cases (OpenKBP) begin so; all other cases are of trunks."""

VIEWS = (
    (True, 14, (112, 80, 80), 4.5),
    (True, 4, (128, 96, 96), 3.4),
    (False, 9, (128, 128, 96), 3.0),
)
"""Whether of heads and necks, how many at most, voxels, and their mm."""

VOXELS = (60_000, 15_000)
"""So many of each view are looked at, within the body and outside."""

BODY_FROM = 0.35
"""Values in [0, 1] from -300 HU on count as body."""


def main() -> None:
    """Read the command line and fit; a fault of the input ends with code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--pull", type=float, default=0.1, help="towards the weights that are there")
    a = parser.parse_args()
    try:
        if a.output.exists():
            raise MaisiError(f"{a.output} exists; name another file with -o.")
        autoencoder = codec.load_autoencoder(a.autoencoder, device="cpu", precision="fp32")
        fit(autoencoder, views(PreparedFolder(a.data)), a.pull)
        store(autoencoder, a.autoencoder, a.output)
    except MaisiError as error:
        print(f"last_layer.py: {error}", file=sys.stderr)
        sys.exit(2)


def views(source: PreparedFolder) -> Iterator[Tensor]:
    """Images (X, Y, Z) in [0, 1] of training cases in an order drawn once."""
    cases = [case for case in source.cases("train") if case.is_ct]
    rng = np.random.default_rng(0)
    for is_head, most, size, spacing in VIEWS:
        own = [case for case in cases if case.id.startswith(HEAD_NECK_ID) == is_head]
        for number in rng.permutation(len(own))[:most]:
            ct = crop_or_pad(resample(ct_of(source, own[number]), (spacing,) * 3), size, value=HU_MIN)
            print(own[number].id, size, flush=True)
            yield torch.from_numpy(codec.normalised(ct.array, "ct"))


@torch.inference_mode()
def fit(autoencoder: Autoencoder, images: Iterable[Tensor], pull: float) -> None:
    """Give the decoder's last convolution the weights of least squared error over the images.

    Args:
        autoencoder: float32, on the CPU.
        images: (X, Y, Z) in [0, 1], axes multiples of the compression.
        pull: weight of the squared distance to the weights there are, in means of the features' squares.

    Raises:
        MaisiError: there is no image.
    """
    last = autoencoder.decoder.blocks[-1]
    assert isinstance(last, nn.Conv3d)
    rng = np.random.default_rng(0)
    seen: dict[str, Tensor] = {}
    hook = last.register_forward_pre_hook(lambda _, given: seen.update(features=given[0][0]))
    sums: NDArray[np.float64] | None = None
    for image in images:
        autoencoder.decode(autoencoder.encode(image[None, None]).mean)
        places = _drawn(image.numpy(), rng)
        rows, asked = _neighbourhoods(seen["features"], places), image.numpy()[tuple(places.T)]
        own = np.concatenate([rows.T @ rows, (rows.T @ asked)[:, None]], axis=1) / len(places)
        sums = own if sums is None else sums + own
    hook.remove()
    if sums is None:
        raise MaisiError("There is no training case to fit the layer to; name a prepared folder that has some.")
    squares, products = sums[:, :-1], sums[:, -1]
    there = np.append(last.weight[0].permute(1, 2, 3, 0).reshape(-1).numpy(), last.bias.numpy())
    stiffness = pull * np.trace(squares) / len(there)
    found = np.linalg.solve(squares + stiffness * np.eye(len(there)), products + stiffness * there)
    fitted = torch.from_numpy(found.astype(np.float32))
    last.weight.copy_(fitted[:-1].reshape(*last.kernel_size, -1).permute(3, 0, 1, 2)[None])
    last.bias.copy_(fitted[-1:])


def _drawn(image: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """Places (N, 3) of voxels with a whole neighbourhood."""
    inner = (slice(1, -1),) * 3
    body = image[inner] > BODY_FROM
    drawn = []
    for places, most in zip((np.argwhere(body), np.argwhere(~body)), VOXELS, strict=True):
        drawn.append(places[rng.permutation(len(places))[:most]] + 1)
    return np.concatenate(drawn)


def _neighbourhoods(features: Tensor, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """What a 3x3x3 convolution of features (C, X, Y, Z) sees at places (N, 3), and a one: (N, 27 C + 1)."""
    last_axis = features.permute(1, 2, 3, 0).contiguous().numpy()
    columns = [last_axis[tuple((places + offset).T)] for offset in itertools.product((-1, 0, 1), repeat=3)]
    return np.concatenate([*columns, np.ones((len(places), 1))], axis=1)


def store(autoencoder: Autoencoder, source: Path, target: Path) -> None:
    """Write the tensors of `source`, but for the last convolution's, in the types that they have there."""
    tensors, prefix = load_file(source), f"decoder.blocks.{len(autoencoder.decoder.blocks) - 1}."
    for name, fitted in autoencoder.decoder.blocks[-1].state_dict().items():
        tensors[prefix + name] = fitted.to(tensors[prefix + name].dtype)
    write_tensors(target, tensors, read_tensor_header(source).metadata)


if __name__ == "__main__":
    main()
