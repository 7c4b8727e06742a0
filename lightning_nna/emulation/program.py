"""Instructions of the accelerator with their integers, as a recorder of a forward receives them.

Every operator reports the instruction that it has just emulated in the vocabulary of the
TensorFlow Lite schema, with its operands in that schema's layout. Whoever listens (an export, a
test that runs the same instruction on LiteRT) needs to know nothing of torch functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.ranges import QParams

# Movements of tensors on one grid that are instructions nevertheless, because values decide.
_CHOICES = {"maximum": "MAXIMUM", "minimum": "MINIMUM", "where": "SELECT_V2"}


@dataclass(frozen=True)
class Stored:
    """A tensor as the accelerator holds it: real value = scale (integer - zero point).

    Args:
        integers: Stored values, int64, or float32 where ``dtype`` says so.
        dtype: ``"int8"``, ``"int16"``, ``"int32"``, ``"int64"``, ``"bool"`` or ``"float32"``.
        scale: One number, one for each index of ``channel_axis``, or 0 for none.
        zero_point: The integer that stands for 0.
        constant: Whether it belongs to the program and not to the data.
        channel_axis: Axis along which several scales go.
        variable: Whether it is state that the instruction reads and then overwrites.
        source: Where its values stand in the forward, in the shape of ``integers``: the tensor
            itself or one that was moved there from it. None for what belongs to no tensor.
    """

    integers: Tensor
    dtype: str
    scale: float | Tensor = 0.0
    zero_point: int = 0
    constant: bool = False
    channel_axis: int = 0
    variable: bool = False
    source: Tensor | None = None


@dataclass(frozen=True)
class Activation:
    """A float32 tensor that lies on an integer grid, and the grid."""

    value: Tensor
    qparams: QParams
    #: Whether it depends on no activation, as a parameter or a number: part of the program.
    constant: bool = False

    def integers(self) -> Tensor:
        """Integers less the zero point, exact, in float32."""
        # The quotient is a whole number; a GPU multiplies by the inverse instead of dividing.
        quotient = self.value.detach() / self.qparams.scale
        return quotient if quotient.is_cpu else quotient.round_()

    def stored(self) -> Stored:
        """The integers with the zero point, for an instruction."""
        integers = self.integers().long() + self.qparams.zero_point
        dtype = "int8" if self.qparams.bits == 8 else "int16"
        grid = self.qparams
        return Stored(
            integers, dtype, grid.scale, grid.zero_point, self.constant, source=self.value
        )


@dataclass(frozen=True)
class Instruction:
    """One instruction of the accelerator and the integers of one run of it.

    Args:
        operator: Its name among the schema's builtin operators, as ``"FULLY_CONNECTED"``.
        site: Key of the call site.
        inputs: Operands; None for an absent one.
        outputs: Results.
        options: Fields of the operator's options, by the schema's own names.
        intermediates: Tensors that carry scales alone (the LSTM's).
        left: What it leaves in its variable operands, in their order.
    """

    operator: str
    site: str
    inputs: tuple[Stored | None, ...]
    outputs: tuple[Stored, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    intermediates: tuple[Stored, ...] = ()
    left: tuple[Stored, ...] = ()


def activation(value: Tensor, qparams: QParams, *, constant: bool = False) -> Stored:
    """The stored form of a float tensor that lies on a grid.

    Args:
        value: Float32 values on the grid.
        qparams: The grid.
        constant: See :class:`Stored`.

    Example:
        >>> activation(torch.tensor([0.0, 1.5]), QParams(0.5, -128)).integers
        tensor([-128, -125])
    """
    integers = (value.detach().double() / qparams.scale).round().long() + qparams.zero_point
    dtype = "int8" if qparams.bits == 8 else "int16"
    return Stored(integers, dtype, qparams.scale, qparams.zero_point, constant, source=value)


def choice(
    name: str,
    path: str,
    args: tuple[Any, ...],
    result: Tensor,
    qparams_of: Callable[[Tensor], QParams | None],
) -> Instruction | None:
    """The instruction of what looks like a movement and chooses between values of one grid.

    Args:
        name: Of the torch function.
        path: Of the module.
        args: Of the function.
        result: What it has given.
        qparams_of: Gives the grid of a tensor.

    Returns:
        None for what moves values wherever they go.
    """
    grid = qparams_of(result) if name in _CHOICES else None
    if grid is None:
        return None
    tensors = [torch.as_tensor(x, dtype=torch.float32) for x in args[-2:]]
    inputs = [activation(x, grid, constant=qparams_of(x) is None) for x in tensors]
    if name == "where":
        inputs.insert(0, Stored(args[0], "bool", source=args[0]))
    return Instruction(_CHOICES[name], f"{path}/{name}", tuple(inputs), (activation(result, grid),))
