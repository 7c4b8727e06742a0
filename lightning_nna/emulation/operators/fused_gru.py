"""The GRU of :mod:`.gru_sequence` in two calls a step, forward and backward alike.

A step is the matrix product of the states with the recurrent weight and one kernel for all other
instructions (:mod:`.kernels.recurrent`). Its integers are those of exact fidelity, which no other
form would be faster than.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN
from lightning_nna.emulation.kernels.definitions import ROUNDINGS
from lightning_nna.emulation.kernels.recurrent import prepared_step
from lightning_nna.emulation.operators.activation import WIDE_OUTPUT, wide_entries
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.elementwise import product_factor, sum_factors
from lightning_nna.emulation.operators.fused_product import (
    FusedProduct,
    dtype_of_sums,
    multiply_bytes,
    steps_of,
)
from lightning_nna.emulation.operators.gru_sequence import Grids
from lightning_nna.emulation.operators.sequence_function import (
    Gradients,
    SequenceSteps,
    ThroughTime,
)
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.spec import NNASpec


class FusedGRUSteps(SequenceSteps):
    """The arithmetic of one layer in one direction.

    Args:
        call: Call of the steps.
        grids: Quantization parameters of a step.
        product: Instruction of the states.
    """

    operator = "gru"

    def __init__(self, call: Call, grids: Grids, product: FusedProduct) -> None:
        super().__init__(product.weight)
        self.grids, self.spec, self._of_states = grids, call.state.spec, product

    @property
    @override
    def through_time(self) -> ThroughTime:
        return partial(_through_time, self.grids)

    @override
    def run(
        self, x: Activation, start: Activation, layout: Layout, *, keep: bool
    ) -> tuple[Tensor, Sequence[Tensor | None] | None]:
        product, grids, spec = self._of_states, self.grids, self.spec
        rows, batch, size = layout.rows, layout.batch, start.value.shape[1]
        inputs, device = x.integers(), x.value.device
        new = inputs.new_empty
        outputs, trace = new((rows, size)), new((rows, 6 * size), dtype=torch.int16)
        states = new((batch + rows, size), dtype=torch.int16)
        states[:batch].copy_(start.integers())
        state = product.split(states[:batch])
        sums = new((batch, product.parts, 3 * size), dtype=dtype_of_sums(product.columns))
        factors = _factors(grids, spec, device)
        tables = (
            _table("sigmoid", grids.gates.scale, spec, device),
            _table("tanh", grids.new.scale, spec, device),
        )
        step = prepared_step(
            "gru_step",
            (
                *(sums, inputs, product.factors, product.offset, factors, *tables),
                *(state, states, outputs, trace),
            ),
            (
                ROUNDINGS[product.rounding],
                ROUNDINGS[spec.rounding_of("double")],
                product.accumulator_bits,
                product.saturates,
                grids.h.scale,
            ),
        )
        of_steps = steps_of(layout, state.flatten(0, 1), sums.flatten(0, 1), parts=product.parts)
        for first, before, count, (of_step, sums_of_step) in of_steps:
            multiply_bytes(of_step, product.columns, sums_of_step)
            step(first, before, count)
        return outputs, ((trace, states) if keep else None)


def _through_time(
    grids: Grids, layout: Layout, grad: Tensor, tensors: Sequence[Tensor | None], weight: Tensor
) -> Gradients:
    """The loop of the backward."""
    trace, states = tensors
    assert trace is not None
    assert states is not None
    rows, size, batch = layout.rows, weight.shape[1], layout.batch
    d_x, d_recurrent = (weight.new_empty((rows, 3 * size)) for _ in range(2))
    # A sequence that ends early gets nothing from later steps.
    d_change, d_product = (weight.new_zeros((batch, size)) for _ in range(2))
    grad = grad.contiguous()
    step = prepared_step(
        "gru_step_backward",
        (grad, d_product, d_change, trace, d_x, d_recurrent),
        (grids.recurrent.scale, grids.change.scale),
    )
    of_steps = zip(
        list(steps_of(layout, d_product)), d_recurrent.split(list(layout.sizes)), strict=True
    )
    for (first, _, count, (d_state,)), d_step in reversed(list(of_steps)):
        step(first, count)
        torch.mm(d_step, weight, out=d_state)
    before = layout.before(states).float().mul_(grids.h.scale)
    return Gradients(d_x, d_recurrent, d_change.add_(d_product), before)


@lru_cache(maxsize=256)
def _factors(grids: Grids, spec: NNASpec, device: torch.device) -> Tensor:
    """Factors of the instructions of a step, float64, shape ``(14,)``."""
    g, n = grids, WIDE_OUTPUT
    values = (
        *sum_factors(g.x, g.recurrent, g.gates),
        product_factor(n, g.recurrent, g.reset, spec),
        *sum_factors(g.x, g.reset, g.new),
        *sum_factors(g.h, n, g.change),
        product_factor(n, g.change, g.update, spec),
        *sum_factors(n, g.update, g.h),
    )
    with torch.inference_mode(False):  # Kept for training, whoever asks first.
        return torch.tensor(values, dtype=torch.float64).to(device)


@lru_cache(maxsize=64)
def _table(name: str, scale: float, spec: NNASpec, device: torch.device) -> Tensor:
    """Results of all 16-bit integers, int16, shape ``(65536,)``."""
    with torch.inference_mode(False):
        integers = torch.arange(INT16_MIN, INT16_MAX + 1)
        entries = wide_entries(name, integers, scale, spec)
        return entries.clamp(INT16_MIN, INT16_MAX).to(torch.int16).to(device)
