"""Planted copies must be found, and people must not be taken for copies of one another."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from maisi.cli import run
from maisi.data.phantom import phantom
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.memorisation import (
    SAME,
    CoarseGrid,
    Correlator,
    Neighbours,
    coarse,
    find_neighbours,
    percentile,
    slice_mean_features,
    summed_up,
)
from maisi.evaluation.volumes import Entry
from maisi.io.nifti import write_volume
from maisi.volume import Volume

SPACING = (9.0, 9.0, 9.0)
GRID = CoarseGrid(spacing_mm=14)


@pytest.fixture(scope="module")
def people() -> list[Volume]:
    regions = (("chest",), ("abdomen",), ("head-neck",), ("lower-body",))
    return [phantom((44, 36, 28), SPACING, regions[seed % 4], seed=seed)[0] for seed in range(8)]


def copy_of(ct: Volume, flipped: tuple[int, ...] = (0,), noise_hu: float = 40.0) -> Volume:
    """The CT flipped, cut at one side so that its centre moves, and with noise."""
    array = np.flip(ct.array, flipped)[3:, :, 2:]
    noisy = array + np.random.default_rng(5).normal(0, noise_hu, array.shape)
    return Volume.from_spacing(np.clip(noisy, -1024, 3071).astype(np.int16), ct.spacing_mm)


def as_image(name: str, ct: Volume, tmp_path, patient: str | None = None) -> Entry:
    path = tmp_path / f"{name}.npy"
    np.save(path, ct.array)
    return Entry(name, patient or name, path, affine=tuple(map(tuple, ct.affine.tolist())))


def slow_correlation(a: np.ndarray, b: np.ndarray, overlap: float) -> float:
    """The definition: every flip and shift, Pearson's correlation of what overlaps."""
    best = -1.0
    for flips in np.ndindex(2, 2, 2):
        turned = np.flip(a, [axis for axis in range(3) if flips[axis]])
        for shift in np.ndindex(*(2 * n + 1 for n in b.shape)):
            moved = [s - n for s, n in zip(shift, b.shape, strict=True)]
            spans = [(max(0, m), min(nb, na + m)) for m, na, nb in zip(moved, a.shape, b.shape, strict=True)]
            if any(low >= high for low, high in spans):
                continue
            there = b[tuple(slice(low, high) for low, high in spans)]
            here = turned[tuple(slice(low - m, high - m) for (low, high), m in zip(spans, moved, strict=True))]
            if there.size >= overlap * min(a.size, b.size):
                best = max(best, float(np.corrcoef(here.ravel(), there.ravel())[0, 1]))
    return best


@pytest.mark.parametrize("shapes", [((5, 4, 6), (5, 4, 6)), ((4, 4, 4), (6, 5, 4)), ((6, 3, 5), (4, 5, 4))])
def test_the_correlation_is_that_of_its_definition(shapes) -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.random(shape).astype(np.float32) for shape in shapes)
    largest = tuple(map(max, zip(*shapes, strict=True)))
    found = next(Correlator(largest, 0.6).matches(a, [b]))
    assert found.correlation == pytest.approx(slow_correlation(a, b, 0.6), abs=1e-4)


def test_a_part_is_found_in_its_whole_with_flip_and_shift() -> None:
    whole = np.random.default_rng(0).random((14, 12, 10)).astype(np.float32)
    part = np.flip(whole[4:11, 2:9, 3:9], (0, 2))
    found = next(Correlator(whole.shape).matches(part, [whole]))
    assert found.correlation == pytest.approx(1, abs=1e-4)
    assert (found.flipped, found.shift) == ((0, 2), (4, 2, 3))
    brighter = next(Correlator(whole.shape).matches(3 * part + 0.5, [whole]))
    assert brighter.correlation == pytest.approx(1, abs=1e-4)


def test_what_has_no_structure_correlates_with_nothing() -> None:
    whole = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    assert next(Correlator(whole.shape).matches(np.full((6, 6, 6), 0.3, np.float32), [whole])).correlation == -1


@pytest.mark.parametrize("flipped", [(), (0,), (1, 2)])
def test_a_planted_copy_is_nearer_than_any_other_person(people, flipped) -> None:
    grey = [coarse(ct, GRID) for ct in people]
    correlator = Correlator(tuple(np.max([g.shape for g in grey], axis=0)), GRID.overlap)
    matches = list(correlator.matches(coarse(copy_of(people[4], flipped), GRID), grey))
    correlations = [match.correlation for match in matches]
    assert np.argmax(correlations) == 4
    others = [c for i, c in enumerate(correlations) if i != 4]
    between = [next(correlator.matches(a, [b])).correlation for a, b in pairwise(grey)]
    assert 1 - correlations[4] < 0.5 * (1 - max(*others, *between))


def test_features_hardly_see_a_flip(people) -> None:
    describe = slice_mean_features("gradients", 9.0)
    here, mirrored, other = (
        describe(ct) for ct in (people[0], people[0].with_array(people[0].array[::-1].copy()), people[1])
    )
    assert np.abs(here - mirrored).max() < 0.1 * np.abs(here - other).max()


def test_percentiles() -> None:
    baseline = np.array([1.0, 2.0, 3.0, 4.0])
    assert [percentile(d, baseline) for d in (0.5, 2.0, 9.0)] == [0, 50, 100]


@pytest.fixture
def judge(people, tmp_path):
    def neighbours(generated: dict[str, Volume], heldout=(), **options):
        training = [as_image(f"p{i}", ct, tmp_path) for i, ct in enumerate(people)]
        made = [as_image(name, ct, tmp_path) for name, ct in generated.items()]
        mean_hu = ("mean", lambda ct: np.array([ct.array.mean(), ct.array.std()]))
        return find_neighbours(
            made, training, heldout, mean_hu, Cache(tmp_path / "cache"), grid=GRID, **options
        )  # fmt: skip

    return neighbours


def test_copies_are_flagged_and_strangers_are_not(people, judge) -> None:
    stranger = people[0].with_array(np.random.default_rng(0).permutation(people[0].array.ravel()).reshape(44, 36, 28))
    found = judge({"copy": copy_of(people[5]), "stranger": stranger})
    result = summed_up(found, {}, heldout=False)
    rows = {row["image"]: row for row in result.items}
    assert rows["copy"]["nearest in voxels"] == "p5"
    assert rows["copy"]["voxel percentile"] == 0
    assert "voxels" in rows["copy"]["flagged by"]
    assert rows["stranger"]["voxel percentile"] == 100
    assert "voxels" not in rows["stranger"]["flagged by"]
    assert result.summary["share flagged as copies, voxels"] == 0.5
    assert result.items[0]["image"] == "copy"


def test_the_baseline_is_other_patients(people, judge, tmp_path) -> None:
    found = judge({"copy": people[0]})
    assert len(found.real) == 8
    assert all(one.in_voxels[0].patient != one.image.patient for one in found.real)
    few = [one.image.name for one in judge({"copy": people[0]}, most_real=3, seed=1).real]
    assert len(few) == 3
    assert few == [one.image.name for one in judge({"copy": people[0]}, most_real=3, seed=1).real]
    held = [as_image("new", copy_of(people[2], noise_hu=200), tmp_path)]
    assert [one.image.name for one in judge({"x": people[0]}, held).real] == ["new"]


def test_one_scan_under_two_names_hides_no_copy(people, tmp_path) -> None:
    training = [as_image(f"p{n}", ct, tmp_path) for n, ct in enumerate(people)]
    generated = [as_image("copy", people[1], tmp_path)]
    mean_hu = ("mean", lambda ct: np.array([ct.array.mean(), ct.array.std()]))

    def found(real: list[Entry]) -> Neighbours:
        return find_neighbours(generated, real, (), mean_hu, Cache(tmp_path / "cache"), grid=GRID)

    twice = found([*training, as_image("again", people[4], tmp_path)])
    assert (twice.identical, len(twice.real)) == (2, 7)
    assert twice.flagged(twice.generated[0]) == ("voxels", "features")
    assert "under two names" in summed_up(twice, {}, heldout=False).notes[-1]
    assert found(training).identical == 0
    with pytest.raises(MaisiError, match="the same as another patient's"):
        found([as_image("x", people[0], tmp_path), as_image("y", people[0], tmp_path)])


def test_a_feature_that_is_the_same_for_all_patients_does_not_drown_the_others(people, tmp_path) -> None:
    images = [as_image(f"p{i}", ct, tmp_path) for i, ct in enumerate(people[:4])]
    made = [as_image("made", people[4], tmp_path)]

    def describe(ct: Volume) -> np.ndarray:
        n = next(number for number, one in enumerate(people) if np.array_equal(one.array, ct.array))
        return np.array([n, n, 1e-9 * n**5])

    found = find_neighbours(made, images, (), ("planted", describe), Cache(tmp_path / "cache"), grid=GRID)
    # levels 0 to 3 and 4: one step away, steps of sqrt(1.25) standard deviations, in two features of three
    assert found.generated[0].in_features[0].name == "p3"
    assert found.generated[0].in_features[1] == pytest.approx(np.sqrt(2 / 3 / 1.25))


def test_one_patient_is_no_baseline(people, tmp_path) -> None:
    training = [as_image(f"{i}", ct, tmp_path, patient="same") for i, ct in enumerate(people[:2])]
    with pytest.raises(MaisiError, match="one patient"):
        find_neighbours(training, training, (), ("none", lambda ct: np.zeros(1)), Cache(tmp_path / "c"))


def test_one_training_case_is_no_copy_of_everybody(people, tmp_path) -> None:
    training, held = [as_image("p0", people[0], tmp_path)], [as_image(f"h{i}", people[i], tmp_path) for i in (1, 2, 3)]
    made = [as_image("other", people[4], tmp_path), as_image("copy", people[0], tmp_path)]
    mean_hu = ("mean", lambda ct: np.array([ct.array.mean(), ct.array.std()]))
    found = find_neighbours(made, training, held, mean_hu, Cache(tmp_path / "cache"), grid=GRID)
    other, copy = found.generated
    assert other.in_features[1] > 0.1
    assert copy.in_features[1] < SAME


@pytest.mark.parametrize("show_real", [False, True])
def test_the_command_draws_no_real_image_unless_told_to(people, tmp_path, monkeypatch, show_real) -> None:
    from maisi.evaluation import pictures

    drawn = []
    picture = pictures.Tile.picture
    monkeypatch.setattr(pictures.Tile, "picture", lambda tile: drawn.append(tile) or picture(tile))
    for name, volumes in {"real": people[:3], "made": [copy_of(people[1])]}.items():
        (tmp_path / name).mkdir()
        for number, ct in enumerate(volumes):
            smaller = ct.array[4:-4, 4:-4, 6:-6]
            write_volume(tmp_path / name / f"{name}{number}.nii.gz", Volume.from_spacing(smaller, SPACING))
    words = ["evaluate", "memorisation", str(tmp_path / "made"), str(tmp_path / "real"), "-o", str(tmp_path / "out")]
    assert run([*words, *(["--show-real"] if show_real else [])]) == 0
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    assert values["items"][0]["nearest in voxels"] == "real1"
    assert values["items"][0]["flagged by"][0] == "voxels"
    assert values["settings"]["shows_real_images"] is show_real
    assert len(drawn) == (2 if show_real else 0)
    assert not (tmp_path / "out.cache").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--features", "taste"], "features"),
        (["--baseline", "1"], "at least 2"),
        (["--seed", "-1"], "0 or more"),
        (["--heldout", "absent"], "absent does not exist"),
    ],
)
def test_refusals(people, tmp_path, capsys, words, said) -> None:
    write_volume(tmp_path / "a.nii.gz", people[0])
    place = str(tmp_path / "a.nii.gz")
    assert run(["evaluate", "memorisation", place, place, *words, "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_what_cannot_be_read_is_refused_or_left_out_and_said(people, tmp_path, capsys) -> None:
    for number, ct in enumerate(people[:2]):
        write_volume(tmp_path / f"{number}.nii.gz", ct.with_array(ct.array))
    (tmp_path / "broken.nii.gz").write_bytes(b"nonsense")
    words = ["evaluate", "memorisation", str(tmp_path), str(tmp_path), "-o", str(tmp_path / "out")]
    assert run(words) == 2
    assert "broken.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "out.cache").exists()
    assert run([*words, "--skip-unreadable"]) == 0
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [row["image"] for row in values["items"]] == ["0", "1"]
    assert sum("broken.nii.gz" in note for note in values["notes"]) == 2
