from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import maisi
from maisi import cli
from maisi.data.latents import load_latent
from maisi.data.phantom import phantom
from maisi.io.nifti import read_labels, read_volume, write_volume
from maisi.splitting import plan as planning
from maisi.volume import Volume

CHEST = ("--region", "chest", "--size", "32,32,16", "--spacing", "8,8,8", "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def mask_file(tmp_path, chest_labels) -> Path:
    write_volume(tmp_path / "mask.nii.gz", chest_labels)
    return tmp_path / "mask.nii.gz"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def generate(model_folder: Path, out: Path, *more: object) -> int:
    return cli.run(["generate", "--model", str(model_folder), *CHEST, "-o", str(out), *map(str, more)])


# ---- without torch -----------------------------------------------------------------------------------------------

QUICK = [
    ["--help"],
    ["--version"],
    ["generate", "--help"],
    ["labels"],
    ["models"],
    ["generate", "--region", "chst", "-o", "out"],
    ["generate", "--region", "chest", "--size", "0,1,1", "-o", "out"],
]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_commands_need_no_torch_and_little_time(arguments, tmp_path) -> None:
    code = f"import sys; from maisi import cli; cli.run({arguments!r}); sys.exit('torch' in sys.modules)"

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    bound = 1.0 if arguments == ["models"] else 0.5
    # time of the processor, the least of five runs: other work on the machine only adds to what a command costs
    assert any(seconds() < bound for _ in range(5))


def test_a_bad_mask_is_refused_without_torch(model_folder, mask_file, tmp_path) -> None:
    bad = read_labels(mask_file)
    write_volume(tmp_path / "bad.nii.gz", bad.with_array(np.full_like(bad.array, 250)))
    arguments = [
        "generate",
        "--model",
        str(model_folder),
        "--mask",
        str(tmp_path / "bad.nii.gz"),
        "-o",
        str(tmp_path / "o"),
    ]
    code = f"import sys; from maisi import cli; print(cli.run({arguments!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "False"]


def test_the_command_is_installed() -> None:
    done = subprocess.run([sys.executable, "-m", "maisi", "--version"], capture_output=True, text=True, check=True)
    assert maisi.__version__ in done.stdout


# ---- bad input ---------------------------------------------------------------------------------------------------


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments after `generate` (but for -o), and a word of the sentence that must come."""
    good = Volume.from_spacing(np.full((32, 32, 16), 200, np.uint8), (8.0, 8.0, 8.0))
    write_volume(folder / "good.nii.gz", good)
    raw = gzip.decompress((folder / "good.nii.gz").read_bytes())
    (folder / "cut.nii").write_bytes(raw[:-100])
    (folder / "noise.nii.gz").write_bytes(b"this is no image")
    header = bytearray(raw)
    header[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
    (folder / "huge.nii").write_bytes(header)
    four = bytearray(raw)
    four[40:50] = np.array([4, 32, 32, 8, 2], "<i2").tobytes()
    (folder / "four.nii").write_bytes(four)
    twisted = bytearray(raw)
    twisted[280:296] = np.array([np.nan] * 4, "<f4").tobytes()
    (folder / "nan.nii").write_bytes(twisted)
    for name, value in (("unknown", 250), ("zero", 0)):
        write_volume(folder / f"{name}.nii.gz", good.with_array(np.full_like(good.array, value)))
    write_volume(folder / "hu.nii.gz", good.with_array(np.full(good.shape, -1000, np.int16)))
    mask = {
        "cut": "cut short",
        "huge": "its header asks for",
        "four": "one 3D volume",
        "nan": "affine",
    }
    cases = {f"mask-{name}": (["--mask", str(folder / f"{name}.nii")], word) for name, word in mask.items()}
    masks = {"unknown": "250", "zero": "empty", "hu": "-1000", "noise": "NIfTI", "absent": "Cannot read"}
    cases |= {f"mask-{name}": (["--mask", str(folder / f"{name}.nii.gz")], word) for name, word in masks.items()}
    other = ["--mask", str(folder / "good.nii.gz"), "--size", "16,16,16"]
    return cases | {
        "mask-geometry": (other, "32,32,16 voxels, not 16,16,16"),
        "size-zero": (["--region", "chest", "--size", "0,10,10"], "size"),
        "size-negative": (["--region", "chest", "--size=-5,10,10"], "size"),
        "size-two": (["--region", "chest", "--size", "10,10"], "three whole numbers"),
        "size-words": (["--region", "chest", "--size", "big"], "three whole numbers"),
        "size-beyond": (["--region", "chest", "--size", "1024,1024,1024", "--spacing", "1,1,1"], "million voxels"),
        "spacing-tiny": (["--region", "chest", "--spacing", "0.01,1,1"], "0.3 to 10"),
        "spacing-nan": (["--region", "chest", "--spacing", "nan,1,1"], "spacing"),
        "region": (["--region", "chst"], "did you mean 'chest'"),
        "model": (["--region", "chest", "--model", "tyni"], "There is no model 'tyni'"),
        "seed": (["--region", "chest", "--seed", "-1"], "seed"),
        "count": (["--region", "chest", "-n", "0"], "count"),
        "first": (["--region", "chest", "--first", "-1"], "numbered from 0"),
        "steps": (["--region", "chest", "--steps", "0"], "steps"),
        "solver": (["--region", "chest", "--solver", "magic"], "no solver"),
        "guidance": (["--region", "chest", "--guidance", "-1"], "guidance"),
        "fov": (["--region", "chest", "--fov", "wide"], "fov"),
        "fov-alone": (["--fov", "auto"], "name at least one region"),
        "device": (["--region", "chest", "--device", "tpu"], "Unknown device 'tpu'"),
        "precision": (["--region", "chest", "--precision", "fp8"], "Unknown precision 'fp8'"),
        "modality": (["--region", "chest", "--modality", "xray"], "modality"),
        "option": (["--regoin", "chest"], "--region"),
    }


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad")


def test_every_bad_input_is_one_sentence_and_nothing_written(model_folder, tmp_path, bad_folder, capsys) -> None:
    faults = []
    for name, (arguments, word) in bad_inputs(bad_folder).items():
        model = [] if "--model" in arguments else ["--model", str(model_folder)]
        code = cli.run(["generate", *model, *arguments, "-o", str(tmp_path / "out")])
        shown = capsys.readouterr()
        last = shown.err.strip().splitlines()[-1]
        if code != 2 or word not in last or shown.out or list(tmp_path.iterdir()):
            faults.append(f"{name}: code {code}, '{last}'")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "pickled"])
def test_bad_weights_are_refused(kind, model_folder, tmp_path, capsys) -> None:
    import shutil

    import torch

    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    file = model / "unet.safetensors"
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif kind == "foreign":
        file.write_bytes(b"\x89PNG not weights at all, but long enough to look at")
    else:
        torch.save({"a": torch.zeros(3)}, file)
    assert generate(model, tmp_path / "out") == 2
    assert str(file) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_and_kept(model_folder, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert generate(model_folder, tmp_path / "out") == 2
    assert "exists" in capsys.readouterr().err
    assert files_in(tmp_path) == {"out/mine.txt": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_is_not_writable_is_refused(model_folder, tmp_path, capsys) -> None:
    tmp_path.chmod(0o500)
    assert generate(model_folder, tmp_path / "out") == 2
    assert "not writable" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence(model_folder, tmp_path, capsys, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("maisi.generation.output.write_volume", full)
    assert generate(model_folder, tmp_path / "out") == 2
    assert "No space left on device; free some space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_a_sentence(model_folder, tmp_path, capsys, monkeypatch) -> None:
    def starved(*args, **kwargs):
        torch.empty(2**50)

    monkeypatch.setattr("maisi.generation.pipeline.sample", starved)
    assert generate(model_folder, tmp_path / "out") == 2
    assert "memory did not suffice; close what else uses it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_other_faults_keep_their_traceback(model_folder, tmp_path, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("maisi.generation.pipeline.sample", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        generate(model_folder, tmp_path / "out")


# ---- generation --------------------------------------------------------------------------------------------------


def test_generate_writes_items(model_folder, tmp_path, capsys) -> None:
    assert generate(model_folder, tmp_path / "out", "-n", 2, "--seed", 5) == 0
    names = [f"{n:04d}/{name}" for n in (0, 1) for name in ("image.nii.gz", "preview.png", "record.json")]
    assert list(files_in(tmp_path / "out")) == [*names, "request.json"]
    record = json.loads((tmp_path / "out/0001/record.json").read_text())
    assert (record["synthetic"], record["item"], record["request"]["seed"]) == (True, 1, 5)
    image = read_volume(tmp_path / "out/0001/image.nii.gz")
    direct = maisi.load(model_folder, "cpu", "fp32").generate(
        region=("chest",), size=(32, 32, 16), spacing=(8, 8, 8), seed=5, item=1
    )
    assert np.array_equal(image.array, direct.image.array)
    assert image.same_grid(direct.image)
    shown = capsys.readouterr()
    assert "0001 decode" in shown.err
    assert "2 item(s)" in shown.out


def test_an_item_made_alone_has_the_same_bytes(model_folder, tmp_path) -> None:
    assert generate(model_folder, tmp_path / "five", "-n", 5) == 0
    assert generate(model_folder, tmp_path / "one", "--first", 3) == 0
    five, one = files_in(tmp_path / "five"), files_in(tmp_path / "one")
    assert sorted(one) == ["0003/image.nii.gz", "0003/preview.png", "0003/record.json", "request.json"]
    assert one["0003/image.nii.gz"] == five["0003/image.nii.gz"]
    assert one["0003/preview.png"] == five["0003/preview.png"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_generation_is_gone_on_with(number, model_folder, tmp_path, capsys, monkeypatch) -> None:
    from maisi.generation import output

    assert generate(model_folder, tmp_path / "whole", "-n", 3) == 0
    write, calls = output.write_record, []

    def killed(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        write(path, *args, **kwargs)

    monkeypatch.setattr(output, "write_record", killed)
    # A suite that was started in the background has Ctrl-C ignored; the command must see it here.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert generate(model_folder, tmp_path / "out", "-n", 3) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000", "request.json"]
    kept = (tmp_path / "out/0000/record.json").stat().st_mtime_ns
    assert generate(model_folder, tmp_path / "out", "-n", 3) == 0
    assert "1 of them from before" in capsys.readouterr().out
    assert (tmp_path / "out/0000/record.json").stat().st_mtime_ns == kept
    for n in range(3):
        name = f"{n:04d}/image.nii.gz"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_request_into_the_same_folder_is_refused(model_folder, tmp_path, capsys) -> None:
    assert generate(model_folder, tmp_path / "out") == 0
    before = files_in(tmp_path)
    assert generate(model_folder, tmp_path / "out", "--seed", 1) == 2
    assert "not made by this request" in capsys.readouterr().err
    assert files_in(tmp_path) == before


def test_a_model_that_changed_does_not_go_on_with_a_folder(model_folder, tmp_path, capsys) -> None:
    """What `model.json` says where the request is silent decides the bytes as well."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    assert generate(model, tmp_path / "out") == 0
    values = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(values | {"default_steps": values["default_steps"] + 1}))
    assert generate(model, tmp_path / "out") == 2
    assert "was not made by this request" in capsys.readouterr().err
    (model / "model.json").write_text(json.dumps(values | {"card": "OTHER.md"}))
    assert generate(model, tmp_path / "out") == 0


def test_generate_follows_a_mask(model_folder, mask_file, tmp_path, chest_labels) -> None:
    out = tmp_path / "out"
    assert cli.run(["generate", "--model", str(model_folder), "--mask", str(mask_file), "-o", str(out)]) == 0
    assert read_volume(out / "0000/image.nii.gz").same_grid(chest_labels)
    assert np.array_equal(read_labels(out / "0000/labels.nii.gz").array, chest_labels.array)
    record = json.loads((out / "0000/record.json").read_text())
    assert record["regions"] == ["chest"]
    assert "controlnet.safetensors" in record["weights_sha256"]


def test_the_adviser_speaks_on_stderr_and_auto_heeds_it(model_folder, tmp_path, capsys) -> None:
    assert generate(model_folder, tmp_path / "given") == 0
    assert "Note: Field of view 256 mm along X" in capsys.readouterr().err
    assert generate(model_folder, tmp_path / "auto", "--fov", "auto") == 0
    assert "Note: Size 48,32,32 at 8,8,8 mm." in capsys.readouterr().err
    assert read_volume(tmp_path / "auto/0000/image.nii.gz").shape == (48, 32, 32)


# ---- the other commands ------------------------------------------------------------------------------------------


def test_labels_finds_words_ids_and_other_spellings(capsys) -> None:
    assert cli.run(["labels", "lung", "tumor"]) == 0
    assert capsys.readouterr().out == " 23  lung tumor\n"
    assert cli.run(["labels", "200"]) == 0
    assert capsys.readouterr().out == "200  body\n"
    assert cli.run(["labels", "kidney_left"]) == 0
    assert "left kidney" in capsys.readouterr().out
    assert cli.run(["labels", "livr"]) == 2
    assert "did you mean 'liver'" in capsys.readouterr().err
    assert cli.run(["labels", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["labels"]["1"] == "liver"
    assert table["tumor_hosts"]["26"] == [1]


def test_models_lists_what_is_carried(capsys, monkeypatch, model_folder) -> None:
    monkeypatch.setattr("maisi.weights.registry.CARRIED", model_folder.parent)
    assert cli.run(["models"]) == 0
    assert capsys.readouterr().out.startswith("small: chest, head-neck; follows masks; rectified_flow, 2 steps;")


@pytest.mark.parametrize("choice", ["--model", "--autoencoder"])
def test_encode_and_decode(choice, model_folder, tmp_path, capsys) -> None:
    from safetensors.numpy import load_file

    hu = np.random.default_rng(0).integers(-1000, 1000, (18, 16, 13)).astype(np.int16)
    volume = Volume(hu, np.array([[-2.0, 0, 0, 9], [0, 2, 0, 8], [0, 0, 3, 7], [0, 0, 0, 1]]))
    write_volume(tmp_path / "ct.nii.gz", volume)
    chosen = model_folder if choice == "--model" else model_folder / "autoencoder.safetensors"
    latent, image = tmp_path / "z.safetensors", tmp_path / "back.nii.gz"
    assert cli.run(["encode", str(tmp_path / "ct.nii.gz"), "-o", str(latent), choice, str(chosen)]) == 0
    tensors = load_file(latent)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "mean": (4, 5, 4, 4),
        "log_variance": (4, 5, 4, 4),
    }
    assert tensors["mean"].dtype == np.float32
    assert cli.run(["decode", str(latent), "-o", str(image), choice, str(chosen)]) == 0
    assert read_volume(image).same_grid(volume.to_ras())
    capsys.readouterr()
    assert cli.run(["encode", str(tmp_path / "ct.nii.gz"), "-o", str(latent), choice, str(chosen)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["encode", "ct.nii.gz", "-o", "z.txt"], ".safetensors"),
        (["encode", "absent.nii.gz", "-o", "z.safetensors"], "Cannot read"),
        (["encode", "ct.nii.gz", "-o", "no/z.safetensors"], "does not exist"),
        (["encode", "ct.nii.gz", "-o", "z.safetensors", "--modality", "ctt"], "modality"),
        (["decode", "ct.nii.gz", "-o", "y.nii.gz"], "ct.nii.gz"),
        (["decode", "ct.nii.gz", "-o", "y.jpg"], ".nii.gz"),
    ],
)
def test_encode_and_decode_refuse(arguments, word, model_folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_volume(Path("ct.nii.gz"), Volume.from_spacing(np.zeros((16, 16, 16), np.int16), (1, 1, 1)))
    assert cli.run([*arguments, "--model", str(model_folder)]) == 2
    assert word in capsys.readouterr().err
    assert list(files_in(tmp_path)) == ["ct.nii.gz"]


def test_autoencoder_and_model_exclude_each_other(model_folder, tmp_path, capsys) -> None:
    both = ["--model", str(model_folder), "--autoencoder", str(model_folder / "autoencoder.safetensors")]
    assert cli.run(["decode", "z", "-o", str(tmp_path / "y.nii"), *both]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    unet = ["--autoencoder", str(model_folder / "unet.safetensors")]
    assert cli.run(["decode", "z", "-o", str(tmp_path / "y.nii"), *unet]) == 2
    assert "holds the network 'unet'" in capsys.readouterr().err


def test_phantom_and_segment(tmp_path, capsys) -> None:
    out = tmp_path / "phantom"
    grid = ("--region", "chest", "--size", "64,48,32", "--spacing", "6,6,8", "--seed", "3")
    assert cli.run(["phantom", *grid, "-o", str(out)]) == 0
    assert sorted(files_in(out)) == ["image.nii.gz", "labels.nii.gz", "preview.png"]
    image = read_volume(out / "image.nii.gz")
    assert image.shape == (64, 48, 32)
    assert read_labels(out / "labels.nii.gz").same_grid(image)
    assert cli.run(["segment", str(out / "image.nii.gz"), "-o", str(tmp_path / "labels.nii.gz")]) == 0
    assert 200 in read_labels(tmp_path / "labels.nii.gz").array
    assert cli.run(["phantom", *grid, "-o", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_contrast_ct_is_encoded_as_a_ct_is(model_folder, tmp_path, capsys) -> None:
    image = phantom((24, 24, 16), (8, 8, 8), ("chest",), 1)[0]
    write_volume(tmp_path / "ct.nii.gz", image)
    made = []
    for modality in ("ct", "ct_contrast"):
        out = tmp_path / f"{modality}.safetensors"
        words = ["encode", str(tmp_path / "ct.nii.gz"), "-o", str(out), "--model", str(model_folder)]
        assert cli.run([*words, "--modality", modality]) == 0
        made.append(load_latent(out))
    np.testing.assert_array_equal(made[0].mean, made[1].mean)
    assert [latent.modality for latent in made] == ["ct", "ct_contrast"]
    write_volume(tmp_path / "off.nii.gz", image.with_array(np.clip((image.array + 1000) // 10, 0, 255)))
    words = [
        "encode",
        str(tmp_path / "off.nii.gz"),
        "-o",
        str(tmp_path / "x.safetensors"),
        "--model",
        str(model_folder),
    ]
    assert cli.run([*words, "--modality", "ct_contrast"]) == 2


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["inpaint", "ct.nii.gz", "--tumor", "lung:9mm", "--by", "rules", "--steps", "3", "-o", "out"], "--steps"),
        (["inpaint", "ct.nii.gz", "--tumor", "lung:9mm", "--by", "rules", "--device", "x", "-o", "out"], "--device"),
        (["prepare", "cases.json", "--precision", "foo", "-o", "out"], "--precision"),
        (["prepare", "data", "--views", "views.yaml", "--validation-share", "0.3", "-o", "out"], "--validation-share"),
        (["evaluate", "fidelity", "x", "--steps", "5", "-o", "out"], "--steps"),
        (["evaluate", "fidelity", "x", "--segmenter", "trained", "--train", "y", "--from", "n", "-o", "out"], "--from"),
    ],
)
def test_options_without_an_effect_are_refused(words, option, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(words) == 2
    said = capsys.readouterr().err
    assert f"maisi: {option} " in said
    assert "leave it out" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["segment", "encode"])
def test_a_ct_that_is_not_in_hu_is_refused(command, model_folder, tmp_path, capsys) -> None:
    image = phantom((40, 32, 24), (8, 8, 8), ("chest",), 1)[0]
    write_volume(tmp_path / "ct.nii.gz", image.with_array(np.clip((image.array + 1000) // 10, 0, 255)))
    out = tmp_path / ("labels.nii.gz" if command == "segment" else "z.safetensors")
    model = ["--model", str(model_folder)] if command == "encode" else []
    assert cli.run([command, str(tmp_path / "ct.nii.gz"), "-o", str(out), *model]) == 2
    assert "does not hold HU: its values run from 0 to" in capsys.readouterr().err
    assert not out.exists()


def test_weights_there_and_back(model_folder, tmp_path, capsys) -> None:
    unet = model_folder / "unet.safetensors"
    assert cli.run(["weights", "show", str(unet)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["network"] == "unet"
    assert shown["config"]["channels"] == [8, 8, 8]
    assert cli.run(["weights", "export", str(unet), "-o", str(tmp_path / "unet.pt")]) == 0
    back = ["weights", "convert", str(tmp_path / "unet.pt"), "-o", str(tmp_path / "unet.safetensors")]
    code = cli.run([*back, "--norm-groups", "4", "--head-channels", "8"])
    assert code == 0, capsys.readouterr().err
    from maisi.weights.load import read_header

    assert read_header(tmp_path / "unet.safetensors").tensors == read_header(unet).tensors
    assert cli.run(["weights", "show", str(tmp_path / "absent")]) == 2


def test_train_prints_an_example(capsys) -> None:
    assert cli.run(["train", "--example", "diffusion"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# maisi train diffusion RUN.yaml")
    assert cli.run(["train", "difusion", "run.yaml"]) == 2
    assert "choose one of autoencoder, diffusion, controlnet" in capsys.readouterr().err
    assert cli.run(["train", "diffusion"]) == 2
    assert "--example diffusion" in capsys.readouterr().err
    assert cli.run(["train", "diffusion", "absent.yaml"]) == 2


def test_prepare_refuses_what_it_cannot_read(tmp_path, capsys, model_folder) -> None:
    assert cli.run(["prepare", str(tmp_path / "absent.json"), "-o", str(tmp_path / "out")]) == 2
    assert "absent.json" in capsys.readouterr().err
    (tmp_path / "views.yaml").write_text("views: []\n")
    arguments = ["prepare", str(tmp_path), "--views", str(tmp_path / "views.yaml"), "--model", str(model_folder)]
    assert cli.run([*arguments, "-o", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_from_images_to_latents(tmp_path, capsys, model_folder) -> None:
    for name in ("a", "b"):
        grid = ("--region", "chest", "--size", "64,48,32", "--spacing", "6,6,8", "--seed", str(ord(name)))
        assert cli.run(["phantom", *grid, "-o", str(tmp_path / name)]) == 0
    cases = [{"id": n, "patient": n, "image": f"{n}/image.nii.gz", "labels": f"{n}/labels.nii.gz"} for n in "ab"]
    (tmp_path / "cases.json").write_text(json.dumps({"version": 1, "cases": cases}))
    prepared, latents = tmp_path / "prepared", tmp_path / "latents"
    assert cli.run(["prepare", str(tmp_path / "cases.json"), "-o", str(prepared), "--validation-share", "0.5"]) == 0
    (tmp_path / "views.yaml").write_text("views:\n  - {size: [32, 32, 32], spacing_mm: [8, 10]}\n")
    arguments = ["prepare", str(prepared), "--views", str(tmp_path / "views.yaml"), "--model", str(model_folder)]
    assert cli.run([*arguments, "-o", str(latents)]) == 0, capsys.readouterr().err
    index = json.loads((latents / "index.json").read_text())
    assert sorted((view["case"], tuple(view["regions"])) for view in index["views"]) == [
        ("a", ("chest",)),
        ("b", ("chest",)),
    ]
    assert "2 views, scale factor" in capsys.readouterr().out


# ---- memory --------------------------------------------------------------------------------------------------------


def test_a_plan_is_printed_and_nothing_done(model_folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(planning, "CPU_PART", 16 * 8)  # the model has 8 channels; else it is whole
    assert generate(model_folder, tmp_path / "out", "--plan", "--memory", "64GiB") == 0
    shown = capsys.readouterr().out
    assert "decode 32 x 32 x 16: 2 parts along X; about" in shown
    assert "denoise: about" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_coding_obeys_the_memory_and_plans(command, model_folder, tmp_path, capsys) -> None:
    image, latent = tmp_path / "ct.nii.gz", tmp_path / "latent.safetensors"
    write_volume(image, Volume.from_spacing(np.full((24, 16, 20), -500, np.int16), (4, 4, 4)))
    place = ["--model", str(model_folder), "--device", "cpu", "--precision", "fp32"]
    assert cli.run(["encode", str(image), "-o", str(latent), *place, "--memory", "64GiB"]) == 0
    source, out = (image, "x.safetensors") if command == "encode" else (latent, "x.nii.gz")
    order = [command, str(source), "-o", str(tmp_path / out), *place]
    assert cli.run([*order, "--plan"]) == 0
    assert f"{command} 24 x 16 x 20: whole" in capsys.readouterr().out
    assert cli.run([*order, "--memory", "10MB"]) == 2
    assert "takes at least" in capsys.readouterr().err
    assert cli.run([*order, "--memory", "plenty"]) == 2
    assert "write it like 6GiB" in capsys.readouterr().err
    assert not (tmp_path / out).exists()


def test_a_plan_needs_no_place_and_checks_the_solver(model_folder, capsys) -> None:
    order = ["generate", "--model", str(model_folder), "--region", "chest", "--size", "32,32,32", "--spacing", "8,8,8"]
    assert cli.run([*order, "--plan"]) == 0
    assert "decode 32 x 32 x 32" in capsys.readouterr().out
    assert cli.run([*order, "--plan", "--solver", "foo"]) == 2
    assert "foo" in capsys.readouterr().err
    assert cli.run(order) == 2
    assert "Say where the items go" in capsys.readouterr().err


def test_an_item_is_made_anew_from_its_record(model_folder, tmp_path, capsys) -> None:
    assert generate(model_folder, tmp_path / "out", "-n", 3, "--seed", 5) == 0
    record = tmp_path / "out" / "0002" / "record.json"
    again = ["generate", "--again", str(record), "-o", str(tmp_path / "anew")]
    assert cli.run([*again, "--device", "cpu"]) == 0
    first, second = (tmp_path / name / "0002" / "image.nii.gz" for name in ("out", "anew"))
    assert first.read_bytes() == second.read_bytes()
    assert cli.run([*again[:-1], str(tmp_path / "other"), "--seed", "1"]) == 2
    assert "--seed is a wish, and --again has those of the record" in capsys.readouterr().err
    for content, words in (
        ("{", "is no record of an item"),
        ('{"request": {}, "item": "x"}', "is no record of an item"),
    ):
        record.write_text(content)
        assert cli.run([*again[:-1], str(tmp_path / "other")]) == 2
        assert words in capsys.readouterr().err
    record.unlink()
    assert cli.run([*again[:-1], str(tmp_path / "other")]) == 2
    assert "Cannot read" in capsys.readouterr().err


def test_an_item_has_the_grid_of_a_volume(model_folder, tmp_path, capsys) -> None:
    affine = np.array([[0, 0, -8.0, 40], [-9, 0, 0, 10], [0, 10, 0, -5], [0, 0, 0, 1]])
    write_volume(tmp_path / "ct.nii.gz", Volume(np.zeros((20, 16, 34), np.int16), affine))
    order = ["generate", "--model", str(model_folder), "--region", "chest", "--like", str(tmp_path / "ct.nii.gz")]
    assert cli.run([*order, "--steps", "1", "-o", str(tmp_path / "out")]) == 0
    made = read_volume(tmp_path / "out" / "0000" / "image.nii.gz")
    assert (made.shape, made.spacing_mm) == ((34, 20, 16), pytest.approx((8, 9, 10)))
    assert cli.run([*order, "--size", "32,32,32", "-o", str(tmp_path / "other")]) == 2
    assert "--size says the grid, and so does --like" in capsys.readouterr().err
