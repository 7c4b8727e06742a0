"""Products of states and a recurrent weight before a kernel, and the rows of steps in buffers.

A device multiplies in float32 where that holds every sum, and nothing is looked at to find out. A
processor multiplies bytes if it has instructions for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.integer_products import FLOAT32_INTEGERS
from lightning_nna.emulation.arithmetic.on_host import in_memory
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.arithmetic.rescaling import spills
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.linear import (
    accumulator_limit,
    integer_bias,
    largest_magnitude,
)
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.ranges import QParams

# Largest magnitudes of a stored byte and of a weight.
_BYTE, _WEIGHT = 128, 127


def columns_of(weight: QuantizedWeight) -> Tensor:
    """Return a weight's integers for :func:`multiply_bytes`, shape ``(in, out)``.

    They are int8, float32 or float64. On a device the shape alone tells whether float32 holds every
    sum: a look at the weight would stop it.
    """
    if in_memory(weight.stored):
        return weight.byte_product.columns
    largest = weight.stored.shape[1] * _BYTE * _WEIGHT
    dtype = torch.float32 if largest < FLOAT32_INTEGERS else torch.float64
    return weight.stored.to(dtype).T


def dtype_of_sums(columns: Tensor) -> torch.dtype:
    """Return the type of the sums of products with columns, shape ``(in, out)``."""
    return torch.int32 if columns.dtype == torch.int8 else columns.dtype


def multiply_bytes(stored: Tensor, columns: Tensor, sums: Tensor) -> Tensor:
    """Multiply bytes with a weight, exactly.

    Args:
        stored: Bytes, of the dtype of the columns, shape ``(rows, in)``.
        columns: Integers from :func:`columns_of`.
        sums: Receives the products, of :func:`dtype_of_sums`, shape ``(rows, out)``.
    """
    if columns.dtype == torch.int8:
        return torch._int_mm(stored, columns, out=sums)
    return torch.mm(stored, columns, out=sums)


@dataclass(frozen=True)
class FusedProduct:
    """The fully connected instruction of 16-bit states, before its rounding.

    Args:
        weight: Quantized weight, shape ``(out, hidden)``, whose scales hold the bias.
        columns: Its integers from :func:`columns_of`, shape ``(hidden, out)``.
        factors: Factors from sums to results, float64, shape ``(out,)``.
        offset: Numbers added to the sums, float64, shape ``(out,)``.
        rounding: Rounding of the kernel.
        accumulator_bits: Width of the accumulator.
        saturates: Whether a sum beyond that width saturates.
    """

    weight: QuantizedWeight
    columns: Tensor
    factors: Tensor
    offset: Tensor
    rounding: str
    accumulator_bits: int
    saturates: bool

    @property
    def parts(self) -> int:
        """Number of parts of a state: its two bytes; in float64 the integer itself."""
        return 1 if self.columns.dtype == torch.float64 else 2

    def split(self, integers: Tensor) -> Tensor:
        """Split states into parts, of the dtype of the columns.

        Args:
            integers: Integers of 16 bits, any dtype, shape ``(batch, hidden)``.

        Returns:
            Shape ``(batch, parts, hidden)``: 1000 is 3 * 256 + 104 + 128, of which 3 and 104 stay.
        """
        if self.parts == 1:
            return integers.to(self.columns.dtype).unsqueeze(1)
        wide = integers.long()
        return torch.stack([wide >> 8, (wide & 255) - _BYTE], 1).to(self.columns.dtype)


def fused_product(
    call: Call, x: QParams, weight: QuantizedWeight, bias: Tensor | None, y: QParams
) -> FusedProduct | None:
    """Prepare the instruction of 16-bit states.

    Args:
        call: Call of the instruction.
        x: Quantization parameters of the states.
        weight: Quantized weight, shape ``(out, hidden)``, whose scales hold the bias.
        bias: Shape ``(out,)``, or None.
        y: Quantization parameters of the result.

    Returns:
        None where the multiplier depends on how large sums may become, or where a processor counts
        overflows.
    """
    spec = call.state.spec
    bits, rounding = spec.accumulator_width(16), spec.rounding_of("real", "reduced")
    if rounding == "double" and bits > 32:
        return None
    scales = x.scale * weight.scales.double()
    columns = columns_of(weight)
    # Lower bytes are 128 too small.
    offset = weight.row_sums * (0 if columns.dtype == torch.float64 else _BYTE)
    factors, biases = scales / scales.new_full((), y.scale), None
    if bias is not None:
        biases = integer_bias(bias, scales, spec.bias_width(16))
        offset = offset + biases
    if in_memory(offset):
        largest = weight.bound * x.largest
        largest += 0.0 if biases is None else largest_magnitude(biases)
        overflows = largest >= accumulator_limit(call, 16)
        if overflows or spills(factors, rounding=rounding, largest=largest):
            return None
    saturates = spec.accumulator_overflow == "saturate"
    return FusedProduct(weight, columns, factors, offset, rounding, bits, saturates)


def steps_of(
    layout: Layout, *buffers: Tensor, parts: int = 1
) -> Iterator[tuple[int, int, int, list[Tensor]]]:
    """Iterate over steps: first row, row of the state before, number of rows, rows of buffers.

    Args:
        layout: Of the rows.
        buffers: Tensors of the largest step, shape ``(batch * parts, ...)``, whose first rows a
            step has.
        parts: Rows that a sequence has of a buffer.
    """
    first = before = 0
    views, count = list(buffers), layout.batch
    for size in layout.sizes:
        if size != count:
            views, count = [buffer[: size * parts] for buffer in buffers], size
        yield first, before, size, views
        before, first = layout.batch + first, first + size
