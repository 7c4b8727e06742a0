r"""``CompressedSensingPruning``: pruning by sparse recovery of each layer from its inputs.

Reference:
    Zhen et al., "Sparsification via compressed sensing for automatic speech recognition", ICASSP
    2021, arXiv 2102.04932.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nna.distributed import is_distributed
from lightning_nna.pruning.input_moments import InputMoments
from lightning_nna.pruning.pruning_method import PruningMethod
from lightning_nna.pruning.sparse_recovery import SparseSolution, recover_sparse_weight
from lightning_nna.weights.method import ModuleHook

Measurement = Literal["activations", "identity", "random"]
Weighting = Literal["gradients", "equal"]

# Fraction of the mean weight of an output: one without gradient still counts a little.
_LEAST_WEIGHT = 1e-3


class CompressedSensingPruning(PruningMethod):
    r"""Prune each layer to the sparse weight that explains its measurement best.

    Every ``every_n_steps`` each selected weight is measured on the inputs that reached it in the
    last ``measure_steps`` steps; the sparsest weight that explains the measurement is recovered
    (:func:`.recover_sparse_weight`), with the remaining weights fitted by least squares to make up
    for the others. With ``scope="global"`` layers share one budget by the cost of their errors.
    Zeroed weights start from zero again and may return while training goes on; from ``freeze_step``
    on masks stay. A layer waits at its sparsity while the error of its recovery would be over
    ``most_nmse``.

    Args:
        sparsity: See :class:`.PruningMethod`.
        measurement: ``"activations"``: the inputs' second moments; ``"identity"``: the weights
            themselves; ``"random"``: as many random projections as a weight has columns. Weights
            whose inputs are not seen (:class:`.InputMoments`), such as those of embeddings and
            transposed convolutions, are measured by the identity; one warning lists all of them
            but the embeddings, which have no inputs but numbers of rows.
        measure_steps: Number of optimizer steps before each recovery whose inputs count.
        weighting: Weight of the error of each output: ``"gradients"``, the mean square of its
            gradients in those steps, so that errors are costs of the loss; or ``"equal"``.
            Gradients also make layers comparable: see ``scope``.
        most_nmse: Greatest error of the layer's output over the output's power, both weighted by
            ``weighting``; None for no bound.
        refit: Whether the remaining weights are fitted, by some steps of conjugate gradients.
        most_columns: Greatest number of columns of a weight, whose moment has their square.
        revives: Whether zeroed weights are trained and may return until masks freeze.
        settings: Other arguments of :class:`.PruningMethod`.

    Logs ``nna/compressed_sensing_pruning/sparsity``, ``…/nmse`` (mean over layers, of the last
    recovery), ``…/nmse_max`` and ``…/support_kept`` (fraction of the kept weights that were kept
    before), and for each layer ``…/nmse/<parameter>`` and ``…/support_kept/<parameter>``.

    Raises:
        ValueError: If an argument is out of range, or a pattern matches nothing or does not divide
            a weight.
        FloatingPointError: If a weight or a moment is not finite.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> module = SmallRecurrentModule()
        >>> prune = CompressedSensingPruning(0.75, every_n_steps=2)
        >>> trainer = pl.Trainer(max_steps=8, callbacks=[prune], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module)
        >>> round(float((module.lstm.weight_hh_l0 == 0).float().mean()), 2)
        0.75

    Differs from the paper: the measurement by second moments, the weighting by gradients, the
    solver, the fit of the survivors and the bound are ours.
    """

    method = "compressed_sensing_pruning"

    def __init__(
        self,
        sparsity: float,
        *,
        measurement: Measurement = "activations",
        measure_steps: int = 8,
        weighting: Weighting = "gradients",
        most_nmse: float | None = None,
        refit: bool = True,
        most_columns: int = 4096,
        revives: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(sparsity, revives=revives, **settings)
        if measurement not in ("activations", "identity", "random"):
            raise ValueError(
                f"measurement must be 'activations', 'identity' or 'random', got {measurement!r}"
            )
        if weighting not in ("gradients", "equal"):
            raise ValueError(f"weighting must be 'gradients' or 'equal', got {weighting!r}")
        if measure_steps < 1 or most_columns < 1:
            raise ValueError(
                f"measure_steps and most_columns must be at least 1, got {measure_steps} and "
                f"{most_columns}"
            )
        if most_nmse is not None and not most_nmse > 0:
            raise ValueError(f"most_nmse must be positive, got {most_nmse}")
        self.measurement, self.measure_steps = measurement, measure_steps
        self.weighting = weighting
        self.most_nmse, self.refit, self.most_columns = most_nmse, refit, most_columns
        #: Errors of the last recovery, by the names of the parameters.
        self.nmse: dict[str, float] = {}
        self._support_kept: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        # Sums over rows of squared gradients, by the names of the parameters.
        self._powers: dict[str, Tensor] = {}
        self._moments: InputMoments | None = None
        self._entered = 0
        self._has_warned = False
        # Moment of each weight during a mask update; None if the identity measures it.
        self._measured: dict[str, Tensor | None] = {}

    # --- measuring ----------------------------------------------------------------------------

    @override
    def prepare(self) -> None:
        super().prepare()
        self._has_warned = False
        if self.measurement != "activations":
            return
        for name, layout in self.layouts.items():
            columns = layout.matrix_shape[1]
            if columns > self.most_columns:
                raise ValueError(
                    f"{name} has {columns} columns, more than most_columns={self.most_columns}: "
                    f"raise it, exclude the weight, or set measurement='identity'"
                )
        groups = {n: each.transposed_groups for n, each in self.layouts.items()}
        transposed = {name: number for name, number in groups.items() if number}
        self._moments = InputMoments(self._parameters, self._sums, self._counts, transposed)

    @override
    def forget(self) -> None:
        super().forget()
        for known in (self.nmse, self._support_kept, self._sums, self._counts, self._powers):
            known.clear()
        self._moments = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._moments is None:
            return
        # Entered after the modes of a whole batch, so that it sees functions first. On every
        # module: a network may be run by other methods than its forward.
        for part in pl_module.modules():
            self._handles.append(part.register_forward_pre_hook(ModuleHook(self._enter)))
            leave = ModuleHook(self._leave)
            self._handles.append(part.register_forward_hook(leave, always_call=True))

    @override
    def step_begins(self, optimizer: Optimizer) -> None:
        if not self._is_measuring():
            return
        if self._moments is not None:
            self._moments.agree(over_ranks=is_distributed())
        if self.weighting == "gradients":
            steps = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, parameter in self._parameters.items():
                if id(parameter) in steps and parameter.grad is not None:
                    grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                    power = self.layouts[name].to_matrix(grad).float().square().sum(1)
                    # A step with gradients that are not finite is one that a scaler skips.
                    power = torch.where(power.isfinite().all(), power, 0.0)
                    self._powers[name] = self._powers.get(name, 0.0) + power

    def _is_measuring(self) -> bool:
        return self._steps_to_mask_update(self.steps) <= self.measure_steps

    def _enter(self) -> None:
        # A forward within a backward repeats one that was observed already.
        is_repeated = torch._C._current_graph_task_id() != -1
        if self._entered or (self._training and self._is_measuring() and not is_repeated):
            self._entered += 1
            if self._entered == 1 and self._moments is not None:
                self._moments.__enter__()

    def _leave(self) -> None:
        if self._entered:
            self._entered -= 1
            if self._entered == 0 and self._moments is not None:
                self._moments.__exit__(None, None, None)

    # --- recovery -----------------------------------------------------------------------------

    @property
    @override
    def is_comparable(self) -> bool:
        return self.weighting == "gradients"

    @override
    def shares_budget(self, name: str) -> bool:
        # Without gradients the cost of an error of the layer is unknown.
        power = self._powers.get(name)
        return not self.is_comparable or (power is not None and bool(power.any()))

    @override
    def importance_scores(self, name: str, weight: Tensor) -> Tensor:
        moment = self._measured[name]
        power = torch.ones_like(weight[0]) if moment is None else moment.diagonal()
        # A row's squared gradient is its output's, times the power of the inputs.
        scale = (power / power.sum().clamp_min(1e-30)).sqrt()
        return self.pattern.importance_scores(weight * scale * self._row_scale(name, weight))

    @override
    def select_mask(self, name: str, weight: Tensor, sparsity: float) -> Tensor:
        layout = self.layouts[name]
        previous_mask = layout.to_matrix(self.masks[name].mask)
        solution = self.recover(name, weight, sparsity)
        self.nmse[name] = solution.nmse
        if self.most_nmse is not None and solution.nmse > self.most_nmse:
            return previous_mask
        self._support_kept[name] = float(
            (solution.mask & previous_mask).sum() / solution.mask.sum().clamp_min(1)
        )
        # Pruned weights start from zero again: the fitted weights have taken over their effect.
        self._parameters[name].copy_(layout.from_matrix(solution.weight))
        return solution.mask

    def recover(self, name: str, weight: Tensor, sparsity: float) -> SparseSolution:
        """Recover the sparse weight of a layer.

        Args:
            name: Name of the parameter.
            weight: Latent weight as a matrix, float32, shape ``(rows, columns)``.
            sparsity: Fraction of zeros.
        """
        mask = self.layouts[name].to_matrix(self.masks[name].mask)
        start = None if bool(mask.all()) else mask
        # Rows are scaled by the weights of their errors, since they are fitted one by one.
        scale = self._row_scale(name, weight)
        solution = recover_sparse_weight(
            weight * scale,
            self._measured[name],
            sparsity=sparsity,
            pattern=self.pattern,
            start=start,
            refit=self.refit,
            exact=False,
        )
        return replace(solution, weight=solution.weight / scale)

    def _row_scale(self, name: str, weight: Tensor) -> Tensor:
        """Compute roots of the weights of the rows' errors, shape ``(rows, 1)``, powers of two."""
        power = self._powers.get(name)
        if power is None or not bool(power.any()):
            return torch.ones_like(weight[:, :1])
        least = _LEAST_WEIGHT * power.mean()
        return torch.exp2(power.clamp_min(least).log2().div(2).round())[:, None]

    @override
    def measure(self) -> None:
        self._measured = {name: self._moment(name) for name in self._parameters}
        if self._moments is None:
            return
        unmeasured = (name for name, moment in self._measured.items() if moment is None)
        unseen = [name for name in unmeasured if name not in self._moments.looked_up]
        if unseen and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"CompressedSensingPruning saw no inputs of {', '.join(unseen)} in the last "
                f"{self.measure_steps} steps: measurement='identity' stands in for them, which "
                f"keeps the largest weights; exclude what is not to be pruned"
            )

    @override
    def _advance(self) -> None:
        if self.steps == 0 and self.measurement == "activations":
            return  # There is no measurement yet.
        super()._advance()
        self._measured = {}
        self._powers = {}
        if self._moments is not None:
            self._moments.clear()

    def _moment(self, name: str) -> Tensor | None:
        layout = self.layouts[name]
        columns = layout.matrix_shape[1]
        if self.measurement == "identity":
            return None
        if self.measurement == "random":
            generator = torch.Generator().manual_seed(columns)
            projection = torch.randn(columns, columns, generator=generator)
            return (projection.T @ projection / columns).to(self._parameters[name].device)
        assert self._moments is not None, "prepared for this measurement"
        moment = self._moments.moment(name)
        if moment is not None and not bool(torch.isfinite(moment).all()):
            raise FloatingPointError(f"the inputs of {name} have a moment that is not finite")
        if moment is None or not layout.is_kernel:
            return moment
        # Inputs are seen channel by channel; see `InputMoments`.
        order = torch.arange(columns, device=moment.device).view(layout.channels, -1).T.flatten()
        return moment[order][:, order]

    # --- logs and state -----------------------------------------------------------------------

    @override
    def metrics(self) -> dict[str, float]:
        metrics = {"sparsity": self.sparsity}
        if self.nmse:
            metrics["nmse"] = sum(self.nmse.values()) / len(self.nmse)
            metrics["nmse_max"] = max(self.nmse.values())
            metrics |= {f"nmse/{name}": error for name, error in self.nmse.items()}
        if self._support_kept:
            metrics["support_kept"] = sum(self._support_kept.values()) / len(self._support_kept)
            metrics |= {
                f"support_kept/{name}": fraction for name, fraction in self._support_kept.items()
            }
        return metrics

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        width = max(len(name) for name in self.masks)
        lines = [f"{'tensor':{width}}  zeros   nmse"]
        for name, transform in self.masks.items():
            error = f"{self.nmse[name]:.4f}" if name in self.nmse else "-"
            lines.append(f"{name:{width}}  {transform.sparsity:5.1%}  {error}")
        rank_zero_info("CompressedSensingPruning:\n" + "\n".join(lines))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "nmse": dict(self.nmse),
            "kept": dict(self._support_kept),
            "sums": {name: total.clone() for name, total in self._sums.items()},
            "counts": dict(self._counts),
            "powers": dict(self._powers),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.nmse, self._support_kept = dict(state_dict["nmse"]), dict(state_dict["kept"])
        self._sums.clear()
        self._counts.clear()
        self._sums.update(state_dict["sums"])
        self._counts.update(state_dict["counts"])
        self._powers = dict(state_dict["powers"])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: the measurements, without a module."""
        return {**super().__getstate__(), "_moments": None, "_entered": 0}
