"""Concatenation: every input is requantized to the parameters of the result, then moved.

``stack``, ``hstack`` and their like are a concatenation of views; ``block_diag`` one of rows that
are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.operators.record import Form, Kernel, Operator, register_operator
from lightning_nna.emulation.program import Activation


def concatenate(call: Call, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Emulate ``torch.cat`` of shapes equal except in ``dim``; operands are requantized first.

    Float data that no operator has quantized yet are put together before they come to the chip,
    and padded with what the forward makes of numbers. Empty tensors, with which caches begin, have
    no grid and are left out.
    """
    if all(_is_plain(call, x) for x in tensors):
        return torch.cat(list(tensors), dim)
    tensors = [x for x in tensors if x.numel()] or list(tensors)
    parts = [call.operand(x, f"input{i}") for i, x in enumerate(tensors)]
    if call.observing:
        return call.observed(torch.cat([part.value for part in parts], dim))
    if len({part.qparams for part in parts}) == 1:
        return call.unchanged(_join(call, parts, dim), parts[0])
    y = call.output(lambda: torch.cat([part.value for part in parts], dim))
    moved = [Activation(requantize(call, part, y), y, part.constant) for part in parts]
    with float32_arithmetic(parts[0].value):
        result = _join(call, moved, dim)
    return call.with_qparams(result, y)


def _is_plain(call: Call, x: Tensor) -> bool:
    """Tell whether a tensor is float data that no operator has quantized."""
    on_a_grid = call.state.qparams_of(x) is not None or call.state.mixed_qparams_of(x) is not None
    return not on_a_grid and not call.state.constants.is_own(x)


def stack(call: Call, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Emulate ``torch.stack`` of equal shapes: a concatenation along a new axis."""
    new = dim if dim >= 0 else dim + tensors[0].dim() + 1
    return concatenate(call, _views(call, tensors, lambda x: x.unsqueeze(new)), new)


def hstack(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    """Emulate ``torch.hstack`` of any shapes: along axis 1, vectors along axis 0."""
    views = _views(call, tensors, torch.atleast_1d)
    return concatenate(call, views, 0 if views[0].dim() == 1 else 1)


def vstack(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    """Emulate ``torch.vstack`` of any shapes: along axis 0, vectors as rows."""
    return concatenate(call, _views(call, tensors, torch.atleast_2d), 0)


def dstack(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    """Emulate ``torch.dstack`` of any shapes: along axis 2."""
    return concatenate(call, _views(call, tensors, torch.atleast_3d), 2)


def column_stack(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    """Emulate ``torch.column_stack`` of any shapes: along axis 1, vectors as columns."""
    views = _views(call, tensors, lambda x: x.reshape(-1, 1) if x.dim() < 2 else x)
    return concatenate(call, views, 1)


def block_diag(call: Call, *tensors: Tensor) -> Tensor:
    """Emulate ``torch.block_diag`` of matrices of any shapes, with zeros between them."""
    views = _views(call, tensors, torch.atleast_2d)
    width, before, rows = sum(x.shape[1] for x in views), 0, []
    for x in views:
        after = width - before - x.shape[1]
        rows.append(call.viewed(torch.nn.functional.pad(x, (before, after)), x))
        before += x.shape[1]
    return concatenate(call, rows, 0)


def _views(
    call: Call, tensors: Sequence[Tensor], function: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Views of tensors of any shapes, each with the marks of its tensor."""
    constants, views = call.state.constants, []
    for x in tensors:
        view = call.viewed(function(x), x)
        if view is not x:
            constants.mark(view, constants.kind_of([x]))
        views.append(view)
    return views


def _join(call: Call, parts: list[Activation], dim: int) -> Tensor:
    """Join parts of equal parameters, in several instructions if a kernel takes no more."""
    most = most_parts(call.state.spec.runtime)
    while most is not None and len(parts) > most:
        groups = [parts[first : first + most] for first in range(0, len(parts), most)]
        parts = [
            Activation(_join(call, group, dim), group[0].qparams, all(p.constant for p in group))
            for group in groups
        ]
    result = torch.cat([part.value for part in parts], dim)
    if call.recording:
        axis = dim if dim >= 0 else dim + result.dim()
        y = Activation(result, parts[0].qparams)
        call.record("CONCATENATION", [p.stored() for p in parts], [y.stored()], axis=axis)
    return result


def most_parts(runtime: str) -> int | None:
    """Return the number of tensors that the kernel of a runtime joins at most; None for any.

    Args:
        runtime: Name of the runtime.

    Example:
        >>> most_parts("tflm")
        10
    """
    return 10 if runtime == "tflm" else None


register_operator(
    Operator(
        "concatenation",
        torch=("cat", "concat", "concatenate"),
        emulate=concatenate,
        forms=(
            Form(("stack",), stack),
            Form(("hstack",), hstack),
            Form(("vstack", "row_stack"), vstack),
            Form(("dstack",), dstack),
            Form(("column_stack",), column_stack),
            Form(("block_diag",), block_diag),
        ),
        litert=(Kernel("CONCATENATION", order="concatenation", versions={"int8": 2, "int16": 3}),),
        learns_scale=True,
        arithmetic="inputs requantized to the quantization parameters of the output, then moved",
    )
)
