"""Steps of recurrent layers as operators of PyTorch: one kernel for all gates.

:mod:`.recurrent_reference` describes the arguments.
"""

from __future__ import annotations

import torch

from lightning_nna.emulation.kernels import recurrent_reference
from lightning_nna.emulation.kernels.library import define

_SCHEMAS = (
    "lstm_step(Tensor sums, Tensor inputs, Tensor factors, Tensor offset, Tensor gate_table, "
    "Tensor cell_table, Tensor(a!) state, Tensor(b!) outputs, Tensor(c!) gates, Tensor(d!) cells, "
    "Tensor(e!) tanh_cells, Tensor(f!) flags, int first, int before, int rows, int rounding, "
    "int accumulator_bits, bool saturates, bool saturates_recurrent, bool divides, "
    "int cell_exponent, float hidden_factor, int zero_point, int low, int high, float scale) -> ()",
    "lstm_step_backward(Tensor grad, Tensor d_state, Tensor(a!) d_cell, Tensor gates, "
    "Tensor cells, Tensor tanh_cells, Tensor flags, Tensor(b!) d_input, Tensor(c!) d_recurrent, "
    "int first, int before, int rows, int cell_exponent) -> ()",
    "gru_step(Tensor sums, Tensor inputs, Tensor state_factors, Tensor offset, Tensor factors, "
    "Tensor sigmoid, Tensor tanh, Tensor(a!) state, Tensor(b!) states, Tensor(c!) outputs, "
    "Tensor(d!) trace, int first, int before, int rows, int state_rounding, int rounding, "
    "int accumulator_bits, bool saturates, float scale) -> ()",
    "gru_step_backward(Tensor grad, Tensor d_product, Tensor(a!) d_change, Tensor trace, "
    "Tensor(b!) d_x, Tensor(c!) d_recurrent, int first, int rows, float recurrent_scale, "
    "float change_scale) -> ()",
)


for _schema in _SCHEMAS:
    define(_schema, recurrent_reference, "triton_recurrent")

#: Arguments are those of the functions of :mod:`.recurrent_reference`, by position.
lstm_step = torch.ops.lightning_nna.lstm_step.default
lstm_step_backward = torch.ops.lightning_nna.lstm_step_backward.default
gru_step = torch.ops.lightning_nna.gru_step.default
gru_step_backward = torch.ops.lightning_nna.gru_step_backward.default
