"""Instructions of the accelerator with their integers, as a recorder of a forward receives them.

Every operator records the instruction that it has just emulated, by its name in the TensorFlow Lite
schema and with its operands in that schema's layout. A recorder (an export, a test that runs the
instruction on LiteRT) does not depend on torch functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.ranges import QParams

#: Numbers of types in the TensorFlow Lite schema, which options of instructions have.
SCHEMA_TYPES = {"int32": 2, "bool": 6, "int16": 7, "int8": 9}


@dataclass(frozen=True)
class Stored:
    """Describe a tensor as the accelerator stores it: real value = scale (integer - zero point).

    Args:
        integers: Stored values, int64 or, if ``dtype`` is ``"float32"``, float32; any shape.
        dtype: ``"int8"``, ``"int16"``, ``"int32"``, ``"int64"``, ``"bool"`` or ``"float32"``.
        scale: Scale: one number, a tensor of shape ``(channels,)``, or 0 for none.
        zero_point: Integer that stands for 0.
        constant: Whether the tensor belongs to the program and not to the data.
        channel_axis: Axis of ``integers`` that the scales of several channels belong to.
        variable: Whether the tensor is a state that the instruction reads and then overwrites.
        source: Tensor of the forward that has the values, in the shape of ``integers``: the tensor
            itself or the result of a layout operator. None if there is no such tensor.
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
    """Describe a quantized tensor by the float32 tensor of its real values.

    Args:
        value: Real values, float32, any shape: integers less the zero point, times the scale.
        qparams: Quantization parameters.
        constant: Whether the tensor is part of the program, as a parameter or a number is.
    """

    value: Tensor
    qparams: QParams
    constant: bool = False

    def integers(self) -> Tensor:
        """Compute integers less the zero point, exact, in float32, of the value's shape."""
        if not in_memory(self.value):
            return kernels.whole_numbers(self.value.detach(), scale=self.qparams.scale)
        # The quotient is a whole number.
        quotient = self.value.detach() / self.qparams.scale
        return quotient if on_host(quotient) else quotient.round_()

    def stored(self) -> Stored:
        """Return the integers with the zero point, for an instruction."""
        qparams = self.qparams
        integers = self.integers().long() + qparams.zero_point
        dtype = "int8" if qparams.bits == 8 else "int16"
        return Stored(
            integers, dtype, qparams.scale, qparams.zero_point, self.constant, source=self.value
        )


@dataclass(frozen=True)
class Instruction:
    """One instruction of the accelerator, with the integers of one run.

    Args:
        operator: Name of a builtin operator of the schema, as ``"FULLY_CONNECTED"``.
        site: Key of the call site.
        inputs: Operands; None for an absent one.
        outputs: Results.
        options: Fields of the operator's options, by the schema's names.
        intermediates: Tensors that have scales alone (those of the LSTM).
        new_state: Values of the variable operands after the run, in the order of the operands.
    """

    operator: str
    site: str
    inputs: tuple[Stored | None, ...]
    outputs: tuple[Stored, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    intermediates: tuple[Stored, ...] = ()
    new_state: tuple[Stored, ...] = ()


def activation(value: Tensor, qparams: QParams, *, constant: bool = False) -> Stored:
    """Return the stored form of a quantized tensor.

    Args:
        value: Real values of the integers, float32, any shape.
        qparams: Quantization parameters.
        constant: Whether the tensor belongs to the program and not to the data.

    Example:
        >>> activation(torch.tensor([0.0, 1.5]), QParams(0.5, -128)).integers
        tensor([-128, -125])
    """
    integers = (value.detach().double() / qparams.scale).round().long() + qparams.zero_point
    dtype = "int8" if qparams.bits == 8 else "int16"
    return Stored(integers, dtype, qparams.scale, qparams.zero_point, constant, source=value)
