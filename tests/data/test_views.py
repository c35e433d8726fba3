"""Views: regions of a box, sides, geometry, and caching that continues where it stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maisi.anatomy import label_id, label_name
from maisi.data.prepared import MOST_OPEN, PreparedCase, PreparedFolder, PreparedIndex
from maisi.data.views import (
    LatentFolder,
    ViewConfig,
    body_extent_mm,
    cache_latents,
    draw_view,
    mirrored,
    plan_view,
    region_extents,
    regions_of_box,
)
from maisi.errors import MaisiError
from maisi.io.files import INDEX, write_json

AFFINE = ((3.0, 0, 0, -60), (0, 3.0, 0, -60), (0, 0, 5.0, 100), (0, 0, 0, 1))


@pytest.fixture
def folder(tmp_path: Path) -> PreparedFolder:
    """One case, 40 x 40 x 60 voxels; the image is 4 times the label, lungs lie from z = 20 to 40."""
    labels = np.full((40, 40, 60), 200, np.uint8)
    labels[5:18, 5:35, 20:40] = 32
    labels[22:35, 5:35, 20:40] = 28
    np.save(tmp_path / "a.npy", labels.astype(np.int16) * 4)
    np.save(tmp_path / "a-labels.npy", labels)
    case = PreparedCase(
        id="a", patient="a", split="train", image="a.npy", labels="a-labels.npy", affine=AFFINE,
        spacing_mm=(3, 3, 5), shape=(40, 40, 60), regions=("chest",),
    )  # fmt: skip
    write_json(tmp_path / INDEX, PreparedIndex(cases=(case,)).model_dump(mode="json"))
    return PreparedFolder(tmp_path)


def extents(folder: PreparedFolder) -> dict[str, tuple[float, float]]:
    case = folder.index.cases[0]
    return region_extents(folder.labels(case), np.array(case.affine), case.regions)


def test_lungs_bound_their_neighbours(folder: PreparedFolder) -> None:
    found = extents(folder)
    assert found == {"chest": (200.0, 300.0), "head-neck": (300.0, 400.0), "abdomen": (100.0, 200.0)}


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((200, 300), ("chest",)),
        ((310, 400), ("head-neck",)),
        ((110, 290), ("chest", "abdomen")),
        ((100, 400), ("head-neck", "chest", "abdomen")),
        ((0, 800), ("head-neck", "chest", "abdomen")),
        ((500, 600), ()),
    ],
)
def test_regions_of_a_box(folder: PreparedFolder, box: tuple[float, float], expected: tuple[str, ...]) -> None:
    assert regions_of_box(extents(folder), *box) == expected


def test_mirroring_exchanges_the_sides() -> None:
    names = ["left kidney", "liver", "left lung upper lobe", "right rib 3", "right parotid gland", "mandible"]
    labels = np.array([label_id(name) for name in names], np.uint8).reshape(-1, 1, 1)
    found = [label_name(int(id)) for id in mirrored(labels).ravel()[::-1]]
    wanted = ["right kidney", "liver", "right lung lower lobe", "left rib 3", "parotid gland left", "mandible"]
    assert found == wanted  # whole lungs have the codes of these two lobes
    np.testing.assert_array_equal(mirrored(mirrored(labels)), labels)
    lobes = np.arange(28, 33, dtype=np.uint8).reshape(-1, 1, 1)
    assert mirrored(lobes).ravel().tolist() == [29, 28, 28, 32, 30]  # right lower, middle, upper; left lower, upper


@pytest.mark.parametrize("degrees", [0, 15, 30])
def test_regions_of_an_oblique_case(degrees: float) -> None:
    labels = np.full((40, 50, 60), 200, np.uint8)
    labels[5:35, 10:40, 20:45] = 32
    turn, angle = np.eye(4), np.deg2rad(degrees)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ np.diag([4.0, 4.0, 5.0, 1.0])
    low, high = region_extents(labels, affine)["chest"]
    heights = (np.argwhere(labels == 32) @ affine[:3, :3].T)[:, 2]
    assert low == pytest.approx(np.quantile(heights, 0.01), abs=8)
    assert high == pytest.approx(np.quantile(heights, 0.995), abs=8)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), turn=st.floats(0, 20))
def test_image_and_labels_of_a_view_lie_on_each_other(
    tmp_path_factory: pytest.TempPathFactory, seed: int, turn: float
) -> None:
    path = tmp_path_factory.mktemp("case")
    labels = np.zeros((24, 24, 24), np.uint8)
    labels[6:18, 6:18, 6:18] = 200
    np.save(path / "a.npy", np.where(labels == 200, 1000, -1000).astype(np.int16))
    np.save(path / "a-labels.npy", labels)
    case = PreparedCase(
        id="a", patient="a", split="train", image="a.npy", labels="a-labels.npy", affine=AFFINE,
        spacing_mm=(3, 3, 5), shape=(24, 24, 24),
    )  # fmt: skip
    write_json(path / INDEX, PreparedIndex(cases=(case,)).model_dump(mode="json"))
    kind = ViewConfig(size=(16, 16, 16), spacing_mm=(4, 6), rotate_degrees=turn)
    plan = plan_view(case, kind, {}, np.random.default_rng(seed), "f")
    image, mask = draw_view(PreparedFolder(path), case, plan)
    assert image.shape == plan.row.shape == mask.shape
    agreement = ((image.array > 0) == (mask == 200)).mean()
    assert agreement > 0.9
    # What lies clear of the surface agrees everywhere; only half-filled voxels may differ.
    sure = np.abs(image.array) > 900
    assert ((image.array > 0) == (mask == 200))[sure].mean() > 0.99


def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.nn.functional.avg_pool3d(image, 4)[0].repeat(4, 1, 1, 1)
    return mean, torch.zeros_like(mean)


def test_interrupted_caching_continues_to_the_same_result(folder: PreparedFolder, tmp_path: Path) -> None:
    kinds = [ViewConfig(size=(16, 16, 16), spacing_mm=(4, 8), views=3, mirror=True)]
    whole = cache_latents(folder, kinds, encode, "0" * 64, tmp_path / "whole")
    calls = 0

    def failing(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("interrupted")
        return encode(image)

    with pytest.raises(RuntimeError):
        cache_latents(folder, kinds, failing, "0" * 64, tmp_path / "parts")
    with pytest.raises(MaisiError, match="maisi prepare"):
        LatentFolder(tmp_path / "parts")
    assert cache_latents(folder, kinds, encode, "0" * 64, tmp_path / "parts") == whole
    one, two = LatentFolder(tmp_path / "whole"), LatentFolder(tmp_path / "parts")
    for view in whole.views:
        assert torch.equal(one.load(view, True).mean, two.load(view, True).mean)
    means = torch.stack([one.load(view, False).mean for view in whole.views])
    assert whole.scale_factor == pytest.approx(1 / float(means.double().std(correction=0)), rel=1e-6)


def test_views_of_something_else_are_made_anew(folder: PreparedFolder, tmp_path: Path) -> None:
    kinds = [ViewConfig(size=(16, 16, 16), spacing_mm=(4, 8), views=2)]
    wide = [ViewConfig(size=(16, 16, 16), spacing_mm=(8, 10), views=2)]
    cache_latents(folder, kinds, encode, "0" * 64, tmp_path / "out")
    stamp = (tmp_path / "out" / "a-0-0.safetensors").stat().st_mtime_ns
    cache_latents(folder, kinds, encode, "0" * 64, tmp_path / "out")
    assert (tmp_path / "out" / "a-0-0.safetensors").stat().st_mtime_ns == stamp
    for what, ask in enumerate(({"kinds": wide}, {"autoencoder_sha256": "1" * 64}, {"seed": 5})):
        told = {"kinds": kinds, "autoencoder_sha256": "0" * 64, "seed": 0} | ask
        made = cache_latents(folder, encode=encode, out=tmp_path / "out", **told)  # type: ignore[arg-type]
        assert made == cache_latents(folder, encode=encode, out=tmp_path / f"{what}", **told)  # type: ignore[arg-type]
        one, two = LatentFolder(tmp_path / "out"), LatentFolder(tmp_path / f"{what}")
        for view in made.views:
            assert torch.equal(one.load(view, True).mean, two.load(view, True).mean)
    np.save(folder.folder / "a-labels.npy", np.full((40, 40, 60), 200, np.uint8))
    cache_latents(PreparedFolder(folder.folder), kinds, encode, "0" * 64, tmp_path / "out")
    stored = LatentFolder(tmp_path / "out")
    labels = stored.load(stored.index.views[0], True).labels
    assert labels is not None
    assert set(labels.unique().tolist()) <= {0, 200}


def test_many_cases_are_not_all_held_open(tmp_path: Path, folder: PreparedFolder) -> None:
    count, row = MOST_OPEN + 40, folder.index.cases[0]
    rows = tuple(row.model_copy(update={"id": f"{n}", "image": f"{n}.npy"}) for n in range(count))
    for n in range(count):
        np.save(tmp_path / f"{n}.npy", np.full((2, 2, 2), n, np.int16))
    write_json(tmp_path / INDEX, PreparedIndex(cases=rows).model_dump(mode="json"))
    many = PreparedFolder(tmp_path)
    assert [int(many.image(case)[0, 0, 0]) for case in (*rows, *rows[:3])] == [*range(count), 0, 1, 2]
    assert len(many._open) == MOST_OPEN


def test_a_box_of_an_oblique_case_lies_in_it() -> None:
    turn, angle = np.eye(4), np.deg2rad(30)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ np.diag([4.0, 4.0, 4.0, 1.0])
    case = PreparedCase.model_validate(
        {"id": "a", "patient": "a", "split": "train", "image": "a.npy", "affine": affine.tolist()}
        | {"spacing_mm": (4, 4, 4), "shape": (30, 30, 100)}
    )
    kind = ViewConfig(size=(16, 16, 16), spacing_mm=(4, 4))
    tops = [plan_view(case, kind, {}, np.random.default_rng(seed), "").grid[2, 3] for seed in range(40)]
    reach = float(affine[2, :3] @ (29, 29, 99))
    assert min(tops) < 0.2 * reach
    assert max(tops) > 0.6 * reach


def test_the_extent_of_a_body() -> None:
    labels = np.zeros((10, 12, 14), np.uint8)
    assert body_extent_mm(labels, (1, 1, 1)) == (0, 0, 0)
    labels[2:6, 3:4, 5:14] = 200
    labels[8, 3, 5] = 32
    assert body_extent_mm(labels, (2.0, 3.0, 0.5)) == (14.0, 3.0, 4.5)


def test_cases_with_too_little_body_are_left_out(folder: PreparedFolder, tmp_path: Path) -> None:
    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.randn(4, *(n // 4 for n in image.shape[2:]))
        return z, z.clone()

    kinds = [
        ViewConfig(size=(16, 16, 16), spacing_mm=(5, 6), min_body_mm=(0, 0, 301)),
        ViewConfig(size=(16, 16, 16), spacing_mm=(5, 6), min_body_mm=(120, 120, 300)),
    ]
    index = cache_latents(folder, kinds, encode, "0" * 64, tmp_path / "latents")
    assert [view.file for view in index.views] == ["a-1-0.safetensors"]
