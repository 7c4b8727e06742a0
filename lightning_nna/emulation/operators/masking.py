r"""Masks as models write them by hand before a softmax.

``scores.masked_fill(mask, -inf)``, ``torch.where(mask, scores, -inf)`` and ``scores + mask`` with a
mask of zeros and minus infinities (or some large negative number instead) leave scores out. On the
chip they become the lowest integer of a grid that reaches as far down as
:mod:`.attention_mask` says; scores on a narrower grid are requantized to it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.deferred_checks import DEFERRED
from lightning_nna.emulation.arithmetic.on_host import in_memory
from lightning_nna.emulation.operators import elementwise
from lightning_nna.emulation.operators.attention_mask import (
    ABSENT,
    DEPTHS,
    SeenMasks,
    biased,
    fill,
    kept,
    parts_of,
    row_maxima,
)
from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.operators.comparison import logical_not
from lightning_nna.emulation.operators.joint_parameters import Joint
from lightning_nna.emulation.operators.record import Form, Kernel, Operator, register_operator
from lightning_nna.emulation.program import Activation, Stored

# What a mask may add to the scores that it leaves in.
_LARGEST_BIAS = 1e3


def masked_fill(call: Call, input: Tensor, mask: Tensor, value: Any) -> Tensor:
    """Emulate ``torch.masked_fill``; shapes broadcast, and minus infinity leaves scores out."""
    if _is_absence(value) and input.dim() > 0:
        if call.state.qparams_of(input) is None:
            return input.masked_fill(mask, value)
        absent = mask if call.state.constants.kind_of([mask]) is None else None
        return _without(call, input, ~mask, call.state.constants.is_constant(mask), absent)
    if _is_plain(call, input, value) and call.state.constants.kind_of([mask]) is not None:
        return input.masked_fill(mask, value)
    return choose(call, mask, value, input)


def where(call: Call, *args: Any, **kwargs: Any) -> Tensor:
    """Emulate ``torch.where`` or ``Tensor.where`` of shapes that broadcast.

    Minus infinity leaves scores out. The method has the condition second: ``x.where(mask, y)``.
    """
    values = dict(zip(("condition", "input", "other"), args, strict=False))
    is_method = bool(args) and args[0].is_floating_point()
    if is_method:
        values = dict(zip(("input", "condition", "other"), args, strict=False))
    return _where(call, **{**values, **kwargs})


def _where(call: Call, condition: Tensor, input: Any, other: Any) -> Tensor:
    absent = _is_absence(input), _is_absence(other)
    scores, keep = (input, condition) if absent[1] else (other, ~condition)
    if any(absent) and not all(absent) and isinstance(scores, Tensor) and scores.dim() > 0:
        if call.state.qparams_of(scores) is None:
            return torch.where(condition, input, other)
        constants, without = call.state.constants, None
        if constants.kind_of([condition]) is None:
            without = logical_not(call, condition) if absent[1] else condition
        return _without(call, scores, keep, constants.is_constant(condition), without)
    if any(absent) and _is_plain(call, input, other):  # A mask itself.
        return torch.where(condition, input, other)
    return choose(call, condition, input, other)


def choose(call: Call, condition: Tensor, input: Tensor | float, other: Tensor | float) -> Tensor:
    """Select values of one operand where a condition holds, and of the other elsewhere.

    Args:
        call: The call.
        condition: Booleans, of a shape that broadcasts with those of the operands.
        input: Tensor or number that is taken where the condition holds.
        other: Tensor or number that is taken elsewhere.
    """
    input, other = (_number(call, x) for x in (input, other))

    def function(first: Tensor | float, second: Tensor | float) -> Tensor:
        return torch.where(condition, first, second)

    result, operands = Joint(call, (input, other), ("input", "other")).compute(function)
    if call.recording:
        constant = call.state.constants.is_constant(condition)
        mask = Stored(condition, "bool", constant=constant, source=condition)
        y = Activation(result, operands[0].qparams)
        call.record("SELECT_V2", [mask, *(x.stored() for x in operands)], [y.stored()])
    return result


def _number(call: Call, x: Tensor | float) -> Tensor | float:
    """A constant without axes as a number, which may be infinite."""
    constants = call.state.constants
    if not isinstance(x, Tensor) or x.dim() or x.requires_grad or not _is_plain(call, x):
        return x
    return float(x) if constants.is_constant(x) else x


def _is_plain(call: Call, *values: Any) -> bool:
    """Tell whether no value, a tensor of any shape or a number, is an activation."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    tagged = (call.state.qparams_of, call.state.mixed_qparams_of)
    return all(of(x) is None for x in tensors for of in tagged)


def add(call: Call, input: Tensor | float, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    """Emulate ``input + alpha * other`` of shapes that broadcast; a mask may leave scores out."""
    if alpha == 1 and isinstance(input, Tensor) and isinstance(other, Tensor):
        qparams_of = call.state.qparams_of
        # A mask has no quantization parameters.
        if qparams_of(input) is not None and qparams_of(other) is not None:
            return elementwise.add(call, input, other)
        for scores, mask in ((input, other), (other, input)):
            if qparams_of(scores) is not None and _is_mask(call, mask):
                return _with_mask(call, scores, mask)
    return elementwise.add(call, input, other, alpha=alpha)


def _with_mask(call: Call, scores: Tensor, mask: Tensor) -> Tensor:
    keep, bias = parts_of(mask, seen=SeenMasks.at(call))
    if keep is None:
        keep = torch.ones_like(mask, dtype=torch.bool)
    if bias is not None:
        taking_part = keep & (scores.detach() > ABSENT) if call.observing else keep
        scores = biased(call.child("bias"), scores, bias, taking_part)
    return _without(call, scores, keep, call.state.constants.is_constant(mask))


def _without(
    call: Call, scores: Tensor, keep: Tensor, constant: bool, absent: Tensor | None = None
) -> Tensor:
    """Scores with those not to keep at the bottom of a grid that is deep enough.

    ``absent`` is the opposite of ``keep``, if the program has it as a condition.
    """
    x = call.operand(scores, "input")
    if call.observing:
        # An earlier mask may have left scores out: a padding mask that follows a causal one.
        keep = keep & (scores.detach() > ABSENT)
        call.observed(row_maxima(scores, keep), "row_maxima")
        call.observed(kept(scores, keep))
        return fill(call, scores, keep, constant, absent)
    call.output(lambda: row_maxima(scores, keep), "row_maxima")
    floor = call.state.ranges[f"{call.site}/row_maxima"].minimum - DEPTHS[call.bits]
    if x.qparams.bounds[0] * x.qparams.scale > floor:
        y = replace(call, min_value=floor).output(lambda: kept(scores, keep))
        scores = call.with_qparams(requantize(call, x, y), y)
    return fill(call, scores, keep, constant, absent)


def _is_mask(call: Call, x: Tensor) -> bool:
    """Tell whether a tensor that is not quantized leaves scores out, and is small elsewhere.

    Data of a large range is no mask. A mask that happens to leave out nothing counts where
    calibration has seen one that did. On a device calibration alone decides: nobody looks.
    """
    if call.state.qparams_of(x) is not None or not x.numel():
        return False
    had_masks = not call.observing and f"{call.site}/row_maxima" in call.state.ranges
    if not call.observing and not in_memory(x):
        if not had_masks:
            DEFERRED.require(x.detach().min() > ABSENT, _unseen_mask(call))
        return had_masks
    if float(x.detach().min()) <= ABSENT:
        rest = x.detach().masked_fill(x.detach() <= ABSENT, 0.0)
        return float(rest.abs().max()) < _LARGEST_BIAS
    return had_masks and not bool(x.any())


def _unseen_mask(call: Call) -> Exception:
    return ValueError(
        f"{call.site}: a tensor leaves scores out, and calibration has seen none that does: "
        f"calibrate with batches that have such masks"
    )


def _is_absence(value: Any) -> bool:
    """Tell whether a number, or a tensor of one element, stands for the absence of a score."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dim() == 0 and float(value) <= ABSENT
    return isinstance(value, (int, float)) and value <= ABSENT


register_operator(replace(elementwise.ADD, emulate=add))
register_operator(
    Operator(
        "select",
        torch=("masked_fill", "masked_fill_"),
        emulate=masked_fill,
        forms=(Form(("where",), where),),
        litert=(Kernel("SELECT_V2", order="elements", options="SelectV2Options"),),
        arithmetic="operands requantized to the parameters of the result; a score that a mask "
        "leaves out becomes the lowest integer",
    )
)
