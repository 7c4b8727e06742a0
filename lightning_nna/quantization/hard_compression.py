"""``HardCompression``: weights are moved to their centroids again and again, until they stay.

Reference:
    Zhen et al., "Sub-8-bit quantization aware training for 8-bit neural network accelerator with
    on-device speech recognition", Interspeech 2022, arXiv 2206.15408.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_nna.non_finite import require_finite_weights
from lightning_nna.quantization.s8bqat import S8BQATArguments, S8BQATMethod
from lightning_nna.schedule import require_end, require_time, step_of
from lightning_nna.weights.pipeline import WeightTransform

#: Names of running means of the gradient in the state of optimizers.
_MOMENTA = ("exp_avg", "momentum_buffer")


class HardCompression(S8BQATMethod):
    """Every so many steps, move each selected weight to its nearest Lloyd-Max centroid.

    Centroids are fitted to the weights when the run starts, and stay. In evaluation weights are at
    their centroids in every step; when ``fit`` ends they are left there. With ``trainer.test``
    alone this rounds a trained model.

    Args:
        bits: Bits of the index of a weight, 1 to 8, of every selected tensor.
        every_n_steps: Number of optimizer steps from one compression to the next.
        start_step: Time of the first compression: a step (int) or a fraction of the run (float).
        momentum: Treatment of the optimizer's running mean of the gradient when weights have
            jumped: ``"keep"`` it, since it is still the gradient's, or ``"reset"`` it to zero, so
            that no weight is carried on from before. Means of squares are kept in any case.
        settings: Shared arguments of :class:`.CodebookMethod` and :class:`.S8BQATMethod`:
            ``granularity``, ``grid_bits``, ``power_of_two_scales``, ``pin_zero``,
            ``refresh_every_n_steps``, ``max_entropy_bits``, ``codebook``, ``targets`` and
            ``overrides``.

    Logs ``nna/hard_compression/distance`` (root of the mean square of the distance of weights
    and centroids, relative to the weights; mean over tensors), ``…/distance_max``,
    ``…/compressions`` and ``…/changed``: the fraction of weights that went to another centroid in
    the last compression than in the one before. Where it stays near 0, the steps between two
    compressions are too few, or too small, for a weight to reach the next region: each compression
    undoes what was learned since the one before, and only what is not compressed is trained.

    Raises:
        ValueError: If an argument is out of range, a pattern matches nothing, or a callback that
            shares the centroids was given other settings.
        FloatingPointError: If a weight is not finite.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_nna.testing import SmallRecurrentModule
        >>> module = SmallRecurrentModule()
        >>> trainer = pl.Trainer(max_steps=4, callbacks=[HardCompression(3, every_n_steps=2)],
        ...     accelerator="cpu", logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module)
        >>> len(module.lstm.weight_hh_l0.unique()) <= 8
        True
    """

    method = "hard_compression"

    def __init__(
        self,
        bits: int,
        *,
        every_n_steps: int = 100,
        start_step: int | float = 0,
        momentum: Literal["keep", "reset"] = "keep",
        **settings: Unpack[S8BQATArguments],
    ) -> None:
        super().__init__(bits, **settings)
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        require_time("start_step", start_step)
        if momentum not in ("keep", "reset"):
            raise ValueError(f"momentum must be 'keep' or 'reset', got {momentum!r}")
        self.every_n_steps, self.start_step = every_n_steps, start_step
        self.momentum = momentum
        self.compressions = 0
        # Step of the last compression; None before the first.
        self._compressed: int | None = None
        # Indices of the centroids in the last compression, by name.
        self._indices: dict[str, Tensor] = {}
        self._changed = 0.0

    @override
    def transforms(self) -> dict[str, WeightTransform]:
        return {**self.centroids}

    @override
    @torch.no_grad()
    def stepped(self) -> None:
        self.refresh()
        if self.steps < self._due():
            return
        self.compressions += 1
        self._compressed = self.steps
        require_finite_weights(self._parameters)  # It would become a centroid.
        before, self._indices = self._indices, {}
        for name, parameter in self._parameters.items():
            book = self.centroids[name].codebook
            self._indices[name] = book.indices(parameter).to(torch.uint8)
            parameter.copy_(book.project(parameter))
            if self.momentum == "reset":
                self._forget(parameter)
        self._changed = _fraction_changed(before, self._indices)

    @override
    def missed(self) -> list[str]:
        if self.compressions:
            return []
        return [
            f"the first compression is at step {self._due():.0f} (start_step, every_n_steps), so "
            f"that weights were compressed 0 times before they were deployed"
        ]

    @override
    def forget(self) -> None:
        super().forget()
        self.compressions, self._compressed = 0, None
        self._indices, self._changed = {}, 0.0

    @override
    def metrics(self) -> dict[str, float]:
        distances = [
            centroids.soft_hard_gap(self._parameters[name])
            for name, centroids in self.centroids.items()
        ]
        return {
            "distance": sum(distances) / len(distances),
            "distance_max": max(distances),
            "compressions": float(self.compressions),
            "changed": self._changed,
        }

    @override
    def state_dict(self) -> dict[str, object]:
        own = {
            "compressions": self.compressions,
            "compressed": self._compressed,
            "indices": dict(self._indices),
            "changed": self._changed,
        }
        return {**super().state_dict(), **own}

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        super().load_state_dict(state_dict)
        self.compressions = int(str(state_dict["compressions"]))
        compressed = state_dict.get("compressed")
        self._compressed = None if compressed is None else int(str(compressed))
        # Checkpoints of earlier versions have neither.
        self._indices = dict(state_dict.get("indices", {}))  # type: ignore[call-overload]
        self._changed = float(str(state_dict.get("changed", 0.0)))

    @override
    def located(self) -> None:
        require_end("start_step", self.start_step, self._total_steps)

    def _due(self) -> float:
        """Return the step of the next compression; infinite without an end of the run."""
        start = step_of(self.start_step, self._total_steps)
        start = round(start) if math.isfinite(start) else start
        if self._compressed is None:
            return start or self.every_n_steps
        return max(start, self._compressed + self.every_n_steps)

    def _forget(self, parameter: Tensor) -> None:
        for optimizer in self._optimizers:
            for name in _MOMENTA:
                mean = optimizer.state.get(parameter, {}).get(name)
                if mean is not None:
                    mean.zero_()


def _fraction_changed(before: dict[str, Tensor], now: dict[str, Tensor]) -> float:
    """Compute the fraction of weights with another index than before; 0 without indices before."""
    changed = sum(
        int((index != before[name].to(index.device)).sum())
        for name, index in now.items()
        if name in before
    )
    return changed / max(sum(index.numel() for index in now.values()), 1)
