from __future__ import annotations

import numpy as np
import pytest
from planted import BRIGHT, DARK, write_item

from maisi.data.preprocess import resample
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.segmentation_cases import (
    PatchConfig,
    complete,
    draw_patch,
    likeliest,
    load_case,
    parse_structures,
    resampling_note,
)
from maisi.evaluation.volumes import find_entries
from maisi.volume import Volume

STRUCTURES = {"mandible": frozenset({BRIGHT}), "brainstem": frozenset({DARK})}


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    for number in range(3):
        write_item(root / f"{number:04d}", number, ids=(BRIGHT, DARK) if number < 2 else (BRIGHT,))
    return find_entries([root]).entries


def test_names_become_structures() -> None:
    found = parse_structures(["Mandible, spinal-cord", "parotid gland", "lungs", "my gland"], {150: "my gland"})
    assert list(found) == ["mandible", "spinal cord", "parotid gland", "lungs", "my gland"]
    assert found["parotid gland"] == {134, 135}
    assert found["my gland"] == {150}
    for names, said in (
        ([], "No structure"),
        (["mandibel"], "did you mean"),
        (["parotid gland", "left parotid gland"], "same"),
    ):
        with pytest.raises(MaisiError, match=said):
            parse_structures(names)


def test_cases_that_lack_a_structure(entries, tmp_path) -> None:
    cache = Cache(tmp_path / "cache")
    kept, notes = complete(entries, STRUCTURES, cache, "real")
    assert [entry.name for entry in kept] == ["0000", "0001"]
    assert notes == ("1 real case(s) lack a structure in their labels and were left out.",)
    assert complete(entries, STRUCTURES, cache, "real", "absent") == (entries, ())
    with pytest.raises(MaisiError, match="3 real cases has larynx"):
        complete(entries, {"larynx": frozenset({137})}, cache, "real")
    write_item(tmp_path / "more" / "x", 9, ids=(DARK,))
    halves = (*entries[2:], *find_entries([tmp_path / "more"]).entries)
    with pytest.raises(MaisiError, match=r"No real case has all structures .* \(mandible in 1, brainstem in 1\)"):
        complete(halves, STRUCTURES, cache, "real")


def test_another_spacing_is_resampled_and_said(entries, tmp_path) -> None:
    cache = Cache(tmp_path / "cache")
    same, other = (load_case(entries[0], STRUCTURES, spacing, cache) for spacing in ((3.0,) * 3, (6.0, 3.0, 3.0)))
    np.testing.assert_array_equal(same.classes == 1, entries[0].pair()[1].array == BRIGHT)
    assert resampling_note([same]) == ()
    assert "1 of 2 cases have another spacing and were resampled" in resampling_note([same, other])[0]
    assert other.image.shape == (12, 22, 20)
    volumes = [(case.classes == 2).sum() * np.prod(case.spacing_mm) for case in (same, other)]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.25)


def test_the_largest_share_wins_and_the_background_has_the_rest() -> None:
    like = Volume.from_spacing(np.zeros((4, 1, 1)), (1, 1, 1))
    shares = [
        like.with_array(np.array(v, np.float32).reshape(4, 1, 1)) for v in ([0.6, 0.3, 0.2, 0], [0.1, 0.4, 0.3, 1])
    ]
    assert likeliest(shares, like).ravel().tolist() == [1, 2, 0, 2]


@pytest.mark.parametrize("size", [512, 100])
def test_what_a_coarse_grid_does_not_reach_is_not_background(size) -> None:
    fine = Volume.from_spacing(np.ones((size, 4, 4), np.float32), (0.75, 3, 3))
    coarse = resample(fine, (6.0, 3.0, 3.0))
    assert (likeliest([coarse], fine) == 1).all()


def test_patches_lie_around_structures_and_keep_their_side(entries, tmp_path) -> None:
    case = load_case(entries[0], STRUCTURES, (3.0,) * 3, Cache(tmp_path / "cache"))
    plain = {"size": (16, 16, 16), "rotate_degrees": 0, "zoom": (1, 1), "shift_hu": 0, "contrast": 0}
    sides = []
    for step in range(40):
        image, classes = draw_patch(case, np.random.default_rng(step), PatchConfig(**plain, foreground=1.0))
        assert image.shape == classes.shape == (16, 16, 16)
        assert classes.any()
        # the bright ball is in the left half of the array; where both are seen, it stays on that side of the dark one
        if (classes == 1).any() and (classes == 2).any():
            sides.append(np.argwhere(classes == 1)[:, 0].mean() < np.argwhere(classes == 2)[:, 0].mean())
            assert image[classes == 1].mean() > 500
    assert sides
    assert all(sides)
    again = [draw_patch(case, np.random.default_rng(5), PatchConfig(size=(16, 16, 16)))[0] for _ in range(2)]
    np.testing.assert_array_equal(*again)
