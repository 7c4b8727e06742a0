"""``NNAEmulation``: train any LightningModule in the arithmetic of an accelerator.

Accelerator-aware training computes every operator of the network as the accelerator does, so that
the loss includes the accelerator's error.

Reference:
    Shakiah et al., "Accelerator-aware training for transducer-based speech recognition", SLT 2022,
    arXiv 2305.07778.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nna.emulation.attachment import attach, attached
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.learned_scales import LEARNED, Learned, share_keys
from lightning_nna.emulation.modes import Fidelity, Phase
from lightning_nna.emulation.observers import OBSERVERS, Observer
from lightning_nna.emulation.scope import outermost
from lightning_nna.emulation.sites import ROOT
from lightning_nna.emulation.spec import DEFAULT_PRESET, NNASpec, resolve_spec
from lightning_nna.emulation.telemetry import Telemetry
from lightning_nna.keyed_adam import KeyedAdam
from lightning_nna.lifecycle import ModuleBoundCallback
from lightning_nna.name_lists import listed
from lightning_nna.resumed_settings import require_same
from lightning_nna.step_counter import StepCounter

#: Fraction of clipped results above which a site is worth a warning, and the least results for it.
_HIGH_CLIP_RATE, _MIN_RESULTS = 0.05, 256


class NNAEmulation(ModuleBoundCallback):
    """Emulate an accelerator while a Trainer runs a LightningModule.

    In ``fit`` the first ``calibration_steps`` optimizer steps run in float while the ranges of
    activations are observed. Then the ranges are frozen, and every operator in scope computes what
    the accelerator computes. Validation, test and prediction are always exact. The module keeps its
    parameters, its ``state_dict`` and its forward.

    With another module (the next fold, ``trainer.test(other)``) the callback begins again: it
    counts, observes and learns from the start. With the same module it continues. The state of a
    checkpoint is restored for the module that the checkpoint is loaded for.

    Args:
        spec: Accelerator: name of a preset, an ``NNASpec``, its keys, or a YAML file.
        targets: Globs or ``re:…`` on module names; a selected module counts with all it contains.
            Losses and torchmetrics are never emulated.
        calibration_steps: Number of optimizer steps that observe ranges; 0 if ``calibrate`` was
            called before.
        range_margin: Fraction by which ranges are wider than what was observed, at least 0:
            activations that grow in training are clipped later. Advised where the float loss still
            falls fast: 0.25 with 8-bit activations, which costs a third of a bit, and 1 with 16-bit
            ones, which costs one bit.
        fidelity: Fidelity in training: ``"exact"``, or ``"fast"`` for float rounding in the
            requantization to 8 bits; 16-bit activations are always exact.
        observer: Rule by which ranges follow from observed values: ``"min_max"``,
            ``"moving_average"``, ``"percentile"`` or ``"mse"``.
        telemetry_every_n_steps: Number of optimizer steps from one sample of the telemetry to the
            next; 0 for none. A sampled step also runs every operator in float.
        learned_scales: Tensors whose scales are trained once the ranges are frozen (LSQ):
            ``"weights"``, ``"all"`` or ``"none"``. With ``"all"``, outputs of operators that are
            one instruction have learned scales; LSTM, GRU, attention, normalizations, inputs and
            in-place calls keep their ranges. Evaluation uses the learned scales.
        scale_lr: Learning rate of the scales' own Adam: the change of the log2 of a scale in one
            update.

    Every sample logs the mean and the worst of all call sites as ``nna/emulation/clip_rate``,
    ``…/clip_rate_max``, ``…/overflow_rate_max``, ``…/sqnr_db`` and ``…/sqnr_db_min``. Each epoch
    logs the metrics of every site, as ``nna/emulation/sqnr_db/<site>``. The fit ends with the table
    of all sites, which is :attr:`telemetry`. A warning names the sites that clip more than 5 % of
    their results, and another tells if no optimizer step of a fit ran emulated.

    Raises:
        ValueError: If an argument is out of range, a target selects nothing, or the module cannot
            be emulated (parameters that are not float32).
        RuntimeError: If validation, test or prediction starts without observed ranges.

    Example:
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> emulation = NNAEmulation(calibration_steps=2)
        >>> trainer = pl.Trainer(max_steps=4, callbacks=[emulation], accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(SmallRecurrentModule())
        >>> emulation.emulator.calibrated
        True

    Differs from the paper: the paper's accelerator is proprietary; the arithmetic here is that of
    the chosen ``spec``. For the differences between learned scales and LSQ see
    :mod:`lightning_nna.emulation.learned_scales`.
    """

    def __init__(
        self,
        spec: str | NNASpec | Mapping[str, Any] = DEFAULT_PRESET,
        *,
        targets: Sequence[str] = ("*",),
        calibration_steps: int = 32,
        range_margin: float = 0.0,
        fidelity: Fidelity = "exact",
        observer: Observer = "min_max",
        telemetry_every_n_steps: int = 100,
        learned_scales: Learned = "none",
        scale_lr: float = 0.003,
    ) -> None:
        super().__init__()
        if telemetry_every_n_steps < 0:
            raise ValueError(
                f"telemetry_every_n_steps must be at least 0, got {telemetry_every_n_steps}"
            )
        if observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {list(OBSERVERS)}, got {observer!r}")
        if learned_scales not in LEARNED:
            raise ValueError(
                f"learned_scales must be one of {list(LEARNED)}, got {learned_scales!r}"
            )
        if calibration_steps < 0:
            raise ValueError(f"calibration_steps must be at least 0, got {calibration_steps}")
        if not 0 <= range_margin < math.inf:
            raise ValueError(f"range_margin must be at least 0 and finite, got {range_margin}")
        if fidelity not in ("exact", "fast"):
            raise ValueError(f"fidelity must be 'exact' or 'fast', got {fidelity!r}")
        self.spec = resolve_spec(spec)
        self.targets = [targets] if isinstance(targets, str) else list(targets)
        self.calibration_steps = calibration_steps
        self.range_margin = range_margin
        self.fidelity: Fidelity = fidelity
        self.observer: Observer = observer
        self.telemetry_every_n_steps = telemetry_every_n_steps
        self.learned_scales: Learned = learned_scales
        if scale_lr <= 0:
            raise ValueError(f"scale_lr must be positive, got {scale_lr}")
        self.scale_lr = scale_lr
        self._scale_optimizer = KeyedAdam(scale_lr)
        self._scaler: Any = None
        #: Metrics of every call site, summed over the samples of the whole run.
        self.telemetry: Telemetry = Telemetry()
        self._counter = StepCounter(self._stepped)
        self._sampled = -1
        # Whether the batch that runs is sampled for the telemetry.
        self._samples = False
        self._emulator: Emulator | None = None
        # A loaded state of the emulator that no run has taken yet.
        self._deferred: dict[str, Any] | None = None
        # Contexts that are entered for the batch.
        self._batch = ExitStack()
        # Numbers of optimizer steps of this fit, and of those that ran emulated.
        self._fit_steps = self._emulated_steps = 0
        self._warned_of_clipping = False
        # Whether the ranges of this fit were observed before it, by nothing of this callback.
        self._ranges_are_earlier = False
        # ``calibration_steps`` of the run that has observed the ranges, if a checkpoint has it.
        self._observed_steps: int | None = None

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far."""
        return self._counter.steps

    @property
    def emulator(self) -> Emulator:
        """Emulator of the module, once a run has started.

        Raises:
            RuntimeError: Before a Trainer has started a run with this callback.
        """
        if self._emulator is None:
            raise RuntimeError("NNAEmulation has no module yet: a Trainer attaches it as it starts")
        return self._emulator

    # --- life cycle -----------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Before a checkpoint is loaded, since its state belongs to this module.
        self._meet(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        emulator = self._attach(pl_module)
        if self.calibration_steps == 0 and not emulator.calibrated:
            raise RuntimeError(
                "calibration_steps=0, and no ranges were observed before: call "
                "lightning_nna.calibrate(module, batches), or set calibration_steps"
            )
        if emulator.calibrated and self._observed_steps is not None and self.calibration_steps:
            saved, now = self._observed_steps, self.calibration_steps
            require_same("NNAEmulation", {"calibration_steps": saved}, {"calibration_steps": now})
        # Ranges of an earlier fit with another callback, or of ``calibrate``.
        self._ranges_are_earlier = (
            emulator.calibrated and self._observed_steps is None and self.steps == 0
        )
        if self._ranges_are_earlier and self.calibration_steps:
            rank_zero_info(
                f"NNAEmulation: the module has ranges of {len(emulator.ranges.ranges)} activations "
                f"already and this fit observes none, so that "
                f"calibration_steps={self.calibration_steps} and range_margin={self.range_margin} "
                f"have no effect; call lightning_nna.strip(module) before the fit to observe again"
            )
        # Gradient scaler of fp16 mixed precision; other precisions have none.
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        # Attached only now, since optimizers do not exist earlier.
        self._counter.attach(trainer.optimizers)
        self._fit_steps = self._emulated_steps = 0

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(pl_module)
        # In fit, validation before the freeze runs in float.
        if trainer.state.fn != "fit":
            self._require_ranges("validation")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(pl_module)
        self._require_ranges("test")

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(pl_module)
        self._require_ranges("prediction")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        if self.telemetry.sites:
            rank_zero_info(
                f"NNAEmulation: errors of the emulated arithmetic by site\n{self.telemetry}"
            )
        self._report_steps()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._release()

    # --- batches --------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        emulator = self.emulator
        if not emulator.calibrated and self.steps >= self.calibration_steps:
            emulator.freeze(self.range_margin)
            rank_zero_info(
                f"NNAEmulation: ranges of {len(emulator.ranges.ranges)} activations frozen "
                f"after {self.steps} optimizer steps; emulated on {self.spec.name} from here on"
            )
        self._samples = emulator.calibrated and self._is_due()
        if self._samples:
            self._sampled = self.steps
        phase: Phase = "emulate" if emulator.calibrated else "observe"
        telemetry = self.telemetry if self._samples else None
        self._enter(phase, self.fidelity, self.learned_scales, telemetry)

    @override
    def on_before_zero_grad(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # Gradients remain if a gradient scaler has skipped the step.
        self._scale_optimizer.zero_grad(self.emulator.scales.tensors())

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._leave()
        if self._samples:
            self._samples = False
            pl_module.log_dict(_summary(self.telemetry))
            self._warn_of_clipping()
        if not self.emulator.calibrated:
            # Every rank then saves the same ranges.
            self.emulator.reduce_ranges()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave()  # A hook that skips the rest of an epoch also skips the end of its batch.
        pl_module.log("nna/emulation/calibrated", float(self.emulator.calibrated))
        pl_module.log("nna/emulation/ranges", float(len(self.emulator.ranges.ranges)))
        for site, metrics in self.telemetry.rows().items():
            pl_module.log_dict(
                {f"nna/emulation/{name}/{site}": metric for name, metric in metrics.items()}
            )

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._enter_exact()

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._leave()

    @override
    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._enter_exact()

    @override
    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._leave()

    @override
    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._enter_exact()

    @override
    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._leave()

    # --- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        is_deferred = self._emulator is None or self._deferred is not None
        return {
            "emulator": self._deferred if is_deferred else self.emulator.state_dict(),
            "steps": self.steps,
            "telemetry": self.telemetry.state_dict(),
            "sampled": self._sampled,
            "scale_optimizer": self._scale_optimizer.state_dict(),
            "settings": self._settings(),
            "calibration_steps": self._observed_steps or self.calibration_steps,
            "clock": self._counter.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = dict(state_dict.get("settings", {}))
        if "spec" in saved:
            saved["spec"] = {k: v for k, v in saved["spec"].items() if k != "operators"}
        require_same("NNAEmulation", saved, self._settings())
        self._observed_steps = state_dict.get("calibration_steps")
        self._copied_with = None
        self._counter.load_state_dict(state_dict.get("clock", {"steps": state_dict["steps"]}))
        self._deferred = state_dict["emulator"]
        self.telemetry.load_state_dict(state_dict["telemetry"])
        self._sampled = int(state_dict["sampled"])
        self._scale_optimizer.load_state_dict(state_dict.get("scale_optimizer", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: with the ranges as a deferred state, without the module."""
        state = {**super().__getstate__(), "_deferred": self.state_dict()["emulator"]}
        return {**state, "_emulator": None, "_scaler": None, "_batch": ExitStack()}

    # --- the module -----------------------------------------------------------------------------

    @property
    @override
    def has_deferred_state(self) -> bool:
        return self._deferred is not None

    @override
    def _meet(self, pl_module: pl.LightningModule) -> bool:
        had_module = self._module_ref is not None
        is_other = super()._meet(pl_module)
        if had_module and is_other:
            self._emulator, self._warned_of_clipping = None, False
        return is_other

    @override
    def forget(self) -> None:
        self._deferred = None
        self._counter.reset()
        self._sampled, self._observed_steps = -1, None
        self.telemetry = Telemetry()
        self._scale_optimizer = KeyedAdam(self.scale_lr)

    def _settings(self) -> dict[str, Any]:
        """Return the settings that the observed ranges depend on, as plain values."""
        # Without operators, which the emulator compares: only those of the network's sites matter.
        spec = {key: value for key, value in asdict(self.spec).items() if key != "operators"}
        return {
            "spec": spec,
            "targets": list(self.targets),
            "observer": self.observer,
            "range_margin": self.range_margin,
        }

    def _attach(self, pl_module: pl.LightningModule) -> Emulator:
        """Attach an emulator when a run starts, after ``setup`` and ``configure_model``."""
        self._meet(pl_module)
        if self._emulator is None or attached(pl_module) is not self._emulator:
            is_stripped = self._emulator is not None and attached(pl_module) is None
            if is_stripped and self._deferred is None:
                self._deferred = self.emulator.state_dict()
            self._emulator = attach(
                pl_module, self.spec, targets=self.targets, observer=self.observer
            )
            modules = outermost(self._emulator.paths_in_scope)
            scope = "the whole module" if modules == [ROOT] else listed(modules)
            rank_zero_info(f"NNAEmulation: {scope} is emulated on {self.spec.name}")
        if self._deferred is not None:
            with torch.inference_mode(False):  # Tensors that a test loads may be trained later.
                self._emulator.load_state_dict(self._deferred)
            self._deferred = None
        return self._emulator

    def _is_due(self) -> bool:
        """Tell whether the telemetry samples this step: once, also with accumulated batches."""
        every = self.telemetry_every_n_steps
        return every > 0 and self.steps % every == 0 and self.steps != self._sampled

    def _require_ranges(self, stage: str) -> None:
        emulator = self.emulator
        if not emulator.calibrated and emulator.ranges.ranges:
            # The fit was shorter than its calibration: evaluation uses the ranges so far.
            emulator.freeze(self.range_margin)
            rank_zero_info(f"NNAEmulation: ranges frozen for {stage} after {self.steps} steps")
        if not emulator.calibrated:
            raise RuntimeError(
                f"emulated {stage} needs ranges, and none were observed: pass ckpt_path of a "
                f"run with NNAEmulation (Lightning 2.4 loads no states of callbacks then: call "
                f"lightning_nna.load_deployed(module, checkpoint)), or call "
                f"lightning_nna.calibrate(module, batches) first"
            )

    def _enter_exact(self) -> None:
        self._enter("emulate" if self.emulator.calibrated else "float", "exact", "none")

    def _enter(
        self,
        phase: Phase,
        fidelity: Fidelity,
        learned_scales: Learned,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._leave()
        self._batch.enter_context(
            self.emulator.running(
                phase, fidelity=fidelity, learned_scales=learned_scales, telemetry=telemetry
            )
        )

    def _leave(self) -> None:
        self._batch.close()

    def _stepped(self, advanced: bool) -> None:
        """Count an optimizer step and update the learned scales.

        With several optimizers, scales are updated after each; they have a gradient once a batch.
        """
        if advanced:
            self._fit_steps += 1
            self._emulated_steps += int(self.emulator.calibrated)
        if self.learned_scales != "none" and self.emulator.calibrated:
            divisor = 1.0 if self._scaler is None else self._scaler.get_scale()
            share_keys(self.emulator.scales)
            self._scale_optimizer.update(self.emulator.scales.tensors(), divisor=divisor)

    def _release(self) -> None:
        """Remove the hooks of the optimizers, and leave the mode of the batch."""
        self._counter.detach()
        self._leave()

    def _report_steps(self) -> None:
        """Log how many steps of a fit ran emulated; warn if none did."""
        summary = f"{self._emulated_steps} of {self._fit_steps} optimizer steps of this fit"
        if self._emulated_steps or not self._fit_steps:
            rank_zero_info(f"NNAEmulation: {summary} ran emulated")
            return
        rank_zero_warn(
            f"NNAEmulation: {summary} ran emulated, the network was trained in float: the first "
            f"calibration_steps={self.calibration_steps} steps only observe ranges. Train longer, "
            f"set fewer calibration_steps, or call lightning_nna.calibrate(module, batches) before "
            f"the fit and set calibration_steps=0"
        )

    def _warn_of_clipping(self) -> None:
        """Warn, once, of the sites that clip many of their results."""
        ranges = self.emulator.ranges
        rates = {
            site: row.clip_rate
            for site, row in self.telemetry.sites.items()
            if row.clip_rate > _HIGH_CLIP_RATE
            and row.results >= _MIN_RESULTS
            and f"{site}/output" in ranges
        }
        if not rates or self._warned_of_clipping:
            return
        self._warned_of_clipping = True
        worst = sorted(rates, key=lambda site: -rates[site])[:5]
        again = "call lightning_nna.strip(module) before the fit, " * self._ranges_are_earlier
        rank_zero_warn(
            f"NNAEmulation: {len(rates)} of {len(self.telemetry.sites)} sites clip more than "
            f"{_HIGH_CLIP_RATE:.0%} of their results after {self.steps} steps; the worst: "
            f"{', '.join(f'{site} ({rates[site]:.0%})' for site in worst)}. Their ranges were "
            f"frozen too early: {again}set more calibration_steps or a range_margin, start from "
            f"trained weights, or lower the learning rate"
        )


def _summary(telemetry: Telemetry) -> dict[str, float]:
    """Compute the mean and the worst of all sites; infinite SQNRs are left out of the mean."""
    rows = list(telemetry.sites.values())
    decibels = [row.sqnr_db for row in rows if math.isfinite(row.sqnr_db)] or [math.inf]
    return {
        "nna/emulation/clip_rate": fmean(row.clip_rate for row in rows),
        "nna/emulation/clip_rate_max": max(row.clip_rate for row in rows),
        "nna/emulation/overflow_rate_max": max(row.overflow_rate for row in rows),
        "nna/emulation/sqnr_db": fmean(decibels),
        "nna/emulation/sqnr_db_min": min(decibels),
    }
