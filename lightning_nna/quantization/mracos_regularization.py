"""``MRACosRegularization``: a pull of every weight towards its nearest centroid.

Reference:
    Zhen et al., "Sub-8-bit quantization aware training for 8-bit neural network accelerator with
    on-device speech recognition", Interspeech 2022, arXiv 2206.15408.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from lightning_nna.non_finite import require_finite_weights
from lightning_nna.quantization.mracos import mracos, mracos_gradient
from lightning_nna.quantization.s8bqat import S8BQATArguments, S8BQATMethod
from lightning_nna.schedule import Schedule
from lightning_nna.weights.codebook import from_grid_units, to_grid_units


class MRACosRegularization(S8BQATMethod):
    r"""Add the gradient of :math:`\lambda \sum R(w)` to that of the loss, in closed form.

    It is added when gradients are unscaled and accumulated, before they are clipped: the same as
    that of an explicit term of the loss, without its graph. It pulls; it does not compress: add
    :class:`.HardCompression` with the same bits, and the two share one set of centroids.

    Args:
        bits: Bits of the index of a weight, 1 to 8, of every selected tensor.
        strength: Weight :math:`\lambda` of the regularizer, not negative. The regularizer is a sum
            over weights: a large value dominates the gradient of a mean loss.
        schedule: Factor of ``strength`` over the run: a :class:`.Schedule` or its keys.
        scaled: Whether arches have slope 1, whatever their width; else height 1.
        settings: Shared arguments of :class:`.CodebookMethod` and :class:`.S8BQATMethod`:
            ``granularity``, ``grid_bits``, ``power_of_two_scales``, ``pin_zero``,
            ``refresh_every_n_steps``, ``max_entropy_bits``, ``codebook``, ``targets`` and
            ``overrides``.

    Logs ``nna/mracos_regularization/penalty`` (:math:`\sum R(w)`), ``…/strength``, and
    ``…/pull``: the norm of the regularizer's gradient relative to that of the loss, over the
    selected weights, in the last step. Adam divides a gradient by its root mean square, so that
    this ratio is what counts: far below 1 the regularizer moves nothing that the loss moves, far
    above 1 each weight goes to its nearest centroid whatever the loss.

    Raises:
        ValueError: If an argument is out of range, a pattern matches nothing, or a callback that
            shares the centroids was given other settings.
        FloatingPointError: If a weight is not finite.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_nna.callbacks import HardCompression
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> pull = MRACosRegularization(3, strength=1e-4, schedule={"start": 0.0, "end": 1.0})
        >>> squeeze = HardCompression(3, every_n_steps=2)
        >>> trainer = pl.Trainer(max_steps=4, callbacks=[pull, squeeze],
        ...     accelerator="cpu", logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(SmallRecurrentModule())
    """

    method = "mracos_regularization"

    def __init__(
        self,
        bits: int,
        *,
        strength: float = 1e-4,
        schedule: Schedule | Mapping[str, Any] | float = 1.0,
        scaled: bool = True,
        **settings: Unpack[S8BQATArguments],
    ) -> None:
        super().__init__(bits, **settings)
        if strength < 0:
            raise ValueError(f"strength must not be negative, got {strength}")
        self.strength, self.schedule = strength, Schedule.of(schedule)
        self.scaled = scaled
        # Norms of the regularizer's gradient and of the loss's in the last step, by tensor.
        self._norms: dict[str, tuple[Tensor, Tensor]] = {}

    @override
    @torch.no_grad()
    def step_begins(self, optimizer: Optimizer) -> None:
        factor = self._factor()
        if factor == 0:
            self._norms = {}
        require_finite_weights(self._parameters)
        stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self._parameters.items():
            if parameter.grad is None or id(parameter) not in stepping or factor == 0:
                continue
            pull = self._gradient(name, parameter).mul_(factor).to(parameter.grad.dtype)
            if parameter.grad.is_sparse:
                pull = pull.sparse_mask(parameter.grad.coalesce())
            self._norms[name] = (pull.norm(), parameter.grad.norm())
            parameter.grad = parameter.grad + pull

    @override
    def stepped(self) -> None:
        self.refresh()

    @override
    def forget(self) -> None:
        super().forget()
        self._norms = {}

    @override
    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        penalty = sum(float(self._penalty(n, p).sum()) for n, p in self._parameters.items())
        return {"penalty": penalty, "strength": self._factor(), "pull": self._relative_pull()}

    @override
    def missed(self) -> list[str]:
        now, last = self._factor(), self.strength * self.schedule.last
        # The schedule of a run in steps may end a step after it.
        reach = abs(last - self.strength * self.schedule.start)
        if abs(last - now) <= 0.01 * reach:
            return []
        return [f"the strength is {now:.3g}, not {last:.3g}"]

    def _relative_pull(self) -> float:
        """Norm of the regularizer's gradient relative to the loss's; 0 if either is 0."""
        pull, grad = (
            math.hypot(*(float(norms[which]) for norms in self._norms.values())) for which in (0, 1)
        )
        return pull / grad if grad else 0.0

    def _factor(self) -> float:
        return self.strength * self.schedule.at(self.steps, total=self._total_steps)

    def _penalty(self, name: str, weight: Tensor) -> Tensor:

        book = self.centroids[name].codebook
        units = to_grid_units(weight, book.scales)
        penalty = mracos(units, book.centroids, scaled=self.scaled)
        return from_grid_units(penalty, book.scales) if self.scaled else penalty

    def _gradient(self, name: str, weight: Tensor) -> Tensor:
        # A scale of 0.5 and grid units w / 0.5: arches of slope 1 keep it in both units; arches of
        # height 1 with slope 3 in grid units have slope 3 / 0.5 = 6 in the unit of the weights.
        book = self.centroids[name].codebook
        units = to_grid_units(weight, book.scales)
        slope = mracos_gradient(units, book.centroids, scaled=self.scaled)
        return slope if self.scaled else from_grid_units(slope, 1 / book.scales)
