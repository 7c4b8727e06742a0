"""DKM: attention over centroids, which the cost of the weight methods is compared with.

Reference:
    Cho et al., "DKM: differentiable k-means clustering layer for neural network compression",
    ICLR 2022, arXiv 2108.12659.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DKMTransform:
    """Attention of every weight to every centroid, as DKM has it, with autograd's gradient.

    Args:
        weight: Weight whose quantiles are the first centroids, any shape.
        bits: Bits of a weight, 1 to 8.
        iterations: Iterations of k-means in every step; DKM iterates until nothing moves.
    """

    method = "DKM"
    order = 1
    grid = None

    def __init__(self, weight: Tensor, bits: int, iterations: int = 1) -> None:
        flat = weight.detach().flatten()
        self.centroids = torch.quantile(flat, (torch.arange(2**bits) + 0.5) / 2**bits)
        self._temperature = float(flat.var()) / 4**bits
        self._iterations = iterations
        self._latent, self._result = weight, weight

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Replace the weights by what attention computes; the graph stays for the backward."""
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
        """Pull the gradient back through the graph."""
        (pulled,) = torch.autograd.grad(self._result, self._latent, grad)
        return pulled
