"""Cost of one emulated call of an operator, on tensors of one element, and of greedy decoding.

What the interception, the look-ups and the bookkeeping of a call take does not depend on the size
of its tensors; small networks and decoders consist of it. It is measured in a forward of a chain of
equal calls, without gradients: the time of a call, and how many functions Python calls for it.
Greedy decoding of an RNN-T, step by step, is made of such calls.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.emulation.modes import Fidelity
from recipes.asr.decoding import greedy_decode
from recipes.benchmark.grid import Run
from recipes.benchmark.report import line, ruled
from recipes.benchmark.rows import Row, has_row, select
from recipes.benchmark.timing import Step, machine, ratio_columns, time_ratios, time_with_range
from recipes.benchmark.workloads import WORKLOADS

#: Functions of one tensor that are called in a chain, by the name that rows use.
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + x,
    "mul": lambda x: x * x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "linear": nn.Linear(1, 1),
    "reshape": lambda x: x.reshape(1, 1),
}
#: Number of calls in a forward.
LENGTH = 20
_REPEATS, _FORWARDS = 15, 20
#: Bias of the blank label by the name of a decoding. Random weights that emit labels emit others
#: where they are emulated, which is other work.
DECODINGS = {"no labels": 30.0}
#: Largest ratio of time of a decoding, emulated over float.
DECODING_TARGET = 2.0
_PAIRS = 9
_FIDELITIES: tuple[Fidelity, ...] = ("exact", "fast")


class _Chain(nn.Module):
    """Call a function again and again; the first tanh gives its results a range of their own."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        for _ in range(LENGTH):
            x = self.call(x)
        return x


@dataclass(frozen=True)
class CallRun(Run):
    """One operator in float, exact and fast.

    Attributes:
        call: A key of :data:`CALLS`.
        device: ``"cpu"`` or ``"cuda"``.
    """

    call: str
    device: str = "cpu"

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one mapping for each variant."""
        device = machine(torch.device(self.device))
        key = {"call": self.call, "device": device, "threads": self.threads}
        return [{**key, "variant": variant} for variant in ("float", *_FIDELITIES)]

    def rows(self) -> Iterator[Row]:
        """Measure the chain in every variant."""
        torch.set_num_threads(self.threads or 1)
        torch.manual_seed(0)
        module = _Chain(CALLS[self.call]).to(self.device)
        x = torch.full((1, 1), 0.5, device=self.device)
        with torch.no_grad():
            with emulate(module, "litert-int8") as emulator, emulator.observing():
                module(x)
            forward = partial(module, x)
            for key in self.keys:
                variant = key["variant"]
                scope = emulate(module, fidelity=variant) if variant in _FIDELITIES else None
                with scope or nullcontext():
                    yield {
                        **key,
                        "microseconds": round(_microseconds(forward) / LENGTH, 2),
                        "python_calls": round(_python_calls(forward) / LENGTH, 1),
                    }


@dataclass(frozen=True)
class DecodingRun(Run):
    """Greedy decoding of eight utterances by the RNN-T of AN4, emulated over float.

    Attributes:
        decoding: A key of :data:`DECODINGS`.
        device: ``"cpu"`` or ``"cuda"``.
    """

    decoding: str
    device: str = "cpu"

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one mapping for each variant."""
        device = machine(torch.device(self.device))
        key = {"decoding": self.decoding, "device": device, "threads": self.threads}
        return [{**key, "variant": variant} for variant in ("float", *_FIDELITIES)]

    def rows(self) -> Iterator[Row]:
        """Time the decoding in every variant, each right after float."""
        torch.set_num_threads(self.threads or 1)
        torch.manual_seed(0)
        model: Any = WORKLOADS["rnnt"].module().eval().model
        with torch.no_grad():
            model.joint.output.weight.mul_(3.0)
            model.predictor.embedding.weight.mul_(3.0)
            model.joint.output.bias[0] = DECODINGS[self.decoding]
        model.to(self.device)
        features = torch.randn(8, 300, 64).to(self.device)
        lengths = torch.full((8,), 300).to(self.device)

        def in_float() -> None:
            greedy_decode(model, features, lengths)

        def emulated(fidelity: Fidelity) -> None:
            with emulate(model, fidelity=fidelity):
                greedy_decode(model, features, lengths)

        with emulate(model, "litert-int8") as emulator, emulator.observing():
            labels = greedy_decode(model, features, lengths)
        steps: dict[str, Step] = {"float": in_float}
        steps |= {fidelity: partial(emulated, fidelity) for fidelity in _FIDELITIES}
        ratios, float_ms = time_ratios(steps, torch.device(self.device), _PAIRS)
        for key in self.keys:
            yield {
                **key,
                **ratio_columns(ratios[key["variant"]]),
                "float_ms": round(float_ms, 2),
                "labels": sum(map(len, labels)),
            }


def _microseconds(forward: Callable[[], Tensor]) -> float:
    """Return the shortest time of a forward: whatever makes one longer is not its own."""
    shortest = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(_FORWARDS):
            forward()
        shortest = min(shortest, (time.perf_counter() - start) / _FORWARDS)
    return 1e6 * shortest


def _python_calls(forward: Callable[[], Tensor]) -> int:
    """Count the functions that a forward calls, built-in ones among them."""
    profile = cProfile.Profile()
    profile.runcall(forward)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def table_of_calls(rows: Sequence[Row]) -> list[str]:
    """Make the table of the report; nothing without rows.

    Args:
        rows: Rows of :class:`CallRun` on one machine.
    """
    if not rows:
        return []
    lines = [
        "### One call of an operator\n",
        "Time of one call on tensors of one element, in microseconds, and in parentheses the "
        "functions that Python calls for it:\n",
        *ruled(["operator", "float", "exact", "fast"]),
    ]
    for call in CALLS:
        if has_row(rows, call=call):
            by_variant = {row["variant"]: row for row in select(rows, call=call)}
            columns = [_column(by_variant.get(each)) for each in ("float", *_FIDELITIES)]
            lines.append(line(call, *columns))
    return [*lines, ""]


def table_of_decodings(rows: Sequence[Row]) -> list[str]:
    """Make the table of the report; nothing without rows.

    Args:
        rows: Rows of :class:`DecodingRun` on one machine.
    """
    if not rows:
        return []
    lines = [
        "### Greedy decoding\n",
        "Time of greedy decoding of eight utterances by the RNN-T of AN4, with random weights, "
        "over that of float:\n",
        *ruled(["decoding", "labels", "float, ms", "exact", "fast"]),
    ]
    missed = []
    for decoding in DECODINGS:
        if has_row(rows, decoding=decoding):
            by_variant = {row["variant"]: row for row in select(rows, decoding=decoding)}
            base = by_variant["float"]
            times = [time_with_range(by_variant[each]) for each in _FIDELITIES]
            lines.append(
                line(decoding, base["labels"], f"{base['float_ms']:.1f}", *times),
            )
            missed += [
                f"{decoding}, {each} ({by_variant[each]['time_ratio']:.2f})"
                for each in _FIDELITIES
                if by_variant[each]["time_ratio"] > DECODING_TARGET
            ]
    verdict = f"missed by {'; '.join(missed)}" if missed else "met"
    return [*lines, "", f"- Time of greedy decoding: at most {DECODING_TARGET:g}; {verdict}.", ""]


def _column(row: Row | None) -> str:
    return "-" if row is None else f"{row['microseconds']:.1f} ({row['python_calls']:.0f})"
