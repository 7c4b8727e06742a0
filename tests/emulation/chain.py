"""Whether recorded instructions form one closed program: nothing enters but the network's input.

Between instructions torch may move values: views, transposes, slices, expansions, padding with
zeros. Such a movement keeps the grid and repeats or leaves out integers, so an operand must be
found, integer by integer and as often, in one earlier result on its own grid. A state that lives on
inside of the LSTM's instruction is what LiteRT has left there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.program import Instruction, Stored
from lightning_nna.testing.replay import on_runtime
from tests import litert
from tests.litert import TensorSpec


def check_chain(instructions: Sequence[Instruction], inputs: Tensor, result: Tensor) -> int:
    """Demand that operands are earlier results, and the network's result the last one.

    Args:
        instructions: Of one run, in order.
        inputs: What the network was given: floats, or indices of an embedding.
        result: What it gave, float32.

    Returns:
        The number of operands that were traced.
    """
    earlier: dict[tuple[str, str], list[Stored]] = defaultdict(list)
    given = torch.cat([inputs.flatten(), inputs.new_zeros(1)])  # Padding may come before all.
    traced = 0
    for instruction in instructions:
        for position, operand in enumerate(instruction.inputs):
            if operand is None or operand.constant or operand.dtype == "bool":
                continue
            where = f"{instruction.site}: operand {position} of {instruction.operator}"
            if operand.dtype == "int32" and _is_result(operand, earlier.values()):
                pass  # An index that the program has computed, for a table.
            elif operand.dtype in ("float32", "int32"):
                assert bool(torch.isin(operand.integers, given).all()), f"{where} is no input"
            else:
                found = any(_comes_from(operand, sources) for sources in earlier.values())
                assert found, f"{where} has no source"
            traced += 1
        key = instruction.site, instruction.operator
        earlier[key] += [*instruction.outputs, *_states(instruction)]
    last = instructions[-1].outputs[0]
    expected = dequantized(last).reshape(result.shape)
    np.testing.assert_array_equal(result.detach().numpy(), expected)
    return traced


def _is_result(operand: Stored, earlier: Iterable[Sequence[Stored]]) -> bool:
    """Whether an operand is an earlier result, perhaps of another shape."""
    results = (x for each in earlier for x in each if x.dtype == operand.dtype)
    return any(torch.equal(operand.integers.flatten(), x.integers.flatten()) for x in results)


def dequantized(stored: Stored) -> np.ndarray:
    """The real values of a tensor by LiteRT's DEQUANTIZE."""
    values = stored.integers.numpy().astype(stored.dtype)
    assert isinstance(stored.scale, float)
    given = TensorSpec(values.shape, stored.dtype, stored.scale, stored.zero_point)
    program = litert.unary_model("DEQUANTIZE", given, TensorSpec(values.shape, "float32"))
    return litert.run_model(program, [values])[0]


def _states(instruction: Instruction) -> list[Stored]:
    """What LiteRT's kernel has left in the state of an instruction, for the next step of a loop."""
    kept = [x for x in instruction.inputs if x is not None and x.variable]
    if not kept:
        return []
    found = on_runtime(instruction, states=True)[len(instruction.outputs) :]
    pairs = zip(kept, found, strict=True)
    return [replace(x, integers=torch.from_numpy(values).long()) for x, values in pairs]


def _comes_from(operand: Stored, sources: Sequence[Stored]) -> bool:
    """Whether a movement can make ``operand`` of one source, or of the steps of a loop together."""
    zero = operand.zero_point
    integers = operand.integers.flatten()
    if bool((integers == zero).all()):
        return True  # A state at the start, or padding alone.
    form = (operand.dtype, operand.scale, zero)
    alike = [x for x in sources if form == (x.dtype, x.scale, x.zero_point)]
    if not alike:
        return False
    found = _counts(operand)
    found[zero - torch.iinfo(getattr(torch, operand.dtype)).min] = 0
    single = any(
        bool((found <= -(-len(integers) // x.integers.numel()) * _counts(x)).all()) for x in alike
    )
    return single or bool((found <= sum(_counts(x) for x in alike)).all())


def _counts(x: Stored) -> Tensor:
    """How often every integer of its width occurs."""
    limits = torch.iinfo(getattr(torch, x.dtype))
    return torch.bincount(x.integers.flatten() - limits.min, minlength=2**limits.bits)
