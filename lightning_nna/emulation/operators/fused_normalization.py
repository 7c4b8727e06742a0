r"""The instructions of a normalization in one go, where nobody listens to them.

In exact fidelity the integers are those of :mod:`.normalization`'s sequence, bit for bit. Rows go
through it in blocks that stay in the processor's cache, and what a row has one of (mean, variance,
factor) is computed for all rows together. In fast fidelity every 16-bit instruction rounds once, in
float32: its second rounding would be a thousand times finer. What a row has one of stays exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.device_tables import on_device_of
from lightning_nna.emulation.arithmetic.fixed_point import INT32_MAX
from lightning_nna.emulation.arithmetic.integer_roots import inverse_roots
from lightning_nna.emulation.arithmetic.interpolated_tables import (
    interpolate,
    interpolation_table,
    inverse_square_root,
)
from lightning_nna.emulation.arithmetic.on_host import on_host
from lightning_nna.emulation.arithmetic.rescaling import RoundingKind, prepared
from lightning_nna.emulation.clipping import Clipped
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.elementwise import (
    LEFT_SHIFT,
    grid_of_sum,
    product_factor,
    sum_factors,
)
from lightning_nna.emulation.operators.reduction import average, mean_grid, mean_multiplier
from lightning_nna.emulation.operators.tables import look_up
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams, not_finite, symmetric_qparams
from lightning_nna.emulation.spec import NNASpec

#: Steps of the variance's grid that a straight line of the table cannot follow: two segments.
BLIND_STEPS = 256
# Elements at a time, and the same where they are float32.
_BLOCK = 2**15
_FLOAT32_BLOCK = 2**17

# Integers of some rows less the zero point, and which rows they are.
Step = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Gains:
    """Places of the gains and shifts among the rows that are normalized.

    Args:
        groups: Rows after which the gains repeat themselves.
        channels: Channels of a row, each of which has one gain; 0 for one gain an element.

    Example:
        >>> Gains(groups=2, channels=2).table(torch.arange(4), 4)
        tensor([[0, 0, 1, 1],
                [2, 2, 3, 3]])
    """

    groups: int = 1
    channels: int = 0

    def table(self, parameter: Tensor, columns: int) -> Tensor:
        """Spread a parameter to the rows of a period, shape ``(groups, columns or 1)``."""
        if not self.channels:
            return parameter.reshape(1, -1)
        if self.channels == 1:
            return parameter.reshape(-1, 1)
        shape = self.groups, self.channels, columns // self.channels
        return parameter.reshape(*shape[:2], 1).expand(shape).reshape(self.groups, columns)

    def by_channel(self, rows: Tensor) -> Tensor:
        """View rows ``(batch, groups, columns)`` as ``(batch, all channels, …)``."""
        return rows.view(len(rows), self.groups * self.channels, -1) if self.channels else rows

    def parameter(self, parameter: Tensor) -> Tensor:
        """View a parameter so that it broadcasts against what :meth:`by_channel` returns."""
        return parameter.view(-1, 1) if self.channels else parameter

    def of_rows(self, table: Tensor, first: int, count: int) -> Tensor:
        """Select what the rows from ``first`` on take from a table, shape ``(count or 1, …)``."""
        if self.groups == 1:
            return table
        return table[torch.arange(first, first + count, device=table.device) % self.groups]


#: One gain for every element of a row, the same in all rows.
ELEMENTWISE = Gains()


def fusible(call: Call, x: Activation, *parameters: Tensor | None) -> bool:
    """Tell whether all parameters are known, and gain and shift belong to the program."""
    known = f"{call.site}/wide/normalized/output" in call.state.ranges
    constant = all(p is None or call.state.constants.is_constant(p) for p in parameters)
    return known and constant and f"{call.site}/output" in call.state.ranges


def fused(
    call: Call,
    x: Activation,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: tuple[int, ...],
    eps: float,
    gains: Gains = ELEMENTWISE,
    *,
    centered: bool,
) -> tuple[Tensor, QParams, Tensor | None]:
    """The normalized activation, its grid, and what was clipped to it (see :func:`.clip`).

    Args:
        call: The call.
        x: Any shape.
        weight: Gain, of a shape that ``gains`` tells, or None.
        bias: Shift, likewise.
        axes: The last axes, which are normalized together.
        eps: Added to the variance.
        gains: Places of gain and shift; elementwise, they have the shape of the last axes.
        centered: Whether the mean is taken off.
    """
    columns = math.prod(x.value.shape[x.value.dim() - len(axes) :])
    # A sum of more integers may overflow, which is counted between the instructions.
    if runs_kernel("normalize_rows", x.value) and columns < 2**16:
        return _by_kernel(call, x, weight, bias, columns, eps, gains, centered)
    if not call.exact:
        return _in_float32(call, x, weight, bias, columns, eps, gains, centered)
    wide = call.child("wide", bits=16)
    line = _Line(call, x, columns, gains)
    if centered:
        line.center(wide)
    line.normalize(wide, eps)
    if varies_widely(wide):
        line.normalize(wide.child("again"), 0.0)
    if weight is not None:
        line.gain(wide.child("gain"), weight)
    if bias is not None:
        line.shift(wide.child("shift"), bias)
    y = grid_of(call)
    clipped = line.onto(y)
    result = line.run().mul_(y.scale).view(x.value.shape)
    return result, y, clipped.joined()


def grid_of(call: Call) -> QParams:
    """Grid of an instruction's output, which calibration has seen."""

    def never() -> Tensor:
        raise AssertionError(f"{call.site} was not calibrated")

    return call.output(never)


def varies_widely(call: Call) -> bool:
    """Tell whether calibration has seen variances that the table cannot follow."""
    return spreads_widely(call.child("variance"))


def spreads_widely(call: Call) -> bool:
    """Tell whether calibration has seen outputs of a call that the table cannot follow."""
    variances = call.state.ranges[f"{call.site}/output"]
    return variances.minimum < variances.maximum * BLIND_STEPS / 2**15


def inverse_root(call: Call, v: Tensor, grid: QParams) -> tuple[Tensor, QParams]:
    """RSQRT of 16-bit integers that are not negative: integers, float32, and their grid."""
    table, y = _table_of_roots(call.state.spec, grid)
    if table.is_floating_point():
        return look_up(on_device_of(v, table), v.int()).clamp_max_(y.bounds[1]), y
    return interpolate(table, v.long()).float(), y


def _table_of_roots(spec: NNASpec, grid: QParams) -> tuple[Tensor, QParams]:
    """The table of RSQRT for an input's grid: all results, float32, or ends of segments, int64."""
    largest = 1 / math.sqrt(BLIND_STEPS * grid.scale)
    y = symmetric_qparams(largest, bits=16, power_of_two=spec.power_of_two_scales)
    if spec.runtime == "tflm":
        return inverse_roots(grid.bounds[1], grid.scale, y.scale), y
    return _inverse_table(grid.scale, y.scale, spec.table_entries or 512), y


@lru_cache(maxsize=256)
def _inverse_table(input_scale: float, output_scale: float, segments: int) -> Tensor:
    return interpolation_table(inverse_square_root, input_scale, output_scale, segments=segments)


def _by_kernel(
    call: Call,
    x: Activation,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: int,
    eps: float,
    gains: Gains,
    centered: bool,
) -> tuple[Tensor, QParams, Tensor | None]:
    """The same by a kernel, exact in fast fidelity, too."""
    row = _RowFactors(call.child("wide", bits=16), x.qparams.widened(), columns)
    if centered:
        row.center()
    row.normalize(row.call, eps)
    if varies_widely(row.call):
        row.normalize(row.call.child("again"), 0.0)
    of_gain = () if weight is None else row.gain(weight)
    of_shift = () if bias is None else row.shift(bias)
    y = grid_of(call)
    factors = kernels.Normalization(
        scale=x.qparams.widened().scale,
        rounding=call.state.spec.rounding_of("double"),
        means=row.means,
        center=row.of_center,
        normalize=row.of_normalize,
        epsilon=row.of_epsilon,
        gain=of_gain,
        shift=of_shift,
        output=() if row.grid == y else (row.grid.scale / y.scale,),
    )
    low, high = y.bounds
    values, clipped = kernels.normalize_rows(
        x.value.detach().reshape(-1, columns),
        None if weight is None else weight.detach().flatten(),
        None if bias is None else bias.detach().flatten(),
        [on_device_of(x.value, table) for table in row.tables],
        factors,
        groups=gains.groups,
        channels=gains.channels or columns,
        low=low,
        high=high,
        out_scale=y.scale,
        fused_relu=y.fused_relu,
    )
    return values.view(x.value.shape), y, clipped


class _RowFactors:
    """Factors of the instructions that a row goes through, for :class:`.Normalization`."""

    def __init__(self, call: Call, entered: QParams, columns: int) -> None:
        self.call, self.grid, self.columns = call, entered, columns
        self.tables: list[Tensor] = []
        self.means: list[int] = []
        self.of_center: tuple[float, ...] = ()
        self.of_epsilon: tuple[float, ...] = ()
        self.of_normalize: list[float] = []

    def center(self) -> None:
        """Take the mean off."""
        factor, mean = self._mean(self.call.child("mean"), self.grid)
        y = grid_of_sum(self.grid, mean, grid_of(self.call.child("deviation")))
        self.of_center = factor, *sum_factors(self.grid, mean, y)
        self.grid = y

    def normalize(self, call: Call, eps: float) -> None:
        """Divide by the root of the mean square and eps."""
        spec, squares = call.state.spec, grid_of(call.child("square"))
        square = product_factor(self.grid, self.grid, squares, spec)
        factor, variance = self._mean(call.child("variance"), squares)
        if eps:
            part = call.child("epsilon")
            constant = part.operand(eps, "other")
            y = grid_of_sum(variance, constant.qparams, grid_of(part))
            integer = float(constant.integers())
            self.of_epsilon = integer, *sum_factors(variance, constant.qparams, y)
            variance = y
        table, roots = _table_of_roots(spec, variance)
        self.tables.append(table)
        y = grid_of(call.child("normalized"))
        self.of_normalize += [square, factor, product_factor(self.grid, roots, y, spec)]
        self.grid = y

    def gain(self, weight: Tensor) -> tuple[float, ...]:
        """Multiply by constants."""
        call = self.call.child("gain")
        constant, y = _grid_of_constant(call, weight), grid_of(call)
        factor = product_factor(self.grid, constant, y, call.state.spec)
        self.grid = y
        return constant.scale, factor

    def shift(self, bias: Tensor) -> tuple[float, ...]:
        """Add constants."""
        call = self.call.child("shift")
        constant = _grid_of_constant(call, bias)
        y = grid_of_sum(self.grid, constant, grid_of(call))
        factors = sum_factors(self.grid, constant, y)
        self.grid = y
        return constant.scale, *factors

    def _mean(self, call: Call, x: QParams) -> tuple[float, QParams]:
        """Factor of the sum of a row, and the mean's grid."""
        y = mean_grid(call, x, grid_of(call))
        factor = x.scale / y.scale
        self.means += mean_multiplier(factor, self.columns)
        return factor / self.columns, y


def _grid_of_constant(call: Call, x: Tensor) -> QParams:
    """Quantization parameters of a constant of any shape, symmetric."""
    largest = call.magnitude(x)
    if not math.isfinite(largest):
        raise FloatingPointError(not_finite("a constant", -largest, largest))
    return symmetric_qparams(
        largest, bits=call.bits, power_of_two=call.state.spec.power_of_two_scales
    )


def _in_float32(
    call: Call,
    x: Activation,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: int,
    eps: float,
    gains: Gains,
    centered: bool,
) -> tuple[Tensor, QParams, Tensor | None]:
    """The same with one rounding an instruction, in float32."""
    wide = call.child("wide", bits=16)
    program = _Float32(wide, x.qparams.widened(), columns, eps, centered)
    gain, shift = (None if p is None else _constant(wide, p) for p in (weight, bias))
    factors, shifts = (None if p is None else gains.table(p.value, columns) for p in (gain, shift))
    y = grid_of(call)
    rows = x.value.detach().reshape(-1, columns)
    result = torch.empty_like(rows)
    size = max(1, _FLOAT32_BLOCK // columns) if on_host(rows) else max(len(rows), 1)
    clipped, first = Clipped(keep=True), 0
    for source, target in zip(rows.split(size), result.split(size), strict=True):
        normalized, grid = program(source)
        if factors is not None:
            of_rows = gains.of_rows(factors, first, len(source))
            normalized, grid = program.scaled(normalized, grid, of_rows)
        if shift is not None and shifts is not None:
            of_rows = gains.of_rows(shifts, first, len(source))
            normalized, grid = program.shifted(normalized, grid, of_rows, shift.qparams)
        rescaler = prepared(
            grid.scale / y.scale, program.rounding, float(grid.largest), exact=False
        )
        moved = normalized if grid == y else rescaler(normalized)
        torch.mul(clipped.clip(moved, y, first * columns), y.scale, out=target)
        first += len(source)
    return result.view(x.value.shape), y, clipped.joined()


def _constant(call: Call, x: Tensor) -> Activation:
    """A constant without a gradient; see :meth:`.Call.constant`."""
    x, grid = x.detach(), _grid_of_constant(call, x)
    return Activation((x / grid.scale).round_().mul_(grid.scale), grid, constant=True)


class _Float32:
    """A block of rows through the instructions, in float32; integers of 16 bits in between."""

    def __init__(
        self, wide: Call, entered: QParams, columns: int, eps: float, centered: bool
    ) -> None:
        self.call, self.entered, self.columns = wide, entered, columns
        self.centered = centered
        self.rounding: RoundingKind = wide.state.spec.rounding_of("double")
        self.passes = [(wide, eps)]
        if varies_widely(wide):
            self.passes.append((wide.child("again"), 0.0))

    def __call__(self, rows: Tensor) -> tuple[Tensor, QParams]:
        """Center and normalize rows of values: integers and their grid."""
        if self.centered:
            entered, y = self.entered, grid_of(self.call.child("deviation"))
            total = rows.sum(1, keepdim=True, dtype=torch.float64).div_(entered.scale).round_()
            mean, grid = _mean(self.call.child("mean"), total, self.columns, entered)
            y = grid_of_sum(entered, grid, y)
            centers = mean.mul_(-grid.scale / y.scale).float()
            integers = torch.add(centers, rows, alpha=1 / y.scale).round_().clamp_(*y.bounds)
        else:
            integers, y = rows / self.entered.scale, self.entered
        for call, eps in self.passes:
            squares = grid_of(call.child("square"))
            rounded = torch.mul(integers, integers).mul_(y.scale**2 / squares.scale).round_()
            total = rounded.clamp_(max=squares.bounds[1]).sum(1, keepdim=True, dtype=torch.float64)
            factor, grid = _factor(call, total, self.columns, squares, eps)
            after = grid_of(call.child("normalized"))
            integers.mul_(factor.mul_(y.scale * grid.scale / after.scale))
            integers.round_().clamp_(*after.bounds)
            y = after
        return integers, y

    def scaled(self, integers: Tensor, grid: QParams, gain: Tensor) -> tuple[Tensor, QParams]:
        """Multiply by real values that broadcast."""
        y = grid_of(self.call.child("gain"))
        return integers.mul_(gain * (grid.scale / y.scale)).round_().clamp_(*y.bounds), y

    def shifted(
        self, integers: Tensor, grid: QParams, shift: Tensor, constant: QParams
    ) -> tuple[Tensor, QParams]:
        """Add real values that broadcast, constants with parameters of their own."""
        y = grid_of_sum(grid, constant, grid_of(self.call.child("shift")))
        total = torch.add(shift / y.scale, integers, alpha=grid.scale / y.scale, out=integers)
        return total.round_().clamp_(*y.bounds), y


def _mean(call: Call, total: Tensor, count: int, x: QParams) -> tuple[Tensor, QParams]:
    """Means of rows from the sums of their integers, float64, exact, and their grid."""
    y = mean_grid(call, x, grid_of(call))
    largest = float(count * x.largest)
    return average(call, total, count, x.scale / y.scale, largest).clamp_(*y.bounds), y


def _factor(
    call: Call, total: Tensor, count: int, squares: QParams, eps: float
) -> tuple[Tensor, QParams]:
    """The inverse root of rows' mean squares from the squares' sums: integers and their grid."""
    variance, grid = _mean(call.child("variance"), total, count, squares)
    if eps:
        part = call.child("epsilon")
        constant = part.operand(eps, "other")
        y = grid_of_sum(grid, constant.qparams, grid_of(part))
        first, second, last = _sum(call, grid, constant.qparams, y)
        raised = first(variance).add_(second(constant.integers().double()))
        variance, grid = last(raised).clamp_(*y.bounds), y
    return inverse_root(call.child("inverse"), variance, grid)


def _sum(call: Call, a: QParams, b: QParams, y: QParams) -> list[Callable[[Tensor], Tensor]]:
    """Rescalers of the operands of a sum to their common scale, and of the sum to its own."""
    rounding: RoundingKind = call.state.spec.rounding_of("double")
    shift = 2.0 ** LEFT_SHIFT[16]
    *factors, last = (prepared(each, rounding, INT32_MAX) for each in sum_factors(a, b, y))
    return [*(lambda x, f=f: f(x.mul_(shift)) for f in factors), last]


class _Line:
    """Rows on their way through the instructions."""

    def __init__(self, call: Call, x: Activation, columns: int, gains: Gains) -> None:
        self.call, self.grid, self.gains = call, x.qparams.widened(), gains
        self.rounding: RoundingKind = call.state.spec.rounding_of("double")
        self.dtype = torch.float64
        self.rows = (x.value.detach() / self.grid.scale).reshape(-1, columns)
        if not on_host(self.rows):
            self.rows.round_()
        self.steps: list[Step] = []

    def center(self, wide: Call) -> None:
        """Take the mean off."""
        total = self.rows.sum(1, keepdim=True, dtype=torch.float64)
        mean, grid = _mean(wide.child("mean"), total, self.rows.shape[1], self.grid)
        self._add_sum(mean, grid, grid_of(wide.child("deviation")), -1.0)

    def normalize(self, call: Call, eps: float) -> None:
        """Divide by the root of the mean square and eps."""
        rows, y = self.run(), grid_of(call.child("square"))
        squares = self._product(self.grid, self.grid, y)
        sums = rows.new_empty((len(rows), 1), dtype=torch.float64)
        for part, block in self._blocks(rows):
            torch.sum(squares(block.mul_(block)), 1, keepdim=True, dtype=sums.dtype, out=sums[part])
        factor, factor_grid = _factor(call, sums, rows.shape[1], y, eps)
        factor = factor.to(self.dtype)
        y = grid_of(call.child("normalized"))
        product = self._product(self.grid, factor_grid, y)
        self._then(lambda block, part: product(block.mul_(factor[part])), y)

    def gain(self, call: Call, weight: Tensor) -> None:
        """Multiply by constants."""
        constant, y = call.constant(weight), grid_of(call)
        factors = self.gains.table(constant.integers(), self.rows.shape[1]).to(self.dtype)
        product = self._product(self.grid, constant.qparams, y)

        def step(block: Tensor, part: slice) -> Tensor:
            return product(block.mul_(self.gains.of_rows(factors, part.start, len(block))))

        self._then(step, y)

    def shift(self, call: Call, bias: Tensor) -> None:
        """Add constants."""
        constant, y = call.constant(bias), grid_of(call)
        shifts = self.gains.table(constant.integers(), self.rows.shape[1])
        self._add_sum(shifts, constant.qparams, y, 1.0, self.gains)

    def onto(self, y: QParams) -> Clipped:
        """Requantize; returns what will have been clipped once the steps have run."""
        columns, clipped = self.rows.shape[1], Clipped(keep=True)
        rescaler = self._prepared(self.grid.scale / y.scale, float(self.grid.largest))
        same = self.grid == y
        self._then(
            lambda block, part: clipped.clip(
                block if same else rescaler(block), y, part.start * columns
            ),
            y,
        )
        return clipped

    def run(self) -> Tensor:
        """Put the rows through the steps so far; integers, float32, shape ``(rows, columns)``."""
        if self.steps:
            result = torch.empty_like(self.rows)
            for part, block in self._blocks(self.rows):
                for step in self.steps:
                    block = step(block, part)
                result[part] = block
            self.rows, self.steps = result, []
        return self.rows

    def _blocks(self, rows: Tensor) -> list[tuple[slice, Tensor]]:
        size = max(1, _BLOCK // rows.shape[1])
        starts = range(0, len(rows), size if on_host(rows) else max(len(rows), 1))
        slices = [slice(start, start + starts.step) for start in starts]
        return ((part, rows[part].to(self.dtype, copy=True)) for part in slices)  # type: ignore

    def _then(self, step: Step, y: QParams) -> None:
        self.steps.append(step)
        self.grid = y

    def _prepared(self, factor: float, largest: float) -> Callable[[Tensor], Tensor]:
        return prepared(factor, self.rounding, largest)

    def _product(self, a: QParams, b: QParams, y: QParams) -> Callable[[Tensor], Tensor]:
        largest = float(a.largest * b.largest)
        rescaler = self._prepared(product_factor(a, b, y, self.call.state.spec), largest)
        return lambda products: rescaler(products).clamp_(*y.bounds)

    def _add_sum(
        self, other: Tensor, grid: QParams, y: QParams, sign: float, gains: Gains | None = None
    ) -> None:
        """Add integers on another grid: one a row, or a table of gains."""
        y = grid_of_sum(self.grid, grid, y)
        first, second, last = _sum(self.call, self.grid, grid, y)
        moved = second(other.to(self.dtype, copy=True))

        def step(block: Tensor, part: slice) -> Tensor:
            own = moved[part] if gains is None else gains.of_rows(moved, part.start, len(block))
            total = first(block).add_(own, alpha=sign)
            return last(total).clamp_(*y.bounds)

        self._then(step, y)
