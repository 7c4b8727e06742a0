"""``MRACosRegularization``: a pull of every weight towards its nearest centroid.

Reference:
    Zhen et al., "Sub-8-bit quantization aware training for 8-bit neural network accelerator with
    on-device speech recognition", Interspeech 2022, arXiv 2206.15408.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nna.non_finite import require_finite_weights
from lightning_nna.quantization.fixed_centroids import CentroidSettings
from lightning_nna.quantization.mracos import mracos, mracos_gradient
from lightning_nna.quantization.s8bqat import S8BQATMethod
from lightning_nna.schedule import Schedule
from lightning_nna.weights.codebook import in_steps, in_units
from lightning_nna.weights.selection import Granularity


class MRACosRegularization(S8BQATMethod):
    r"""Add the gradient of :math:`\lambda \sum R(w)` to that of the loss, in closed form.

    It is added when gradients are unscaled and accumulated, before they are clipped: the same as
    that of an explicit term of the loss, without its graph. It pulls; it does not compress: add
    :class:`.HardCompression` with the same bits, and the two share one set of centroids.

    Args:
        bits: Of every selected tensor, 1 to 8.
        strength: :math:`\lambda`; the regularizer is a sum over weights, and so is the gradient of
            a mean loss small beside it if this is large.
        schedule: Of a factor of ``strength`` over the run: a :class:`.Schedule` or its keys.
        scaled: Arches of slope 1, whatever their width; else of height 1.
        granularity: See :class:`.HardCompression`.
        grid_bits: See :class:`.HardCompression`.
        power_of_two_scales: See :class:`.HardCompression`.
        pin_zero: See :class:`.HardCompression`.
        refresh_every_n_steps: See :class:`.HardCompression`.
        max_entropy_bits: See :class:`.HardCompression`.
        targets: Globs or ``re:…`` on the names of parameters, or of modules that hold them.
        overrides: Bits by pattern, or the path of a JSON file with them.

    Logs ``nna/mracos/penalty`` (:math:`\sum R(w)`) and ``nna/mracos/strength``.

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

    method = "mracos"

    def __init__(
        self,
        bits: int,
        *,
        strength: float = 1e-4,
        schedule: Schedule | Mapping[str, Any] | float = 1.0,
        scaled: bool = True,
        granularity: Granularity = "tensor",
        grid_bits: int | None = 8,
        power_of_two_scales: bool = False,
        pin_zero: bool = False,
        refresh_every_n_steps: int = 0,
        max_entropy_bits: float | None = None,
        targets: Sequence[str] = ("*",),
        overrides: Mapping[str, int] | str | Path = {},  # noqa: B006
    ) -> None:
        settings = CentroidSettings(
            granularity,
            grid_bits,
            power_of_two_scales,
            pin_zero,
            refresh_every_n_steps,
            max_entropy_bits,
        )
        super().__init__(bits, settings=settings, targets=targets, overrides=overrides)
        if strength < 0:
            raise ValueError(f"strength must not be negative, got {strength}")
        self.strength, self.schedule = strength, Schedule.of(schedule)
        self.scaled = scaled

    @override
    @torch.no_grad()
    def step_begins(self, optimizer: Optimizer) -> None:
        factor = self._factor()
        require_finite_weights(self._parameters)
        stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self._parameters.items():
            if parameter.grad is None or id(parameter) not in stepping or factor == 0:
                continue
            pull = self._gradient(name, parameter).mul_(factor).to(parameter.grad.dtype)
            if parameter.grad.is_sparse:
                pull = pull.sparse_mask(parameter.grad.coalesce())
            parameter.grad = parameter.grad + pull

    @override
    def stepped(self) -> None:
        self.refresh()

    @override
    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        penalty = sum(float(self._penalty(n, p).sum()) for n, p in self._parameters.items())
        return {"penalty": penalty, "strength": self._factor()}

    @override
    def missed(self) -> list[str]:
        now, last = self._factor(), self.strength * self.schedule.last
        # The schedule of a run in steps may end a step after it.
        reach = abs(last - self.strength * self.schedule.start)
        if abs(last - now) <= 0.01 * reach:
            return []
        return [f"the strength is {now:.3g}, not {last:.3g}"]

    def _factor(self) -> float:
        return self.strength * self.schedule.at(self.steps, total=self._total_steps)

    def _penalty(self, name: str, weight: Tensor) -> Tensor:
        """In the unit of the weights where arches are scaled; arches of 1 have none."""
        book = self.centroids[name].codebook
        found = mracos(in_steps(weight, book.steps), book.levels, scaled=self.scaled)
        return in_units(found, book.steps) if self.scaled else found

    def _gradient(self, name: str, weight: Tensor) -> Tensor:
        book = self.centroids[name].codebook
        found = mracos_gradient(in_steps(weight, book.steps), book.levels, scaled=self.scaled)
        return found if self.scaled else in_units(found, 1 / book.steps)
