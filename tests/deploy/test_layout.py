"""LayoutBuilder that are found run on LiteRT, and must give the very elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nna.deploy.flatbuffer import options_of
from lightning_nna.deploy.layout import NO_TENSOR, LayoutBuilder, codes_of, elements_in
from tests.litert import OperatorSpec, TensorSpec, build_model, run_model

pytestmark = pytest.mark.exactness

A = np.arange(60).reshape(3, 4, 5)
B = np.arange(24).reshape(2, 3, 4)
# What LiteRT gets: another integer for every element of both, and one for the program's own.
HELD = [A.astype(np.int16), (B + 100).astype(np.int16)]
FILL = 999


class Machine:
    """A program of the two tensors under construction, which LiteRT runs."""

    def __init__(self) -> None:
        self.tensors = {f"x{k}": TensorSpec(x.shape, "int16", 0.1) for k, x in enumerate(HELD)}
        self.operators: list[OperatorSpec] = []

    @property
    def done(self) -> list[str]:
        return [operator.name for operator in self.operators]

    def shape_of(self, number: int) -> tuple[int, ...]:
        return self.tensors[f"x{number}"].shape

    def make(self, codes: Any, fill: int = FILL) -> Any:
        builder = LayoutBuilder(self.emit, self.constant, self.shape_of, zero=0, lowest=-(2**15))
        number = builder.build(codes, np.full(codes.shape, fill))
        # An input that is a result as well is one tensor on LiteRT, so it is copied.
        shape = self.shape_of(number)
        options = options_of("RESHAPE", {"newShape": list(shape)})
        last = OperatorSpec("RESHAPE", (f"x{number}",), ("y",), options)
        tensors = self.tensors | {"y": TensorSpec(shape, "int16", 0.1)}
        model = build_model(tensors, [*self.operators, last], ["x0", "x1"], ["y"])
        return run_model(model, HELD)[0]

    def constant(self, values: Any) -> int:
        return self.add(TensorSpec.constant(values.astype(np.int16), 0.1))

    def add(self, spec: TensorSpec) -> int:
        self.tensors[f"x{len(self.tensors)}"] = spec
        return len(self.tensors) - 1

    def emit(self, operator: str, inputs: Sequence[Any], shape: Any, options: Any) -> int:
        numbers = [
            x if isinstance(x, int) else self.add(TensorSpec.constant(x.astype(np.int32)))
            for x in inputs
        ]
        result = self.add(TensorSpec(tuple(int(n) for n in shape), "int16", 0.1))
        names = tuple(f"x{number}" for number in numbers)
        self.operators.append(
            OperatorSpec(operator, names, (f"x{result}",), options_of(operator, options))
        )
        return result


def values_of(codes: Any) -> Any:
    """What a program must give for codes."""
    whole = np.concatenate([x.reshape(-1) for x in HELD])
    index = np.where(codes >> 40 == 1, A.size + elements_in(codes), elements_in(codes))
    return np.where(codes == NO_TENSOR, FILL, whole[np.where(codes < 0, 0, index)])


a, b = codes_of(0, A), codes_of(1, B)
CASES = {
    "whole": (a, []),
    "reshaped": (a.reshape(12, 5), ["RESHAPE"]),
    "slice": (a[:, 1:3], ["STRIDED_SLICE"]),
    "row": (a[1], ["STRIDED_SLICE", "RESHAPE"]),
    "every other": (a[:, :, ::2], ["STRIDED_SLICE"]),
    "transposed": (a.transpose(2, 0, 1), ["TRANSPOSE"]),
    "merged": (a.transpose(0, 2, 1).reshape(3, 20), ["TRANSPOSE", "RESHAPE"]),
    "merged broadcast": (
        np.broadcast_to(a[:, None], (3, 2, 4, 5)).reshape(3, 8, 5),
        ["RESHAPE", "MAXIMUM", "RESHAPE"],
    ),
    "reversed": (a[:, ::-1], ["REVERSE_V2"]),
    "broadcast": (np.broadcast_to(a[:, None], (3, 2, 4, 5)), ["RESHAPE", "MAXIMUM", "RESHAPE"]),
    "joined": (np.concatenate([a[:, :3, :4], b]), None),
    "padded": (np.pad(a, ((0, 0), (1, 2), (0, 0)), constant_values=NO_TENSOR), ["CONCATENATION"]),
    "heads joined": (
        np.swapaxes(a, 0, 1).reshape(4, 15),
        ["TRANSPOSE", "RESHAPE"],
    ),
    "elements repeated": (
        np.repeat(a[0], 3, 1),
        ["RESHAPE", "STRIDED_SLICE", "RESHAPE", "MAXIMUM", "RESHAPE", "RESHAPE"],
    ),
    "windows": (np.lib.stride_tricks.sliding_window_view(a, 3, axis=1), None),
    "blocks": (np.block([[a[0], a[1]], [a[2], NO_TENSOR * np.ones((4, 5), np.int64)]]), None),
    "shuffled": (a.reshape(-1)[np.random.default_rng(0).permutation(60)], ["RESHAPE", "GATHER"]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operand_is_made_of_what_is_there(name: str) -> None:
    codes, expected = CASES[name]
    machine = Machine()
    np.testing.assert_array_equal(machine.make(codes), values_of(codes))
    assert expected in (None, machine.done)


@pytest.mark.parametrize("axes", [(1,), (0, 2)])
def test_zeros_around_are_padding(axes: tuple[int, ...]) -> None:
    sides = [(1, 2) if axis in axes else (0, 0) for axis in range(3)]
    codes = np.pad(a.transpose(0, 2, 1), sides, constant_values=NO_TENSOR)
    machine = Machine()
    expected = np.where(codes == NO_TENSOR, 0, values_of(codes))
    np.testing.assert_array_equal(machine.make(codes, fill=0), expected)
    assert machine.done == ["TRANSPOSE", "PAD"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_chain_of_layouts(data: st.DataObject) -> None:
    codes = data.draw(st.sampled_from([a, b]))
    for _ in range(data.draw(st.integers(1, 4))):
        axis = data.draw(st.integers(0, codes.ndim - 1))
        kind = data.draw(st.sampled_from(["swap", "slice", "flip", "stack", "pad", "fold"]))
        if kind == "swap":
            codes = np.swapaxes(codes, axis, 0)
        elif kind == "slice" and codes.shape[axis] > 1:
            codes = np.take(codes, range(1, codes.shape[axis], data.draw(st.integers(1, 2))), axis)
        elif kind == "flip":
            codes = np.flip(codes, axis)
        elif kind == "stack":
            codes = np.concatenate([codes, np.flip(codes, axis)], axis)
        elif kind == "pad":
            sides = [(int(k == axis), 0) for k in range(codes.ndim)]
            codes = np.pad(codes, sides, constant_values=NO_TENSOR)
        else:
            codes = codes.reshape(codes.shape[0], -1)
    np.testing.assert_array_equal(Machine().make(codes), values_of(codes))


def test_what_is_no_view_is_gathered_with_its_constants() -> None:
    codes = np.random.default_rng(1).permutation(np.concatenate([a.ravel(), b.ravel(), [-1, -1]]))
    machine = Machine()
    np.testing.assert_array_equal(machine.make(codes), values_of(codes))
    assert machine.done == ["RESHAPE", "RESHAPE", "CONCATENATION", "GATHER"]
