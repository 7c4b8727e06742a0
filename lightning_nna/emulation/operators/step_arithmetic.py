"""Instructions of recurrent layers on buffers, without a tensor or a dispatch for each.

A sequence has thousands of small instructions, whose cost is that of their dispatch. Here the
factors of each are prepared once for all steps; what remains are passes over buffers. Every result
equals that of the operator of :mod:`.elementwise`, :mod:`.activation` and :mod:`.linear`, in both
fidelities:

=========  =======================================  ============================
fidelity   numbers between instructions             rounding
=========  =======================================  ============================
exact      integers of 16 bits, in float64          the kernel's
fast       real values, in float32                  to nearest in float32
=========  =======================================  ============================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN, INT32_MAX
from lightning_nna.emulation.arithmetic.on_host import in_memory
from lightning_nna.emulation.arithmetic.one_rounding import of_16_bits, to_16_bits
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.arithmetic.rescaling import Rescaler, rounding_factors
from lightning_nna.emulation.operators.activation import WIDE_OUTPUT, wide_entries
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.elementwise import LEFT_SHIFT, product_factor, sum_factors
from lightning_nna.emulation.operators.linear import (
    integer_bias,
    needs_exact,
    rescaler_of_layer,
)
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams
from lightning_nna.emulation.spec import NNASpec

#: Writes a function of the first tensor to the second and returns it.
Pass = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Numbers:
    """Numbers between the instructions of a layer.

    Args:
        exact: Whether the fidelity is exact.
    """

    exact: bool

    @property
    def dtype(self) -> torch.dtype:
        """Type of the buffers."""
        return torch.float64 if self.exact else torch.float32

    def of(self, x: Activation) -> Tensor:
        """Return an activation of any shape in these numbers."""
        return x.integers().double() if self.exact else x.value.detach()

    def clip(self, rounded: Tensor, y: QParams, out: Tensor) -> Tensor:
        """Write rounded integers of any shape, clipped to 16 bits, as numbers on ``y``."""
        torch.clamp(rounded, INT16_MIN, INT16_MAX, out=out)
        return out if self.exact else out.mul_(y.scale)


class Sum:
    """A sum or a difference, in two parts that can be computed at different times.

    Args:
        kind: Name of the kernel.
        a: Quantization parameters of the first operand, as all of 16 bits.
        b: Of the second.
        y: Of the result.
        numbers: Numbers that the operands are.
        spec: Accelerator.

    Attributes:
        first: Scales the first operand, any shape.
        second: Scales the second operand.
    """

    def __init__(
        self,
        kind: Literal["ADD", "SUB"],
        a: QParams,
        b: QParams,
        y: QParams,
        numbers: Numbers,
        spec: NNASpec,
    ) -> None:
        sign = 1.0 if kind == "ADD" else -1.0
        self.first: Pass
        self.second: Pass
        self._round: Pass
        if not numbers.exact:
            self.alpha = 1
            self.first, self.second = _times(1 / y.scale), _times(sign / y.scale)
            self._round = lambda x, out: torch.round(x, out=out)
            return
        self.alpha = int(sign)
        rounding, shift = spec.rounding_of("double"), LEFT_SHIFT[16]
        *operand_factors, factor = sum_factors(a, b, y)
        self.first, self.second = (of_16_bits(each, rounding, shift) for each in operand_factors)
        self._round = to_16_bits(factor, rounding, float(INT32_MAX))

    def of_scaled(self, first: Tensor, second: Tensor, out: Tensor) -> Tensor:
        """Write integers, not clipped, of scaled operands of one shape; overwrites the second."""
        torch.add(first, second, alpha=self.alpha, out=second)
        return self._round(second, out)


class Product:
    """A product of two activations.

    Args:
        a: Quantization parameters of the first factor, as all of 16 bits.
        b: Of the second.
        y: Of the result.
        numbers: Numbers that the factors are.
        spec: Accelerator.
    """

    def __init__(self, a: QParams, b: QParams, y: QParams, numbers: Numbers, spec: NNASpec) -> None:
        factor, rounding = product_factor(a, b, y, spec), spec.rounding_of("double")
        self._round: Pass
        if numbers.exact:
            self._round = to_16_bits(factor, rounding, float(a.largest * b.largest))
            return
        first, second = rounding_factors(factor, rounding=rounding)
        passes = [1 / (a.scale * b.scale), float(first)]
        last = None if second is None else float(second)
        self._round = partial(_rounded_in_float32, factors=passes, last=last)

    def __call__(self, a: Tensor, b: Tensor, room: Tensor, out: Tensor) -> Tensor:
        """Write integers, not clipped, of factors of one shape; overwrites ``room``."""
        return self._round(torch.mul(a, b, out=room), out)


class LookUp:
    """Sigmoid or tanh of 16-bit integers.

    Args:
        name: ``"sigmoid"`` or ``"tanh"``.
        x: Quantization parameters of the input.
        numbers: Numbers that the results are.
        spec: Accelerator.
        device: Device of the table.
    """

    def __init__(
        self, name: str, x: QParams, numbers: Numbers, spec: NNASpec, device: torch.device
    ) -> None:
        self.numbers = numbers
        self.entries = _entries(name, x.scale, spec).to(device)

    def __call__(self, rounded: Tensor, index: Tensor, integers: Tensor, out: Tensor) -> Tensor:
        """Write the function of integers that are not clipped yet.

        Args:
            rounded: Integers, any shape; overwritten.
            index: Buffer of the same shape, int32.
            integers: Integers of the result, int16, contiguous.
            out: The result as numbers.
        """
        index.copy_(rounded.clamp_(INT16_MIN, INT16_MAX)).sub_(INT16_MIN)
        torch.index_select(self.entries, 0, index.view(-1), out=integers.view(-1))
        out.copy_(integers)
        return out if self.numbers.exact else out.mul_(WIDE_OUTPUT.scale)


class StateProduct:
    """The fully connected instruction of states.

    Args:
        call: Call of the instruction.
        x: Quantization parameters of the states, as all of 16 bits.
        weight: Quantized weight, shape ``(out, hidden)``, whose scales hold the bias.
        bias: Shape ``(out,)``, or None.
        y: Quantization parameters of the result.
        rows: Number of rows, that of the largest step.

    Attributes:
        exact: Whether it takes integers, in both fidelities, and not real values.
        values: The weight's values, float32.
    """

    def __init__(
        self,
        call: Call,
        x: QParams,
        weight: QuantizedWeight,
        bias: Tensor | None,
        y: QParams,
        rows: int,
    ) -> None:
        self.weight, self.values, self.y = weight, weight.values, y
        operand = Activation(weight.scales, x)
        self.exact = needs_exact(call, operand, weight, y)
        self._columns = self.values.T
        self._bias, device = None, weight.stored.device
        if not self.exact:
            if bias is not None:
                scales = x.scale * weight.scales.double()
                width = call.state.spec.bias_width(16)
                self._bias = integer_bias(bias, scales, width).mul_(scales).float()
            return
        self._rescaler: Rescaler = rescaler_of_layer(call, operand, weight, bias, y)
        out, columns = weight.stored.shape
        self._wide = torch.empty((rows, columns), dtype=torch.int16, device=device)
        self._room = torch.empty((rows, out), dtype=torch.float64, device=device)

    def __call__(self, h: Tensor, out: Tensor) -> Tensor:
        """Compute integers, not clipped.

        Args:
            h: States, shape ``(rows, hidden)``.
            out: Buffer for the result, ``(rows, out)``, which may be overwritten.

        Returns:
            Integers, float32 or float64, of the shape of ``out``.
        """
        if not self.exact:
            if self._bias is None:
                torch.mm(h, self._columns, out=out)
            else:
                torch.addmm(self._bias, h, self._columns, out=out)
            return out.mul_(1 / self.y.scale).round_()
        sums = self.weight.wide_product(self._wide[: len(h)].copy_(h))
        rescaled = self._rescaler(self._room[: len(h)].copy_(sums))
        # In fast fidelity the numbers are of another type.
        return rescaled if rescaled.dtype == out.dtype else out.copy_(rescaled)


class States:
    """States from step to step: integers of 16 bits, and the numbers that instructions take.

    Args:
        start: Initial states.
        numbers: Numbers that instructions take.
        product: Instruction that takes the integers, or real values.
    """

    def __init__(self, start: Activation, numbers: Numbers, product: StateProduct) -> None:
        self.qparams, self._product = start.qparams, product
        self.values = self._integers = numbers.of(start)
        if not numbers.exact:
            # The numbers are the tensor itself, which must stay as it is.
            self.values, self._integers = self.values.clone(), start.integers()

    def of_product(self, rows: int) -> Tensor:
        """Return what the product takes of the first rows, shape ``(rows, hidden)``."""
        return (self._integers if self._product.exact else self.values)[:rows]

    def integers(self, rows: int) -> Tensor:
        """Return the integers of the first rows, shape ``(rows, hidden)``."""
        return self._integers[:rows]

    def set(self, rounded: Tensor) -> None:
        """Set the first states to rounded integers, shape ``(rows, hidden)``, clipped here."""
        integers, values = (x[: len(rounded)] for x in (self._integers, self.values))
        if rounded.dtype == torch.int16:  # From a table.
            integers.copy_(rounded)
        else:
            torch.clamp(rounded, INT16_MIN, INT16_MAX, out=integers)
        if values.data_ptr() != integers.data_ptr():
            torch.mul(integers, self.qparams.scale, out=values)


class RoundedSteps:
    """Rounded integers of all steps, before they were clipped.

    Args:
        sizes: Rows of each step.
        columns: Number of columns.
        device: Device of the buffer.
        used: Whether a backward needs them.
    """

    def __init__(
        self, sizes: Sequence[int], columns: int, device: torch.device, *, used: bool
    ) -> None:
        self._all = None
        self.steps: Sequence[Tensor | None] = [None] * len(sizes)
        if used:
            self._all = torch.empty((sum(sizes), columns), device=device)
            self.steps = self._all.split(list(sizes))

    def clipped(self, first_column: int = 0) -> Tensor:
        """Return the clipped integers from a column on, float32; they must have been kept."""
        assert self._all is not None
        return self._all[:, first_column:].clamp(INT16_MIN, INT16_MAX)

    def inside(self) -> Tensor | None:
        """Return 1 where an integer was not clipped, else 0, float32; None if none was."""
        if self._all is None:
            return None
        if in_memory(self._all):
            low, high = torch.aminmax(self._all)
            if float(low) >= INT16_MIN and float(high) <= INT16_MAX:
                return None
        return ((self._all >= INT16_MIN) & (self._all <= INT16_MAX)).float()


def copied_to(rounded: Tensor, store: Tensor | None) -> Tensor:
    """Copy rounded integers of any shape to where the backward finds them, and return them."""
    if store is not None:
        store.copy_(rounded)
    return rounded


def real(integers: Tensor, qparams: QParams) -> Tensor:
    """Return the values of integers of any shape without a zero point, float32."""
    return integers.float().mul_(qparams.scale)


def grids_of(call: Call, names: Sequence[str], kernels: Sequence[str]) -> list[QParams] | None:
    """Return the quantization parameters of the results of instructions of 16 bits.

    Args:
        call: Call whose parts the instructions are.
        names: Names of the parts.
        kernels: Kernels that the runtime must have.

    Returns:
        None if a kernel is absent, or a range, which the first step gives then.
    """
    parts = [call.child(name) for name in names]
    has_ranges = all(f"{part.site}/output" in call.state.ranges for part in parts)
    if not has_ranges or not all(map(call.has, kernels)):
        return None
    return [part.output(lambda: torch.empty(0)) for part in parts]


def _times(factor: float) -> Pass:
    return lambda x, out: torch.mul(x, factor, out=out)


def _rounded_in_float32(
    x: Tensor, out: Tensor, *, factors: Sequence[float], last: float | None
) -> Tensor:
    """Round after some factors, which are not put together, and again after the last."""
    torch.mul(x, factors[0], out=out)
    for factor in factors[1:]:
        out.mul_(factor)
    out.round_()
    return out if last is None else out.mul_(last).round_()


@lru_cache(maxsize=64)
def _entries(name: str, scale: float, spec: NNASpec) -> Tensor:
    """Results of all 16-bit integers, int16, shape ``(65536,)``."""
    with torch.inference_mode(False):
        integers = torch.arange(INT16_MIN, INT16_MAX + 1)
        entries = wide_entries(name, integers, scale, spec)
        return entries.clamp(INT16_MIN, INT16_MAX).to(torch.int16)
