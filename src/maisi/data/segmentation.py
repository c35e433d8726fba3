"""Rule-based segmentation of CT: body envelope, lungs, airway, skeleton. Knows no network and no file.

For scans that come without labels. The rules use HU, connectivity and anatomy in millimetres only, so they err
where those do: consolidated lung is body, dense contrast beside bone may be bone, bowel gas is body.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maisi.anatomy import BACKGROUND, BODY, LUNGS, TARGET_VOLUME, UNNAMED_BONE, label_id
from maisi.data.label_maps import counts
from maisi.data.preprocess import edged, resample, resample_to_grid, wider_box, without_padding
from maisi.volume import Volume

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]

LEFT_LUNG = LUNGS[0]
"""Id of the whole left lung: rules can't tell lobes apart, so it takes the id of its upper lobe."""

RIGHT_LUNG = LUNGS[-1]
"""Id of the whole right lung: that of its lower lobe."""

AIRWAY = label_id("airway")
"""Id of the air in nose, pharynx, trachea and main bronchi."""

WORKING_SPACING_MM = 1.5
"""Finer scans are segmented at this spacing: less noise, bounded memory and time."""

ENVELOPE_VOXELS = 24_000_000
"""The envelope of a larger scan is found on a grid of about so many voxels, and refined."""

AIR_HU = -500.0  # half-way between air and soft tissue: where a blurred surface lies
LUNG_HU = -400.0  # below: air or parenchyma
GAS_HU = -965.0  # a region with a lower median is pure gas: bowel, sinus, trachea
TUBE_HU = -600.0
BONE_HU = 170.0
ENHANCED_BONE_HU = 230.0  # where contrast medium is about: above spleen and kidneys
CORTEX_HU = 330.0  # every bone reaches it somewhere; enhanced organs don't
METAL_HU = 2900.0
BLOOD_UNEVENNESS = 0.045  # of its mean: blood has 0.023 to 0.03, bone 0.054 to 0.17, in voxels of 1.5 to 4.5 mm
CONTRAST_HU = 700.0  # thick regions brighter than this are compact bone or metal, not blood

NECK_AREA_MM2 = 25_000.0  # a smaller cross-section is a neck or a head
TRUNK_AREA_MM2 = 36_000.0  # a larger one is no head
APEX_BELOW_NECK_MM = 180.0  # the top of a lung lies within that, bowel does not
TUBE_AREA_MM2 = 700.0  # in-plane area up to which a pocket of gas may be a trachea or a bronchus
TUBE_LENGTH_MM = 25.0
MARROW_AREA_MM2 = 1_000.0
LUNG_ML = 300.0
SMALL_LUNG_ML = 30.0  # of a child
PARENCHYMA_ML, PARENCHYMA_HU = 100.0, -905.0  # no mouth or sinus is so large and so dense throughout

ABOUT_ORGANS_MM = 20.0
"""So far from an organ that lies outside the envelope tissue is body, too."""

LOST_SHARE = 0.05
"""An organ less of which lies outside the envelope has a rough surface, no more."""

NO_AIR_SHARE = 0.8
"""Of what of an organ lies outside, so much must be tissue: else it was drawn elsewhere."""


def segment(ct: Volume) -> Volume:
    """Segment a CT by rules.

    Args:
        ct: HU, any orientation, size and spacing; head to pelvis.

    Returns:
        uint8 labels on the grid of `ct`: 200 body, `LEFT_LUNG`, `RIGHT_LUNG`, `AIRWAY`, `UNNAMED_BONE`, 0 air.
        "Left" and "right" are the patient's, from the affine.
    """
    ras = without_padding(ct.to_ras())
    x, y, z = (max(s, WORKING_SPACING_MM) for s in ras.spacing_mm)
    work = resample(ras, (x, y, z)) if (x, y, z) != ras.spacing_mm else ras
    labels = work.with_array(_segment_ras(work.array, work.spacing_mm))
    return resample_to_grid(labels if work is ras else edged(labels), ct, order=0)


def _segment_ras(hu: Array, spacing: Spacing) -> NDArray[np.uint8]:
    labels = np.zeros(hu.shape, np.uint8)
    body = body_envelope(hu, spacing)
    if not body.any():
        return labels
    box = ndimage.find_objects(body.view(np.uint8))[0]
    hu, body, inner = hu[box], body[box], labels[box]
    inner[body] = BODY
    inner[_skeleton(hu, body, spacing)] = UNNAMED_BONE
    left, right, airway = _air_spaces(hu, body, spacing)
    inner[left], inner[right], inner[airway] = LEFT_LUNG, RIGHT_LUNG, AIRWAY
    return labels


def envelope(ct: Volume) -> Volume:
    """Find the body (see `body_envelope`) on the grid of `ct`, whatever its orientation, size and spacing.

    Large scans are segmented on a coarser grid. There the inside of the body is taken over, and in the layer of one
    coarse voxel about its surface each fine voxel's own HU decides.

    Returns:
        bool on the grid of `ct`.
    """
    ras = without_padding(ct.to_ras())
    target = max(WORKING_SPACING_MM, float(np.prod(ras.spacing_mm) * ras.array.size / ENVELOPE_VOXELS) ** (1 / 3))
    x, y, z = (max(s, target) for s in ras.spacing_mm)
    work = resample(ras, (x, y, z)) if (x, y, z) != ras.spacing_mm else ras
    body = body_envelope(work.array, work.spacing_mm)
    if work is ras:
        return ct.with_array(resample_to_grid(ras.with_array(body.view(np.uint8)), ct, order=0).array != 0)
    code = ndimage.binary_dilation(body).view(np.uint8) + ndimage.binary_erosion(body, border_value=1).view(np.uint8)
    fine = resample_to_grid(edged(work.with_array(code)), ct, order=0).array
    return ct.with_array((fine == 2) | ((fine == 1) & (ct.array > AIR_HU)))


def with_organs(ct: Volume, body: Mask, labels: NDArray[np.uint8]) -> Mask:
    """Add the tissue about organs that lie outside an envelope to it.

    Scans are published with parts of the body cut away; what is left of it may be as thin as a table or a cable, which
    rules leave out, but a spinal cord in it shows what it is.

    Args:
        ct: HU, any orientation.
        body: envelope on its grid, for instance by `envelope`.
        labels: organs on its grid. One counts in the sections in which most of it lies outside, where it is no air.
    """
    beyond = ~body & ~np.isin(labels, (BACKGROUND, BODY, TARGET_VOLUME))
    outside, total = counts(np.where(beyond, labels, np.uint8(0))), counts(labels)
    axis = int(np.abs(ct.affine[2, :3]).argmax())
    across = tuple(other for other in range(3) if other != axis)
    lost = np.zeros(body.shape, np.bool_)
    for id in np.flatnonzero(outside > LOST_SHARE * total):
        own = (labels == id) & beyond
        most = 2 * own.sum(axis=across, keepdims=True) > (labels == id).sum(axis=across, keepdims=True)
        own &= most
        if own.any() and (ct.array[own] > AIR_HU).mean() >= NO_AIR_SHARE:
            lost |= own
    if not lost.any():
        return body
    box = wider_box(ndimage.find_objects(lost.view(np.uint8))[0], body.shape, ABOUT_ORGANS_MM, ct.spacing_mm)
    near = ndimage.distance_transform_edt(~lost[box], sampling=ct.spacing_mm) <= ABOUT_ORGANS_MM
    parts, _ = ndimage.label(near & (ct.array[box] > AIR_HU))
    kept = np.unique(parts[lost[box]])
    result = body.copy()
    result[box] |= np.isin(parts, kept[kept > 0])
    return result


def body_envelope(hu: Array, spacing: Spacing) -> Mask:
    """Find the body with all that it holds, air included; table, clothes and cables are left out.

    Tissue is eroded, so that a table that touches the skin comes off, and the parts of at least 5 % of the
    largest one (arms beside a head) grow back. Walls too thin for that, as over lung or trachea, come back
    with the air that they enclose.

    Args:
        hu: RAS+ (X, Y, Z).
        spacing: mm.
    """
    tissue = hu > AIR_HU
    core = _parts(_erode(tissue, 6.0, spacing), share=0.05)
    body = _dilate(core, 8.0, spacing) & tissue
    pockets = _pockets(hu, tissue, body, spacing)
    body |= pockets | (_dilate(pockets, 10.0, spacing) & tissue)
    return _fill_slices(_parts(body, share=0.05))


def _pockets(hu: Array, tissue: Mask, body: Mask, spacing: Spacing) -> Mask:
    """Air that belongs to the body, since body is what mostly surrounds it.

    Either tissue encloses it in axial slices, or it has the HU of lung (the field of view may cut the chest wall).
    """
    parts, count = ndimage.label(_fill_slices(tissue) & ~tissue | _parenchyma(hu, tissue, spacing))
    sizes = _volumes_ml(parts, spacing)
    gas = _gas_level(hu)
    keep = np.zeros(count + 1, np.bool_)
    for i, box in enumerate(ndimage.find_objects(parts), 1):
        if sizes[i] < 0.2:
            continue
        wide = _wider(box, 1)
        inside = _surrounded(parts[wide] == i, body[wide])
        if sizes[i] < 50:
            keep[i] = inside > 0.65
        else:
            level = float(np.median(hu[box][parts[box] == i]))
            keep[i] = inside > (0.4 if level > gas + 60 else 0.5 if level > GAS_HU else 0.65)
    return keep[parts]


def _surrounded(pocket: Mask, body: Mask) -> float:
    """Share of body in the layer of voxels around a pocket; the edges of the field of view count as not body."""
    padding = ((1, 1), (1, 1), (0, 0))
    wide = np.pad(pocket, padding)
    layer = ndimage.binary_dilation(wide) & ~wide
    size = int(np.count_nonzero(layer))
    return int(np.count_nonzero(layer & np.pad(body, padding))) / size if size else 0.0


def _gas_level(hu: Array) -> float:
    """HU of pure gas in this scan (scatter moves it by some 50 HU), padding left out."""
    gas = hu[(hu < -800) & (hu > max(-1020, hu.min() + 2))]
    return float(np.percentile(gas, 10)) if gas.size else -1000.0


def _parenchyma(hu: Array, tissue: Mask, spacing: Spacing) -> Mask:
    """Large spaces with the HU of lung, whatever encloses them."""
    smooth = ndimage.gaussian_filter(hu.astype(np.float32), [2.0 / s for s in spacing])
    core = _erode(~tissue & (smooth > GAS_HU + 20) & (smooth < TUBE_HU), 4.0, spacing)
    parts, _ = ndimage.label(core)
    large = _volumes_ml(parts, spacing) > 50
    large[0] = False
    return _dilate(large[parts], 6.0, spacing) & ~tissue


def _air_spaces(hu: Array, body: Mask, spacing: Spacing) -> tuple[Mask, Mask, Mask]:
    """Left lung, right lung and airway out of the air inside the body; bowel gas is none of them."""
    air = body & (hu < LUNG_HU)
    neck = _neck_slice(body, spacing)
    tubes = _tubes(hu, air, spacing)
    least_ml = LUNG_ML
    if neck is not None and _has_parenchyma(hu, air & ~tubes, neck, spacing):
        neck, least_ml = None, SMALL_LUNG_ML  # a chest whose sections are as small as a neck's: a child's, or a crop
    lungs = _lungs(hu, air & ~tubes, neck, spacing, least_ml)
    airway = _airway(air & ~lungs, tubes, lungs, neck, spacing)
    room = body & ~airway
    left, right = (_with_vessels(side, room, spacing) for side in _sides(lungs, body))
    return left & ~right, right, airway


def _neck_slice(body: Mask, spacing: Spacing) -> int | None:
    """Index of the thinnest slice of a neck (or of the lowest one of a head); None where there is no neck."""
    sections = [_largest_section(body[:, :, z]) for z in range(body.shape[2])]
    area = np.array([pixels for pixels, _ in sections]) * spacing[0] * spacing[1]
    inside = np.flatnonzero(area > 0)
    reach = max(1, round(10 / spacing[2]))
    area = ndimage.uniform_filter1d(area, 2 * reach + 1, mode="nearest")
    middle = float(np.mean(np.flatnonzero(body.any(axis=(1, 2)))))
    # a leg is thin too, but lies to one side
    central = np.array([abs(x - middle) * spacing[0] < 50 for _, x in sections])
    thin = (area < NECK_AREA_MM2) & central
    # from the shoulders (or, of a neck alone, the bottom) upwards: the vertex of the skull is thin too
    wide = np.flatnonzero(area > TRUNK_AREA_MM2)
    start = int(wide[-1]) if len(wide) else int(inside[0])
    thin[:start] = False
    if not thin[: inside[-1] + 1].any():
        return None
    low = int(np.argmax(thin))
    return int(low + np.argmin(area[low : low + round(100 / spacing[2])]))


def _tubes(hu: Array, air: Mask, spacing: Spacing) -> Mask:
    """Gas that is small in every axial slice and long across slices: trachea, main bronchi, also bowel."""
    core = _erode(air & (hu < TUBE_HU), 1.5, spacing)
    small = np.zeros_like(air)
    for z in range(air.shape[2]):
        parts, _ = ndimage.label(core[:, :, z])
        area = np.bincount(parts.ravel()) * spacing[0] * spacing[1]
        area[0] = np.inf
        small[:, :, z] = (area <= TUBE_AREA_MM2)[parts]
    parts, count = ndimage.label(small)
    lengths = np.array([0] + [box[2].stop - box[2].start for box in ndimage.find_objects(parts)])
    lowest = np.concatenate([[0.0], ndimage.minimum(hu, parts, np.arange(1, count + 1))])
    keep = (lengths * spacing[2] >= TUBE_LENGTH_MM) & (lowest < GAS_HU + 30)
    return _dilate(keep[parts], 2.0, spacing) & air


def _has_parenchyma(hu: Array, air: Mask, start: int, spacing: Spacing) -> bool:
    """Whether a space above a slice is as large and as dense as only a lung is; a mouth has up to 70 ml."""
    parts, _ = ndimage.label(_erode(air, 1.5, spacing))
    sizes = _volumes_ml(parts, spacing)
    for i, box in enumerate(ndimage.find_objects(parts), 1):
        middle = (box[2].start + box[2].stop) / 2
        if sizes[i] > PARENCHYMA_ML and middle >= start and np.median(hu[box][parts[box] == i]) > PARENCHYMA_HU:
            return True
    return False


def _lungs(hu: Array, air: Mask, neck: int | None, spacing: Spacing, least_ml: float = LUNG_ML) -> Mask:
    """Air spaces with the HU of parenchyma: large, or cut by the top of the scan, or close below the neck."""
    core = _erode(air, 1.5, spacing)
    parts, count = ndimage.label(core)
    if not count:
        return core
    sizes = _volumes_ml(parts, spacing)
    keep = np.zeros(count + 1, np.bool_)
    candidates = [i for i in np.flatnonzero(sizes > 8) if i]
    boxes = ndimage.find_objects(parts)
    for i in candidates:
        box = boxes[i - 1]
        low, high = box[2].start, box[2].stop
        median = np.median(hu[box][parts[box] == i])
        below = neck is None or (low + high) / 2 < neck
        apex = neck is not None and high > neck - APEX_BELOW_NECK_MM / spacing[2]
        keep[i] = median > GAS_HU and below and (apex or high == air.shape[2] or sizes[i] > least_ml)
    return _dilate(keep[parts], 3.0, spacing) & air


def _airway(air: Mask, tubes: Mask, lungs: Mask, neck: int | None, spacing: Spacing) -> Mask:
    """Air of the head and neck, and the tubes between the lungs."""
    heights = np.flatnonzero(lungs.any(axis=(0, 1)))
    above = np.zeros_like(air)
    if neck is not None:
        above[:, :, int(heights[-1]) + 1 if len(heights) else 0 :] = True
    parts, count = ndimage.label(air)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    share_above = np.bincount(parts[above].ravel(), minlength=count + 1) / np.maximum(sizes, 1)
    head = (share_above > 0.5) & (sizes * np.prod(spacing) > 300)
    head[0] = False
    return head[parts] | _between_lungs(tubes, lungs, spacing)


def _between_lungs(tubes: Mask, lungs: Mask, spacing: Spacing) -> Mask:
    """Tubes that somewhere have lung to the left and to the right, at most 70 mm away, in the same row."""
    reach = round(70 / spacing[0])
    parts, count = ndimage.label(tubes)
    keep = np.zeros(count + 1, np.bool_)
    for i, (x, y, z) in enumerate(ndimage.find_objects(parts), 1):
        left = lungs[max(0, x.start - reach) : x.start, y, z].any(axis=0)
        right = lungs[x.stop : x.stop + reach, y, z].any(axis=0)
        both = (left & right).any(axis=0)
        keep[i] = np.count_nonzero(both) * spacing[2] >= 20
    return keep[parts]


def _with_vessels(lung: Mask, room: Mask, spacing: Spacing) -> Mask:
    """Close vessels and fissures inside one lung, slice by slice, within `room`."""
    return _fill_slices(_close(lung, 5.0, spacing)) & room


def _sides(lungs: Mask, body: Mask) -> tuple[Mask, Mask]:
    """Divide lungs into the patient's left and right (RAS+: x grows to the right)."""
    middle = float(np.mean(np.flatnonzero(body.any(axis=(1, 2)))))
    right = np.zeros_like(lungs)
    right[int(middle) :] = lungs[int(middle) :]
    return lungs & ~right, right


def _skeleton(hu: Array, body: Mask, spacing: Spacing) -> Mask:
    """Bone by HU and connectivity, without thick regions of contrast medium and without metal."""
    smooth = ndimage.gaussian_filter(np.clip(hu, -300, 1500).astype(np.float32), [0.8 / s for s in spacing])
    contrast = _contrast(smooth, body, spacing)
    level = ENHANCED_BONE_HU if contrast.any() else BONE_HU
    bright = body & (smooth > level) & ~contrast
    parts, count = ndimage.label(bright)
    sizes = np.bincount(parts.ravel())
    dense = np.bincount(parts[smooth > CORTEX_HU].ravel(), minlength=count + 1) / sizes
    beside = np.bincount(parts[_dilate(contrast, 3.0, spacing)].ravel(), minlength=count + 1) / sizes
    ml = _volumes_ml(parts, spacing)
    bone = ((dense > 0.1) & (ml > 0.2) & ((beside < 0.15) | (ml > 60)))[parts] & bright
    marrow = _marrow(smooth, bone, level, spacing) & ~contrast
    return (bone | marrow) & body & (hu < METAL_HU)


def _contrast(smooth: Array, body: Mask, spacing: Spacing) -> Mask:
    """Heart and large vessels filled with contrast medium.

    They are thick, large, brighter than what surrounds them, and even; the inside of a thick bone has a brighter
    shell, but where voxels are as thick as that shell only its trabeculae tell it.
    """
    result = np.zeros_like(body)
    parts, _ = ndimage.label(_erode(body & (smooth > BONE_HU + 30), 4.0, spacing))
    sizes = _volumes_ml(parts, spacing)
    for i, box in enumerate(ndimage.find_objects(parts), 1):
        if sizes[i] < 8:
            continue
        box = _wider(box, 8)
        core = parts[box] == i
        mean = float(smooth[box][core].mean())
        shell = _dilate(core, 5.0, spacing) & ~_dilate(core, 2.0, spacing)
        bare = shell.any() and np.mean(smooth[box][shell] > 1.3 * mean) < 0.15
        if bare and mean < CONTRAST_HU and _unevenness(smooth[box], core, spacing) < BLOOD_UNEVENNESS * mean:
            result[box] |= _dilate(core, 7.0, spacing) & (smooth[box] < 1.6 * mean)
    return result


def _unevenness(smooth: Array, core: Mask, spacing: Spacing) -> float:
    """Median distance, in HU, of a region's voxels from the mean of what lies within some 4 mm of them."""
    reach = [2 * max(1, round(4.0 / s)) + 1 for s in spacing]
    return float(np.median(np.abs(smooth - ndimage.uniform_filter(smooth, reach))[core]))


def _marrow(smooth: Array, bone: Mask, level: float, spacing: Spacing) -> Mask:
    """Inside of bones: trabecular bone between cortex, and holes of a slice that hold trabeculae or fat.

    Spinal canal and brain lie between in HU.
    """
    result = _close(bone, 8.0, spacing) & (smooth > level - 60)
    shell = bone | result
    for z in range(bone.shape[2]):
        parts, count = ndimage.label(ndimage.binary_fill_holes(shell[:, :, z]) & ~shell[:, :, z])
        if not count:
            continue
        mean = ndimage.mean(smooth[:, :, z], parts, np.arange(1, count + 1))
        area = np.bincount(parts.ravel())[1:] * spacing[0] * spacing[1]
        fits = (mean > 80) | ((mean > -150) & (mean < 0)) | (area < 40)
        result[:, :, z] |= np.concatenate([[False], fits & (area < MARROW_AREA_MM2)])[parts]
    return result


def _wider(box: tuple[slice, ...], by: int) -> tuple[slice, ...]:
    """Box with `by` more voxels on each side."""
    return tuple(slice(max(0, side.start - by), side.stop + by) for side in box)


def _volumes_ml(parts: Array, spacing: Spacing) -> Array:
    """Volume of each part of a labelled array, index 0 (background) included."""
    return np.bincount(parts.ravel()) * (spacing[0] * spacing[1] * spacing[2] / 1000)


def _parts(mask: Mask, share: float) -> Mask:
    """Connected parts of at least `share` of the size of the largest one."""
    parts, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    keep: Mask = sizes >= max(1.0, share * float(sizes.max()))
    return keep[parts]


def _largest_section(plane: Mask) -> tuple[int, float]:
    """Pixels, and mean x index, of the largest connected part of an axial slice."""
    parts, count = ndimage.label(plane)
    if not count:
        return 0, 0.0
    sizes = np.bincount(parts.ravel())
    largest = 1 + int(np.argmax(sizes[1:]))
    columns = np.count_nonzero(parts == largest, axis=1)
    return int(sizes[largest]), float(np.average(np.arange(len(columns)), weights=columns))


def _fill_slices(mask: Mask) -> Mask:
    """Fill holes in each axial slice."""
    filled = np.empty_like(mask)
    for z in range(mask.shape[2]):
        filled[:, :, z] = ndimage.binary_fill_holes(mask[:, :, z])
    return filled


def _erode(mask: Mask, mm: float, spacing: Spacing) -> Mask:
    return ~_dilate(~mask, mm, spacing)


def _dilate(mask: Mask, mm: float, spacing: Spacing) -> Mask:
    result = mask.view(np.uint8)
    for axis in range(3):
        reach = round(mm / spacing[axis])
        if reach:
            result = ndimage.maximum_filter1d(result, 2 * reach + 1, axis, mode="nearest")
    return result.view(np.bool_)


def _close(mask: Mask, mm: float, spacing: Spacing) -> Mask:
    return mask | _erode(_dilate(mask, mm, spacing), mm, spacing)
