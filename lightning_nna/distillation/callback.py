"""``Distillation``: modules that are emulated or compressed learn the outputs of their float start.

Reference:
    Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531,
    2015.
    Mishra and Marr, "Apprentice: using knowledge distillation techniques to improve low-precision
    network accuracy", ICLR 2018, arXiv 1711.05852.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_nna.distillation.distances import Distance, distance_of, require_distance
from lightning_nna.distillation.teacher import CallHooks, Teacher
from lightning_nna.emulation.scope import compiled_modules, named_modules
from lightning_nna.lifecycle import ModuleBoundCallback
from lightning_nna.resumed_settings import require_same
from lightning_nna.weights.selection import is_loss_or_metric, select


class Distillation(ModuleBoundCallback):
    r"""Add the distance between outputs of modules and of their frozen float copies to the loss.

    .. math:: L' = L + \lambda \sum_t D(s_t, t_t)

    As ``fit`` starts, each target is copied: before ranges are frozen, weights are quantized or
    zeros are set, whatever the order of the callbacks. In training the copy computes, in float and
    without dropout, the output for the same inputs as the target's. The distance takes all calls of
    the target since the last backward together. It changes the gradient of the loss, not its
    value: what a module logs as its loss stays that. In manual optimization the loss is what
    ``manual_backward`` is called with. Calls without gradient and evaluation do not count.

    A second ``fit`` of the same module, and a run that is resumed from a checkpoint, keep the copy
    of the first start. A run that joins, from a checkpoint without this callback, copies the
    weights of the checkpoint. There, and with a new callback in a second ``fit``, list it after the
    weight methods, which by then have put their float weights back; before them it copies low-bit
    ones.

    Memory: the weights of the targets once more, on their device and in each checkpoint; two
    tensors of the size of a target's output for each call, until the backward.

    Args:
        targets: Globs or ``re:…`` on names of modules; each of them has a copy.
        weight: Weight :math:`\lambda` of the distances, not negative.
        distance: ``"mse"``, mean square over all elements of an output's floating tensors; or
            ``"kl"``, Kullback-Leibler divergence of logits, classes on the last axis. Padding
            counts like anything else, since no mask is known.
        temperature: Divisor of logits, positive; of ``"kl"`` alone.

    Logs ``nna/distillation/<target>``, the distance without its weight.

    Raises:
        ValueError: If an argument is out of range; if a target selects nothing, is compiled or is a
            ``ScriptModule``; if its output has other shapes in evaluation than in training, or no
            floating tensor; if the strategy splits parameters; if a loss has several elements.
        RuntimeError: If a target's output is computed in the backward alone, by activation
            checkpointing with ``use_reentrant=True``.

    Example:
        >>> from lightning_nna.callbacks import NNAEmulation
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> callbacks = [NNAEmulation(calibration_steps=2),
        ...     Distillation(["lstm", "head"], weight=0.5)]
        >>> trainer = pl.Trainer(max_steps=4, callbacks=callbacks, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(SmallRecurrentModule())
        >>> sorted(key for key in trainer.logged_metrics if "distillation" in key)
        ['nna/distillation/head', 'nna/distillation/lstm']
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        weight: float = 1.0,
        distance: Distance = "mse",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        require_distance(distance, temperature)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must not be negative, and finite, got {weight}")
        self.targets = [targets] if isinstance(targets, str) else list(targets)
        self.weight, self.distance, self.temperature = weight, distance, temperature
        self._teachers: dict[str, Teacher] = {}
        self._handles: list[Any] = []
        # Tensors of the copies, of a loaded state or of a copied callback.
        self._saved: dict[str, dict[str, Tensor]] | None = None
        # Whether that is of a checkpoint which no run has taken yet.
        self._is_loaded = False
        # Where a batch is: whether it trains, and whether its backward runs.
        self._training = self._in_backward = False
        # Distances of each backward of the batch, and targets that were called in this fit.
        self._distances: dict[str, list[Tensor]] = {}
        self._reached: set[str] = set()
        self._warned = False

    @property
    def state_key(self) -> str:
        """Name of the callback's state in a checkpoint, with its targets."""
        return self._generate_state_key(targets=self.targets)

    # --- life cycle ---------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Before a checkpoint is loaded, since its state belongs to this module.
        self._meet(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        children = self._children_of(pl_module)
        if self._saved is not None:
            saved, now = sorted(self._saved), sorted(children)
            require_same("Distillation", {"modules": saved}, {"modules": now})
        self._release()
        for name, child in children.items():
            if name not in self._teachers:
                self._teachers[name] = Teacher(name, child, left_out=(trainer,))
            teacher = self._teachers[name]
            teacher.load(teacher.tensors() if self._saved is None else self._saved[name], child)
            hooks = CallHooks(partial(self._begins, teacher), partial(self._ends, teacher))
            self._handles += hooks.attach(child)
        self._saved, self._is_loaded = None, False
        self._reached, self._warned = set(), False
        size = sum(t.nbytes for one in self._teachers.values() for t in one.tensors().values())
        rank_zero_info(
            f"Distillation: {', '.join(children)} learn the outputs of frozen copies, which take "
            f"{size / 2**20:.1f} MiB"
        )

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_loaded = False  # The state belongs to the module of this run.

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_loaded = False

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_loaded = False

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

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
        self._forget_calls()
        self._training = True

    @override
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            self._add_to(loss, self._scale_of_loss(trainer, pl_module))
        self._in_backward = True

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._in_backward = False

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._reached |= {name for name, one in self._teachers.items() if one.is_reached}
        for name, distances in self._distances.items():
            pl_module.log(f"nna/distillation/{name}", torch.stack(distances).mean())
        self._training = False
        self._forget_calls()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        idle = [name for name in self._teachers if name not in self._reached]
        if idle and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"Distillation: {', '.join(idle)} was never called with a gradient, and learns "
                f"nothing: name modules in targets that the training step calls, and that are "
                f"trained"
            )

    # --- state --------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        tensors = {name: teacher.tensors() for name, teacher in self._teachers.items()}
        return {"copies": tensors if self._saved is None else self._saved}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = {name: dict(tensors) for name, tensors in state_dict["copies"].items()}
        self._is_loaded, self._copied_with = True, None

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint["callbacks"]
        present = {one.state_key for one in trainer.callbacks}  # type: ignore[attr-defined]
        others = [key for key in saved if str(key).startswith("Distillation{")]
        others = [str(key) for key in others if key not in present]
        if self.state_key not in saved and others:
            raise ValueError(
                f"the checkpoint has the state of {' and '.join(others)}, and the Trainer has "
                f"{self.state_key}: resume with the targets of the checkpoint, or begin a new run "
                f"from its weights (lightning_nna.load_deployed)"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: with the tensors of the copies, without modules."""
        state = {**super().__getstate__(), "_handles": [], "_teachers": {}, "_distances": {}}
        saved = self.state_dict()["copies"] or None
        return {**state, "_saved": saved, "_training": False, "_in_backward": False}

    @property
    @override
    def has_deferred_state(self) -> bool:
        return self._is_loaded

    @override
    def forget(self) -> None:
        self._release()
        self._teachers, self._saved, self._is_loaded = {}, None, False

    # --- own ----------------------------------------------------------------------------------

    def _children_of(self, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        """Return the targets by name.

        Raises:
            ValueError: If a pattern selects nothing, or a target cannot be seen into.
        """
        named = {n: m for n, m in named_modules(pl_module) if n and not is_loss_or_metric(m)}
        children = {name: named[name] for name in select(self.targets, named, what="module")}
        compiled = compiled_modules(pl_module)
        for name, child in children.items():
            if isinstance(child, torch.jit.ScriptModule):
                raise ValueError(
                    f"Distillation: {name} is a ScriptModule, whose calls have no hooks: name a "
                    f"module around it in targets"
                )
            around = [
                one for one in compiled if one in (name, "the module") or name.startswith(f"{one}.")
            ]
            if around:
                raise ValueError(
                    f"Distillation sees no calls of {name}, since {around[0]} is compiled: leave "
                    f"out torch.compile, or name a module around it in targets"
                )
        return children

    def _begins(self, teacher: Teacher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._training or not torch.is_grad_enabled():
            return
        if not self._in_backward:
            teacher.before(args, kwargs)
        elif not teacher.is_reached:
            raise RuntimeError(
                f"Distillation: {teacher.name} is computed in the backward alone, too late for a "
                f"term of the loss: checkpoint its activations with use_reentrant=False"
            )

    def _ends(self, teacher: Teacher, output: Any) -> None:
        if self._training and torch.is_grad_enabled() and not self._in_backward:
            teacher.after(output)

    def _add_to(self, loss: Tensor, scale: float) -> None:
        """Add the weighted distances of the calls since the last backward to a loss's gradient.

        Args:
            loss: Loss, one element, with its graph.
            scale: Factor of the loss, by which the Trainer has multiplied it.

        Raises:
            ValueError: If the loss has several elements.
        """
        terms = []
        for name, teacher in self._teachers.items():
            if pairs := teacher.take():
                terms.append(distance_of(pairs, self.distance, temperature=self.temperature))
                self._distances.setdefault(name, []).append(terms[-1].detach())
        if not terms:
            return
        if loss.numel() != 1:
            raise ValueError(
                f"Distillation adds to a loss of one element, and this one has the shape "
                f"{tuple(loss.shape)}: call manual_backward with its mean or sum"
            )
        term = torch.stack([one.to(loss.device) for one in terms]).sum() * (self.weight * scale)
        # Its value is 0, so that what the graph has saved of the loss stays right.
        with torch.autograd._unsafe_preserve_version_counter(loss):
            loss.add_((term - term.detach()).to(loss.dtype))

    def _scale_of_loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """Return the factor by which the Trainer has multiplied the loss of the module."""
        batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return (1.0 if scaler is None else float(scaler.get_scale())) / batches

    def _forget_calls(self) -> None:
        self._distances, self._in_backward = {}, False
        for teacher in self._teachers.values():
            teacher.forget_calls()

    def _release(self) -> None:
        """Remove the hooks."""
        self._training = False
        self._forget_calls()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
