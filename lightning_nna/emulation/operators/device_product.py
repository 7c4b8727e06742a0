"""Products of states and a recurrent weight on a device, and the rows that steps have of buffers.

A device multiplies in float32 where that holds every sum, and nothing is looked at to find out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.integer_products import FLOAT32_INTEGERS
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.linear import integer_bias
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.ranges import QParams

# Largest magnitudes of a stored byte and of a weight.
_BYTE, _WEIGHT = 128, 127


def columns_of(weight: QuantizedWeight) -> Tensor:
    """Return a weight's integers for products with bytes, shape ``(in, out)``, float32 or float64.

    The shape alone tells whether float32 holds every sum: a look at the weight would stop a GPU.
    """
    largest = weight.stored.shape[1] * _BYTE * _WEIGHT
    dtype = torch.float32 if largest < FLOAT32_INTEGERS else torch.float64
    return weight.stored.to(dtype).T


@dataclass(frozen=True)
class DeviceProduct:
    """The fully connected instruction of 16-bit states, before its rounding.

    Args:
        weight: Quantized weight, shape ``(out, hidden)``, whose scales hold the bias.
        columns: Its integers, float32 or float64, shape ``(hidden, out)``.
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
        """Number of parts of a state: the bytes of an integer where float32 has products of these.

        In float64 the product of the integer itself is exact.
        """
        return 2 if self.columns.dtype == torch.float32 else 1

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


def device_product(
    call: Call, x: QParams, weight: QuantizedWeight, bias: Tensor | None, y: QParams
) -> DeviceProduct | None:
    """Prepare the instruction of 16-bit states.

    Args:
        call: Call of the instruction.
        x: Quantization parameters of the states.
        weight: Quantized weight, shape ``(out, hidden)``, whose scales hold the bias.
        bias: Shape ``(out,)``, or None.
        y: Quantization parameters of the result.

    Returns:
        None where the multiplier depends on how large sums may become.
    """
    spec = call.state.spec
    bits, rounding = spec.accumulator_width(16), spec.rounding_of("real", "reduced")
    if rounding == "double" and bits > 32:
        return None
    scales = x.scale * weight.scales.double()
    columns = columns_of(weight)
    # Lower bytes are 128 too small.
    offset = weight.row_sums * (_BYTE if columns.dtype == torch.float32 else 0)
    if bias is not None:
        offset = offset + integer_bias(bias, scales, spec.bias_width(16))
    factors = scales / scales.new_full((), y.scale)
    saturates = spec.accumulator_overflow == "saturate"
    return DeviceProduct(weight, columns, factors, offset, rounding, bits, saturates)


def steps_of(layout: Layout, *buffers: Tensor) -> Iterator[tuple[int, int, int, list[Tensor]]]:
    """Iterate over steps: first row, row of the state before, number of rows, rows of buffers.

    Args:
        layout: Of the rows.
        buffers: Tensors of the largest step, shape ``(batch, ...)``, whose first rows a step has.
    """
    first = before = 0
    views, count = list(buffers), layout.batch
    for size in layout.sizes:
        if size != count:
            views, count = [buffer[:size] for buffer in buffers], size
        yield first, before, size, views
        before, first = layout.batch + first, first + size
