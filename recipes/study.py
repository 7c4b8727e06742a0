"""A study of Optuna whose trials are runs of a recipe, stored in the folder of the sweep.

The same command goes on with the study after a kill: a run that was interrupted resumes in its
folder, and only the runs that are left are started. No settings are run twice: where the sampler
suggests settings that have a result, it is asked again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.utils import instantiate
from omegaconf import DictConfig
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from recipes.run_folder import sole_run
from recipes.run_name import INDIFFERENT

_log = logging.getLogger(__name__)

Launch = Callable[..., Sequence[JobReturn]]
Settings = dict[str, Any]

_REPEATED = "repeated"
"""Attribute of a trial that was never run, because its settings have a result."""
_PATIENCE = 10
"""Number of suggestions that may repeat one before settings without a result are drawn."""
_LARGEST_LISTED = 100_000
"""Number of combinations up to which they are drawn from a list."""


@dataclass(frozen=True)
class _Run:
    """A trial to run."""

    number: int
    settings: Settings


def search_space(
    overrides: Sequence[Override],
) -> tuple[dict[str, BaseDistribution], dict[str, str]]:
    """Divide the overrides of a sweep into what is searched and what every run has.

    Args:
        overrides: Parsed overrides; a later one takes precedence.

    Returns:
        Distributions of Optuna by key, and the values of the other keys.

    Raises:
        ValueError: If nothing is searched.
    """
    space: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        space.pop(key, None)
        fixed.pop(key, None)
        if override.is_sweep_override():
            space[key] = _distribution(override)
        else:
            fixed[key] = override.get_value_element_as_str()
    if not space:
        raise ValueError(
            "nothing is searched: add ranges to the command, as compression=gq,codebook "
            "'bits=range(2,9)' 'model.optimizer.lr=tag(log,interval(1e-4,1e-2))'"
        )
    return space, fixed


def _distribution(override: Override) -> BaseDistribution:
    """Return what Optuna draws from for a range of Hydra."""
    value: Any = override.value()
    if override.is_interval_sweep():
        is_log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=is_log)
        return FloatDistribution(float(value.start), float(value.end), log=is_log)
    values = list(dict.fromkeys(override.sweep_string_iterator()))
    if override.is_range_sweep() and not value.shuffle and len(values) > 1:
        numbers = list(value.range())
        step = numbers[1] - numbers[0]
        if step > 0 and all(isinstance(number, int) for number in numbers):
            return IntDistribution(numbers[0], numbers[-1], step=step)
        if step > 0:
            return FloatDistribution(numbers[0], numbers[-1], step=step)
    return CategoricalDistribution(values)


class Study:
    """Runs of one search.

    Args:
        folder: Folder of the sweep, which gets ``study.db``.
        space: Distributions by key.
        fixed: Values of the other keys.
        objective: Metrics to make small, as ``wer``.
        sampler: Node of an Optuna sampler.
        n_trials: Number of different settings to run; at most as many as the space has.
        n_jobs: Number of runs that are launched together.
        max_failures: Number of runs that may end in an error before the sweep does.
        seed: Seed of the sampler.
    """

    def __init__(
        self,
        folder: Path,
        space: Mapping[str, BaseDistribution],
        fixed: Mapping[str, str],
        *,
        objective: Sequence[str],
        sampler: DictConfig,
        n_trials: int,
        n_jobs: int,
        max_failures: int,
        seed: int,
    ) -> None:
        if min(n_trials, n_jobs) < 1:
            raise ValueError(f"n_trials and n_jobs must be positive; got {n_trials} and {n_jobs}")
        self.folder, self.space, self.fixed = folder, dict(space), dict(fixed)
        self.objective, self.sampler, self.seed = list(objective), sampler, seed
        self.size = math.prod(_count(distribution) for distribution in self.space.values())
        self.n_trials = int(min(n_trials, self.size))
        self.n_jobs, self.max_failures = n_jobs, max_failures
        self._failed: list[str] = []

    @property
    def name(self) -> str:
        """Name of the study: what is searched has the same in every command."""
        indifferent = {*INDIFFERENT, "sweep"}
        fixed = {key: value for key, value in self.fixed.items() if key not in indifferent}
        space = {key: str(each) for key, each in self.space.items()}
        return hashlib.sha256(_key({**space, **fixed, "": self.objective}).encode()).hexdigest()[:8]

    def sample(self) -> list[str]:
        """Return overrides of one run of the space, to compose them."""
        return self.overrides({key: _listed(each)[0] for key, each in self.space.items()})

    def overrides(self, settings: Settings) -> list[str]:
        """Return the overrides of a run."""
        return [f"{key}={value}" for key, value in {**self.fixed, **settings}.items()]

    def run(self, launch: Launch) -> list[optuna.trial.FrozenTrial]:
        """Run the trials that are left.

        Args:
            launch: Launcher of Hydra: takes lists of overrides, and ``initial_job_idx``.

        Returns:
            The best trials: one, or with several objectives those of the Pareto front.

        Raises:
            ValueError: If another process runs a study in the folder.
            Exception: Of a run, if more runs than ``max_failures`` ended in one.
        """
        with sole_run(self.folder):
            study = self._open()
            waiting = self._interrupted(study)
            waiting += self._failed_before(study, self.n_trials - len(_results(study)))
            while batch := self._batch(study, waiting):
                self._launch(study, batch, launch)
            return self._report(study)

    def _open(self) -> optuna.Study:
        """Open or create the study of this search."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name=self.name,
            storage=f"sqlite:///{self.folder / 'study.db'}",
            directions=["minimize"] * len(self.objective),
            load_if_exists=True,
        )
        # Another seed than before the kill: the same one would suggest the same settings again.
        study.sampler = instantiate(self.sampler, seed=self.seed + len(study.trials))
        done, file = len(_results(study)), self.folder / "study.db"
        _log.info("study %s in %s: %d of %d runs are done", self.name, file, done, self.n_trials)
        return study

    def _interrupted(self, study: optuna.Study) -> list[_Run]:
        """Return the trials that were running when the process was killed."""
        runs = []
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            if trial.params.keys() == self.space.keys():
                _log.info("resumes %s", " ".join(self.overrides(trial.params)))
                runs.append(_Run(trial.number, trial.params))
            else:  # Killed while its settings were drawn.
                study.tell(trial.number, state=TrialState.FAIL)
        return runs

    def _failed_before(self, study: optuna.Study, left: int) -> list[_Run]:
        """Return the settings of earlier errors as new trials, as many as are left to run."""
        runs: list[_Run] = []
        known = self._known(study)
        left -= len(study.get_trials(deepcopy=False, states=[TrialState.RUNNING]))
        for trial in study.get_trials(states=[TrialState.FAIL]):
            is_whole = trial.params.keys() == self.space.keys()
            if _REPEATED in trial.user_attrs or not is_whole or _key(trial.params) in known:
                continue
            if len(runs) >= left:
                break
            known.add(_key(trial.params))
            _log.info("runs again what failed: %s", " ".join(self.overrides(trial.params)))
            runs.append(self._enqueued(study, trial.params))
        return runs

    def _batch(self, study: optuna.Study, waiting: list[_Run]) -> list[_Run]:
        """Return the next runs, those first that wait; none if the study is done."""
        batch = [waiting.pop(0) for _ in range(min(self.n_jobs, len(waiting)))]
        left = min(self.n_trials, self.size - len(set(self._failed)))
        left -= len(_results(study)) + len(batch) + len(waiting)
        while len(batch) < self.n_jobs and left > 0:
            batch.append(self._ask(study))
            left -= 1
        return batch

    def _ask(self, study: optuna.Study) -> _Run:
        """Return a trial with settings that no other has."""
        known = self._known(study) | set(self._failed)
        for attempt in itertools.count(1):
            trial = study.ask(self.space)
            if _key(trial.params) not in known:
                return _Run(trial.number, trial.params)
            trial.set_user_attr(_REPEATED, True)
            study.tell(trial, state=TrialState.FAIL)
            if attempt >= _PATIENCE and self.size <= _LARGEST_LISTED:
                break
        unknown = [each for each in self._combinations() if _key(each) not in known]
        draw = random.Random(self.seed + len(study.trials))
        return self._enqueued(study, draw.choice(unknown))

    def _enqueued(self, study: optuna.Study, settings: Settings) -> _Run:
        study.enqueue_trial(settings)
        trial = study.ask(self.space)
        return _Run(trial.number, trial.params)

    def _combinations(self) -> Iterator[Settings]:
        """Yield all settings of a finite space."""
        values = [_listed(each) for each in self.space.values()]
        for combination in itertools.product(*values):
            yield dict(zip(self.space, combination, strict=True))

    def _known(self, study: optuna.Study) -> set[str]:
        """Return the settings that have a result or are being run."""
        states = [TrialState.COMPLETE, TrialState.RUNNING]
        return {_key(trial.params) for trial in study.get_trials(states=states)}

    def _launch(self, study: optuna.Study, batch: Sequence[_Run], launch: Launch) -> None:
        """Launch runs, and store their results."""
        jobs = [self.overrides(run.settings) for run in batch]
        try:
            returns = launch(jobs, initial_job_idx=batch[0].number)
        except Exception:
            for run in batch:
                study.tell(run.number, state=TrialState.FAIL)
            raise
        errors: list[Exception] = []
        for run, result in zip(batch, returns, strict=True):
            try:
                study.tell(run.number, self._values(result.return_value))
            except Exception as error:
                study.tell(run.number, state=TrialState.FAIL)
                _log.warning("%s failed: %s", " ".join(self.overrides(run.settings)), error)
                self._failed.append(_key(run.settings))
                errors.append(error)
        if errors and len(self._failed) > self.max_failures:
            raise errors[-1]

    def _values(self, returned: Any) -> list[float]:
        """Return the objectives of a run as Optuna takes them."""
        values = list(returned) if isinstance(returned, Sequence) else [returned]
        if None in values or not all(math.isfinite(value) for value in values):
            raise ValueError(
                f"a run returned {returned} for {', '.join(self.objective)}: a finite number each "
                "is needed; metrics of testing need test=true, and summary.json has their names"
            )
        return [float(value) for value in values]

    def _report(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        """Log the best trials, and return them."""
        best = study.best_trials
        for trial in best:
            values = zip(self.objective, trial.values, strict=True)
            _log.info(
                "best of %d runs: %s with %s",
                len(_results(study)),
                ", ".join(f"{name} {value:.6g}" for name, value in values),
                " ".join(f"{key}={value}" for key, value in trial.params.items()),
            )
        return best


def _results(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def _count(distribution: BaseDistribution) -> float:
    """Return the number of values that a distribution has."""
    if isinstance(distribution, FloatDistribution) and distribution.step is None:
        return 1 if distribution.single() else math.inf
    return len(_listed(distribution))


def _listed(distribution: BaseDistribution) -> list[Any]:
    """Return the values of a distribution; of a continuous one its two ends."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step or 1))
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        return [distribution.low, distribution.high]
    steps = round((distribution.high - distribution.low) / distribution.step)
    return [distribution.low + index * distribution.step for index in range(steps + 1)]


def _key(settings: Settings) -> str:
    """Return a text that two equal settings share."""
    return json.dumps(settings, sort_keys=True)
