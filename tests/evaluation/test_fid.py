import numpy as np
import pytest
from scipy.linalg import sqrtm

from maisi.errors import MaisiError
from maisi.evaluation.fid import PLANES, FidConfig, Moments, PlaneMoments, SliceFid, fid, frechet_distance, pooled
from maisi.volume import Volume


def gaussian(count, size, seed, mixed=True):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, size))
    return values @ rng.normal(size=(size, size)) + rng.normal(size=size) if mixed else values


def textbook(x, y):
    """The distance as it is usually written, by a general matrix root."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    step = x.mean(0) - y.mean(0)
    return step @ step + np.trace(a + b - 2 * sqrtm(a @ b).real)


def by_singular_values(x, y):
    """tr (A B)^(1/2) is the sum of the singular values of X Y^T / sqrt((n-1)(m-1)): needs no root, any rank."""
    u, v = x - x.mean(0), y - y.mean(0)
    scale = np.sqrt((len(x) - 1) * (len(y) - 1))
    trace = np.linalg.svd(u @ v.T, compute_uv=False).sum() / scale
    spread = (u**2).sum() / (len(x) - 1) + (v**2).sum() / (len(y) - 1)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + spread - 2 * trace


def test_moments_are_numpys():
    x = gaussian(50, 7, 0)
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, x.mean(0))
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False))


@pytest.mark.parametrize("cuts", [[10], [1, 2, 49], [25, 26]])
def test_merged_parts_equal_the_whole(cuts):
    x = gaussian(50, 6, 1) + 1e4  # a large mean is where the naive formula loses its digits
    parts = [Moments.of(part) for part in np.split(x, cuts)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    whole = Moments.of(x)
    assert merged.count == whole.count == 50
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-8)


def test_full_rank_distance_is_the_textbooks():
    x, y = gaussian(200, 8, 2), gaussian(150, 8, 3)
    distance = frechet_distance(Moments.of(x), Moments.of(y))
    assert distance == pytest.approx(textbook(x, y), rel=1e-8)
    assert distance == pytest.approx(by_singular_values(x, y), rel=1e-9)


@pytest.mark.parametrize(("count_x", "count_y"), [(5, 9), (9, 5), (2, 100), (20, 21)])
def test_distance_is_exact_with_fewer_vectors_than_dimensions(count_x, count_y):
    x, y = gaussian(count_x, 40, 4), gaussian(count_y, 40, 5)
    distance = frechet_distance(Moments.of(x), Moments.of(y))
    assert distance == pytest.approx(by_singular_values(x, y), rel=1e-7)


@pytest.mark.parametrize("count", [300, 10])
def test_a_shift_costs_its_squared_length(count):
    x = gaussian(count, 30, 6)
    shift = np.random.default_rng(7).normal(size=30)
    assert frechet_distance(Moments.of(x), Moments.of(x + shift)) == pytest.approx(shift @ shift, rel=1e-6)


@pytest.mark.parametrize("count", [300, 10])
def test_a_scaling_about_the_mean_costs_the_trace(count):
    x = gaussian(count, 30, 8)
    y = x.mean(0) + 1.5 * (x - x.mean(0))
    expected = (1.5 - 1) ** 2 * np.trace(np.cov(x, rowvar=False))
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-6)


def test_diagonal_gaussians_have_a_closed_form():
    rng = np.random.default_rng(9)
    variances = rng.uniform(0.1, 4, (2, 12))
    means = rng.normal(size=(2, 12))
    a, b = (Moments(101, m, 100 * np.diag(v)) for m, v in zip(means, variances, strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((variances[0] ** 0.5 - variances[1] ** 0.5) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_zero_and_order_does_not_matter():
    x, y = Moments.of(gaussian(30, 50, 10)), Moments.of(gaussian(70, 50, 11))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5 * np.trace(x.covariance))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


def test_one_vector_has_no_covariance():
    with pytest.raises(MaisiError, match="at least 2"):
        frechet_distance(Moments.of(np.ones((1, 3))), Moments.of(np.ones((5, 3))))


def volume(seed, shape=(16, 12, 20), spacing=(2.0, 2.0, 2.0), level=0):
    hu = np.random.default_rng(seed).normal(level, 200, shape)
    return Volume.from_spacing(np.clip(hu, -1000, 1000).astype(np.int16), spacing)


def judge(**settings):
    return SliceFid(FidConfig(features="gradients", side=32, **settings))


def test_planes_are_those_of_the_patient():
    """Each plane's slices, whatever the file's axis order, are the ones with one coordinate fixed."""
    seen = {}
    config = FidConfig(side=32, centre_share=1)
    hu = np.full((16, 16, 16), -1000, np.int16)
    hu[3] = 1000  # a sagittal sheet
    ras = Volume.from_spacing(hu, (1, 1, 1))
    turned = Volume(np.transpose(hu, (2, 0, 1)), ras.affine[:, [2, 0, 1, 3]])
    for name, ct in {"ras": ras, "turned": turned}.items():
        seen[name] = SliceFid(config, features=lambda images: images.mean((2, 3))).describe(ct)
    assert set(seen["ras"]) == set(PLANES)
    for plane in PLANES:
        np.testing.assert_allclose(seen["ras"][plane], seen["turned"][plane])
    np.testing.assert_allclose(seen["ras"]["sagittal"][:, 0], np.arange(16) == 3, atol=1e-5)
    np.testing.assert_allclose(seen["ras"]["axial"][:, 0], 1 / 16, atol=1e-3)


def test_central_slices_of_a_common_grid_are_used():
    ct = volume(0, shape=(40, 30, 20), spacing=(1, 1, 3))
    found = judge(spacing_mm=(2.0, 2.0, 2.0), size=(24, 16, 32), centre_share=0.25).describe(ct)
    assert {plane: len(f) for plane, f in found.items()} == {"axial": 8, "sagittal": 6, "coronal": 4}


def test_padding_is_air_even_where_the_volume_has_none():
    ct = Volume.from_spacing(np.full((8, 8, 8), 1000, np.int16), (1, 1, 1))
    config = FidConfig(side=32, size=(16, 16, 16), centre_share=1)
    found = SliceFid(config, features=lambda images: images.mean((2, 3))).describe(ct)
    np.testing.assert_allclose(found["axial"][:, 0], np.r_[[0] * 4, [0.25] * 8, [0] * 4], atol=1e-3)


def test_sets_merge_and_score_as_one():
    j = judge()
    volumes = [volume(seed) for seed in range(6)]
    others = j.moments(volume(seed, level=150) for seed in range(10, 14))
    whole, merged = j.moments(volumes), j.moments(volumes[:2]) + j.moments(volumes[2:])
    assert whole.volumes == merged.volumes == 6
    assert fid(merged, others).average == pytest.approx(fid(whole, others).average, rel=1e-6)


def test_a_different_distribution_is_farther_than_another_sample():
    j = judge()
    a, b = (j.moments(volume(seed) for seed in range(start, start + 4)) for start in (0, 4))
    c = j.moments(volume(seed, level=150) for seed in range(8, 12))
    same, different = fid(a, b), fid(a, c)
    for plane in PLANES:
        assert getattr(different, plane) > 5 * getattr(same, plane)
    assert same.average == pytest.approx((same.axial + same.sagittal + same.coronal) / 3)


def test_too_few_slices_are_scored_but_said():
    rng = np.random.default_rng(0)
    few = pooled({p: rng.normal(size=(3, 50)).astype(np.float32) for p in PLANES} for _ in range(2))
    many = pooled({p: rng.normal(size=(30, 50)).astype(np.float32) for p in PLANES} for _ in range(2))
    assert not fid(few, many).full_rank
    assert fid(many, many).full_rank


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_volumes_are_refused(count):
    j = judge()
    with pytest.raises(MaisiError, match=r"at least 2|2 volumes"):
        fid(j.moments(volume(seed) for seed in range(count)), j.moments([volume(8), volume(9)]))


def test_different_planes_do_not_mix():
    one = Moments.of(np.eye(3))
    with pytest.raises(KeyError):
        PlaneMoments(1, {"axial": one}) + PlaneMoments(1, {"sagittal": one})
