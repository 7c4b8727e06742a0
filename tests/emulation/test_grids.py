"""Changes of quantization parameters: quantize, requantize, dequantize, data movement."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.emulation.program import Instruction, Stored
from lightning_nna.emulation.ranges import affine_qparams
from lightning_nna.testing.replay import check_instructions
from tests.emulation.chain import check_chain, dequantized

pytestmark = pytest.mark.exactness
SPECS = {8: "litert-int8", 16: "litert-int16x8"}


class Calling(nn.Module):
    """A function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def run(module: nn.Module, x: Tensor, calibration: Tensor, bits: int) -> list[Instruction]:
    """Instructions of a run: all of them LiteRT's, and the result is the last one's, in float."""
    recorded: list[Instruction] = []
    with emulate(module, SPECS[bits]) as chip, torch.no_grad():
        with chip.observing():
            module(calibration)
        with chip.running(recorder=recorded.append):
            result = module(x)
    check_instructions(recorded)
    check_chain(recorded, x, result)
    return recorded


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("span", [1e-6, 0.037, 1.0, 4.1e5])
def test_quantize(span: float, bits: int) -> None:
    """Values beside and beyond the grid, and ties.

    None is 2^31 steps from 0 or more: there the reference casts a float that an int32 cannot hold,
    which is undefined, and the emulator saturates.
    """
    q = affine_qparams(-0.9 * span, span, bits=bits)
    steps = torch.arange(-300, 301, dtype=torch.float64).add(0.5)
    ties = torch.cat([steps, 100 * steps]) * q.scale
    around = torch.cat([torch.nextafter(ties.float(), torch.tensor(x)) for x in (-9e9, 9e9)])
    ends = torch.tensor([6e4 * span, -6e4 * span, 0.0, -0.0, 1e-38])
    x = torch.cat([1.5 * span * (2 * torch.rand(20_000) - 1), ties.float(), around, ends])
    calibration = torch.tensor([-0.9 * span, span])
    recorded = run(Calling(torch.relu), x, calibration, bits)
    assert [each.operator for each in recorded] == ["QUANTIZE", "RELU"]


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("ratio", [1e-3, 0.31, 1.0, 1.7, 300.0])
def test_requantize(ratio: float, bits: int) -> None:
    """Every integer of a grid, onto one that another part of a concatenation makes finer or not."""
    count = 2**bits
    line = torch.linspace(-1, 0.9, count)

    def joined(x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return torch.cat([torch.relu(first + 0.0), torch.tanh(ratio * second)])

    recorded = run(Calling(joined), torch.cat([line, line]), torch.cat([line, line]), bits)
    moved = [x for x in recorded if x.operator == "QUANTIZE" and x.inputs[0].dtype != "float32"]
    assert moved


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("span", [1e-6, 0.037, 3.0, 4.1e5])
def test_dequantize(span: float, dtype: str) -> None:
    """The float tensor that an activation travels as is what LiteRT dequantizes to."""
    limits = np.iinfo(dtype)
    q = affine_qparams(-0.7 * span, span, bits=limits.bits)
    integers = torch.arange(limits.min, limits.max + 1)
    traveling = (integers - q.zero_point).float() * q.scale
    stored = Stored(integers, dtype, q.scale, q.zero_point)
    np.testing.assert_array_equal(traveling.numpy(), dequantized(stored))


MOVEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(30, -1),
    "reshape": lambda x: x.transpose(0, 1).reshape(20, 600),
    "transpose": lambda x: x.permute(2, 0, 1),
    "slice": lambda x: x[:, 1:, ::2],
    "split": lambda x: x.split([3, 17], 1)[1],
    "chunk": lambda x: x.chunk(2, -1)[0],
    "select": lambda x: x[:, 3],
    "pad": lambda x: F.pad(x, (2, 1, 0, 3)),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(3, 1),
    "stack": lambda x: torch.stack([x, x.flip(0)], 1),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", MOVEMENTS)
def test_movements_change_no_integer(name: str, bits: int) -> None:
    """Between two instructions: the second reads the integers that the first has written."""
    torch.manual_seed(0)
    x = torch.randn(30, 20, 20)
    move = MOVEMENTS[name]
    recorded = run(Calling(lambda x: torch.tanh(move(torch.relu(x + 0.5)))), 1.5 * x, x, bits)
    operand, result = recorded[-1].inputs[0], recorded[-2].outputs[0]
    assert operand is not None
    shift = result.integers - result.zero_point
    moved = move(shift.float()).long() + result.zero_point
    assert torch.equal(operand.integers, moved)
