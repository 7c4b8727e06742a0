r"""The values that a weight may take: centroids on an integer grid, times a scale.

A weight of :math:`b` bits takes :math:`2^b` values,

.. math:: \hat w = s_g\, n_k, \qquad n_1 \le \dots \le n_K,\quad |n_k| \le n_{max},

with one set of levels :math:`n_k` for the whole tensor and a step :math:`s_g` for the tensor or for
each group of its rows. Where levels are whole numbers, the chip holds them as they are: it reads
:math:`b` bits a weight and multiplies in 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import (
    largest_scales,
    powers_of_two,
    round_significands,
)
from lightning_nna.quantization.entropy_constrained import entropy_constrained
from lightning_nna.quantization.lloyd_max import lloyd_max, snap_to_grid
from lightning_nna.weights.pipeline import Stage, WeightGrid


@dataclass(frozen=True)
class Codebook:
    """Levels, where one gives way to the next, and steps.

    Args:
        levels: Ascending, in units of the step; equal ones are one value.
        thresholds: ``levels - 1`` borders between neighbors; a weight on a border takes the lower.
        steps: One positive step a group of rows.
        grid_bits: Levels are integers of that many bits; None if they need not be.
    """

    levels: Float[Tensor, " levels"]
    thresholds: Float[Tensor, " borders"]
    steps: Float[Tensor, " groups"]
    grid_bits: int | None = 8

    @classmethod
    def fit(
        cls,
        weight: Float[Tensor, "rows *rest"],
        bits: int,
        *,
        groups: int = 1,
        grid_bits: int | None = 8,
        power_of_two_scales: bool = False,
        pin_zero: bool = False,
        max_entropy_bits: float | None = None,
    ) -> Codebook:
        """The Lloyd-Max codebook of a trained weight, or the best one of a given entropy.

        Args:
            weight: Finite weights.
            bits: Of an index, 1 to 8.
            groups: Scales, a divisor of the rows.
            grid_bits: See :class:`Codebook`.
            power_of_two_scales: Round steps up to powers of two.
            pin_zero: Let one level be exactly zero.
            max_entropy_bits: Greatest entropy of the indices, in bits a weight, before levels are
                put on the grid; None for Lloyd-Max levels.

        Example:
            >>> book = Codebook.fit(torch.tensor([[-1.0, -0.9, 0.5, 0.6]]), bits=1)
            >>> book.project(torch.tensor([[-2.0, 0.1]])).round(decimals=3)
            tensor([[-0.9530,  0.5510]])
        """
        steps = steps_of(weight, groups, grid_bits=grid_bits, power_of_two=power_of_two_scales)
        scaled = in_steps(weight, steps)
        levels = best_levels(scaled, bits, pin_zero=pin_zero, max_entropy_bits=max_entropy_bits)
        if grid_bits is not None:
            levels = snap_to_grid(levels, 1.0, maximum=maximum_of(grid_bits))
        return cls(levels, middles(levels), steps, grid_bits)

    @property
    def grid(self) -> WeightGrid | None:
        """Where the values lie, for the chip."""
        if self.grid_bits is None:
            return None
        return WeightGrid(self.steps, maximum_of(self.grid_bits))

    @property
    def centroids(self) -> Float[Tensor, "groups levels"]:
        """Every value that a weight of each group may take, in the unit of the weights."""
        return self.steps[:, None] * self.levels

    def indices(self, weight: Float[Tensor, "rows *rest"]) -> Int[Tensor, "rows *rest"]:
        """The level of every weight, int64."""
        return torch.bucketize(in_steps(weight, self.steps), self.thresholds)

    def project(self, weight: Float[Tensor, "rows *rest"]) -> Float[Tensor, "rows *rest"]:
        """Every weight at its level. Twice is the same as once."""
        return in_units(self.levels[self.indices(weight)], self.steps).to(weight.dtype)

    def packed_bytes(self, weight: Tensor, bits: int) -> int:
        """Size of indices, levels (a byte each) and steps (four bytes each)."""
        return -(-weight.numel() * bits // 8) + 2**bits + 4 * len(self.steps)


@runtime_checkable
class CodebookStage(Stage, Protocol):
    """A stage whose hard weights are those of a codebook."""

    #: Of an index.
    bits: int

    @property
    def codebook(self) -> Codebook:
        """The values as they are deployed."""

    def soft_hard_gap(self, weight: Tensor) -> float:
        """What lies between the weight the method trains with and the deployed one.

        Root of its mean square, relative to that of the weight.
        """


def best_levels(
    weight: Float[Tensor, "..."], bits: int, *, pin_zero: bool, max_entropy_bits: float | None
) -> Float[Tensor, " levels"]:
    """The levels of the least squared error, of a given entropy if there is one.

    Args:
        weight: What is to be quantized.
        bits: Of an index.
        pin_zero: Whether one level is exactly zero.
        max_entropy_bits: Greatest entropy of the indices, in bits a weight; None for any.

    Example:
        >>> weight = torch.linspace(-1, 1, 1001).pow(3)
        >>> best_levels(weight, 2, pin_zero=False, max_entropy_bits=None)
        tensor([-0.7450, -0.2980,  0.0335,  0.6258])
    """
    if max_entropy_bits is None:
        return lloyd_max(weight, 2**bits, pin_zero=pin_zero).centroids
    return entropy_constrained(
        weight, 2**bits, max_entropy_bits=max_entropy_bits, pin_zero=pin_zero
    ).centroids


def relative_gap(weight: Tensor, away: Tensor) -> float:
    """Root of the mean square of ``away``, relative to that of a weight; 0 for a weight of zeros.

    Example:
        >>> relative_gap(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]))
        0.2
    """
    power = float(weight.detach().float().square().mean())
    return (float(away.detach().float().square().mean()) / power) ** 0.5 if power > 0 else 0.0


def steps_of(
    weight: Tensor, groups: int, *, grid_bits: int | None, power_of_two: bool = False
) -> Float[Tensor, " groups"]:
    """Steps with which the largest weight of each group is the largest integer."""
    flat = weight.detach().float().reshape(groups, -1)
    return largest_scales(flat, maximum=maximum_of(grid_bits or 8), power_of_two=power_of_two)


def narrowed(steps: Tensor, share: float, power_of_two: bool) -> Float[Tensor, " groups"]:
    """Steps with which that share of the range is the largest integer, or a little more.

    Example:
        >>> narrowed(torch.tensor([1.0]), 0.3, True)
        tensor([0.5000])
    """
    wanted = steps.double() * share
    if power_of_two:
        return powers_of_two(wanted).float()
    return round_significands(wanted).float()


def in_steps(weight: Tensor, steps: Tensor) -> Tensor:
    """A weight in units of its steps, float32."""
    return (weight.detach().float().reshape(len(steps), -1) / steps[:, None]).reshape(weight.shape)


def in_units(scaled: Tensor, steps: Tensor) -> Tensor:
    """What :func:`in_steps` divided, multiplied again."""
    return (scaled.reshape(len(steps), -1) * steps[:, None]).reshape(scaled.shape)


def maximum_of(grid_bits: int) -> int:
    """Largest integer of a symmetric grid.

    Example:
        >>> maximum_of(8)
        127
    """
    return int(2 ** (grid_bits - 1) - 1)


def middles(levels: Tensor) -> Tensor:
    """Borders half-way between neighbors."""
    return (levels[1:] + levels[:-1]) / 2
