r"""One step of an LSTM in three arithmetics: float, the chip's, and the chip's with float rounding.

A cell counts in its own units (integers for the chip), so that the loop over time and the backward
are the same for all three; ``unit_h``, ``unit_c`` and ``unit_gate`` turn them into real values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulator.operators.call import Activation
from lightning_nna.emulator.operators.linear import FLOAT32_INTEGERS, integer_bias, integer_matmul
from lightning_nna.emulator.ranges import QParams
from lightning_nna.emulator.weights import QuantizedWeight
from lightning_nna.functional.fixed_point import (
    INT16_MAX,
    INT16_MIN,
    float_factors,
    lstm_sigmoid_table,
    lstm_tanh_table,
    multiply_by_quantized_multiplier,
    multiply_in_float,
    quantize_multiplier,
    quantize_multipliers,
    rounding_divide_by_power_of_two,
)

GATE_SCALE = 2.0**-12
GATE_OUTPUT_SCALE = 2.0**-15


@dataclass(frozen=True)
class Grids:
    """Grids of one layer: its input, its output (and hidden state), and the cell's scale 2^e."""

    x: QParams
    h: QParams
    cell_exponent: int


@dataclass(frozen=True)
class Step:
    """What one step leaves behind, in the cell's units; gates stand in the order i, f, g, o."""

    gates: Tensor
    c: Tensor
    tanh_c: Tensor
    h: Tensor


class Cell(ABC):
    """One arithmetic of the LSTM's step."""

    unit_h: float = 1.0
    unit_c: float = 1.0
    #: Of gate outputs, and of tanh of the cell.
    unit_gate: float = 1.0
    #: Bounds of gate inputs, cell and hidden state in the cell's units; at a bound it is clipped.
    gate_bounds: tuple[float, float] = (-float("inf"), float("inf"))
    cell_bounds: tuple[float, float] = (-float("inf"), float("inf"))
    hidden_bounds: tuple[float, float] = (-float("inf"), float("inf"))

    @abstractmethod
    def project_input(self, x: Activation, bias: Tensor | None) -> Tensor:
        """Input part of all gate inputs, ``(steps * batch, 4 * hidden)``."""

    @abstractmethod
    def step(self, projected: Tensor, h: Tensor, c: Tensor) -> Step:
        """Advance by one step; ``projected`` becomes the whole gate input in place."""

    def start(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Bring an initial state into the cell's units, clipped."""
        low, high = self.hidden_bounds
        first, last = self.cell_bounds
        hidden = (h.detach().float() / self.unit_h).clamp_(low, high)
        cell = (c.detach().float() / self.unit_c).clamp_(first, last)
        return hidden, cell


class FloatCell(Cell):
    """The LSTM of the float network, with the same record of its insides."""

    def __init__(self, w_ih: Tensor, w_hh: Tensor) -> None:
        self.w_ih, self.recurrent = w_ih.detach(), w_hh.detach().T

    def project_input(self, x: Activation, bias: Tensor | None) -> Tensor:
        """W x + b."""
        return torch.nn.functional.linear(x.value.detach().float(), self.w_ih, bias)

    def step(self, projected: Tensor, h: Tensor, c: Tensor) -> Step:
        """The textbook step."""
        projected.addmm_(h, self.recurrent)
        size = h.shape[1]
        gates = projected.sigmoid()
        torch.tanh(projected[:, 2 * size : 3 * size], out=gates[:, 2 * size : 3 * size])
        i, f, g, o = gates.chunk(4, 1)
        c = torch.addcmul(f * c, i, g)
        tanh_c = c.tanh()
        return Step(gates, c, tanh_c, o * tanh_c)


class FastCell(Cell):
    """The chip's grids and tables; only the requantisation rounds in float32."""

    gate_bounds = (float(INT16_MIN), float(INT16_MAX))
    cell_bounds = (float(INT16_MIN), float(INT16_MAX))
    unit_gate = GATE_OUTPUT_SCALE

    def __init__(self, w_ih: QuantizedWeight, w_hh: QuantizedWeight, grids: Grids) -> None:
        self.grids, self.w_ih, self.w_hh = grids, w_ih, w_hh
        self.unit_h, self.unit_c = grids.h.scale, 2.0**grids.cell_exponent
        self.hidden_bounds = (float(grids.h.bounds[0]), float(grids.h.bounds[1]))
        device = w_ih.integers.device
        self.gate_table = torch.cat([lstm_sigmoid_table(), lstm_tanh_table(3)]).to(device)
        self.cell_table = lstm_tanh_table(15 + grids.cell_exponent).to(device)
        size = w_hh.integers.shape[1]
        # Where each gate's table stands, and that integers start at -32768.
        self.offsets = torch.full((4 * size,), 2.0**15, device=device)
        self.offsets[2 * size : 3 * size] += 2.0**16
        # The kernel forms its factors in float32; 2^-12 divides exactly.
        self.input_factors = _factors(w_ih.scales, grids.x.scale)
        self.recurrent_factors = _factors(w_hh.scales, grids.h.scale)
        self.first, self.second = float_factors(*self.recurrent_factors)
        self.recurrent = w_hh.integers.T

    def project_input(self, x: Activation, bias: Tensor | None) -> Tensor:
        """W x + b in Q3.12, rounded and saturated."""
        integers = x.integers()
        if bias is not None:
            scales = self.w_ih.scales.double() * x.qparams.scale
            bias = integer_bias(bias, scales).float()
        projected = torch.nn.functional.linear(integers, self.w_ih.integers, bias)
        return multiply_in_float(projected, *self.input_factors).clamp_(*self.gate_bounds)

    def start(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Integers: float32 for the hidden state, which enters a product, 32 bits for the cell."""
        hidden, cell = super().start(h, c)
        return hidden.round_(), cell.round_().int()

    def step(self, projected: Tensor, h: Tensor, c: Tensor) -> Step:
        """16-bit gates and cell in integers; what is requantised, in float32."""
        accumulator = h @ self.recurrent
        recurrent = accumulator.mul_(self.first).round_().mul_(self.second).round_()
        gates = self._gates(projected.add_(recurrent).clamp_(*self.gate_bounds))
        i, f, g, o = gates.chunk(4, 1)
        c = self._cell(i, f, g, c)
        tanh_c = self._look_up(self.cell_table, c + 2**15)
        # 30 bits: float32 would round some to the other side, and the error would be fed back.
        scaled = (o * tanh_c).double().mul_(GATE_OUTPUT_SCALE**2 / self.unit_h)
        return Step(gates, c, tanh_c, scaled.round_().clamp_(*self.hidden_bounds).float())

    def _gates(self, pre: Tensor) -> Tensor:
        return self._look_up(self.gate_table, (pre + self.offsets).int())

    def _cell(self, i: Tensor, f: Tensor, g: Tensor, c: Tensor) -> Tensor:
        """Next cell, exact: two products, each rounded with ties away from zero."""
        kept = rounding_divide_by_power_of_two(f * c, 15)
        new = rounding_divide_by_power_of_two(i * g, 30 + self.grids.cell_exponent)
        return kept.add_(new).clamp_(INT16_MIN, INT16_MAX)

    @staticmethod
    def _look_up(table: Tensor, index: Tensor) -> Tensor:
        return table.index_select(0, index.flatten()).view(index.shape)


class ExactCell(FastCell):
    """The reference kernel's integers, every bit."""

    def __init__(self, w_ih: QuantizedWeight, w_hh: QuantizedWeight, grids: Grids) -> None:
        super().__init__(w_ih, w_hh, grids)
        scale_h = np.float32(grids.h.scale)
        output_factor = np.float32(GATE_OUTPUT_SCALE) / scale_h * np.float32(GATE_OUTPUT_SCALE)
        self.output_factor = quantize_multiplier(float(output_factor))
        largest = max(abs(bound) for bound in grids.h.bounds)
        fits = w_hh.largest_sum() * largest < FLOAT32_INTEGERS
        self.recurrent = w_hh.integers.T if fits else w_hh.integers.double().T

    def project_input(self, x: Activation, bias: Tensor | None) -> Tensor:
        """The accumulator with its bias, requantised to Q3.12 and saturated."""
        largest = max(abs(bound) for bound in x.qparams.bounds)
        accumulator = integer_matmul(x.integers(), self.w_ih, largest).long()
        if bias is not None:
            scales = self.w_ih.scales.double() * x.qparams.scale
            accumulator += integer_bias(bias, scales).long()
        projected = multiply_by_quantized_multiplier(accumulator, *self.input_factors)
        return projected.clamp_(INT16_MIN, INT16_MAX).float()

    def step(self, projected: Tensor, h: Tensor, c: Tensor) -> Step:
        """Gate sums in 16 bits, products in 32, factors in 64."""
        accumulator = (h.to(self.recurrent.dtype) @ self.recurrent).long()
        recurrent = multiply_by_quantized_multiplier(accumulator, *self.recurrent_factors)
        gates = self._gates(projected.add_(recurrent).clamp_(*self.gate_bounds))
        i, f, g, o = gates.chunk(4, 1)
        c = self._cell(i, f, g, c)
        tanh_c = self._look_up(self.cell_table, c + 2**15)
        h = multiply_by_quantized_multiplier(o.long() * tanh_c, *self.output_factor).float()
        return Step(gates, c, tanh_c, h.clamp_(*self.hidden_bounds))


def _factors(weight_scales: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Multiplier and shift of every gate row, from accumulator units to Q3.12."""
    products = weight_scales.float() * torch.tensor(scale, dtype=torch.float32)
    return quantize_multipliers((products / GATE_SCALE).double())
