"""The recorder of a forward: instructions as they come, connected to what they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nna.deploy.cpu_operators import CpuOperators, cpu_kernel, function_of
from lightning_nna.deploy.elements import Asked, Elements, unseen
from lightning_nna.deploy.graph import (
    CaptureError,
    Graph,
    MovedTensors,
    Port,
    dtype_of,
    form_of,
    is_float,
    operand_name,
    quantized,
    width_of_grid,
)
from lightning_nna.deploy.layout import (
    NO_TENSOR,
    Codes,
    belong,
    codes_of,
    elements_in,
    same,
    tensor_of,
    tensors_in,
)
from lightning_nna.deploy.provenance import CONSTANT
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.modes import Location
from lightning_nna.emulation.program import Instruction, Stored, activation

_LSTM = "UNIDIRECTIONAL_SEQUENCE_LSTM"
# Where it has its hidden state and its cell among its operands.
_STATES = (18, 19)


_STATISTICS = (
    "it takes the statistics of the example: batch norm needs running statistics "
    "(track_running_stats=True, and training=False where it is called as a function)"
)
# What to do instead of what is no operator.
_REMEDIES = {
    "embedding": (
        "max_norm scales rows as they are looked up: scale the table itself, as with "
        "torch.renorm, and leave max_norm out"
    ),
    "group_norm": "use batch norm with running statistics, or layer norm over the channels",
    "instance_norm": (
        "it takes the statistics of every input: use batch norm with running statistics, or layer "
        "norm over the channels"
    ),
}


def attributes_of(module: nn.Module) -> dict[str, list[Tensor]]:
    """Tensors in attributes of modules that are neither parameters nor buffers, by name."""
    found = {}
    for path, each in module.named_modules():
        for name, value in vars(each).items():
            if name.startswith("_") or not isinstance(value, (Tensor, tuple, list, dict)):
                continue
            tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
            if tensors:
                found[f"{path}.{name}".lstrip(".")] = tensors
    return found


class Recorder:
    """Listens to a forward and connects its instructions.

    Args:
        emulator: Of the module, on the chip.
        allow_cpu: Whether float operators that a runtime has are taken down, too.

    Attributes:
        graph: What the program is made of so far.
        ports: Its inputs.
        elements: Where everything is.
    """

    def __init__(self, emulator: Emulator, *, allow_cpu: bool = False) -> None:
        self.emulator, self.graph = emulator, Graph()
        self.elements = Elements()
        self._allow_cpu = allow_cpu
        self._cpu = CpuOperators(self.graph, self.elements, self._on_chip)
        self.ports: list[Port] = []
        #: Arguments in float: number of the pseudo tensor -> position.
        self._arguments: dict[int, int] = {}
        self._entered: dict[tuple[Any, ...], int] = {}
        #: Cells that an LSTM has left in its variable: pseudo tensor -> variable.
        self._cells: dict[int, int] = {}
        #: What every variable holds now, as codes.
        self._state: dict[int, Codes] = {}
        self._moved = MovedTensors(self.graph, self._state)

    # --- the forward ----------------------------------------------------------------------------

    def asked(self) -> Asked:
        """A mode that sees what Python takes out of tensors; it goes below the dispatch."""
        return Asked(self.elements.decides)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Follow elements and take instructions down; refuse what no calibration has seen."""
        emulator = self.emulator
        known = set(emulator.ranges.ranges)
        try:
            with (
                emulator.running(recorder=self._take, listener=self._refuse),
                self.elements.provenance,
            ):
                yield
        finally:
            new = [key for key in emulator.ranges.ranges if key not in known]
            for key in new:
                del emulator.ranges.ranges[key]
            if new:  # Whatever else went wrong, this came first.
                raise CaptureError(
                    f"no calibration has seen {', '.join(new)}: calibrate with the calls that are "
                    "exported, and give arguments that come from the chip as the chip made them"
                )

    def argument(self, position: int, x: Any) -> Any:
        """A copy of an argument, whose elements are followed."""
        if not isinstance(x, Tensor):
            return x
        copy = x.detach().clone()
        with unseen():
            self._follow_argument(position, x, copy)
        return copy

    def _follow_argument(self, position: int, x: Tensor, copy: Tensor) -> None:
        tag = self.emulator.state.qparams_of(x)
        addresses = self.elements.begin(copy)
        if not x.is_floating_point():
            self.elements.integers.append(position)
        if tag is not None:
            self.emulator.state.set_qparams(copy, tag)
            number = self._port(position, activation(copy, tag), from_chip=True)
            self.elements.define(
                width_of_grid(tag), addresses, codes_of(number, np.arange(copy.numel()))
            )
        elif copy.numel():
            form = Stored(copy if copy.is_floating_point() else copy.long(), dtype_of(copy))
            number = self.graph.add(f"argument{position}", form_of(form), form.integers.numpy())
            self._arguments[number] = position
            self.elements.define(form.dtype, addresses, codes_of(number, np.arange(copy.numel())))

    def result(self, position: int, x: Any) -> tuple[Port, ...]:
        """The ports of a result; none for what is no activation, or holds nothing."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            return ()
        with unseen():
            tag = self.emulator.state.qparams_of(x)
            parts = self.emulator.state.parts_of(x)
            grid = tag if parts is None else parts.grids[0]
            kind = "float32" if grid is None else width_of_grid(grid)
            codes = self.elements.resolve(x, kind, f"result {position}")
            sources = tensors_in(codes)
            if tag is None and sources and self._arguments.keys() >= set(sources):
                return ()  # It is what the caller has.
            if not sources:
                fixed = ", which are floats: integers are constants of a program, so pass floats"
                raise CaptureError(
                    f"result {position} does not depend on the arguments"
                    f"{fixed if self.elements.integers else ''}"
                )
            if parts is not None:
                return self._parts(position, x, codes, parts.which.numpy())
            if len(sources) > 1 and self._cells.keys() >= set(sources):
                return self._parts(position, x, codes, tensor_of(codes))
            made = self._as_made(codes)
            if made is None:
                made = self._moved_result(position, x, codes)
            return (Port(self.graph.names[made], position, tuple(x.shape)),)

    def _parts(self, position: int, x: Tensor, codes: Codes, which: Any) -> tuple[Port, ...]:
        """The ports of a result that lies on several grids, as the states of several layers."""
        flat, numbers = codes.reshape(-1), which.reshape(-1)
        bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), flat.size]
        ports = []
        for start, end in pairwise(bounds):
            piece, values = flat[start:end], x.reshape(-1)[start:end]
            made = self._as_made(piece)
            if made is None:
                made = self._moved_result(position, values, piece)
            shape = tuple(x.shape)
            ports.append(Port(self.graph.names[made], position, shape, part=(start, end)))
        return tuple(ports)

    def _moved_result(self, position: int, x: Tensor, codes: Codes) -> int:
        """A result that movements make of what is there, with constants among its elements."""
        where, sources = f"result {position}", tensors_in(codes)
        self._demand_current(sources, where)
        grid = self.graph.specs[sources[0]]
        for number in sources:
            if number in self._arguments:
                raise CaptureError(
                    f"{where} has elements of argument {self._arguments[number]}, which is on no "
                    "grid there: leave it out of the exported results"
                )
            self.graph.demand_grid(number, grid, where)
        values = x.detach().numpy()
        if grid.dtype != "float32":
            scale = np.float32(grid.scales[0])
            integers = np.rint(values / scale).astype(np.int64) + grid.zero_point
            limits, fixed = np.iinfo(grid.dtype), codes == NO_TENSOR
            exact = (integers - grid.zero_point).astype(np.float32) * scale == values
            inside = (integers >= limits.min) & (integers <= limits.max)
            if not bool((exact & inside)[fixed].all()):
                raise CaptureError(
                    f"{where} has constants that its grid (scale {scale}) has not: join them with "
                    "torch.cat where the chip sees it, or leave them out of the exported results"
                )
            values = integers
        return self._moved.tensor(codes, values, grid, "result")

    def follow_state(self, kept: Mapping[str, Sequence[Tensor]]) -> None:
        """Follow what modules keep in attributes: it may be of an earlier call."""
        with unseen():
            for tensors in kept.values():
                for x in tensors:
                    self.elements.provenance.keep(x)

    def refuse_state(self, module: nn.Module, before: Mapping[str, Sequence[Tensor]]) -> None:
        """Refuse a module that keeps data from call to call: its program would not.

        Args:
            module: After its forward.
            before: What its attributes held before, by name.

        Raises:
            CaptureError: If it writes data to a buffer, or to an attribute that held tensors while
                the program reads such attributes.
        """
        causes, remedy = self.elements.provenance.causes, "pass what it keeps as an argument and "
        with unseen():
            for name, buffer in module.named_buffers():
                if causes((buffer,)) is None:
                    raise CaptureError(
                        f"the forward writes data to the buffer {name}, and a program would start "
                        f"from the example's in every call: {remedy}return it"
                    )
            for name, tensors in attributes_of(module).items():
                if self.elements.reads_kept and name in before and causes(tensors) is None:
                    raise CaptureError(
                        f"the forward reads what an earlier call has left in the attribute {name}, "
                        f"and a program would start from that in every call: {remedy}return it"
                    )

    def fixed(self, leaves: Sequence[Any]) -> dict[int, Any]:
        """Arguments that are part of the program: what steered it, and what is no tensor.

        Raises:
            CaptureError: If one of them is an input as well.
        """
        steering = self.elements.steering
        read = {port.position for port in self.ports}
        if both := sorted(steering & read):
            raise CaptureError(
                f"argument {both[0]} is read by the program and decides something as well, as a "
                "mask made of labels does, which would be the example's for ever: pass what "
                "decides as an argument of its own"
            )
        found: dict[int, Any] = {}
        for position, leaf in enumerate(leaves):
            if position in steering:
                found[position] = leaf.tolist()
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                found[position] = leaf
        return found

    # --- instructions ---------------------------------------------------------------------------

    def _refuse(self, key: str, where: Location, operands: Any, result: Any) -> None:
        with unseen():
            if where != "cpu" or not self.elements.provenance.reaches(result):
                return
            computed_of_data = self.elements.provenance.causes(result) is None
            if not computed_of_data and function_of(key) not in _REMEDIES:
                return  # Of lengths and the like: it is a constant of the program.
        if self._allow_cpu:
            with unseen():
                if self._cpu.take(key, operands, result):
                    return
        has_cpu = cpu_kernel(key) is not None and not self._allow_cpu
        remedy = _REMEDIES.get(function_of(key))
        if remedy is not None:
            raise CaptureError(f"{key} is no operator of {self.emulator.spec.name}: {remedy}")
        raise CaptureError(
            f"{key} is no operator of {self.emulator.spec.name}: write it with operators that "
            "coverage(module, example) lists as the chip's, or keep it out of the export with "
            f"forward={', or let it run on the CPU with allow_cpu=True' if has_cpu else ''}"
        )

    def _on_chip(self, key: str, x: Tensor) -> int | None:
        """The tensor that holds an activation; None for what is on no grid."""
        tag = self.emulator.state.qparams_of(x)
        if tag is None:
            return None
        stored = activation(x, tag)
        return self._operand(Instruction("DEQUANTIZE", key, (stored,), ()), 0, stored)

    def _take(self, instruction: Instruction) -> None:
        """One instruction: connect its operands, and give its results their elements."""
        with unseen():
            if not self._depends(instruction):
                return  # Computed of the program's own constants: its results are constants.
            places = [self.elements.place(x) for x in instruction.outputs]
            if instruction.operator == "QUANTIZE" and is_float(instruction.inputs[0]):
                self._enter(instruction, places[0])
                return
            inputs = [
                None if x is None or x.variable else self._operand(instruction, k, x)
                for k, x in enumerate(instruction.inputs)
            ]
            if instruction.operator == _LSTM:
                for k, number in zip(_STATES, self._states(instruction), strict=True):
                    inputs[k] = number
            outputs = [self._output(instruction, k) for k in range(len(places))]
            between = [
                self.graph.add(f"{instruction.site}/intermediate", form_of(x), x.integers.numpy())
                for x in instruction.intermediates
            ]
            self.graph.run(
                instruction.operator,
                instruction.site,
                inputs,
                outputs,
                instruction.options,
                between,
            )
            for place, number in zip(places, outputs, strict=True):
                count = prod(self.graph.specs[number].shape)
                dtype = self.graph.specs[number].dtype
                self.elements.define(dtype, place, codes_of(number, np.arange(count)))
            if instruction.operator == _LSTM:
                self._leave(instruction, inputs)

    def _depends(self, instruction: Instruction) -> bool:
        """Tell whether an instruction reads anything but constants.

        Indices that were computed of an argument are none: with them the argument would be fixed.
        """
        read = [x for x in instruction.inputs if x is not None and not x.constant]
        held = [(x.dtype, self.elements.addresses(x)) for x in read]
        return any(
            bool((each >= 0).any()) or (dtype == "int32" and bool((each < CONSTANT).any()))
            for dtype, each in held
        )

    def _output(self, instruction: Instruction, position: int) -> int:
        stored = instruction.outputs[position]
        return self.graph.add(instruction.site, form_of(stored), stored.integers.numpy())

    def _operand(self, instruction: Instruction, position: int, stored: Stored) -> int:
        name = f"{instruction.site}/{operand_name(instruction.operator, position)}"
        values = stored.integers.numpy()
        if stored.constant:
            remedy = _STATISTICS if "batch_norm" in instruction.site else ""
            self.elements.check_constant(stored, name, remedy)
            return self.graph.constant(name, form_of(stored), values.astype(np.int64))
        where = f"{name} of {instruction.operator}"
        if stored.source is None:
            raise CaptureError(f"{where} has no place in the forward")
        codes = self.elements.resolve(stored.source, stored.dtype, where)
        form = form_of(stored)
        if stored.dtype in ("int32", "bool"):
            codes = self._plain_input(codes, stored.dtype)
        self._demand_current(tensors_in(codes), where)
        for number in tensors_in(codes):
            self.graph.demand_grid(number, form, where)
        if not np.array_equal(self.graph.integers_of(codes, 0)[codes >= 0], values[codes >= 0]):
            raise CaptureError(f"{where} holds other integers than those it is made of")
        return self._moved.tensor(codes, values, form, name)

    # --- what comes in --------------------------------------------------------------------------

    def _enter(self, instruction: Instruction, place: Any) -> None:
        """Floats that are brought onto a grid: the arguments behind them come in on it."""
        source, result = instruction.inputs[0], instruction.outputs[0]
        assert source is not None
        assert source.source is not None
        codes = self.elements.resolve(source.source, "float32", instruction.site)
        if any(self._cpu.made(number) for number in tensors_in(codes)):
            number = self._cpu.quantized(instruction.site, codes, result)
            self.elements.define(result.dtype, place, codes_of(number, np.arange(codes.size)))
            return
        entered = codes.copy()
        for number in tensors_in(codes):
            if number not in self._arguments:
                raise CaptureError(
                    f"{instruction.site} reads {self.graph.names[number]} in float: the chip would "
                    "have to leave its integers; compute with the state's output instead"
                )
            port, mask = self._port_of(number, result), belong(codes, number)
            entered[mask] = codes_of(port, elements_in(codes[mask]))
        self.elements.define(result.dtype, place, entered.reshape(-1))

    def _port_of(self, argument: int, grid: Stored) -> int:
        """The input that holds an argument in float on a grid."""
        key = (argument, grid.dtype, float(grid.scale), grid.zero_point)
        if key not in self._entered:
            floats = torch.from_numpy(self.graph.values[argument])
            integers = quantized(floats.numpy(), grid.dtype, float(grid.scale), grid.zero_point)
            stored = replace(grid, integers=torch.from_numpy(integers), source=None)
            self._entered[key] = self._port(self._arguments[argument], stored)
        return self._entered[key]

    def _port(self, position: int, stored: Stored, *, from_chip: bool = False) -> int:
        name = f"input{position}"
        number = self.graph.add(name, form_of(stored), stored.integers.numpy())
        shape = tuple(stored.integers.shape)
        self.ports.append(Port(self.graph.names[number], position, shape, from_chip))
        return number

    def _plain_input(self, codes: Codes, dtype: str) -> Codes:
        """Arguments on no grid become inputs: integers that are looked up, and masks."""
        result = codes.copy()
        for number in tensors_in(codes):
            if number in self._arguments:
                position = self._arguments[number]
                key = (number, dtype)
                if key not in self._entered:
                    values = torch.from_numpy(self.graph.values[number])
                    self._entered[key] = self._port(position, Stored(values, dtype))
                mask = belong(codes, number)
                result[mask] = codes_of(self._entered[key], elements_in(codes[mask]))
        return result

    # --- states ---------------------------------------------------------------------------------

    def _states(self, instruction: Instruction) -> list[int]:
        """The variables of an LSTM: an earlier step's, inputs, or new ones that start at 0."""
        found = []
        for k in _STATES:
            stored = instruction.inputs[k]
            assert stored is not None
            assert stored.source is not None
            name = f"{instruction.site}/{operand_name(_LSTM, k)}"
            kind = stored.dtype if k == _STATES[0] else "float32"
            codes = self.elements.resolve(stored.source, kind, name)
            held = [n for n, now in self._state.items() if same(now, codes)]
            if held:
                found.append(held[0])
            elif bool((codes == NO_TENSOR).all()):
                found.append(self._start(instruction.site, name, stored))
            else:
                found.append(self._state_input(name, codes, stored))
        return found

    def _start(self, site: str, name: str, stored: Stored) -> int:
        """A variable that starts at fixed values, as learned ones, in every call.

        Runtimes start variables at 0; MAXIMUM of equal constants writes other values, and LiteRT
        runs it in every call.
        """
        values = stored.integers.numpy()
        number = self.graph.add(name, form_of(stored), values)
        if bool((stored.integers != stored.zero_point).any()):
            start = self.graph.constant(f"{name}/start", form_of(stored), values)
            self.graph.run("MAXIMUM", site, [start, start], [number], {})
        return number

    def _state_input(self, name: str, codes: Codes, stored: Stored) -> int:
        """An argument, or the part of one that is a layer's state, read and overwritten."""
        sources, flat = tensors_in(codes), codes.reshape(-1)
        first = int(elements_in(flat[:1])[0])
        run = np.arange(first, first + flat.size)
        if len(sources) != 1 or not same(codes, codes_of(sources[0], run)):
            raise CaptureError(
                f"{name} is no argument, nor a part of one as it is: pass the states of each layer "
                "as they come out, or start from zeros or parameters"
            )
        number = sources[0]
        if prod(self.graph.specs[number].shape) != flat.size:
            return self._part_input(name, number, (first, first + flat.size), stored)
        if number in self._arguments:
            number = self._port_of(number, stored)
        self.graph.demand_grid(number, form_of(stored), name)
        self.graph.specs[number] = form_of(stored)
        self.graph.values[number] = stored.integers.numpy()
        return number

    def _part_input(self, name: str, number: int, part: tuple[int, int], stored: Stored) -> int:
        """An input that is a part of an argument."""
        ports = {self.graph.names.index(port.tensor): port for port in self.ports}
        if number in self._arguments:
            position = self._arguments[number]
        elif number in ports:
            position = ports[number].position
        else:
            raise CaptureError(
                f"{name} is a part of {self.graph.names[number]}, which the chip has computed: "
                "pass it as an argument, or start from zeros or parameters"
            )
        made = self.graph.add(f"input{position}", form_of(stored), stored.integers.numpy())
        shape = self.graph.specs[number].shape
        self.ports.append(Port(self.graph.names[made], position, shape, part=part))
        return made

    def _leave(self, instruction: Instruction, inputs: Sequence[int | None]) -> None:
        """What the variables of an LSTM hold from now on."""
        h, c = inputs[_STATES[0]], inputs[_STATES[1]]
        assert h is not None
        assert c is not None
        hidden, cells = instruction.left
        assert hidden.source is not None
        assert cells.source is not None
        self._state[h] = self.elements.resolve(hidden.source, hidden.dtype, instruction.site)
        version = self.graph.add(f"{instruction.site}/c", form_of(cells), cells.integers.numpy())
        self._cells[version] = c
        count = cells.integers.numel()
        self.elements.define(
            "float32", self.elements.addresses(cells), codes_of(version, np.arange(count))
        )
        self._state[c] = codes_of(version, np.arange(count))

    def _as_made(self, codes: Codes) -> int | None:
        """The tensor that has these elements in this order, in whatever shape.

        A cell is read from its variable. A hidden state is not: it is in the layer's output, too,
        and a compiler leaves a layer out whose output nobody reads.
        """
        sources = tensors_in(codes)
        if len(sources) != 1 or not same(codes, codes_of(sources[0], np.arange(codes.size))):
            return None
        variable = self._cells.get(sources[0])
        if variable is not None:
            return variable if same(self._state[variable], codes) else None
        whole = codes.size == prod(self.graph.specs[sources[0]].shape)
        return sources[0] if whole and sources[0] not in self._state else None

    def _demand_current(self, sources: Sequence[int], where: str) -> None:
        """Refuse what an LSTM has overwritten, and its cells, which it alone can read."""
        for number in sources:
            if number in self._state or number in self._cells:
                raise CaptureError(
                    f"{where} reads the state {self.graph.names[number]} of an LSTM, which the "
                    "chip has not kept: compute with the layer's output instead"
                )
