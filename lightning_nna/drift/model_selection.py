"""Which of several models is best now: comparisons by any estimator of the newest value.

The difference of two models' losses on the same examples is a series whose newest value says which
of them is better now; what both find hard cancels. A tournament compares in pairs, round by round,
so that :math:`k` models take :math:`k - 1` comparisons.

Reference:
    Han, Huang and Wang, "Model assessment and selection under temporal distribution shift", ICML
    2024, arXiv 2402.08672.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_nna.drift.estimate import Estimate, LatestEstimator
from lightning_nna.drift.wavelets import HaarEstimator


@dataclass(frozen=True)
class Comparison:
    """Two models, compared.

    Args:
        first: Number of the one.
        second: Number of the other.
        difference: Estimate of the first's newest risk minus the second's.
        winner: The better one; the first, if they are equal.
        certain: Whether the difference is beyond its radius.
    """

    first: int
    second: int
    difference: Estimate
    winner: int
    certain: bool


@dataclass(frozen=True)
class Tournament:
    """A model, and how it won.

    Args:
        winner: Its number.
        comparisons: In the order in which they were made.
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
        losses: Of each model on the same examples or periods, the newest last.
        first: Number of a model.
        second: Number of another.
        estimator: Of the newest difference; None for Haar with a constant of 0.5.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[0.1] * 9 + [0.9] * 9, [0.5] * 18])
        >>> compare(losses).winner
        1
    """
    estimator = HaarEstimator(constant=0.5) if estimator is None else estimator
    found = estimator.latest(losses[first] - losses[second])
    difference, radius = float(found.value), float(found.radius)
    winner = first if difference <= 0 else second
    return Comparison(first, second, found, winner, abs(difference) > radius)


def tournament(
    losses: Float[Tensor, "models n"], *, estimator: LatestEstimator | None = None
) -> Tournament:
    """Choose a model in rounds of comparisons; an odd one out goes on to the next.

    Args:
        losses: Of each model on the same examples or periods, the newest last.
        estimator: Of the newest difference; None for Haar with a constant of 0.5.

    Raises:
        ValueError: If there is no model.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[0.5] * 8, [0.1] * 4 + [0.9] * 4, [0.4] * 8])
        >>> found = tournament(losses)
        >>> found.winner, len(found.comparisons)
        (2, 2)
    """
    if not len(losses):
        raise ValueError("a tournament needs at least one model, got none")
    left, made = list(range(len(losses))), []
    while len(left) > 1:
        winners = []
        for first, second in zip(left[::2], left[1::2], strict=False):
            made.append(compare(losses, first, second, estimator=estimator))
            winners.append(made[-1].winner)
        left = winners + left[len(left) // 2 * 2 :]
    return Tournament(left[0], tuple(made))
