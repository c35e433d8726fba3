from __future__ import annotations

import json
from pathlib import Path

import published
import pytest
import torch

from maisi import cli
from maisi.errors import MaisiError
from maisi.weights.convert import convert, export_official
from maisi.weights.load import FEATURE_NETWORKS, load_network, read_header, save_network
from maisi.weights.published import forms

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "feature_networks.json").read_text())


@pytest.mark.parametrize("name", list(published.FILES))
def test_the_stand_ins_have_the_published_names_and_shapes(name, monkeypatch) -> None:
    """Hashes of the state dicts of torchvision, pytorch-fid, radimagenet-models and lpips."""
    monkeypatch.setattr(published, "seeded", lambda name, shape: torch.zeros(shape, dtype=kind(name)))
    assert published.layout(published.FILES[name]()) == GOLDEN[name]["layout"]


def kind(name: str) -> torch.dtype:
    return torch.int64 if name.endswith("num_batches_tracked") else torch.float32


def test_every_form_has_a_stand_in() -> None:
    kinds = {f"{form.network if not form.heads else 'trunk'} {form.variant}" for form in forms()}
    assert kinds == {name for name in published.FILES if not name.startswith("heads")}
    assert {form.network for form in forms()} == set(FEATURE_NETWORKS)


def test_the_file_says_what_it_is(converted) -> None:
    header = read_header(converted("trunk alexnet"))
    assert (header.network, header.config) == ("lpips", {"variant": "alexnet"})
    assert header.metadata["maisi.note"] == "converted from theirs.pt and heads.pt"


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1"])
def test_both_ways_to_lpips_give_the_same_tensors(name, converted) -> None:
    first, second = (load_network(converted(f"{way} {name}")).state_dict() for way in ("trunk", "lpips"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_feature_networks_are_stored_and_read_like_others(converted, tmp_path) -> None:
    network = load_network(converted("trunk squeezenet1_1"), network="lpips")
    save_network(tmp_path / "again.safetensors", network)
    assert load_network(tmp_path / "again.safetensors").config == network.config
    with pytest.raises(MaisiError, match="which others published"):
        export_official(tmp_path / "again.safetensors", tmp_path / "out.pt")
    with pytest.raises(MaisiError, match="holds the network 'lpips'; give a file with 'unet'"):
        load_network(tmp_path / "again.safetensors", network="unet")


def saved(path: Path, state: published.State) -> Path:
    torch.save(state, path)
    return path


def test_what_is_no_published_file_is_refused(tmp_path) -> None:
    trunk, heads = published.trunk("squeezenet1_1"), published.heads("squeezenet1_1")
    whole = saved(tmp_path / "trunk.pt", trunk)
    learned = saved(tmp_path / "heads.pt", heads)
    imagenet = {name: torch.zeros(1).expand(64, 3, 7, 7) for name in ("conv1.weight", "layer4.2.conv3.weight")}
    other = saved(tmp_path / "resnet50.pt", imagenet)
    more = saved(tmp_path / "more.pt", {**trunk, "features.13.weight": torch.zeros(3)})
    less = saved(tmp_path / "less.pt", {n: t for n, t in trunk.items() if n != "features.6.squeeze.bias"})
    short = saved(tmp_path / "short.pt", {n: t for n, t in heads.items() if not n.startswith("lin6")})
    evil = tmp_path / "evil.pt"
    torch.save({"features.0.weight": Path("anything")}, evil)
    cases = (
        (whole, {}, "give their file with --lpips-heads"),
        (learned, {}, "learned weights alone"),
        (whole, {"heads": whole}, "'features.0.weight' is no learned weight of LPIPS"),
        (whole, {"heads": short}, r"1 tensors do not fit .*heads\.6\.weight, missing"),
        (more, {"heads": learned}, r"1 tensors do not fit .*features\.13\.weight"),
        (less, {"heads": learned}, r"1 tensors do not fit .*features\.6\.squeeze\.bias, missing"),
        (other, {}, "holds none of the networks autoencoder, .*lpips"),
        (other, {"as_network": "radimagenet"}, "no published file of 'radimagenet'; give one of these: RadImageNet-"),
        (whole, {"as_network": "inception", "heads": learned}, "no published file of 'inception'"),
        (other, {"heads": learned}, "takes no heads"),
        (whole, {"heads": learned, "settings": {"norm_groups": 2}}, "unknown key 'norm_groups'"),
        (evil, {}, "more than plain tensors"),
        (whole, {"as_network": "vgg"}, "There is no network 'vgg'"),
    )
    before = sorted(tmp_path.iterdir())
    for path, options, said in cases:
        with pytest.raises(MaisiError, match=said):
            convert(path, tmp_path / "out.safetensors", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(tmp_path, capsys) -> None:
    trunk = saved(tmp_path / "squeezenet1_1.pth", published.trunk("squeezenet1_1"))
    heads = saved(tmp_path / "squeeze.pth", published.heads("squeezenet1_1"))
    words = ["weights", "convert", str(trunk), "--lpips-heads", str(heads), "-o", str(tmp_path / "lpips.safetensors")]
    assert cli.run(words) == 0
    assert "lpips squeezenet1_1, 0.7 M parameters" in capsys.readouterr().out
    assert cli.run(["weights", "show", str(tmp_path / "lpips.safetensors")]) == 0
    assert '"variant": "squeezenet1_1"' in capsys.readouterr().out
