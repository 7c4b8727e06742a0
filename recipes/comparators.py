"""Methods of others that ours are compared with: PARQ of torchao, DKM, Lightning's pruning.

Reference:
    Cho et al., "DKM: differentiable k-means clustering layer for neural network compression",
    ICLR 2022, arXiv 2108.12659.
    Jin et al., "PARQ: piecewise-affine regularized quantization", ICML 2025, arXiv 2503.15748.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from typing_extensions import Unpack, override

from lightning_nna.quantization.transform_method import TransformMethod
from lightning_nna.weights.codebook import midpoints
from lightning_nna.weights.method import BitsArguments
from recipes import require_extra


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


class DKMTransform:
    """Attention of every weight to every centroid, as DKM has it, with autograd's gradient.

    Its memory is that of weights times centroids times iterations, from a forward to its backward.

    Args:
        weight: Weight whose quantiles are the first centroids, any shape.
        bits: Bits of an index, 1 to 8.
        iterations: Number of iterations of k-means in every step; DKM's own stop after five, or
            when nothing moves.
        temperature: Temperature of the attention, positive, in the variance of the weight over
            ``4**bits``: about the square of the distance of two centroids.

    Attributes:
        centroids: Centroids from which the next step starts, float32, shape ``(centroids,)``.
    """

    method = "differentiable_k_means"
    order = 1
    grid = None

    def __init__(
        self, weight: Tensor, bits: int, iterations: int = 1, temperature: float = 1.0
    ) -> None:
        flat = weight.detach().flatten()
        quantiles = (torch.arange(2**bits, device=flat.device) + 0.5) / 2**bits
        self.centroids = torch.quantile(flat, quantiles)
        # Of the first weight: that of a run does not follow the weights.
        self._temperature = temperature * float(flat.var()) / 4**bits
        self._iterations = iterations
        self._moved = self.centroids
        # Latent and clustered weight with the graph between them, until the step has its gradient.
        self._graph: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without the graph of a step."""
        return {**self.__dict__, "_graph": None}

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Replace weights by the mean of the centroids that they attend to; hard by the nearest."""
        if hard:
            ascending = self.centroids.sort().values
            return ascending[torch.bucketize(weight, midpoints(ascending))].to(weight.dtype)
        with torch.enable_grad():
            latent = weight.detach().clone().requires_grad_()
            flat, centroids = latent.flatten(), self.centroids
            for _ in range(self._iterations):
                distance = (flat[:, None] - centroids).square()
                attention = torch.softmax(-distance / self._temperature, 1)
                centroids = (flat @ attention) / attention.sum(0).clamp_min(1e-12)
            result = (attention @ centroids).view_as(weight)
        self._graph, self._moved = (latent, result), centroids.detach()
        return result.detach()

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Pull the gradient back through the graph."""
        assert self._graph is not None, "a forward comes before its backward"
        latent, result = self._graph
        self._graph = None
        (pulled,) = torch.autograd.grad(result, latent, grad)
        return pulled

    def advance(self) -> None:
        """Start the next step from the centroids of this one."""
        self.centroids = self._moved

    def state_dict(self) -> dict[str, Any]:
        """Return centroids and temperature."""
        return {"cluster_centers": self.centroids.clone(), "temperature": self._temperature}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace centroids and temperature by saved ones."""
        self.centroids = state["cluster_centers"].to(self.centroids.device, copy=True)
        self._moved, self._temperature = self.centroids, float(state["temperature"])


class DifferentiableKMeans(TransformMethod[DKMTransform]):
    """Train weights that are clustered by attention in every step (DKM); evaluation is hard.

    Args:
        bits: Bits of the index of a weight, 1 to 8, of every selected tensor.
        iterations: Number of iterations of k-means in every step, at least 1.
        temperature: Temperature of the attention, positive, see :class:`DKMTransform`.
        settings: Other arguments of :class:`.BitsMethod`: ``targets`` and ``overrides``.

    Raises:
        ValueError: If an argument is out of range, or a pattern matches nothing.

    Example:
        >>> DifferentiableKMeans(2, targets=["encoder"]).iterations
        5

    Differs from the paper: centroids start at quantiles, not at those of k-means++, and the
    temperature is relative to the variance of the tensor.
    """

    method = "differentiable_k_means"

    def __init__(
        self,
        bits: int,
        *,
        iterations: int = 5,
        temperature: float = 1.0,
        **settings: Unpack[BitsArguments],
    ) -> None:
        super().__init__(bits, **settings)
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.iterations, self.temperature = iterations, temperature

    @override
    def transform_of(self, name: str, parameter: nn.Parameter) -> DKMTransform:
        return DKMTransform(parameter, self.bits[name], self.iterations, self.temperature)

    @override
    def stepped(self) -> None:
        for transform in self._transforms.values():
            transform.advance()

    @override
    def metrics(self) -> dict[str, float]:
        """Return the number of centroids that weights are at, as a fraction of all."""
        used = [
            len(transform.apply(self._parameters[name].detach(), hard=True).unique())
            / len(transform.centroids)
            for name, transform in self._transforms.items()
        ]
        return {"used_centroids": sum(used) / len(used)}
