"""Example networks of every operator: whoever adds an operator adds its examples here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna.testing.operator_oracle import Example

MASK = torch.ones(24, 24, dtype=torch.bool).tril()


class Calling(nn.Module):
    """A function, and the layers that it calls."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*self.layers, *inputs)


def layer(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A layer that returns its output alone, without states or weights."""

    def first(module: nn.Module, *inputs: Tensor) -> Tensor:
        result = module(*inputs)
        return result if isinstance(result, Tensor) else result[0]

    return lambda: Calling(first, make())


def function(call: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Calling(call)


def in_place(x: Tensor, y: Tensor) -> Tensor:
    return (x * 1.0).add_(y).sub_(0.3).mul_(y)


ROWS, SQUARE = (120, 100), ((120, 100), (120, 100))
BROADCAST = ((40, 1, 30), (1, 20, 30))
HEADS = ((7, 3, 24, 20),) * 3
#: By the operator's name.
EXAMPLES: dict[str, list[Example]] = {
    "add": [
        Example(function(torch.add), SQUARE),
        Example(function(lambda a, b: a + b), BROADCAST),
    ],
    "attention": [
        Example(function(F.scaled_dot_product_attention), HEADS),
        Example(function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK)), HEADS),
        Example(
            lambda: Calling(
                lambda module, x: module(x, x, x, attn_mask=~MASK)[0],
                nn.MultiheadAttention(32, 4, batch_first=True),
            ),
            ((14, 24, 32),),
        ),
    ],
    "batch_matmul": [Example(function(torch.matmul), ((4, 60, 300), (4, 300, 50)))],
    "batch_norm": [
        Example(
            layer(lambda: nn.Sequential(nn.Conv1d(40, 24, 5), nn.BatchNorm1d(24))), ((8, 40, 60),)
        ),
        Example(
            layer(lambda: nn.Sequential(nn.Linear(300, 24), nn.BatchNorm1d(24))), ((500, 300),)
        ),
    ],
    "concatenation": [
        Example(function(lambda a, b: torch.cat([torch.tanh(a), b], -1)), SQUARE, moves_only=True)
    ],
    "convolution": [
        Example(layer(lambda: nn.Conv1d(300, 24, 5)), ((8, 300, 60),)),
        Example(layer(lambda: nn.Conv2d(60, 16, 3, padding=1)), ((4, 60, 14, 13),)),
        Example(layer(lambda: nn.Conv1d(64, 64, 31, padding="same", groups=64)), ((4, 64, 50),)),
        Example(layer(lambda: nn.Conv2d(32, 32, 5, groups=32)), ((4, 32, 14, 13),)),
    ],
    "elu": [Example(function(F.elu), (ROWS,))],
    "embedding": [Example(lambda: nn.Embedding(2, 12), ((100, 10),), rows=2)],
    "fully_connected": [Example(layer(lambda: nn.Linear(4096, 32)), ((330, 4096),))],
    "gelu": [
        Example(function(F.gelu), (ROWS,)),
        Example(function(lambda x: F.gelu(x, approximate="tanh")), (ROWS,)),
    ],
    "glu": [Example(function(F.glu), ((220, 100),))],
    "gru": [
        Example(layer(lambda: nn.GRU(40, 32, 2, bidirectional=True)), ((6, 30, 40),)),
        # The state has 16 bits, where float32's rounding errs more often.
        Example(layer(lambda: nn.GRUCell(40, 80)), ((130, 40), (130, 80)), fast_tolerance=0.02),
    ],
    "hard_sigmoid": [Example(function(F.hardsigmoid), (ROWS,))],
    "hard_swish": [Example(function(F.hardswish), (ROWS,))],
    "layer_norm": [Example(layer(lambda: nn.LayerNorm(100)), (ROWS,))],
    "leaky_relu": [Example(function(F.leaky_relu), (ROWS,))],
    "log_softmax": [Example(function(lambda x: F.log_softmax(x, -1)), (ROWS,))],
    "lstm": [
        Example(layer(lambda: nn.LSTM(40, 32, 2, bidirectional=True)), ((6, 30, 40),)),
        Example(layer(lambda: nn.LSTM(40, 32, proj_size=12)), ((30, 30, 40),)),
        Example(layer(lambda: nn.LSTMCell(40, 80)), ((130, 40),)),
    ],
    "mean": [Example(function(lambda x: x.mean(0)), ((50, 10_000),))],
    "mul": [
        Example(function(torch.mul), SQUARE),
        Example(function(lambda a, b: a * b / 3), BROADCAST),
        Example(function(in_place), SQUARE),
    ],
    "reduce_max": [Example(function(lambda x: x.amax(0)), ((9, 10_000),))],
    "reduce_min": [Example(function(lambda x: x.amin(0)), ((9, 10_000),))],
    "relu": [Example(function(torch.relu), (ROWS,))],
    "relu6": [Example(function(F.relu6), (ROWS,))],
    "rms_norm": [Example(layer(lambda: nn.RMSNorm(100)), (ROWS,))],
    "select": [
        Example(
            function(lambda x: (y := 2 * x).masked_fill(y.detach() > 0.5, -1e9)),
            (ROWS,),
        ),
        Example(function(lambda x: torch.where(MASK, 1.7 * x, x.flip(0))), ((24, 24, 24),)),
        # A program has MINIMUM for a mask of its own: see tests/deploy/test_constant_mask.py.
        Example(
            function(lambda x: (2 * x).masked_fill(MASK, -1e9)), ((24, 24, 24),), exported=False
        ),
    ],
    "sigmoid": [Example(function(torch.sigmoid), (ROWS,))],
    "silu": [Example(function(F.silu), (ROWS,))],
    "softmax": [Example(function(lambda x: F.softmax(x, -1)), (ROWS,))],
    "sub": [
        Example(function(torch.sub), SQUARE),
        Example(function(lambda a, b: 1.5 - (a - b)), BROADCAST),
    ],
    "sum": [Example(function(lambda x: x.sum(0)), ((50, 10_000),))],
    "tanh": [Example(function(torch.tanh), (ROWS,))],
}
