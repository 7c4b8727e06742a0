"""Run an operator: what every operator does, whatever its arithmetic.

An operator of one instruction is a float function and a function of integers. :func:`drive` brings
the operands onto their quantization parameters, observes the range of the result, computes and
clips the integers, keeps autocast away, records the instruction and lets the result carry its
parameters:

    register_operator(
        Operator("exp", torch=("exp",), float=torch.exp, integers=table(real(torch.exp)), ...)
    )
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic import pointwise
from lightning_nna.emulation.clipping import clip, inside
from lightning_nna.emulation.first_order import require_first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Operator
from lightning_nna.emulation.operators.table_look_up import record_table
from lightning_nna.emulation.operators.tables import LookedUp, Table
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import PENDING, QParams

#: Arguments of torch functions that say where a result goes: the emulator writes it there.
_DESTINATIONS = ("inplace", "out")


def run(operator: Operator, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one call of a torch function as the accelerator does.

    Args:
        operator: Operator of the function.
        call: Call site, with the state of the module.
        args: Positional arguments of the torch function.
        kwargs: Its keyword arguments.

    Returns:
        The function's result, with quantization parameters where the accelerator computes it.
    """
    if operator.emulate is not None:
        return operator.emulate(call, *args, **kwargs)
    assert operator.float is not None
    if not kwargs and len(args) == len(operator.operands) and _takes_operands_first(operator):
        return drive(operator, call, *args)
    names = _names_of_arguments(operator.float, operator.operands)
    if len(args) > len(names):
        raise TypeError(f"{operator.name} takes {len(names)} arguments at most, got {len(args)}")
    arguments = dict(zip(names, args, strict=False))
    arguments.update(kwargs)
    for destination in _DESTINATIONS:
        arguments.pop(destination, None)
    operands = [arguments.pop(name) for name in operator.operands]
    return drive(operator, call, *operands, **arguments)


def drive(operator: Operator, call: Call, *operands: Tensor | float, **parameters: Any) -> Tensor:
    """Run one instruction.

    Args:
        operator: Record with ``float`` and ``integers``.
        call: Call site, with the state of the module.
        operands: Values of ``operator.operands``, tensors of any shapes that ``float`` takes, or
            numbers.
        parameters: Other arguments of ``float``; what is not named has its default.

    Returns:
        The result, float32, of the shape that ``float`` gives, with its quantization parameters.
    """
    forms, key = call.state.forms, (id(operator), call.bits)
    if key not in forms:
        # The operator itself is kept, too, so that its id is not used again.
        forms[key] = operator, _form_of(operator, call)
    operator = forms[key][1]
    function = operator.float
    assert function is not None
    assert len(operands) == len(operator.operands)
    operand = partial(_operand, operator, call) if operator.operand_bits else call.operand
    activations = tuple(map(operand, operands, operator.operands))
    values = [activation.value for activation in activations]
    if call.observing:
        result = function(*values, **parameters)
        if operator.output is None:
            return call.observed(result)
        return call.with_qparams(result, PENDING)
    first = activations[0]
    if operator.output is None:
        y = call.output(lambda: function(*values, **parameters))
        if operator.output_of is not None:
            y = operator.output_of(call, activations, y)
    else:
        y = operator.output[first.qparams.bits]
    has_backward = torch.is_grad_enabled() and any(x.requires_grad for x in values)
    with float32_arithmetic(first.value):
        if has_backward:
            result = _Driven.apply((operator, activations, parameters, y, call), *values)
        else:
            result, _ = _computed(operator, activations, parameters, y, call, needs_mask=False)
    if call.recording:
        instructions = operator.instructions or _one_instruction
        instructions(operator, call, activations, Activation(result, y), **parameters)
    return call.with_qparams(result, y)


def table(integers: Callable[..., Tensor]) -> Callable[..., LookedUp]:
    """Return the arithmetic of a function of one tensor: a table of 256 entries, or 65,536.

    Args:
        integers: Takes the quantization parameters of the input and of the output, and the
            operator's parameters by name; returns integers of the output less its zero point, not
            clipped, float32, shape ``(2**x.bits,)``, for the inputs from ``x.low`` on.

    Returns:
        What an operator has as ``integers``. Tables are kept by their arguments.
    """

    @lru_cache(maxsize=256)
    def entries(x: QParams, y: QParams, parameters: tuple[tuple[str, Any], ...]) -> Table:
        with torch.inference_mode(False):  # Kept for training, whoever asks first.
            return Table(integers(x, y, **dict(parameters)), y)

    def looked_up(x: Activation, *, y: QParams, call: Call, **parameters: Any) -> LookedUp:
        known = entries(x.qparams, y, tuple(parameters.items()))
        return LookedUp(known, (x,))

    return looked_up


def real(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the entries of a table that is made in single precision, for :func:`table`.

    Args:
        function: Function of real numbers, float32, of one axis, and of the operator's parameters
            by name.
    """

    def integers(x: QParams, y: QParams, **parameters: Any) -> Tensor:
        return pointwise.tabulate(
            lambda reals: function(reals, **parameters),
            x.bounds[0],
            x.scale,
            y.scale,
            bits=x.bits,
        )

    return integers


def has_elements(input: Tensor, *_: Any, **__: Any) -> bool:
    """Tell whether an input, of any shape, has elements: an empty one runs in float."""
    return input.numel() > 0


def gives_float32(dtype: torch.dtype | None) -> bool | str:
    """Tell whether a function is asked for a type that the accelerator's results have.

    Args:
        dtype: Argument of the torch function; None for the type of its input.

    Example:
        >>> gives_float32(torch.float64)
        'results of an accelerator are float32: leave dtype=torch.float64 out'
    """
    if dtype in (None, torch.float32):
        return True
    return f"results of an accelerator are float32: leave dtype={dtype} out"


def _form_of(operator: Operator, call: Call) -> Operator:
    """The operator, as a table where the runtime lacks its kernel."""
    if operator.instructions is not None or not operator.litert:
        return operator
    kernel, is_one = operator.litert[0], len(operator.operands) == 1
    dtype = f"int{operator.operand_bits.get(operator.operands[0], call.bits)}"
    if call.has(kernel.name, dtype):
        return operator
    if not is_one or kernel.order != "elements":
        call.require(kernel.name, dtype)
    assert operator.integers is not None
    return replace(operator, instructions=partial(record_table, operator.integers))


def _operand(operator: Operator, call: Call, x: Tensor | float, name: str) -> Activation:
    """One operand on its quantization parameters."""
    bits = operator.operand_bits.get(name)
    return (call if bits is None else replace(call, bits=bits)).operand(x, name)


def _computed(
    operator: Operator,
    activations: tuple[Activation, ...],
    parameters: dict[str, Any],
    y: QParams,
    call: Call,
    needs_mask: bool,
) -> tuple[Tensor, Tensor | None]:
    """The result on ``y``, and the second value of :func:`.clip`."""
    assert operator.float is not None
    assert operator.integers is not None
    by_kernel = runs_kernel("look_up", activations[0].value)
    if call.exact or operator.output is None or y.bits != 8 or by_kernel:
        rounded = operator.integers(*activations, y=y, call=call, **parameters)
    else:
        # The same values but where the function falls on a tie: no gather, half the time.
        values = (activation.value.detach() for activation in activations)
        rounded = operator.float(*values, **parameters).mul_(1 / y.scale).round_()
    if isinstance(rounded, LookedUp):
        return rounded.clipped(y, needs_mask)
    centered, clipped = clip(rounded, y, needs_mask)
    return centered.mul_(y.scale), clipped


class _Driven(torch.autograd.Function):
    """Integers forward; backward the operator's gradient where nothing was clipped."""

    @staticmethod
    def forward(
        ctx: Any,
        what: tuple[Operator, tuple[Activation, ...], dict[str, Any], QParams, Call],
        *values: Tensor,
    ) -> Tensor:
        operator, activations, parameters, y, call = what
        needs_mask = operator.output is None and any(ctx.needs_input_grad)
        result, clipped = _computed(operator, activations, parameters, y, call, needs_mask)
        ctx.operator, ctx.parameters = operator, parameters
        ctx.shapes = [value.shape for value in values]
        saved: Sequence[Tensor | None] = ()
        if operator.saves == "operands":
            saved = values
        elif operator.saves == "result":
            saved = (result,)
        elif operator.saves == "factors":
            # Each gradient is the other operand times that of the result.
            needs_first, needs_second = ctx.needs_input_grad[-2:]
            saved = (values[0] if needs_second else None, values[1] if needs_first else None)
        # No more than is needed: what is not saved may be overwritten.
        ctx.save_for_backward(clipped, *saved)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order(ctx.operator.name)
        return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operator, parameters, shapes = ctx.operator, ctx.parameters, ctx.shapes
    needed = ctx.needs_input_grad[-len(shapes) :]
    # Outside of the block: with activation checkpointing, asking for what was saved runs the
    # forward again.
    clipped, *saved = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - len(shapes))
    with float32_arithmetic(grad):
        passed = inside(grad, clipped)
        if operator.backward is None:
            return *gradients, *_derivative(operator, parameters, saved, needed, passed)
        functions = operator.backward
        functions = functions if isinstance(functions, tuple) else (functions,)
        for function, needs, shape in zip(functions, needed, shapes, strict=True):
            if not needs:
                gradients.append(None)
            elif operator.saves == "nothing":
                gradients.append(function(passed.sum_to_size(shape), **parameters))
            else:
                gradients.append(function(passed, *saved, **parameters).sum_to_size(shape))
        return tuple(gradients)


def _derivative(
    operator: Operator,
    parameters: dict[str, Any],
    values: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of the operands by the derivative of the float function."""
    assert operator.float is not None
    with torch.enable_grad():
        leaves = [
            value.detach().requires_grad_(needs)
            for value, needs in zip(values, needed, strict=True)
        ]
        again = operator.float(*leaves, **parameters)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = iter(torch.autograd.grad(again, wanted, grad))
    return [next(gradients) if needs else None for needs in needed]


def _one_instruction(
    operator: Operator,
    call: Call,
    operands: tuple[Activation, ...],
    result: Activation,
    **parameters: Any,
) -> None:
    """Record the operator's own kernel."""
    stored = [operand.stored() for operand in operands]
    options = operator.options(**parameters)
    call.record(operator.litert[0].name, stored, [result.stored()], **options)


def _takes_operands_first(operator: Operator) -> bool:
    """Tell whether the first arguments of the torch function are the operands in their order."""
    assert operator.float is not None
    names = _names_of_arguments(operator.float, operator.operands)
    return names[: len(operator.operands)] == operator.operands


@lru_cache(maxsize=256)
def _names_of_arguments(function: Callable[..., Any], operands: tuple[str, ...]) -> tuple[str, ...]:
    """Names of a float function's arguments; a builtin that tells none takes the operands alone."""
    try:
        return tuple(inspect.signature(function).parameters)
    except ValueError:
        return operands
