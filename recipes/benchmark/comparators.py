r"""What the weight methods are compared with: uniform levels, PARQ of torchao, DKM.

Uniform levels of :math:`b` bits are :math:`s\,q` with whole :math:`q` in
:math:`[-2^{b-1}, 2^{b-1} - 1]` (±1/2 for one bit), one step :math:`s` a tensor, which starts where
the mean square error of rounding is least. The step stays there (rounding, and straight-through
training), or is learned with the gradient of LSQ.

Reference:
    Esser et al., "Learned step size quantization", ICLR 2020, arXiv 1902.08153.
    Cho et al., "DKM: differentiable k-means clustering layer for neural network compression",
    ICLR 2022, arXiv 2108.12659.
    Jin et al., "PARQ: piecewise-affine regularized quantization", ICML 2025, arXiv 2503.15748.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor
from typing_extensions import override

from lightning_nna.emulation.arithmetic.quantized_weight import round_significands
from lightning_nna.keyed_adam import KeyedAdam
from lightning_nna.weights.method import BitsMethod
from lightning_nna.weights.pipeline import Stage, WeightGrid
from recipes import require_extra

_MAXIMUM = 127


class UniformStage:
    """Uniform levels on the chip's grid; straight-through, with LSQ's gradient of the step.

    Args:
        weight: Whose rounding error sets the first step.
        bits: 1 to 8.

    Attributes:
        step_log2: Logarithm to base 2 of the distance of two levels; trained.
    """

    method = "uniform levels"
    place = 1

    def __init__(self, weight: Tensor, bits: int) -> None:
        half = float(2 ** (bits - 1))
        self.low: float = -half if bits > 1 else -0.5
        self.high: float = half - 1 if bits > 1 else 0.5
        # So many of the grid's steps lie between two levels: the chip holds each of them exactly.
        self._fine = max(1, int(_MAXIMUM / -self.low))
        self.step_log2 = torch.tensor([math.log2(self._best_step(weight.detach().float()))])

    @property
    def grid(self) -> WeightGrid:
        """The chip's grid."""
        step = torch.exp2(self.step_log2.detach().double()) / self._fine
        return WeightGrid(round_significands(step).float(), _MAXIMUM)

    def transform(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Every weight at its level."""
        return self._levels(weight) * (self.grid.steps * self._fine)

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """1 between the ends and 0 beyond; the gradient of the step is left with it."""
        v = weight / (self.grid.steps * self._fine)
        inside = (v >= self.low) & (v <= self.high)
        levels = self._levels(weight)
        slope = torch.where(inside, levels - v, levels) * grad
        factor = math.log(2) / math.sqrt(v.numel() * max(self.high, 0.5))
        self.step_log2.grad = slope.sum().reshape(1) * self.grid.steps * self._fine * factor
        return grad * inside

    def _levels(self, weight: Tensor) -> Tensor:
        v = weight / (self.grid.steps * self._fine)
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


class DKMStage:
    """Attention of every weight to every centroid, as DKM has it, with autograd's gradient.

    Args:
        weight: Whose quantiles are the first centroids.
        bits: 1 to 8.
        iterations: Of k-means in every step; DKM iterates until nothing moves.
    """

    method = "DKM"
    place = 1
    grid = None

    def __init__(self, weight: Tensor, bits: int, iterations: int = 1) -> None:
        flat = weight.detach().flatten()
        self.centroids = torch.quantile(flat, (torch.arange(2**bits) + 0.5) / 2**bits)
        self._temperature = float(flat.var()) / 4**bits
        self._iterations = iterations
        self._latent, self._result = weight, weight

    def transform(self, weight: Tensor, *, hard: bool) -> Tensor:
        """What attention makes of the weights; its graph is kept."""
        with torch.enable_grad():
            self._latent = weight.detach().clone().requires_grad_()
            flat, centroids = self._latent.flatten(), self.centroids
            for _ in range(self._iterations):
                distance = (flat[:, None] - centroids).square()
                attention = torch.softmax(-distance / self._temperature, 1)
                centroids = (flat @ attention) / attention.sum(0).clamp_min(1e-12)
            self._result = (attention @ centroids).view_as(weight)
        self.centroids = centroids.detach()
        return self._result.detach()

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Through the graph."""
        (found,) = torch.autograd.grad(self._result, self._latent, grad)
        return found


class UniformQuantization(BitsMethod):
    """Train with uniform levels, straight-through.

    Args:
        bits: Of every selected tensor, 1 to 8.
        learned: Whether steps are learned (LSQ).
        scale_lr: Learning rate of the logarithms of the steps.
        targets: As of the weight methods.
        overrides: As of the weight methods.
    """

    method = "uniform"

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
        self._stages: dict[str, UniformStage] = {}
        self._saved: dict[str, Tensor] = {}

    @override
    def stages(self) -> dict[str, Stage]:
        return {**self._stages}

    @override
    def prepare(self) -> None:
        self._stages = {n: UniformStage(p, self.bits[n]) for n, p in self._parameters.items()}
        for name, step in self._saved.items():
            self._stages[name].step_log2 = step.clone()

    @override
    def stepped(self) -> None:
        steps = {name: stage.step_log2 for name, stage in self._stages.items()}
        if self.learned:
            self._adam.update(steps)
        self._adam.zero_grad(steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        steps = {name: stage.step_log2.detach() for name, stage in self._stages.items()}
        return {**super().state_dict(), "step_log2": steps or self._saved}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = dict(state_dict["step_log2"])
        for name, stage in self._stages.items():
            stage.step_log2 = self._saved[name].clone()


def parq(
    parameters: Iterable[Tensor],
    *,
    bits: int,
    total_steps: int,
    **adamw: Any,
) -> torch.optim.Optimizer:
    """PARQ of torchao around AdamW, for every weight of two axes or more.

    Args:
        parameters: Of the module.
        bits: 1 to 8.
        total_steps: Steps of the run; values are hard from 80 % of it on.
        adamw: Settings of ``torch.optim.AdamW``.

    Raises:
        ImportError: If torchao is missing; names the extra that has it.
    """
    require_extra("bench", "torchao")
    from torchao.prototype.parq import LSBQuantizer, ProxPARQ, QuantOptimizer, UnifQuantizer

    class AfterClosure(QuantOptimizer):
        """With the closure before the step: the forward is to see the quantized weights."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            super().step()
            return loss

    parameters = list(parameters)
    wide = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": wide, "quant_bits": bits}, {"params": others}]
    # As its authors have it: least-squares levels for one and two bits, uniform ones from three.
    quantizer = LSBQuantizer() if bits <= 2 else UnifQuantizer()
    prox = ProxPARQ(anneal_start=0, anneal_end=int(0.8 * total_steps), steepness=10)
    optimizer: torch.optim.Optimizer = AfterClosure(
        torch.optim.AdamW(groups, **adamw), quantizer, prox, quant_period=10
    )
    return optimizer


def model_pruning(amount: float) -> ModelPruning:
    """Lightning's ``ModelPruning``, applied once, after the first epoch.

    Applied in every epoch it would prune what is left again; of the modules it prunes those whose
    parameters are named ``weight`` and ``bias``.

    Args:
        amount: Share of zeros.
    """
    return ModelPruning(
        "l1_unstructured", amount=amount, apply_pruning=lambda epoch: epoch == 0, verbose=1
    )
