import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from maisi.errors import MaisiError
from maisi.io.files import sha256
from maisi.weights.tensor_file import read_tensor_header, write_tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NAMES = st.text("abc.", min_size=1, max_size=4)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def tensors_of(shapes: dict[str, tuple[list[int], torch.dtype]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, (shape, dtype) in shapes.items()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=5),
    metadata=st.dictionaries(NAMES, st.text(max_size=8), max_size=4),
)
@example(shapes={"a": ([3], torch.bfloat16), "b": ([1], torch.float64)}, metadata={"ä": '\n"µ'})
def test_the_library_reads_what_is_written(tmp_path: Path, shapes: Any, metadata: dict[str, str]):
    tensors, path = tensors_of(shapes), tmp_path / "a.safetensors"
    write_tensors(path, tensors, metadata)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[n].dtype == t.dtype and torch.equal(read[n], t) for n, t in tensors.items())
    header = read_tensor_header(path)
    assert dict(header.metadata) == metadata
    assert {n: shape for n, (_, shape) in header.tensors.items()} == {n: tuple(t.shape) for n, t in tensors.items()}


def test_header_of_the_librarys_own_file(tmp_path: Path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.bool)}, tmp_path / "a", {"k": "v"})
    header = read_tensor_header(tmp_path / "a")
    assert header.metadata == {"k": "v"}
    assert header.tensors == {"a": ("F32", (2, 3)), "b": ("BOOL", (1,))}


def test_same_content_same_bytes_whatever_the_order(tmp_path: Path):
    tensors = tensors_of({n: ([2], d) for n, d in zip("abcd", DTYPES, strict=True)})
    metadata = {c: c for c in "pqrst"}
    write_tensors(tmp_path / "a", tensors, metadata)
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b") != sha256(Path(__file__))


def test_strided_tensors_are_written_in_their_logical_order(tmp_path: Path):
    tensor = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    write_tensors(tmp_path / "a", {"a": tensor}, {})
    assert torch.equal(load_file(tmp_path / "a")["a"], tensor)


def test_every_truncation_is_found(tmp_path: Path):
    write_tensors(tmp_path / "a", {"a": torch.ones(2, 3)}, {"k": "v"})
    whole = (tmp_path / "a").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(MaisiError):
            read_tensor_header(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(whole + b"x")
    with pytest.raises(MaisiError, match="25 bytes of tensors"):
        read_tensor_header(tmp_path / "cut")


def with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry("F33")},
        {"a": entry(shape=(2,))},
        {"a": entry(shape=(-1,))},
        {"a": entry(shape=(1.0,))},
        {"a": entry(shape=(True,))},
        {"a": entry(shape=3)},
        {"a": entry(offsets=(4, 8))},
        {"a": entry(offsets=(0, 4, 8))},
        {"a": entry(), "b": entry()},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        {"__metadata__": {"k": 3}},
        {"__metadata__": 3},
        [1],
        "text",
        None,
    ],
)
def test_wrong_headers_are_refused(tmp_path: Path, header: Any):
    path = with_header(tmp_path / "a", json.dumps(header).encode(), bytes(4))
    with pytest.raises(MaisiError, match="not a safetensors file"):
        read_tensor_header(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=64))
@example(data=b"[" * 100_000)
@example(data=b'{"a":' + b"1" * 5000 + b"}")
def test_random_bytes_never_give_another_error(tmp_path: Path, data: bytes):
    (tmp_path / "raw").write_bytes(data)
    for path in (tmp_path / "raw", with_header(tmp_path / "headed", data)):
        try:
            read_tensor_header(path)
        except MaisiError:
            pass
        else:
            assert json.loads(data) in ({}, {"__metadata__": {}})


def test_missing_file_and_folder(tmp_path: Path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(MaisiError, match="Cannot read"):
            read_tensor_header(path)
        with pytest.raises(MaisiError, match="Cannot read"):
            sha256(path)


def test_reading_headers_imports_no_torch():
    code = "import sys, maisi.weights.load, maisi.weights.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
