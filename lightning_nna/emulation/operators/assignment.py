"""Values written to a part of a tensor: slice assignment and its relatives.

``y[:, 0] = value``, ``index_copy``, ``scatter``, padding with a number: the values and the rest
share the quantization parameters of the result. They stay those of ``y`` where its range covers
what is written, so that the rest is not touched; otherwise both are requantized to the range that
calibration has observed. The accelerator has no instruction of it: a program lays the result out
from both by slices and a concatenation.

``triu`` and ``tril`` are a product with a constant mask of zeros and ones, exact on the parameters
of their input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators import masking
from lightning_nna.emulation.operators.call import Call, UnsupportedError
from lightning_nna.emulation.operators.joint_parameters import Joint
from lightning_nna.emulation.operators.record import Form, Operator, register_operator
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import PENDING, QParams

_FIXED = (
    "write where a constant index says, add into zeros with scatter_add, or select with "
    "torch.where and a mask of the data"
)
_ADDED_UP = "write scatter_add or index_add"


def assign(call: Call, base: Tensor, value: Tensor | float, write: Callable[..., Tensor]) -> Tensor:
    """Write values over a part of a tensor.

    Args:
        call: The call.
        base: Tensor of any shape.
        value: What is written, of the shape that ``write`` takes, or a number.
        write: Function of a tensor and values that returns a copy with the values in it.

    Returns:
        A new tensor of the shape of ``base``.
    """
    tensors = [x for x in (base, value) if isinstance(x, Tensor)]
    if all(_is_plain(call, x) for x in tensors):
        return write(base, value)
    if _is_plain(call, base) and call.state.constants.in_program(base) and not bool(base.any()):
        # Zeros to be filled are on any quantization parameters, those of the values among them.
        return _fill_zeros(call, base, value, write)
    result, _ = Joint(call, (base, value), ("input", "value")).compute(write)
    return result


def _fill_zeros(
    call: Call, base: Tensor, value: Tensor | float, write: Callable[..., Tensor]
) -> Tensor:
    result, _ = Joint(call, (value, 0.0), ("value", "fill")).compute(
        lambda values, zero: write(base, values)
    )
    return result


def set_item(call: Call, input: Tensor, index: Any, value: Tensor | float) -> Tensor:
    """Emulate ``input[index] = value`` of any shapes; a mask may select where a number goes."""
    mask = _mask_of(index)
    is_number = not isinstance(value, Tensor) or value.dim() == 0
    if mask is not None and is_number and mask.dim() <= input.dim():
        form = (*mask.shape, *[1] * (input.dim() - mask.dim()))
        return masking.masked_fill(call, input, mask.reshape(form), value)
    _require_fixed(call, index)

    def write(base: Tensor, values: Tensor | float) -> Tensor:
        copy = base.clone()
        copy[index] = values
        return copy

    return assign(call, input, value, write)


def _mask_of(index: Any) -> Tensor | None:
    """The mask, of any shape, that an index is, if it is one."""
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
    return index if is_mask else None


def _require_fixed(call: Call, index: Any) -> None:
    """Raise if indices, nested, are computed from data."""
    entries = index if isinstance(index, (tuple, list)) else [index]
    tensors = [x for x in entries if isinstance(x, Tensor)]
    if tensors and call.state.constants.kind_of(tensors) is None:
        raise UnsupportedError(_FIXED)


def _written(
    function: Callable[..., Tensor],
    position: int,
    names: tuple[str, ...],
    call: Call,
    input: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Emulate a function of torch that writes its argument at ``position`` into ``input``.

    Args:
        function: Function that returns a copy.
        position: Position of the values.
        names: Names of the values as an argument.
        call: The call.
        input: Tensor of any shape.
        args: Other arguments.
        kwargs: Other arguments by name.
    """
    adds_up = any(x is True for x in args) or kwargs.pop("accumulate", False)
    if adds_up or kwargs.pop("reduce", None):
        raise UnsupportedError(_ADDED_UP)
    keyword = next((name for name in names if name in kwargs), None)
    arguments = list(args)
    value = kwargs.pop(keyword) if keyword is not None else arguments.pop(position - 1)
    _require_fixed(call, [*arguments, *kwargs.values(), *_indices(arguments)])

    def write(base: Tensor, values: Tensor | float) -> Tensor:
        if not isinstance(value, Tensor):  # Its overload takes no tensor.
            values = float(values)
        if keyword is not None:
            return function(base, *arguments, **kwargs, **{keyword: values})
        before, after = arguments[: position - 1], arguments[position - 1 :]
        return function(base, *before, values, *after, **kwargs)

    return assign(call, input, value, write)


def _indices(arguments: list[Any]) -> list[Any]:
    """Indices that ``index_put`` takes in a tuple."""
    return [x for each in arguments if isinstance(each, (tuple, list)) for x in each]


def _in_full(input: Tensor, value: Tensor | float) -> Tensor:
    """A tensor of the shape of ``input`` full of a number."""
    if isinstance(value, Tensor):
        return value.expand_as(input).clone()
    return torch.full_like(input, value)


def zero(call: Call, input: Tensor) -> Tensor:
    """Emulate ``zero_`` of any shape."""
    return assign(call, input, 0.0, _in_full)


def pad(
    call: Call, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None
) -> Tensor:
    """Emulate ``F.pad`` with a number, of any shape; minus infinity is the lowest integer."""
    return assign(call, input, value or 0.0, lambda x, v: F.pad(x, pad, value=float(v)))


def constant_pad_nd(call: Call, input: Tensor, pad: Any, value: float = 0) -> Tensor:
    """Emulate ``torch.constant_pad_nd`` of any shape."""
    return assign(call, input, value, lambda x, v: F.pad(x, pad, value=float(v)))


def triangle(keep: Callable[..., Tensor], call: Call, input: Tensor, diagonal: int = 0) -> Tensor:
    """Emulate ``torch.tril`` or ``torch.triu`` of any shape.

    Args:
        keep: The function itself.
        call: The call.
        input: Matrices, shape ``(*batch, rows, columns)``.
        diagonal: Diagonal at which the part that is kept ends.
    """
    if _is_plain(call, input):
        return keep(input, diagonal)
    x = call.operand(input, "input")
    if call.observing:
        return call.with_qparams(keep(x.value, diagonal), PENDING)
    ones = torch.ones(input.shape[-2:], device=input.device)
    unit = QParams(1.0, 0) if x.qparams.bits == 8 else QParams(1.0, 0, -(2**15), 2**15 - 1)
    mask = Activation(keep(ones, diagonal), unit, constant=True)
    result = Activation(x.value * mask.value, x.qparams)
    if call.recording:
        call.record("MUL", [x.stored(), mask.stored()], [result.stored()])
    return call.with_qparams(result.value, x.qparams)


def _is_plain(call: Call, x: Tensor) -> bool:
    """Tell whether a tensor of any shape is no activation: data in float, or a constant."""
    return call.state.qparams_of(x) is None and call.state.mixed_qparams_of(x) is None


# By the names of the functions: one that returns a copy, position and names of its values.
_FORMS: dict[tuple[str, ...], tuple[Callable[..., Tensor], int, tuple[str, ...]]] = {
    ("index_copy", "index_copy_"): (torch.index_copy, 3, ("source",)),
    ("index_fill", "index_fill_"): (torch.index_fill, 3, ("value",)),
    ("index_put", "index_put_"): (torch.index_put, 2, ("values",)),
    ("masked_scatter", "masked_scatter_"): (torch.masked_scatter, 2, ("source",)),
    ("scatter", "scatter_"): (torch.scatter, 3, ("src", "value")),
    ("select_scatter",): (torch.select_scatter, 1, ("src",)),
    ("slice_scatter",): (torch.slice_scatter, 1, ("src",)),
    ("diagonal_scatter",): (torch.diagonal_scatter, 1, ("src",)),
    ("as_strided_scatter",): (torch.as_strided_scatter, 1, ("src",)),
    ("fill_",): (_in_full, 1, ("value",)),
}

register_operator(
    Operator(
        "assignment",
        torch=("__setitem__",),
        emulate=set_item,
        forms=(
            *(Form(names, partial(_written, *form)) for names, form in _FORMS.items()),
            Form(("zero_",), zero),
            Form(("pad",), pad),
            Form(("constant_pad_nd",), constant_pad_nd),
        ),
        arithmetic="values requantized to the quantization parameters of the result, then moved",
    )
)
register_operator(
    Operator(
        "triangle",
        torch=("tril", "tril_"),
        emulate=partial(triangle, torch.tril),
        forms=(Form(("triu", "triu_"), partial(triangle, torch.triu)),),
        arithmetic="product with a constant mask of zeros and ones, exact on any parameters",
    )
)
