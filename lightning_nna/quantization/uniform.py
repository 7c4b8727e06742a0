r"""``UniformQuantization``: uniform centroids, trained straight-through or with LSQ.

Centroids of :math:`b` bits are :math:`s\,q` with whole :math:`q` in :math:`[-2^{b-1}, 2^{b-1} - 1]`
(±1/2 for one bit), with one distance :math:`s` a tensor, which starts where the mean square error
of rounding is least. The distance stays there (straight-through), or is learned with the gradient
of LSQ.

Reference:
    Esser et al., "Learned step size quantization", ICLR 2020, arXiv 1902.08153.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nna.emulation.arithmetic.quantized_weight import round_significands
from lightning_nna.keyed_adam import KeyedAdam
from lightning_nna.weights.method import BitsMethod
from lightning_nna.weights.pipeline import WeightGrid, WeightTransform

_MAXIMUM = 127


class UniformTransform:
    """Round a weight to uniform levels; straight-through, with LSQ's gradient of their distance.

    Args:
        weight: Whose rounding error sets the first step.
        bits: 1 to 8.

    Attributes:
        scale_log2: Logarithm to base 2 of the distance of two levels; trained.
    """

    method = "uniform_quantization"
    order = 1

    def __init__(self, weight: Tensor, bits: int) -> None:
        half = float(2 ** (bits - 1))
        self.low: float = -half if bits > 1 else -0.5
        self.high: float = half - 1 if bits > 1 else 0.5
        # So many of the grid's steps lie between two levels: the chip holds each of them exactly.
        self._fine = max(1, int(_MAXIMUM / -self.low))
        self.scale_log2 = torch.tensor([math.log2(self._best_step(weight.detach().float()))])

    @property
    def grid(self) -> WeightGrid:
        """The chip's grid."""
        step = torch.exp2(self.scale_log2.detach().double()) / self._fine
        return WeightGrid(round_significands(step).float(), _MAXIMUM)

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Every weight at its level."""
        return self._centroid_of(weight) * (self.grid.scales * self._fine)

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """1 between the ends and 0 beyond; the gradient of the step is left with it."""
        v = weight / (self.grid.scales * self._fine)
        inside = (v >= self.low) & (v <= self.high)
        q = self._centroid_of(weight)
        slope = torch.where(inside, q - v, q) * grad
        factor = math.log(2) / math.sqrt(v.numel() * max(self.high, 0.5))
        self.scale_log2.grad = slope.sum().reshape(1) * self.grid.scales * self._fine * factor
        return grad * inside

    def _centroid_of(self, weight: Tensor) -> Tensor:
        v = weight / (self.grid.scales * self._fine)
        if self.high == 0.5:
            return torch.where(v > 0, 0.5, -0.5)
        return v.round().clamp_(self.low, self.high)

    def _best_step(self, weight: Tensor) -> float:
        widest = float(weight.abs().max()) / max(self.high, 0.5)
        errors = {}
        for share in torch.linspace(0.05, 1.0, 96).tolist():
            step = widest * share
            v = weight / step
            q = torch.where(v > 0, 0.5, -0.5) if self.high == 0.5 else v.round()
            errors[step] = float((q.clamp_(self.low, self.high) * step - weight).square().mean())
        return min(errors, key=lambda step: errors[step])


class UniformQuantization(BitsMethod):
    """Train with uniform levels, straight-through.

    Args:
        bits: Of every selected tensor, 1 to 8.
        learned: Whether steps are learned (LSQ).
        scale_lr: Learning rate of the logarithms of the steps.
        targets: As of the weight methods.
        overrides: As of the weight methods.
    """

    method = "uniform_quantization"

    def __init__(
        self,
        bits: int,
        *,
        learned: bool,
        scale_lr: float = 0.003,
        targets: Sequence[str] = ("*",),
        overrides: Mapping[str, int] | str = {},
    ) -> None:
        super().__init__(bits, targets=targets, overrides=overrides)
        self.learned = learned
        self._adam = KeyedAdam(scale_lr)
        self._transforms: dict[str, UniformTransform] = {}
        self._saved: dict[str, Tensor] = {}

    @override
    def transforms(self) -> dict[str, WeightTransform]:
        return {**self._transforms}

    @override
    def prepare(self) -> None:
        self._transforms = {
            n: UniformTransform(p, self.bits[n]) for n, p in self._parameters.items()
        }
        for name, step in self._saved.items():
            self._transforms[name].scale_log2 = step.clone()

    @override
    def stepped(self) -> None:
        steps = {name: transform.scale_log2 for name, transform in self._transforms.items()}
        if self.learned:
            self._adam.update(steps)
        self._adam.zero_grad(steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        steps = {
            name: transform.scale_log2.detach() for name, transform in self._transforms.items()
        }
        return {**super().state_dict(), "scale_log2": steps or self._saved}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["scale_log2"])
        for name, transform in self._transforms.items():
            transform.scale_log2 = self._saved[name].clone()
