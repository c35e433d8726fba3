"""Jobs of the service: requests that wait, run one after the other in a thread, and stay on the disk. Knows no HTTP.

A job has a folder: `job.json` (what was asked for, when, how it ended) and `items`, which is what `maisi generate`
makes of the same request. Jobs that a stop interrupted are gone on with.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from maisi.errors import MaisiError
from maisi.generation.maker import Maker
from maisi.generation.output import DAMAGED, Destination, destination, items_in, record_in
from maisi.io.files import make_folder, new_folder, write_json
from maisi.request import Request

State = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")

JOB_FILE, ITEMS = "job.json", "items"
_ID = re.compile("[0-9a-f]{12}")
_REMOVED = ".removed"
_LOG = logging.getLogger(__name__)
MOST_WAITING = 100
"""Jobs that may wait; more are refused."""


class _Cancelled(BaseException):
    """Raised within a job that is not wanted any more; no part of the work may take it for a fault."""


@dataclass
class Job:
    """One request on its way.

    Attributes:
        id: twelve hexadecimal digits.
        request: what is asked for.
        created: seconds since 1970.
        state: see `State`.
        error: why it failed, one sentence.
        notes: sentences for who asked.
        stage: what the running item is at: its number, the stage, steps done, steps in all.
    """

    id: str
    request: Request
    created: float
    state: State = "waiting"
    error: str = ""
    notes: tuple[str, ...] = ()
    stage: tuple[int, str, int, int] | None = None
    unwanted: bool = field(default=False, repr=False)


class Jobs:
    """All jobs of a folder, and the thread that makes them.

    Attributes:
        folder: with a folder for each job.
    """

    def __init__(self, folder: Path, maker: Maker) -> None:
        """Make the folder, or read the jobs that it has; those that had not ended wait again."""
        make_folder(folder)
        self.folder = folder
        self._maker = maker
        self._lock = threading.Condition(threading.RLock())
        self._preparing = threading.Lock()
        self._jobs = {job.id: job for job in _kept(folder)}
        self._faults: dict[tuple[str, int], list[str]] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="maisi-jobs", daemon=True)

    def start(self) -> None:
        """Begin to make waiting jobs."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is being done; a job that runs stays to be gone on with."""
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        self._thread.join()

    def add(self, request: Request) -> Job:
        """Check a request as far as goes without networks, and have it wait.

        Raises:
            MaisiError: it cannot be made, too many wait, or its folder cannot be written.
        """
        self._require_room()
        with self._preparing:  # label maps may be large, so one at a time
            prepared = self._maker.prepare(request)
        with self._lock:
            self._require_room()
            job = Job(secrets.token_hex(6), request, round(time.time(), 3), notes=prepared.notes)
            with new_folder(self.folder / job.id) as part:
                write_json(part / JOB_FILE, _told(job))
            self._jobs[job.id] = job
            self._lock.notify_all()
        return job

    def _require_room(self) -> None:
        with self._lock:
            if sum(job.state == "waiting" for job in self._jobs.values()) >= MOST_WAITING:
                raise MaisiError(f"{MOST_WAITING} jobs wait already; try again when some are done.")

    def all(self) -> list[Job]:
        """The jobs, the newest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: job.created, reverse=True)

    def get(self, id: str) -> Job | None:
        """The job of this id."""
        return self._jobs.get(id)

    def cancel(self, job: Job) -> None:
        """Have a job that waits or runs end soon; items that are there stay."""
        with self._lock:
            if job.state in ENDED:
                return
            job.unwanted = True
            if job.state == "waiting":
                self._end(job, "cancelled")
            else:
                self._keep(job)  # so that a stop before the next step does not revive it

    def remove(self, job: Job) -> None:
        """Forget a job that has ended, and delete its folder.

        Raises:
            MaisiError: it has not ended, or its folder cannot be moved.
        """
        with self._lock:
            if job.state not in ENDED:
                raise MaisiError(f"Job {job.id} has not ended; cancel it first.")
            gone = self.folder / f"{job.id}{_REMOVED}"
            try:
                (self.folder / job.id).rename(gone)
            except OSError as error:
                raise MaisiError(f"Job {job.id} cannot be removed ({error.strerror}).") from None
            del self._jobs[job.id]
            self._faults = {key: faults for key, faults in self._faults.items() if key[0] != job.id}
        shutil.rmtree(gone, ignore_errors=True)

    def items(self, job: Job) -> list[tuple[int, list[str]]]:
        """Numbers of the items that are there, each with what its record says against it."""
        found = []
        for item in items_in(self.folder / job.id / ITEMS):
            if not item.name.isdecimal():
                continue
            number = int(item.name)
            with self._lock:  # asked each second while a job runs; items don't change
                if (job.id, number) not in self._faults:
                    told = record_in(item)
                    self._faults[job.id, number] = [DAMAGED] if told is None else told[1]
                found.append((number, self._faults[job.id, number]))
        return found

    def item_folder(self, job: Job, number: int) -> Path:
        """Where an item lies, or would."""
        return self.folder / job.id / ITEMS / f"{number:04d}"

    # --- the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._make(job)
                self._end(job, "done")
            except _Cancelled:
                if job.unwanted:
                    self._end(job, "cancelled")
            except MaisiError as error:
                self._end(job, "failed", str(error))
            except Exception as error:  # a job that fails takes no other with it
                _LOG.exception("job %s", job.id)
                self._end(job, "failed", _sentence(error))

    def _next(self) -> Job | None:
        """Wait for a job; None when the service stops."""
        with self._lock:
            while not self._stopped:
                waiting = [job for job in self._jobs.values() if job.state == "waiting"]
                if waiting:
                    job = min(waiting, key=lambda job: job.created)
                    job.state = "running"
                    return job
                self._lock.wait()
        return None

    def _make(self, job: Job) -> None:
        with self._preparing:
            prepared = self._maker.prepare(job.request)
        job.notes = prepared.notes
        place = destination(self.folder / job.id / ITEMS, prepared.order, range(job.request.count))
        if place.missing:
            self._fill(job, place, prepared.load)

    def _fill(self, job: Job, place: Destination, load: Callable[[], Any]) -> None:
        with place.begun():
            make = load()
            for number in place.missing:

                def report(stage: str, done: int, total: int, number: int = number) -> None:
                    if job.unwanted or self._stopped:
                        raise _Cancelled
                    job.stage = (number, stage, done, total)

                report("begin", 0, 1)
                # without folders above it: one that is gone ends the job
                make(number, report).save(place.item_folder(number), parents=False)
                job.stage = None

    def _end(self, job: Job, state: State, error: str = "") -> None:
        with self._lock:
            job.state, job.error, job.stage = state, error, None
            self._keep(job)

    def _keep(self, job: Job) -> None:
        """Write what the disk is to know of a job; where that fails, it is made again after a stop."""
        with self._lock:
            try:
                write_json(self.folder / job.id / JOB_FILE, _told(job))
            except (MaisiError, OSError, ValueError) as fault:
                _LOG.warning("job %s: %s", job.id, fault)


def _sentence(error: Exception) -> str:
    """What went wrong where nothing should have."""
    from maisi.device import fault_of

    known = fault_of(error) if isinstance(error, (MemoryError, RuntimeError)) else None
    return known or f"A fault of maisi itself ({type(error).__name__}); the service's log has more."


def _told(job: Job) -> dict[str, Any]:
    """What the job's file keeps; running counts as waiting, which it is again after a stop."""
    state = job.state if job.state in ENDED else "cancelled" if job.unwanted else "waiting"
    request, notes = job.request.model_dump(mode="json"), list(job.notes)
    return {"created": job.created, "state": state, "error": job.error, "notes": notes, "request": request}


def _kept(folder: Path) -> list[Job]:
    """The jobs that a folder has; what is damaged is passed over."""
    jobs = []
    for leftover in (*folder.glob("*.part-*"), *folder.glob(f"*{_REMOVED}")):
        shutil.rmtree(leftover, ignore_errors=True)
    for file in sorted(folder.glob(f"*/{JOB_FILE}")):
        if not _ID.fullmatch(file.parent.name):
            continue
        try:
            values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            state: State = values["state"] if values["state"] in ENDED else "waiting"
            request = Request.model_validate(values["request"])
            told = str(values["error"]), tuple(map(str, values["notes"]))
            jobs.append(Job(file.parent.name, request, float(values["created"]), state, *told))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return jobs
