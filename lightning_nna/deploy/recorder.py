"""Record the instructions of a forward and connect them to the tensors that they read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nna.deploy.accelerator_form import with_accelerator_form
from lightning_nna.deploy.constant_mask import selects_nothing, without_constant_mask
from lightning_nna.deploy.cpu_operators import CpuOperators, cpu_kernel, function_of
from lightning_nna.deploy.element_order import Arrangement, Operand, in_order_of_operand
from lightning_nna.deploy.graph import (
    CaptureError,
    Graph,
    LayoutTensors,
    Port,
    dtype_of,
    dtype_of_qparams,
    is_float,
    operand_name,
    quantize,
    spec_of,
)
from lightning_nna.deploy.layout import (
    NO_TENSOR,
    Codes,
    codes_of,
    elements_in,
    equal_codes,
    most_sliced_axes,
    refers_to,
    tensor_of,
    tensors_in,
)
from lightning_nna.deploy.provenance import CONSTANT
from lightning_nna.deploy.provenance_map import ProvenanceMap, PythonReads, untracked
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.modes import SiteCall
from lightning_nna.emulation.operators.concatenation import most_parts
from lightning_nna.emulation.program import Instruction, Stored, activation

_LSTM = "UNIDIRECTIONAL_SEQUENCE_LSTM"
# Positions of its hidden state and its cell among its operands.
_STATES = (18, 19)


_STATISTICS = (
    "it takes the statistics of the example: batch norm needs running statistics "
    "(track_running_stats=True, and training=False where it is called as a function)"
)
# Functions whose result is data, although their operand is an integer that only decides.
_LOOKUPS = ("embedding", "embedding_bag")


def attributes_of(module: nn.Module) -> dict[str, list[Tensor]]:
    """Collect the tensors in attributes of modules, except parameters and buffers, by name.

    Args:
        module: Module whose attributes, and those of all its modules, are read.
    """
    attributes = {}
    for path, each in module.named_modules():
        for name, value in vars(each).items():
            if name.startswith("_") or not isinstance(value, (Tensor, tuple, list, dict)):
                continue
            tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
            if tensors:
                attributes[f"{path}.{name}".lstrip(".")] = tensors
    return attributes


class Recorder:
    """Record a forward and connect its instructions.

    Args:
        emulator: Emulator of the module.
        allow_cpu: Whether float operators that a runtime has are recorded, too.
        channels_last_inputs: Positions of arguments that the program reads channels last.
        channels_last_outputs: Positions of results that it writes channels last.

    Attributes:
        graph: Program so far.
        ports: Inputs of the program.
        provenance_map: Codes of the forward so far.
    """

    def __init__(
        self,
        emulator: Emulator,
        *,
        allow_cpu: bool = False,
        channels_last_inputs: Collection[int] = (),
        channels_last_outputs: Collection[int] = (),
    ) -> None:
        self.emulator, self.graph = emulator, Graph()
        self.provenance_map = ProvenanceMap()
        self._allow_cpu = allow_cpu
        self._channels_last_inputs = frozenset(channels_last_inputs)
        self._channels_last_outputs = frozenset(channels_last_outputs)
        #: Elements of inputs in another order than the caller's: caller's element -> input's.
        self._moved: dict[int, NDArray[np.int64]] = {}
        self._cpu = CpuOperators(self.graph, self.provenance_map, self._quantized_tensor)
        self.ports: list[Port] = []
        #: Arguments before they are quantized: number of the pseudo tensor -> position.
        self._arguments: dict[int, int] = {}
        self._inputs: dict[tuple[Any, ...], int] = {}
        #: Cells that an LSTM has written to its variable: pseudo tensor -> variable.
        self._cells: dict[int, int] = {}
        #: Present values of every variable, as codes.
        self._state: dict[int, Codes] = {}
        runtime = emulator.spec.runtime
        self._layout = LayoutTensors(
            self.graph, self._state, most_parts(runtime), most_sliced_axes(runtime)
        )

    # --- the forward ----------------------------------------------------------------------------

    def python_reads(self) -> PythonReads:
        """Return a mode that sees Python read tensors; it goes below the dispatch."""
        return PythonReads(self.provenance_map.on_decision)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the instructions of a forward; validate that all were calibrated."""
        emulator = self.emulator
        known = set(emulator.ranges.ranges)
        try:
            with (
                emulator.running(recorder=self._record, listener=self._validate_function),
                self.provenance_map.provenance,
            ):
                yield
        finally:
            new = [key for key in emulator.ranges.ranges if key not in known]
            for key in new:
                del emulator.ranges.ranges[key]
            if new:  # Whatever else went wrong, this came first.
                raise CaptureError(
                    f"no calibration has seen {', '.join(new)}: calibrate with the calls that are "
                    "exported, and pass results of emulated operators unchanged"
                )

    def argument(self, position: int, x: Any) -> Any:
        """Return a copy of an argument, whose elements are followed.

        Args:
            position: Position of the argument.
            x: Argument; it is returned if it is no tensor.
        """
        if not isinstance(x, Tensor):
            return x
        copy = x.detach().clone()
        with untracked():
            self._follow_argument(position, x, copy)
        return copy

    def _follow_argument(self, position: int, x: Tensor, copy: Tensor) -> None:
        qparams = self.emulator.state.qparams_of(x)
        ids = self.provenance_map.assign(copy)
        if not x.is_floating_point():
            self.provenance_map.integers.append(position)
        if qparams is not None:
            self.emulator.state.set_qparams(copy, qparams)
            number = self._port(position, activation(copy, qparams), from_chip=True)
            self.provenance_map.define(
                dtype_of_qparams(qparams), ids, self._input_codes(number, np.arange(copy.numel()))
            )
        elif copy.numel():
            form = Stored(copy if copy.is_floating_point() else copy.long(), dtype_of(copy))
            number = self.graph.add(f"argument{position}", spec_of(form), form.integers.numpy())
            self._arguments[number] = position
            self.provenance_map.define(form.dtype, ids, codes_of(number, np.arange(copy.numel())))

    def result(self, position: int, x: Any) -> tuple[Port, ...]:
        """Return the ports of a result; none if it is empty or no activation.

        Args:
            position: Position of the result.
            x: Result of the forward.

        Raises:
            CaptureError: If it is no result of emulated operators on the arguments.
        """
        if not isinstance(x, Tensor) or not x.numel():
            return ()
        if not x.is_floating_point():
            return self._indices(position, x)
        with untracked():
            qparams = self.emulator.state.qparams_of(x)
            parts = self.emulator.state.mixed_qparams_of(x)
            first = qparams if parts is None else parts.qparams[0]
            kind = "float32" if first is None else dtype_of_qparams(first)
            codes = self.provenance_map.resolve(x, kind, f"result {position}")
            sources = tensors_in(codes)
            if qparams is None and sources and self._arguments.keys() >= set(sources):
                return ()  # The caller has it.
            if not sources:
                fixed = ", which are floats: integers are constants of a program, so pass floats"
                raise CaptureError(
                    f"result {position} does not depend on the arguments"
                    f"{fixed if self.provenance_map.integers else ''}"
                )
            if parts is not None:
                return self._parts(position, x, codes, parts.index.numpy())
            if len(sources) > 1 and self._cells.keys() >= set(sources):
                return self._parts(position, x, codes, tensor_of(codes))
            shape, order = tuple(x.shape), None
            if position in self._channels_last_outputs:
                order = Port.channels_last(x.dim())
            if order is not None:
                codes, x = np.ascontiguousarray(codes.transpose(order)), x.permute(order)
            number = self._as_computed(codes)
            if number is None:
                number = self._laid_out_result(position, x, codes)
            return (Port(self.graph.names[number], position, shape, order=order),)

    def _indices(self, position: int, x: Tensor) -> tuple[Port, ...]:
        """Return the port of indices that instructions have computed; none of other values."""
        with untracked():
            if x.dtype == torch.bool or not self.provenance_map.has_codes(x, "int32"):
                return ()
            codes = self.provenance_map.resolve(x, "int32", f"result {position}")
            if not self._arguments.keys().isdisjoint(tensors_in(codes)):
                return ()  # The caller has it.
            number = self._as_computed(codes)
            if number is None:
                spec = self.graph.specs[tensors_in(codes)[0]]
                number = self._layout.tensor(codes, x.numpy(), spec, "result")
            return (Port(self.graph.names[number], position, tuple(x.shape)),)

    def _parts(self, position: int, x: Tensor, codes: Codes, owners: Any) -> tuple[Port, ...]:
        """Return the ports of a result that several tensors own, as states of several layers."""
        flat = codes.reshape(-1)
        bounds = [0, *(np.flatnonzero(np.diff(owners.reshape(-1))) + 1).tolist(), flat.size]
        ports = []
        for start, end in pairwise(bounds):
            piece, values = flat[start:end], x.reshape(-1)[start:end]
            number = self._as_computed(piece)
            if number is None:
                number = self._laid_out_result(position, values, piece)
            shape = tuple(x.shape)
            ports.append(Port(self.graph.names[number], position, shape, part=(start, end)))
        return tuple(ports)

    def _laid_out_result(self, position: int, x: Tensor, codes: Codes) -> int:
        """Return a result laid out from the program's tensors, with constants if it has some."""
        where, sources = f"result {position}", tensors_in(codes)
        self._validate_current(sources, where)
        spec = self.graph.specs[sources[0]]
        for number in sources:
            if number in self._arguments:
                raise CaptureError(
                    f"{where} has elements of argument {self._arguments[number]}, which is not "
                    "quantized there: leave it out of the exported results"
                )
            self.graph.validate_qparams(number, spec, where)
        values = x.detach().numpy()
        if spec.dtype != "float32":
            scale = np.float32(spec.scales[0])
            integers = np.rint(values / scale).astype(np.int64) + spec.zero_point
            limits, fixed = np.iinfo(spec.dtype), codes == NO_TENSOR
            exact = (integers - spec.zero_point).astype(np.float32) * scale == values
            inside = (integers >= limits.min) & (integers <= limits.max)
            if not bool((exact & inside)[fixed].all()):
                raise CaptureError(
                    f"{where} has constants that are no multiples of its scale {scale} in range: "
                    "join them with torch.cat in the emulated forward, or leave them out of the "
                    "exported results"
                )
            values = integers
        return self._layout.tensor(codes, values, spec, "result")

    def follow_attributes(self, attributes: Mapping[str, Sequence[Tensor]]) -> None:
        """Follow the tensors in attributes of modules: they may be of an earlier call.

        Args:
            attributes: Tensors by name, as :func:`attributes_of` collects them.
        """
        with untracked():
            for tensors in attributes.values():
                for x in tensors:
                    self.provenance_map.provenance.follow_attribute(x)

    def validate_state(self, module: nn.Module, before: Mapping[str, Sequence[Tensor]]) -> None:
        """Validate that a module passes no data from call to call: its program would not.

        Args:
            module: Module after its forward.
            before: Tensors in its attributes before, by name.

        Raises:
            CaptureError: If it writes data to a buffer, or to an attribute that held tensors while
                the program reads such attributes.
        """
        causes, remedy = self.provenance_map.provenance.causes, "pass it as an argument and "
        with untracked():
            for name, buffer in module.named_buffers():
                if causes((buffer,)) is None:
                    raise CaptureError(
                        f"the forward writes data to the buffer {name}, and a program would start "
                        f"from the example's in every call: {remedy}return it"
                    )
            for name, tensors in attributes_of(module).items():
                if not self.provenance_map.reads_attributes or name not in before:
                    continue
                if causes(tensors) is None:
                    raise CaptureError(
                        f"the forward reads what an earlier call has left in the attribute {name}, "
                        f"and a program would start from that in every call: {remedy}return it"
                    )

    def fixed(self, leaves: Sequence[Any]) -> dict[int, Any]:
        """Return arguments that are part of the program: those that decided, and no tensors.

        Args:
            leaves: Arguments, by position.

        Raises:
            CaptureError: If one of them is an input as well.
        """
        steering = self.provenance_map.steering
        read = {port.position for port in self.ports}
        if both := sorted(steering & read):
            raise CaptureError(
                f"argument {both[0]} is read by the program and decides something as well, as a "
                "mask from labels does, which would be the example's for ever: pass the mask as "
                "an argument of its own"
            )
        fixed: dict[int, Any] = {}
        for position, leaf in enumerate(leaves):
            if position in steering:
                fixed[position] = leaf.tolist()
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                fixed[position] = leaf
        return fixed

    # --- instructions ---------------------------------------------------------------------------

    def _validate_function(self, call: SiteCall) -> None:
        with untracked():
            provenance = self.provenance_map.provenance
            if call.where != "fallback" or not provenance.reaches(call.result):
                return
            computed_of_data = provenance.causes(call.result) is None
            if not computed_of_data and function_of(call.key) not in _LOOKUPS:
                return  # Computed from lengths and the like: a constant of the program.
        if self._allow_cpu:
            with untracked():
                if self._cpu.record(call.key, call.operands, call.result):
                    return
        has_cpu = cpu_kernel(call.key) is not None and not self._allow_cpu
        remedy = call.remedy or (
            "write it with operators that are emulated, see coverage(module, example), or keep it "
            "out of the export with forward="
        )
        raise CaptureError(
            f"{call.key} is no operator of {self.emulator.spec.name} "
            f"({call.function} at {call.source}): {remedy}"
            f"{', or let it run on the CPU with allow_cpu=True' if has_cpu else ''}"
        )

    def _quantized_tensor(self, key: str, x: Tensor) -> int | None:
        """Return the tensor that holds an activation; None for one that is not quantized."""
        qparams = self.emulator.state.qparams_of(x)
        if qparams is None:
            return None
        stored = activation(x, qparams)
        return self._tensor(self._operand(Instruction("DEQUANTIZE", key, (stored,), ()), 0, stored))

    def _record(self, instruction: Instruction) -> None:
        """Record one instruction: connect its operands, and define the codes of its results."""
        with untracked():
            if not self._depends(instruction):
                return  # Computed from the program's own constants: its results are constants.
            if self._decides_elsewhere(instruction):
                return  # Integers that Python decides by; what reads them as data is told.
            if instruction.operator == "QUANTIZE" and is_float(instruction.inputs[0]):
                (ids,) = (self.provenance_map.result_ids(x) for x in instruction.outputs)
                self._quantize(instruction, ids)
                return
            arrangement = self._arrangement(instruction)
            result_ids = [x.ids for x in arrangement.results]
            if selects_nothing(instruction.operator, arrangement):
                (unchanged,) = (x.codes for x in arrangement.operands[-1:] if x is not None)
                assert unchanged is not None
                self.provenance_map.define(
                    arrangement.results[0].form.dtype, result_ids[0], unchanged.reshape(-1)
                )
                return
            operator, arrangement = without_constant_mask(instruction.operator, arrangement)
            arrangement = in_order_of_operand(
                operator, arrangement, lambda number: self.graph.specs[number].shape
            )
            arrangement = with_accelerator_form(operator, arrangement)
            inputs = [None if x is None else self._tensor(x) for x in arrangement.operands]
            if instruction.operator == _LSTM:
                for k, number in zip(_STATES, self._states(instruction), strict=True):
                    inputs[k] = number
            outputs = [self.graph.add(x.name, x.form, x.values) for x in arrangement.results]
            between = [
                self.graph.add(f"{instruction.site}/intermediate", spec_of(x), x.integers.numpy())
                for x in instruction.intermediates
            ]
            self.graph.run(
                operator, instruction.site, inputs, outputs, arrangement.options, between
            )
            for result, number in zip(arrangement.results, outputs, strict=True):
                count = prod(result.form.shape)
                self.provenance_map.define(
                    result.form.dtype, result.ids, codes_of(number, np.arange(count))
                )
            if instruction.operator == _LSTM:
                self._update_states(instruction, inputs)

    def _depends(self, instruction: Instruction) -> bool:
        """Tell if an instruction reads anything except constants.

        Indices that were computed from an argument are none: else the argument would be fixed.
        """
        read = [x for x in instruction.inputs if x is not None and not x.constant]
        return any(
            bool((ids >= 0).any()) or (dtype == "int32" and bool((ids < CONSTANT).any()))
            for dtype, ids in ((x.dtype, self.provenance_map.ids(x)) for x in read)
        )

    def _computes_integers(self, instruction: Instruction) -> bool:
        """Tell if the results of an instruction are integers or conditions."""
        return all(x.dtype in ("int32", "bool") for x in instruction.outputs)

    def _decides_elsewhere(self, instruction: Instruction) -> bool:
        """Tell if an instruction of integers and conditions alone reads some of no instruction."""
        tensors = [x for x in (*instruction.inputs, *instruction.outputs) if x is not None]
        if not {x.dtype for x in tensors} <= {"int32", "bool"}:
            return False
        read = [(x.source, x.dtype) for x in instruction.inputs if x is not None]
        return not all(
            source is None or self.provenance_map.has_data(source, dtype) for source, dtype in read
        )

    def _arrangement(self, instruction: Instruction) -> Arrangement:
        """Return an instruction with the codes of its operands and the ids of its results."""
        operands = tuple(
            None if x is None or x.variable else self._operand(instruction, k, x)
            for k, x in enumerate(instruction.inputs)
        )
        results = tuple(
            Operand(
                x.integers.numpy(), spec_of(x), instruction.site, ids=self._ids_of(x, instruction)
            )
            for x in instruction.outputs
        )
        return Arrangement(operands, results, instruction.options)

    def _ids_of(self, result: Stored, instruction: Instruction) -> Any:
        """Return the ids of a result; an operand of the same values in another type keeps its own.

        A widened activation is the same tensor of the forward in two types. Its elements that are
        constants get ids with the result, and stay constants of the operand.
        """
        before = self.provenance_map.ids(result)
        ids = self.provenance_map.result_ids(result)
        for x in instruction.inputs:
            if x is not None and x.source is result.source and x.dtype != result.dtype:
                self.provenance_map.define(x.dtype, ids[before < 0], NO_TENSOR)
        return ids

    def _operand(self, instruction: Instruction, position: int, stored: Stored) -> Operand:
        """Return an operand with the codes of its elements."""
        name = f"{instruction.site}/{operand_name(instruction.operator, position)}"
        values, form = stored.integers.numpy().astype(np.int64), spec_of(stored)
        if stored.constant:
            remedy = _STATISTICS if "batch_norm" in instruction.site else ""
            self.provenance_map.validate_constant(stored, name, remedy)
            return Operand(values, form, name)
        where = f"{name} of {instruction.operator}"
        if stored.source is None:
            raise CaptureError(f"{where} is no tensor of the forward")
        looks_up = stored.dtype == "int32" and not self._computes_integers(instruction)
        codes = self.provenance_map.resolve(
            stored.source, stored.dtype, where, fixes_integers=not looks_up
        )
        if stored.dtype in ("int32", "bool"):
            codes = self._plain_input(codes, stored.dtype)
        self._validate_current(tensors_in(codes), where)
        for number in tensors_in(codes):
            self.graph.validate_qparams(number, form, where)
        if not np.array_equal(self.graph.integers_of(codes, 0)[codes >= 0], values[codes >= 0]):
            raise CaptureError(
                f"{where} has other integers than the tensors that it is laid out from"
            )
        return Operand(values, form, name, codes)

    def _tensor(self, operand: Operand) -> int:
        """Return the tensor of an operand: a constant, or laid out from what the program has."""
        if operand.codes is None:
            return self.graph.constant(operand.name, operand.form, operand.values)
        return self._layout.tensor(operand.codes, operand.values, operand.form, operand.name)

    # --- arguments ------------------------------------------------------------------------------

    def _quantize(self, instruction: Instruction, ids: Any) -> None:
        """Record a quantization of floats: the arguments that they are become inputs."""
        source, result = instruction.inputs[0], instruction.outputs[0]
        assert source is not None
        assert source.source is not None
        codes = self.provenance_map.resolve(source.source, "float32", instruction.site)
        if any(self._cpu.is_result(number) for number in tensors_in(codes)):
            number = self._cpu.quantize(instruction.site, codes, result)
            self.provenance_map.define(result.dtype, ids, codes_of(number, np.arange(codes.size)))
            return
        quantized = codes.copy()
        for number in tensors_in(codes):
            if number not in self._arguments:
                raise CaptureError(
                    f"{instruction.site} reads {self.graph.names[number]} in float, and a program "
                    "has its integers alone: compute with the layer's output instead"
                )
            port, mask = self._port_of(number, result), refers_to(codes, number)
            quantized[mask] = self._input_codes(port, elements_in(codes[mask]))
        self.provenance_map.define(result.dtype, ids, quantized.reshape(-1))

    def _port_of(self, argument: int, like: Stored) -> int:
        """Return the input of a float argument with the quantization parameters of a tensor."""
        key = (argument, like.dtype, float(like.scale), like.zero_point)
        if key not in self._inputs:
            floats = self.graph.values[argument]
            integers = quantize(floats, like.dtype, float(like.scale), like.zero_point)
            stored = replace(like, integers=torch.as_tensor(integers), source=None)
            self._inputs[key] = self._port(self._arguments[argument], stored)
        return self._inputs[key]

    def _port(self, position: int, stored: Stored, *, from_chip: bool = False) -> int:
        name, order = f"input{position}", None
        spec, values = spec_of(stored), stored.integers.numpy()
        shape = spec.shape
        if position in self._channels_last_inputs and stored.dtype in ("int8", "int16"):
            order = Port.channels_last(len(shape))
        if order is not None:
            values = np.ascontiguousarray(values.transpose(order))
            spec = replace(spec, shape=values.shape)
        number = self.graph.add(name, spec, values)
        if order is not None:
            elements = np.arange(values.size).reshape(values.shape)
            self._moved[number] = elements.transpose(np.argsort(order)).reshape(-1)
        self.ports.append(Port(self.graph.names[number], position, shape, from_chip, order=order))
        return number

    def _input_codes(self, number: int, elements: NDArray[np.int64]) -> Codes:
        """Return the codes of elements of an argument, flat indices, in the input that it is."""
        moved = self._moved.get(number)
        return codes_of(number, elements if moved is None else moved[elements])

    def _plain_input(self, codes: Codes, dtype: str) -> Codes:
        """Make arguments that are not quantized inputs: integers to look up, and masks."""
        result = codes.copy()
        for number in tensors_in(codes):
            if number in self._arguments:
                position = self._arguments[number]
                key = (number, dtype)
                if key not in self._inputs:
                    values = torch.from_numpy(self.graph.values[number])
                    self._inputs[key] = self._port(position, Stored(values, dtype))
                mask = refers_to(codes, number)
                result[mask] = codes_of(self._inputs[key], elements_in(codes[mask]))
        return result

    # --- states ---------------------------------------------------------------------------------

    def _states(self, instruction: Instruction) -> list[int]:
        """Return the variables of an LSTM: earlier ones, inputs, or new ones that start at 0."""
        variables = []
        for k in _STATES:
            stored = instruction.inputs[k]
            assert stored is not None
            assert stored.source is not None
            name = f"{instruction.site}/{operand_name(_LSTM, k)}"
            kind = stored.dtype if k == _STATES[0] else "float32"
            codes = self.provenance_map.resolve(stored.source, kind, name)
            equal = [n for n, state in self._state.items() if equal_codes(state, codes)]
            if equal:
                variables.append(equal[0])
            elif bool((codes == NO_TENSOR).all()):
                variables.append(self._initial_state(instruction.site, name, stored))
            else:
                variables.append(self._state_input(name, codes, stored))
        return variables

    def _initial_state(self, site: str, name: str, stored: Stored) -> int:
        """Add a variable that starts at fixed values, as learned ones, in every call.

        Runtimes start variables at 0; MAXIMUM of equal constants writes other values, and LiteRT
        runs it in every call.
        """
        values = stored.integers.numpy()
        number = self.graph.add(name, spec_of(stored), values)
        if bool((stored.integers != stored.zero_point).any()):
            start = self.graph.constant(f"{name}/start", spec_of(stored), values)
            self.graph.run("MAXIMUM", site, [start, start], [number], {})
        return number

    def _state_input(self, name: str, codes: Codes, stored: Stored) -> int:
        """Return the argument, or part of one, that is a layer's state, read and overwritten."""
        sources, flat = tensors_in(codes), codes.reshape(-1)
        self._validate_state_order(name, sources)
        first = int(elements_in(flat[:1])[0])
        run = np.arange(first, first + flat.size)
        if len(sources) != 1 or not equal_codes(codes, codes_of(sources[0], run)):
            raise CaptureError(
                f"{name} is no argument, nor an unchanged part of one: pass the states of each "
                "layer as the layer returns them, or start from zeros or parameters"
            )
        number = sources[0]
        if prod(self.graph.specs[number].shape) != flat.size:
            return self._part_input(name, number, (first, first + flat.size), stored)
        if number in self._arguments:
            number = self._port_of(number, stored)
        self._validate_state_order(name, [number])
        self.graph.validate_qparams(number, spec_of(stored), name)
        self.graph.specs[number] = spec_of(stored)
        self.graph.values[number] = stored.integers.numpy()
        return number

    def _validate_state_order(self, name: str, numbers: Sequence[int]) -> None:
        """Validate that no argument that the program overwrites is read channels last."""
        if not self._moved.keys().isdisjoint(numbers):
            raise CaptureError(
                f"{name} is an argument that the program overwrites, so its channels cannot be "
                "last: leave it out of channels_last_inputs"
            )

    def _part_input(self, name: str, number: int, part: tuple[int, int], stored: Stored) -> int:
        """Add an input that is a part of an argument."""
        ports = {self.graph.names.index(port.tensor): port for port in self.ports}
        if number in self._arguments:
            position = self._arguments[number]
        elif number in ports:
            position = ports[number].position
        else:
            raise CaptureError(
                f"{name} is a part of {self.graph.names[number]}, which the program computes: "
                "pass it as an argument, or start from zeros or parameters"
            )
        entry = self.graph.add(f"input{position}", spec_of(stored), stored.integers.numpy())
        shape = self.graph.specs[number].shape
        self.ports.append(Port(self.graph.names[entry], position, shape, part=part))
        return entry

    def _update_states(self, instruction: Instruction, inputs: Sequence[int | None]) -> None:
        """Set the present values of the variables that an LSTM has written."""
        h, c = inputs[_STATES[0]], inputs[_STATES[1]]
        assert h is not None
        assert c is not None
        hidden, cells = instruction.new_state
        assert hidden.source is not None
        assert cells.source is not None
        self._state[h] = self.provenance_map.resolve(hidden.source, hidden.dtype, instruction.site)
        version = self.graph.add(f"{instruction.site}/c", spec_of(cells), cells.integers.numpy())
        self._cells[version] = c
        count = cells.integers.numel()
        self.provenance_map.define(
            "float32", self.provenance_map.ids(cells), codes_of(version, np.arange(count))
        )
        self._state[c] = codes_of(version, np.arange(count))

    def _as_computed(self, codes: Codes) -> int | None:
        """Return the tensor that has all of these elements in this order, in any shape.

        A cell is read from its variable. A hidden state is not: it is in the layer's output, too,
        and a compiler leaves a layer out whose output nobody reads.
        """
        sources = tensors_in(codes)
        if len(sources) != 1 or not equal_codes(codes, codes_of(sources[0], np.arange(codes.size))):
            return None
        variable = self._cells.get(sources[0])
        if variable is not None:
            return variable if equal_codes(self._state[variable], codes) else None
        is_all = codes.size == prod(self.graph.specs[sources[0]].shape)
        return sources[0] if is_all and sources[0] not in self._state else None

    def _validate_current(self, sources: Sequence[int], where: str) -> None:
        """Validate that no tensor is an overwritten state of an LSTM, or a cell."""
        for number in sources:
            if number in self._state or number in self._cells:
                raise CaptureError(
                    f"{where} reads the state {self.graph.names[number]} of an LSTM, which the "
                    "program overwrites: compute with the layer's output instead"
                )
