"""Released models by name: from a folder, and from a hub of our own that talks as the real one does."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

from maisi.anatomy import MODALITIES
from maisi.cli import run
from maisi.errors import MaisiError
from maisi.generation.fov import RELEASED_MODELS
from maisi.generation.pipeline import load
from maisi.presets import PRESETS
from maisi.weights.fetch import FromFolder
from maisi.weights.fetch import fetch as fetch_model
from maisi.weights.hub import Hub
from maisi.weights.registry import find_model
from maisi.weights.released_models import released_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NETWORKS = {
    "models/autoencoder_v1.pt": "autoencoder",
    "models/diff_unet_3d_rflow-ct.pt": "diffusion_rflow",
    "models/diff_unet_3d_ddpm-ct.pt": "diffusion_ddpm",
    "models/controlnet_3d_rflow-ct.pt": "controlnet_rflow",
    "models/controlnet_3d_ddpm-ct.pt": "controlnet_ddpm",
    "models/mask_generation_autoencoder.pt": "mask_autoencoder",
    "models/mask_generation_diffusion_unet.pt": "mask_diffusion",
    "models/autoencoder_v2.pt": "autoencoder",
    "models/diff_unet_3d_rflow-mr.pt": "diffusion_rflow",
    "models/diff_unet_3d_rflow-mr-brain_v1.pt": "diffusion_rflow",
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, references: Mapping[str, Any]) -> Path:
    """What the reference's download leaves, of small networks of its own classes."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "models").mkdir()
    for path, network in NETWORKS.items():
        references[network](torch.Generator().manual_seed(len(path))).save(folder / path)
    return folder


class FakeHub(ThreadingHTTPServer):
    """Answers as the hub does, with a folder's files; counts what is downloaded, and lies if told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.sent: list[str] = []
        self.lies = False
        self.plain = False
        self.refusal: tuple[int, str] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        if self.server.refusal is not None:
            status, code = self.server.refusal
            return self.send(status, b"{}", {"X-Error-Code": code}, body)
        url = urlsplit(self.path)
        words = url.path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            if words[4:] not in (["revision", "main"], ["revision", COMMIT]):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            assert parse_qs(url.query).get("blobs") == ["True"] or "blobs" in url.query
            return self.send(200, json.dumps(self.listing("/".join(words[2:4]))).encode(), {}, body)
        assert words[2:4] == ["resolve", COMMIT], url.path
        content = (self.server.folder / "/".join(words[4:])).read_bytes()
        if body:
            self.server.sent.append(words[-1])
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        return self.send(200, content, {**headers, "X-Linked-Size": str(len(content))}, body)

    def listing(self, repo: str) -> dict[str, object]:
        files = []
        for path in sorted(self.server.folder.glob("models/*.pt")):
            content = path.read_bytes()
            hash = hashlib.sha256(content + b"?" if self.server.lies else content).hexdigest()
            lfs = {"sha256": hash, "size": len(content), "pointerSize": 134}
            entry = {"rfilename": f"models/{path.name}", "size": len(content), "blobId": "0" * 40}
            files.append(entry if self.server.plain else {**entry, "lfs": lfs})
        return {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": files}

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *_: object) -> None:
        pass


@pytest.fixture
def hub(release: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    pytest.importorskip("huggingface_hub")
    server = FakeHub(release)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(*words: str | Path) -> int:
    return run(["weights", "fetch", *map(str, words)])


def test_from_a_folder_to_images(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch("rflow-ct", "--from", release, "-o", tmp_path / "rflow-ct") == 0
    told = capsys.readouterr().out
    assert "NVIDIA Open Model License" in told
    config = find_model(tmp_path / "rflow-ct").config
    assert (config.name, config.process, config.modalities) == ("rflow-ct", {"kind": "rectified_flow"}, ("ct",))
    assert set(config.files) == {"autoencoder", "unet", "controlnet", "mask_autoencoder", "mask_unet"}
    assert config.scale_factor == pytest.approx(1.1)
    card = (tmp_path / "rflow-ct" / config.card).read_text()
    for path in released_models()["rflow-ct"].files.values():
        assert hashlib.sha256((release / path.path).read_bytes()).hexdigest() in card
    assert [path.name for path in tmp_path.iterdir()] == ["rflow-ct"]
    item = load(tmp_path / "rflow-ct").generate(region="chest", size=(16, 16, 16), spacing=(3, 3, 3), steps=1)
    assert item.image.array.shape == (16, 16, 16)


def test_the_files_may_lie_in_the_folder_itself(release: Path, tmp_path: Path) -> None:
    assert fetch("ddpm-ct", "--from", release / "models", "--storage", "float16", "-o", tmp_path / "ddpm") == 0
    assert find_model(tmp_path / "ddpm").config.process == {"kind": "ddpm"}


def test_downloaded_is_what_the_folder_gives(release: Path, hub: FakeHub, tmp_path: Path) -> None:
    assert fetch("rflow-mr", "--from", release, "-o", tmp_path / "local") == 0
    assert fetch("rflow-mr", "--cache", tmp_path / "cache", "-o", tmp_path / "loaded") == 0
    for name in ("model.json", "autoencoder.safetensors", "unet.safetensors"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "loaded" / name).read_bytes()
    assert sorted(hub.sent) == ["autoencoder_v2.pt", "diff_unet_3d_rflow-mr.pt"]
    assert COMMIT in (tmp_path / "loaded" / "MODEL_CARD.md").read_text()
    assert fetch("rflow-mr", "--revision", COMMIT, "--cache", tmp_path / "cache", "-o", tmp_path / "again") == 0
    assert len(hub.sent) == 2, "what came once is kept"


def test_other_bytes_than_the_hub_tells_are_refused(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.lies = True
    assert fetch("rflow-mr", "--cache", tmp_path / "cache", "-o", tmp_path / "model") == 2
    assert "SHA-256 differs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("refusal", "plain", "words"),
    [
        ((403, "GatedRepo"), False, "wants its terms to be accepted"),
        ((404, "RepoNotFound"), False, "has no repository nvidia/NV-Generate-CT"),
        ((500, ""), False, "could not be had from the hub"),
        (None, True, "has no models/autoencoder_v1.pt at 'main' that the hub tells a hash of"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: FakeHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refusal: tuple[int, str] | None,
    plain: bool,
    words: str,
) -> None:
    hub.refusal, hub.plain = refusal, plain
    assert fetch("rflow-ct", "--cache", tmp_path / "cache", "-o", tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "model").exists()


def test_an_unknown_revision_and_no_hub_at_all(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch("rflow-ct", "--revision", "v9", "-o", tmp_path / "model") == 2
    assert "has no revision 'v9'" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch("rflow-ct", "-o", tmp_path / "model") == 2
    assert "--from" in capsys.readouterr().err


def test_without_the_library_a_folder_still_does(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert fetch("rflow-mr-brain", "-o", tmp_path / "model") == 2
    assert "pip install 'maisi[hub]'" in capsys.readouterr().err
    assert fetch("rflow-mr-brain", "--from", release, "-o", tmp_path / "model") == 0


def test_bad_orders_are_one_sentence(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch("rflow", "-o", tmp_path / "model") == 2
    assert "choose one of rflow-ct, ddpm-ct" in capsys.readouterr().err
    assert fetch("rflow-ct", "--from", tmp_path, "-o", tmp_path / "model") == 2
    assert "has no autoencoder_v1.pt, diff_unet_3d_rflow-ct.pt" in capsys.readouterr().err
    assert fetch("rflow-ct", "--from", release, "--revision", "main", "-o", tmp_path / "model") == 2
    assert "--revision is for downloads" in capsys.readouterr().err
    assert run(["generate", "--model", "rflow-ct", "--region", "chest", "-o", str(tmp_path / "model")]) == 2
    assert "maisi weights fetch rflow-ct" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_under_a_wrong_name_is_refused_before_anything_is_made(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mixed").mkdir()
    for path in NETWORKS:
        other = "models/diff_unet_3d_ddpm-ct.pt" if path.endswith("controlnet_3d_ddpm-ct.pt") else path
        (tmp_path / "mixed" / Path(path).name).symlink_to(release / other)
    assert fetch("ddpm-ct", "--from", tmp_path / "mixed", "-o", tmp_path / "model") == 2
    assert "of the kind unet, not controlnet" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


def test_the_table_agrees_with_what_else_is_said_of_the_release() -> None:
    models = released_models()
    assert set(RELEASED_MODELS) < set(models)
    told = {Path(file.path).name for name in RELEASED_MODELS for file in models[name].files.values()}
    assert told == {preset.official_file for preset in PRESETS.values()}
    for model in models.values():
        assert set(model.modalities) <= set(MODALITIES)


def test_in_python_a_target_is_looked_at_first(release: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    class Noted(FromFolder):
        def sizes(self, wanted: Any) -> Any:
            asked.append("sizes")
            return super().sizes(wanted)

    (tmp_path / "there").mkdir()
    for target, words in ((tmp_path / "there", "exists"), (tmp_path / "no" / "model", "does not exist")):
        with pytest.raises(MaisiError, match=words):
            fetch_model("rflow-mr", target, Noted(release))
    assert asked == []


def test_a_full_disk_is_not_the_hubs_fault(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(MaisiError, match=r"Cannot write .*cache: No space left on device; free some space"):
        Hub(cache=tmp_path / "cache").download(released_models()["rflow-mr"].files["unet"])
