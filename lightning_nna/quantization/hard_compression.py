"""``HardCompression``: weights are put onto few values, again and again, until they stay there.

Reference:
    Zhen et al., "Sub-8-bit quantization aware training for 8-bit neural network accelerator with
    on-device speech recognition", Interspeech 2022, arXiv 2206.15408.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nna.non_finite import require_finite_weights
from lightning_nna.quantization.fixed_centroids import CentroidSettings
from lightning_nna.quantization.s8bqat import S8BQATMethod
from lightning_nna.schedule import require_time, step_of
from lightning_nna.weights.pipeline import Stage
from lightning_nna.weights.selection import Granularity

#: Running means of the gradient, by the names that optimizers give them.
_MOMENTA = ("exp_avg", "momentum_buffer")


class HardCompression(S8BQATMethod):
    """Every so many steps, move each selected weight to its nearest Lloyd-Max centroid.

    Centroids are found when the run starts, from the weights as they are then, and stay. In
    evaluation weights are at their centroids, whatever the step; when ``fit`` ends they are left
    there. With ``trainer.test`` alone this rounds a trained model.

    Args:
        bits: Of every selected tensor, 1 to 8.
        every_n_steps: Optimizer steps from one compression to the next.
        start_step: The first one: a step (int) or a share of the run (float).
        momentum: What becomes of the optimizer's running mean of the gradient when weights have
            jumped: ``"keep"`` it, since it is still the gradient's, or ``"reset"`` it to zero, so
            that no weight is carried on from before. Means of squares are kept in any case.
        granularity: A scale for the ``"tensor"``, or for each ``"channel"`` as far as the chip's
            operators can have them; values are those of the tensor in any case.
        grid_bits: Centroids lie on the chip's grid of that many bits; None for anywhere.
        power_of_two_scales: Scales of the grid are powers of two, as chips without multiplier need.
        pin_zero: One centroid is zero; not with 1 bit, which needs one of either sign.
        refresh_every_n_steps: Find centroids anew every so many optimizer steps; 0 for never.
        max_entropy_bits: Greatest mean entropy of a tensor's indices, in bits a weight: values are
            then those of :func:`.entropy_constrained`, which a chip that codes its weights reads in
            fewer bytes. It is that of the weights as centroids are found. Tensors that
            ``overrides`` gives other bits than ``bits`` keep Lloyd-Max values; None for all of
            them.
        targets: Globs or ``re:…`` on the names of parameters, or of modules that hold them.
        overrides: Bits by pattern, or the path of a JSON file with them.

    Logs ``nna/hard_compression/distance`` (root of the mean square of what lies between weights
    and centroids, relative to the weights; mean over tensors), ``…/distance_max`` and
    ``…/compressions``.

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
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        require_time("start_step", start_step)
        if momentum not in ("keep", "reset"):
            raise ValueError(f"momentum must be 'keep' or 'reset', got {momentum!r}")
        self.every_n_steps, self.start_step = every_n_steps, start_step
        self.momentum = momentum
        self.compressions = 0
        # Step of the last one; None before the first.
        self._compressed: int | None = None

    @override
    def stages(self) -> dict[str, Stage]:
        return {**self.centroids}

    @override
    @torch.no_grad()
    def stepped(self) -> None:
        self.refresh()
        if self.steps < self._due():
            return
        self.compressions += 1
        self._compressed = self.steps
        require_finite_weights(self._parameters)  # What is not would become a centroid.
        for name, parameter in self._parameters.items():
            parameter.copy_(self.centroids[name].codebook.project(parameter))
            if self.momentum == "reset":
                self._forget(parameter)

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

    @override
    def figures(self) -> dict[str, float]:
        distances = [
            centroids.soft_hard_gap(self._parameters[name])
            for name, centroids in self.centroids.items()
        ]
        return {
            "distance": sum(distances) / len(distances),
            "distance_max": max(distances),
            "compressions": float(self.compressions),
        }

    @override
    def state_dict(self) -> dict[str, object]:
        own = {"compressions": self.compressions, "compressed": self._compressed}
        return {**super().state_dict(), **own}

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        super().load_state_dict(state_dict)
        self.compressions = int(str(state_dict["compressions"]))
        compressed = state_dict.get("compressed")
        self._compressed = None if compressed is None else int(str(compressed))

    def _due(self) -> float:
        """Step of the next compression."""
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
