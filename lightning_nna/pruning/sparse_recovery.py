r"""Pruning as compressed sensing: the sparse weight that gives a layer's measurement back.

A layer with weight :math:`W` (rows are outputs) is measured on inputs :math:`a`. What a weight
:math:`X` gets wrong there depends on the inputs' second moment :math:`M = E[a a^T]` alone,

.. math:: \mathrm{nmse}(X) = \frac{\mathrm{tr}\,(X - W) M (X - W)^T}{\mathrm{tr}\, W M W^T},

so that neither activations nor anything of the shape (rows, columns, columns) is kept. The columns
are scaled to unit norm first, as is usual in sparse recovery: :math:`Y = X D`,
:math:`D^2 = \mathrm{diag} M`, :math:`V = W D`, :math:`N = D^{-1} M D^{-1}`. With a given sparsity a
support is found by the alternating direction method of multipliers,

.. math:: Y \leftarrow (V N + \rho (Z - U)) (N + \rho I)^{-1}, \quad
    Z \leftarrow P_s(Y + U), \quad U \leftarrow U + Y - Z,

with :math:`\rho` growing, so that :math:`Y` and the sparse :math:`Z` meet; or by iterative hard
thresholding, :math:`Y \leftarrow P_s(Y - (Y - V) N / L)`, :math:`L = \lambda_{max}(N)`. On the
support the weights are then fitted by least squares. With a penalty, FISTA solves
:math:`\min_X \tfrac12 \mathrm{tr}(X - W) M (X - W)^T + \lambda \sum |X|`.
Inputs that are nearly the same tend to keep or lose their weights together: neither solver breaks
their tie.

Reference:
    Zhen et al., "Compressed-sensing pruning", ICASSP 2021, arXiv 2102.04932; Blumensath and Davies,
    "Iterative hard thresholding for compressed sensing", Appl. Comput. Harmon. Anal. 27(3), 2009;
    Boyd et al., "Distributed optimization and statistical learning via the alternating direction
    method of multipliers", Found. Trends Mach. Learn. 3(1), 2011, section 9.1; Beck and Teboulle,
    "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging Sci. 2(1), 2009.

Differs from the paper: the measurement by second moments, the solvers and the refit are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softshrink

from lightning_nna.pruning.sparsity_pattern import SparsityPattern
from lightning_nna.pruning.support_fit import (
    descend_on_support,
    measurement_nmse,
    refit_on_support,
)

# Of the mean of the diagonal; keeps what was never measured in order.
_RIDGE = 1e-6
_POWER_ITERATIONS = 100
_SAFE = 1.02


@dataclass(frozen=True)
class SparseSolution:
    """A sparse weight.

    Args:
        weight: Weight with zeros, in the dtype of the dense one, shape ``(rows, columns)``.
        mask: Mask of that shape, bool: True for kept weights.
        nmse: Error of the layer's output over the output's power; 0 for a layer without power.
        iterations: Number of iterations of the solver.
    """

    weight: Float[Tensor, "rows columns"]
    mask: Bool[Tensor, "rows columns"]
    nmse: float
    iterations: int


@torch.no_grad()
def recover_sparse_weight(
    weight: Float[Tensor, "rows columns"],
    second_moment: Float[Tensor, "columns columns"] | None = None,
    *,
    sparsity: float | None = None,
    penalty: float | None = None,
    pattern: str | SparsityPattern = "unstructured",
    start: Bool[Tensor, "rows columns"] | None = None,
    refit: bool = True,
    exact: bool = True,
    solver: Literal["admm", "iht"] = "admm",
    max_iterations: int = 100,
    tolerance: float = 1e-5,
) -> SparseSolution:
    r"""Find the sparse weight that explains a layer's measurement best, as far as a solver can.

    The same input gives the same result; of equal candidates the first is kept.

    Args:
        weight: Dense weight, finite, shape ``(rows, columns)``.
        second_moment: :math:`E[a a^T]` of the layer's inputs; None for the identity, where the
            largest weights are kept. An input that never varied from zero counts almost nothing.
        sparsity: Fraction of zeros, in [0, 1); or
        penalty: :math:`\lambda` of the absolute values; of the norms of blocks, times the root of
            their size, with a pattern of blocks.
        pattern: Pattern of the zeros.
        start: A support to start from, for example that of the last call; the result is no worse
            than the best on it (supports are compared near their fits).
        refit: Fit the weights on the support by least squares.
        exact: ADMM goes on until the support stays, and the fit is by Cholesky's factors; else at
            most 10 iterations, and the fit by some steps of conjugate gradients: several times
            faster, with somewhat more error; a ``start`` takes the place of the largest weights.
        solver: Of a given sparsity: ``"admm"``, or ``"iht"`` for iterative hard thresholding, which
            is simpler and ends in poorer supports.
        max_iterations: Most iterations; 0 takes the largest weights, scaled by their inputs.
        tolerance: FISTA and IHT end when the weight changes by less than this fraction of itself.

    Raises:
        ValueError: If not one of ``sparsity`` and ``penalty`` is given, one of them is out of
            range, shapes do not fit, or the pattern cannot have a penalty.
        FloatingPointError: If the weight or the moment is not finite.

    Example:
        >>> inputs = torch.tensor([[1.0, 0.9], [0.0, 0.1]])   # The second follows the first.
        >>> moment = inputs.T @ inputs / 2
        >>> recover_sparse_weight(torch.tensor([[1.0, 1.0]]), moment, sparsity=0.5).weight
        tensor([[1.9000, 0.0000]])
    """
    zeros = SparsityPattern.of(pattern)
    _require_arguments(weight, second_moment, sparsity, penalty, zeros, solver)
    problem = _Problem.of(weight, second_moment)
    effort = _THOROUGH if exact else _QUICK
    settings = _Settings(solver, refit, effort, max_iterations, tolerance)
    if penalty is not None:
        return problem.penalized(zeros, penalty, settings)
    assert sparsity is not None, "one of the two was required"
    return problem.thresholded(zeros, sparsity, start, settings)


@dataclass(frozen=True)
class _Effort:
    """Effort of a recovery.

    Attributes:
        iterations: Greatest number of iterations of ADMM.
        first_rho: First weight of ADMM's penalty.
        rho_grows: Factor of that weight in each iteration.
        stayed: Number of iterations without change after which ADMM ends.
        compares: Number of steps of conjugate gradients that compare supports.
        fits: Number of further steps instead of the exact fit; 0 for the exact fit.
    """

    iterations: int
    first_rho: float
    rho_grows: float
    stayed: int
    compares: int
    fits: int


_THOROUGH = _Effort(iterations=1000, first_rho=0.03, rho_grows=1.1, stayed=10, compares=6, fits=0)
_QUICK = _Effort(iterations=10, first_rho=0.05, rho_grows=1.4, stayed=3, compares=3, fits=6)


@dataclass(frozen=True)
class _Settings:
    solver: str
    refit: bool
    effort: _Effort
    max_iterations: int
    tolerance: float


def _eigendecomposition(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a symmetric matrix into eigenvalues and eigenvectors.

    Single precision does not converge on many matrices with rows of zeros, which inputs that never
    fire leave; double precision does.
    """
    try:
        values, vectors = torch.linalg.eigh(moment)
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(moment.double())
    return values.to(moment.dtype), vectors.to(moment.dtype)


@dataclass(frozen=True)
class _Problem:
    """A weight, its measurement, and both with columns of unit norm.

    Attributes:
        target: The scaled weight times the scaled moment.
        power: Of the output.
    """

    weight: Tensor
    moment: Tensor | None
    scale: Tensor
    scaled_weight: Tensor
    scaled_moment: Tensor | None
    target: Tensor
    power: float

    @classmethod
    def of(cls, weight: Tensor, moment: Tensor | None) -> _Problem:
        w = weight.float()
        if moment is None or not bool(moment.any()):
            return cls(weight, None, torch.ones_like(w[0]), w, None, w, _sum(w * w))
        diagonal = moment.diagonal().double()
        scale = (diagonal + _RIDGE * diagonal.mean()).sqrt()
        scaled = (moment.double() / scale / scale[:, None]).float()
        v = w * scale.float()
        target = v @ scaled
        return cls(weight, moment, scale.float(), v, scaled, target, _sum(target * v))

    def gradient(self, y: Tensor) -> Tensor:
        """Of half the squared error, by the scaled weight."""
        away = y - self.scaled_weight
        return away if self.scaled_moment is None else away @ self.scaled_moment

    def nmse(self, y: Tensor) -> float:
        """Error of a scaled weight, over the power."""
        away = y - self.scaled_weight
        return max(_sum(self.gradient(y) * away), 0.0) / self.power if self.power > 0 else 0.0

    def thresholded(
        self,
        pattern: SparsityPattern,
        sparsity: float,
        start: Tensor | None,
        settings: _Settings,
    ) -> SparseSolution:
        """The best of the largest weights, the start, and what the solver finds."""
        shape = self.weight.shape[0], self.weight.shape[1]

        def support(y: Tensor) -> Tensor:
            return pattern.mask(pattern.importance_scores(y), sparsity, shape)

        effort, iterations = settings.effort, 0
        masks = []
        if start is None or effort is _THOROUGH:
            masks.append(support(self.scaled_weight))
        if start is not None:
            masks.append(self._within(pattern, sparsity, start))
        if self.scaled_moment is not None and settings.max_iterations > 0:
            solver = self.split if settings.solver == "admm" else self.descend
            mask, iterations = solver(support, masks[-1], settings)
            masks.append(mask)
        steps = effort.compares if settings.refit else 0
        fits = [self.fit(mask, steps) for mask in masks]
        errors = [self.nmse(fit) for fit in fits]
        best = errors.index(min(errors))
        return self.solution(masks[best], settings, iterations, fits[best])

    def fit(self, mask: Tensor, steps: int, start: Tensor | None = None) -> Tensor:
        """The scaled weight on a support, fitted by some steps of conjugate gradients."""
        if self.scaled_moment is None:
            return self.scaled_weight * mask
        return descend_on_support(
            self.scaled_weight, self.scaled_moment, mask, iterations=steps, start=start
        )

    def split(
        self, support: Callable[[Tensor], Tensor], start: Tensor, settings: _Settings
    ) -> tuple[Tensor, int]:
        """ADMM; ends when the support has stayed for some iterations."""
        assert self.scaled_moment is not None, "without a moment there is nothing to solve"
        v, effort = self.scaled_weight, settings.effort
        values, vectors = _eigendecomposition(self.scaled_moment)
        values.clamp_min_(0)  # Their rounding errors are far below rho.
        rho = effort.first_rho
        mask, z, u = start, v * start, torch.zeros_like(v)
        iteration = stayed = 0
        most = min(settings.max_iterations, effort.iterations)
        while iteration < most and stayed < effort.stayed:
            iteration += 1
            right = torch.add(self.target, z.sub_(u), alpha=rho)
            u += torch.linalg.multi_dot([right, vectors / (values + rho), vectors.T])
            moved = support(u)
            stayed = stayed + 1 if torch.equal(moved, mask) else 0
            mask = moved
            z = u * mask.view(torch.uint8).to(u.dtype)  # From truth values it takes longer.
            u -= z
            rho *= effort.rho_grows
        return mask, iteration

    def descend(
        self, support: Callable[[Tensor], Tensor], start: Tensor, settings: _Settings
    ) -> tuple[Tensor, int]:
        """Iterative hard thresholding; ends when the weight hardly changes."""
        y, mask = self.scaled_weight * start, start
        lipschitz = 1.0 if self.scaled_moment is None else _largest(self.scaled_moment)
        iteration = 0
        while iteration < settings.max_iterations:
            iteration += 1
            moved = y - self.gradient(y) / lipschitz
            mask = support(moved)
            moved *= mask
            change = float((moved - y).norm() / moved.norm().clamp_min(1e-30))
            y = moved
            if change < settings.tolerance:
                break
        return mask, iteration

    def penalized(
        self, pattern: SparsityPattern, penalty: float, settings: _Settings
    ) -> SparseSolution:
        """FISTA in the unit of the weights: the penalty is on these."""
        moment = self.moment
        largest = 1.0 if moment is None else _largest(moment.float())
        w = self.weight.float()
        x, ahead, momentum = w.clone(), w, 1.0
        iterations = 0
        for _ in range(settings.max_iterations):
            iterations += 1
            away = ahead - w
            gradient = away if moment is None else away @ moment.float()
            moved = _shrink(ahead - gradient / largest, pattern, penalty / largest)
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = moved + (momentum - 1) / following * (moved - x)
            change = float((moved - x).norm() / moved.norm().clamp_min(1e-30))
            x, momentum = moved, following
            if change < settings.tolerance:
                break
        mask = x != 0
        if settings.refit:
            return self.solution(mask, settings, iterations)
        nmse = measurement_nmse(self.weight, x, moment)
        return SparseSolution(x.to(self.weight.dtype), mask, nmse, iterations)

    def solution(
        self, mask: Tensor, settings: _Settings, iterations: int, start: Tensor | None = None
    ) -> SparseSolution:
        """The weight on a support, whose fit may have begun."""
        if settings.refit and settings.effort.fits:
            y = self.fit(mask, settings.effort.fits, start)
            sparse = (y / self.scale).to(self.weight.dtype)
            return SparseSolution(sparse, mask, self.nmse(y), iterations)
        if settings.refit and self.moment is not None:
            sparse = refit_on_support(self.weight, self.moment, mask).to(self.weight.dtype)
        else:
            sparse = self.weight.masked_fill(~mask, 0.0)
        nmse = measurement_nmse(self.weight, sparse, self.moment)
        return SparseSolution(sparse, mask, nmse, iterations)

    def _within(self, pattern: SparsityPattern, sparsity: float, start: Tensor) -> Tensor:
        """Select a support of the wanted size that contains the first one, or lies in it."""
        # Units of the start come first, by their scores; then the others.
        importance_scores = pattern.importance_scores(self.scaled_weight)
        inside = pattern.importance_scores(start.to(importance_scores.dtype)) > 0
        raised = importance_scores + inside * (importance_scores.max() + 1.0)
        return pattern.mask(raised, sparsity, (start.shape[0], start.shape[1]))


def _sum(x: Tensor) -> float:
    return float(x.sum(dtype=torch.float64))


def _shrink(x: Tensor, pattern: SparsityPattern, threshold: float) -> Tensor:
    """Soft thresholding of weights, or of the norms of blocks."""
    importance_scores = pattern.importance_scores(x)
    if importance_scores.shape == x.shape:
        return softshrink(x, threshold)
    high, wide = x.shape[0] // importance_scores.shape[0], x.shape[1] // importance_scores.shape[1]
    norms = importance_scores.sqrt()
    root = (high * wide) ** 0.5
    factor = (1 - threshold * root / norms.clamp_min(1e-30)).clamp_min_(0)
    return x * factor.repeat_interleave(high, 0).repeat_interleave(wide, 1)


def _largest(moment: Tensor) -> float:
    """Largest eigenvalue by power iteration, a little above it rather than below."""
    generator = torch.Generator(moment.device).manual_seed(0)
    vector = torch.rand(len(moment), generator=generator, device=moment.device) + 0.5
    value = 0.0
    for _ in range(_POWER_ITERATIONS):
        product = moment @ vector
        before, value = value, float(product.norm() / vector.norm())
        vector = product / product.norm().clamp_min(1e-30)
        if abs(value - before) <= 1e-5 * value:
            break
    return max(value * _SAFE, 1e-30)


def _require_arguments(
    weight: Tensor,
    moment: Tensor | None,
    sparsity: float | None,
    penalty: float | None,
    pattern: SparsityPattern,
    solver: str,
) -> None:
    if (sparsity is None) == (penalty is None):
        raise ValueError(f"give one of sparsity and penalty, got {sparsity} and {penalty}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    if penalty is not None and not penalty >= 0:
        raise ValueError(f"penalty must not be negative, got {penalty}")
    if solver not in ("admm", "iht"):
        raise ValueError(f"solver must be 'admm' or 'iht', got {solver!r}")
    if penalty is not None and pattern.group:
        raise ValueError(f"pattern {pattern.name!r} has no penalty: give its sparsity")
    pattern.require_fit((weight.shape[0], weight.shape[1]))
    if moment is not None and moment.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"second_moment has shape {list(moment.shape)}, a weight of {weight.shape[1]} columns "
            f"needs {[weight.shape[1]] * 2}"
        )
    for name, tensor in (("weight", weight), ("second_moment", moment)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(f"{name} is not finite")
