"""A search does not repeat itself, goes on after an end, and tells its best runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from optuna.trial import TrialState

from recipes.study import Study, search_space

Objective = Callable[[dict[str, str]], Any]


def _parsed(*overrides: str) -> Any:
    return search_space(OverridesParser.create().parse_overrides(list(overrides)))


def _study(
    folder: Path, *overrides: str, objective: Sequence[str] = ("wer",), **other: Any
) -> Study:
    space, fixed = _parsed(*overrides)
    settings = {"n_trials": 100, "n_jobs": 1, "max_failures": 0, "seed": 1, **other}
    sampler = OmegaConf.create({"_target_": "optuna.samplers.TPESampler"})
    return Study(folder, space, fixed, objective=objective, sampler=sampler, **settings)


class Launcher:
    """Calls a function of the settings in place of a recipe; what it raises fails the run."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.jobs: list[str] = []

    def __call__(self, jobs: Sequence[Sequence[str]], **_: int) -> list[JobReturn]:
        returns = []
        for job in jobs:
            self.jobs.append(" ".join(job))
            result = JobReturn(status=JobStatus.COMPLETED)
            try:
                result.return_value = self.objective(dict(one.split("=", 1) for one in job))
            except ValueError as error:
                result.status, result.return_value = JobStatus.FAILED, error
            returns.append(result)
        return returns


def _bowl(settings: dict[str, str]) -> float:
    return (int(settings["bits"]) - 4) ** 2 + (settings["compression"] != "gq")


def _states(folder: Path) -> list[TrialState]:
    storage = f"sqlite:///{folder / 'study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return [trial.state for trial in optuna.load_study(study_name=name, storage=storage).trials]


SEARCH = ("compression=gq,ste", "bits=range(2,9,2)", "seed=3")


def test_the_whole_space_is_run_once(tmp_path: Path) -> None:
    launcher = Launcher(_bowl)
    (best,) = _study(tmp_path, *SEARCH, n_jobs=3).run(launcher)
    assert len(launcher.jobs) == len(set(launcher.jobs)) == 8
    assert best.params == {"compression": "gq", "bits": 4}
    assert best.values == [0.0]
    _study(tmp_path, *SEARCH).run(launcher)
    assert len(launcher.jobs) == 8


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_search_that_was_killed_goes_on_where_it_was(tmp_path: Path, n_jobs: int) -> None:
    first = Launcher(_bowl)

    def killed(jobs: Sequence[Sequence[str]], **_: int) -> list[JobReturn]:
        if len(first.jobs) == 2:
            first.jobs += [" ".join(job) for job in jobs]
            raise KeyboardInterrupt  # As a signal: nothing is stored.
        return first(jobs)

    with pytest.raises(KeyboardInterrupt):
        _study(tmp_path, *SEARCH, n_trials=6, n_jobs=n_jobs).run(killed)
    assert _states(tmp_path).count(TrialState.RUNNING) == n_jobs
    second = Launcher(_bowl)
    _study(tmp_path, *SEARCH, n_trials=6, n_jobs=n_jobs).run(second)
    assert second.jobs[:n_jobs] == first.jobs[2:]
    assert len({*first.jobs, *second.jobs}) == len(first.jobs[:2]) + len(second.jobs) == 6
    assert _states(tmp_path).count(TrialState.COMPLETE) == 6
    assert TrialState.RUNNING not in _states(tmp_path)


def test_a_run_that_failed_is_run_again_by_the_next_command(tmp_path: Path) -> None:
    def fails(settings: dict[str, str]) -> float:
        if settings["bits"] == "2":
            raise ValueError("the disk is full")
        return _bowl(settings)

    failing, working = Launcher(fails), Launcher(_bowl)
    with pytest.raises(ValueError, match="the disk is full"):
        _study(tmp_path, *SEARCH).run(failing)
    failed = failing.jobs[-1]
    _study(tmp_path, *SEARCH).run(working)
    assert working.jobs[0] == failed
    assert len({*failing.jobs, *working.jobs}) == len(failing.jobs) - 1 + len(working.jobs) == 8


def test_a_search_may_go_on_without_runs_that_fail(tmp_path: Path) -> None:
    def fails(settings: dict[str, str]) -> float:
        if settings["bits"] == "8":
            raise ValueError("out of memory")
        return _bowl(settings)

    launcher = Launcher(fails)
    (best,) = _study(tmp_path, *SEARCH, max_failures=2).run(launcher)
    assert len(launcher.jobs) == len(set(launcher.jobs)) == 8
    assert best.values == [0.0]


def test_a_front_has_the_runs_that_no_other_beats(tmp_path: Path) -> None:
    launcher = Launcher(lambda settings: (_bowl(settings), int(settings["bits"])))
    best = _study(tmp_path, *SEARCH, objective=("wer", "packed_bytes")).run(launcher)
    assert {tuple(trial.values) for trial in best} == {(0, 4), (4, 2)}


@pytest.mark.parametrize("returned", [None, float("nan"), (0.5, float("inf"))])
def test_a_run_without_a_finite_result_is_an_error(tmp_path: Path, returned: Any) -> None:
    with pytest.raises(ValueError, match=r"a finite number each is needed; .*test=true"):
        _study(tmp_path, *SEARCH).run(Launcher(lambda _: returned))


def test_ranges_are_those_of_hydra() -> None:
    space, fixed = _parsed(
        *("a=choice(gq,ste)", "b=range(2,9,3)", "c=interval(0.1,1)", "d=tag(log,interval(1,64))"),
        *("e=range(0.0,1.0,0.5)", "f=[1,2],[3]", "h=1,2", "g=5", "h=3"),
    )
    drawn = {
        key: json.loads(optuna.distributions.distribution_to_json(each))["attributes"]
        for key, each in space.items()
    }
    assert drawn.keys() == {*"abcdef"}
    assert drawn["a"] == {"choices": ["gq", "ste"]}
    assert drawn["b"] == {"low": 2, "high": 8, "step": 3, "log": False}
    assert (drawn["c"]["low"], drawn["c"]["high"], drawn["c"]["log"]) == (0.1, 1.0, False)
    assert (drawn["d"]["low"], drawn["d"]["high"], drawn["d"]["log"]) == (1, 64, True)
    assert (drawn["e"]["low"], drawn["e"]["high"], drawn["e"]["step"]) == (0.0, 0.5, 0.5)
    assert drawn["f"] == {"choices": ["[1,2]", "[3]"]}
    assert fixed == {"g": "5", "h": "3"}


@pytest.mark.parametrize("spaces", [("a=1,1,2", 2), ("a=tag(log,int(interval(1,64)))", 64)])
def test_a_space_has_its_size(tmp_path: Path, spaces: tuple[str, int]) -> None:
    assert _study(tmp_path, spaces[0]).n_trials == spaces[1]


def test_a_continuous_range_is_searched(tmp_path: Path) -> None:
    launcher = Launcher(lambda settings: (float(settings["lr"]) - 0.5) ** 2)
    _study(tmp_path, "lr=interval(0,1)", n_trials=4).run(launcher)
    assert len(set(launcher.jobs)) == 4


def test_a_search_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"nothing is searched: add ranges to the command"):
        _parsed("bits=4")


def test_another_search_is_another_study(tmp_path: Path) -> None:
    name = _study(tmp_path, *SEARCH).name
    assert _study(tmp_path, *SEARCH, "threads=3", "sweep=optuna", n_trials=9).name == name
    assert _study(tmp_path, *SEARCH, "seed=2").name != name
    assert _study(tmp_path, *SEARCH, "bits=2,3").name != name
    assert _study(tmp_path, *SEARCH, objective=("bits",)).name != name


def test_one_process_runs_a_study(tmp_path: Path) -> None:
    other = _study(tmp_path, *SEARCH)

    def launch(jobs: Sequence[Sequence[str]], **_: int) -> list[JobReturn]:
        return [JobReturn(_return_value=other.run(launch)) for _ in jobs]

    with pytest.raises(ValueError, match=r"is in use by process"):
        _study(tmp_path, *SEARCH).run(launch)
