"""Movements that are found are carried out, and must give the very elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nna.deploy.movement import NO_TENSOR, Movements, codes_of

A = np.arange(60).reshape(3, 4, 5)
B = np.arange(24).reshape(2, 3, 4)


class Machine:
    """Tensors that hold their own codes; movements are carried out by NumPy."""

    def __init__(self) -> None:
        self.held = [codes_of(number, x) for number, x in enumerate((A, B))]
        self.done: list[str] = []

    def make(self, codes: Any) -> Any:
        made = Movements(self.emit, self.constant, lambda number: self.held[number].shape)
        return self.held[made.make(codes, np.full(codes.shape, NO_TENSOR))]

    def constant(self, values: Any) -> int:
        self.held.append(values)
        return len(self.held) - 1

    def emit(self, operator: str, inputs: Sequence[Any], shape: Any, options: Any) -> int:
        tensors = [self.held[x] for x in inputs if isinstance(x, int)]
        forms = [x for x in inputs if not isinstance(x, int)]
        x = tensors[0]
        results = {
            "RESHAPE": lambda: x.reshape(forms[0]),
            "TRANSPOSE": lambda: x.transpose(forms[0]),
            "STRIDED_SLICE": lambda: x[tuple(map(slice, *forms))],
            "REVERSE_V2": lambda: np.flip(x, forms[0]),
            "BROADCAST_TO": lambda: np.broadcast_to(x, forms[0]),
            "CONCATENATION": lambda: np.concatenate(tensors, options["axis"]),
            "GATHER": lambda: x[forms[0]],
        }
        self.held.append(results[operator]())
        assert self.held[-1].shape == tuple(shape)
        self.done.append(operator)
        return len(self.held) - 1


a, b = codes_of(0, A), codes_of(1, B)
CASES = {
    "whole": (a, []),
    "reshaped": (a.reshape(12, 5), ["RESHAPE"]),
    "slice": (a[:, 1:3], ["STRIDED_SLICE"]),
    "row": (a[1], ["STRIDED_SLICE", "RESHAPE"]),
    "every other": (a[:, :, ::2], ["STRIDED_SLICE"]),
    "transposed": (a.transpose(2, 0, 1), ["TRANSPOSE"]),
    "reversed": (a[:, ::-1], ["REVERSE_V2"]),
    "broadcast": (np.broadcast_to(a[:, None], (3, 2, 4, 5)), ["RESHAPE", "BROADCAST_TO"]),
    "joined": (np.concatenate([a[:, :3, :4], b]), None),
    "padded": (np.pad(a, ((0, 0), (1, 2), (0, 0)), constant_values=NO_TENSOR), ["CONCATENATION"]),
    "windows": (np.lib.stride_tricks.sliding_window_view(a, 3, axis=1), None),
    "blocks": (np.block([[a[0], a[1]], [a[2], NO_TENSOR * np.ones((4, 5), np.int64)]]), None),
    "shuffled": (a.reshape(-1)[np.random.default_rng(0).permutation(60)], ["RESHAPE", "GATHER"]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operand_is_made_of_what_is_there(name: str) -> None:
    codes, expected = CASES[name]
    machine = Machine()
    np.testing.assert_array_equal(machine.make(codes), codes)
    assert expected in (None, machine.done)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_chain_of_movements(data: st.DataObject) -> None:
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
    np.testing.assert_array_equal(Machine().make(codes), codes)


def test_what_is_no_view_is_gathered_with_its_constants() -> None:
    codes = np.random.default_rng(1).permutation(np.concatenate([a.ravel(), b.ravel(), [-1, -1]]))
    machine = Machine()
    np.testing.assert_array_equal(machine.make(codes), codes)
    assert machine.done == ["RESHAPE", "RESHAPE", "CONCATENATION", "GATHER"]
