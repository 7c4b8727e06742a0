"""Selection of the model that is best now, by any estimator of the newest value.

The difference of two models' losses on the same examples is a series whose newest value tells which
of them is better now; the difficulty of the examples cancels. A tournament compares in pairs, round
by round, so that :math:`k` models take :math:`k - 1` comparisons.

Reference:
    Han, Huang and Wang, "Model assessment and selection under temporal distribution shift", ICML
    2024, arXiv 2402.08672.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_nna.drift.estimators import Estimate, LatestEstimator
from lightning_nna.drift.wavelets import HaarEstimator


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models.

    Args:
        first: Number of the one model.
        second: Number of the other model.
        difference: Estimate of the first's newest risk minus the second's, in the unit of the
            losses.
        winner: Number of the better model; the first, if they are equal.
        certain: Whether the difference is beyond its radius.
    """

    first: int
    second: int
    difference: Estimate
    winner: int
    certain: bool


@dataclass(frozen=True)
class Tournament:
    """The best model, and the comparisons that it won.

    Args:
        winner: Number of the model.
        comparisons: Comparisons, in their order.
    """

    winner: int
    comparisons: tuple[Comparison, ...]


def compare(
    losses: Float[Tensor, "models n"],
    first: int = 0,
    second: int = 1,
    *,
    estimator: LatestEstimator | None = None,
) -> Comparison:
    """Compare two models by their newest risks.

    Args:
        losses: Losses of each model on the same examples or periods, shape ``(models, n)``, the
            newest last.
        first: Number of a model.
        second: Number of another.
        estimator: Estimator of the newest difference; None for Haar with a constant of 0.5.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[0.1] * 9 + [0.9] * 9, [0.5] * 18])
        >>> compare(losses).winner
        1
    """
    estimator = HaarEstimator(constant=0.5) if estimator is None else estimator
    estimate = estimator.latest(losses[first] - losses[second])
    difference, radius = float(estimate.value), float(estimate.radius)
    winner = first if difference <= 0 else second
    return Comparison(first, second, estimate, winner, abs(difference) > radius)


def tournament(
    losses: Float[Tensor, "models n"], *, estimator: LatestEstimator | None = None
) -> Tournament:
    """Select a model in rounds of comparisons; an odd one out goes on to the next.

    Args:
        losses: Losses of each model on the same examples or periods, shape ``(models, n)``, the
            newest last.
        estimator: Estimator of the newest difference; None for Haar with a constant of 0.5.

    Raises:
        ValueError: If there is no model.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[0.5] * 8, [0.1] * 4 + [0.9] * 4, [0.4] * 8])
        >>> result = tournament(losses)
        >>> result.winner, len(result.comparisons)
        (2, 2)
    """
    if not len(losses):
        raise ValueError("a tournament needs at least one model, got none")
    left: list[int] = list(range(len(losses)))
    comparisons: list[Comparison] = []
    while len(left) > 1:
        winners = []
        for first, second in zip(left[::2], left[1::2], strict=False):
            comparisons.append(compare(losses, first, second, estimator=estimator))
            winners.append(comparisons[-1].winner)
        left = winners + left[len(left) // 2 * 2 :]
    return Tournament(left[0], tuple(comparisons))
