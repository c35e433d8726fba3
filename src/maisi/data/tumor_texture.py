"""What a tumour looks like in CT: painted by rule, and measured. Knows no network.

Painting makes the examples from which networks learn to inpaint, and serves where no such network is at hand: the level
of the kind's look against its host, inhomogeneity, the grain of the scan, an edge as soft as the scan's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import TUMORS
from maisi.data.preprocess import STORED_HU, robust_deviation, wider_box
from maisi.data.tumor_masks import equivalent_diameter_mm, smooth_noise
from maisi.tumors import Look, TumorKind, kind_of
from maisi.volume import Array, Volume

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]

EDGE_MM = 0.8
"""Standard deviation of the blur at a tumour's border."""

MOST_GRAIN_HU = 30.0
"""Noise beyond that is taken for structure."""

SHELL_MM = (2.0, 10.0)
"""A host is measured this far from its tumour: not in the blurred border, not beyond its neighbourhood."""


SPECK_ML = 0.03
"""What is smaller, beside something larger, is no tumour to be seen: a ball of 4 mm."""


@dataclass(frozen=True)
class Contrast:
    """A tumour against its host, HU.

    Attributes:
        tumor_hu: mean of the tumour without its outermost voxels (with them where it has no others).
        host_hu: median of the host around it.
    """

    tumor_hu: float
    host_hu: float

    @property
    def hu(self) -> float:
        """Tumour minus host."""
        return self.tumor_hu - self.host_hu


def paint_tumors(image: Volume, labels: Volume, rng: np.random.Generator, host: Mask | None = None) -> Volume:
    """Paint every tumour of a label map into a CT on the same grid; voxels further than its blurred edge stay.

    Args:
        image: HU, int16 or float.
        labels: uint8.
        rng: draws the looks and the noise.
        host: voxels to measure host tissue in where a tumour's own hosts are not around it.
    """
    hu = image.array.astype(np.float32)
    for id in (id for id in TUMORS if (labels.array == id).any()):
        parts, _ = ndimage.label(labels.array == id)
        for number, box in enumerate(ndimage.find_objects(parts), start=1):
            wide = wider_box(box, labels.shape, SHELL_MM[1] + 4 * EDGE_MM, labels.spacing_mm)
            inside = parts[wide] == number
            around = _host(labels.array[wide], id)
            if host is not None and not around.any():
                around = host[wide] & (labels.array[wide] != id)
            hu[wide] = _painted(hu[wide], inside, around, kind_of(id), labels.spacing_mm, rng)
    if image.array.dtype.kind != "f":
        limits = np.iinfo(image.array.dtype)
        hu = np.clip(np.rint(hu), limits.min, limits.max)
    return image.with_array(hu.astype(image.array.dtype))


def draw_look(kind: TumorKind, rng: np.random.Generator) -> Look:
    """One of the kind's looks, by their shares."""
    shares = np.array([look.share for look in kind.looks])
    return kind.looks[int(rng.choice(len(shares), p=shares / shares.sum()))]


def contrasts(
    image: Array, labels: NDArray[np.uint8], tumor: int, spacing_mm: Spacing, among: Mask | None = None
) -> list[Contrast]:
    """Measure each tumour of one id against its host. (X, Y, Z) arrays.

    Args:
        image: HU.
        labels: with tumours and hosts.
        tumor: the id.
        spacing_mm: of the voxels.
        among: measure those alone that have a voxel here.

    Returns:
        One for each that has a host around it; specks beside others that are not are left out.
    """
    box = ndimage.find_objects((labels == tumor).view(np.uint8))
    if not box:
        return []
    room = wider_box(box[0], labels.shape, SHELL_MM[1], spacing_mm)
    image, labels, among = image[room], labels[room], None if among is None else among[room]
    pieces, count = ndimage.label(labels == tumor, np.ones((3, 3, 3)))
    ml = np.bincount(pieces.ravel())[1:] * float(np.prod(spacing_mm)) / 1000
    wanted = range(1, count + 1) if among is None else np.unique(pieces[among & (pieces > 0)]).tolist()
    boxes, found = ndimage.find_objects(pieces), []
    for number in wanted:
        if ml[number - 1] < min(SPECK_ML, ml.max()):
            continue
        wide = wider_box(boxes[number - 1], labels.shape, SHELL_MM[1], spacing_mm)
        hu, inside = image[wide], pieces[wide] == number
        around = _shell(inside, _host(labels[wide], tumor), spacing_mm)
        if around.any():
            core = ndimage.binary_erosion(inside)
            values = hu[core if core.any() else inside]
            found.append(Contrast(float(values.mean()), float(np.median(hu[around]))))
    return found


def unlikeness(measured: Contrast, kind: TumorKind) -> float:
    """How far a contrast is from that of the kind's looks; 0: the sign, and half the smallest to twice the largest."""
    return min(_unlike(measured, look) for look in kind.looks)


def usual_contrast_hu(measured: Contrast, kind: TumorKind) -> float:
    """The usual contrast that is nearest to the one measured: within the look that it is least unlike."""
    low, high = sorted(_ends(measured, min(kind.looks, key=lambda look: _unlike(measured, look))))
    return min(max(measured.hu, low), high)


def _ends(measured: Contrast, look: Look) -> tuple[float, float]:
    """Both ends of a look's contrast, HU."""
    low, high = look.contrast_hu or tuple(hu - measured.host_hu for hu in look.hu or (0.0, 0.0))
    return low, high


def _unlike(measured: Contrast, look: Look) -> float:
    ends = _ends(measured, look)
    small, large = sorted(ends, key=abs)
    if small * large <= 0:
        return 0.0 if min(ends) <= measured.hu <= max(ends) else 1.0
    return max(0.0, 1 - measured.hu / (0.5 * small), measured.hu / (2 * large) - 1)


def _painted(
    hu: NDArray[np.float32], inside: Mask, host: Mask, kind: TumorKind, spacing: Spacing, rng: np.random.Generator
) -> NDArray[np.float32]:
    """`hu` with one tumour in it."""
    look = draw_look(kind, rng)
    around = _shell(inside, host, spacing)
    sample = hu[around] if around.any() else hu[inside]
    level, grain = _level(sample, look, rng), _grain(hu, around, spacing)
    scale = equivalent_diameter_mm(int(inside.sum()), spacing) / 5
    texture = look.texture_hu * smooth_noise(hu.shape, scale, spacing, rng)
    texture = texture + grain * smooth_noise(hu.shape, 0.6, spacing, rng)
    weight = ndimage.gaussian_filter(inside.astype(np.float32), [EDGE_MM / s for s in spacing], truncate=3.0)
    weight[hu < STORED_HU[0]] = 0  # padding is no tissue
    return (hu + weight * (level + texture - hu)).astype(np.float32)


def _level(sample: NDArray[np.float32], look: Look, rng: np.random.Generator) -> float:
    """Mean HU of a tumour with this look among such a host."""
    if look.hu is not None:
        return float(rng.uniform(*look.hu))
    assert look.contrast_hu is not None
    return float(np.median(sample)) + float(rng.uniform(*look.contrast_hu))


def _grain(hu: NDArray[np.float32], around: Mask, spacing: Spacing) -> float:
    """Standard deviation of the scan's noise in the host, HU: what a light blur takes away."""
    if not around.any():
        return 0.0
    fine = (hu - ndimage.gaussian_filter(hu, [0.8 / s for s in spacing]))[around]
    return min(robust_deviation(fine), MOST_GRAIN_HU)


def _host(seen: NDArray[np.uint8], tumor: int) -> Mask:
    return np.isin(seen, TUMORS[tumor])


def _shell(inside: Mask, host: Mask, spacing: Spacing) -> Mask:
    """Host voxels within `SHELL_MM` of a tumour; the whole neighbourhood where none is that far away."""
    distance = ndimage.distance_transform_edt(~inside, sampling=spacing)
    near = host & (distance <= SHELL_MM[1]) & ~inside
    shell = near & (distance >= SHELL_MM[0])
    return shell if shell.any() else near
