r"""One step of an LSTM in three arithmetics: float, the chip's, and the chip's with float rounding.

A cell holds state in its own units (integers for the chip), so that the loop over time and the
backward are the same for all three. ``unit_h`` and ``unit_c`` turn state into real values; gate
outputs and tanh of the cell are real.
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
    lstm_sigmoid_table,
    lstm_tanh_table,
    multiply_by_quantized_multiplier,
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
    """What one step leaves behind; gate outputs stand in the order i, f, g, o."""

    gates: Tensor
    c: Tensor
    tanh_c: Tensor
    h: Tensor


class Cell(ABC):
    """One arithmetic of the LSTM's step."""

    unit_h: float = 1.0
    unit_c: float = 1.0
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
        return self.rounded(hidden), self.rounded(cell)

    def rounded(self, x: Tensor) -> Tensor:
        """Integers, where the cell counts in integers."""
        return x.round_()


class FloatCell(Cell):
    """The LSTM of the float network, with the same record of its insides."""

    def __init__(self, w_ih: Tensor, w_hh: Tensor) -> None:
        self.w_ih, self.recurrent = w_ih.detach(), w_hh.detach().T

    def rounded(self, x: Tensor) -> Tensor:
        """Nothing is rounded here."""
        return x

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

    def __init__(self, w_ih: QuantizedWeight, w_hh: QuantizedWeight, grids: Grids) -> None:
        self.grids, self.w_ih, self.w_hh = grids, w_ih, w_hh
        self.unit_h, self.unit_c = grids.h.scale, 2.0**grids.cell_exponent
        self.hidden_bounds = (float(grids.h.bounds[0]), float(grids.h.bounds[1]))
        device = w_ih.integers.device
        tables = torch.cat([lstm_sigmoid_table(), lstm_tanh_table(3)]).to(device)
        self.gate_table = tables.float().mul_(GATE_OUTPUT_SCALE)
        cell_tanh = lstm_tanh_table(15 + grids.cell_exponent).to(device)
        self.cell_table = cell_tanh.float().mul_(GATE_OUTPUT_SCALE)
        size = w_hh.integers.shape[1]
        # Where each gate's table stands, and that integers start at -32768.
        self.offsets = torch.full((4 * size,), 2.0**15, device=device)
        self.offsets[2 * size : 3 * size] += 2.0**16
        self.recurrent = (w_hh.values * (grids.h.scale / GATE_SCALE)).T

    def project_input(self, x: Activation, bias: Tensor | None) -> Tensor:
        """W x + b in Q3.12, rounded and saturated."""
        projected = torch.nn.functional.linear(x.value.detach(), self.w_ih.values, bias)
        return projected.mul_(1 / GATE_SCALE).round_().clamp_(*self.gate_bounds)

    def step(self, projected: Tensor, h: Tensor, c: Tensor) -> Step:
        """Integers held in float32; every sum and product that matters is below 2^24 or rounded."""
        projected.add_((h @ self.recurrent).round_()).clamp_(*self.gate_bounds)
        gates = self._look_up(self.gate_table, projected + self.offsets)
        i, f, g, o = gates.chunk(4, 1)
        c = (f * c).round_().add_((i * g).mul_(1 / self.unit_c).round_())
        c.clamp_(*self.cell_bounds)
        tanh_c = self._look_up(self.cell_table, c + 2.0**15)
        h = (o * tanh_c).mul_(1 / self.unit_h).round_().clamp_(*self.hidden_bounds)
        return Step(gates, c, tanh_c, h)

    @staticmethod
    def _look_up(table: Tensor, index: Tensor) -> Tensor:
        return table.index_select(0, index.int().flatten()).view(index.shape)


class ExactCell(FastCell):
    """The reference kernel's integers, every bit."""

    def __init__(self, w_ih: QuantizedWeight, w_hh: QuantizedWeight, grids: Grids) -> None:
        super().__init__(w_ih, w_hh, grids)
        # The kernel forms its factors in float32; 2^-12 divides exactly.
        self.input_factors = _factors(w_ih.scales, grids.x.scale)
        self.recurrent_factors = _factors(w_hh.scales, grids.h.scale)
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
        projected.add_(recurrent).clamp_(*self.gate_bounds)
        gates = self._look_up(self.gate_table, projected + self.offsets)
        i, f, g, o = (gates / GATE_OUTPUT_SCALE).int().chunk(4, 1)
        kept = rounding_divide_by_power_of_two(f * c.int(), 15)
        new = rounding_divide_by_power_of_two(i * g, 30 + self.grids.cell_exponent)
        c = (kept + new).clamp_(INT16_MIN, INT16_MAX).float()
        tanh_c = self._look_up(self.cell_table, c + 2.0**15)
        product = o.long() * (tanh_c / GATE_OUTPUT_SCALE).long()
        h = multiply_by_quantized_multiplier(product, *self.output_factor).float()
        return Step(gates, c, tanh_c, h.clamp_(*self.hidden_bounds))


def _factors(weight_scales: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Multiplier and shift of every gate row, from accumulator units to Q3.12."""
    products = weight_scales.float() * torch.tensor(scale, dtype=torch.float32)
    return quantize_multipliers((products / GATE_SCALE).double())
