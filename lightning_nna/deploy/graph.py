"""A program under construction: tensors with their integers, instructions, and shared constants."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_nna.deploy.flatbuffer import OperatorSpec, TensorSpec, options_of
from lightning_nna.deploy.layout import (
    MOST_SLICED_AXES,
    Codes,
    LayoutBuilder,
    apply_layout_operator,
    codes_of,
    elements_in,
    refers_to,
    tensors_in,
)
from lightning_nna.emulation.operators.catalog import kernels
from lightning_nna.emulation.program import Stored
from lightning_nna.emulation.ranges import QParams
from lightning_nna.emulation.spec import NNASpec

Integers = NDArray[np.int64]


class CaptureError(ValueError):
    """A forward that is no program; the message names the call site and the remedy."""


@dataclass(frozen=True)
class Port:
    """The entry or exit of a tensor of the caller in a program.

    Args:
        tensor: Name of the program's tensor.
        position: Position of the caller's tensor among the arguments, or among the results, nested
            ones one after the other.
        shape: Shape of the caller's tensor.
        from_chip: Whether it comes from an emulated operator, and so was quantized before.
        part: First element and end of the part of the caller's tensor, flat; None for all of it.
            States of several layers in one tensor are such parts, each with quantization parameters
            of its own.
        order: Axes of the caller's tensor in the order in which the program's tensor has them, as
            (0, 2, 3, 1) for channels last; None for the caller's own order.
    """

    tensor: str
    position: int
    shape: tuple[int, ...]
    from_chip: bool = False
    part: tuple[int, int] | None = None
    order: tuple[int, ...] | None = None

    @staticmethod
    def channels_last(axes: int) -> tuple[int, ...] | None:
        """Return the order with the channels, axis 1, behind all other axes; None below 3 axes.

        Args:
            axes: Number of axes.

        Example:
            >>> Port.channels_last(4), Port.channels_last(2)
            ((0, 2, 3, 1), None)
        """
        return (0, *range(2, axes), 1) if axes > 2 else None


@dataclass(frozen=True)
class CapturedProgram:
    """A network as instructions of the accelerator, at one shape.

    Args:
        tensors: Tensors by name, in the order of their first use.
        operators: Operators, in the order in which they run.
        sites: Call site of each operator.
        inputs: Ports of the arguments.
        outputs: Ports of the results.
        fixed: Arguments that are part of the program, by position: integers that decided about the
            forward, as nested lists, and arguments that are no tensors.
        spec: Name of the spec.
        runtime: Name of the runtime whose kernels it is exact for.
        left_out: Positions of results that are no activations, as arguments that are passed on, or
            that are empty.
    """

    tensors: Mapping[str, TensorSpec]
    operators: tuple[OperatorSpec, ...]
    sites: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    fixed: Mapping[int, Any]
    spec: str
    runtime: str
    left_out: tuple[int, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all constants, each counted once."""
        tensors = self.tensors.values()
        constants = {spec.data.tobytes() for spec in tensors if spec.data is not None}
        return sum(map(len, constants))


@dataclass
class Graph:
    """Tensors by number, with the integers that they had in the forward that is captured.

    Integers of a constant have its type, all others int64.
    """

    names: list[str] = field(default_factory=list)
    specs: list[TensorSpec] = field(default_factory=list)
    values: list[Integers] = field(default_factory=list)
    operators: list[OperatorSpec] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    _name_counts: dict[str, int] = field(default_factory=dict)
    _constants: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def add(self, name: str, spec: TensorSpec, values: Integers) -> int:
        """Add a tensor under a name of its own, and return its number.

        Args:
            name: Name; a number is appended if it is not the first tensor of this name.
            spec: Type, shape and quantization parameters.
            values: Integers in the forward, in the shape of the tensor.
        """
        count = self._name_counts.get(name, 0)
        self._name_counts[name] = count + 1
        self.names.append(name if count == 0 else f"{name}:{count}")
        self.specs.append(spec)
        self.values.append(values)
        return len(self.specs) - 1

    def constant(self, name: str, spec: TensorSpec, values: Integers) -> int:
        """Add a constant, and return its number; an equal one is used again.

        Args:
            name: Name, if it is new.
            spec: Type and quantization parameters.
            values: Integers, in the shape of the constant.
        """
        data = np.ascontiguousarray(values.astype(spec.dtype))
        if spec.dtype == "int32":  # The converter to TOSA asks for a ONE_HOT of numbers.
            data = data.reshape(values.shape)
        scales, axis = spec.scales, spec.quantized_dimension
        contents = sha256(data.data).digest()  # The bytes would be a copy of the network.
        key = (spec.dtype, data.shape, contents, scales.tobytes(), spec.zero_point, axis)
        if key not in self._constants:
            form = replace(spec, shape=data.shape, data=data, is_variable=False)
            # In the type of the file: as int64 they would take twice the network's floats.
            self._constants[key] = self.add(name, form, data.reshape(values.shape))
        return self._constants[key]

    def run(
        self,
        operator: str,
        site: str,
        inputs: Sequence[int | None],
        outputs: Sequence[int],
        options: Mapping[str, Any],
        intermediates: Sequence[int] = (),
    ) -> None:
        """Append an instruction.

        Args:
            operator: Name in the schema.
            site: Call site.
            inputs: Numbers of its operands; None for an absent one.
            outputs: Numbers of its results.
            options: Fields of its options, by the schema's names.
            intermediates: Numbers of tensors that have scales alone.
        """
        self.sites.append(site)
        self.operators.append(
            OperatorSpec(
                operator,
                tuple("" if number is None else self.names[number] for number in inputs),
                tuple(self.names[number] for number in outputs),
                options_of(operator, options),
                tuple(self.names[number] for number in intermediates),
            )
        )

    def integers_of(self, codes: Codes, fill: int) -> Integers:
        """Return the integers that codes stand for, in their shape; ``fill`` for no tensor."""
        values = np.full(codes.shape, fill)
        for number in tensors_in(codes):
            flat = self.values[number].reshape(-1)
            mask = refers_to(codes, number)
            values[mask] = flat[elements_in(codes[mask])]
        return values

    def validate_qparams(self, number: int, form: TensorSpec, where: str) -> None:
        """Validate that an operand is read with the quantization parameters of its tensor.

        Raises:
            CaptureError: If not; the message has both.
        """
        spec = self.specs[number]
        written = (spec.dtype, float(spec.scales[0]), spec.zero_point)
        if written != (form.dtype, float(form.scales[0]), form.zero_point):
            raise CaptureError(
                f"{where} is read with other quantization parameters ({form.dtype}, scale "
                f"{form.scales[0]}, zero point {form.zero_point}) than it was written with "
                f"{written}: pass it through an operator"
            )

    def finish(
        self,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        fixed: Mapping[int, Any],
        spec: NNASpec,
    ) -> CapturedProgram:
        """Return the program, without instructions and tensors that no output needs."""
        needed = {port.tensor for port in outputs}
        order: list[int] = []
        variables = {n for n, s in zip(self.names, self.specs, strict=True) if s.is_variable}
        for number in reversed(range(len(self.operators))):
            each = self.operators[number]
            # An instruction that writes a needed state may have no other needed output.
            if needed.intersection([*each.outputs, *variables.intersection(each.inputs)]):
                order.append(number)
                needed.update(each.inputs, each.outputs, each.intermediates)
        order.reverse()
        ports = [port for port in inputs if port.tensor in needed]
        tensors = {n: s for n, s in zip(self.names, self.specs, strict=True) if n in needed}
        operators = [self.operators[number] for number in order]
        if spec.runtime == "tosa":
            tensors, operators = _with_own_constants(tensors, operators)
        return CapturedProgram(
            tensors,
            tuple(operators),
            tuple(self.sites[number] for number in order),
            tuple(ports),
            tuple(outputs),
            fixed,
            spec.name,
            spec.runtime,
        )


def _with_own_constants(
    tensors: Mapping[str, TensorSpec], operators: Sequence[OperatorSpec]
) -> tuple[dict[str, TensorSpec], list[OperatorSpec]]:
    """Give each instruction 8-bit constants of its own, except weights; the data stay one buffer.

    The converter to TOSA takes a constant that is read twice for a weight, from -127 to 127, which
    it neither joins nor compares with activations.
    """
    read = {
        name
        for operator in operators
        for position, name in enumerate(operator.inputs)
        if operand_name(operator.name, position) == "weight"
    }
    copied, changed = dict(tensors), []
    for operator in operators:
        names = list(operator.inputs)
        for position, name in enumerate(names):
            spec = tensors.get(name)
            is_weight = operand_name(operator.name, position) == "weight"
            if spec is None or spec.data is None or spec.dtype != "int8" or is_weight:
                continue
            if name in read:
                names[position] = f"{name}/copy{len(copied)}"
                copied[names[position]] = spec
            read.add(name)
        changed.append(replace(operator, inputs=tuple(names)))
    return copied, changed


def spec_of(stored: Stored) -> TensorSpec:
    """Return the spec of a tensor, without its data."""
    scale = stored.scale
    return TensorSpec(
        tuple(stored.integers.shape),
        stored.dtype,
        scale.double().numpy() if isinstance(scale, torch.Tensor) else float(scale),
        stored.zero_point,
        quantized_dimension=stored.channel_axis,
        is_variable=stored.variable,
    )


def quantize(x: Any, dtype: str, scale: float, zero_point: int) -> Any:
    """Quantize floats as LiteRT's QUANTIZE does.

    Args:
        x: Floats, any shape.
        dtype: Type of the integers, as ``"int8"``.
        scale: Step size, positive.
        zero_point: Integer that stands for 0.

    Returns:
        Integers, int64, in the shape of ``x``.

    Example:
        >>> quantize(np.array([0.25, -0.75, 100.0]), "int8", 0.5, -1)  # 0.5 and -1.5 round away
        array([  0,  -3, 127])
    """
    scaled = x.astype(np.float32) / np.float32(scale)
    limits = np.iinfo(dtype)
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int64)
    rounded = np.where(np.abs(scaled) < 0.5, 0, rounded)
    return np.clip(rounded + zero_point, limits.min, limits.max)


def operand_name(operator: str, position: int) -> str:
    """Return the name of an operand of an instruction.

    Example:
        >>> operand_name("FULLY_CONNECTED", 1), operand_name("ADD", 1)
        ('weight', 'operand1')
    """
    return kernels()[operator].operands.get(position, f"operand{position}")


def is_float(stored: Stored | None) -> bool:
    """Tell if an operand is not quantized yet."""
    return stored is not None and stored.dtype == "float32"


def dtype_of(x: torch.Tensor) -> str:
    """Return the type of an argument in a program."""
    if x.is_floating_point():
        return "float32"
    return "bool" if x.dtype == torch.bool else "int32"


def dtype_of_qparams(qparams: QParams) -> str:
    """Return the type of integers with these quantization parameters."""
    return "int8" if qparams.bits == 8 else "int16"


class LayoutTensors:
    """Tensors that layout operators compute from a program's tensors, each operator once.

    Args:
        graph: Program so far.
        changing: Numbers of tensors whose values change from one use to the next.
        most_parts: Number of tensors that one operator joins at most; None for any.
        most_axes: Most axes of a slice.
    """

    def __init__(
        self,
        graph: Graph,
        changing: Container[int],
        most_parts: int | None = None,
        most_axes: int = MOST_SLICED_AXES,
    ) -> None:
        self.graph, self._changing = graph, changing
        self._most_parts, self._most_axes = most_parts, most_axes
        self._results: dict[tuple[Any, ...], int] = {}
        # Tensors that are others in another shape: number of the other.
        self._reshaped: dict[int, int] = {}

    def tensor(self, codes: Codes, values: Any, form: TensorSpec, name: str) -> int:
        """Return the tensor with these elements, laid out by operators if there is none.

        Args:
            codes: Codes in the shape of the tensor.
            values: Integers of the tensor, in its shape.
            form: Type and quantization parameters.
            name: Name of the tensors that are computed.
        """
        candidates = [k for k in tensors_in(codes) if codes.shape == self.graph.specs[k].shape]
        for number in candidates:
            if np.array_equal(codes, codes_of(number, np.arange(codes.size)).reshape(codes.shape)):
                return number
        is_quantized = form.dtype in ("int8", "int16")
        builder = LayoutBuilder(
            lambda operator, inputs, shape, options: self._emit(
                operator, inputs, shape, options, form, name
            ),
            lambda integers: self.graph.constant(f"{name}/fill", form, integers),
            lambda number: self.graph.specs[number].shape,
            form.zero_point if is_quantized else None,
            int(np.iinfo(form.dtype).min) if is_quantized else None,
            self._most_axes,
        )
        return builder.build(codes, values)

    def _emit(
        self, operator: str, inputs: Any, shape: Any, options: Any, form: TensorSpec, name: str
    ) -> int:
        """Append a layout operator, unless its result is there already."""
        most = self._most_parts
        while operator == "CONCATENATION" and most is not None and len(inputs) > most:
            groups = [inputs[first : first + most] for first in range(0, len(inputs), most)]
            inputs = [self._joined(group, options, form, name) for group in groups]
        numbers = [
            self._shape_constant(name, x) if isinstance(x, np.ndarray) else x for x in inputs
        ]
        if operator == "RESHAPE":
            numbers[0] = self._reshaped.get(numbers[0], numbers[0])
            if self.graph.specs[numbers[0]].shape == tuple(shape):
                return numbers[0]
        changes = any(number in self._changing for number in numbers)
        key = (operator, tuple(numbers), tuple(shape), repr(sorted(options.items())))
        if key in self._results and not changes:
            return self._results[key]
        result = replace(form, shape=tuple(shape), is_variable=False, data=None)
        values = apply_layout_operator(
            operator, [self.graph.values[k] for k in numbers], shape, options, form.zero_point
        )
        number = self.graph.add(f"{name}/{operator.lower()}", result, values)
        self.graph.run(operator, name, numbers, [number], options)
        self._results[key] = number
        if operator == "RESHAPE" and not changes:
            self._reshaped[number] = numbers[0]
        return number

    def _joined(self, inputs: Sequence[int], options: Any, form: TensorSpec, name: str) -> int:
        """Append a concatenation of tensors, see :meth:`_emit`."""
        shapes, axis = [self.graph.specs[number].shape for number in inputs], options["axis"]
        shape = list(shapes[0])
        shape[axis] = sum(each[axis] for each in shapes)
        return self._emit("CONCATENATION", list(inputs), shape, options, form, name)

    def _shape_constant(self, name: str, x: Any) -> int:
        form = spec_of(Stored(torch.from_numpy(x).long(), "int32"))
        return self.graph.constant(f"{name}/shape", form, x.astype(np.int64))
