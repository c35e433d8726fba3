"""Jobs wait, run, end, and outlive the service."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from maisi import cli
from maisi.errors import MaisiError
from maisi.generation.maker import Maker
from maisi.io.nifti import read_volume
from maisi.request import Request
from maisi.service import jobs as module
from maisi.service.jobs import Job, Jobs


@pytest.fixture
def wish(model_folder: Path) -> dict:
    return {"region": "chest", "size": "32,32,16", "spacing": "10,10,10", "model": str(model_folder), "steps": 2}


def begun(folder: Path) -> Jobs:
    jobs = Jobs(folder, Maker("cpu"))
    jobs.start()
    return jobs


def wait(jobs: Jobs, job: Job, states: tuple[str, ...] = module.ENDED) -> Job:
    until = time.monotonic() + 60
    while job.state not in states:
        assert time.monotonic() < until, job
        time.sleep(0.01)
    return job


def test_a_job_is_made_as_the_command_makes_it(tmp_path: Path, wish: dict) -> None:
    jobs = begun(tmp_path / "jobs")
    one = jobs.add(Request.parse(**wish, count=2, seed=3))
    two = jobs.add(Request.parse(**wish))
    assert wait(jobs, two).state == "done"
    assert one.state == "done"
    assert [job.id for job in jobs.all()] == [two.id, one.id]
    assert [number for number, _ in jobs.items(one)] == [0, 1]
    jobs.stop()
    options = [
        word for name in ("region", "size", "spacing", "model", "steps") for word in (f"--{name}", str(wish[name]))
    ]
    assert (
        cli.run(["generate", *options, "--seed", "3", "-n", "2", "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    )
    for number in (0, 1):
        made = read_volume(jobs.item_folder(one, number) / "image.nii.gz")
        other = read_volume(tmp_path / "out" / f"{number:04d}" / "image.nii.gz")
        np.testing.assert_array_equal(made.array, other.array)


def test_a_stopped_job_is_gone_on_with(tmp_path: Path, wish: dict) -> None:
    jobs = begun(tmp_path / "jobs")
    job = jobs.add(Request.parse(**wish, count=200))
    until = time.monotonic() + 60
    while not jobs.items(job):
        assert time.monotonic() < until
        time.sleep(0.01)
    jobs.stop()
    before = len(jobs.items(job))
    assert 1 <= before < 200
    assert json.loads((tmp_path / "jobs" / job.id / "job.json").read_text())["state"] == "waiting"
    again = Jobs(tmp_path / "jobs", Maker("cpu"))
    (kept,) = again.all()
    assert (kept.id, kept.state, kept.request) == (job.id, "waiting", job.request)
    again.start()
    while len(again.items(kept)) < before + 1:
        assert time.monotonic() < until + 60
        time.sleep(0.01)
    again.cancel(kept)
    assert wait(again, kept).state == "cancelled"
    again.stop()
    assert not list((tmp_path / "jobs" / job.id / "items").glob("*.part-*"))
    (kept,) = Jobs(tmp_path / "jobs", Maker("cpu")).all()
    assert kept.state == "cancelled"


def test_a_job_that_was_cancelled_does_not_come_back(tmp_path: Path, wish: dict) -> None:
    jobs = begun(tmp_path / "jobs")
    job = wait(jobs, jobs.add(Request.parse(**wish, count=500)), ("running",))
    jobs.cancel(job)
    jobs.stop()
    (kept,) = Jobs(tmp_path / "jobs", Maker("cpu")).all()
    assert kept.state == "cancelled"
    (tmp_path / "jobs" / f"{job.id}.part-x").mkdir()
    (tmp_path / "jobs" / f"{job.id}.part-x" / "job.json").write_text("{}")
    assert [job.id for job in Jobs(tmp_path / "jobs", Maker("cpu")).all()] == [job.id]
    assert len(list((tmp_path / "jobs").iterdir())) == 1


def test_a_folder_that_goes_away_ends_no_service(tmp_path: Path, wish: dict) -> None:
    jobs = begun(tmp_path / "jobs")
    job = wait(jobs, jobs.add(Request.parse(**wish, count=500)), ("running",))
    while (tmp_path / "jobs" / job.id).exists():  # the thread may be writing there
        shutil.rmtree(tmp_path / "jobs" / job.id, ignore_errors=True)
    wait(jobs, job)
    assert wait(jobs, jobs.add(Request.parse(**wish))).state == "done"
    jobs.stop()


def test_a_waiting_job_is_cancelled_and_removed(tmp_path: Path, wish: dict) -> None:
    jobs = Jobs(tmp_path / "jobs", Maker("cpu"))
    job = jobs.add(Request.parse(**wish))
    with pytest.raises(MaisiError, match="has not ended; cancel it first"):
        jobs.remove(job)
    jobs.cancel(job)
    assert job.state == "cancelled"
    jobs.remove(job)
    assert jobs.get(job.id) is None
    assert not (tmp_path / "jobs" / job.id).exists()


def test_one_job_fails_and_the_next_is_made(tmp_path: Path, wish: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(tmp_path / "jobs", Maker("cpu"))
    refused = jobs.add(Request.parse(**wish, guidance=3))
    broken, fine = jobs.add(Request.parse(**wish, seed=1)), jobs.add(Request.parse(**wish, seed=2))
    whole = Maker.prepare

    def prepare(maker: Maker, request: Request):
        if request.seed == 1:
            raise ZeroDivisionError("what nobody thought of")
        if request.guidance:
            raise MaisiError("Guidance has nothing to act on.")
        return whole(maker, request)

    monkeypatch.setattr(Maker, "prepare", prepare)
    jobs.start()
    assert wait(jobs, fine).state == "done"
    assert (refused.state, refused.error) == ("failed", "Guidance has nothing to act on.")
    assert broken.state == "failed"
    assert broken.error == "A fault of maisi itself (ZeroDivisionError); the service's log has more."
    jobs.stop()


def test_what_cannot_be_made_is_refused_at_once(tmp_path: Path, wish: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(tmp_path / "jobs", Maker("cpu"))
    with pytest.raises(MaisiError, match=r"liver:190mm|190 mm"):
        jobs.add(Request.parse(**wish, structure="liver", tumor="liver:190mm"))
    monkeypatch.setattr(module, "MOST_WAITING", 1)
    jobs.add(Request.parse(**wish))
    with pytest.raises(MaisiError, match="1 jobs wait already"):
        jobs.add(Request.parse(**wish))
    assert len(list((tmp_path / "jobs").iterdir())) == 1


def test_damaged_job_files_are_passed_over(tmp_path: Path, wish: dict) -> None:
    jobs = Jobs(tmp_path / "jobs", Maker("cpu"))
    one, two = jobs.add(Request.parse(**wish)), jobs.add(Request.parse(**wish))
    (tmp_path / "jobs" / one.id / "job.json").write_text("{")
    assert [job.id for job in Jobs(tmp_path / "jobs", Maker("cpu")).all()] == [two.id]
