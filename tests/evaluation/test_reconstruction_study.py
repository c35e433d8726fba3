from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from maisi import cli
from maisi.data.phantom import phantom
from maisi.data.preprocess import resample
from maisi.errors import MaisiError
from maisi.evaluation.cache import Cache
from maisi.evaluation.reconstruction_study import ReconstructionConfig, ReconstructionStudy
from maisi.evaluation.volumes import find_entries
from maisi.generation import codec
from maisi.io.nifti import read_volume, write_volume
from maisi.volume import Volume

SIZE, SPACING = (28, 24, 20), (12.0, 12.0, 12.0)


@dataclass
class Noise:
    """Stands for somebody else's autoencoder: adds the same noise to any volume."""

    hu: float
    seen: list[Volume] = field(default_factory=list)

    def __call__(self, ct: Volume) -> Volume:
        self.seen.append(ct)
        noise = np.random.default_rng(0).normal(0, self.hu, ct.shape)
        return ct.with_array(np.rint(ct.array + noise).astype(np.int16))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruction")
    for place in ("images", "labels"):
        (folder / place).mkdir()
    for number in range(3):
        ct, labels = phantom(SIZE, SPACING, ("chest",), seed=number)
        write_volume(folder / "images" / f"{number}.nii.gz", ct)
        write_volume(folder / "labels" / f"{number}.nii.gz", labels)
    return folder


def study(reconstruct, cache=None, **how):
    config = ReconstructionConfig(**{"features": "gradients", "slices": 2, "draws": 200} | how)
    return ReconstructionStudy(reconstruct, {"who": "noise"}, config, cache)


@pytest.fixture(scope="module")
def result(data):
    return study(Noise(60)).run(find_entries([data / "images"], labels=data / "labels"))


def test_rows_are_those_of_another_implementation(result, data) -> None:
    made = Noise(60)
    for row in result.items:
        ct = read_volume(data / "images" / f"{row['volume']}.nii.gz").to_ras()
        a, b = (np.clip(v.array.astype(float), -1000, 1000) for v in (ct, made(ct)))
        assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2000), abs=1e-4)
        shifted = (v + 1000 for v in (a, b))  # SSIM compares means, so it is not blind to the zero
        assert row["ssim"] == pytest.approx(structural_similarity(*shifted, win_size=7, data_range=2000), abs=1e-6)
        assert row["mae_hu"] == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
        assert row["bias_hu"] == pytest.approx((b - a).mean(), abs=1e-3)
        assert row["perceptual"] > 0


def test_means_come_with_intervals_and_structures_by_name(result) -> None:
    values = [row["psnr"] for row in result.items]
    summary = result.summary
    assert summary["volumes"] == 3
    assert summary["psnr"] == pytest.approx(np.mean(values))
    assert min(values) <= summary["psnr_low"] <= summary["psnr"] <= summary["psnr_high"] <= max(values)
    in_body = 60 * math.sqrt(2 / math.pi)
    assert summary["mae_hu_heart"] == pytest.approx(in_body, rel=0.1)
    assert summary["volumes_lungs"] == 3
    assert "mae_hu_left_lung_upper_lobe_low" in summary
    row = result.items[0]["structures"]
    lungs = [n for n in row if n.startswith("left lung") or n.startswith("right lung")]
    assert row["lungs"]["voxels"] == sum(row[name]["voxels"] for name in lungs)


def test_classes_of_ones_own_have_their_names_or_numbers(data) -> None:
    ct = read_volume(data / "images" / "0.nii.gz").to_ras()
    ids = np.zeros(ct.shape, np.uint8)
    ids[:4], ids[4:9] = 150, 151
    row = study(Noise(60)).judge(ct, ct.with_array(ids), names={150: "my plate"})
    assert row["structures"]["my plate"]["voxels"] == 4 * ct.shape[1] * ct.shape[2]
    assert "label 151" in row["structures"]


def test_a_perfect_reconstruction_has_no_error_and_no_finite_psnr(data) -> None:
    found = study(Noise(0)).run(find_entries([data / "images"]))
    assert (found.summary["psnr"], found.summary["mae_hu"], found.summary["perceptual"]) == (None, 0, 0)
    assert found.summary["ssim"] == pytest.approx(1)
    assert any("infinite PSNR" in note for note in found.notes)


def test_volumes_are_resampled_and_it_is_said(data) -> None:
    made = Noise(60)
    found = study(made, spacing_mm=(15.0, 15.0, 15.0), features="none").run(
        find_entries([data / "images"], labels=data / "labels")
    )
    expected = resample(read_volume(data / "images" / "0.nii.gz"), (15.0, 15.0, 15.0))
    np.testing.assert_array_equal(made.seen[0].array, expected.array)
    assert found.items[0]["size"] == "22x19x16"
    assert found.summary["perceptual"] is None
    assert "3 of 3 volumes were resampled to 15x15x15 mm before." in found.notes


def test_an_interrupted_run_goes_on_and_gives_the_same(data, tmp_path) -> None:
    found = find_entries([data / "images"], labels=data / "labels")

    class Stops(Noise):
        def __call__(self, ct):
            if len(self.seen) == 2:
                raise KeyboardInterrupt
            return super().__call__(ct)

    cache = Cache(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        study(Stops(60), cache).run(found)
    made = Noise(60)
    resumed = study(made, cache).run(found)
    assert len(made.seen) == 1
    whole = study(Noise(60)).run(found)
    assert (resumed.items, resumed.summary) == (whole.items, whole.summary)
    other = Noise(60)
    study(other, cache, slices=1).run(found)
    assert len(other.seen) == 3  # other settings are another result


def test_a_reconstructor_that_changes_the_grid_is_refused(data) -> None:
    with pytest.raises(MaisiError, match="keeps the grid"):
        study(lambda ct: Volume(ct.array[1:], ct.affine)).run(find_entries([data / "images"]))


def test_mirror_images_come_out_mirrored_or_are_measured(data) -> None:
    found = find_entries([data / "images"])
    assert study(Noise(60)).run(found).summary["mirror_hu"] is None
    assert study(Noise(0), mirror=True).run(found).summary["mirror_hu"] == 0

    def one_sided(ct: Volume) -> Volume:
        made = ct.array.copy()
        made[: len(made) // 4 * 2] += 20
        return ct.with_array(made)

    assert study(one_sided, mirror=True).run(found).summary["mirror_hu"] == pytest.approx(20, abs=1.5)


def test_headers_that_differ_by_a_hair_are_resampled_together(tmp_path) -> None:
    ct, labels = phantom((65, 40, 40), (1.5, 6, 6), ("chest",), seed=0)
    affine = ct.affine.copy()
    affine[0, 0] += 1e-5  # 65 voxels: 32.5 of 3 mm, rounded down and up
    for place, volume in (("images", ct), ("labels", Volume(labels.array, affine))):
        (tmp_path / place).mkdir()
        write_volume(tmp_path / place / "a.nii.gz", volume)
    found = study(Noise(60), spacing_mm=(3.0, 6.0, 6.0), features="none").run(
        find_entries([tmp_path / "images"], labels=tmp_path / "labels")
    )
    assert found.items[0]["structures"]["body"]


def test_a_volume_that_is_too_small_is_named(tmp_path) -> None:
    ct = phantom((40, 40, 4), (9, 9, 9), ("chest",), seed=0)[0]
    write_volume(tmp_path / "thin.nii.gz", ct)
    with pytest.raises(MaisiError, match=r"thin: SSIM needs 7 voxels"):
        study(Noise(60)).run(find_entries([tmp_path / "thin.nii.gz"]), skip_unreadable=True)


def test_damage_is_found_while_reading(data, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    for path in (data / "images").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "images" / "1.nii.gz"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    found = find_entries([tmp_path / "images"])
    with pytest.raises(MaisiError, match=r"1\.nii\.gz is cut short.*--skip-unreadable"):
        study(Noise(60)).run(found)
    left = study(Noise(60)).run(found, skip_unreadable=True)
    assert [row["volume"] for row in left.items] == ["0", "2"]
    assert any("1.nii.gz" in note for note in left.notes)


def evaluate(*arguments: object) -> int:
    return cli.run(["evaluate", "reconstruction", *map(str, arguments)])


def test_the_command_judges_a_model(data, model, model_folder, tmp_path) -> None:
    images = data / "images"
    common = (images, "--labels", data / "labels", "--model", model_folder, "--precision", "fp32", "--device", "cpu")
    common += ("--lpips-features", "gradients")
    kept = ("--cache", tmp_path / "kept")
    assert evaluate(*common, *kept, "-o", tmp_path / "out") == 0
    values = json.loads((tmp_path / "out" / "result.json").read_text())
    ct = read_volume(images / "0.nii.gz").to_ras()
    made = codec.decode(model.autoencoder, codec.encode(model.autoencoder, ct))
    a, b = (np.clip(v.array.astype(float), -1000, 1000) for v in (ct, made))
    assert values["items"][0]["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2000), abs=1e-3)
    assert values["summary"]["volumes"] == 3
    assert values["settings"]["autoencoder_sha256"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"result.json", "table.md", "figure.png"}
    answers = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(answers) == 3 + 1
    # from the cache alone, with the autoencoder named as a file
    autoencoder = model_folder / "autoencoder.safetensors"
    again = [*common[:3], "--autoencoder", autoencoder, *common[5:], *kept]
    assert evaluate(*again, "-o", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / "result.json").read_text()) == values
    assert answers == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}


def test_the_command_refuses_before_it_works(data, tmp_path, capsys) -> None:
    (tmp_path / "there").mkdir()
    assert evaluate(data / "images", "-o", tmp_path / "there") == 2
    assert "exists" in capsys.readouterr().err
    assert evaluate(tmp_path / "nowhere", "-o", tmp_path / "out") == 2
    assert "does not exist" in capsys.readouterr().err
    assert evaluate(data / "images", "--lpips-features", "vgg", "-o", tmp_path / "out") == 2
    assert "vgg" in capsys.readouterr().err
    assert evaluate(data / "images", "--spacing", "0,1,1", "-o", tmp_path / "out") == 2
    assert "spacing" in capsys.readouterr().err
    assert evaluate(data / "images", "--python", "a.py:b", "--precision", "fp32", "-o", tmp_path / "out") == 2
    assert "--precision is for an autoencoder of this package" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
