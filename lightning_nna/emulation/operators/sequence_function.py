"""A recurrent layer over whole sequences as one autograd function, whatever its steps compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.autograd import Function

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight, values_of
from lightning_nna.emulation.first_order import require_first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.program import Activation


class Gradients(NamedTuple):
    """Hold what the backward of the loop returns.

    Args:
        x: Gradients of the input products, shape ``(rows, gates * hidden)``.
        recurrent: Of the state products, of the same shape.
        h: Of the initial states, ``(batch, hidden)``.
        before: States before each step, real values, ``(rows, hidden)``.
    """

    x: Tensor
    recurrent: Tensor
    h: Tensor
    before: Tensor


#: Backward of the loop: takes the layout of the rows, the gradient of the states, the trace of the
#: forward and the values of the recurrent weight.
ThroughTime = Callable[[Layout, Tensor, Sequence[Tensor | None], Tensor], Gradients]


class SequenceSteps(ABC):
    """The arithmetic of one layer in one direction.

    Args:
        weight: Quantized recurrent weight, shape ``(gates * hidden, hidden)``.
    """

    #: Name of the layer in errors.
    operator: ClassVar[str]

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight

    @property
    @abstractmethod
    def through_time(self) -> ThroughTime:
        """Backward of :meth:`run`, without the buffers of the steps."""

    @abstractmethod
    def run(
        self, x: Activation, start: Activation, layout: Layout, *, keep: bool
    ) -> tuple[Tensor, Sequence[Tensor | None] | None]:
        """Run all steps.

        Args:
            x: Input products, shape ``(rows, gates * hidden)``.
            start: Initial states, ``(batch, hidden)``.
            layout: Of the rows.
            keep: Whether a backward follows.

        Returns:
            States after each step, real values, ``(rows, hidden)``, and the trace.
        """


class SequenceFunction(Function):
    """All steps of one layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        w_hh: Tensor,
        bias: Tensor | None,
        inputs: Activation,
        start: Activation,
        steps: SequenceSteps,
        layout: Layout,
    ) -> Tensor:
        """Return the states after each step, shape ``(rows, hidden)``."""
        states, trace = steps.run(inputs, start, layout, keep=any(ctx.needs_input_grad))
        if trace is not None:
            ctx.operator, ctx.through_time, ctx.layout = steps.operator, steps.through_time, layout
            weight = steps.weight
            ctx.save_for_backward(weight.stored, weight.scales, *trace)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first four arguments."""
        require_first_order(ctx.operator)
        # Outside of the block: with activation checkpointing, asking for what was saved runs the
        # forward again.
        weight, scales, *trace = ctx.saved_tensors
        with float32_arithmetic(grad):
            through = ctx.through_time(ctx.layout, grad, trace, values_of(weight, scales))
            d_w = through.recurrent.T @ through.before if ctx.needs_input_grad[2] else None
            d_bias = through.recurrent.sum(0) if ctx.needs_input_grad[3] else None
        return through.x, through.h, d_w, d_bias, None, None, None, None
