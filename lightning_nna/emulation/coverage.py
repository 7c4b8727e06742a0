"""Report what becomes of the torch functions of a forward, and the cost of those in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nna.emulation.attachment import attached, uncompiled
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.modes import SiteCall, Treatment
from lightning_nna.emulation.spec import DEFAULT_PRESET, PRESETS, NNASpec

_TITLES: dict[Treatment, str] = {
    "emulated": "emulated",
    "layout": "data movement",
    "constant": "constant",
    "fallback": "CPU",
}


@dataclass(frozen=True)
class CoverageRow:
    """Describe one call site.

    Args:
        site: Key of the site, ``path/operator#ordinal``.
        where: What becomes of the site: ``"emulated"``; ``"layout"`` for a data-movement operator;
            ``"constant"`` for a function without activations, whose result is a constant of the
            program; or ``"fallback"`` for one that runs in float on the CPU.
        calls: Number of calls.
        crossing_bytes: Bytes of 8-bit activations that go from the accelerator to the CPU and back
            in all calls together; 0 for sites that do not run on the CPU.
        function: PyTorch's own name of the function, as ``"torch.nn.functional.softplus"``.
        source: File and line of the code that calls it, as ``"model.py:12"``.
        remedy: For a fallback, what to write instead; empty if nothing is known.
    """

    site: str
    where: Treatment
    calls: int
    crossing_bytes: int
    function: str = field(default="", compare=False)
    source: str = field(default="", compare=False)
    remedy: str = field(default="", compare=False)

    @property
    def on_chip(self) -> bool:
        """Tell whether the accelerator's program has the site, as an operator or a constant."""
        return self.where != "fallback"

    @property
    def operator(self) -> str:
        """Name of the operator, or of the torch function if the accelerator has no operator."""
        return self.site.rsplit("/", 1)[1].split("#")[0]


@dataclass(frozen=True)
class Coverage:
    """List all call sites of one forward, in the order in which they first ran.

    Args:
        rows: Operators, constants and fallbacks.
        scripted: Paths of scripted modules, whose operators cannot be seen.
        data_movement: Data-movement operators.
    """

    rows: tuple[CoverageRow, ...]
    scripted: tuple[str, ...] = ()
    data_movement: tuple[CoverageRow, ...] = ()

    @property
    def fallbacks(self) -> tuple[CoverageRow, ...]:
        """Sites that run on the CPU."""
        return tuple(row for row in self.rows if not row.on_chip)

    @property
    def cpu_fraction(self) -> float:
        """Fraction of the sites of operators that run on the CPU, since the target lacks them."""
        operators = [row for row in self.rows if row.where != "constant"]
        return len(self.fallbacks) / len(operators) if operators else 0.0

    def __str__(self) -> str:
        width = max([len(row.site) for row in self.rows], default=4)
        lines = [f"{'site':{width}}  where     calls  crossing bytes"]
        for row in self.rows:
            title, size = _TITLES[row.where], row.crossing_bytes
            lines.append(f"{row.site:{width}}  {title:8}  {row.calls:5}  {size:14}")
        if self.data_movement:
            counts: Counter[str] = Counter()
            for row in self.data_movement:
                counts[row.operator] += row.calls
            names = ", ".join(f"{count} {name}" for name, count in counts.most_common())
            lines.append(f"{_TITLES['layout']}: {names}")
        if self.fallbacks:
            share = f"{100 * self.cpu_fraction:.0f} % of the operators"
            lines.append(f"{_TITLES['fallback']}: {len(self.fallbacks)}, {share}")
        for row in self.fallbacks:
            remedy = f": {row.remedy}" if row.remedy else ""
            lines.append(f"{row.site} is {row.function} at {row.source}{remedy}")
        lines.extend(f"{name}: scripted, its operators cannot be seen" for name in self.scripted)
        return "\n".join(lines)


def coverage(
    module: nn.Module,
    *example: Any,
    spec: str | NNASpec | Mapping[str, Any] | None = None,
    forward: Callable[..., Any] = lambda module, *example, **keywords: module(*example, **keywords),
    **keywords: Any,
) -> Coverage:
    """Run a module once, in float, and report what becomes of each of its functions.

    Args:
        module: Any module, with or without an emulator; neither is changed.
        *example: Arguments of its forward. As in :func:`.emulate`, the accelerator may follow by
            position: an ``NNASpec``, a preset's name or a YAML file.
        spec: Accelerator; None for that of the module's emulator, or for the default preset.
        forward: Function that runs the module, given the module and its arguments: for methods
            other than its forward, as those of a decoder.
        **keywords: Keyword arguments of its forward.

    Returns:
        A table that prints; ``fallbacks`` has the sites that run on the CPU, and what to write
        instead where something is known.

    Example:
        >>> print(coverage(nn.Sequential(nn.Linear(4, 2), nn.RReLU()), torch.zeros(1, 4)))
        site                 where     calls  crossing bytes
        0/fully_connected#0  emulated      1               0
        1/rrelu#0            CPU           1               4
        CPU: 1, 50 % of the operators
        1/rrelu#0 is torch.nn.functional.rrelu at ...: write F.leaky_relu with the mean of its ...
    """
    if example and _is_spec(example[-1]):
        *example, spec = example  # type: ignore[assignment]
    rows: dict[str, _Sums] = {}
    with _observing(uncompiled(module), spec) as emulator:

        def listen(call: SiteCall) -> None:
            # Operators and data-movement operators are counted apart, and may have equal keys.
            sums = rows.setdefault(f"{call.where == 'layout'} {call.key}", _Sums(call))
            sums.calls += 1
            if call.where == "fallback":
                crossing = _elements(call.operands, emulator) + _elements(call.result)
                sums.crossing_bytes += crossing
            # A site that is a constant in one call need not be one in another.
            if sums.first.where == "constant":
                sums.first = call

        with torch.no_grad(), emulator.running("observe", listener=listen):
            forward(module, *example, **keywords)
    every = [each.row() for each in rows.values()]
    return Coverage(
        tuple(row for row in every if row.where != "layout"),
        tuple(emulator.scripted),
        tuple(row for row in every if row.where == "layout"),
    )


class _Sums:
    """Count the calls of a site."""

    def __init__(self, first: SiteCall) -> None:
        self.first, self.calls, self.crossing_bytes = first, 0, 0

    def row(self) -> CoverageRow:
        first = self.first
        return CoverageRow(
            first.key,
            first.where,
            self.calls,
            self.crossing_bytes,
            first.function,
            first.source,
            first.remedy,
        )


@contextmanager
def _observing(
    module: nn.Module, spec: str | NNASpec | Mapping[str, Any] | None
) -> Iterator[Emulator]:
    """Give a module a second emulator for one forward; its own, its buffers and seeds stay."""
    own = attached(module)
    is_own = own is not None and own.module is module
    emulator = Emulator(
        module,
        spec if spec is not None else DEFAULT_PRESET if own is None else own.spec,
        targets=own.targets if own is not None and is_own else ("*",),
    )
    outer = None if own is None else own.state.modes.enter(None)
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    seeds = torch.get_rng_state()
    try:
        yield emulator
    finally:
        emulator.detach()
        torch.set_rng_state(seeds)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        if own is not None:
            own.state.modes.enter(outer)


def _is_spec(value: Any) -> bool:
    """Tell whether an argument is an accelerator and nothing else."""
    if isinstance(value, str):
        return value in PRESETS or value.endswith((".yaml", ".yml"))
    return isinstance(value, NNASpec)


def _elements(values: Any, emulator: Emulator | None = None) -> int:
    """Count float elements, one byte each; of operands only those that are quantized."""
    floats = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]
    state = None if emulator is None else emulator.state
    return sum(x.numel() for x in floats if state is None or state.qparams_of(x) is not None)
