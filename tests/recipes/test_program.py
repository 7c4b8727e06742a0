"""What a user gets wrong ends in one message; a fault of the program keeps its traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from recipes import drift_replay, sweep_table
from recipes.asr.adapter import TransducerAdapter
from recipes.evaluate import evaluate
from recipes.objective import check_objective
from recipes.parent import COMMAND
from recipes.program import as_program, known_keys
from recipes.train import train
from tests.conftest import ROOT
from tests.recipes.conftest import SMALL_NETWORK

# Nothing is set up; the choice "disabled" silences every logger of the process for good.
QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none")

KNOWN = TransducerAdapter.known_results


def _started(
    monkeypatch: pytest.MonkeyPatch, task: Callable[[DictConfig], Any], *arguments: str
) -> None:
    monkeypatch.setattr("sys.argv", ["recipes.train", *arguments, *QUIET])
    as_program("train")(task)()


def _refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: Callable[[DictConfig], Any],
    *arguments: str,
) -> str:
    with pytest.raises(SystemExit) as end:
        _started(monkeypatch, task, *arguments)
    assert end.value.code == 1
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert "HYDRA_FULL_ERROR=1" in text
    assert len(text.splitlines()) <= 5
    return text


def _nothing(_: DictConfig) -> None:
    raise AssertionError("the run has started")


MISTAKES = [
    (["bit=2"], "recipes.train: there is no setting bit; did you mean bits?"),
    (["data.batch_second=3"], "no setting data.batch_second; did you mean data.batch_seconds?"),
    (
        ["compression=csp", "callbacks.prune.every_n_steps=100"],
        "there is no setting callbacks.prune.every_n_steps; CompressedSensingPruning takes it, and "
        "it is added with a plus: +callbacks.prune.every_n_steps=...",
    ),
    (["callbacks.nna.spce=1"], "there is no setting callbacks.nna.spce; did you mean nna.spec?"),
    (["~optimizer"], "there is no setting optimizer; did you mean model.optimizer?"),
    (
        ["compression=gqq"],
        "there is no compression=gqq; did you mean gq? compression has codebook,",
    ),
    (["sweep=grid", "bist=2", "seed=1,2"], "there is no setting bist; did you mean bits?"),
    (["bits=[2"], "recipes.train: cannot read bits=[2: "),
    (["init_from=runs/bits=4,seed=1/last.ckpt"], "\"init_from='runs/bits=4,seed=1/last.ckpt'\""),
    (["sweep=optuna", "seed=2"], "nothing is searched: add ranges to the command"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda one: str(one)[:20])
def test_a_mistyped_override_names_the_right_one(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in _refused(monkeypatch, capsys, _nothing, *arguments)


def _checked(config: DictConfig) -> None:
    check_objective(config.objective, KNOWN)


def test_a_check_of_ours_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    text = _refused(monkeypatch, capsys, _checked, "objective=[weer]")
    assert "objective=weer is no metric of a run; did you mean wer?" in text
    text = _refused(monkeypatch, capsys, _checked, "sweep=grid", "objective=[weer]", "seed=1,2")
    assert "recipes.train: seed=1: objective=weer" in text


def test_everything_else_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    def faulty(_: DictConfig) -> None:
        int("x")

    with pytest.raises(ValueError, match="invalid literal"):
        _started(monkeypatch, faulty)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="objective=weer is no metric"):
        _started(monkeypatch, _checked, "objective=[weer]")


def test_keys_have_those_of_groups() -> None:
    keys = known_keys("train", ["compression=gq"])
    assert {"bits", "compression", "sweep", "callbacks.gq.mu", "data.batch_seconds"} <= {*keys}


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["wer", "bites"], "objective=bites is no metric of a run; did you mean bits"),
        ([], "a list"),
    ],
)
def test_an_objective_is_a_metric(names: list[str], complaint: str) -> None:
    check_objective(["wer", "packed_bytes"], KNOWN)
    check_objective(["accuracy"], ())  # Only a test tells.
    with pytest.raises(ValueError, match=complaint):
        check_objective(names, KNOWN)


def _written(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "text.ckpt").write_text("hello\n")
    (folder / "damaged.ckpt").write_bytes(b"PK\x03\x04" + bytes(2000))
    torch.save({"state_dict": {}}, folder / "other.ckpt")


WRONG = [
    ("evaluate", ["ckpt=missing.ckpt"], "there is no weights file missing.ckpt"),
    ("evaluate", ["ckpt=text.ckpt"], "text.ckpt is damaged or no checkpoint: it is no file of tor"),
    ("evaluate", ["ckpt=damaged.ckpt"], "damaged.ckpt is damaged or no checkpoint"),
    ("evaluate", ["ckpt=other.ckpt"], "other.ckpt was not written by recipes.train"),
    ("evaluate", ["ckpt=other.ckpt", "beam_width=0"], "beam_width must be a positive number, got"),
    ("train", ["compression=gq", "bits=-2"], "callbacks.gq: bits must be an int from 1 to 8, got"),
    ("train", ["compression=gmp", "sparsity=1.5"], "callbacks.prune: sparsity must be at least 0"),
    ("train", ["compression=gmp", "pattern=diagonal"], "callbacks.prune: unknown pattern 'diagona"),
    ("train", ["experiment=an4_rnnt", "data.root=none"], "there is no folder none (relative to "),
    ("train", ["hydra.run.dir=file/x"], "cannot write into the folder of the run: file/x: Not a"),
    ("train", ["threads=-1"], "threads must be a positive number, got -1"),
    ("train", ["seed=abc"], "seed must be a number, got 'abc'"),
    ("train", ["trainer.max_epochs=abc"], "trainer.max_epochs must be a number, got 'abc'"),
    ("train", ["model.optimizer.lr=abc"], "model.optimizer.lr must be a number, got 'abc'"),
    ("train", ["trainer.strategy=foo"], "trainer: You selected an invalid strategy name"),
    ("train", ["trainer.precision=foo"], "trainer: Precision 'foo' is invalid"),
    ("train", ["trainer.profiler=foo"], "trainer: When passing string value for the `profiler`"),
    ("train", ["trainer.max_time=soon"], "callbacks.timer: "),
    ("train", ["trainer.val_check_interval=1000"], "`val_check_interval` (1000) must be less"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG, ids=lambda one: str(one)[:30])
def test_what_a_user_gets_wrong_is_one_message(
    name: str,
    arguments: list[str],
    message: str,
    small_an4: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    _written(tmp_path)
    small = [
        *("experiment=an4_rnnt", *SMALL_NETWORK, f"data.root={small_an4}", "data.num_mels=8"),
        *("data.speeds=[1.0]", "data.spec_augment.frequency_width=2", "data.num_buckets=2"),
        *("trainer.accelerator=cpu", "callbacks.progress=null", "trainer.max_epochs=1"),
        *("trainer.enable_progress_bar=false", "data.num_workers=0"),
    ]
    recipe = {"train": train, "evaluate": evaluate}[name]
    settings = [*small, *arguments] if name == "train" else arguments
    monkeypatch.setattr("sys.argv", [f"recipes.{name}", *settings, *QUIET])
    with pytest.raises(SystemExit) as end:
        as_program(name)(recipe)()
    assert end.value.code == 1
    text = capsys.readouterr().err
    assert f"recipes.{name}: {message}" in text
    assert "Traceback" not in text
    own = text[text.index(f"recipes.{name}: ") :]
    assert len(own.splitlines()) <= 3


@pytest.mark.parametrize("program", ["drift_replay", "sweep_table"])
def test_a_path_that_cannot_be_written_is_one_message(
    program: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _written(tmp_path)
    log = tmp_path / "log.csv"
    log.write_text("wer\n0.5\n0.4\n")
    (tmp_path / "summary.json").write_text('{"train_seconds": 1.0}')
    commands = {
        "drift_replay": lambda: drift_replay.main(
            [str(log), f"plot={tmp_path / 'file' / 'a.png'}"]
        ),
        "sweep_table": lambda: sweep_table.main(
            [str(tmp_path), "--output", str(tmp_path / "file")]
        ),
    }
    with pytest.raises(SystemExit):
        commands[program]()
    text = capsys.readouterr().err
    assert f"recipes.{program}: cannot write {tmp_path / 'file'}: " in text
    assert len(text.splitlines()) == 2


def test_a_worker_that_a_sweep_starts_knows_the_command_of_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As joblib starts it: with arguments of its own, and the environment of the sweep.
    ask = "from recipes.parent import command_line; print(command_line())"
    printed: list[str] = []

    def start_worker(_: DictConfig) -> None:
        worker = [sys.executable, "-c", ask]
        done = subprocess.run(worker, check=True, capture_output=True, text=True, cwd=ROOT)
        printed.append(done.stdout.strip())

    _started(monkeypatch, start_worker, "bits=4", "compression=gq", f"hydra.run.dir={tmp_path}")
    assert printed[0].endswith(f"bits=4 compression=gq hydra.run.dir={tmp_path} {' '.join(QUIET)}")
    assert COMMAND not in os.environ
