"""Hash the computations of small networks: a record to compare with after code has moved.

``python -m tests.manifest record FILE`` writes the record, and
``python -m tests.manifest compare FILE`` makes it again and lists what differs. Names do not count:
neither those of tensors in programs, nor those of call sites, arguments or logged numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from ai_edge_litert import schema_py_generated as schema
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.data import DataLoader

from lightning_nna import NNASpec, bake, calibrate, coverage, emulate, strip
from lightning_nna.callbacks import (
    CompressedSensingPruning,
    DriftMonitor,
    GeneralQuantizer,
    HardCompression,
    L1Pruning,
    LotteryTicketPruning,
    MagnitudePruning,
    MRACosRegularization,
    NNAEmulation,
    RandomPruning,
)
from lightning_nna.deploy import CaptureError, export_tflite, run_tflite
from lightning_nna.testing import SmallNet
from recipes.asr.conformer import conformer_transducer
from recipes.asr.rnnt import transducer

Parts = dict[str, str]
Draw = Callable[[torch.Generator], list[Any]]
Forward = Callable[..., Any]

#: Chips by a name of our own.
SPECS: dict[str, Any] = {
    "int8": "litert-int8",
    "int16": "litert-int16x8",
    "ethos-u": "ethos-u",
    "shift": "shift",
    "narrow": {
        "weight_bits": 4,
        "bias_bits": 16,
        "accumulator_bits": 20,
        "accumulator_overflow": "saturate",
        "weight_granularity": "per_tensor",
        "rounding": "single",
    },
    "4 bits": {"weight_bits": 4, "weight_granularity": "per_tensor"},
    "tables": {"preset": "litert-int16x8", "table_entries": 64, "rounding": "double"},
}
BOTH, ALL = ("int8", "int16"), tuple(SPECS)
ONLY_8 = ("int8", "ethos-u", "shift", "narrow")
STEPS = 14


# --- hashes ---------------------------------------------------------------------------------------


def digest(*values: Any) -> str:
    """Hash nested values, tensors and numbers by their bytes."""
    hashed = hashlib.sha256()
    for value in values:
        _feed(hashed, value)
    return hashed.hexdigest()


def _feed(hashed: Any, value: Any) -> None:
    """Add a value to a hash, with its kind and its length."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.generic | float):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        hashed.update(f"array {value.dtype} {value.shape};".encode())
        hashed.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        _feed(hashed, sorted(value.items()))
    elif isinstance(value, list | tuple):
        hashed.update(f"list {len(value)};".encode())
        for each in value:
            _feed(hashed, each)
    else:
        text = value if isinstance(value, bytes) else repr(value).encode()
        hashed.update(f"{type(value).__name__} {len(text)};".encode() + text)


def plain(value: Any) -> Any:
    """Turn a table of a program into plain values."""
    if hasattr(value, "__dict__"):
        return [type(value).__name__, {k: plain(v) for k, v in vars(value).items()}]
    return None if value is None else np.asarray(value).tolist()


def program_parts(path: Path) -> Parts:
    """Hash the operators, integers and scales of a program, in the order in which they are used."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    operators: list[Any] = []
    integers: list[Any] = []
    scales: list[Any] = []
    for graph in model.subgraphs:
        numbers: dict[int, int] = {-1: -1}

        def use(indices: Any, graph: Any = graph, numbers: dict[int, int] = numbers) -> list[int]:
            """Number tensors by their first use."""
            indices = [] if indices is None else [int(index) for index in indices]
            for index in indices:
                if index not in numbers:
                    numbers[index] = len(numbers) - 1
                    note(graph.tensors[index])
            return [numbers[index] for index in indices]

        def note(tensor: Any) -> None:
            """Take down what a tensor holds."""
            data = model.buffers[tensor.buffer].data
            shape, signature = plain(tensor.shape), plain(tensor.shapeSignature)
            content = None if data is None else bytes(np.asarray(data, np.uint8))
            integers.append([shape, signature, tensor.type, bool(tensor.isVariable), content])
            grid = tensor.quantization
            if grid is not None:
                values = np.asarray(grid.scale if grid.scale is not None else [], np.float32)
                scales.append([values, plain(grid.zeroPoint), grid.quantizedDimension])

        operators.append(["inputs", use(graph.inputs)])
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            kind = max(code.builtinCode, code.deprecatedBuiltinCode)
            custom = None if code.customCode is None else bytes(code.customCode)
            options = [plain(operator.builtinOptions), plain(operator.builtinOptions2)]
            options.append(plain(operator.customOptions))
            ends = use(operator.inputs), use(operator.outputs), use(operator.intermediates)
            operators.append([kind, custom, code.version, options, ends])
        operators.append(["outputs", use(graph.outputs)])
    return {"operators": digest(operators), "integers": digest(integers), "scales": digest(scales)}


def activations(results: Any) -> list[Tensor]:
    """Float results, one after the other."""
    leaves = (x for x in tree_leaves(results) if isinstance(x, Tensor))
    return [x for x in leaves if x.is_floating_point()]


def seed(number: int) -> None:
    """Seed every generator."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


# --- networks -------------------------------------------------------------------------------------


class Calling(nn.Module):
    """A function, and the layers that it calls."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*self.layers, *inputs)


@dataclass(frozen=True)
class Network:
    """A network, what it is called with, and the chips that it is put on."""

    make: Callable[[], nn.Module]
    draw: Draw
    specs: Sequence[str] = ("int8", "int16", "ethos-u", "shift")
    forward: Forward | None = None
    observe: Forward | None = None
    observer: str = "min_max"


def floats(*shapes: tuple[int, ...]) -> Draw:
    """Draw activations of some shapes."""
    return lambda generator: [torch.randn(shape, generator=generator) + 0.2 for shape in shapes]


def first(layer: nn.Module, *inputs: Any) -> Tensor:
    """Run a layer for its output alone."""
    return layer(*inputs)[0]


def functions(x: Tensor) -> Any:
    return (
        F.relu(x), F.relu6(3 * x), F.leaky_relu(x, 0.2), torch.sigmoid(x), torch.tanh(x),
        F.silu(x), F.hardsigmoid(x), F.softmax(x, -1), torch.softmax(x, 1),
    )  # fmt: skip


def functions_of_8_bits(x: Tensor) -> Any:
    tanh = F.gelu(x, approximate="tanh")
    return F.gelu(x), tanh, F.hardswish(x), F.log_softmax(x, -1)


def arithmetic(x: Tensor, y: Tensor) -> Any:
    wide = x[:, :1] * y[:1] - 0.3
    return x + y, x - y, x * y / 3, 1.5 - 0.3 * x, wide, x + (-y), x * x - x


def in_place(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.relu(layer((x * 0.7).add_(y).sub_(0.3).mul_(y).sigmoid_()), inplace=True)


def reductions(x: Tensor) -> Any:
    top, low = x.amax(-1, keepdim=True), x.amin(1)
    return x.mean(1), x.sum(1, keepdim=True) / 3 + x, top - x, low, x.mean((0, 1))


def selections(layer: nn.Module, x: Tensor) -> Any:
    left, right = layer(x).split([3, 9], -1)
    joined = torch.cat([torch.tanh(right), left], -1)
    scores = (2 * joined).masked_fill(torch.eye(6, 12, dtype=torch.bool), -1e9)
    return (
        F.softmax(scores, -1),
        F.glu(joined, -1),
        F.pad(x, (0, 0, 1, 1))[:, 2:] + x,
        x.transpose(1, 2).reshape(3, -1),
    )


def masked(x: Tensor) -> Tensor:
    """Put in a number that is none of a mask, which runs on the CPU."""
    return torch.tanh((2 * x).masked_fill(x.detach() > 0.5, -9.0))


def attention(query: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """Attend to what came before."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    x = query(x)
    return x + layer(x, x, x, attn_mask=mask, need_weights=False)[0]


def scaled_dot_products(q: Tensor, k: Tensor, v: Tensor) -> Any:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    plain_one = F.scaled_dot_product_attention(q, k, v)
    return plain_one, F.scaled_dot_product_attention(q, k, v, mask)


def scores(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(1, 2) / 4, -1) @ x


def loop(cell: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    """Run a recurrent cell step by step."""
    state, outputs = None, []
    for step in x.unbind(1):
        state = cell(step, state)
        outputs.append(head(state[0] if isinstance(state, tuple) else state))
    return torch.stack(outputs, 1)


def streaming(layer: nn.Module, head: nn.Module, x: Tensor, states: Any) -> Any:
    """Take states and give them back."""
    x, states = layer(x, states)
    return head(x), states


def stateful(count: int) -> Draw:
    """Draw sounds and states, a pair of them for an LSTM."""

    def draw(generator: torch.Generator) -> list[Any]:
        states = [0.3 * torch.randn(2, 2, 8, generator=generator) for _ in range(count)]
        x = torch.randn(2, 5, 4, generator=generator)
        return [x, tuple(states) if count > 1 else states[0]]

    return draw


def over_time(*layers: nn.Module) -> nn.Module:
    """Run layers over (batch, width, time)."""
    inner = nn.Sequential(*layers)
    return Calling(lambda layer, x: layer(x.transpose(1, 2)).transpose(1, 2), inner)


def residual(width: int, *layers: nn.Module) -> nn.Module:
    """Add to the input what layers give."""
    return Calling(lambda inner, x: x + inner(x), nn.Sequential(*layers))


def folded() -> nn.Module:
    return nn.Sequential(
        over_time(
            nn.Conv1d(5, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Conv1d(8, 8, 5, padding="same", groups=8), nn.BatchNorm1d(8), nn.ReLU6(),
        ),
        nn.Dropout(0.2),
        nn.Linear(8, 4),
    )  # fmt: skip


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(True),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Flatten(), nn.Linear(96, 5), nn.BatchNorm1d(5),
    )  # fmt: skip


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 16), nn.ReLU6(),
        nn.Linear(16, 16), nn.LeakyReLU(0.1), nn.Dropout(0.1), nn.Linear(16, 4),
    )  # fmt: skip


def recurrent() -> nn.Module:
    """Build the network that most runs train: convolution, LSTM, linear layers and a residual."""
    return nn.Sequential(
        over_time(nn.Conv1d(5, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU()),
        Calling(first, nn.LSTM(8, 8, batch_first=True)),
        residual(8, nn.Linear(8, 16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, 8)),
        nn.LayerNorm(8),
        nn.Linear(8, 4),
    )


def embedded(layer: nn.Module, head: nn.Module, labels: Tensor) -> Tensor:
    return torch.tanh(head(layer(labels)))


def labels(*shape: int) -> Draw:
    """Draw labels below 6."""
    return lambda generator: [torch.randint(0, 6, shape, generator=generator)]


def drawn_network(number: int) -> nn.Module:
    """Build a network at random, always the same for a number."""
    choose, width, blocks = random.Random(number), 5, list[nn.Module]()
    for _ in range(6):
        units, kind = choose.choice([4, 8, 12]), choose.randrange(14)
        if kind == 0:
            blocks.append(over_time(nn.Conv1d(width, units, 3, padding=1), nn.BatchNorm1d(units)))
        elif kind == 1:
            blocks.append(Calling(first, nn.LSTM(width, units, 2, batch_first=True)))
        elif kind == 2:
            blocks.append(Calling(first, nn.GRU(width, units, batch_first=True)))
        elif kind == 3:
            blocks += [nn.Linear(width, 2 * units), nn.GLU()]
        elif kind == 4:
            heads = nn.MultiheadAttention(units, 2, batch_first=True)
            blocks.append(Calling(attention, nn.Linear(width, units), heads))
        elif kind == 5:
            both = nn.LSTM(width, units // 2, bidirectional=True, batch_first=True)
            blocks.append(Calling(first, both))
        elif kind == 6:
            blocks.append(Calling(loop, nn.GRUCell(width, units), nn.Linear(units, units)))
        elif kind == 7:
            blocks += [nn.Linear(width, units), choose.choice([nn.LayerNorm, nn.RMSNorm])(units)]
        else:
            function: Callable[..., Any] = choose.choice(
                [
                    scores, torch.tanh, F.silu, F.relu, lambda x: x - x.mean(1, keepdim=True),
                    lambda x: (x * 0.7).add_(0.2).sigmoid_(),
                    lambda x: x - x.amax(-1, keepdim=True),
                    lambda x: torch.cat([torch.tanh(x[..., 1:]), x[..., :1]], -1),
                ]
            )  # fmt: skip
            inner = Calling(function)
            units = width
            blocks.append(inner if kind % 2 else residual(width, inner, nn.Linear(width, width)))
        width = units
    return nn.Sequential(*blocks, nn.Linear(width, 3))


SIZES: dict[str, Any] = {
    "num_mels": 4, "num_labels": 6, "encoder_size": 8, "embedding_size": 8, "predictor_size": 8,
    "joint_size": 8, "encoder_dropout": 0.1, "predictor_dropout": 0.1,
}  # fmt: skip


def rnnt() -> nn.Module:
    return transducer(time_reduction=2, **SIZES)


def conformer(chunk_size: int) -> nn.Module:
    return conformer_transducer(
        feed_forward_size=16,
        encoder_layers=2,
        num_heads=2,
        kernel_size=3,
        left_context=3,
        chunk_size=chunk_size,
        **SIZES,
    )


def utterances(generator: torch.Generator) -> list[Any]:
    """Draw padded features and labels, of the same lengths always."""
    features = torch.randn(3, 32, 4, generator=generator)
    said = torch.randint(0, 6, (3, 4), generator=generator)
    return [features, torch.tensor([32, 24, 9]), said, torch.tensor([4, 2, 3])]


def every_way(model: nn.Module, *arguments: Any) -> Any:
    """Run a transducer as training does, and as decoders do, whatever it is called with."""
    generator = torch.Generator().manual_seed(len(arguments))
    features, lengths, said, counts = utterances(generator)
    model(features, lengths, said, counts)
    state = None
    for chunk in features.split(16, 1):
        _, _, state = model.transcribe_streaming(chunk, torch.full((3,), 16), state)
    ones = torch.ones(3, dtype=torch.long)
    _, _, state = model.predict(said[:, :1], ones, None)
    model.predict(said[:, 1:2], ones, state)


def logits(model: nn.Module, *arguments: Any) -> Any:
    return model(*arguments)[0]


def one_chunk(model: nn.Module, chunk: Tensor, state: Any) -> Any:
    count = torch.full((len(chunk),), chunk.shape[1])
    return model.transcribe_streaming(chunk, count, state)[::2]


def one_label(model: nn.Module, label: Tensor, state: Any) -> Any:
    return model.predict(label, torch.ones(len(label), dtype=torch.long), state)[::2]


def chunk_and_state(generator: torch.Generator) -> list[Any]:
    """Draw a chunk and the state before it, as the encoder itself gives it in float."""
    seed(5)
    chunk = torch.randn(1, 8, 4, generator=generator)
    with torch.no_grad():
        return [chunk, one_chunk(rnnt().eval(), torch.randn(1, 8, 4, generator=generator), None)[1]]


def label_and_state(generator: torch.Generator) -> list[Any]:
    """Draw a label and the state before it."""
    seed(5)
    label = torch.randint(0, 6, (1, 1), generator=generator)
    with torch.no_grad():
        return [label, one_label(rnnt().eval(), label, None)[1]]


SEQUENCES = floats((3, 6, 5))
NETWORKS: dict[str, Network] = {
    "functions": Network(lambda: Calling(functions), floats((3, 6, 10)), ALL),
    "slopes": Network(lambda: nn.Sequential(nn.Linear(10, 6), nn.PReLU(6)), floats((7, 10)), BOTH),
    "functions of 8 bits": Network(
        lambda: Calling(functions_of_8_bits), floats((3, 6, 10)), ONLY_8
    ),
    "elu": Network(lambda: Calling(F.elu), floats((3, 60)), ONLY_8),
    "arithmetic": Network(lambda: Calling(arithmetic), floats((12, 10), (12, 10)), ALL),
    "in place": Network(lambda: Calling(in_place, nn.Linear(10, 6)), floats((12, 10), (12, 10))),
    "reductions": Network(lambda: Calling(reductions), floats((4, 9, 10)), ALL),
    "selections": Network(lambda: Calling(selections, nn.Linear(8, 12)), floats((3, 6, 8))),
    "masked": Network(lambda: Calling(masked), SEQUENCES),
    "layer norm": Network(lambda: nn.LayerNorm(20), floats((12, 20)), ALL),
    "rms norm": Network(lambda: nn.Sequential(nn.RMSNorm(20), nn.Linear(20, 4)), floats((12, 20))),
    "dense": Network(dense, floats((20, 12)), ALL),
    "small net": Network(SmallNet, floats((8, 4)), ALL),
    "folded": Network(folded, SEQUENCES, ALL),
    "images": Network(images, floats((2, 3, 8, 8)), ALL, observer="moving_average"),
    "matmul": Network(lambda: Calling(torch.matmul), floats((2, 6, 30), (2, 30, 5)), ALL),
    "attention": Network(
        lambda: Calling(attention, nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)),
        SEQUENCES,
        ALL,
    ),
    "scaled dot products": Network(
        lambda: Calling(scaled_dot_products), floats(*((2, 3, 6, 8),) * 3)
    ),
    "lstm": Network(
        lambda: Calling(first, nn.LSTM(5, 8, 2, bidirectional=True, batch_first=True)),
        SEQUENCES,
        ALL,
    ),
    "projected lstm": Network(
        lambda: Calling(first, nn.LSTM(5, 8, proj_size=3, batch_first=True)), SEQUENCES
    ),
    "lstm in steps": Network(
        lambda: Calling(loop, nn.LSTMCell(5, 8), nn.Linear(8, 3)), SEQUENCES
    ),
    "lstm with states": Network(
        lambda: Calling(streaming, nn.LSTM(4, 8, 2, batch_first=True), nn.Linear(8, 3)),
        stateful(2),
    ),
    "gru": Network(
        lambda: Calling(first, nn.GRU(5, 8, 2, bidirectional=True, batch_first=True)),
        SEQUENCES,
        ALL,
    ),
    "gru in steps": Network(
        lambda: Calling(loop, nn.GRUCell(5, 8), nn.Linear(8, 3)), SEQUENCES
    ),
    "gru with states": Network(
        lambda: Calling(streaming, nn.GRU(4, 8, 2, batch_first=True), nn.Linear(8, 3)), stateful(1)
    ),
    "embedding": Network(
        lambda: Calling(embedded, nn.Embedding(6, 8), nn.Linear(8, 3)), labels(3, 7)
    ),
    "recurrent": Network(recurrent, SEQUENCES, ALL, observer="percentile"),
    **{
        f"drawn {number}": Network(
            lambda number=number: drawn_network(number),
            SEQUENCES,
            BOTH,
            observer=("min_max", "mse")[number % 2],
        )
        for number in range(8)
    },
    "rnnt": Network(rnnt, utterances, forward=logits, observe=every_way),
    "rnnt encoder": Network(rnnt, chunk_and_state, BOTH, forward=one_chunk, observe=every_way),
    "rnnt predictor": Network(rnnt, label_and_state, BOTH, forward=one_label, observe=every_way),
    "conformer": Network(lambda: conformer(1), utterances, forward=logits),
    "conformer in chunks": Network(lambda: conformer(2), utterances, BOTH, forward=logits),
}  # fmt: skip


def batches(draw: Draw, count: int, start: int = 0) -> list[list[Any]]:
    """Draw some sets of arguments."""
    return [draw(torch.Generator().manual_seed(start + number)) for number in range(count)]


def exported(
    module: nn.Module, inputs: Sequence[Any], forward: Forward | None, where: str
) -> Parts:
    """Hash the program of a module on the chip, and what it gives on LiteRT."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.tflite"
        try:
            export_tflite(module, inputs, path, forward=forward)
        except CaptureError:
            return {f"{where}: {part}": "is not exported" for part in ("operators", "outputs")}
        parts = program_parts(path)
        try:
            results = run_tflite(path, inputs)
        except ValueError as error:
            if "ELU" not in str(error):
                raise
            results = run_tflite(path, inputs, runtime="litert-optimized")
        parts["outputs"] = digest([np.asarray(x) for x in results])
    return {f"{where}: {part}": value for part, value in parts.items()}


def gradients(module: nn.Module, call: Forward, inputs: Sequence[Any]) -> str:
    """Hash the gradients of the sum of squares of the outputs."""
    leaves, form = tree_flatten(list(inputs))
    leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
    sources = [
        x.requires_grad_() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()
    ]
    module.zero_grad(set_to_none=True)
    results = call(module, *tree_unflatten(leaves, form))
    total = sum((x.square().sum() for x in activations(results)), torch.zeros(()))
    total.backward()
    named = sorted(module.named_parameters())
    return digest(total, [p.grad for _, p in named], [x.grad for x in sources])


def network_parts(network: Network, spec: str, operators: set[str]) -> Parts:
    """Hash what a network computes on a chip: in float, emulated, backwards, and on LiteRT."""
    seed(5)
    module = network.make().eval()
    call: Forward = network.forward or (lambda module, *inputs: module(*inputs))
    observed, inputs = batches(network.draw, 2), batches(network.draw, 1, start=9)[0]
    inputs = [1.3 * x if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    chip = SPECS[spec]
    table = coverage(module, *inputs, spec=chip, forward=call)
    operators.update(row.operator for row in table.rows if row.on_chip)
    sites = [(row.operator, row.where, row.calls, row.crossing_bytes) for row in table.rows]

    def forward(module: nn.Module, batch: Any) -> None:
        call(module, *batch)
        if network.observe is not None:
            network.observe(module, *batch)

    calibrate(module, observed, forward, spec=chip, observer=network.observer)
    parts = {"sites": digest(sites)}
    for fidelity in ("exact", "fast"):
        with emulate(module, fidelity=fidelity):
            with torch.no_grad():
                results = call(module, *inputs)
            parts[f"emulated, {fidelity}: outputs"] = digest(activations(results))
            parts[f"emulated, {fidelity}: gradients"] = gradients(module, call, inputs)
    parts |= exported(module, inputs, network.forward, "program")
    try:
        parts["baked: weights"] = digest(bake(module).state_dict())
    except RuntimeError:  # No operator has used a weight.
        strip(module)
    return parts


# --- runs -----------------------------------------------------------------------------------------


class Trained(pl.LightningModule):
    """A network that is to give 0.3 everywhere."""

    def __init__(self, network: nn.Module, call: Forward | None) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs) if self.call is None else self.call(self.network, *inputs)

    def loss(self, batch: Any) -> Tensor:
        """Mean of squared errors."""
        results = activations(self(*batch))
        return sum(((x - 0.3).square().mean() for x in results), torch.zeros(()))

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Numbers(Logger):
    """Keeps the numbers that are logged, without their names."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    @property
    def name(self) -> str:
        return "numbers"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append([step, sorted(np.float64(value).tobytes() for value in metrics.values())])


@dataclass(frozen=True)
class Run:
    """A network that is trained with callbacks."""

    network: str
    callbacks: Callable[[], list[pl.Callback]]
    spec: str = "int8"
    settings: Mapping[str, Any] = field(default_factory=dict)


def emulation(spec: str = "int8", learned: str = "none", **settings: Any) -> NNAEmulation:
    """Emulate after three steps, with telemetry of every fourth."""
    common = {"calibration_steps": 3, "telemetry_every_n_steps": 4, "scale_lr": 0.02}
    return NNAEmulation(SPECS[spec], **(common | {"learned_scales": learned} | settings))


def quantizer(bits: int = 3, **settings: Any) -> GeneralQuantizer:
    return GeneralQuantizer(bits, **settings)


def s8bqat(bits: int = 4, **settings: Any) -> list[pl.Callback]:
    """Pull weights to centroids, and put them there now and then."""
    return [
        MRACosRegularization(bits, strength=0.05, refresh_every_n_steps=5, **settings),
        HardCompression(bits, every_n_steps=4, refresh_every_n_steps=5, **settings),
    ]


PRUNED: dict[str, Any] = {"every_n_steps": 2}
LEARNED = [("weights", "int8"), ("all", "int8"), ("all", "int16"), ("all", "shift")]
RUNS: dict[str, Run] = {
    "in float": Run("recurrent", lambda: []),
    "drift": Run(
        "recurrent", lambda: [DriftMonitor("val/loss", figures=False, warmup=2)],
        settings={"limit_train_batches": 1},
    ),
    **{
        f"emulated on {spec}, {fidelity}": Run(
            "recurrent", lambda s=spec, f=fidelity: [emulation(s, fidelity=f)], spec
        )
        for spec in SPECS for fidelity in ("exact", "fast")
        if fidelity == "exact" or spec in BOTH
    },
    **{
        f"learned scales of {what} on {spec}": Run(
            "recurrent", lambda w=what, s=spec: [emulation(s, w)], spec
        )
        for what, spec in LEARNED
    },
    "learned scales, fast": Run("folded", lambda: [emulation("int8", "all", fidelity="fast")]),
    "learned scales, quantized": Run("recurrent", lambda: [quantizer(), emulation("int8", "all")]),
    "observer": Run("dense", lambda: [emulation(observer="mse")]),
    "moving average": Run("dense", lambda: [emulation(observer="moving_average")]),
    "quantizer": Run("recurrent", lambda: [quantizer()]),
    "quantizer, emulated": Run("recurrent", lambda: [quantizer(), emulation()]),
    "quantizer in 16 bits, fast": Run(
        "recurrent", lambda: [quantizer(4, mu=7.0), emulation("int16", fidelity="fast")], "int16"
    ),
    "quantizer of channels": Run(
        "recurrent",
        lambda: [
            quantizer(2, granularity="per_channel", learn_scale=True, pin_zero=True),
            emulation(),
        ],
    ),
    "quantizer, powers of two": Run(
        "dense",
        lambda: [quantizer(power_of_two_scales=True, scale="centroids"), emulation()],
    ),
    "quantizer, entropy": Run(
        "recurrent", lambda: [quantizer(4, max_entropy_bits=2.0), emulation()]
    ),
    "s8bqat": Run("recurrent", s8bqat),
    "s8bqat, emulated": Run("recurrent", lambda: [*s8bqat(), emulation()]),
    "s8bqat, entropy": Run(
        "recurrent",
        lambda: [
            MRACosRegularization(4, strength=0.05, max_entropy_bits=2.0),
            HardCompression(4, every_n_steps=4, max_entropy_bits=2.0),
            emulation(),
        ],
    ),
    "s8bqat on shift": Run(
        "recurrent",
        lambda: [*s8bqat(power_of_two_scales=True), emulation("shift")],
        "shift",
    ),
    "s8bqat of channels": Run(
        "dense", lambda: s8bqat(2, granularity="per_channel", pin_zero=True, grid_bits=6)
    ),
    "s8bqat, powers of two": Run(
        "dense", lambda: [HardCompression(3, every_n_steps=3, momentum="reset",
                                          power_of_two_scales=True)],
    ),
    "csp": Run("recurrent", lambda: [CompressedSensingPruning(0.6, **PRUNED)]),
    "csp, quantized": Run(
        "recurrent", lambda: [CompressedSensingPruning(0.6, **PRUNED), quantizer()]
    ),
    "csp, quantized, emulated": Run(
        "recurrent", lambda: [CompressedSensingPruning(0.6, **PRUNED), quantizer(), emulation()]
    ),
    **{
        f"csp, {measurement}, {pattern}": Run(
            "dense",
            lambda m=measurement, p=pattern: [
                CompressedSensingPruning(0.5, measurement=m, pattern=p, weighting="equal", **PRUNED)
            ],
        )
        for measurement, pattern in [("identity", "2:4"), ("random", "1x4"), ("activations", "row")]
    },
    "csp with a limit": Run(
        "dense", lambda: [CompressedSensingPruning(0.8, most_nmse=0.05, refit=False, **PRUNED)]
    ),
    "magnitude": Run("recurrent", lambda: [MagnitudePruning(0.6, scope="global", **PRUNED)]),
    "magnitude, emulated": Run(
        "dense", lambda: [MagnitudePruning(0.5, pattern="2:4", **PRUNED), emulation()]
    ),
    "magnitude, s8bqat": Run(
        "recurrent", lambda: [MagnitudePruning(0.5, **PRUNED), *s8bqat(pin_zero=True), emulation()]
    ),
    "random": Run("dense", lambda: [RandomPruning(0.5, **PRUNED)]),
    "l1": Run("recurrent", lambda: [L1Pruning(0.5, strength=0.5, **PRUNED)]),
    "lottery": Run("recurrent", lambda: [LotteryTicketPruning(0.5, rewind_step=2, **PRUNED)]),
    "folded on int8": Run("folded", lambda: [emulation()]),
    "folded on int16": Run("folded", lambda: [emulation("int16")], "int16"),
    "images": Run("images", lambda: [emulation(fidelity="fast")]),
    "attention": Run("attention", lambda: [emulation()]),
    "embedding": Run("embedding", lambda: [quantizer(), emulation()]),
    "gru": Run("gru", lambda: [emulation()]),
    "states": Run("lstm with states", lambda: [emulation()]),
    "in place": Run("in place", lambda: [emulation()]),
    "drawn": Run("drawn 3", lambda: [emulation()]),
    "accumulated": Run(
        "dense", lambda: [quantizer(), emulation()], settings={"accumulate_grad_batches": 2}
    ),
    "rnnt": Run("rnnt", lambda: [emulation(fidelity="fast")]),
    "rnnt, csp, quantized": Run(
        "rnnt", lambda: [CompressedSensingPruning(0.5, **PRUNED), quantizer(), emulation()]
    ),
    "conformer": Run("conformer", lambda: [emulation()]),
    "conformer, s8bqat, 16 bits": Run(
        "conformer", lambda: [*s8bqat(), emulation("int16", fidelity="fast")], "int16"
    ),
}  # fmt: skip


def tensors_of(state: Any) -> list[str]:
    """Hash the tensors of a state, without their names and order."""
    return sorted(digest(x) for x in tree_leaves(state) if isinstance(x, Tensor))


def run_parts(run: Run) -> Parts:
    """Hash what training ends with: weights, logged numbers, and the program."""
    network = NETWORKS[run.network]
    seed(5)
    module, numbers, callbacks = (
        Trained(network.make(), network.forward),
        Numbers(),
        run.callbacks(),
    )
    data, inputs = batches(network.draw, 4), batches(network.draw, 1, start=9)[0]
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": STEPS, "max_epochs": None,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "logger": numbers, "callbacks": callbacks,
        "log_every_n_steps": 1, "limit_val_batches": 1,
    }  # fmt: skip
    trainer = pl.Trainer(**(settings | dict(run.settings)))
    seed(6)
    trainer.fit(module, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None))
    parts = {
        "weights": digest(module.state_dict()),
        "numbers": digest(numbers.rows),
        "states": digest([tensors_of(callback.state_dict()) for callback in callbacks]),
        "generator": digest(torch.get_rng_state()),
    }
    module.eval()
    if not any(isinstance(callback, NNAEmulation) for callback in callbacks):
        calibrate(module, data, lambda module, batch: module(*batch), spec=SPECS[run.spec])
    with emulate(module), torch.no_grad():
        parts["emulated: outputs"] = digest(activations(module(*inputs)))
    parts |= exported(module, inputs, None, "program")
    strip(module)
    return parts


# --- the record -----------------------------------------------------------------------------------


def everything(only: str = "") -> Iterator[tuple[str, Parts]]:
    """Hash every network and every run whose name contains ``only``."""
    operators: set[str] = set()
    for name, network in NETWORKS.items():
        for spec in network.specs:
            if only in (title := f"network {name!r} on {spec}"):
                yield title, _told(title, lambda n=network, s=spec: network_parts(n, s, operators))
    for name, run in RUNS.items():
        if only in (title := f"run {name!r}"):
            yield title, _told(title, lambda run=run: run_parts(run))
    missing = set(NNASpec().arithmetic["operators"]) - operators
    if missing and not only:
        raise AssertionError(f"no network has the operators {sorted(missing)}")


def _told(title: str, make: Callable[[], Parts]) -> Parts:
    """Name the entry that fails."""
    start = time.monotonic()
    try:
        return make()
    except Exception as error:
        error.add_note(f"in {title}")
        raise
    finally:
        if os.environ.get("MANIFEST_TIMES"):
            print(f"{time.monotonic() - start:6.2f} s  {title}", file=sys.stderr)


def about() -> dict[str, str]:
    """Describe where the record is made."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "processor": named[0] if named else "unknown",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "numpy": np.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def record(only: str = "") -> dict[str, Any]:
    """Make the record."""
    for name in ("lightning.pytorch", "lightning_nna", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return {"about": about(), "networks": dict(everything(only))}


def differences(before: Mapping[str, Parts], after: Mapping[str, Parts]) -> list[str]:
    """List what differs, a line for each network."""
    lines = []
    for name in dict.fromkeys([*before, *after]):
        if name not in after or name not in before:
            lines.append(f"{name}: is only {'before' if name in before else 'after'}")
            continue
        old, new = before[name], after[name]
        parts = [part for part in dict.fromkeys([*old, *new]) if old.get(part) != new.get(part)]
        if parts:
            lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="part of the names of the entries to make")
    arguments = parser.parse_args()
    start = time.monotonic()
    before = json.loads(arguments.file.read_text()) if arguments.action == "compare" else None
    after = record(arguments.only)
    counted = f"{len(after['networks'])} entries in {time.monotonic() - start:.0f} s"
    if before is None:
        arguments.file.write_text(json.dumps(after, indent=1) + "\n")
        print(f"{arguments.file}: {counted}")
        return 0
    for key, value in before["about"].items():
        if value != after["about"].get(key):
            print(f"note: {key} was {value!r} and is {after['about'].get(key)!r}")
    earlier = {name: parts for name, parts in before["networks"].items() if arguments.only in name}
    lines = differences(earlier, after["networks"])
    print("\n".join([*lines, f"{counted}: {len(lines) or 'none'} differ"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
