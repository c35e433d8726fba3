import numpy as np
import pytest
import torch

from maisi.evaluation.features import SliceView, load_slice_features, slice_features

NAMES = {"efficientnet-lite0": 1280, "gradients": 18}


@pytest.fixture(scope="module", params=NAMES)
def extractor(request):
    return request.param, load_slice_features(request.param)


def slices(count, height, width, seed=0):
    return np.random.default_rng(seed).random((count, height, width)).astype(np.float32)


def test_one_vector_a_slice_whatever_the_batch(extractor):
    name, features = extractor
    stack = slices(5, 20, 30)
    all_at_once = slice_features(stack, features, SliceView(64), batch_size=5)
    assert all_at_once.shape == (5, NAMES[name])
    in_twos = slice_features(stack, features, SliceView(64), batch_size=2)
    np.testing.assert_allclose(in_twos, all_at_once, atol=1e-4)


def test_different_slices_differ_and_equal_ones_agree(extractor):
    _, features = extractor
    stack = np.concatenate([slices(1, 24, 24), slices(1, 24, 24), 0.2 * slices(1, 24, 24, seed=1)])
    a, b, c = slice_features(stack, features, SliceView(64))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(a - c).max() > 1e-2


def test_padding_to_a_square_is_with_air_and_centred():
    seen = []

    def remember(images):
        seen.append(images)
        return images.flatten(1)[:, :3]

    slice_features(np.ones((2, 10, 20), np.float32), remember, SliceView(20))
    expected = torch.zeros(2, 1, 20, 20)
    expected[:, :, 5:15] = 1
    torch.testing.assert_close(seen[0], expected)


def test_the_pooled_network_is_the_one_that_classifies():
    """The features, sent through the network's own classifier, give the scores of its own forward pass."""
    features = load_slice_features("efficientnet-lite0")
    network = features.backbone.network
    images = torch.from_numpy(slices(2, 64, 64))[:, None]
    normalised = (images.expand(-1, 3, -1, -1) - features.backbone.mean) / features.backbone.std
    with torch.no_grad():
        torch.testing.assert_close(network._fc(features(images)), network(normalised), atol=1e-4, rtol=1e-4)


def test_pooled_gradients_of_a_ramp():
    ramp = torch.arange(16.0)[None, None, None, :].expand(1, 1, 16, 16) / 100
    with torch.no_grad():
        mean = load_slice_features("gradients")(ramp)[0, :3]
    expected = torch.tensor([0.1 * ramp.mean() + 0.01, 0.0, 0.01 * 15 / 16])  # intensity, down, across
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-5)
