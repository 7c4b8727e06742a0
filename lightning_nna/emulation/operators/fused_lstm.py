r"""The LSTM of :mod:`.lstm` in two calls a step, forward and backward alike.

A step is the matrix product of the states with the recurrent weight and one kernel for all gates
(:mod:`.kernels.recurrent`); input products and gradients of weights are matrix products over all
steps. Integers and gradients are those of :class:`.lstm_cell.LSTMCell`, in the same bits, and no
value of a device goes to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN
from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.arithmetic.rescaling import RoundingKind, spills
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.kernels.definitions import (
    ROUNDINGS,
    centered_integers,
    quantize,
    requantize,
)
from lightning_nna.emulation.kernels.recurrent import prepared_step
from lightning_nna.emulation.operators.call import stored_bytes
from lightning_nna.emulation.operators.fused_product import (
    columns_of,
    dtype_of_sums,
    multiply_bytes,
    steps_of,
)
from lightning_nna.emulation.operators.linear import integer_bias, largest_magnitude
from lightning_nna.emulation.operators.lstm_kernels import (
    GATE_OUTPUT_SCALE,
    GATE_SCALE,
    LSTMKernel,
    cell_table,
    gate_table,
)
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.ranges import QParams


@dataclass(frozen=True)
class FusedCell:
    """The arithmetic of one layer without a projection.

    Args:
        w_ih: Input weights of the four gates, a scale each, shape ``(4 * hidden, in)``.
        w_hh: Recurrent weights, shape ``(4 * hidden, hidden)``.
        bias: Sum of both biases, shape ``(4 * hidden,)``, or None.
        x: Quantization parameters of the input.
        h: Of the states.
        cell_exponent: Exponent e of the cell's scale 2^e.
        kernel: Kernel of the runtime.
        rounding: Of every requantization.
        bias_bits: Width of a bias.
        accumulator_bits: Width of an accumulator, at most 32.
        saturates: Whether accumulators saturate.
    """

    w_ih: QuantizedWeight
    w_hh: QuantizedWeight
    bias: Tensor | None
    x: QParams
    h: QParams
    cell_exponent: int
    kernel: LSTMKernel
    rounding: RoundingKind
    bias_bits: int
    accumulator_bits: int
    saturates: bool

    def project(self, x: Tensor) -> Tensor:
        """Compute the input parts of the gates' inputs, Q3.12 in 16 bits, for all steps.

        Args:
            x: Real values of the input, shape ``(rows, in)``.

        Returns:
            Whole numbers, float32, shape ``(rows, 4 * hidden)``.
        """
        columns = columns_of(self.w_ih)
        stored = stored_in(x, self.x, columns.dtype)
        sums = stored.new_empty((len(x), columns.shape[1]), dtype=dtype_of_sums(columns))
        # A factor that is formed in float32 is one, and float64 has the kernel's own quotient.
        before, after, scales = self.x.scale, GATE_SCALE, self.w_ih.scales
        if self.kernel.dtype == torch.float32:
            before, after, scales = 1.0, 1.0, self.input_factors.float()
        gates, _ = requantize(
            multiply_bytes(stored, columns, sums),
            scales=scales,
            offset=self.input_offset,
            scale_before=before,
            scale_after=after,
            out_scale=1.0,
            rounding=self.rounding,
            zero_point=0,
            low=INT16_MIN,
            high=INT16_MAX,
            accumulator_bits=self.accumulator_bits,
            saturates=self.saturates,
        )
        return gates

    @cached_property
    def input_factors(self) -> Tensor:
        """Factors of the sums of input products, float64, shape ``(4 * hidden,)``."""
        return self._factors(self.w_ih, self.x)

    @cached_property
    def input_offset(self) -> Tensor:
        """Numbers that are added to these sums, float64, shape ``(4 * hidden,)``."""
        offset = self.w_ih.row_sums * -self.x.zero_point
        return offset if self._biases is None else offset + self._biases

    @cached_property
    def _biases(self) -> Tensor | None:
        """Integers of the bias, float64."""
        if self.bias is None:
            return None
        scales = self.w_ih.scales.double() * self.x.scale
        return integer_bias(self.bias, scales, self.bias_bits)

    @cached_property
    def recurrent_factors(self) -> Tensor:
        """Factors of the recurrent sums, float64, shape ``(4 * hidden,)``."""
        return self._factors(self.w_hh, self.h)

    @cached_property
    def recurrent_offset(self) -> Tensor:
        """Numbers that are added to these sums, float64, shape ``(4 * hidden,)``."""
        return self.w_hh.row_sums * -self.h.zero_point

    def may_overflow(self, largest_bias: float) -> bool:
        """Tell whether sums may leave the accumulator, or their results 32 bits.

        A device is not asked for values: the shapes of the weights alone tell.

        Args:
            largest_bias: Bound on the integers of the bias, for a device.
        """
        limit, looks = 2.0 ** (self.accumulator_bits - 1), in_memory(self.w_hh.stored)
        if looks:
            largest_bias = 0.0 if self._biases is None else largest_magnitude(self._biases)
        parts = (
            (self.w_ih, self.x, largest_bias, "input_factors"),
            (self.w_hh, self.h, 0.0, "recurrent_factors"),
        )
        for weight, x, bias, name in parts:
            largest = weight.bound * max(x.largest, 128) + bias
            if largest >= limit:
                return True
            if looks and spills(getattr(self, name), rounding=self.rounding, largest=largest):
                return True
        return False

    def hidden_factor(self) -> float:
        """Return the factor from Q0.30 to the scale of the states, as the kernel forms it."""
        precision = np.float32 if self.kernel.dtype == torch.float32 else np.float64
        gate = precision(GATE_OUTPUT_SCALE)
        return float(gate * gate / precision(self.h.scale))

    def _factors(self, weight: QuantizedWeight, x: QParams) -> Tensor:
        like = weight.scales
        scale, gate = (like.new_full((), s, dtype=torch.float64) for s in (x.scale, GATE_SCALE))
        return self.kernel.factor(weight.scales, scale, gate)


def stored_in(x: Tensor, qparams: QParams, dtype: torch.dtype) -> Tensor:
    """Return an activation's bytes, in its shape, as whole numbers of another type."""
    if on_host(x):
        stored = stored_bytes(x, qparams)
    else:
        stored = centered_integers(x.detach(), scale=qparams.scale, zero_point=qparams.zero_point)
    return stored.contiguous().to(dtype)


class FusedLSTM(torch.autograd.Function):
    """One layer, all steps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        bias: Tensor | None,
        cell: FusedCell,
        layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs ``(rows, hidden)``, last hidden states and cells ``(batch, hidden)``."""
        rows, batch, size = layout.rows, layout.batch, h_0.shape[1]
        inputs, columns = cell.project(x), columns_of(cell.w_hh)
        cell_scale = 2.0**cell.cell_exponent
        new = inputs.new_empty
        outputs = new((rows, size))
        gates, flags = (new((rows, 4 * size), dtype=t) for t in (torch.int16, torch.uint8))
        cells, tanh_cells = (new((n, size), dtype=torch.int16) for n in (batch + rows, rows))
        sums = new((batch, 4 * size), dtype=dtype_of_sums(columns))
        first_c, _, _ = quantize(c_0.detach(), scale=cell_scale, low=INT16_MIN, high=INT16_MAX)
        cells[:batch].copy_(first_c * (1 / cell_scale))
        h = cell.h
        state = stored_in(h_0, h, columns.dtype)
        tables = (
            gate_table(cell.kernel, 0, inputs.device),
            cell_table(cell.kernel, cell.cell_exponent, inputs.device),
        )
        step = prepared_step(
            "lstm_step",
            (
                *(sums, inputs, cell.recurrent_factors, cell.recurrent_offset, *tables),
                *(state, outputs, gates, cells, tanh_cells, flags),
            ),
            (
                ROUNDINGS[cell.rounding],
                cell.accumulator_bits,
                cell.saturates,
                cell.kernel.saturates_recurrent,
                cell.kernel.divides_products,
                cell.cell_exponent,
                cell.hidden_factor(),
                h.zero_point,
                h.low,
                h.high,
                h.scale,
            ),
        )
        needs_masks = False
        for first, before, count, (of_step, sums_of_step) in steps_of(layout, state, sums):
            multiply_bytes(of_step, columns, sums_of_step)
            needs_masks |= step(first, before, count)
        last_cells = layout.last(cells[batch:]).float().mul_(cell_scale)
        result = outputs
        if any(ctx.needs_input_grad):
            ctx.cell, ctx.layout, ctx.needs_masks = cell, layout, needs_masks
            ctx.save_for_backward(x, h_0, outputs, gates, cells, tanh_cells, flags)
            # What works in place on the result must leave alone what the backward needs.
            result = outputs.clone()
        # Nor does it work on the last states.
        return result, layout.last(outputs).clone(), last_cells

    @staticmethod
    @first_order("lstm")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first six arguments."""
        x, h_0, outputs, gates, cells, tanh_cells, flags = ctx.saved_tensors
        cell, layout = ctx.cell, ctx.layout
        with float32_arithmetic(x):
            d_output = grads[0].float().contiguous()
            d_h, d_c = (each.float().clone() for each in grads[1:])
            weight = cell.w_hh.values
            d_input = d_recurrent = torch.empty_like(gates, dtype=torch.float32)
            if ctx.needs_masks:
                d_recurrent = torch.empty_like(d_input)
            step = prepared_step(
                "lstm_step_backward",
                (d_output, d_h, d_c, gates, cells, tanh_cells, flags, d_input, d_recurrent),
                (cell.cell_exponent,),
            )
            of_steps = zip(
                list(steps_of(layout, d_h)), d_recurrent.split(layout.sizes), strict=True
            )
            for (first, before, count, (d_state,)), d_step in reversed(list(of_steps)):
                step(first, before, count)
                torch.mm(d_step, weight, out=d_state)
            h_before = layout.before(torch.cat([h_0.float(), outputs]))
            d_w_hh = d_recurrent.T @ h_before
            d_x = d_input @ cell.w_ih.values if ctx.needs_input_grad[0] else None
            d_w_ih = d_input.T @ x.float()
            d_bias = d_input.sum(0) if ctx.needs_input_grad[5] else None
        return d_x, d_h, d_c, d_w_ih, d_w_hh, d_bias, None, None
