"""What a user gets wrong ends in one message; a fault of the program keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig

from recipes.asr.adapter import TransducerAdapter
from recipes.objective import check_objective
from recipes.program import as_program, known_keys

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
    (["~optimizer"], "there is no setting optimizer; did you mean model.optimizer?"),
    (
        ["compression=gqq"],
        "there is no compression=gqq; did you mean gq? compression has codebook,",
    ),
    (["sweep=grid", "bist=2", "seed=1,2"], "there is no setting bist; did you mean bits?"),
    (["bits=[2"], "recipes.train: cannot read bits=[2: "),
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
