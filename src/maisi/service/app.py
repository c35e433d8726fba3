"""The service over HTTP: JSON in and out under /api, and the viewer. One process, one job at a time.

A request is the same as everywhere (`maisi.request.Request`), but that `mask` and `image` name files that were sent
before, and `model` one of those that the service was started with. Whoever reaches the service may use it: it listens
on this machine alone, or else wants a token.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
from fastapi import Body, FastAPI, HTTPException, Response
from fastapi import Path as InPath
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

import maisi
from maisi.anatomy import BODY, REGIONS, TUMORS, label_name
from maisi.data.label_maps import ids_in
from maisi.errors import MaisiError
from maisi.generation.output import IMAGE, LABELS, PREVIEW, RECORD
from maisi.io.files import make_folder
from maisi.io.files import remove as remove_path
from maisi.io.nifti import read_header, read_labels, read_volume
from maisi.io.preview import BONE, LUNG, PLANES, SOFT_TISSUE, label_color, rgb, slice_png
from maisi.request import Request
from maisi.service.jobs import Job, Jobs
from maisi.service.uploads import volume_of_zip
from maisi.volume import Volume

WINDOWS = {"soft": SOFT_TISSUE, "lung": LUNG, "bone": BONE}
FILES = "files"
MOST_UPLOAD_BYTES = 2 << 30
MOST_BODY_BYTES = 1 << 20
UNPACKED = 2
"""How many times as large what a zip holds may be as what may be sent."""

COOKIE = "maisi_token"

_PARTS = {"image": IMAGE, "labels": LABELS, "preview": PREVIEW, "record": RECORD}
_VIEWER = {
    "": ("index.html", "text/html"),
    "viewer.css": ("viewer.css", "text/css"),
    "viewer.js": ("viewer.js", "text/javascript"),
}
"""Page -> its file, and what that is."""

_NOT_OVER_HTTP = ("library", "ranges")
_HELD = 3
_FILE = re.compile(r"[0-9a-f]{12}/[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""What this machine is called by itself."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'"
)

Number = Annotated[int, InPath(ge=0, lt=100_000)]
"""Of an item."""


@dataclass(frozen=True)
class Settings:
    """How the service runs.

    Attributes:
        folder: where jobs and files lie.
        models: name that requests use -> name or folder of a model.
        token: what every call must know; "" for none.
        hosts: names by which the service is called, '*' for any; guards against pages that name it otherwise.
        most_upload_bytes: of one file.
    """

    folder: Path
    models: Mapping[str, str]
    token: str = ""
    hosts: Sequence[str] = LOOPBACK
    most_upload_bytes: int = MOST_UPLOAD_BYTES


def make_app(settings: Settings, jobs: Jobs) -> FastAPI:
    """The application; its jobs start and stop with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        jobs.start()
        yield
        await run_in_threadpool(jobs.stop)

    app = FastAPI(
        title="maisi", version=maisi.__version__, summary="Synthetic 3D CT with labels", lifespan=lifespan,
        docs_url=None, redoc_url=None, openapi_url="/api/openapi.json",
    )  # fmt: skip
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False)
    volumes = _Volumes()
    for leftover in (settings.folder / FILES).glob("*/.part-*"):
        remove_path(leftover.parent)  # what a stop cut off has no name that a request could use
    _describe_parts(app)

    @app.middleware("http")
    async def guard(call: HttpRequest, go_on: Callable[[HttpRequest], Awaitable[Response]]) -> Response:
        if fault := _foreign(call):
            return JSONResponse({"error": fault}, 403)
        if fault := _too_long(call):
            return JSONResponse({"error": fault}, 413)
        if settings.token and not _knows(call, settings.token):
            return JSONResponse({"error": "This service wants its token: open the address that it printed."}, 401)
        answer = await go_on(call)
        answer.headers["Content-Security-Policy"] = _POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        if settings.token and "token" in call.query_params:
            answer.set_cookie(COOKIE, settings.token, httponly=True, samesite="strict")
        return answer

    @app.exception_handler(MaisiError)
    async def refuse(_: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse({"error": _without_paths(str(error), settings)}, 422)

    @app.exception_handler(StarletteHTTPException)
    async def no(_: HttpRequest, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.exception_handler(Exception)
    async def fault(_: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"A fault of maisi itself ({type(error).__name__}); its log has more."}, 500)

    @app.exception_handler(RequestValidationError)
    async def no_order(_: HttpRequest, error: Exception) -> JSONResponse:
        sentence = "That is nothing this call takes; /api/openapi.json describes it, and bodies are application/json."
        return JSONResponse({"error": sentence}, 422)

    def job_of(id: str) -> Job:
        job = jobs.get(id)
        if job is None:
            raise HTTPException(404, f"There is no job '{id}'.")
        return job

    def item_of(id: str, number: int, part: str = RECORD) -> Path:
        file = jobs.item_folder(job_of(id), number) / part
        if not file.is_file():
            raise HTTPException(404, f"Job '{id}' has no {part} of item {number}, or not yet.")
        return file

    @app.get("/api")
    def about() -> dict[str, Any]:
        """What the service has: version, models, regions, windows, planes."""
        return {
            "maisi": maisi.__version__,
            "models": list(settings.models),
            "regions": list(REGIONS),
            "windows": list(WINDOWS),
            "planes": [plane.name for plane in PLANES],
        }

    @app.post("/api/jobs", status_code=202, openapi_extra={"requestBody": _request_body()})
    def order(wishes: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        """Have a request made: its job, or what is wrong with it in one sentence."""
        return _told(jobs.add(_checked(wishes, settings)), jobs, settings)

    @app.get("/api/jobs")
    def listing() -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        return [_told(job, jobs, settings) for job in jobs.all()]

    @app.get("/api/jobs/{id}")
    def status(id: str) -> dict[str, Any]:
        """How far a job is, and its items."""
        return _told(job_of(id), jobs, settings)

    @app.post("/api/jobs/{id}/cancel")
    def cancel(id: str) -> dict[str, Any]:
        """End a job that waits or runs."""
        jobs.cancel(job_of(id))
        return _told(job_of(id), jobs, settings)

    @app.delete("/api/jobs/{id}", status_code=204)
    def remove(id: str) -> Response:
        """Forget a job that has ended, with its items."""
        jobs.remove(job_of(id))
        return Response(status_code=204)

    @app.get("/api/jobs/{id}/items/{number}")
    def item(id: str, number: Number) -> dict[str, Any]:
        """What a viewer needs to know of an item."""
        image, mask = volumes.get(item_of(id, number).parent)
        return {
            "size": image.shape,
            "spacing_mm": [round(mm, 4) for mm in image.spacing_mm],
            "labels": {} if mask is None else _label_colors(mask),
            "centre": _centre(image, mask),
        }

    @app.get("/api/jobs/{id}/items/{number}/{part}")
    def file(id: str, number: Number, part: str) -> Response:
        """A file of an item: image, labels, preview or record."""
        if part not in _PARTS:
            raise HTTPException(404, f"An item has no '{part}'; ask for one of {', '.join(_PARTS)}.")
        path = item_of(id, number, _PARTS[part])
        if part == "record":
            return Response(_without_paths(path.read_text(encoding="utf-8"), settings), media_type="application/json")
        return FileResponse(path, filename=None if part == "preview" else f"{id}-{number:04d}-{path.name}")

    @app.get("/api/jobs/{id}/items/{number}/slices/{plane}/{index}")
    def slice_(id: str, number: Number, plane: str, index: int, window: str = "soft", labels: bool = False) -> Response:
        """One slice as PNG, its pixels square."""
        cut = next((p for p in PLANES if p.name == plane), None)
        if cut is None:
            raise HTTPException(404, f"There is no plane '{plane}'; /api lists them.")
        if window not in WINDOWS:
            raise HTTPException(404, f"There is no window '{window}'; /api lists them.")
        image, mask = volumes.get(item_of(id, number).parent)
        if not 0 <= index < image.shape[cut.fixed]:
            raise HTTPException(404, f"Slices of this plane go from 0 to {image.shape[cut.fixed] - 1}.")
        picture = slice_png(image, cut, index, WINDOWS[window], mask if labels else None)
        return Response(picture, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    @app.put("/api/files/{name}", status_code=201)
    async def send(name: str, call: HttpRequest) -> dict[str, Any]:
        """Send a volume (.nii.gz, .nii, .nrrd, or a series of DICOM as .zip), for requests to name as mask or image."""
        return await _received(name, call, settings)

    @app.delete("/api/files/{folder}/{name}", status_code=204)
    def forget(folder: str, name: str) -> Response:
        """Delete a file that was sent."""
        path = _sent(f"{folder}/{name}", "file", settings)
        path.unlink(missing_ok=True)
        path.parent.rmdir()
        return Response(status_code=204)

    @app.get("/{page}")
    @app.get("/")
    def viewer(page: str = "") -> Response:
        """The page from which all this may be done."""
        if page not in _VIEWER:
            raise HTTPException(404, f"There is no page '{page}'; the viewer is at /.")
        name, kind = _VIEWER[page]
        content = resources.files("maisi.service").joinpath("viewer", name).read_bytes()
        return Response(content, media_type=kind)

    return app


class _Volumes:
    """The items looked at last, in RAS+."""

    def __init__(self) -> None:
        self._held: OrderedDict[Path, tuple[Volume, Volume | None]] = OrderedDict()
        self._lock = Lock()

    def get(self, item: Path) -> tuple[Volume, Volume | None]:
        """Image and label map of an item's folder."""
        with self._lock:
            if item not in self._held:
                image = read_volume(item / IMAGE).to_ras()
                labels = read_labels(item / LABELS).to_ras() if (item / LABELS).is_file() else None
                self._held[item] = (image, labels)
                while len(self._held) > _HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(item)
            return self._held[item]


def _knows(call: HttpRequest, token: str) -> bool:
    told = (
        call.headers.get("authorization", "").removeprefix("Bearer "),
        call.cookies.get(COOKIE, ""),
        call.query_params.get("token", ""),
    )
    return any(secrets.compare_digest(one.encode(), token.encode()) for one in told)


def _checked(wishes: dict[str, Any], settings: Settings) -> Request:
    """A request over HTTP, with names of files and models replaced by where they are."""
    try:
        json.dumps(wishes, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        raise MaisiError("The request holds numbers that are not finite, or text that is none; mend it.") from None
    for name in _NOT_OVER_HTTP:
        if wishes.get(name) is not None:
            raise MaisiError(f"'{name}' is a path on the machine of the service; leave it out.")
    asked = {**wishes, "model": str(wishes.get("model") or next(iter(settings.models)))}
    if asked["model"] not in settings.models:
        raise MaisiError(f"The service has no model '{asked['model']}'; it has {', '.join(settings.models)}.")
    asked["model"] = settings.models[asked["model"]]
    for name in ("mask", "image"):
        if asked.get(name) is not None:
            asked[name] = _sent(str(asked[name]), name, settings)
    return Request.parse(**asked)


def _sent(file: str, what: str, settings: Settings) -> Path:
    path = settings.folder / FILES / file
    if not _FILE.fullmatch(file) or not path.is_file():
        raise MaisiError(f"The {what} '{file}' was not sent to the service; PUT it to /api/files/NAME first.")
    return path


async def _received(name: str, call: HttpRequest, settings: Settings) -> dict[str, Any]:
    """Write the body of a call to a new file, and look whether it is a volume."""
    zipped = name.lower().endswith(".zip")
    file = f"{secrets.token_hex(6)}/{name[:-4] + '.nii.gz' if zipped else name}"
    path = settings.folder / FILES / file
    if not _FILE.fullmatch(file) or not file.lower().endswith((".nii.gz", ".nii", ".nrrd")):
        raise MaisiError(
            f"'{name}' is no name of a volume; use letters, digits, '.', '_', '-', and end in .nii.gz, .nii, .nrrd or, "
            "with a series of DICOM, .zip."
        )
    make_folder(path.parent)
    part = path.with_name(f".part-{name}")
    try:
        length = 0
        with part.open("wb") as out:
            async for chunk in call.stream():
                length += len(chunk)
                if length > settings.most_upload_bytes:
                    raise MaisiError(f"'{name}' has more than {settings.most_upload_bytes / 1e9:.1f} GB; send less.")
                await run_in_threadpool(out.write, chunk)
        if zipped:
            await run_in_threadpool(volume_of_zip, part, path, name, UNPACKED * settings.most_upload_bytes)
        else:
            part.rename(path)
        header = await run_in_threadpool(read_header, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        path.parent.rmdir()
        if isinstance(error, ClientDisconnect):
            raise StarletteHTTPException(400, f"'{name}' did not come whole.") from None
        if isinstance(error, OSError):
            raise MaisiError(f"'{name}' cannot be kept ({error.strerror}); the service's disk needs room.") from None
        raise
    spacing = [round(float(mm), 4) for mm in (header.affine[:3, :3] ** 2).sum(0) ** 0.5]
    return {"file": file, "size": list(header.shape), "spacing_mm": spacing}


def _told(job: Job, jobs: Jobs, settings: Settings) -> dict[str, Any]:
    """A job as JSON; no path of the machine is in it."""
    asked = job.request.model_dump(mode="json", exclude_defaults=True, exclude={"model", *_NOT_OVER_HTTP})
    for name in ("mask", "image"):
        if asked.get(name):
            asked[name] = "/".join(Path(asked[name]).parts[-2:])
    number, stage, done, total = job.stage or (None, "", 0, 0)
    return {
        "id": job.id,
        "state": job.state,
        "error": _without_paths(job.error, settings),
        "notes": [_without_paths(note, settings) for note in job.notes],
        "created": job.created,
        "request": asked,
        "count": job.request.count,
        "running": None if number is None else {"item": number, "stage": stage, "done": done, "total": total},
        "items": [{"number": n, "passed": not faults, "faults": faults} for n, faults in jobs.items(job)],
    }


def _centre(image: Volume, mask: Volume | None) -> list[int]:
    """The voxel to look at first: in the middle of a tumour where there is one, else of the volume."""
    if mask is not None:
        inside = np.argwhere(np.isin(mask.array, list(TUMORS)))
        if len(inside):
            nearest = np.abs(inside - np.median(inside, axis=0)).sum(1).argmin()
            return [int(n) for n in inside[nearest]]
    return [n // 2 for n in image.shape]


def _without_paths(text: str, settings: Settings) -> str:
    """Where the service keeps its files and models is nothing to a caller."""
    for name, path in settings.models.items():
        if path != name:
            text = text.replace(path, name)
    return text.replace(f"{settings.folder / FILES}/", "").replace(f"{settings.folder}/", "")


def _foreign(call: HttpRequest) -> str:
    """Why a call that changes something is not taken: a page of another site sent it."""
    if call.method in ("GET", "HEAD"):
        return ""
    origin, site = call.headers.get("origin"), call.headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin") or (origin and urlsplit(origin).netloc != call.headers.get("host")):
        return "Pages of other sites may not use this service."
    if call.method == "POST" and int(call.headers.get("content-length") or 0):
        kind = call.headers.get("content-type", "").partition(";")[0].strip().lower()
        return "" if kind == "application/json" else "A request is sent as application/json."
    return ""


def _too_long(call: HttpRequest) -> str:
    """Why the body of a call that is no file is not read."""
    if call.method == "PUT":
        return ""
    length, whole = call.headers.get("content-length", "0"), "transfer-encoding" not in call.headers
    if whole and length.isdecimal() and int(length) <= MOST_BODY_BYTES:
        return ""
    return f"A request has at most {MOST_BODY_BYTES:,} bytes, and says how many."


def _label_colors(labels: Volume) -> dict[str, str]:
    """Name of each label -> its colour; tumours come first, the body last."""
    found: dict[str, str] = {}
    for id in sorted(ids_in(labels.array), key=lambda id: (id not in TUMORS, id == BODY, id)):
        if id:
            try:
                name = label_name(id)
            except MaisiError:
                name = str(id)
            found[name] = "#" + "".join(f"{channel:02x}" for channel in rgb(label_color(id)))
    return found


def _request_body() -> dict[str, Any]:
    """What the description of the interface says of a request."""
    schema = Request.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    for name in _NOT_OVER_HTTP:
        schema["properties"].pop(name)
    return {"content": {"application/json": {"schema": schema}}, "required": True}


def _describe_parts(app: FastAPI) -> None:
    """Put what a request's description refers to where it looks."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        told = described()
        parts = Request.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {})
        told.setdefault("components", {}).setdefault("schemas", {}).update(parts)
        return told

    app.openapi = openapi  # type: ignore[method-assign]
