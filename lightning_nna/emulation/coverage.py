"""Report the operators of a forward that run on the accelerator, and the cost of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nna.emulation.attachment import attach, attached, strip
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.modes import Location
from lightning_nna.emulation.spec import PRESETS, NNASpec


@dataclass(frozen=True)
class CoverageRow:
    """Describe one call site.

    Args:
        site: Key of the site, ``path/operator#ordinal``.
        where: Location of the site: ``"chip"`` for the accelerator, ``"cpu"``, or ``"constant"``
            for a function without activations, whose result is a constant of the program.
        calls: Number of calls.
        crossing_bytes: Bytes of 8-bit activations that go from the accelerator to the CPU and back
            in all calls together; 0 for sites that do not run on the CPU.
    """

    site: str
    where: Location
    calls: int
    crossing_bytes: int

    @property
    def on_chip(self) -> bool:
        """Tell whether the site is an operator or a constant of the accelerator's program."""
        return self.where != "cpu"

    @property
    def operator(self) -> str:
        """Name of the operator, or of the torch function if the accelerator has no operator."""
        return self.site.rsplit("/", 1)[1].split("#")[0]


@dataclass(frozen=True)
class Coverage:
    """List all call sites of one forward, in the order in which they first ran.

    Args:
        rows: Call sites.
        scripted: Paths of scripted modules, whose operators cannot be seen.
    """

    rows: tuple[CoverageRow, ...]
    scripted: tuple[str, ...] = ()

    @property
    def fallbacks(self) -> tuple[CoverageRow, ...]:
        """Sites that run on the CPU."""
        return tuple(row for row in self.rows if not row.on_chip)

    def __str__(self) -> str:
        width = max([len(row.site) for row in self.rows], default=4)
        lines = [f"{'site':{width}}  where     calls  crossing bytes"]
        for row in self.rows:
            where = {"chip": "chip", "cpu": "CPU", "constant": "constant"}[row.where]
            lines.append(f"{row.site:{width}}  {where:8}  {row.calls:5}  {row.crossing_bytes:14}")
        lines.extend(f"{name}: scripted, its operators cannot be seen" for name in self.scripted)
        return "\n".join(lines)


def coverage(
    module: nn.Module,
    *example: Any,
    spec: str | NNASpec | Mapping[str, Any] = "litert-int8",
    forward: Callable[..., Any] = lambda module, *example, **keywords: module(*example, **keywords),
    **keywords: Any,
) -> Coverage:
    """Run a module once, in float, and report the location of each of its operators.

    Args:
        module: Any module; it is not changed.
        *example: Arguments of its forward. As in :func:`.emulate`, the accelerator may follow by
            position: an ``NNASpec``, a preset's name or a YAML file.
        spec: Accelerator.
        forward: Function that runs the module, given the module and its arguments: for methods
            other than its forward, as those of a decoder.
        **keywords: Keyword arguments of its forward.

    Returns:
        A table that prints; ``fallbacks`` has the sites that run on the CPU.

    Raises:
        ValueError: If the module is emulated already; call ``strip`` first.

    Example:
        >>> print(coverage(nn.Sequential(nn.Linear(4, 2), nn.Softplus()), torch.zeros(1, 4)))
        site                 where     calls  crossing bytes
        0/fully_connected#0  chip          1               0
        1/softplus#0         CPU           1               4
    """
    if example and _is_spec(example[-1]):
        *example, spec = example  # type: ignore[assignment]
    attached_emulator = attached(module)
    if attached_emulator is not None:
        owner = type(attached_emulator.module).__name__
        raise ValueError(
            f"the module, or what it is part of (a {owner}), is emulated already; call strip on "
            f"the {owner} first"
        )
    emulator = attach(module, spec)
    counts: dict[str, list[int]] = {}
    locations: dict[str, Location] = {}

    def listen(key: str, where: Location, operands: Any, result: Any) -> None:
        row = counts.setdefault(key, [0, 0])
        row[0] += 1
        row[1] += _elements(operands, emulator) + _elements(result) if where == "cpu" else 0
        # A site that is a constant in one call need not be one in another.
        if locations.get(key, "constant") == "constant":
            locations[key] = where

    try:
        # Unlike `observing`, this freezes nothing: it must work without any emulated operator.
        with torch.no_grad(), emulator.running("observe", listener=listen):
            forward(module, *example, **keywords)
    finally:
        strip(module)
    rows = tuple(CoverageRow(key, locations[key], *row) for key, row in counts.items())
    return Coverage(rows, tuple(emulator.scripted))


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
