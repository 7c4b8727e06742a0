r"""The instructions of a normalisation in one go, where nobody listens to them.

The integers are those of :mod:`.normalisation`'s sequence, bit for bit. Rows go through it in
blocks that stay in the processor's cache, and what a row has one of (mean, variance, factor) is
computed for all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lightning_nna.emulator.operators.call import Activation, Call
from lightning_nna.emulator.operators.elementwise import LEFT_SHIFT, product_factor
from lightning_nna.emulator.operators.reduction import average, mean_grid
from lightning_nna.emulator.operators.rescaling import RoundingKind, prepared
from lightning_nna.emulator.ranges import QParams, symmetric_qparams
from lightning_nna.functional.fixed_point import INT32_MAX
from lightning_nna.functional.interpolated_tables import (
    interpolate,
    interpolation_table,
    inverse_square_root,
)

#: Steps of the variance's grid that a straight line of the table cannot follow: two segments.
BLIND_STEPS = 256
# Elements at a time.
_BLOCK = 2**15

# Integers of some rows less the zero point, and which rows they are.
Step = Callable[[Tensor, slice], Tensor]


def fusible(call: Call, x: Activation, *parameters: Tensor | None) -> bool:
    """Whether every grid is known, and gain and shift belong to the program."""
    known = f"{call.site}/wide/normalised/output" in call.host.ranges
    constant = all(p is None or call.host.is_constant(p) for p in parameters)
    return known and constant and f"{call.site}/output" in call.host.ranges


def fused(
    call: Call,
    x: Activation,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: tuple[int, ...],
    eps: float,
    *,
    centred: bool,
) -> tuple[Tensor, QParams]:
    """The normalised activation and its grid.

    Args:
        call: The call.
        x: Any shape.
        weight: Gain, of the shape of the last axes, or None.
        bias: Shift, likewise.
        axes: The last axes, which are normalised together.
        eps: Added to the variance.
        centred: Whether the mean is taken off.
    """
    wide = call.part("wide", bits=16)
    first = x.value.dim() - len(axes)
    line = _Line(call, x, math.prod(x.value.shape[first:]))
    if centred:
        line.centre(wide)
    line.normalise(wide, eps)
    if varies_widely(wide):
        line.normalise(wide.part("again"), 0.0)
    if weight is not None:
        line.gain(wide.part("gain"), weight)
    if bias is not None:
        line.shift(wide.part("shift"), bias)
    y = grid_of(call)
    line.onto(y)
    return line.run().mul_(y.scale).view(x.value.shape), y


def grid_of(call: Call) -> QParams:
    """Grid of an instruction's output, which calibration has seen."""

    def never() -> Tensor:
        raise AssertionError(f"{call.site} was not calibrated")

    return call.output(never)


def varies_widely(call: Call) -> bool:
    """Whether calibration has seen variances that the table cannot follow."""
    seen = call.host.ranges[f"{call.site}/variance/output"]
    return seen.minimum < seen.maximum * BLIND_STEPS / 2**15


def inverse_root(call: Call, v: Tensor, grid: QParams) -> tuple[Tensor, QParams]:
    """RSQRT of 16-bit integers that are not negative: integers, float32, and their grid."""
    spec = call.host.spec
    largest = 1 / math.sqrt(BLIND_STEPS * grid.scale)
    y = symmetric_qparams(largest, bits=16, power_of_two=spec.power_of_two_scales)
    table = _inverse_table(grid.scale, y.scale, spec.table_entries or 512)
    return interpolate(table, v.long()).float(), y


@lru_cache(maxsize=256)
def _inverse_table(input_scale: float, output_scale: float, segments: int) -> Tensor:
    return interpolation_table(inverse_square_root, input_scale, output_scale, segments=segments)


class _Line:
    """Rows on their way through the instructions."""

    def __init__(self, call: Call, x: Activation, columns: int) -> None:
        self.call, self.grid = call, x.qparams.widened()
        self.rounding: RoundingKind = call.host.spec.rounding_of("double")
        self.dtype = torch.float64 if call.exact else torch.float32
        self.rows = (x.value.detach() / self.grid.scale).reshape(-1, columns)
        if not self.rows.is_cpu:
            self.rows.round_()
        self.steps: list[Step] = []

    def centre(self, wide: Call) -> None:
        """Take the mean off."""
        sums = self.rows.sum(1, keepdim=True, dtype=torch.float64)
        mean, grid = self._average(sums, grid_of(wide.part("mean")))
        self._add_sum(mean, grid, grid_of(wide.part("deviation")), -1.0)

    def normalise(self, call: Call, eps: float) -> None:
        """Divide by the root of the mean square and eps."""
        rows, square, variance = self.run(), call.part("square"), call.part("variance")
        y = grid_of(square)
        squares = self._product(self.grid, self.grid, y)
        sums = rows.new_empty((len(rows), 1), dtype=torch.float64)
        for at, block in self._blocks(rows):
            torch.sum(squares(block.mul_(block)), 1, keepdim=True, dtype=sums.dtype, out=sums[at])
        scaled, self.grid = self.grid, y
        v, v_grid = self._average(sums, grid_of(variance))
        self.grid = scaled
        if eps:
            v, v_grid = self._with_epsilon(call.part("epsilon"), v, v_grid, eps)
        factor, factor_grid = inverse_root(call, v, v_grid)
        factor = factor.to(self.dtype)
        y = grid_of(call.part("normalised"))
        product = self._product(self.grid, factor_grid, y)
        self._then(lambda block, at: product(block.mul_(factor[at])), y)

    def gain(self, call: Call, weight: Tensor) -> None:
        """Multiply by a constant for each column."""
        constant, y = call.constant(weight), grid_of(call)
        factors = constant.integers().flatten().to(self.dtype)
        product = self._product(self.grid, constant.qparams, y)
        self._then(lambda block, _: product(block.mul_(factors)), y)

    def shift(self, call: Call, bias: Tensor) -> None:
        """Add a constant for each column."""
        constant, y = call.constant(bias), grid_of(call)
        self._add_sum(constant.integers().view(1, -1), constant.qparams, y, 1.0)

    def onto(self, y: QParams) -> None:
        """Requantise."""
        rescaler = self._prepared(self.grid.scale / y.scale, float(self.grid.largest))
        if self.grid != y:
            self._then(lambda block, _: rescaler(block).clamp_(*y.bounds), y)

    def run(self) -> Tensor:
        """Put the rows through the steps so far; integers, float32, shape ``(rows, columns)``."""
        if self.steps:
            result = torch.empty_like(self.rows)
            for at, block in self._blocks(self.rows):
                for step in self.steps:
                    block = step(block, at)
                result[at] = block
            self.rows, self.steps = result, []
        return self.rows

    def _blocks(self, rows: Tensor) -> list[tuple[slice, Tensor]]:
        size = max(1, _BLOCK // rows.shape[1])
        starts = range(0, len(rows), size if rows.is_cpu else max(len(rows), 1))
        slices = [slice(start, start + starts.step) for start in starts]
        return ((at, rows[at].to(self.dtype, copy=True)) for at in slices)  # type: ignore

    def _then(self, step: Step, y: QParams) -> None:
        self.steps.append(step)
        self.grid = y

    def _prepared(self, factor: float, largest: float) -> Callable[[Tensor], Tensor]:
        return prepared(factor, self.rounding, largest, self.call.exact)

    def _product(self, a: QParams, b: QParams, y: QParams) -> Callable[[Tensor], Tensor]:
        largest = float(a.largest * b.largest)
        rescaler = self._prepared(product_factor(a, b, y), largest)
        return lambda products: rescaler(products).clamp_(*y.bounds)

    def _add_sum(self, other: Tensor, grid: QParams, y: QParams, sign: float) -> None:
        """Add a column or a row of integers on another grid."""
        first, second, last = self._sum(self.grid, grid, y)
        moved = second(other.to(self.dtype, copy=True))
        whole = len(other) == 1

        def step(block: Tensor, at: slice) -> Tensor:
            total = first(block).add_(moved if whole else moved[at], alpha=sign)
            return last(total).clamp_(*y.bounds)

        self._then(step, y)

    def _sum(self, a: QParams, b: QParams, y: QParams) -> list[Callable[[Tensor], Tensor]]:
        """What rescales the operands to their common grid, and the sum to its own."""
        shift = 2.0 ** LEFT_SHIFT[16]
        twice_coarser = 2 * max(a.scale, b.scale)
        last = self._prepared(twice_coarser / (shift * y.scale), INT32_MAX)
        if not self.call.exact:
            return [
                *(lambda x, s=q.scale: x.mul_(s * shift / twice_coarser).round_() for q in (a, b)),
                last,
            ]
        factors = [self._prepared(q.scale / twice_coarser, INT32_MAX) for q in (a, b)]
        return [*(lambda x, f=f: f(x.mul_(shift)) for f in factors), last]

    def _average(self, total: Tensor, y: QParams) -> tuple[Tensor, QParams]:
        """Means of the rows from their sums, float64, and their grid: ``y``, if not too fine."""
        count = self.rows.shape[1]
        y = mean_grid(self.call, self.grid, y)
        factor, largest = self.grid.scale / y.scale, float(count * self.grid.largest)
        return average(self.call, total, count, factor, largest).clamp_(*y.bounds), y

    def _with_epsilon(
        self, call: Call, v: Tensor, grid: QParams, eps: float
    ) -> tuple[Tensor, QParams]:
        constant, y = call.operand(eps, "other"), grid_of(call)
        first, second, last = self._sum(grid, constant.qparams, y)
        moved = second(constant.integers().to(self.dtype, copy=True))
        return last(first(v.to(self.dtype)).add_(moved)).clamp_(*y.bounds), y
