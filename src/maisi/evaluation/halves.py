"""A set against halves of another: how far apart is far, when even two halves of the real volumes differ.

Knows no measure. Distances such as FID depend on the number of volumes, so all sets of all ways to halve have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
S = TypeVar("S")

Distances = Mapping[str, float]


@dataclass(frozen=True)
class Halving:
    """Distances of one way to halve the real volumes.

    Attributes:
        made_to_real: by name; of generated volumes to either half, the mean of both.
        real_to_real: of one half to the other.
    """

    made_to_real: Distances
    real_to_real: Distances


@dataclass(frozen=True)
class Halvings:
    """Several ways to halve.

    Attributes:
        count: volumes in each of the three sets of every way.
        ways: one after the other.
    """

    count: int
    ways: tuple[Halving, ...]

    def made_to_real(self, name: str) -> float:
        """Mean over the ways."""
        return float(np.mean([way.made_to_real[name] for way in self.ways]))

    def real_to_real(self, name: str) -> float:
        """Mean over the ways."""
        return float(np.mean([way.real_to_real[name] for way in self.ways]))

    def ratio(self, name: str) -> float | None:
        """How many times as far generated volumes are from real ones as these from each other; None without unit."""
        unit = self.real_to_real(name)
        return self.made_to_real(name) / unit if unit > 0 else None

    def ratio_range(self, name: str) -> tuple[float, float] | None:
        """Smallest and largest ratio of a single way; None where one has no unit."""
        if any(way.real_to_real[name] <= 0 for way in self.ways):
            return None
        ratios = [way.made_to_real[name] / way.real_to_real[name] for way in self.ways]
        return min(ratios), max(ratios)


def halves(patients: Sequence[str], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Indices of two sets without a patient in common, each in random order of patients."""
    names = list(rng.permutation(sorted(set(patients))))
    places = [[i for name in part for i, p in enumerate(patients) if p == name] for part in (names[::2], names[1::2])]
    return places[0], places[1]


def smallest_half(patients: Sequence[str], ways: int, seed: int = 0) -> int:
    """The fewest volumes that a half of `compare_with_halves` has."""
    return min(len(half) for way in range(ways) for half in halves(patients, _generator(way, seed)))


def compare_with_halves(
    made: Sequence[T],
    real: Sequence[T],
    patients: Sequence[str],
    summarised: Callable[[Sequence[T]], S],
    distances: Callable[[S, S], Distances],
    ways: int,
    seed: int = 0,
) -> Halvings:
    """Halve the real volumes in several ways and measure generated to half, and half to half.

    Args:
        made: one description for each generated volume.
        real: one for each real volume.
        patients: whose each real volume is; no patient is in both halves.
        summarised: what of a set the distances need.
        distances: of two sets, by name.
        ways: how often.
        seed: of the choices.
    """
    found = []
    count = min(len(made), smallest_half(patients, ways, seed))
    for way in range(ways):
        rng = _generator(way, seed)
        first, second = halves(patients, rng)
        some = summarised([made[i] for i in rng.permutation(len(made))[:count]])
        a, b = (summarised([real[i] for i in half[:count]]) for half in (first, second))
        to_a, to_b = distances(some, a), distances(some, b)
        apart = {name: (to_a[name] + to_b[name]) / 2 for name in to_a}
        found.append(Halving(apart, distances(a, b)))
    return Halvings(count, tuple(found))


def _generator(way: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([way, seed])
