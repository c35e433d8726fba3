import pickle
from pathlib import Path

import pytest
import torch

from maisi.errors import MaisiError
from maisi.weights.convert import convert, export_official, key_table, rename
from maisi.weights.load import load_network, read_header


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_converted_network_computes_what_the_reference_computes(reference, tmp_path: Path):
    official = reference.save(tmp_path / "official.pt")
    convert(official, tmp_path / "ours.safetensors")
    net = load_network(tmp_path / "ours.safetensors")
    with torch.no_grad():
        expected = reference.theirs(reference.net, reference.inputs)
        found = reference.ours(net, reference.inputs)
    assert len(expected) == len(found)
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs.shape == ours.shape
        assert theirs.abs().max() > 0
        assert relative_error(ours, theirs) < 1e-4


def changed(value):
    if isinstance(value, tuple):
        return tuple(changed(v) for v in value)
    return (value + 1) % 128 if value.dtype == torch.int64 else value.flip(0) + 0.5


def test_every_input_of_the_parity_test_matters(reference, tmp_path: Path):
    convert(reference.save(tmp_path / "official.pt"), tmp_path / "ours.safetensors")
    net = load_network(tmp_path / "ours.safetensors")
    with torch.no_grad():
        usual = reference.ours(net, reference.inputs)
        for name, value in reference.inputs.items():
            other = reference.ours(net, {**reference.inputs, name: changed(value)})
            assert any(relative_error(b, a) > 1e-3 for a, b in zip(usual, other, strict=True)), name
