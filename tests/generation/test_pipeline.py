from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

import maisi
from maisi.anatomy import label_id, label_name
from maisi.diffusion.guidance import NOISIER
from maisi.errors import MaisiError
from maisi.generation import pipeline
from maisi.generation.job import Job
from maisi.generation.pipeline import Model, RememberingEncoder
from maisi.request import item_seed
from maisi.splitting import plan
from maisi.weights.load import load_network, save_network, sha256
from maisi.weights.registry import ModelFolder

CHEST = {"region": ("chest",), "size": (32, 32, 16), "spacing": (8.0, 8.0, 8.0)}


@pytest.fixture
def changed(model_folder, tmp_path) -> Callable[..., Model]:
    """Load the model with other values in its `model.json`."""
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    written = json.loads((folder / "model.json").read_text())

    def load(**values: object) -> Model:
        (folder / "model.json").write_text(json.dumps({**written, **values}))
        return maisi.load(folder)

    return load


def test_one_call_makes_a_ct(model) -> None:
    item = model.generate(**CHEST, seed=3)
    assert item.image.array.dtype == np.int16
    assert item.image.shape == (32, 32, 16)
    assert item.image.spacing_mm == (8, 8, 8)
    assert np.allclose(item.image.affine @ [15.5, 15.5, 7.5, 1], [0, 0, 0, 1])
    assert -1000 <= item.image.array.min() < item.image.array.max() <= 1000
    assert item.labels is None
    assert item.seed == item_seed(3, 0)
    assert set(item.weights_sha256) == {"autoencoder.safetensors", "unet.safetensors"}
    assert item.details["regions"] == ["chest"]


def test_the_front_door(model_folder) -> None:
    assert isinstance(maisi.load(model_folder), Model)


def test_the_same_seed_gives_the_same_bytes_whatever_ran_before(model, model_folder) -> None:
    alone = maisi.load(model_folder, device="cpu", precision="fp32").generate(**CHEST, seed=7, item=3)
    among = list(model.generate_many(5, **CHEST, seed=7))
    assert [item.number for item in among] == [0, 1, 2, 3, 4]
    assert np.array_equal(among[3].image.array, alone.image.array)
    assert len({item.image.array.tobytes() for item in among}) == 5
    later = next(model.generate_many(2, first=3, **CHEST, seed=7))
    assert np.array_equal(later.image.array, alone.image.array)
    other = model.generate(**CHEST, seed=8, item=3)
    assert not np.array_equal(other.image.array, alone.image.array)


@pytest.mark.parametrize("solver", ["ancestral", "heun"])
def test_solvers_that_draw_noise_repeat_too(model, solver) -> None:
    first, second = (model.generate(**CHEST, steps=3, solver=solver, item=1) for _ in range(2))
    assert np.array_equal(first.image.array, second.image.array)
    assert not np.array_equal(first.image.array, model.generate(**CHEST, steps=3, item=1).image.array)


def test_any_size_is_the_middle_of_the_padded_one(model) -> None:
    wishes = {"region": ("chest",), "spacing": (8.0, 8.0, 8.0)}
    whole = model.generate(size=(32, 32, 32), **wishes).image
    part = model.generate(size=(31, 32, 17), **wishes).image
    assert np.array_equal(part.array, whole.array[0:31, :, 7:24])
    assert np.allclose(part.affine @ [15, 15.5, 8, 1], [0, 0, 0, 1])


def test_conditions_reach_the_network_times_100(model, monkeypatch) -> None:
    told = []
    forward = type(model.unet).forward

    def spy(self, x, times, **kwargs):
        if not x.is_meta:  # the forecast of the memory
            told.append({"times": times, **kwargs})
        return forward(self, x, times, **kwargs)

    monkeypatch.setattr(type(model.unet), "forward", spy)
    model.generate(region=("chest", "abdomen"), size=(16, 16, 16), spacing=(1.5, 2, 3), modality="ct_contrast")
    assert told[0]["spacing"].tolist() == [[150, 200, 300]]
    assert told[0]["top_region"].tolist() == [[0, 100, 0, 0]]
    assert told[0]["bottom_region"].tolist() == [[0, 0, 100, 0]]
    assert told[0]["modality"].tolist() == [3]
    assert told[0]["residuals"] is None
    assert [float(step["times"]) for step in told] == sorted((float(step["times"]) for step in told), reverse=True)


def test_the_latent_is_divided_by_the_scale_factor(model, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(pipeline, "sample", lambda *args, **kwargs: torch.full((1, 4, 4, 4, 4), 1.6))
    air = np.full((16, 16, 16), -1000, np.int16)
    monkeypatch.setattr(pipeline.codec, "decode_tensor", lambda net, z, *told: seen.append(z) or air)
    item = model.generate(region=("chest",), size=(16, 16, 16), spacing=(8, 8, 8))
    assert torch.allclose(seen[0], torch.full((1, 4, 4, 4, 4), 2.0))
    assert (item.image.array == -1000).all()


def test_the_memory_named_decides_the_plan_and_changes_nothing_else(model, monkeypatch) -> None:
    monkeypatch.setattr(plan, "used_memory", lambda device: 10**9)  # that of a process moves while it runs
    monkeypatch.setattr(plan, "CPU_PART", 10**6)
    wishes = {**CHEST, "size": (96, 96, 96)}
    job = model.job(**wishes)
    whole = model.footprint(job)
    assert whole.decode.parts == 1
    enough = 10**9 + whole.weights_bytes + plan.FIXED_BYTES + (whole.decode.peak_bytes - plan.FIXED_BYTES) * 6 // 10
    tight = Model(model.folder, "cpu", "fp32", enough)
    assert tight.footprint(job).decode.parts > 1
    one, other = (m.generate(**wishes).image.array.astype(int) for m in (model, tight))
    assert np.abs(one - other).max() <= 1


def test_too_little_memory_names_what_would_do(model_folder) -> None:
    with pytest.raises(MaisiError, match="give more memory"):
        maisi.load(model_folder, device="cpu", precision="fp32", memory="1MB").generate(**CHEST)


def test_a_mask_is_followed_on_its_own_grid(model, chest_labels) -> None:
    item = model.generate(mask=chest_labels)
    assert item.image.same_grid(chest_labels)
    assert np.array_equal(item.labels.array, chest_labels.array)
    assert "controlnet.safetensors" in item.weights_sha256
    other = chest_labels.with_array(np.where(chest_labels.array == 23, 28, chest_labels.array))
    assert not np.array_equal(model.generate(mask=other).image.array, item.image.array)
    turned = model.generate(mask=chest_labels.to_ras()).image
    assert np.array_equal(turned.array, item.image.to_ras().array)


def test_a_mask_is_told_in_the_ids_that_the_network_knows(model, model_folder, tmp_path, chest_labels) -> None:
    """Lobes that a network is told as one lung make one image; the labels written name them as they were given."""
    folder = tmp_path / "grouped"
    shutil.copytree(model_folder, folder)
    net = load_network(folder / "controlnet.safetensors")
    net.config = net.config.model_copy(update={"told_as": {28: (28, 29)}})
    save_network(folder / "controlnet.safetensors", net)
    settings = json.loads((folder / "model.json").read_text())
    settings["sha256"]["controlnet.safetensors"] = sha256(folder / "controlnet.safetensors")
    (folder / "model.json").write_text(json.dumps(settings))
    grouped = maisi.load(folder, device="cpu", precision="fp32")
    lower = chest_labels.with_array(np.where(chest_labels.array == 28, 29, chest_labels.array).astype(np.uint8))
    found = grouped.generate(mask=lower)
    assert np.array_equal(found.image.array, model.generate(mask=chest_labels).image.array)
    assert not np.array_equal(found.image.array, model.generate(mask=lower).image.array)
    assert np.array_equal(found.labels.array, lower.array)


def test_guidance_goes_away_from_the_mask_without_tumors(model, chest_labels) -> None:
    """Against the formula, with the healthy mask as a mask of its own."""
    x = torch.randn(1, 4, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([500.0])
    healthy = chest_labels.with_array(np.where(chest_labels.array == 23, 28, chest_labels.array))

    def predict(mask, guidance: float):
        with torch.no_grad():
            return model.denoiser(model.job(mask, guidance=guidance))(x, times)

    with_tumor, without = predict(chest_labels, 0), predict(healthy, 0)
    assert not torch.equal(with_tumor, without)
    assert torch.allclose(predict(chest_labels, 2.5), with_tumor + 2.5 * (with_tumor - without), atol=1e-5)
    assert torch.equal(predict(healthy, 2.5), without)


def test_mask_guidance_goes_away_from_no_mask_beside_that_of_tumors(model, chest_labels) -> None:
    """Against the formula, with the region that the mask tells."""
    x = torch.randn(1, 4, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([500.0])
    healthy = chest_labels.with_array(np.where(chest_labels.array == 23, 28, chest_labels.array))

    def predict(job):
        with torch.no_grad():
            return model.denoiser(job)(x, times)

    told, without = predict(model.job(chest_labels)), predict(model.job(healthy))
    job = model.job(chest_labels, mask_guidance=1.5)
    alone = predict(replace(job, labels=None))
    assert not torch.equal(told, alone)
    assert torch.allclose(predict(job), told + 1.5 * (told - alone), atol=1e-5)
    both = model.job(chest_labels, mask_guidance=1.5, guidance=2.0)
    assert torch.allclose(predict(both), told + 1.5 * (told - alone) + 2 * (told - without), atol=1e-5)


def test_mask_guidance_is_the_models_unless_told(model, changed, chest_labels) -> None:
    assert model.job(chest_labels).mask_guidance == 0
    strengthened = changed(mask_guidance=0.5)
    assert strengthened.job(chest_labels).mask_guidance == 0.5
    assert strengthened.job(chest_labels, mask_guidance=0).mask_guidance == 0
    assert strengthened.job(**CHEST).mask_guidance == 0
    with pytest.raises(MaisiError, match="there is none; give a mask or a structure"):
        strengthened.job(**CHEST, mask_guidance=1)


def test_a_structure_is_strengthened_away_from_the_mask_without_it(model, chest_labels) -> None:
    """Against the formula, with body in the structure's place as a mask of its own; one more run for each strength."""
    x = torch.randn(1, 4, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    lobe, other = (label_name(id) for id in (28, 32))

    def predict(job):
        with torch.no_grad():
            return model.denoiser(job)(x, torch.tensor([500.0]))

    def strengthened(**numbers):
        return predict(model.job(chest_labels, strengthen=numbers).of_item(0))

    def lacking(*ids):
        labels = np.where(np.isin(chest_labels.array, ids), np.uint8(200), chest_labels.array)
        return predict(replace(model.job(chest_labels), labels=chest_labels.with_array(labels)))

    told = predict(model.job(chest_labels))
    assert not torch.equal(lacking(28), told)
    expected = told + 2 * (told - lacking(28)) + 0.5 * (told - lacking(32))
    assert torch.allclose(strengthened(**{lobe: 2.0, other: 0.5}), expected, atol=1e-5)
    together = told + 2 * (told - lacking(28, 32))
    assert torch.allclose(strengthened(**{lobe: 2.0, other: 2.0}), together, atol=1e-5)
    assert torch.equal(strengthened(brain=2.0), told)


def test_what_is_strengthened_is_the_models_unless_told(model, changed, chest_labels) -> None:
    assert model.job(chest_labels).strengthened == {}
    lobe, other = (label_name(id) for id in (28, 32))
    usual = changed(strengthen={lobe: 2.0, "brain": 3.0})
    assert usual.job(chest_labels).of_item(0).strengthened == {28: 2.0}, "the map has no brain"
    asked = usual.job(chest_labels, strengthen={other: 1.0}).of_item(0).strengthened
    assert asked == {28: 2.0, 32: 1.0}
    assert usual.job(chest_labels, strengthen={lobe: 0.0}).strengthened.keys() == {label_id("brain")}
    assert usual.job(**CHEST).strengthened == {}
    assert "The mask has no brain to strengthen." in model.job(chest_labels, strengthen={"brain": 1.0}).notes
    with pytest.raises(MaisiError, match="no label map with brain to strengthen; give a mask"):
        model.job(**CHEST, strengthen={"brain": 1.0})
    told = usual.generate(mask=chest_labels, retries=0).details["strengthened"]
    assert told == {lobe: 2.0}


@pytest.mark.parametrize("masked", [False, True])
def test_self_guidance_goes_away_from_what_more_noise_would_mean(model, chest_labels, masked) -> None:
    wish = {"mask": chest_labels} if masked else CHEST
    x = torch.randn(1, 4, 12, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(job, time):
        with torch.no_grad():
            return model.denoiser(job)(x, torch.tensor([time]))

    plain, guided = model.job(**wish), model.job(**wish, self_guidance=1.5)
    told, weaker = predict(plain, 500.0), predict(plain, 500.0 * NOISIER)
    assert not torch.equal(told, weaker)
    assert torch.allclose(predict(guided, 500.0), told + 1.5 * (told - weaker), atol=1e-5)
    assert torch.allclose(predict(guided, 1000.0), predict(plain, 1000.0), atol=1e-6), "no more noise than all"


def test_self_guidance_is_the_models_unless_told(model, changed, chest_labels) -> None:
    """With a mask it may be another one than without."""
    assert model.job(**CHEST).self_guidance == model.job(chest_labels).self_guidance == 0
    assert changed(self_guidance=0.5).job(chest_labels).self_guidance == 0
    own = changed(self_guidance=0.5, mask_self_guidance=0.25)
    assert (own.job(**CHEST).self_guidance, own.job(chest_labels).self_guidance) == (0.5, 0.25)
    assert own.job(**CHEST, self_guidance=0).self_guidance == own.job(chest_labels, self_guidance=0).self_guidance == 0
    assert own.job(chest_labels, self_guidance=1).self_guidance == 1


def test_the_temperature_is_the_models_where_it_follows_a_mask(model, changed, chest_labels) -> None:
    own = changed(mask_temperature=0.5)
    assert model.job(chest_labels).temperature == own.job(**CHEST).temperature == 1
    assert own.job(chest_labels).temperature == 0.5
    assert own.job(chest_labels, temperature=0.75).temperature == own.job(**CHEST, temperature=0.75).temperature == 0.75


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_temperature_multiplies_the_noise_of_an_item(model, monkeypatch, temperature) -> None:
    wishes = {**CHEST, "solver": "ddim"}
    made = model.generate(**wishes, temperature=temperature)
    draw = model.noise

    def scaled(padded, seed):
        noise, generator = draw(padded, seed)
        return temperature * noise, generator

    monkeypatch.setattr(model, "noise", scaled)
    expected = model.generate(**wishes)
    assert np.array_equal(made.image.array, expected.image.array)
    assert (made.details["temperature"], expected.details["temperature"]) == (temperature, 1)


def test_the_steps_are_the_models_unless_told(model, changed, chest_labels) -> None:
    """With a mask they may be others than without."""
    assert model.job(chest_labels).steps == model.job(**CHEST).steps == 2
    own = changed(mask_steps=7)
    assert (own.job(**CHEST).steps, own.job(chest_labels).steps) == (2, 7)
    assert own.job(chest_labels, steps=3).steps == 3


def test_views_larger_than_known_take_more_steps(model, changed, chest_labels) -> None:
    """The model knows chests of up to 1.25 times 384 x 256 x 256 mm, and 48 mm more are a tenth more."""
    process, wish = model.folder.config.process, {"region": "chest", "spacing": (8, 8, 8)}
    for told, most in ((process, 80), ({**process, "num_train_timesteps": 40}, 40)):
        own = changed(default_steps=20, process=told)
        steps = [own.job(size=(x, 32, 32), **wish).steps for x in (32, 60, 66, 120, 240)]
        assert steps == [20, 20, 22, 40, most]
    assert own.job(size=(66, 32, 32), steps=5, **wish).steps == 5
    assert own.job(chest_labels).steps == 20


def test_the_solver_is_the_models_unless_told(changed, chest_labels) -> None:
    """With a mask it may be another one than without."""
    own = changed(solver="ancestral", mask_solver="heun")
    assert (own.job(**CHEST).solver, own.job(chest_labels).solver) == ("ancestral", "heun")
    assert own.job(chest_labels, solver="euler").solver == "euler"
    assert changed(solver="ancestral").job(chest_labels).solver == "ancestral"


def test_guidance_without_a_mask_goes_away_from_no_region(model) -> None:
    x = torch.randn(1, 4, 8, 8, 4, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([500.0])

    def predict(**wishes):
        with torch.no_grad():
            return model.denoiser(model.job(**{**CHEST, **wishes}))(x, times)

    chest, nowhere = predict(), predict(region=())
    assert torch.allclose(predict(guidance=3.0), chest + 3 * (chest - nowhere), atol=1e-5)
    mr, unknown = predict(region=(), modality="mri_t1"), predict(region=(), modality="unknown")
    assert torch.allclose(predict(region=(), modality="mri_t1", guidance=3.0), mr + 3 * (mr - unknown), atol=1e-5)


def test_guidance_with_nothing_to_act_on_is_refused(model) -> None:
    with pytest.raises(MaisiError, match="nothing to strengthen"):
        model.generate(size=(16, 16, 16), spacing=(8, 8, 8), guidance=2)


def test_a_mask_is_encoded_once() -> None:
    calls = []

    class Encoder(torch.nn.Module):
        def forward(self, bits):
            calls.append(bits)
            return bits + 1

    remembering = RememberingEncoder(Encoder())
    first, second = torch.zeros(2), torch.ones(2)
    for _ in range(3):
        assert torch.equal(remembering(first), first + 1)
        assert torch.equal(remembering(second), second + 1)
    assert len(calls) == 2
    del first
    calls.clear()
    remembering(second)
    assert (len(calls), len(remembering._answers)) == (0, 1)


def test_progress_is_told(model) -> None:
    told = []
    model.generate(**CHEST, progress=lambda *args: told.append(args))
    assert told == [("denoise", 1, 2), ("denoise", 2, 2), ("decode", 0, 1), ("decode", 1, 1)]


def test_bf16_makes_nearly_the_same(model, model_folder) -> None:
    half = maisi.load(model_folder, device="cpu", precision="bf16").generate(**CHEST)
    assert half.details["precision"] == "bfloat16"
    difference = np.abs(half.image.array.astype(float) - model.generate(**CHEST).image.array)
    assert 0 < difference.mean() < 30


@pytest.mark.parametrize(
    ("wishes", "word"),
    [
        ({"solver": "magic"}, "'magic' is no solver"),
        ({"steps": 0}, "steps"),
        ({"size": (768, 768, 512)}, "give more memory"),
        ({"region": ("chst",)}, "did you mean 'chest'"),
        ({"spacing": (0.1, 1, 1)}, "spacing"),
        ({"size": (0, 1, 1)}, "size"),
        ({"guidance": -1.0}, "guidance"),
        ({"modality": "ultrasound"}, "modality"),
    ],
)
def test_faults_are_told_before_any_network_is_loaded(model_folder, monkeypatch, wishes, word) -> None:
    def never(*args, **kwargs):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(ModelFolder, "load", never)
    monkeypatch.setattr(plan, "free_memory", lambda device: 500_000_000)
    with pytest.raises(MaisiError, match=word):
        maisi.load(model_folder).generate(**{**CHEST, **wishes})


def test_a_damaged_network_is_refused(model_folder, tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    file = folder / "unet.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(MaisiError, match=r"model\.json"):
        maisi.load(folder).generate(**CHEST)


def test_a_wrong_size_multiple_is_refused(model_folder, tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    values = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(values | {"size_multiple": 4}))
    with pytest.raises(MaisiError, match="its networks need 16"):
        maisi.load(folder).generate(**{**CHEST, "size": (20, 20, 20)})


def test_a_job_is_checked_once_for_all_items(model, monkeypatch) -> None:
    job = model.job(**CHEST, count=2)
    assert isinstance(job, Job)
    items = model.run(job, [0, 5])
    assert [item.number for item in items] == [0, 5]
