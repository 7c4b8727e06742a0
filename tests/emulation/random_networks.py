"""Networks drawn at random: blocks of every operator, in sequence, in branches, one in another.

Every block takes activations (batch, time, width) and gives the same but for the width; a plan is
nested tuples that :func:`build` turns into a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

BATCH, TIME, INPUTS, LABELS, CLASSES = 3, 6, 5, 11, 7

# Functions of one activation that keep the width.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
    "hard_sigmoid": F.hardsigmoid,
    "softmax": lambda x: F.softmax(x, dim=-1),
    "softmax over time": lambda x: torch.softmax(x, 1),
    "affine": lambda x: 1.5 - 0.3 * x,
    "square": lambda x: x * x - x,
    "in place": lambda x: (x * 0.7).add_(0.2).sigmoid_(),
    "less its mean": lambda x: x - x.mean(1, keepdim=True),
    "less its largest": lambda x: x - x.amax(-1, keepdim=True),
    "sum": lambda x: x + x.sum(1, keepdim=True) / 3,
    "pad and slice": lambda x: F.pad(x, (0, 0, 1, 1))[:, 2:] + x,
    "transposed": lambda x: torch.tanh(x.transpose(1, 2).reshape(x.shape[0], -1)).view(
        x.shape[0], x.shape[2], x.shape[1]
    ).transpose(1, 2),
    "scores": lambda x: torch.softmax(x @ x.transpose(1, 2) / 4, -1) @ x,
}  # fmt: skip
IN_8_BITS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "hard_swish": F.hardswish,
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
}
LAYERS = (
    "linear", "conv", "conv norm", "depthwise norm", "lstm", "bidirectional lstm", "projected lstm",
    "gru", "bidirectional gru", "lstm cell", "gru cell", "attention", "causal attention",
    "layer norm", "rms norm", "glu", "split",
)  # fmt: skip
Plan = tuple[Any, ...]


def plans(bits: int) -> st.SearchStrategy[list[Plan]]:
    """Sequences of blocks."""
    names = [*FUNCTIONS, *(IN_8_BITS if bits == 8 else ())]
    function = st.tuples(st.just("function"), st.sampled_from(names))
    layer = st.tuples(st.sampled_from(LAYERS), st.sampled_from([4, 8, 12]))

    def nested(inner: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
        few = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(
            st.tuples(st.just("residual"), few),
            st.tuples(st.just("gated"), few),
            st.tuples(st.just("concatenated"), few, few),
        )

    blocks = st.recursive(layer | function, nested, max_leaves=6)
    return st.lists(blocks, min_size=4, max_size=7)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = (FUNCTIONS | IN_8_BITS)[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Transposed(nn.Module):
    """Layers over (batch, width, time)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    """A recurrent layer's outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Loop(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


class Attention(nn.Module):
    """Self-attention of two heads, perhaps masked."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(width, 2, batch_first=True)
        mask = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
        self.register_buffer("mask", mask if causal else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, attn_mask=self.mask, need_weights=False)[0]


class Split(nn.Module):
    """Two parts of unlike width, put together again the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split([1, x.shape[-1] - 1], -1)
        return torch.cat([torch.tanh(second), first], -1)


class Joined(nn.Module):
    """A block beside the identity, or two blocks side by side."""

    def __init__(self, kind: str, *parts: nn.Module) -> None:
        super().__init__()
        self.kind, self.parts = kind, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        results = [part(x) for part in self.parts]
        if self.kind == "residual":
            return x + results[0]
        if self.kind == "gated":
            return x * results[0].sigmoid()
        return torch.cat(results, -1)


class Network(nn.Module):
    """Blocks between a front and a linear head."""

    def __init__(self, plan: list[Plan], *, embedded: bool) -> None:
        super().__init__()
        width = 8 if embedded else INPUTS
        self.front = nn.Embedding(LABELS, width) if embedded else nn.Identity()
        self.blocks, width = sequence(plan, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.front(x)))


def sequence(plan: list[Plan], width: int) -> tuple[nn.Module, int]:
    """Blocks one after the other, and the width of their result."""
    blocks = []
    for each in plan:
        block, width = build(each, width)
        blocks.append(block)
    return nn.Sequential(*blocks), width


def build(plan: Plan, width: int) -> tuple[nn.Module, int]:
    """The module of a block and the width of its result."""
    kind, *details = plan
    if kind == "function":
        return Function(details[0]), width
    if kind == "concatenated":
        parts, widths = zip(*(sequence(part, width) for part in details), strict=True)
        return Joined(kind, *parts), sum(widths)
    if kind in ("residual", "gated"):
        inner, own = sequence(details[0], width)
        return Joined(kind, nn.Sequential(inner, nn.Linear(own, width))), width
    return layer(kind, width, details[0])


def layer(kind: str, width: int, units: int) -> tuple[nn.Module, int]:
    """A layer with parameters."""
    first = {"batch_first": True}
    made: dict[str, Callable[[], tuple[nn.Module, int]]] = {
        "linear": lambda: (nn.Linear(width, units), units),
        "conv": lambda: (Transposed(nn.Conv1d(width, units, 3, padding=1)), units),
        "conv norm": lambda: (
            Transposed(nn.Conv1d(width, units, 3, padding=1), nn.BatchNorm1d(units)), units
        ),
        "depthwise norm": lambda: (
            Transposed(nn.Conv1d(width, width, 5, padding=2, groups=width), nn.BatchNorm1d(width)),
            width,
        ),
        "lstm": lambda: (Recurrent(nn.LSTM(width, units, 2, **first)), units),
        "bidirectional lstm": lambda: (
            Recurrent(nn.LSTM(width, units, bidirectional=True, **first)), 2 * units
        ),
        "projected lstm": lambda: (Recurrent(nn.LSTM(width, units, proj_size=3, **first)), 3),
        "gru": lambda: (Recurrent(nn.GRU(width, units, **first)), units),
        "bidirectional gru": lambda: (
            Recurrent(nn.GRU(width, units, bidirectional=True, **first)), 2 * units
        ),
        "lstm cell": lambda: (Loop(nn.LSTMCell(width, units)), units),
        "gru cell": lambda: (Loop(nn.GRUCell(width, units)), units),
        "attention": lambda: (
            nn.Sequential(nn.Linear(width, units), Attention(units, causal=False)), units
        ),
        "causal attention": lambda: (
            nn.Sequential(nn.Linear(width, units), Attention(units, causal=True)), units
        ),
        "layer norm": lambda: (nn.LayerNorm(width), width),
        "rms norm": lambda: (nn.RMSNorm(width), width),
        "glu": lambda: (nn.Sequential(nn.Linear(width, 2 * units), nn.GLU()), units),
        "split": lambda: (nn.Sequential(nn.Linear(width, units), Split()), units),
    }  # fmt: skip
    return made[kind]()
