"""Features of published networks, on stand-ins for their files (`published`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import published
import pytest
import torch

from maisi import cli
from maisi.data.phantom import phantom
from maisi.errors import MaisiError
from maisi.evaluation.feature_weights import FeatureWeights, choose_features
from maisi.evaluation.features import VIEWS, SliceView, load_slice_features, slice_features
from maisi.evaluation.fid import FidConfig, SliceFid
from maisi.evaluation.memorisation import slice_mean_features
from maisi.evaluation.perceptual import load_distance
from maisi.io.nifti import read_volume, write_volume
from maisi.networks.lpips import LpipsConfig
from maisi.weights.load import load_network

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "feature_networks.json").read_text())


def require_golden(name: str, found: torch.Tensor) -> None:
    """Compare with what the published implementation made of the same weights."""
    expected = GOLDEN[name]
    assert list(found.shape) == expected["shape"]
    some = found.flatten()[:: max(1, found.numel() // 8)][:8].double()
    scale = max(abs(value) for value in expected["values"])
    torch.testing.assert_close(some / scale, torch.tensor(expected["values"]).double() / scale, atol=1e-5, rtol=0)
    assert float(found.double().norm()) == pytest.approx(expected["norm"], rel=1e-5)


@pytest.mark.parametrize("name", ["inception fid", "inception torchvision", "radimagenet keras", "radimagenet torch"])
def test_converted_files_give_the_published_features(name, converted) -> None:
    network, variant = name.split()
    weights = FeatureWeights.read(converted(name))
    assert (weights.network, weights.variant) == (network, variant)
    with torch.no_grad():
        require_golden(name, load_slice_features(network, weights)(published.images(published.SIDES[network])))


@pytest.mark.parametrize("name", [name for name in published.FILES if name.startswith(("trunk", "lpips"))])
def test_converted_lpips_is_the_published_one(name, converted) -> None:
    distance = load_distance("lpips", FeatureWeights.read(converted(name)))
    a, b = published.images(published.SIDES["lpips"]).split(1)
    with torch.no_grad():
        require_golden(name.replace("trunk", "lpips"), torch.tensor([distance(a, b)]))
        assert distance(a, a) == 0


def test_lpips_by_its_formula(converted) -> None:
    network = load_network(converted("trunk alexnet"))
    assert network.config == LpipsConfig(variant="alexnet")
    images = published.images(published.SIDES["lpips"])
    x = ((2 * images - 1).expand(-1, 3, -1, -1) - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor(
        [0.458, 0.448, 0.450]
    )[:, None, None]
    total, depth = 0.0, 0
    with torch.no_grad():
        for place, layer in enumerate(network.features):
            x = layer(x)
            if place in (1, 4, 7, 9, 11):
                a, b = x.double().numpy()
                head = network.heads[depth].weight.double().numpy().reshape(-1, 1, 1)
                a, b = (m / (np.sqrt((m**2).sum(0)) + 1e-10) for m in (a, b))
                total, depth = total + (head * (a - b) ** 2).sum(0).mean(), depth + 1
        found = float(network(images[:1], images[1:]))
    assert found == pytest.approx(total, rel=1e-5)


def test_inception_sees_square_slices_as_pytorch_fid_does(converted) -> None:
    features = load_slice_features("inception", FeatureWeights.read(converted("inception fid")))
    slices = np.random.default_rng(5).random((2, 120, 120), dtype="float32")
    require_golden("inception fid resized", torch.from_numpy(slice_features(slices, features, VIEWS["inception"])))


def seen_by(slices: np.ndarray, view: SliceView) -> torch.Tensor:
    """What an extractor is given."""
    seen = []
    slice_features(slices, lambda images: seen.append(images) or images.flatten(1), view, batch_size=2)
    return torch.cat(seen)


def test_radimagenet_sees_slices_as_they_are_and_stretched_together() -> None:
    slices = np.random.default_rng(0).uniform(0.2, 0.6, (3, 10, 14)).astype(np.float32)
    seen = seen_by(slices, VIEWS["radimagenet"])
    least, greatest = slices.min(), slices.max()
    np.testing.assert_allclose(seen[:, 0].numpy(), (slices - least) / (greatest - least), atol=1e-6)
    assert (float(seen.min()), float(seen.max())) == (0, 1)
    assert float(seen[0].max()) < 1 or float(seen[1].max()) < 1
    flat = seen_by(np.full((2, 10, 14), 0.3, np.float32), VIEWS["radimagenet"])
    assert float(flat.abs().max()) == 0


def test_the_record_names_weights_by_their_hash_alone(converted) -> None:
    path = converted("radimagenet keras")
    weights = FeatureWeights.read(path)
    stored = FidConfig(features="radimagenet", feature_weights=weights).model_dump(mode="json")
    assert stored["feature_weights"] == {"network": "radimagenet", "variant": "keras", "sha256": weights.sha256}
    assert FidConfig().view == SliceView(224)
    assert FidConfig(features="inception").view == SliceView(299, antialias=False)
    assert FidConfig(features="radimagenet", side=64).view == SliceView(64, stretched=True)


def test_features_and_files_have_to_go_together(converted, model_folder, tmp_path) -> None:
    radimagenet, lpips = converted("radimagenet keras"), converted("trunk squeezenet1_1")
    name, weights = choose_features(None, radimagenet, "gradients", ("inception", "radimagenet"))
    assert (name, weights.network) == ("radimagenet", "radimagenet")
    assert choose_features(None, None, "gradients", ()) == ("gradients", None)
    (tmp_path / "foreign.safetensors").write_bytes(b"nonsense")
    cases = (
        ("inception", None, "convert it by 'maisi weights convert'"),
        ("inception", radimagenet, "holds 'radimagenet', not 'inception'"),
        ("gradients", radimagenet, "not 'gradients'; leave the file or the name out"),
        (None, lpips, "'lpips', which is of no use here; give one of inception, radimagenet"),
        (None, model_folder / "unet.safetensors", "holds 'unet', which gives no features"),
        (None, tmp_path / "foreign.safetensors", "not a safetensors file"),
        (None, tmp_path / "absent.safetensors", "Cannot read"),
    )
    for features, path, said in cases:
        with pytest.raises(MaisiError, match=said):
            choose_features(features, path, "gradients", ("inception", "radimagenet"))
    with pytest.raises(MaisiError, match="come from a published file"):
        load_slice_features("radimagenet")
    with pytest.raises(ValueError, match="75 pixels at least, not 64"):
        FidConfig(features="inception", side=64)


SIZE, SPACING = (24, 20, 16), (14.0, 14.0, 14.0)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, first in {"real": 0, "made": 10}.items():
        (folder / name).mkdir()
        for number in range(2):
            ct = phantom(SIZE, SPACING, ("chest",), seed=first + number)[0]
            write_volume(folder / name / f"{name}{number}.nii.gz", ct)
    return folder


def test_slices_are_taken_as_by_the_reference(sets, converted) -> None:
    """The central 40 % of each axis; HU clipped; one stretch for a volume's plane; no resizing; spatial mean."""
    weights = FeatureWeights.read(converted("radimagenet keras"))
    ct = read_volume(sets / "real" / "real0.nii.gz")
    judge = SliceFid(FidConfig(features="radimagenet", feature_weights=weights, centre_share=0.4))
    found = judge.describe(ct)
    network = load_network(weights.path)
    hu = np.clip(ct.to_ras().array, -1000, 1000).astype(np.float32)
    for plane, axis, first, last in (("axial", 2, 5, 11), ("sagittal", 0, 7, 17), ("coronal", 1, 6, 14)):
        slices = np.moveaxis(hu, axis, 0)[first:last]
        slices = (slices - slices.min()) / (slices.max() - slices.min())
        with torch.no_grad():
            expected = network(torch.from_numpy(slices)[:, None]).mean((2, 3)).numpy()
        np.testing.assert_allclose(found[plane], expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_the_fid_command_says_which_features_and_weights(sets, converted, tmp_path) -> None:
    path = converted("radimagenet keras")
    words = ["evaluate", "fid", sets / "made", sets / "real", "--feature-weights", path, "--metrics", "mmd"]
    assert cli.run([*map(str, words), "-o", str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    weights = FeatureWeights.read(path)
    assert values["settings"]["fid"]["features"] == "radimagenet"
    assert values["settings"]["fid"]["feature_weights"]["sha256"] == weights.sha256
    assert values["settings"]["slices_seen"] == {"side": None, "antialias": True, "stretched": True}
    assert any(weights.sha256[:12] in note for note in values["notes"])
    assert np.isfinite(values["summary"]["mmd"])


def test_memorisation_takes_the_same_features(sets, converted, tmp_path) -> None:
    path = converted("radimagenet keras")
    weights = FeatureWeights.read(path)
    ct = read_volume(sets / "real" / "real0.nii.gz")
    assert slice_mean_features("radimagenet", 20.0, weights)(ct).shape == (3 * 2048,)
    words = ["evaluate", "memorisation", sets / "made", sets / "real", "--feature-weights", path]
    assert cli.run([*map(str, words), "-o", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "result.json").read_text())["settings"]
    assert (settings["features"], settings["feature_weights"]["sha256"]) == ("radimagenet", weights.sha256)


def test_reconstructions_are_judged_by_published_lpips(sets, converted, model_folder, tmp_path) -> None:
    path = converted("trunk alexnet")
    image = sets / "made" / "made0.nii.gz"
    words = ["evaluate", "reconstruction", image, "--model", model_folder, "--lpips-weights", path, "--device", "cpu"]
    assert cli.run([*map(str, words), "--precision", "fp32", "-o", str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    assert values["settings"]["features"] == "lpips"
    assert values["settings"]["feature_weights"]["sha256"] == FeatureWeights.read(path).sha256
    assert values["summary"]["perceptual"] > 0
    assert any("LPIPS 0.1 (alexnet, sha256" in note for note in values["notes"])


def test_radimagenet_compares_directions_of_its_last_maps(converted) -> None:
    path = converted("radimagenet keras")
    images = published.images(published.SIDES["radimagenet"])
    with torch.no_grad():
        found = load_distance("radimagenet", FeatureWeights.read(path))(*images.split(1))
        a, b = load_network(path)(images).double()
        cosines = (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()
    assert found == pytest.approx(float((2 - 2 * cosines).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("fid", ["--features", "inception"], "come from a published file"),
        ("fid", ["--feature-weights", "absent.safetensors"], "Cannot read"),
        ("fid", ["--features", "gradients", "--device", "tpu"], "Unknown device 'tpu'"),
        ("memorisation", ["--features", "radimagenet"], "come from a published file"),
        ("reconstruction", ["--lpips-features", "lpips"], "come from a published file"),
        ("reconstruction", ["--lpips-weights", "absent.safetensors"], "Cannot read"),
    ],
)
def test_commands_refuse_before_they_work(sets, tmp_path, capsys, command, words, said) -> None:
    places = [str(sets / "made"), str(sets / "real")][: 1 if command == "reconstruction" else 2]
    assert cli.run(["evaluate", command, *places, *words, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
