"""Do jobs side by side, each in a process of its own, with a log of its own and one progress bar.

A job is a function at the top of a module and its arguments. What it prints goes to its log; what
it has done it tells with :func:`advance`, or with the callback :class:`StepProgress` of its
Trainer.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm
from typing_extensions import override

from recipes.notices import fewer_notices
from recipes.parent import end_with

_LINES_OF_AN_ERROR = 12
_SECONDS_TO_END = 3.0
_IMPORTED_ONCE = ("recipes.train", "recipes.evaluate", "recipes.deploy")

# Of the process of a job: where it tells what it has done.
_starter: Connection | None = None


@dataclass(frozen=True)
class Job:
    """Work for one process.

    Attributes:
        name: Name.
        function: Function at the top of a module.
        arguments: Its arguments; they and the result can be pickled.
        log: File of what it prints.
        work: Amount of work, in any unit that all jobs share.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    log: Path
    work: float


class JobError(RuntimeError):
    """A job failed; the message has its name, its log and the end of it."""


@dataclass(frozen=True)
class _Progress:
    """Work that a job has done since it told last."""

    work: float


@dataclass(frozen=True)
class _Result:
    """Value that the function of a job has returned; it is the last that a job tells."""

    value: Any


@dataclass
class _Running:
    """A job that runs, its process, and the work that it has told of."""

    job: Job
    process: BaseProcess
    work: float = 0.0


def side_by_side(jobs: Sequence[Job], *, workers: int) -> Iterator[tuple[str, Any]]:
    """Do jobs, and yield the name and the result of each as soon as it is done.

    Args:
        jobs: Jobs in the order in which they start.
        workers: Number of jobs at a time, positive; each has one thread.

    Raises:
        JobError: If a job fails. Jobs that wait are not started; those that run are ended.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jobs = [Job(str(n), pow, (n, 2), Path(folder, f"{n}.log"), 1.0) for n in (2, 3)]
        ...     sorted(side_by_side(jobs, workers=2))
        [('2', 4), ('3', 9)]
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED_ONCE))
    waiting = list(jobs)
    running: dict[Connection, _Running] = {}
    # Without a terminal a bar would be a line at every change.
    bar = tqdm(
        total=sum(job.work for job in jobs),
        bar_format="{percentage:3.0f} % {bar} {elapsed}, {remaining} left",
        leave=False,
        disable=None,
    )
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_do, args=(job, theirs, os.getpid()))
                process.start()
                theirs.close()  # So that the end of the process ends the pipe.
                running[ours] = _Running(job, process)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                each = running[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    each.process.join()
                    raise JobError(_failure(each)) from None
                if isinstance(message, _Progress):
                    each.work += message.work
                    bar.update(message.work)
                    continue
                del running[connection]
                each.process.join()
                bar.update(each.job.work - each.work)
                bar.clear()  # What the caller prints now is above the bar.
                yield each.job.name, message.value
                bar.refresh()
    finally:
        _end([each.process for each in running.values()])
        bar.close()


def _end(processes: Sequence[BaseProcess]) -> None:
    """End processes as Ctrl-C does, and kill those that go on."""
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join(_SECONDS_TO_END)
        process.kill()
        process.join()


def advance(work: float) -> None:
    """Tell the progress bar that this job has done a part of its work; without a bar do nothing.

    Args:
        work: Amount of work, in the unit of :attr:`Job.work`.

    Example:
        >>> advance(1.0)
    """
    if _starter is not None:
        _starter.send(_Progress(work))


class StepProgress(Callback):
    """Tell the progress bar of :func:`side_by_side` of every training batch: one unit of work."""

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        advance(1.0)


def _do(job: Job, starter: Connection, parent: int) -> None:
    """Do a job in this process, with its prints in its log, and send its result."""
    global _starter
    _starter = starter
    end_with(parent)
    torch.set_num_threads(1)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # Of the process: programs that it starts, and libraries in C++, print there, too.
    with job.log.open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with fewer_notices():
        starter.send(_Result(job.function(*job.arguments)))


def _failure(running: _Running) -> str:
    """Describe a job that has ended without a result."""
    job, status = running.job, running.process.exitcode
    # A signal's number is negative.
    end = f"was killed by signal {-status}" if status is not None and status < 0 else "failed"
    if not job.log.is_file():
        return f"{job.name} {end} before it has written its log {job.log}"
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"{job.name} {end}; the end of {job.log}:", *lines[-_LINES_OF_AN_ERROR:]])
