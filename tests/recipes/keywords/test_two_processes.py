"""Two processes hold the same, start as one process does, and go on from a run of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from recipes.evaluate import evaluate
from tests.conftest import ROOT
from tests.recipes.keywords.spotter_runs import GROUPS, PLAIN, run, run_resumed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Checkpoint directory")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of finished runs on two processes, of a stopped one, and of what they came from."""
    folder = tmp_path_factory.mktemp("two processes")
    cache = folder / "cache"
    assert run_resumed(folder / "one to two", cache, 1) is None
    stopped = folder / "one to two" / "checkpoints" / "last.ckpt"
    stopped.rename(folder / "one.ckpt")
    stopped.write_bytes((folder / "one.ckpt").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.keywords.spotter_runs", str(folder), str(cache)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stderr)
    return folder


def _states(run_dir: Path, process: int = 0) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = torch.load(
        run_dir / "states" / f"{process}.pt", weights_only=True
    )
    return states


def _summary(run_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def _differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths of values that are not equal to the bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [each for key in a for each in _differing(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [each for key, (x, y) in pairs for each in _differing(x, y, f"{path}/{key}")]
    is_equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if is_equal else [path]


@pytest.mark.parametrize("name", [*GROUPS, "plain"])
def test_both_processes_hold_the_same_in_every_step(folder: Path, name: str) -> None:
    first, second = (_states(folder / "two" / name, process) for process in (0, 1))
    assert [each["step"] for each in first] == [0, 1, 2, 3, 4, 5, 6]
    assert "NNAEmulation" in first[-1]["callbacks"]
    assert _differing(first, second) == []


@pytest.mark.parametrize("name", GROUPS)
def test_masks_and_centroids_start_as_on_one_process(
    folder: Path, name: str, tmp_path: Path
) -> None:
    run(tmp_path / "one", folder / "cache", name, 1)
    one, two = _states(tmp_path / "one"), _states(folder / "two" / name)
    assert _differing(one[0], two[0]) == []
    assert [each["step"] for each in one] == [each["step"] for each in two]


def test_without_batch_norm_ranges_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "one", folder / "cache", "nna8", 1, *PLAIN)
    one, two = _states(tmp_path / "one"), _states(folder / "two" / "plain")
    ranges = [each[1]["callbacks"]["NNAEmulation"]["emulator"]["ranges"] for each in (one, two)]
    assert len(ranges[0]) > 3
    assert ranges[0] == ranges[1]
    # The gradient of two processes is the mean of two means: rounded once more.
    torch.testing.assert_close(one[1]["parameters"], two[1]["parameters"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*GROUPS, "plain"])
def test_every_word_of_an_odd_number_counts_once(
    folder: Path, name: str, compose_config: Callable[..., DictConfig]
) -> None:
    shared = _summary(folder / "two" / name)
    assert shared["words"] == 5
    ckpt = f"ckpt={folder / 'two' / name / 'checkpoints' / 'last.ckpt'}"
    alone = evaluate(compose_config("evaluate", ckpt))
    assert [alone[key] for key in ("words", "errors")] == [
        shared[key] for key in ("words", "errors")
    ]


def test_a_run_of_one_process_goes_on_with_two(folder: Path) -> None:
    _check_resumed(folder / "one to two", folder / "one.ckpt", processes=2)
    assert (folder / "output.txt").read_text().count("goes on with other processes") == 1


def test_a_run_of_two_processes_goes_on_with_one(folder: Path) -> None:
    run_dir, cache = folder / "two to one", folder / "cache"
    stopped = run_dir / "checkpoints" / "last.ckpt"
    (folder / "two.ckpt").write_bytes(stopped.read_bytes())
    with pytest.raises(
        ValueError, match=r"planned with 6 .* would have 12 .*accumulate_grad_batch"
    ):
        run_resumed(run_dir, cache, 1, "data.batch_size=4")
    with pytest.warns(UserWarning, match="trainer.devices=2 is 1 now"):
        assert run_resumed(run_dir, cache, 1) is not None
    _check_resumed(run_dir, folder / "two.ckpt", processes=1)


def _check_resumed(run_dir: Path, checkpoint: Path, processes: int) -> None:
    for process in range(processes):
        before = torch.load(checkpoint, weights_only=True)
        assert (before["epoch"], before["global_step"]) == (0, 2)
        states = _states(run_dir, process)
        assert [each["step"] for each in states] == [2, 3, 4, 5, 6]
        begins: Any = torch.load(run_dir / "states" / f"start{process}.pt", weights_only=True)
        ends = states[-1]
        # A checkpoint has the deployed weights, and the latent ones in the states of the methods.
        saved = {key: before["callbacks"].get(key, {}) for key in begins["callbacks"]}
        latents = [state.pop("latents", {}) for state in saved.values()]
        weights = {name: before["state_dict"][name] for name in begins["parameters"]}
        weights |= {name: latent for each in latents for name, latent in each.items()}
        assert _differing(begins["parameters"], weights) == []
        assert _differing(begins["optimizers"], before["optimizer_states"]) == []
        assert _differing(begins["schedules"], before["lr_schedulers"]) == []
        for state in begins["callbacks"].values():
            state.pop("latents", None)
        assert _differing(begins["callbacks"], saved) == []
        assert [ends["callbacks"]["NNAEmulation"]["steps"], ends["schedules"][0]["last_epoch"]] == [
            6,
            6,
        ]
    # Without the callbacks: a site that first appears after the calibration, as mean#1 does here,
    # has a range of each process's own.
    of_all = ("step", "parameters", "buffers", "optimizers", "schedules")
    first, last = (_states(run_dir, process) for process in (0, processes - 1))
    for name in of_all:
        assert _differing([each[name] for each in first], [each[name] for each in last]) == [], name
    summary = _summary(run_dir)
    assert (summary["epochs"], summary["words"]) == (3, 5)
    assert summary["sparsity"] == pytest.approx(0.8, abs=0.02)
