"""The sweeper ``study`` of Hydra: searches with Optuna, and goes on after a kill.

``sweep=optuna`` and ``sweep=pareto`` of the recipes use it, see ``docs/tutorials/sweeps.md``. Hydra
imports this module at every start, so it imports nothing that takes time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class StudySweeper(Sweeper):
    """Sweeper that asks an Optuna sampler for the settings of each run.

    Args:
        n_trials: Number of different runs of the whole study, those before a kill included.
        n_jobs: Number of runs that are launched together.
        max_failures: Number of runs that may end in an error before the sweep ends, too.
        seed: Seed of the sampler.
        sampler: Node of an Optuna sampler, with ``_target_`` and its settings except the seed.
        params: Ranges by setting, in Hydra's syntax; those of the command take precedence.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        max_failures: int,
        seed: int,
        sampler: DictConfig,
        params: DictConfig | None = None,
    ) -> None:
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.max_failures = max_failures
        self.seed = seed
        self.sampler = sampler
        self.params = dict(params or {})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Build the launcher of the runs."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run what is left of the study that the folder of the sweep has."""
        from recipes import require_extra

        require_extra("sweep", "optuna")
        from recipes.study import Study, search_space

        # Hydra calls setup first.
        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides(
            [*(f"{key!s}={value}" for key, value in self.params.items()), *arguments]
        )
        space, fixed = search_space(overrides)
        folder = Path(self.config.hydra.sweep.dir)
        study = Study(
            folder,
            space,
            fixed,
            objective=list(self.config.objective),
            sampler=self.sampler,
            n_trials=self.n_trials,
            n_jobs=self.n_jobs,
            max_failures=self.max_failures,
            seed=self.seed,
        )
        # Raises before anything is written if the settings of a run do not compose.
        self.validate_batch_is_legal([study.sample()])
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        return study.run(self.launcher.launch)
