"""A program under construction: tensors with their integers, instructions, and shared constants."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_nna.deploy.flatbuffer import OperatorSpec, TensorSpec, options_of
from lightning_nna.deploy.layout import (
    Codes,
    Movements,
    belong,
    codes_of,
    elements_in,
    moved_integers,
    tensors_in,
)
from lightning_nna.emulation.operators.catalog import kernels
from lightning_nna.emulation.program import Stored
from lightning_nna.emulation.ranges import QParams

Integers = NDArray[np.int64]


class CaptureError(ValueError):
    """A forward that is no program of the chip; the message names the call site and the remedy."""


@dataclass(frozen=True)
class Port:
    """Where a tensor of the caller enters or leaves a program.

    Args:
        tensor: Name of the program's tensor.
        position: Which of the caller's tensors: of the arguments, or of the results, nested ones
            one after the other.
        shape: Of the caller's tensor.
        from_chip: Whether it comes from an operator of the chip, and was on its grid before.
        part: First element and end of what it is of the caller's tensor, flat; None for all of it.
            States of several layers in one tensor are such parts, each on a grid of its own.
    """

    tensor: str
    position: int
    shape: tuple[int, ...]
    from_chip: bool = False
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Program:
    """A network as instructions of the chip, at one shape.

    Args:
        tensors: By name, in the order in which they came up.
        operators: In the order in which they run.
        sites: Call site of each operator.
        inputs: What the caller gives.
        outputs: What the caller gets.
        fixed: Arguments that are part of the program, by position: what steered the forward, as
            nested lists, and what is no tensor.
        spec: Name of the chip.
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
    left_out: tuple[int, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants, each counted once."""
        found = {spec.data.tobytes() for spec in self.tensors.values() if spec.data is not None}
        return sum(map(len, found))


@dataclass
class Graph:
    """Tensors by number, with the integers that they had in the forward that is captured."""

    names: list[str] = field(default_factory=list)
    specs: list[TensorSpec] = field(default_factory=list)
    values: list[Integers] = field(default_factory=list)
    operators: list[OperatorSpec] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    _taken: dict[str, int] = field(default_factory=dict)
    _constants: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def add(self, name: str, spec: TensorSpec, values: Integers) -> int:
        """A new tensor under a name of its own."""
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        self.names.append(name if count == 0 else f"{name}:{count}")
        self.specs.append(spec)
        self.values.append(values)
        return len(self.specs) - 1

    def constant(self, name: str, spec: TensorSpec, values: Integers) -> int:
        """A tensor of the program; one that is there already is taken again."""
        data = np.ascontiguousarray(values.astype(spec.dtype))
        scales, axis = spec.scales, spec.quantized_dimension
        key = (spec.dtype, data.shape, data.tobytes(), scales.tobytes(), spec.zero_point, axis)
        if key not in self._constants:
            form = replace(spec, shape=data.shape, data=data, is_variable=False)
            self._constants[key] = self.add(name, form, values)
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
        """Append an instruction."""
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
        """Integers that codes stand for."""
        values = np.full(codes.shape, fill)
        for number in tensors_in(codes):
            held = self.values[number].reshape(-1)
            mask = belong(codes, number)
            values[mask] = held[elements_in(codes[mask])]
        return values

    def demand_grid(self, number: int, form: TensorSpec, where: str) -> None:
        """Refuse an operand that is read on another grid than it was made on."""
        spec = self.specs[number]
        found = (spec.dtype, float(spec.scales[0]), spec.zero_point)
        if found != (form.dtype, float(form.scales[0]), form.zero_point):
            raise CaptureError(
                f"{where} is read on another grid ({form.dtype}, scale {form.scales[0]}, zero "
                f"point {form.zero_point}) than it was made on {found}: pass it through an operator"
            )

    def finish(
        self, inputs: Sequence[Port], outputs: Sequence[Port], fixed: Mapping[int, Any], spec: str
    ) -> Program:
        """The program, without what no output needs."""
        needed = {port.tensor for port in outputs}
        kept: list[int] = []
        variables = {n for n, s in zip(self.names, self.specs, strict=True) if s.is_variable}
        for number in reversed(range(len(self.operators))):
            each = self.operators[number]
            # What writes a state that is needed has no other output that says so.
            if needed.intersection([*each.outputs, *variables.intersection(each.inputs)]):
                kept.append(number)
                needed.update(each.inputs, each.outputs, each.intermediates)
        kept.reverse()
        ports = [port for port in inputs if port.tensor in needed]
        tensors = {n: s for n, s in zip(self.names, self.specs, strict=True) if n in needed}
        return Program(
            tensors,
            tuple(self.operators[number] for number in kept),
            tuple(self.sites[number] for number in kept),
            tuple(ports),
            tuple(outputs),
            fixed,
            spec,
        )


def form_of(stored: Stored) -> TensorSpec:
    """The form of a tensor, without its data."""
    scale = stored.scale
    return TensorSpec(
        tuple(stored.integers.shape),
        stored.dtype,
        scale.double().numpy() if isinstance(scale, torch.Tensor) else float(scale),
        stored.zero_point,
        quantized_dimension=stored.channel_axis,
        is_variable=stored.variable,
    )


def quantized(x: Any, dtype: str, scale: float, zero_point: int) -> Any:
    """Floats on a grid as LiteRT's QUANTIZE has them, int64."""
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
    """Whether an operand is not on a grid yet."""
    return stored is not None and stored.dtype == "float32"


def dtype_of(x: torch.Tensor) -> str:
    """Type in which an argument comes in."""
    if x.is_floating_point():
        return "float32"
    return "bool" if x.dtype == torch.bool else "int32"


def width_of_grid(grid: QParams) -> str:
    """Type of integers on a grid."""
    return "int8" if grid.bits == 8 else "int16"


class MovedTensors:
    """Tensors that movements make of a program's tensors, each movement once.

    Args:
        graph: The program so far.
        changing: Tensors whose values are others from one use to the next.
    """

    def __init__(self, graph: Graph, changing: Container[int]) -> None:
        self.graph, self._changing = graph, changing
        self._made: dict[tuple[Any, ...], int] = {}

    def tensor(self, codes: Codes, values: Any, form: TensorSpec, name: str) -> int:
        """The tensor with these elements, made by movements where there is none.

        Args:
            codes: Which element of which tensor stands where.
            values: The integers.
            form: Type and grid.
            name: Of what is made.
        """
        whole = [k for k in tensors_in(codes) if codes.shape == self.graph.specs[k].shape]
        for number in whole:
            if np.array_equal(codes, codes_of(number, np.arange(codes.size)).reshape(codes.shape)):
                return number
        movements = Movements(
            lambda operator, inputs, shape, options: self._emit(
                operator, inputs, shape, options, form, name
            ),
            lambda integers: self.graph.constant(f"{name}/fill", form, integers),
            lambda number: self.graph.specs[number].shape,
        )
        return movements.make(codes, values)

    def _emit(
        self, operator: str, inputs: Any, shape: Any, options: Any, form: TensorSpec, name: str
    ) -> int:
        """One movement, unless it has been made before."""
        numbers = [
            self._shape_constant(name, x) if isinstance(x, np.ndarray) else x for x in inputs
        ]
        changes = any(number in self._changing for number in numbers)
        key = (operator, tuple(numbers), tuple(shape), repr(sorted(options.items())))
        if key in self._made and not changes:
            return self._made[key]
        result = replace(form, shape=tuple(shape), is_variable=False, data=None)
        values = moved_integers(operator, [self.graph.values[k] for k in numbers], shape, options)
        number = self.graph.add(f"{name}/{operator.lower()}", result, values)
        self.graph.run(operator, name, numbers, [number], options)
        self._made[key] = number
        return number

    def _shape_constant(self, name: str, x: Any) -> int:
        form = form_of(Stored(torch.from_numpy(x).long(), "int32"))
        return self.graph.constant(f"{name}/form", form, x.astype(np.int64))
