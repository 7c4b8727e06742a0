"""Steps of recurrent layers as operators of PyTorch: one kernel for all gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_nna.emulation.kernels import recurrent_reference
from lightning_nna.emulation.kernels.library import define, prepared

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


def prepared_step(
    name: str, buffers: Sequence[Tensor], numbers: Sequence[Any]
) -> Callable[..., bool]:
    """Prepare the kernel of a step for all steps of a sequence.

    Args:
        name: Name of a function of :mod:`.recurrent_reference`, which describes the arguments.
        buffers: Its tensors.
        numbers: Its arguments after ``rows``.

    Returns:
        Function of ``first``, ``rows`` and, between them, ``before`` if the kernel has it; see
        :func:`.library.prepared`.
    """
    return prepared(name, buffers, numbers)
