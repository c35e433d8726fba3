"""How a tumour gets the contrast of its kind: one attempt sets the guidance of the next. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from maisi.data.tumor_texture import Mask, contrasts, unlikeness, usual_contrast_hu
from maisi.tumors import kind_of
from maisi.volume import Volume

STRONGER = 1.5
"""Added to the guidance where a tumour shows no contrast of the right sign, for an attempt with other noise."""

GUIDANCE_RANGE = (-0.8, 6.0)
"""What an attempt may set the guidance to."""

MOST_AT_ONCE = 4.0
"""A contrast is made at most so many times larger by one attempt alone: what is next to nothing says little."""


@dataclass(frozen=True)
class Setting:
    """What an attempt is made with.

    Attributes:
        guidance: its scale, see `maisi.diffusion.guided`.
        noise: number of the noise it starts from.
        mask_guidance: that by the label map.
        strengthened: label id -> how far away from what is made with a map that lacks it; below 0 towards it.
    """

    guidance: float = 0.0
    noise: int = 0
    mask_guidance: float = 0.0
    strengthened: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contrasts:
    """The tumours of an attempt against their hosts.

    Attributes:
        hu: id of a tumour -> its contrast; of several that of the one that is least like its kind.
        shortfall: 0 where every tumour has the contrast of its kind (see `unlikeness`).
        ratio: what the contrasts should be multiplied by to be usual; 0 where one has the wrong sign.
        off_hu: mean of how far they are from what is usual.
    """

    hu: Mapping[int, float]
    shortfall: float
    ratio: float
    off_hu: float = 0.0

    @classmethod
    def of(cls, image: Volume, labels: Volume, ids: Collection[int], among: Mask | None = None) -> Contrasts:
        """Measure each of the tumours `ids` (of those with a voxel `among` these) in an image (HU) by its labels."""
        found: dict[int, float] = {}
        shortfall, ratios, off = 0.0, list[float](), list[float]()
        for id in sorted(ids):
            kind = kind_of(id)
            measured = contrasts(image.array, labels.array, id, labels.spacing_mm, among)
            if measured:
                found[id] = max(measured, key=lambda one: (unlikeness(one, kind), -abs(one.hu))).hu
            for one in measured:
                if unlike := unlikeness(one, kind):
                    usual = usual_contrast_hu(one, kind)
                    shortfall += unlike
                    ratios.append(max(usual / one.hu, 0.0) if one.hu else 0.0)
                    off.append(one.hu - usual)
        if not off:
            return cls(found, shortfall, 1.0)
        return cls(found, shortfall, math.prod(ratios) ** (1 / len(ratios)), sum(off) / len(off))

    def next(self, made_with: Setting, before: Sequence[tuple[Contrasts, Setting]] = ()) -> Setting:
        """What another attempt is to be made with.

        A tumour's contrast grows about with 1 + guidance, that by the label map with it: from the same noise it can be
        set, up or down; once two attempts have shown how far it goes, by the line through them. Where it is as usual,
        or can't be set further, the image is drawn anew.

        Args:
            made_with: what the attempt was made with.
            before: earlier attempts with what they were made with, the latest last.
        """
        if self.ratio == 1:
            return replace(made_with, noise=made_with.noise + 1)
        guidance = self._by_line(made_with, before)
        if guidance is not None and guidance != made_with.guidance:
            return replace(made_with, guidance=guidance)
        if self.ratio == 0:
            guidance = _within_range(made_with.guidance + STRONGER)
            return replace(made_with, guidance=guidance, noise=made_with.noise + 1)
        beside = 1 + made_with.mask_guidance
        guidance = _within_range((beside + made_with.guidance) * min(self.ratio, MOST_AT_ONCE) - beside)
        return replace(made_with, guidance=guidance, noise=made_with.noise + (guidance == made_with.guidance))

    def _by_line(self, made_with: Setting, before: Sequence[tuple[Contrasts, Setting]]) -> float | None:
        """The guidance that is usual by the latest attempt that differs in its guidance alone; None without one."""
        for other, setting in reversed(before):
            apart = made_with.guidance - setting.guidance
            if apart and self.off_hu != other.off_hu and replace(setting, guidance=made_with.guidance) == made_with:
                return _within_range(made_with.guidance - self.off_hu * apart / (self.off_hu - other.off_hu))
        return None

    def as_details(self, made_with: Setting) -> dict[str, object]:
        """For an item's record; nothing where there are no tumours."""
        if not self.hu:
            return {}
        return {
            "contrast_hu": {str(id): round(hu, 1) for id, hu in self.hu.items()},
            "contrast_as_usual": self.shortfall == 0,
            "guidance": made_with.guidance,
        }


def _within_range(guidance: float) -> float:
    low, high = GUIDANCE_RANGE
    return min(max(guidance, low), high)
