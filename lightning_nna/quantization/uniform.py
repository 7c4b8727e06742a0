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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from lightning_nna.emulation.arithmetic.quantized_weight import round_significands
from lightning_nna.keyed_adam import KeyedAdam
from lightning_nna.quantization.transform_method import TransformMethod
from lightning_nna.weights.method import BitsArguments
from lightning_nna.weights.pipeline import WeightGrid

_MAXIMUM = 127


class UniformTransform:
    """Round a weight to uniform centroids; straight-through, with LSQ's gradient of their distance.

    Args:
        weight: Weight, any shape, finite, whose rounding error sets the first distance.
        bits: Bits of an index, 1 to 8.

    Attributes:
        scale_log2: Logarithm to base 2 of the distance of two centroids, shape ``(1,)``; trained.
    """

    method = "uniform_quantization"
    order = 1

    def __init__(self, weight: Tensor, bits: int) -> None:
        half = float(2 ** (bits - 1))
        self.low: float = -half if bits > 1 else -0.5
        self.high: float = half - 1 if bits > 1 else 0.5
        # Number of 8-bit integers from one centroid to the next, so that each centroid is one: with
        # 3 bits, q is -4 to 3 and centroids are -124, -93, ..., 93.
        self._fine = max(1, int(_MAXIMUM / -self.low))
        self.scale_log2 = torch.tensor([math.log2(self._best_distance(weight.detach().float()))])

    @property
    def grid(self) -> WeightGrid:
        """Quantization parameters of the quantized weight, 8-bit integers."""
        distance = torch.exp2(self.scale_log2.detach().double())
        return WeightGrid(round_significands(distance / self._fine).float(), _MAXIMUM)

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Move every weight to its centroid, in training, too."""
        return self._centroid_of(weight) * self._distance

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Pass the gradient within the range, zero it outside; assign that of the distance."""
        v = weight / self._distance
        inside = (v >= self.low) & (v <= self.high)
        q = self._centroid_of(weight)
        # LSQ: d(q s)/ds is q - v inside and q outside. With s = 0.5, a weight 0.7 has v = 1.4,
        # q = 1 and adds -0.4 times its gradient.
        slope = torch.where(inside, q - v, q) * grad
        factor = math.log(2) / math.sqrt(v.numel() * max(self.high, 0.5))
        self.scale_log2.grad = slope.sum().reshape(1) * self.grid.scales * self._fine * factor
        return grad * inside

    def state_dict(self) -> dict[str, Any]:
        """Return the distance."""
        return {"scale_log2": self.scale_log2.detach().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the distance by a saved one."""
        self.scale_log2 = state["scale_log2"].to(self.scale_log2.device, copy=True)

    @property
    def _distance(self) -> Tensor:
        return self.grid.scales * self._fine

    def _centroid_of(self, weight: Tensor) -> Tensor:
        v = weight / self._distance
        if self.high == 0.5:
            return torch.where(v > 0, 0.5, -0.5)
        return v.round().clamp_(self.low, self.high)

    def _best_distance(self, weight: Tensor) -> float:
        widest = float(weight.abs().max()) / max(self.high, 0.5)
        errors = {}
        for fraction in torch.linspace(0.05, 1.0, 96).tolist():
            distance = widest * fraction
            v = weight / distance
            q = torch.where(v > 0, 0.5, -0.5) if self.high == 0.5 else v.round()
            rounded = q.clamp_(self.low, self.high) * distance
            errors[distance] = float((rounded - weight).square().mean())
        return min(errors, key=lambda distance: errors[distance])


class UniformQuantization(TransformMethod[UniformTransform]):
    """Train with uniform centroids, straight-through; with LSQ if their distance is learned.

    Args:
        bits: Bits of the index of a weight, 1 to 8, of every selected tensor.
        learned: Whether distances are learned (LSQ).
        scale_lr: Learning rate of the logarithms to base 2 of the distances.
        settings: Other arguments of :class:`.BitsMethod`: ``targets`` and ``overrides``.

    Logs ``nna/uniform_quantization/distance``, the mean distance of two centroids over tensors.

    Raises:
        ValueError: If an argument is out of range, or a pattern matches nothing.

    Example:
        >>> UniformQuantization(4, learned=True, targets=["encoder"]).learned
        True

    Differs from the paper: the logarithm of the distance is learned, by an Adam of its own.
    """

    method = "uniform_quantization"

    def __init__(
        self,
        bits: int,
        *,
        learned: bool,
        scale_lr: float = 0.003,
        **settings: Unpack[BitsArguments],
    ) -> None:
        super().__init__(bits, **settings)
        self.learned = learned
        self._adam = KeyedAdam(scale_lr)

    @override
    def transform_of(self, name: str, parameter: nn.Parameter) -> UniformTransform:
        return UniformTransform(parameter, self.bits[name])

    @override
    def learn(self) -> None:
        scales = {name: transform.scale_log2 for name, transform in self._transforms.items()}
        if self.learned:
            self._adam.update(scales)
        self._adam.zero_grad(scales)

    @override
    def metrics(self) -> dict[str, float]:
        distances = [
            float(torch.exp2(one.scale_log2.detach())) for one in self._transforms.values()
        ]
        return {"distance": sum(distances) / len(distances)}

    @override
    def forget(self) -> None:
        super().forget()
        self._adam.load_state_dict({})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "adam": self._adam.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._adam.load_state_dict(state_dict["adam"])
