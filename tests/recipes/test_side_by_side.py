"""Jobs in processes of their own: results, logs, progress, and errors that name the job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recipes.side_by_side import Job, JobError, advance, side_by_side


def _describe(value: int) -> tuple[int, int, int]:
    print(f"printed {value}")
    subprocess.run([sys.executable, "-c", f"print('by a program {value}')"], check=True)
    advance(1.0)
    return value, os.getpid(), torch.get_num_threads()


def _fail(text: str) -> None:
    print("before the error")
    raise ValueError(text)


def _kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(path: Path) -> None:
    path.write_text("started")
    time.sleep(600)


def _jobs(folder: Path, number: int) -> list[Job]:
    return [Job(f"job {i}", _describe, (i,), folder / f"{i}.log", 1.0) for i in range(number)]


def test_each_job_has_a_process_a_thread_and_a_log_of_its_own(tmp_path: Path) -> None:
    results = dict(side_by_side(_jobs(tmp_path, 3), workers=2))
    assert {name: result[0] for name, result in results.items()} == {
        f"job {i}": i for i in range(3)
    }
    processes = {result[1] for result in results.values()}
    assert len(processes - {os.getpid()}) == 3
    assert {result[2] for result in results.values()} == {1}
    logs = [(tmp_path / f"{i}.log").read_text().splitlines() for i in range(3)]
    assert [set(log) for log in logs] == [{f"printed {i}", f"by a program {i}"} for i in range(3)]


def test_an_error_names_the_job_and_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(JobError, match="training failed; the end of ") as error:
        list(side_by_side([Job("training", _fail, ("no such unit",), log, 1.0)], workers=1))
    first, *lines = str(error.value).splitlines()
    assert first.endswith(f"{log}:")
    assert lines[-1] == "ValueError: no such unit"
    assert "before the error" in log.read_text()


def test_a_killed_job_is_an_error_that_names_the_signal(tmp_path: Path) -> None:
    jobs = [Job("training", _kill_itself, (), tmp_path / "log.txt", 1.0)]
    with pytest.raises(JobError, match="training was killed by signal 9"):
        list(side_by_side(jobs, workers=1))


def test_an_error_ends_the_jobs_beside_it(tmp_path: Path) -> None:
    started = tmp_path / "started"
    jobs = [
        Job("waits", _wait, (started,), tmp_path / "wait.log", 1.0),
        Job("fails", _fail, ("now",), tmp_path / "fail.log", 1.0),
    ]
    began = time.monotonic()
    with pytest.raises(JobError, match="fails failed;"):
        list(side_by_side(jobs, workers=2))
    assert time.monotonic() - began < 120
    assert multiprocessing.active_children() == []
