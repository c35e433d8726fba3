"""The service as a client sees it."""

from __future__ import annotations

import gzip
import io
import json
import re
import time
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maisi.anatomy import label_id
from maisi.data.phantom import phantom
from maisi.generation.maker import Maker
from maisi.io.nifti import read_volume, write_volume
from maisi.io.preview import PLANES, SOFT_TISSUE, slice_png
from maisi.request import Request
from maisi.service.app import LOOPBACK, Settings, make_app
from maisi.service.jobs import Jobs
from maisi.volume import Volume

pytest.importorskip("httpx")
pytestmark = pytest.mark.filterwarnings("ignore:Using `httpx`")

HOSTS = (*LOOPBACK, "testserver")
WISH = {"region": ["chest"], "size": [32, 32, 16], "spacing": [10, 10, 10], "steps": 2}


@pytest.fixture
def settings(tmp_path: Path, model_folder: Path) -> Settings:
    models = {"small": str(model_folder), "tiny": "tiny"}
    return Settings(tmp_path / "service", models, hosts=HOSTS, most_upload_bytes=200_000)


@pytest.fixture
def client(settings: Settings) -> Iterator:
    from fastapi.testclient import TestClient

    jobs = Jobs(settings.folder / "jobs", Maker("cpu"))
    with TestClient(make_app(settings, jobs)) as client:
        yield client


def ended(client, id: str) -> dict:
    until = time.monotonic() + 60
    while (job := client.get(f"/api/jobs/{id}").json())["state"] in ("waiting", "running"):
        assert time.monotonic() < until, job
        time.sleep(0.02)
    return job


def made(client, **wishes) -> dict:
    answer = client.post("/api/jobs", json=wishes)
    assert answer.status_code == 202, answer.text
    return ended(client, answer.json()["id"])


def test_an_order_and_its_item(client, settings: Settings) -> None:
    job = made(client, **WISH, count=2)
    assert (job["state"], job["error"], [item["number"] for item in job["items"]]) == ("done", "", [0, 1])
    assert client.get("/api/jobs").json() == [job]
    place = f"/api/jobs/{job['id']}/items/1"
    folder = settings.folder / "jobs" / job["id"] / "items" / "0001"
    assert client.get(place).json() == {
        "size": [32, 32, 16],
        "spacing_mm": [10, 10, 10],
        "labels": {},
        "centre": [16, 16, 8],
    }
    for part, name in (("image", "image.nii.gz"), ("preview", "preview.png"), ("record", "record.json")):
        got = client.get(f"{place}/{part}")
        assert got.status_code == 200
        if part == "record":
            assert got.json()["request"]["model"] == "small"
            assert str(settings.models["small"]) not in got.text
        else:
            assert got.content == (folder / name).read_bytes()
    assert client.get(f"{place}/labels").status_code == 404
    image = read_volume(folder / "image.nii.gz").to_ras()
    answer = client.get(f"{place}/slices/coronal/5?window=soft")
    assert answer.content == slice_png(image, PLANES[1], 5, SOFT_TISSUE)
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.size == (512, 256)
    assert str(settings.folder) not in client.get("/api/jobs").text


def test_a_label_map_that_was_sent(client, settings: Settings, tmp_path: Path) -> None:
    image, labels = phantom((32, 32, 16), (10.0, 10.0, 10.0), ("chest",), seed=1)
    for name, volume in (("ct", image), ("labels", labels)):
        write_volume(tmp_path / f"{name}.nii.gz", volume)
    sent = {
        name: client.put(f"/api/files/{name}.nii.gz", content=(tmp_path / f"{name}.nii.gz").read_bytes())
        for name in ("ct", "labels")
    }
    assert [answer.status_code for answer in sent.values()] == [201, 201]
    assert sent["ct"].json()["size"] == [32, 32, 16]
    file = {name: answer.json()["file"] for name, answer in sent.items()}
    job = made(client, mask=file["labels"], steps=2, retries=0)
    assert job["state"] == "done"
    assert job["request"]["mask"] == file["labels"]
    told = client.get(f"/api/jobs/{job['id']}/items/0").json()
    assert "heart" in told["labels"]
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in told["labels"].values())
    plain, covered = (
        client.get(f"/api/jobs/{job['id']}/items/0/slices/axial/8?labels={on}").content for on in ("false", "true")
    )
    assert plain != covered
    painted = made(client, image=file["ct"], mask=file["labels"], tumor=["lung:60mm"], by="rules", model="tiny")
    assert painted["state"] == "done"
    told = client.get(f"/api/jobs/{painted['id']}/items/0").json()
    assert next(iter(told["labels"])) == "lung tumor"
    item = settings.folder / "jobs" / painted["id"] / "items" / "0000"
    assert read_volume(item / "labels.nii.gz").to_ras().array[tuple(told["centre"])] == label_id("lung tumor")
    bad = client.post("/api/jobs", json={"image": file["labels"], "tumor": ["lung:60mm"], "model": "tiny"})
    assert bad.status_code == 422
    assert "does not hold HU" in bad.json()["error"]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"region": ["chst"]}, "did you mean 'chest'?"),
        ({"regoin": ["chest"]}, "did you mean 'region'?"),
        ({**WISH, "model": "other"}, "has no model 'other'; it has small, tiny"),
        ({**WISH, "model": "/etc"}, "has no model '/etc'"),
        ({**WISH, "library": "/etc"}, "is a path on the machine of the service"),
        ({**WISH, "ranges": "/etc/passwd"}, "is a path on the machine of the service"),
        ({"mask": "/etc/passwd"}, "was not sent to the service"),
        ({"mask": "../jobs/x/job.json"}, "was not sent to the service"),
        ({"image": "0123456789ab/../../../a.nii", "tumor": ["lung"]}, "was not sent to the service"),
        ({**WISH, "size": [1000, 1000, 1000]}, "memory|takes about|million voxels"),
    ],
)
def test_bad_orders(client, wishes: dict, message: str) -> None:
    answer = client.post("/api/jobs", json=wishes)
    assert answer.status_code == 422
    assert re.search(message if "|" in message else re.escape(message), answer.json()["error"])
    assert client.get("/api/jobs").json() == []


def test_bodies_that_are_no_order(client) -> None:
    kind = {"Content-Type": "application/json"}
    for body in (b"{", b"[1]", b"\xff", b"{" * 5000):
        answer = client.post("/api/jobs", content=body, headers=kind)
        assert answer.status_code in (400, 422)
        assert answer.json()["error"]
    assert client.post("/api/jobs", content=b" " * 2_000_000, headers=kind).status_code == 413
    assert client.post("/api/jobs", content=iter([b"{}"]), headers=kind).status_code == 413
    assert client.get("/api/jobs").json() == []


def test_what_pages_elsewhere_can_send_is_not_taken(client) -> None:
    body = json.dumps(WISH).encode()
    for headers in (
        {"Content-Type": "text/plain"},
        {},
        {"Content-Type": "application/json", "Origin": "https://evil.example"},
        {"Content-Type": "application/json", "Origin": "null"},
        {"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"},
    ):
        answer = client.post("/api/jobs", content=body, headers=headers)
        assert answer.status_code == 403, headers
    assert client.put("/api/files/a.nii", content=b"", headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.get("/api/jobs").json() == []
    own = {"Content-Type": "application/json", "Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/jobs", content=body, headers=own).status_code == 202


@pytest.mark.parametrize(
    "wishes",
    [
        '"tumor": [1]',
        '"tumor": [null]',
        '"tumor": [[]]',
        '"tumor": [{"kind": "x"}]',
        '"tumor": [{"kind": "liver", "diameter_mm": [30, 10]}]',
        '"tumor": [{"kind": "liver", "diameter_mm": [NaN, 10]}]',
        '"tumor": [{"kind": "liver", "centre_mm": [0, 0, Infinity]}]',
        '"anatomy_size": {"liver": null}',
        '"anatomy_size": {"liver": [1]}',
        f'"strengthen": {{"heart": 1{"0" * 400}}}',
        f'"size": [1{"0" * 400}, 1, 1]',
        f'"spacing": [1{"0" * 400}, 1, 1]',
        '"region": ["\\ud800"]',
        '"model": "\\ud800"',
        '"mask": "\\ud800"',
        '"guidance": NaN',
    ],
)
def test_odd_values_are_refused_in_a_sentence(client, wishes: str) -> None:
    body = '{"region": ["chest"], "size": [32, 32, 16], "spacing": [10, 10, 10], ' + wishes + "}"
    answer = client.post("/api/jobs", content=body.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]
    assert client.get("/api/jobs").json() == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "is no name of a volume"),
        ("..nii", b"x", "is no name of a volume"),
        ("a.nii.gz", b"no volume", "is not a NIfTI file"),
        ("a.nii", b"x" * 300_000, "has more than 0.0 GB"),
    ],
)
def test_bad_files(client, settings: Settings, name: str, content: bytes, message: str) -> None:
    answer = client.put(f"/api/files/{name}", content=content)
    assert answer.status_code == 422
    assert message in answer.json()["error"]
    assert str(settings.folder) not in answer.text
    assert not list((settings.folder / "files").glob("*"))


def test_what_is_not_there(client) -> None:
    job = made(client, **WISH)
    place = f"/api/jobs/{job['id']}/items"
    for path in (
        "/api/jobs/none",
        f"{place}/7",
        f"{place}/0/passwd",
        f"{place}/0/slices/axial/16",
        f"{place}/0/slices/axial/-1",
        f"{place}/0/slices/round/0",
        f"{place}/0/slices/axial/0?window=blue",
        "/etc",
        "/api/etc",
        "/..%2f..%2fapp.py",
    ):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["error"], path
    assert client.delete(f"/api/jobs/{job['id']}").status_code == 204
    assert client.get("/api/jobs").json() == []


def test_a_job_that_runs_is_cancelled(client) -> None:
    for _ in range(5):
        id = client.post("/api/jobs", json={**WISH, "count": 500}).json()["id"]
        while client.get(f"/api/jobs/{id}").json()["state"] != "running":
            time.sleep(0.01)
        assert client.delete(f"/api/jobs/{id}").status_code == 422
        client.post(f"/api/jobs/{id}/cancel")
        while client.delete(f"/api/jobs/{id}").status_code != 204:
            pass
        assert client.get(f"/api/jobs/{id}").status_code == 404
    assert made(client, **WISH)["state"] == "done"  # who makes them lives on


def test_a_file_that_was_sent_is_forgotten(client, tmp_path: Path, settings: Settings) -> None:
    image, _ = phantom((16, 16, 8), (20.0, 20.0, 20.0), ("chest",), seed=1)
    write_volume(tmp_path / "ct.nii.gz", image)
    file = client.put("/api/files/ct.nii.gz", content=(tmp_path / "ct.nii.gz").read_bytes()).json()["file"]
    assert client.delete(f"/api/files/{file}").status_code == 204
    assert client.delete(f"/api/files/{file}").status_code == 422
    assert not list((settings.folder / "files").glob("*"))


def test_a_series_of_dicom_comes_as_a_zip(client, tmp_path: Path, settings: Settings) -> None:
    pytest.importorskip("highdicom")
    from dicom_files import PATIENT, datasets, save

    image, labels = phantom((16, 16, 8), (20.0, 20.0, 20.0), ("chest",), seed=1)
    slices = datasets((image.array + 1024).astype(np.uint16), image.affine)
    for slice_ in slices:
        slice_.RescaleIntercept = -1024
    sent = io.BytesIO()
    with zipfile.ZipFile(sent, "w") as zipped:
        for path in save(tmp_path / "series", slices).iterdir():
            zipped.write(path, path.name)
    answer = client.put("/api/files/ct.zip", content=sent.getvalue())
    assert answer.status_code == 201, answer.text
    assert answer.json()["size"] == [16, 16, 8]
    kept = settings.folder / "files" / answer.json()["file"]
    assert (read_volume(kept).array == image.array).all()
    assert [path.name for path in kept.parent.iterdir()] == ["ct.nii.gz"]
    assert PATIENT.encode() not in gzip.decompress(kept.read_bytes())
    write_volume(tmp_path / "labels.nii.gz", labels)
    mask = client.put("/api/files/labels.nii.gz", content=(tmp_path / "labels.nii.gz").read_bytes()).json()["file"]
    job = made(client, image=answer.json()["file"], mask=mask, tumor=["lung:60mm"], by="rules")
    assert (job["state"], job["error"]) == ("done", "")
    bad = client.put("/api/files/ct.zip", content=sent.getvalue()[:-50])
    assert (bad.status_code, bad.json()["error"].split(",")[0]) == (422, "'ct.zip' is no zip")
    assert len(list((settings.folder / "files").glob("*"))) == 2


def test_uploads_that_a_stop_cut_off_are_gone_at_the_next_start(settings: Settings) -> None:
    cut = settings.folder / "files" / "0123456789ab"
    (cut / ".part-series").mkdir(parents=True)
    (cut / ".part-series" / "00000").write_bytes(b"of a patient")
    make_app(settings, Jobs(settings.folder / "jobs", Maker("cpu")))
    assert not cut.exists()


def test_tokens_and_hosts(settings: Settings) -> None:
    from fastapi.testclient import TestClient

    guarded = Settings(settings.folder, settings.models, "secret", HOSTS)
    client = TestClient(make_app(guarded, Jobs(settings.folder / "jobs", Maker("cpu"))))
    assert client.get("/api").status_code == 401
    assert client.get("/").status_code == 401
    assert client.get("/api", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/api", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/?token=secret").status_code == 200
    assert client.get("/api").status_code == 200  # by the cookie
    client.cookies.clear()
    assert client.get("/api").status_code == 401
    open_ = TestClient(make_app(settings, Jobs(settings.folder / "jobs", Maker("cpu"))))
    assert open_.get("/api", headers={"Host": "elsewhere.example"}).status_code == 400


def test_the_viewer(client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in re.findall(r'(?:href|src)="([^"#]+)"', page.text):
        assert client.get(f"/{name}").status_code == 200, name
    script = resources.files("maisi.service").joinpath("viewer", "viewer.js").read_text()
    assert "://" not in script + page.text  # nothing from elsewhere
    for id in re.findall(r'byId\("([a-z-]+)"\)', script):
        assert f'id="{id}"' in page.text, id
    about = client.get("/api").json()
    assert about["models"] == ["small", "tiny"]
    assert about["windows"] == ["soft", "lung", "bone"]


def test_the_interface_describes_itself(client) -> None:
    told = client.get("/api/openapi.json").json()
    body = told["paths"]["/api/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(Request.model_fields) - {"library", "ranges"}
    assert all(operation["description"] for path in told["paths"].values() for operation in path.values())
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told)):
        assert name in told["components"]["schemas"]


def test_slices_have_square_pixels_and_the_right_side_on_the_left() -> None:
    array = np.full((20, 10, 4), -1000, np.int16)
    array[15:, :, :] = 1000  # the patient's right is low x... shown on the left, so high x is on the right

    with Image.open(
        io.BytesIO(slice_png(Volume(array, np.diag([1.0, 2, 5, 1])), PLANES[0], 0, SOFT_TISSUE))
    ) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (512, 512)
    assert (pixels[:, 10].mean(), pixels[:, -10].mean()) == (255, 0)
