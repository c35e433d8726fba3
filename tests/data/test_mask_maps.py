"""Maps to train on: of phantoms and of prepared cases, repeatable, and mirrored only where sides may be exchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maisi.anatomy import TUMORS
from maisi.data.mask_maps import MaskMap, MaskMaps, MaskMapsConfig, with_tumour
from maisi.data.phantom import phantom
from maisi.data.prepared import PreparedCase, PreparedIndex
from maisi.errors import MaisiError
from maisi.io.files import INDEX, write_json
from maisi.volume import Volume

CONFIG = MaskMapsConfig(
    size=(24, 16, 24),
    spacing_mm=(16, 16, 16),
    phantoms=6,
    validation_phantoms=2,
    phantom_regions=(("chest",), ("abdomen",)),
)


def test_phantoms_repeat_and_are_kept_apart() -> None:
    train, again = (MaskMaps(CONFIG, None, "train", 5) for _ in range(2))
    held_out = MaskMaps(CONFIG, None, "validation", 5)
    assert (len(train), len(held_out)) == (6, 2)
    assert all((train[i].labels == again[i].labels).all() for i in (3, 0, 5))
    assert [train[i].regions for i in range(3)] == [("chest",), ("abdomen",), ("chest",)]
    assert not any((held_out[i].labels == train[j].labels).all() for i in range(2) for j in range(6))


def test_without_maps_one_is_told() -> None:
    with pytest.raises(MaisiError, match="name a prepared folder with labels, or phantoms"):
        MaskMaps(MaskMapsConfig(), None, "train", 0)


def test_a_case_on_the_grid(tmp_path: Path) -> None:
    """A case as large as the box, at half its spacing: every other voxel, or its neighbour."""
    _, labels = phantom((48, 32, 48), (8, 8, 8), ("chest",), 1)
    np.save(tmp_path / "a-labels.npy", labels.array)
    row = PreparedCase.model_validate(
        {
            "id": "a",
            "patient": "a",
            "split": "train",
            "image": "a.npy",
            "labels": "a-labels.npy",
            "affine": labels.affine.tolist(),
            "spacing_mm": (8, 8, 8),
            "shape": (48, 32, 48),
            "regions": ("chest",),
        }
    )
    write_json(tmp_path / INDEX, PreparedIndex(cases=(row,)).model_dump(mode="json"))
    config = CONFIG.model_copy(update={"phantoms": 0, "views": 2})
    maps = MaskMaps(config, tmp_path, "train", 0)
    assert len(maps) == 2
    made = maps[0].labels
    blocks = labels.array.reshape(24, 2, 16, 2, 24, 2).transpose(0, 2, 4, 1, 3, 5).reshape(24, 16, 24, 8)
    assert (blocks == made[..., None]).any(-1).all()
    assert "chest" in maps[0].regions
    bent, again = (MaskMaps(config.model_copy(update={"bent": True}), tmp_path, "train", 0) for _ in range(2))
    assert np.array_equal(bent[0].labels, made)
    assert np.array_equal(bent[1].labels, again[1].labels)
    inside = (bent[1].labels > 0, maps[1].labels > 0)
    assert 0.8 < 2 * (inside[0] & inside[1]).sum() / (inside[0].sum() + inside[1].sum()) < 1


def test_only_heads_are_mirrored() -> None:
    maps = MaskMaps(CONFIG.model_copy(update={"mirror": True}), None, "train", 0)
    labels = np.zeros((4, 2, 2), np.uint8)
    labels[0], labels[1] = 91, 22  # left clavicle, brain
    head, trunk = MaskMap(labels, ("head-neck",), True), MaskMap(labels, ("head-neck",), False)
    assert maps.mirrored(head, True)[:, 0, 0].tolist() == [0, 0, 22, 92]
    assert maps.mirrored(head, False) is labels
    assert maps.mirrored(trunk, True) is labels


def test_a_box_of_a_trunk_is_not_mirrored_whatever_it_shows(tmp_path: Path) -> None:
    _, labels = phantom((48, 32, 64), (8, 8, 8), ("head-neck", "chest"), 3)
    np.save(tmp_path / "a-labels.npy", labels.array)
    told = {"id": "a", "patient": "a", "split": "train", "image": "a.npy", "labels": "a-labels.npy"}
    told |= {"affine": labels.affine.tolist(), "spacing_mm": (8, 8, 8), "shape": labels.shape}
    config = MaskMapsConfig(size=(32, 32, 32), spacing_mm=(8, 8, 8), views=8, mirror=True)
    for regions, mirrors in ((("head-neck", "chest"), False), (("head-neck",), True)):
        row = PreparedCase.model_validate({**told, "regions": regions})
        write_json(tmp_path / INDEX, PreparedIndex(cases=(row,)).model_dump(mode="json"))
        maps = MaskMaps(config, tmp_path, "train", 0)
        assert all(maps[number].mirrors is mirrors for number in range(8))
    config = config.model_copy(update={"phantoms": 2, "phantom_regions": (("head-neck",), ("chest",))})
    assert [MaskMaps(config, None, "train", 0)[number].mirrors for number in range(2)] == [True, False]


def test_tumours_grow_in_a_host() -> None:
    labels = phantom((48, 40, 48), (8, 8, 8), ("chest",), 2)[1]
    grown = [with_tumour(labels, np.random.default_rng(seed)).array for seed in range(12)]
    changed = [made != labels.array for made in grown]
    assert sum(bool(new.any()) for new in changed) >= 6
    for made, new in zip(grown, changed, strict=True):
        for tumour in set(made[new].tolist()):
            assert set(labels.array[new].tolist()) <= set(TUMORS[tumour])
    bare = Volume.from_spacing(np.full((3, 3, 3), 200, np.uint8), (1, 1, 1))
    assert with_tumour(bare, np.random.default_rng(0)).array.max() == 200
