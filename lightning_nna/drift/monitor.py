"""``DriftMonitor``: tell a real change of a validation metric from its noise.

Reference:
    Baby et al., "Adaptive estimation and learning under temporal distribution shift", ICML 2025,
    arXiv 2505.15803.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal, TypeAlias
from weakref import ref

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_nna.drift.detector import DriftDetector, DriftReading, Mode
from lightning_nna.figure_files import (
    FileWriter,
    require_matplotlib,
    save_figure,
)

#: Reaction to the begin of a drift; a callable takes trainer, module, metric and reading.
OnDrift: TypeAlias = (
    Literal["log", "warn", "stop"]
    | Callable[[pl.Trainer, pl.LightningModule, str, DriftReading], None]
)


class DriftMonitor(FileWriter):
    """Monitor metrics of validation: denoise them, and flag one that has become worse for good.

    After each validation of a fit it logs, for a metric such as ``val/wer``,
    ``drift/val/wer/value`` (denoised), ``…/radius``, ``…/effective_window`` (validations that
    count) and ``…/drift`` (0 or 1). They are there before ``ModelCheckpoint``, ``EarlyStopping``
    and schedulers look for their ``monitor``: it puts itself first among the callbacks. Nothing
    else in the training changes.

    A metric drifts when its denoised value is worse than the best that it had, beyond the radii of
    both; a curve that falls as training curves do is no drift. Before a first finite value there
    are no such keys: ``EarlyStopping`` of one of them then waits, as with ``strict=False``, and
    ``ModelCheckpoint`` and schedulers say that they miss it. A metric that is missing later, or not
    finite, leaves them unchanged; one that never changed has no noise to compare with and no drift.
    Each is warned of once, a missing one with the names that were logged.

    Args:
        monitor: Name of a metric, or names of several.
        wavelet: Name of the estimator's wavelet: ``"haar"`` for levels, at a cost that does not
            grow; ``"db2"`` and others for curves.
        mode: Direction, ``"min"`` if less is better, ``"max"`` if more is; or a mode by metric.
        constant: Factor of the threshold of details, at least 0.
        delta: Probability of error of the threshold and the radius: less means fewer alarms, later.
        warmup: Number of validations before the first reference, at least 2.
        min_delta: Least worsening that is a drift, in the unit of the metric, at least 0.
        on_drift: Reaction to the begin of a drift: ``"log"`` writes to the log, ``"warn"`` warns,
            ``"stop"`` ends the training after this validation; or a callable of the trainer, the
            module, the metric's name and its ``DriftReading``.
        dirpath: Folder of the plots; None for ``drift`` next to the log.
        figures: Whether each metric is plotted when ``fit`` ends; needs matplotlib.

    With several processes a metric is averaged over those that have it, so that all decide alike.

    Raises:
        ValueError: If an argument is out of range, or no metric is named.
        ImportError: If figures are wanted and matplotlib, the extra ``figures``, is missing.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> monitor = DriftMonitor("val/loss", figures=False)
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[monitor], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(SmallRecurrentModule())
        >>> float(trainer.callback_metrics["drift/val/loss/drift"])
        0.0
    """

    def __init__(
        self,
        monitor: str | Sequence[str],
        *,
        wavelet: str = "haar",
        mode: Mode | Mapping[str, Mode] = "min",
        constant: float = 0.45,
        delta: float = 0.2,
        warmup: int = 6,
        min_delta: float = 0.0,
        on_drift: OnDrift = "log",
        dirpath: str | Path | None = None,
        figures: bool = True,
    ) -> None:
        names = [monitor] if isinstance(monitor, str) else list(monitor)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"monitor must name metrics, each once, got {names}")
        modes = {name: mode for name in names} if isinstance(mode, str) else dict(mode)
        if modes.keys() != set(names):
            raise ValueError(f"mode must be given for each of {names}, got {sorted(modes)}")
        if not callable(on_drift) and on_drift not in ("log", "warn", "stop"):
            raise ValueError(
                f"on_drift must be 'log', 'warn', 'stop' or a callable, got {on_drift!r}"
            )
        if figures:
            require_matplotlib()
        self.on_drift, self.draws = on_drift, figures
        super().__init__(dirpath, "drift")
        self.detectors = {
            name: DriftDetector(
                wavelet=wavelet,
                mode=modes[name],
                constant=constant,
                delta=delta,
                warmup=warmup,
                min_delta=min_delta,
            )
            for name in names
        }
        #: Readings of each metric so far, and their optimizer steps.
        self.readings: dict[str, list[DriftReading]] = {name: [] for name in names}
        self.steps: dict[str, list[int]] = {name: [] for name in names}
        self._warned: set[tuple[str, str]] = set()
        # Module whose metrics were read, unless a state was loaded since; and the state before it.
        self._module: ref[pl.LightningModule] | None = None
        self._initial_state = self.state_dict()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Callbacks that monitor a denoised metric read it in `on_validation_end`, where this one
        # writes it.
        # A list of its own: Lightning is iterating over the present one.
        others = [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        own = tuple(f"drift/{name}/" for name in self.detectors)
        for each in others:
            if _is_early_stopping(each) and str(each.monitor).startswith(own):
                each.strict = False  # A metric may come later than the first validation.

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The readings of one module are no history of another's.
        if self._module is not None and self._module() is not pl_module:
            self.load_state_dict(copy.deepcopy(self._initial_state))
            self._warned.clear()
        self._module = ref(pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        for name, detector in self.detectors.items():
            began = self._read(trainer, name, detector)
            self._log(trainer, name)
            if began:
                self._act(trainer, pl_module, name)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.plan_files(trainer, wanted=self.draws)

    @override
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> None:
        from lightning_nna.drift.plot import draw

        stems = _stems(self.readings)
        for name, readings in self.readings.items():
            if readings:
                figure = draw(readings, self.steps[name], title=name, xlabel="optimizer step")
                save_figure(
                    trainer,
                    figure,
                    folder / f"{stems[name]}.png",
                    key=f"drift/{name}/figure",
                    step=self.steps[name][-1],
                )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            name: {
                "detector": detector.state_dict(),
                "steps": list(self.steps[name]),
                # Without a reference it is None: a number that is not one equals nothing.
                "readings": [
                    [None if value != value else value for value in astuple(each)]
                    for each in self.readings[name]
                ],
            }
            for name, detector in self.detectors.items()
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._module = None
        for name in self.detectors.keys() & state_dict.keys():
            state = state_dict[name]
            self.detectors[name].load_state_dict(state["detector"])
            self.steps[name] = list(state["steps"])
            restored: list[list[Any]] = [
                [math.nan if value is None else value for value in each]
                for each in state["readings"]
            ]
            self.readings[name] = [DriftReading(*each) for each in restored]

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle the readings, not the module."""
        return {**self.__dict__, "_module": None}

    def _read(self, trainer: pl.Trainer, name: str, detector: DriftDetector) -> bool:
        """Take in the metric's value; tell if a drift begins."""
        value = self._agreed(trainer, name)
        if value is None:
            known = sorted(key for key in trainer.callback_metrics if not key.startswith("drift/"))
            self._warn(name, "missing", f"was not logged; logged are {known}; waiting for it")
            return False
        if not math.isfinite(value):
            self._warn(name, "not finite", f"is {value}; such values are left out")
            return False
        before = self.readings[name][-1].drift if self.readings[name] else False
        reading = detector.update(value)
        self.readings[name].append(reading)
        self.steps[name].append(trainer.global_step)
        if detector.constant_so_far and detector.n > detector.warmup:
            self._warn(name, "constant", f"has been {value} {detector.n} times: no drift is seen")
        return reading.drift and not before

    def _agreed(self, trainer: pl.Trainer, name: str) -> float | None:
        """Return the metric's value, the mean over the processes that have it."""
        value = trainer.callback_metrics.get(name)
        if trainer.world_size == 1:
            return None if value is None else float(value)
        own = [0.0, 0.0] if value is None else [float(value), 1.0]
        both = torch.tensor(own, dtype=torch.float64, device=trainer.strategy.root_device)
        total, count = trainer.strategy.reduce(both, reduce_op="sum").tolist()
        return total / count if count else None

    def _log(self, trainer: pl.Trainer, name: str) -> None:
        """Log the newest reading for monitors and loggers."""
        if not self.readings[name]:
            return  # A NaN would end the training or lower its learning rate.
        newest = self.readings[name][-1]
        metrics = {
            "value": newest.value,
            "radius": newest.radius,
            "effective_window": newest.effective_window,
            "drift": float(newest.drift),
        }
        keyed = {f"drift/{name}/{quantity}": number for quantity, number in metrics.items()}
        tensors = {
            key: torch.tensor(number, device=trainer.strategy.root_device)
            for key, number in keyed.items()
        }
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        finite = {key: number for key, number in keyed.items() if math.isfinite(number)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=trainer.global_step)

    def _act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
        reading = self.readings[name][-1]
        if callable(self.on_drift):
            self.on_drift(trainer, pl_module, name, reading)
            return
        message = (
            f"DriftMonitor: {name} has drifted to {reading.value:.4g} ± {reading.radius:.2g}; its "
            f"best level was {reading.reference:.4g} ± {reading.reference_radius:.2g}"
        )
        if self.on_drift == "warn":
            rank_zero_warn(message)
            return
        rank_zero_info(message)
        if self.on_drift == "stop":
            trainer.should_stop = True

    def _warn(self, name: str, kind: str, message: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            rank_zero_warn(f"DriftMonitor: {name} {message}")


def _is_early_stopping(callback: Any) -> bool:
    """Tell if a callback is an ``EarlyStopping`` of either name of Lightning's package."""
    return any(parent.__name__ == "EarlyStopping" for parent in type(callback).__mro__)


def _stems(names: Iterable[str]) -> dict[str, str]:
    """Name a file for each metric, all different; ``a/b`` and ``a_b`` would share one."""
    stems: dict[str, str] = {}
    for name in names:
        stem = name.replace("/", "_")
        while stem in stems.values():
            stem += "_"
        stems[name] = stem
    return stems
