"""``NNAEmulation``: train any LightningModule in the arithmetic of the chip.

Accelerator-aware training runs every operator of the network as the accelerator does, so that the
loss sees the chip's error and nothing has to be sent to the CPU.

Reference:
    Shakiah et al., "Accelerator-aware training for transducer-based speech recognition", SLT 2022,
    arXiv 2305.07778.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nna.emulator.attachment import attach
from lightning_nna.emulator.engine import Emulator, Fidelity
from lightning_nna.emulator.spec import NNASpec, resolve_spec


class NNAEmulation(Callback):
    """Put the chip under a LightningModule for the time of a Trainer's run.

    In ``fit`` the first ``calibration_steps`` optimiser steps run in float while the ranges of
    activations are observed; then the ranges freeze, for good, and every operator in scope
    computes what the chip computes. Validation, test and prediction are always exact. The module
    keeps its parameters, its ``state_dict`` and its forward.

    Args:
        spec: The chip: a preset's name, an ``NNASpec``, its keys, or a YAML file.
        targets: Globs or ``re:…`` on module names; a selected module counts with all it contains.
            Losses and torchmetrics are never emulated.
        calibration_steps: Optimiser steps that are observed; 0 if ``calibrate`` was called before.
        fidelity: In training: ``"exact"``, or ``"fast"`` for float rounding in requantisation.

    Raises:
        ValueError: If an argument is out of range, a target selects nothing, or the module cannot
            be emulated (compiled, or parameters that are not float32).
        RuntimeError: If validation, test or prediction starts and no range was ever observed.

    Example:
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> chip = NNAEmulation("litert-int8", calibration_steps=2)
        >>> trainer = pl.Trainer(max_steps=4, callbacks=[chip], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(SmallRecurrentModule())
        >>> chip.emulator.calibrated
        True

    Differs from the paper: the paper's accelerator is proprietary; the arithmetic here is that of
    the chosen ``spec``.
    """

    def __init__(
        self,
        spec: str | NNASpec | Mapping[str, Any] = "litert-int8",
        *,
        targets: Sequence[str] = ("*",),
        calibration_steps: int = 32,
        fidelity: Fidelity = "exact",
    ) -> None:
        if calibration_steps < 0:
            raise ValueError(f"calibration_steps must be at least 0, got {calibration_steps}")
        if fidelity not in ("exact", "fast"):
            raise ValueError(f"fidelity must be 'exact' or 'fast', got {fidelity!r}")
        self.spec = resolve_spec(spec)
        self.targets = [targets] if isinstance(targets, str) else list(targets)
        self.calibration_steps = calibration_steps
        self.fidelity: Fidelity = fidelity
        self.steps = 0
        self._emulator: Emulator | None = None
        self._saved: dict[str, Any] | None = None
        self._counts: dict[int, int] = {}
        self._handles: list[Any] = []

    @property
    def emulator(self) -> Emulator:
        """The emulator of the module, from the start of a run on.

        Raises:
            RuntimeError: Before a Trainer has started a run with this callback.
        """
        if self._emulator is None:
            raise RuntimeError("NNAEmulation has no module yet: a Trainer attaches it as it starts")
        return self._emulator

    # --- life cycle -----------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        emulator = self._attach(pl_module)
        if self.calibration_steps == 0 and not emulator.calibrated:
            raise RuntimeError(
                "calibration_steps=0, and no ranges were observed before: call "
                "lightning_nna.calibrate(module, batches), or set calibration_steps"
            )
        # Attached here and not earlier: optimisers exist only now, some are built in __init__.
        self._counts = {}
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._count))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(pl_module)
        # In fit, validation before the ranges freeze is the float model's.
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
            emulator.freeze()
            rank_zero_info(
                f"NNAEmulation: ranges of {len(emulator.ranges.ranges)} activations frozen "
                f"after {self.steps} optimiser steps; on {self.spec.name} from here on"
            )
        emulator.phase = "emulate" if emulator.calibrated else "observe"
        emulator.fidelity = self.fidelity
        emulator.enter_scope()

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
        if not self.emulator.calibrated:
            # Every rank then saves the same ranges.
            self.emulator.reduce_ranges()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("nna/emulation/calibrated", float(self.emulator.calibrated))
        pl_module.log("nna/emulation/ranges", float(len(self.emulator.ranges.ranges)))

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
        emulator = self._saved if self._emulator is None else self._emulator.state_dict()
        return {"emulator": emulator, "steps": self.steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self._saved = int(state_dict["steps"]), state_dict["emulator"]
        if self._emulator is not None and self._saved is not None:
            self._emulator.load_state_dict(self._saved)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has the ranges, not the module."""
        state = dict(self.__dict__)
        state.update(_emulator=None, _saved=self.state_dict()["emulator"], _handles=[], _counts={})
        return state

    # --- own ------------------------------------------------------------------------------------

    def _attach(self, pl_module: pl.LightningModule) -> Emulator:
        """Attach when the run starts: ``setup`` and ``configure_model`` may still add layers."""
        if self._emulator is None:
            if getattr(pl_module, "_compiler_ctx", None) is not None:
                raise ValueError(
                    "the LightningModule was given to torch.compile, which hides its operators: "
                    "pass the module itself to the Trainer, or leave NNAEmulation out"
                )
            self._emulator = attach(pl_module, self.spec, targets=self.targets)
            if self._saved is not None:
                self._emulator.load_state_dict(self._saved)
            modules = ", ".join(sorted(self._emulator.interception.allowed))
            rank_zero_info(f"NNAEmulation: {self.spec.name} under {modules}")
        return self._emulator

    def _require_ranges(self, stage: str) -> None:
        emulator = self.emulator
        if not emulator.calibrated and emulator.ranges.ranges:
            # A fit that was shorter than its calibration: evaluation needs what it has seen.
            emulator.freeze()
            rank_zero_info(f"NNAEmulation: ranges frozen for {stage} after {self.steps} steps")
        if not emulator.calibrated:
            raise RuntimeError(
                f"{stage} on the chip needs ranges, and none were observed: pass ckpt_path of a "
                f"run with NNAEmulation, or call lightning_nna.calibrate(module, batches) first"
            )

    def _enter_exact(self) -> None:
        emulator = self.emulator
        emulator.phase = "emulate" if emulator.calibrated else "float"
        emulator.fidelity = "exact"
        emulator.enter_scope()

    def _leave(self) -> None:
        self.emulator.leave_scope()
        self.emulator.phase = "float"

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        """Steps of the optimiser that steps most: with several, a batch is one step."""
        before = max(self._counts.values(), default=0)
        self._counts[id(optimizer)] = self._counts.get(id(optimizer), 0) + 1
        self.steps += max(self._counts.values()) - before

    def _release(self) -> None:
        """Take hooks off the optimisers, and leave the scope that an exception left open."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._emulator is not None:
            self._emulator.abandon_scope()
