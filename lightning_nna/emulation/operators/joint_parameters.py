"""Values of several origins on common quantization parameters, as a selection needs them.

Activations have parameters of their own; numbers and constants take any. Where all fit the
parameters of one activation, these are the common ones, and nothing is requantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.attention_mask import ABSENT
from lightning_nna.emulation.operators.call import Call, holds_any_integer, quantize, requantize
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import PENDING, QParams

# Numbers beyond stand for an end of the range, as torch.finfo(dtype).min does.
_LARGEST = 1e30
# Parameters of ones and zeros that a condition selects.
_NUMBERS = QParams(2.0**-6, 0)


class Joint:
    """Operands that share the quantization parameters of one result.

    Args:
        call: The call.
        operands: Tensors of shapes that the function takes, or numbers.
        names: Names of the operands, for their ranges.
    """

    def __init__(
        self, call: Call, operands: Sequence[Tensor | float], names: Sequence[str]
    ) -> None:
        self.call = call
        self.raw = [float(x) if isinstance(x, (bool, int, float)) else x for x in operands]
        self.activations = [
            None if self._is_constant(x) else call.operand(x, name)
            for x, name in zip(self.raw, names, strict=True)
        ]

    def compute(self, function: Callable[..., Tensor]) -> tuple[Tensor, list[Activation]]:
        """Apply a function that selects values, and return its result and the operands.

        Args:
            function: Takes the operands, tensors or numbers, and returns a tensor of any shape
                whose values are theirs.
        """
        call = self.call
        values = [
            x if activation is None else activation.value
            for x, activation in zip(self.raw, self.activations, strict=True)
        ]
        if call.observing:
            finite = [self._finite(x, values) for x in values]
            result = function(*values)
            call.state.ranges.observe(f"{call.site}/result", function(*finite))
            return call.with_qparams(result, PENDING), []
        y = self._qparams(lambda: function(*(self._finite(x, values) for x in values)))
        operands = [
            self._constant(x, y) if activation is None else self._moved(activation, y)
            for x, activation in zip(self.raw, self.activations, strict=True)
        ]
        first = next(x.value for x in operands)
        with float32_arithmetic(first):
            result = function(*(x.value for x in operands))
        return call.with_qparams(result, y), operands

    def _is_constant(self, x: Tensor | float) -> bool:
        if not isinstance(x, Tensor):
            return True
        state = self.call.state
        return state.qparams_of(x) is None and state.constants.in_program(x)

    def _qparams(self, compute: Callable[[], Tensor]) -> QParams:
        """Parameters that all operands fit, or those of the range of the result."""
        own = [activation.qparams for activation in self.activations if activation is not None]
        fixed = [x for x, each in zip(self.raw, self.activations, strict=True) if each is None]
        if not own and all(_fits(x, _NUMBERS) for x in fixed):
            return _NUMBERS if self.call.bits == 8 else _NUMBERS.widened()
        if own and all(q == own[0] for q in own) and all(_fits(x, own[0]) for x in fixed):
            return own[0]
        y = self.call.output(compute, "result")
        covering = own[0] if own and self.activations[0] is not None else None
        if covering is not None and _covers(covering, y) and holds_any_integer(covering):
            return covering
        return y

    def _moved(self, activation: Activation, y: QParams) -> Activation:
        return Activation(requantize(self.call, activation, y), y)

    def _constant(self, x: Tensor | float, y: QParams) -> Activation:
        """A constant, quantized to the common parameters at once; what is absent, to their end."""
        low, high = (bound * y.scale for bound in y.bounds)
        if isinstance(x, Tensor):
            return Activation(quantize(x.clamp(low, high), y), y, constant=True)
        number = low if x <= ABSENT else min(max(x, low), high)
        # Every thread and every training step may read it.
        value = quantize(torch.tensor(number, dtype=torch.float32), y)
        device = next(
            (each.value.device for each in self.activations if each is not None), value.device
        )
        return Activation(value.to(device), y, constant=True)

    def _finite(self, x: Tensor | float, values: Sequence[Tensor | float]) -> Tensor | float:
        """The operand, without numbers that stand for an end of the range."""
        if isinstance(x, Tensor) or ABSENT < x < _LARGEST:
            return x
        tensors = [each for each in values if isinstance(each, Tensor) and each.numel()]
        if not tensors:
            return 0.0
        low, high = torch.aminmax(tensors[0].detach())
        return float(low if x < 0 else high)


def _fits(x: Tensor | float, q: QParams) -> bool:
    """Tell whether parameters represent a constant exactly."""
    # On a scale of 0.5 from -128: 0.5 and 63.5 are the integers 1 and 127, 0.3 and 70 are none.
    if not isinstance(x, Tensor):
        if not ABSENT < x < _LARGEST:
            return True
        steps = x / q.scale
        return steps == math.floor(steps) and q.bounds[0] <= steps <= q.bounds[1]
    if not x.numel():
        return True
    integers = x.detach().double() / q.scale
    inside = (integers >= q.bounds[0]) & (integers <= q.bounds[1])
    return bool(((integers == integers.round()) & inside).all())


def _covers(q: QParams, y: QParams) -> bool:
    """Tell whether the range of ``q`` has that of ``y`` in it, except for half a unit."""
    slack = q.scale / 2
    low, high = (bound * y.scale for bound in y.bounds)
    return q.bounds[0] * q.scale <= low + slack and high - slack <= q.bounds[1] * q.scale
