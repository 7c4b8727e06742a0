"""What every callback that works on weights shares: ``WeightMethod``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_nna.callbacks.step_counter import StepCounter
from lightning_nna.compression.selection import BitWidths, ByTensor, candidates_of, frozen_in
from lightning_nna.emulator.weight_pipeline import Stage, WeightPipeline, pipeline_of, unseen
from lightning_nna.functional.entropy_constrained import require_rate


class WeightMethod(Callback):
    """Chooses parameters, puts stages on them, and keeps the latent weights safe.

    In training the parameters hold what the stages make of them from a batch's first forward to
    the optimiser's step; in validation, test and prediction they hold what would be deployed.
    When ``fit`` ends they are left as deployed, for good; should training go on, from the same
    objects or from a checkpoint, it goes on from the latent weights.

    Args:
        selection: Which parameters, and a number for each.
    """

    #: Of the method, in log keys and messages.
    method: ClassVar[str]
    #: In the weight pipeline: masks 0, centroids 1. What methods do after a step goes by it, too.
    place: ClassVar[int] = 1

    def __init__(self, selection: ByTensor[Any]) -> None:
        self.selection = selection
        #: The number of each selected parameter, by its name, once a run has started.
        self.numbers: dict[str, Any] = {}
        self._counter = StepCounter(self._stepped)
        self._module: pl.LightningModule | None = None
        self._pipeline: WeightPipeline | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []
        self._optimizers: list[Optimizer] = []
        self._total_steps = float("inf")
        # What was trained, while the parameters hold what is deployed after a fit.
        self._latents: dict[str, Tensor] = {}
        # Names that were frozen when the run began, also where a resumed one has thawed them
        # already; and those of them that were left alone therefore.
        self._frozen: list[str] = []
        self._saved_frozen: list[str] | None = None
        self._left_frozen: list[str] = []

    @property
    def steps(self) -> int:
        """Optimiser steps so far."""
        return self._counter.steps

    @property
    def selected(self) -> list[str]:
        """Names of the parameters that the method has taken, once a run has started."""
        return list(self.numbers)

    # --- what a method says -------------------------------------------------------------------

    def stages(self) -> dict[str, Stage]:
        """The stage of every selected parameter, by name; none for a mere regulariser."""
        return {}

    def prepare(self) -> None:
        """Find the state of the method, unless it was loaded; the latent weights are in place."""

    def step_begins(self, optimizer: Optimizer) -> None:
        """The optimiser is about to step: latent weights and their gradients are in place."""

    def stepped(self) -> None:
        """The count of steps has advanced."""

    def figures(self) -> dict[str, float]:
        """What to log, by the quantity's name."""
        return {}

    # --- life cycle ---------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS) and self.stages():
                raise ValueError(
                    f"{type(self).__name__} needs an optimiser that takes one gradient a step; "
                    f"LBFGS takes several"
                )
        self._optimizers = list(trainer.optimizers)
        self._total_steps = trainer.estimated_stepping_batches
        self._attach(pl_module)
        self._resume()
        self.pipeline.attend(self.place, self.stepped)
        self._counter.attach(trainer.optimizers)
        # With several optimisers, a forward follows a step within one batch.
        for child in pl_module.children():
            self._handles.append(child.register_forward_pre_hook(ModuleHook(self._substitute)))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        self._deploy()
        held = candidates_of(pl_module)
        thawed = [name for name in self._left_frozen if held[name].requires_grad]
        if thawed:
            rank_zero_warn(
                f"{type(self).__name__}: {', '.join(thawed)} was frozen when the run began and has "
                f"been left alone, but was trained later: name it in targets"
            )

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._release()

    # --- batches ------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._training = True
        self._substitute()

    @override
    @unseen
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        pipeline = self.pipeline
        pipeline.restore()
        pipeline.pull_back(p for group in optimizer.param_groups for p in group["params"])
        self.step_begins(optimizer)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._training = False
        self.pipeline.restore()
        every = getattr(trainer, "log_every_n_steps", 0)
        if every and (trainer.global_step + 1) % every == 0:
            self._log(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(pl_module)

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.pipeline.substitute("hard")

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.pipeline.restore()

    @override
    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.pipeline.substitute("hard")

    @override
    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.pipeline.restore()

    @override
    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.pipeline.substitute("hard")

    @override
    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.pipeline.restore()

    # --- state --------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "latents": dict(self._latents),
            "frozen": list(self._frozen),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counter.steps = int(state_dict["steps"])
        self._latents = dict(state_dict["latents"])
        if self._module is None:
            self._saved_frozen = state_dict.get("frozen")

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # In the middle of accumulation the parameters hold transformed weights.
        if self._pipeline is None or self._pipeline.phase == "latent":
            return
        for name in self._parameters:
            if name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = self._pipeline.latent(name).clone()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has the state, not the module."""
        state = {**self.__dict__, "_handles": [], "_parameters": {}, "_optimizers": []}
        return {**state, "_module": None, "_pipeline": None}

    # --- own ----------------------------------------------------------------------------------

    _training = False

    @property
    def pipeline(self) -> WeightPipeline:
        """The weight pipeline of the module.

        Raises:
            RuntimeError: Before a Trainer has started a run with this callback.
        """
        if self._pipeline is None:
            raise RuntimeError(
                f"{type(self).__name__} has no module yet: a Trainer attaches it as it starts"
            )
        return self._pipeline

    def _attach(self, pl_module: pl.LightningModule) -> None:
        """Select and claim when a run starts: ``configure_model`` may still add layers."""
        if self._module is pl_module:
            return
        self._detach()
        frozen = frozen_in(pl_module) if self._saved_frozen is None else self._saved_frozen
        self._frozen, self._saved_frozen = frozen, None
        self.numbers = self.selection.of(pl_module, frozen)
        held = candidates_of(pl_module)
        self._parameters = {name: held[name] for name in self.numbers}
        self._module, self._pipeline = pl_module, pipeline_of(pl_module)
        with torch.inference_mode(False):  # What is made for a test may be trained later.
            self.prepare()
        for name, stage in self.stages().items():
            self._pipeline.claim(name, self._parameters[name], stage)
        shown = ", ".join(f"{name} ({number})" for name, number in self.numbers.items())
        rank_zero_info(
            f"{type(self).__name__}: {self.selection.quantity} of {len(self.numbers)} tensors: "
            f"{shown}"
        )
        self._left_frozen = []
        for reason, names in self.selection.left_alone(pl_module, frozen).items():
            self._left_frozen += names if reason == "frozen" else []
            rank_zero_info(
                f"{type(self).__name__}: left alone, since {reason}: {', '.join(names)}; "
                f"name in targets what is to be taken"
            )

    def _detach(self) -> None:
        if self._pipeline is not None:
            for stage in self.stages().values():
                self._pipeline.release(stage)

    def _substitute(self) -> None:
        if self._training and self.pipeline.phase == "latent":
            self.pipeline.substitute("train")

    @unseen
    def _stepped(self, advanced: bool) -> None:
        if advanced:
            self.pipeline.has_stepped(self.stepped)

    def _log(self, pl_module: pl.LightningModule) -> None:
        for quantity, figure in unseen(self.figures)().items():
            pl_module.log(f"nna/{self.method}/{quantity}", figure)

    @torch.no_grad()
    def _deploy(self) -> None:
        """Leave the parameters as deployed, and keep what was trained."""
        for name, parameter in self._parameters.items():
            stages = self.pipeline.stages_of(parameter)
            if stages and stages[-1] in self.stages().values():
                self._latents[name] = parameter.detach().clone()
                parameter.copy_(self.pipeline.hard(parameter))

    @torch.no_grad()
    def _resume(self) -> None:
        """Go on from the latent weights, where nobody has changed what was deployed of them."""
        for name, latent in self._latents.items():
            parameter = self._parameters[name]
            now = parameter.detach().clone()
            parameter.copy_(latent)
            if not torch.equal(self.pipeline.hard(parameter), now):
                parameter.copy_(now)
                rank_zero_info(f"{type(self).__name__}: {name} has changed since the last fit")
        self._latents = {}

    def _release(self) -> None:
        """Take every hook off, and put latent weights that an exception left aside back."""
        self._training = False
        self._counter.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._pipeline is not None:
            self._pipeline.leave(self.stepped)
            self._pipeline.restore()


class BitsMethod(WeightMethod):
    """A weight method with a width for each tensor.

    Args:
        bits: Of every selected tensor, 1 to 8.
        targets: Globs or ``re:…`` on the names of parameters, or of modules that hold them.
        overrides: Bits by pattern, or the path of a JSON file with them.
        rate_bits: Greatest entropy of the indices of a tensor of ``bits`` bits, in bits a weight;
            None for any. Tensors that ``overrides`` gives other bits have none.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        bits: int,
        *,
        targets: Sequence[str],
        overrides: Mapping[str, int] | str | Path,
        rate_bits: float | None = None,
    ) -> None:
        super().__init__(BitWidths(bits, targets, overrides))
        if rate_bits is not None:
            require_rate(rate_bits, bits)
        self.rate_bits = rate_bits

    @property
    def bits(self) -> dict[str, int]:
        """Bits by the names of the selected parameters, once a run has started."""
        return self.numbers

    def rate_of(self, name: str) -> float | None:
        """Greatest entropy of the indices of a selected parameter; None for any."""
        return self.rate_bits if self.bits[name] == self.selection.default else None


class ModuleHook:
    """A hook on a module; copies and pickles of the module carry one that does nothing.

    Args:
        act: Called without arguments; None for nothing.
    """

    def __init__(self, act: Callable[[], None] | None) -> None:
        self.act = act

    def __call__(self, *_: Any) -> None:
        """As the module calls it."""
        if self.act is not None:
            self.act()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        return ModuleHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleHook, (None,)
