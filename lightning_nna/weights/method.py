"""``WeightMethod``: the base of callbacks that transform weights, for plugins as well.

A method of one's own is one class in one file: it selects parameters, gives each a
:class:`.WeightTransform`, and overrides the hooks it needs. The base does the rest: latent weights,
evaluation, deployment, checkpoints, copies, several optimizers, logs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_nna.lifecycle import ModuleBoundCallback
from lightning_nna.name_lists import listed
from lightning_nna.non_finite import require_finite_weights
from lightning_nna.resumed_settings import require_same
from lightning_nna.step_counter import StepCounter
from lightning_nna.weights.pipeline import (
    WeightPipeline,
    WeightTransform,
    digest_of,
    pipeline_of,
    unseen,
)
from lightning_nna.weights.selection import BitWidths, ByTensor, candidates_of, frozen_in


class WeightMethod(ModuleBoundCallback):
    """Base of callbacks that select parameters, transform them, and keep the latent weights.

    In training the parameters hold the transformed weights from a batch's first forward to the
    optimizer's step; in validation, test and prediction they hold the deployed ones. When ``fit``
    ends they stay as deployed; if training goes on, from the same objects or from a checkpoint, it
    goes on from the latent weights. The ``state_dict`` of a checkpoint holds the deployed weights,
    the callback's state the latent ones. Several callbacks of one class share a Trainer if they
    have other ``targets`` or ``exclude``.

    A subclass sets :attr:`method`, overrides :meth:`prepare` and :meth:`transforms`, and any of
    the other hooks: :meth:`step_begins`, :meth:`stepped`, :meth:`learn`, :meth:`settings`,
    :meth:`missed`, :meth:`metrics`, :meth:`forget`, :meth:`rejoin`, :meth:`located`,
    ``state_dict`` and ``load_state_dict``. A state that is loaded waits until :meth:`prepare` or
    :meth:`rejoin` is called. :data:`lightning_nna.testing.contract.CHECKS` are the promises that a
    method keeps.

    Args:
        selection: Selection of parameters, with a number (bits, sparsity) for each.

    Example:
        >>> from lightning_nna.weights.selection import BitWidths
        >>> class Rounded(WeightMethod):
        ...     method = "rounded"
        >>> Rounded(BitWidths(4, targets=["encoder"])).state_key
        "Rounded{'targets': ['encoder']}"
    """

    #: Name in log keys (``nna/<method>/<metric>``), reports and messages: the class in snake case.
    method: ClassVar[str]
    #: Order of the transforms in the weight pipeline, and of the work after a step: masks 0,
    #: centroids 1.
    order: ClassVar[int] = 1

    def __init__(self, selection: ByTensor[Any]) -> None:
        super().__init__()
        self.selection = selection
        #: The number of each selected parameter, by its name, once a run has started.
        self.numbers: dict[str, Any] = {}
        self._counter = StepCounter(self._stepped)
        #: In log keys, where a Trainer has several callbacks of the class.
        self._label = ""
        # Its weights are read when the callback is copied, however long after the run.
        self._strong_module: pl.LightningModule | None = None
        self._pipeline: WeightPipeline | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []
        self._optimizers: list[Optimizer] = []
        # Latent weights after a fit, while the parameters hold the deployed ones.
        self._latents: dict[str, Tensor] = {}
        # Names of parameters that were frozen when the run began, also if a resumed run has thawed
        # them already; and those of them that are not selected for that reason.
        self._frozen: list[str] = []
        self._saved_frozen: list[str] | None = None
        self._left_frozen: list[str] = []
        # Settings of a loaded state, and whether that state is deferred.
        self._saved_settings: dict[str, Any] = {}
        self._is_loaded = False
        # Parameters and latent weights are of one checkpoint.
        self._is_resumed = False

    @property
    def steps(self) -> int:
        """Number of optimizer steps since the callback took part in the run."""
        return self._counter.steps

    @property
    def state_key(self) -> str:
        """Name of the callback's state in a checkpoint: with its targets, unless they are all."""
        patterns = {"targets": self.selection.targets, "exclude": self.selection.exclude}
        restricting = {
            key: list(value)
            for key, value in patterns.items()
            if list(value) != (["*"] if key == "targets" else [])
        }
        return self._generate_state_key(**restricting) if restricting else type(self).__qualname__

    @property
    def _total_steps(self) -> float:
        """Number of optimizer steps of the run, as :attr:`steps` counts them."""
        return self._counter.total

    @property
    def selected(self) -> list[str]:
        """Names of the selected parameters, once a run has started."""
        return list(self.numbers)

    # --- hooks of a method --------------------------------------------------------------------

    def transforms(self) -> dict[str, WeightTransform]:
        """Return the transform of every selected parameter, by name; none for a regularizer."""
        return {}

    def prepare(self) -> None:
        """Create the transforms, and take a deferred state; parameters hold latent weights."""

    def step_begins(self, optimizer: Optimizer) -> None:
        """Act before an optimizer steps; parameters and their gradients are the latent ones.

        Args:
            optimizer: Optimizer that is about to step.
        """

    def stepped(self) -> None:
        """Act after the count of steps has advanced."""

    def learn(self) -> None:
        """Update learned tensors other than the weights, after the step of any optimizer."""

    def settings(self) -> dict[str, Any]:
        """Return settings that a run cannot change once it has begun; see :func:`require_same`.

        Checkpoints have them, and :func:`.load_deployed` reads them.

        Returns:
            Plain values by name; a mapping for a setting of each parameter.
        """
        return {}

    def missed(self) -> list[str]:
        """Describe targets that are not reached when ``fit`` ends, each with both numbers."""
        return []

    @override
    def forget(self) -> None:
        """Drop the state of the module and its runs: another module comes."""
        self._counter.reset()
        self._is_loaded = False
        self._latents, self._saved_settings, self._saved_frozen = {}, {}, None

    def rejoin(self) -> None:
        """Take a deferred state: a run starts on the module of the run before."""

    def located(self) -> None:
        """Act when the length of the run and the step within it are known."""

    def metrics(self) -> dict[str, float]:
        """Compute the metrics to log, by name."""
        return {}

    # --- life cycle ---------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._optimizers = list(trainer.optimizers)
        self._attach(pl_module, fit=trainer)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS) and self.transforms():
                raise ValueError(
                    f"{type(self).__name__} needs an optimizer that takes one gradient a step; "
                    f"LBFGS takes several"
                )
        self._resume()
        self.pipeline.attend(self.order, self._after_step)
        # With several optimizers, a forward follows a step within one batch, perhaps of a part.
        several = len(trainer.optimizers) > 1
        for child in _parts_of(pl_module) if several else pl_module.children():
            self._handles.append(child.register_forward_pre_hook(ModuleHook(self._substitute)))
        same = [one for one in trainer.callbacks if type(one) is type(self)]  # type: ignore[attr-defined]
        patterns = [*self.selection.targets, *(f"!{one}" for one in self.selection.exclude)]
        self._label = "+".join(patterns) + "/" if len(same) > 1 else ""
        if self.transforms():
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
        candidates = candidates_of(pl_module)
        thawed = [name for name in self._left_frozen if candidates[name].requires_grad]
        if thawed:
            rank_zero_warn(
                f"{type(self).__name__}: {listed(thawed)} was frozen when the run began and has "
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
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        # Of a forward before the step of another optimizer.
        self._substitute()

    @override
    @unseen
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        pipeline = self.pipeline
        stepping = [p for group in optimizer.param_groups for p in group["params"]]
        pipeline.restore(stepping)
        pipeline.pull_back(stepping)
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
        present = {one.state_key for one in trainer.callbacks}  # type: ignore[attr-defined]
        name = type(self).__qualname__
        if self.state_key not in saved and "settings" not in saved.get(name, {"settings": {}}):
            saved[self.state_key] = saved[name]  # An older version left targets out of the key.
        others = [key for key in saved if key == name or str(key).startswith(f"{name}{{")]
        if self.state_key not in saved and (
            others := [key for key in others if key not in present]
        ):
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
        # An average of the weights, if there is one, stays unchanged: it is not what is trained.
        weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
        latents = checkpoint["callbacks"][self.state_key]["latents"]
        latents.clear()  # A weight that was changed after the fit has no use for its latent one.
        aliases = _names_of(pl_module)
        for name in self._owned():
            latent = self._latents.get(name, self._pipeline.latent(name)).clone()
            latents[name] = latent
            deployed = self._pipeline.hard_of(name, latent)
            for alias in aliases[id(self._parameters[name])]:
                if alias in weights:
                    weights[alias] = deployed

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: see :class:`.ModuleBoundCallback`."""
        state = {**super().__getstate__(), "_handles": [], "_parameters": {}, "_optimizers": []}
        return {**state, "_strong_module": None, "_pipeline": None, "_training": False}

    @property
    @override
    def has_deferred_state(self) -> bool:
        return self._is_loaded

    @override
    def carry_on(self) -> None:
        with torch.inference_mode(False):  # A test may take a state that is trained on later.
            self.load_state_dict(self.state_dict())

    @override
    def digests(self, module: pl.LightningModule) -> dict[str, str]:
        is_own = module is self._module
        names = self.numbers if is_own else self.selection.of(module, self._frozen)
        candidates = candidates_of(module)
        return {name: digest_of(candidates[name]) for name in candidates.keys() & set(names)}

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
            self._meet(pl_module)
            frozen = frozen_in(pl_module) if self._saved_frozen is None else self._saved_frozen
            self._frozen = frozen
            self.numbers = self.selection.of(pl_module, frozen)
            self._strong_module, self._pipeline = pl_module, pipeline_of(pl_module)
        self._saved_frozen = None
        # Also on the same module: loading a state may have replaced its parameters.
        candidates = candidates_of(pl_module)
        self._parameters = {name: candidates[name] for name in self.numbers}
        self.require_settings(fit)
        if fit is not None:
            self._counter.start(fit)
        with torch.inference_mode(False):  # A state of a test may be trained later.
            if is_new:
                self.prepare()
            else:
                self.rejoin()
        self._is_loaded = False
        if fit is None:
            # The weights may change before the next fit: they are no longer the checkpoint's.
            self._saved_settings, self._is_resumed = {}, False
        for name, transform in self.transforms().items():
            self.pipeline.claim(name, self._parameters[name], transform)
        if is_new:
            self._say(pl_module)

    def _say(self, pl_module: pl.LightningModule) -> None:
        """Report the selected tensors, and the others with the reason."""
        name = type(self).__name__
        tensors: dict[Any, list[str]] = {}
        for tensor, number in self.numbers.items():
            tensors.setdefault(number, []).append(tensor)
        shown = "; ".join(f"{number} for {listed(each)}" for number, each in tensors.items())
        rank_zero_info(f"{name}: {self.selection.quantity} of {len(self.numbers)} tensors: {shown}")
        self._left_frozen = []
        for reason, names in self.selection.left_alone(pl_module, self._frozen).items():
            self._left_frozen += names if reason == "frozen" else []
            rank_zero_info(
                f"{name}: left alone, since {reason}: {listed(names)}; name in targets what is "
                f"to be taken"
            )

    def _end(self) -> None:
        """End the transforms, which makes room for those of other methods."""
        if self._pipeline is not None:
            for transform in self.transforms().values():
                self._pipeline.end(transform)

    def _owned(self) -> list[str]:
        """Return the names of parameters whose last transform is the method's.

        Of several methods of one parameter, the last deploys it.
        """
        own = {id(transform) for transform in self.transforms().values()}
        names = []
        for name, parameter in self._parameters.items():
            transforms = self.pipeline.transforms_of(parameter)
            if transforms and id(transforms[-1]) in own:
                names.append(name)
        return names

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
        require_finite_weights(self._parameters)  # Metrics look weights up in tables.
        for name, metric in unseen(self.metrics)().items():
            pl_module.log(f"nna/{self.method}/{self._label}{name}", metric)

    @torch.no_grad()
    def _deploy(self) -> None:
        """Leave the parameters as deployed, and store the latent weights."""
        for name in self._owned():
            parameter = self._parameters[name]
            self._latents[name] = parameter.detach().clone()
            parameter.copy_(self.pipeline.hard(parameter))

    @torch.no_grad()
    def _resume(self) -> None:
        """Restore the latent weights of parameters that are still as they were deployed."""
        for name, latent in self._latents.items():
            if (parameter := self._parameters.get(name)) is None:
                continue  # It is not selected any more, which the settings tell.
            latent = latent.to(parameter.device)  # A copy has it on the device of its training.
            # A checkpoint has both, and another processor may differ in the last bit.
            if self._is_resumed or torch.equal(self.pipeline.hard_of(name, latent), parameter):
                parameter.copy_(latent)
            else:
                rank_zero_info(f"{type(self).__name__}: {name} has changed since the last fit")
        self._latents, self._is_resumed = {}, False

    def _release(self) -> None:
        """Remove all hooks, and restore latent weights after an exception."""
        self._training = False
        self._counter.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._pipeline is not None:
            self._pipeline.leave(self._after_step)
            self._pipeline.restore()


def require_codebook_size(name: str, saved: Tensor, centroids: Tensor) -> None:
    """Raise if a codebook of a checkpoint has not the bits and channels of its tensor.

    Args:
        name: Name of the tensor.
        saved: Centroids in the checkpoint, shape ``(…, centroids)``.
        centroids: Centroids of the tensor, shape ``(…, centroids)``.

    Raises:
        ValueError: Names the tensor, and both numbers.
    """
    if saved.shape == centroids.shape:
        return
    size, bits = saved.shape[-1], centroids.shape[-1].bit_length() - 1
    there = f"{size} centroids" if size != 2**bits else _codebooks(saved)
    here = f"{bits} bits are 2**{bits}" if size != 2**bits else f"{_codebooks(centroids)} here"
    raise ValueError(
        f"{name} has {there} in the checkpoint, and {here}: resume with its bits and codebook, or "
        f"begin a new run from its weights (lightning_nna.load_deployed)"
    )


def _codebooks(centroids: Tensor) -> str:
    return f"centroids of {centroids[..., 0].numel()} channels" if centroids.ndim > 1 else "one set"


def _parts_of(module: nn.Module) -> list[nn.Module]:
    """Return all modules inside of a module that may have hooks."""
    return [
        part
        for part in module.modules()
        if part is not module and not isinstance(part, torch.jit.ScriptModule)
    ]


def _names_of(module: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter, by its id: a tied weight has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _warn_of_weights_only(trainer: pl.Trainer) -> None:
    """Warn of checkpoints of weights only, for which Lightning asks no callback."""
    # ``pytorch_lightning`` has a class of its own, and users have others.
    if any(getattr(one, "save_weights_only", False) for one in trainer.checkpoint_callbacks):
        rank_zero_warn(
            "ModelCheckpoint(save_weights_only=True) writes the latent weights alone, without what "
            "the weight methods make of them: set save_weights_only=False, or save the module's "
            "state_dict when fit has ended"
        )


class BitsArguments(TypedDict, total=False):
    """Keyword arguments of :class:`BitsMethod`, for the signatures of its subclasses."""

    targets: Sequence[str]
    overrides: Mapping[str, int] | str | Path


class BitsMethod(WeightMethod):
    """Base of weight methods with a bit width for each tensor.

    Args:
        bits: Bits of the index of a weight, 1 to 8, of every selected tensor.
        targets: Patterns of the selected weights: globs or ``re:…`` on the names of parameters, or
            of modules that have them. See :mod:`lightning_nna.weights.selection`.
        overrides: Bits by pattern, or the path of a JSON file with them.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        bits: int,
        *,
        targets: Sequence[str] = ("*",),
        overrides: Mapping[str, int] | str | Path = {},  # noqa: B006
    ) -> None:
        super().__init__(BitWidths(bits, targets, overrides))

    @override
    def settings(self) -> dict[str, Any]:
        return {"bits": dict(self.numbers)}

    @property
    def bits(self) -> dict[str, int]:
        """Bits by the names of the selected parameters, once a run has started."""
        return self.numbers


class ModuleHook:
    """A hook on a module; copies and pickles of the module have one that does nothing.

    Args:
        act: Function without arguments; None for nothing.
    """

    def __init__(self, act: Callable[[], None] | None) -> None:
        self.act = act

    def __call__(self, *_: Any) -> None:
        """Act, whatever the arguments of the module."""
        if self.act is not None:
            self.act()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        return ModuleHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleHook, (None,)
