"""A run that is killed anywhere goes on by the same command, to the results of one that was not."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import select
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_only

from recipes.train import main
from tests.recipes.conftest import SMALL_NETWORK

#: In the order of a run: where it is killed, in which call of that, and how.
STOPS = {
    "corpus": ("recipes.asr.spoken_words:mix", 5, signal.SIGKILL),
    "features": ("recipes.asr.features:_Writer.features", 5, signal.SIGTERM),
    "first step": ("recipes.asr.recognizer:TransducerRecognizer.training_step", 1, signal.SIGTERM),
    # Each epoch writes two files, and a file is flushed before it has its name.
    "checkpoint": ("recipes.whole_checkpoints:torch.save", 4, signal.SIGKILL),
    "name of a checkpoint": ("lightning_nna.files:os.fsync", 4, signal.SIGKILL),
    "later step": ("recipes.asr.recognizer:TransducerRecognizer.training_step", 2, signal.SIGKILL),
    "test": ("recipes.asr.recognizer:TransducerRecognizer.test_step", 1, signal.SIGKILL),
    "transcripts": ("recipes.asr.adapter:write_transcripts", 1, signal.SIGKILL),
    "summary": ("recipes.run_folder:json.dumps", 1, signal.SIGKILL),
}
SETTINGS = (
    *("experiment=digits", "threads=1", *SMALL_NETWORK),
    *("data.train_size=12", "data.validation_size=2", "data.test_size=4", "data.num_mels=8"),
    *(
        "data.batch_seconds=10",
        "beam_width=1",
        "trainer.limit_test_batches=1",
        "trainer.max_epochs=3",
    ),
    *("callbacks.progress=null", "model.max_labels_per_step=1"),
    *("trainer.enable_progress_bar=false", "trainer.limit_val_batches=0"),
    *("hydra/job_logging=none", "hydra/hydra_logging=none"),
)
EMULATED = (
    *("compression=codebook", "bits=4"),
    *("callbacks.nna.calibration_steps=1", "callbacks.report=null"),
)
TWO_PROCESSES = ("trainer=ddp_cpu", "trainer.max_epochs=2")


def _stop_in(place: str, call: int, number: signal.Signals) -> None:
    """Send this process a signal in a call of a function, counted from 1."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), 0

    def stopped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, stopped)


class _Second:
    """The second process of a run, in place of the ``Popen`` that Lightning starts it with.

    It is forked before the run begins, so that it has imported everything, and waits for the
    arguments and the environment that Lightning gives it.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._command, receiver = context.Pipe()
        self._process = context.Process(target=self._wait, args=(receiver,), daemon=True)
        self._process.start()

    @staticmethod
    def _wait(receiver: Any) -> None:
        arguments, environment = receiver.recv()
        sys.argv[1:] = arguments
        os.environ.update(environment)
        # Lightning reads it from the environment when it is imported.
        rank_zero_only.rank = int(environment["LOCAL_RANK"])
        main()

    def __call__(self, command: list[str], env: dict[str, str], cwd: str) -> _Second:
        self._command.send((command[command.index(sys.argv[1]) :], env))
        return self

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None and self.pid is not None:
            os.kill(self.pid, number)


def _run(
    folder: Path, cache: Path, stop: tuple[str, int, signal.Signals] | None, *more: str
) -> None:
    """Run the recipe as its command does, in a process of its own."""
    os.chdir(folder.parent)
    sys.stdout = sys.stderr = output = Path("output.txt").open("a", buffering=1)  # noqa: SIM115
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("default")
    sys.argv = [
        *("recipes.train", *SETTINGS, f"hydra.run.dir={folder}", f"data.cache_dir={cache}", *more),
    ]
    if more == TWO_PROCESSES:
        subprocess_script.subprocess = SimpleNamespace(Popen=_Second())  # type: ignore[assignment]
    if stop is not None:
        _stop_in(*stop)
    main()


def _exit_code(folder: Path, cache: Path, stop: Any = None, *more: str) -> int | None:
    # Forked, it has imported everything.
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_run, args=(folder, cache, stop, *more))
    process.start()
    process.join(120)
    return process.exitcode


def _results(folder: Path) -> dict[str, Any]:
    """Return what must not depend on how often a run was stopped."""
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("command", "commit", "overrides", "train_seconds"):
        del summary[name]
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        "summary": summary,
        "transcripts": (folder / "transcripts.tsv").read_text(),
        "weights": state["state_dict"],
        "optimizers": state["optimizer_states"],
        "files": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "epoch, step": (state["epoch"], state["global_step"]),
    }


def _assert_same(results: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("summary", "transcripts", "files", "epoch, step"):
        assert results[key] == expected[key], key
    torch.testing.assert_close(results["weights"], expected["weights"], rtol=0, atol=0)
    torch.testing.assert_close(results["optimizers"], expected["optimizers"], rtol=0, atol=0)


def _output(folder: Path) -> str:
    return (folder.parent / "output.txt").read_text()


@pytest.mark.slow
def test_a_run_that_is_killed_everywhere_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole" / "run", tmp_path / "stopped" / "run"
    caches = tmp_path / "cache of whole", tmp_path / "cache of stopped"
    for folder in (whole, stopped):
        folder.parent.mkdir()
    assert _exit_code(whole, caches[0], None, *EMULATED) == 0, _output(whole)
    for name, stop in STOPS.items():
        code = _exit_code(stopped, caches[1], stop, *EMULATED)
        assert code in (-stop[2], 128 + stop[2]), name
        assert not (stopped / "summary.json").exists(), name
    assert _exit_code(stopped, caches[1], None, *EMULATED) == 0, _output(stopped)
    _assert_same(_results(stopped), _results(whole))


@pytest.mark.slow
def test_both_processes_of_a_run_end_at_a_sigterm_and_go_on(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole" / "run", tmp_path / "stopped" / "run"
    cache = tmp_path / "cache"
    for folder in (whole, stopped):
        folder.parent.mkdir()
    assert _exit_code(whole, cache, None, *TWO_PROCESSES) == 0, _output(whole)
    last, write_end = os.pipe()
    # Before the gradients: the second process waits for them.
    stop = ("recipes.asr.recognizer:TransducerRecognizer.training_step", 4, signal.SIGTERM)
    assert _exit_code(stopped, cache, stop, *TWO_PROCESSES) == 128 + signal.SIGTERM, _output(
        stopped
    )
    os.close(write_end)
    # Readable when the last process is gone that has the other end.
    assert select.select([last], [], [], 10)[0], "a process stays behind"
    os.close(last)
    assert _output(stopped).count("stopped by SIGTERM; the same command goes on") == 1
    assert "Traceback" not in _output(stopped)
    assert (stopped / "checkpoints" / "last.ckpt").exists()
    assert _exit_code(stopped, cache, None, *TWO_PROCESSES) == 0, _output(stopped)
    _assert_same(_results(stopped), _results(whole))
