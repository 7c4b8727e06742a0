"""Networks drawn at random: blocks of every operator, in sequence, in branches, one in another.

Every block takes activations (batch, time, width) and gives the same but for the width; a plan is
nested tuples that :func:`build` turns into a module.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_nna import coverage
from lightning_nna.emulation.emulator import Emulator

BATCH, TIME, INPUTS, LABELS, CLASSES = 3, 6, 5, 11, 7


def _assigned(x: Tensor) -> Tensor:
    """Write over a part of a copy."""
    y = x * 0.8
    y[:, 0] = x[:, -1]
    y[..., -1] = 0.25
    return y


# Functions of one activation (batch, time, width) that keep its shape. With the layers they consist
# of every operator of the records, which `test_every_operator_is_drawn` demands.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # Activation functions
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
    "hard sigmoid": F.hardsigmoid,
    "hard tanh": lambda x: F.hardtanh(x, -0.7, 1.2),
    "clamp": lambda x: x.clamp(-1.1, 0.9),
    "clamp from below": lambda x: x.clamp(min=-0.4),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "softmax over time": lambda x: torch.softmax(x, 1),
    # Arithmetic
    "affine": lambda x: 1.5 - 0.3 * x,
    "square": lambda x: x * x - x,
    "power": lambda x: x.tanh().pow(2) + x,
    "squared difference": lambda x: (x - x.mean(-1, keepdim=True)).square(),
    "in place": lambda x: (x * 0.7).add_(0.2).sigmoid_(),
    "absolute": lambda x: x.abs() - 0.5 * x,
    "root": lambda x: (x * x + 0.1).sqrt(),
    "inverse root": lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 0.2),
    "exponential": lambda x: torch.exp(-x.abs()) + x,
    "logarithm": lambda x: torch.log(1 + x * x),
    "quotient": lambda x: x / (1 + x.abs()),
    "reciprocal": lambda x: (1.5 + x.sigmoid()).reciprocal(),
    "larger of two": lambda x: torch.maximum(x, 0.5 * x.flip(1)),
    "smaller of two": lambda x: torch.minimum(x, x.tanh()),
    "fused product": lambda x: torch.addcmul(x, x.sigmoid(), x.flip(-1), value=0.5),
    "interpolated": lambda x: torch.lerp(x, x.roll(1, 1), 0.3),
    # Reductions
    "less its mean": lambda x: x - x.mean(1, keepdim=True),
    "less its largest": lambda x: x - x.amax(-1, keepdim=True),
    "less its second": lambda x: x - x.topk(2, -1).values[..., 1:],
    "less its smallest": lambda x: x - x.amin(1, keepdim=True),
    "sum": lambda x: x + x.sum(1, keepdim=True) / 3,
    "variance": lambda x: x + x.var(-1, keepdim=True),
    "deviation": lambda x: x - x.std(1, keepdim=True),
    "unit length": lambda x: F.normalize(x, dim=-1),
    "length": lambda x: x + torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "cosine": lambda x: x * F.cosine_similarity(x, x.roll(1, 1), dim=-1)[..., None],
    "local response": lambda x: F.local_response_norm(x, 3),
    # Pools and resizing
    "average pool": lambda x: F.avg_pool1d(x, 3, 1, 1),
    "average pool of two axes": lambda x: F.avg_pool2d(x[:, None], 3, 1, 1)[:, 0],
    "max pool": lambda x: F.max_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "max pool of two axes": lambda x: F.max_pool2d(x[:, None], (3, 1), 1, (1, 0))[:, 0],
    "global pools": lambda x: x * F.adaptive_avg_pool1d(x, 1) + F.adaptive_max_pool1d(x, 1),
    "power pool": lambda x: F.lp_pool1d(F.pad(x, (1, 1)), 2, 3, 1) - x,
    "patches": lambda x: F.fold(F.unfold(x[:, None], (2, 1)), x.shape[1:], (2, 1))[:, 0],
    "nearest": lambda x: F.interpolate(x, scale_factor=2)[..., ::2] + x,
    "bilinear": lambda x: F.interpolate(x[:, None], None, 2, "bilinear")[:, 0, ::2, ::2],
    # Conditions and positions
    # A condition on a float argument itself is decided in float, and is no part of a program.
    "where": lambda x: torch.where(0.5 * x > 0.1, x, 0.3 * x),
    "masked": lambda x: x.masked_fill(x.abs() < 0.2, 0.0),
    "between": lambda x: torch.where((x.tanh() > -0.3) & (0.7 * x <= x.tanh()), x, 0.5 * x),
    "chosen": lambda x: x - torch.gather(x, -1, (x.topk(1).indices + 1) % x.shape[-1]),
    "marked": lambda x: x * F.one_hot((0.5 * x).argmax(-1), x.shape[-1]).float() + x,
    "assigned": _assigned,
    "added where indices say": lambda x: x.index_add(1, torch.arange(x.shape[1]) // 2, 0.5 * x),
    "pad and slice": lambda x: F.pad(x, (0, 0, 1, 1))[:, 2:] + x,
    "reflected": lambda x: F.pad(x, (1, 1), mode="reflect")[..., 2:] - x,
    "filled": lambda x: F.pad(x, (1, 1), value=0.4)[..., 2:] * x,
    "rolled": lambda x: x + x.roll(1, 1),
    "triangle": lambda x: x + x.tril(),
    "cumulative": lambda x: x.cumsum(1) / 3,
    "transposed": lambda x: (
        torch.tanh(x.transpose(1, 2).reshape(x.shape[0], -1))
        .view(x.shape[0], x.shape[2], x.shape[1])
        .transpose(1, 2)
    ),
    # Products
    "scores": lambda x: torch.softmax(x @ x.transpose(1, 2) / 4, -1) @ x,
    "einsum": lambda x: torch.einsum("btw,bsw->bts", x, x).softmax(-1) @ x,
    # Tables, and what is one in 8 bits
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.6),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "softplus": F.softplus,
    "log sigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "error function": torch.erf,
    "rest of the error function": torch.erfc,
    "hard shrink": F.hardshrink,
    "soft shrink": F.softshrink,
    "tanh shrink": F.tanhshrink,
    "truncated": lambda x: x - x.trunc(),
    "hard swish": F.hardswish,
    "log softmax": lambda x: F.log_softmax(x, dim=-1),
    "sine": lambda x: torch.sin(x) + torch.cos(x),
    "rounded": lambda x: x.floor() + x.ceil() - x.round() + x.sign(),
}
LAYERS = (
    "linear", "conv", "conv norm", "depthwise norm", "transposed conv", "grouped transposed conv",
    "lstm", "bidirectional lstm", "projected lstm", "gru", "bidirectional gru", "lstm cell",
    "gru cell", "rnn", "rnn cell", "attention", "causal attention", "layer norm", "rms norm",
    "group norm", "instance norm", "prelu", "glu", "split", "dropout", "bilinear", "addmm",
)  # fmt: skip
Plan = tuple[Any, ...]


def plans(bits: int, without: Collection[str] = ()) -> st.SearchStrategy[list[Plan]]:
    """Sequences of blocks, without some functions."""
    names = list(FUNCTIONS)
    names = [name for name in names if name not in without]
    function = st.tuples(st.just("function"), st.sampled_from(names))
    layer = st.tuples(st.just("layer"), st.sampled_from(LAYERS), st.sampled_from([4, 8, 12]))

    def nested(inner: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
        few = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(
            st.tuples(st.just("residual"), few),
            st.tuples(st.just("gated"), few),
            st.tuples(st.just("concatenated"), few, few),
        )

    blocks = st.recursive(layer | function, nested, max_leaves=6)
    return st.lists(blocks, min_size=4, max_size=7)


def deep_plan(draw: random.Random, deepest: int = 30, without: Collection[str] = ()) -> list[Plan]:
    """Draw up to ``deepest`` blocks; a layer norm after each four keeps values finite."""
    plan: list[Plan] = []
    for index in range(draw.randint(1, deepest)):
        plan.append(("layer", "layer norm", 0) if index % 5 == 4 else _drawn(draw, without))
    return plan


@cache
def not_covered(spec: str) -> frozenset[str]:
    """Functions and layers of which a preset emulates less than that of LiteRT's does."""
    blocks: list[Plan] = [("function", name) for name in FUNCTIONS]
    blocks += [("layer", name, 4) for name in LAYERS]
    complete = f"litert-{spec.split('-')[1]}"
    return frozenset(
        each[1] for each in blocks if _emulated(each, spec) != _emulated(each, complete)
    )


def _emulated(block: Plan, spec: str) -> set[str]:
    """Sites of a block that are emulated."""
    table = coverage(Network([block], embedded=False), torch.randn(BATCH, TIME, INPUTS), spec=spec)
    return {row.site for row in table.rows if row.where == "emulated"}


def _drawn(draw: random.Random, without: Collection[str], *, nested: bool = True) -> Plan:
    """Draw one block."""
    names = [name for name in FUNCTIONS if name not in without]
    layers = [name for name in LAYERS if name not in without]
    kind = draw.choices(("function", "layer", "joined"), (6, 3, 1 if nested else 0))[0]
    if kind == "function":
        return kind, draw.choice(names)
    if kind == "layer":
        return kind, draw.choice(layers), draw.choice([4, 8, 12])
    parts = [[_drawn(draw, without, nested=False) for _ in range(draw.randint(1, 2))] for _ in "ab"]
    return draw.choice([("residual", parts[0]), ("gated", parts[0]), ("concatenated", *parts)])


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = FUNCTIONS[name]

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


class Bilinear(nn.Module):
    """A bilinear layer of the features and their sigmoid."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.layer = nn.Bilinear(width, width, units)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.sigmoid())


class Added(nn.Module):
    """A matrix product with a weight (inputs, outputs), as some transformers write it."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(width, units))
        self.bias = nn.Parameter(torch.randn(units))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


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
    return layer(details[0], width, details[1])


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
        "transposed conv": lambda: (
            Transposed(nn.ConvTranspose1d(width, units, 3, padding=1)), units
        ),
        "grouped transposed conv": lambda: (
            Transposed(nn.ConvTranspose1d(4, 8, 3, padding=1, groups=2)) if width == 4 else
            Transposed(nn.ConvTranspose1d(width, width, 5, padding=2, groups=width)),
            8 if width == 4 else width,
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
        "rnn": lambda: (Recurrent(nn.RNN(width, units, 2, **first)), units),
        "rnn cell": lambda: (Loop(nn.RNNCell(width, units, nonlinearity="relu")), units),
        "attention": lambda: (
            nn.Sequential(nn.Linear(width, units), Attention(units, causal=False)), units
        ),
        "causal attention": lambda: (
            nn.Sequential(nn.Linear(width, units), Attention(units, causal=True)), units
        ),
        "layer norm": lambda: (nn.LayerNorm(width), width),
        "rms norm": lambda: (nn.RMSNorm(width), width),
        "group norm": lambda: (
            nn.Sequential(nn.Linear(width, units), Transposed(nn.GroupNorm(2, units))), units
        ),
        "instance norm": lambda: (
            Transposed(nn.InstanceNorm1d(width, affine=True, track_running_stats=True)), width
        ),
        "bilinear": lambda: (Bilinear(width, units), units),
        "addmm": lambda: (Added(width, units), units),
        "prelu": lambda: (Transposed(nn.PReLU(width)), width),
        "dropout": lambda: (nn.Dropout(0.2), width),
        "glu": lambda: (nn.Sequential(nn.Linear(width, 2 * units), nn.GLU()), units),
        "split": lambda: (nn.Sequential(nn.Linear(width, units), Split()), units),
    }  # fmt: skip
    return made[kind]()


def train(net: nn.Module, chip: Emulator, x: Tensor, steps: int = 3) -> None:
    """A few steps toward random classes, with the faster rounding."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    classes = torch.randint(0, CLASSES, (BATCH, TIME))
    with chip.running(fidelity="fast"):
        for _ in range(steps):
            logits = net(x)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten()).backward()
            optimizer.step()
