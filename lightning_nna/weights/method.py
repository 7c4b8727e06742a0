"""What every callback that works on weights shares: ``WeightMethod``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_nna.non_finite import require_finite_weights
from lightning_nna.quantization.entropy_constrained import require_rate
from lightning_nna.resumed_settings import require_same
from lightning_nna.step_counter import StepCounter
from lightning_nna.weights.pipeline import (
    Stage,
    WeightPipeline,
    digest_of,
    pipeline_of,
    unseen,
)
from lightning_nna.weights.selection import BitWidths, ByTensor, candidates_of, frozen_in


class WeightMethod(Callback):
    """Chooses parameters, puts stages on them, and keeps the latent weights safe.

    In training the parameters hold what the stages make of them from a batch's first forward to
    the optimizer's step; in validation, test and prediction they hold what would be deployed.
    When ``fit`` ends they are left as deployed, for good; should training go on, from the same
    objects or from a checkpoint, it goes on from the latent weights. The ``state_dict`` of a
    checkpoint holds the deployed weights as well, and the callback's state the latent ones.

    A callback that meets a second module begins anew there. A copy or pickle of a callback carries
    on with a module whose selected weights are, in every bit, those that the callback's module had
    when it was copied; with any other it begins anew, and says so. Several callbacks of one class
    share a Trainer if they have other ``targets`` or ``exclude``.

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
        #: In log keys, where a Trainer has several callbacks of the class.
        self._label = ""
        self._module: pl.LightningModule | None = None
        self._pipeline: WeightPipeline | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []
        self._optimizers: list[Optimizer] = []
        # What was trained, while the parameters hold what is deployed after a fit.
        self._latents: dict[str, Tensor] = {}
        # Names that were frozen when the run began, also where a resumed one has thawed them
        # already; and those of them that were left alone therefore.
        self._frozen: list[str] = []
        self._saved_frozen: list[str] | None = None
        self._left_frozen: list[str] = []
        # Of a state that was loaded: its settings, and whether a module has taken it.
        self._saved_settings: dict[str, Any] = {}
        self._is_loaded = False
        # The parameters are those of the checkpoint that the latent weights are of.
        self._is_resumed = False
        # Of a copy that has met no module yet: digests of the weights that its state goes with.
        self._copied_with: dict[str, str] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps since the callback took part in the run."""
        return self._counter.steps

    @property
    def state_key(self) -> str:
        """Name of the callback's state in a checkpoint: with its targets, unless they are all."""
        patterns = {"targets": self.selection.targets, "exclude": self.selection.exclude}
        given = {
            key: list(value)
            for key, value in patterns.items()
            if list(value) != (["*"] if key == "targets" else [])
        }
        return self._generate_state_key(**given) if given else type(self).__qualname__

    @property
    def _total_steps(self) -> float:
        """Optimizer steps of the run, as :attr:`steps` counts them."""
        return self._counter.total

    @property
    def selected(self) -> list[str]:
        """Names of the parameters that the method has taken, once a run has started."""
        return list(self.numbers)

    # --- what a method says -------------------------------------------------------------------

    def stages(self) -> dict[str, Stage]:
        """The stage of every selected parameter, by name; none for a mere regularizer."""
        return {}

    def prepare(self) -> None:
        """Find the state of the method, unless it was loaded; the latent weights are in place."""

    def step_begins(self, optimizer: Optimizer) -> None:
        """The optimizer is about to step: latent weights and their gradients are in place."""

    def stepped(self) -> None:
        """The count of steps has advanced."""

    def learn(self) -> None:
        """Update what is learned besides the weights, after the step of any optimizer."""

    def settings(self) -> dict[str, Any]:
        """Return settings that a run cannot change once it has begun; see :func:`require_same`.

        It is what :func:`.load_deployed` needs, too.
        """
        return {}

    def missed(self) -> list[str]:
        """Targets that were not reached, with both numbers, when ``fit`` ends."""
        return []

    def forget(self) -> None:
        """Forget what is known of a module and its run: another module comes."""
        self._counter.reset()
        self._latents, self._saved_settings, self._saved_frozen = {}, {}, None

    def rejoin(self) -> None:
        """A run begins on the module of the run before, or with a state that was loaded."""

    def located(self) -> None:
        """The length of the run is known, and where in it the callback is."""

    def figures(self) -> dict[str, float]:
        """What to log, by the quantity's name."""
        return {}

    # --- life cycle ---------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._optimizers = list(trainer.optimizers)
        self._attach(pl_module, fit=trainer)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS) and self.stages():
                raise ValueError(
                    f"{type(self).__name__} needs an optimizer that takes one gradient a step; "
                    f"LBFGS takes several"
                )
        self._resume()
        self.pipeline.attend(self.place, self._after_step)
        # With several optimizers, a forward follows a step within one batch.
        for child in pl_module.children():
            self._handles.append(child.register_forward_pre_hook(ModuleHook(self._substitute)))
        same = [one for one in trainer.callbacks if type(one) is type(self)]  # type: ignore[attr-defined]
        patterns = [*self.selection.targets, *(f"!{one}" for one in self.selection.exclude)]
        self._label = "+".join(patterns) + "/" if len(same) > 1 else ""
        if self.stages():
            _warn_of_weights_only(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Now that every callback has taken its own again.
        self.pipeline.forget_ended()
        if self._counter.locate(trainer):
            rank_zero_info(
                f"{type(self).__name__} joins the run at step {trainer.global_step}: its schedule "
                f"is that of the {self._total_steps:.0f} steps that are left"
            )
        self.located()
        self._saved_settings = {}

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
        self._end()
        held = candidates_of(pl_module)
        thawed = [name for name in self._left_frozen if held[name].requires_grad]
        if thawed:
            rank_zero_warn(
                f"{type(self).__name__}: {', '.join(thawed)} was frozen when the run began and has "
                f"been left alone, but was trained later: name it in targets"
            )
        missed = self.missed()
        if missed and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{type(self).__name__} ended at optimizer step {self.steps} and missed its "
                f"target: {'; '.join(missed)}"
            )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._end()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._release()
        self._end()

    # --- batches ------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._training = True
        self._counter.batch_begins()
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
        self._counter.measure(trainer)
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
            "method": self.method,
            "steps": self.steps,
            "clock": self._counter.state_dict(),
            "latents": dict(self._latents),
            "frozen": list(self._frozen),
            "settings": self.settings() if self.numbers else self._saved_settings,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counter.load_state_dict(state_dict.get("clock", {"steps": state_dict["steps"]}))
        self._latents = dict(state_dict["latents"])
        self._saved_frozen = state_dict.get("frozen")
        self._saved_settings = dict(state_dict.get("settings", {}))
        self._is_loaded, self._copied_with = True, None

    def require_settings(self, trainer: pl.Trainer | None) -> None:
        """Raise if the callback's settings are not those of the state that it has loaded.

        Args:
            trainer: Of the ``fit`` that is about to begin, which may honor what evaluation cannot;
                else None.

        Raises:
            ValueError: Names the settings, and both values of each.
        """
        require_same(type(self).__name__, self._saved_settings, self.settings())

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._is_resumed = True
        saved = checkpoint["callbacks"]
        taken = {one.state_key for one in trainer.callbacks}  # type: ignore[attr-defined]
        name = type(self).__qualname__
        if self.state_key not in saved and "settings" not in saved.get(name, {"settings": {}}):
            saved[self.state_key] = saved[name]  # Of a version that left targets out of the key.
        others = [key for key in saved if key == name or str(key).startswith(f"{name}{{")]
        if self.state_key not in saved and (others := [key for key in others if key not in taken]):
            raise ValueError(
                f"the checkpoint has the state of {' and '.join(map(str, others))}, and the "
                f"Trainer has {self.state_key}: resume with the targets of the checkpoint, or "
                f"begin a new run from its weights (lightning_nna.load_deployed)"
            )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._pipeline is None:
            return
        # Beside an average of the weights that is in their place; it stays as it is, since training
        # goes on from it.
        weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
        latents = checkpoint["callbacks"][self.state_key]["latents"]
        latents.clear()  # Those of a weight that was changed after the fit are of no use.
        aliases = _names_of(pl_module)
        for name in self._owned():
            latent = self._latents.get(name, self._pipeline.latent(name)).clone()
            latents[name] = latent
            deployed = self._pipeline.hard_of(name, latent)
            for alias in aliases[id(self._parameters[name])]:
                if alias in weights:
                    weights[alias] = deployed

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has the state, not the module; and knows the module's copy by sight."""
        state = {**self.__dict__, "_handles": [], "_parameters": {}, "_optimizers": []}
        if self._module is not None and not self._is_loaded:
            state["_copied_with"] = _digests(self._module, self.numbers)
        return {**state, "_module": None, "_pipeline": None, "_training": False}

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

    def _attach(self, pl_module: pl.LightningModule, *, fit: pl.Trainer | None = None) -> None:
        """Select and claim when a run starts: ``configure_model`` may still add layers."""
        is_new = self._module is not pl_module
        if is_new:
            self._end()
            if self._copied_with is not None:
                self._carry_on(pl_module)
            elif self._module is not None and not self._is_loaded:
                self.forget()
            frozen = frozen_in(pl_module) if self._saved_frozen is None else self._saved_frozen
            self._frozen = frozen
            self.numbers = self.selection.of(pl_module, frozen)
            self._module, self._pipeline = pl_module, pipeline_of(pl_module)
        self._saved_frozen = None
        # Also on the same module: loading a state may have replaced its parameters.
        held = candidates_of(pl_module)
        self._parameters = {name: held[name] for name in self.numbers}
        self.require_settings(fit)
        if fit is not None:
            self._counter.start(fit)
        with torch.inference_mode(False):  # What is made or loaded for a test may be trained later.
            if is_new:
                self.prepare()
            else:
                self.rejoin()
        self._is_loaded = False
        if fit is None:
            # Weights that are changed before the next fit are no longer the checkpoint's.
            self._saved_settings, self._is_resumed = {}, False
        for name, stage in self.stages().items():
            self.pipeline.claim(name, self._parameters[name], stage)
        if is_new:
            self._say(pl_module)

    def _carry_on(self, pl_module: pl.LightningModule) -> None:
        """A copy meets its first module: take the state along if it goes with the weights."""
        selected = self.selection.of(pl_module, self._frozen)
        if _digests(pl_module, selected) == self._copied_with:
            with torch.inference_mode(False):  # What a test takes along may be trained on.
                self.load_state_dict(self.state_dict())
            return
        self._copied_with = None
        self.forget()
        rank_zero_info(
            f"{type(self).__name__} is a copy and begins anew: the weights of this module are not "
            f"those that it was copied with; pass ckpt_path of the run to go on from there"
        )

    def _say(self, pl_module: pl.LightningModule) -> None:
        """Tell which tensors are selected, and which are left alone and why."""
        name = type(self).__name__
        shown = ", ".join(f"{tensor} ({number})" for tensor, number in self.numbers.items())
        rank_zero_info(f"{name}: {self.selection.quantity} of {len(self.numbers)} tensors: {shown}")
        self._left_frozen = []
        for reason, names in self.selection.left_alone(pl_module, self._frozen).items():
            self._left_frozen += names if reason == "frozen" else []
            rank_zero_info(
                f"{name}: left alone, since {reason}: {', '.join(names)}; name in targets what is "
                f"to be taken"
            )

    def _end(self) -> None:
        """The run is over: stages make room for those of other methods."""
        if self._pipeline is not None:
            for stage in self.stages().values():
                self._pipeline.end(stage)

    def _owned(self) -> list[str]:
        """Parameters whose last stage is the method's: of several, one sees to what is deployed."""
        mine = {id(stage) for stage in self.stages().values()}
        found = []
        for name, parameter in self._parameters.items():
            stages = self.pipeline.stages_of(parameter)
            if stages and id(stages[-1]) in mine:
                found.append(name)
        return found

    def _substitute(self) -> None:
        if self._training and self.pipeline.phase == "latent":
            self.pipeline.substitute("train")

    @unseen
    def _stepped(self, advanced: bool) -> None:
        self.pipeline.has_stepped(self._after_step, advanced)

    def _after_step(self, advanced: bool) -> None:
        self.learn()
        if advanced:
            self.stepped()

    def _log(self, pl_module: pl.LightningModule) -> None:
        require_finite_weights(self._parameters)  # Figures look weights up in tables.
        for quantity, figure in unseen(self.figures)().items():
            pl_module.log(f"nna/{self.method}/{self._label}{quantity}", figure)

    @torch.no_grad()
    def _deploy(self) -> None:
        """Leave the parameters as deployed, and keep what was trained."""
        for name in self._owned():
            parameter = self._parameters[name]
            self._latents[name] = parameter.detach().clone()
            parameter.copy_(self.pipeline.hard(parameter))

    @torch.no_grad()
    def _resume(self) -> None:
        """Go on from the latent weights, where nobody has changed what was deployed of them."""
        for name, latent in self._latents.items():
            if (parameter := self._parameters.get(name)) is None:
                continue  # Of a tensor that is not selected any more: its settings are refused.
            latent = latent.to(parameter.device)  # That of a copy may lie where it was trained.
            # A checkpoint has both, and another processor may deploy another last bit.
            if self._is_resumed or torch.equal(self.pipeline.hard_of(name, latent), parameter):
                parameter.copy_(latent)
            else:
                rank_zero_info(f"{type(self).__name__}: {name} has changed since the last fit")
        self._latents, self._is_resumed = {}, False

    def _release(self) -> None:
        """Take every hook off, and put latent weights that an exception left aside back."""
        self._training = False
        self._counter.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._pipeline is not None:
            self._pipeline.leave(self._after_step)
            self._pipeline.restore()


def require_levels(name: str, levels: int, bits: int) -> None:
    """Raise if a codebook of a checkpoint is of other bits than a tensor is to have.

    Raises:
        ValueError: Names the tensor, and both numbers.
    """
    if levels != 2**bits:
        raise ValueError(
            f"{name} has {levels} values in the checkpoint, and {bits} bits are 2**{bits}: resume "
            f"with its bits, or begin a new run from its weights (lightning_nna.load_deployed)"
        )


def _names_of(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id: a tied weight has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _digests(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Compute digests that tell the weights of a module from any others, by their names."""
    held = candidates_of(module)
    return {name: digest_of(held[name]) for name in held.keys() & set(names)}


def _warn_of_weights_only(trainer: pl.Trainer) -> None:
    """Lightning asks no callback for what it writes there."""
    # ``pytorch_lightning`` has a class of its own, and users have others.
    if any(getattr(one, "save_weights_only", False) for one in trainer.checkpoint_callbacks):
        rank_zero_warn(
            "ModelCheckpoint(save_weights_only=True) writes the latent weights alone, without what "
            "the weight methods make of them: set save_weights_only=False, or save the module's "
            "state_dict when fit has ended"
        )


class BitsMethod(WeightMethod):
    """A weight method with a width for each tensor.

    Args:
        bits: Of every selected tensor, 1 to 8.
        targets: Globs or ``re:…`` on the names of parameters, or of modules that hold them.
        overrides: Bits by pattern, or the path of a JSON file with them.
        max_entropy_bits: Greatest entropy of the indices of a tensor of ``bits`` bits, in bits a
            weight; None for any. Tensors that ``overrides`` gives other bits have none.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        bits: int,
        *,
        targets: Sequence[str],
        overrides: Mapping[str, int] | str | Path,
        max_entropy_bits: float | None = None,
    ) -> None:
        super().__init__(BitWidths(bits, targets, overrides))
        if max_entropy_bits is not None:
            require_rate(max_entropy_bits, bits)
        self.max_entropy_bits = max_entropy_bits

    @override
    def settings(self) -> dict[str, Any]:
        return {"bits": dict(self.numbers), "max_entropy_bits": self.max_entropy_bits}

    @property
    def bits(self) -> dict[str, int]:
        """Bits by the names of the selected parameters, once a run has started."""
        return self.numbers

    def rate_of(self, name: str) -> float | None:
        """Greatest entropy of the indices of a selected parameter; None for any."""
        return self.max_entropy_bits if self.bits[name] == self.selection.default else None


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
