r"""Metrics of the activations of an emulated module, by call site.

The module runs once more, emulated; every result of an operator is looked at as the accelerator
stores it. SQNR and clip rate are those of :mod:`lightning_nna.emulation.telemetry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nna.deploy.capture import emulated_evaluation, emulator_of
from lightning_nna.deploy.vela import VelaReport
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.modes import SiteCall
from lightning_nna.emulation.ranges import QParams
from lightning_nna.emulation.telemetry import Telemetry
from lightning_nna.weights.layers import HISTOGRAM_BINS, counts_entropy

#: Vela's name for the parts of an LSTM, which does not name the layer.
VELA_LSTM = "UnidirectionalSequenceLstm"


@dataclass(frozen=True)
class Activations:
    """Activations of a module, and which layers have none of their own.

    Args:
        rows: Metrics of the call sites, in the order in which they first ran.
        folded: Call sites of layers that are part of another's operator, as a convolution is of the
            batch norm after it, with that call site.
    """

    rows: tuple[ActivationMetrics, ...] = ()
    folded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ActivationMetrics:
    """The first result of one call site, over all its calls.

    Args:
        site: Key of the call site.
        function: Name of its torch function.
        where: ``"emulated"``, or ``"fallback"`` for one in float on the CPU.
        calls: Number of calls.
        elements: Number of elements of one result, the largest if they differ.
        bits: Bits of an element; 32 in float on the CPU; None if the operators that read it decide.
        zeros: Fraction of the elements that are zero.
        entropy_bits: Entropy in bits an element.
        sqnr_db: Signal to quantization noise in decibels; None if it was not measured.
        clip_rate: Fraction of float results outside of the range; None if it was not measured.
        histogram: Numbers of elements in equal bins over the range.
        cycles: Cycles of the accelerator; None if unknown.
    """

    site: str
    function: str
    where: str
    calls: int
    elements: int
    bits: int | None
    zeros: float
    entropy_bits: float
    sqnr_db: float | None
    clip_rate: float | None
    histogram: tuple[int, ...]
    cycles: int | None = None

    @property
    def size_bytes(self) -> int | None:
        """Bytes of one result as it is stored; None if its bits are unknown."""
        return None if self.bits is None else self.elements * self.bits // 8


@dataclass
class _Counts:
    """Integers of a call site that were seen so far.

    Attributes:
        counts: Number of elements of each integer from the lowest on, of one range.
    """

    function: str
    where: str
    calls: int = 0
    elements: int = 0
    qparams: QParams | None = None
    counts: Tensor | None = None
    zeros: int = 0
    total: int = 0

    def add(self, result: Tensor, qparams: QParams | None) -> None:
        self.calls += 1
        self.elements = max(self.elements, result.numel())
        if qparams is None:
            return
        low, high = qparams.bounds
        integers = (result.detach().double() / qparams.scale).round().long().reshape(-1) - low
        counts = torch.bincount(integers.clamp(0, high - low), minlength=high - low + 1)
        # A site whose range differs from call to call is described by its last range.
        if self.counts is not None and self.qparams == qparams:
            counts = counts + self.counts
        self.counts = counts
        self.qparams = qparams
        self.zeros = int(self.counts[-low]) if low <= 0 <= high else 0
        self.total = int(self.counts.sum())


@dataclass
class _Watch:
    """A listener that counts the results of every call site."""

    emulator: Emulator
    sites: dict[str, _Counts] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    #: Results of folded layers until their consumer runs, with the layers' call sites.
    _waiting: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def __call__(self, call: SiteCall) -> None:
        for operand in tree_leaves(call.operands):
            if id(operand) in self._waiting:
                self.folded[self._waiting.pop(id(operand))[1]] = call.key
        if self.emulator.state.fusion.is_folded(call.key):
            if isinstance(call.result, Tensor):
                self._waiting[id(call.result)] = call.result, call.key
            return
        if call.where not in ("emulated", "fallback"):
            return
        floats = [
            x for x in tree_leaves(call.result) if isinstance(x, Tensor) and x.is_floating_point()
        ]
        if not floats:
            return
        name = call.function.rpartition(".")[2]
        counts = self.sites.setdefault(call.key, _Counts(name, call.where))
        counts.add(floats[0], self.emulator.state.qparams_of(floats[0]))


def activation_metrics(
    module: nn.Module, run: Callable[[], Any], reports: Sequence[VelaReport] = ()
) -> Activations:
    """Measure the activations of an emulated module.

    Args:
        module: Emulated module, calibrated.
        run: Function that runs it.
        reports: Vela's reports of its programs for one system, whose cycles count for the call
            site that an operator is named by.

    Returns:
        Metrics of the call sites, and the layers that are folded into others.

    Raises:
        CaptureError: If the module is not emulated or not calibrated.

    Example:
        >>> from lightning_nna import calibrate
        >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(8, 4)
        >>> emulator = calibrate(net, [x])
        >>> {row.site: row.bits for row in activation_metrics(net, lambda: net(x)).rows}
        {'0/fully_connected#0': 8, '1/relu#0': 8}
    """
    emulator = emulator_of(module)
    watch, telemetry = _Watch(emulator), Telemetry()
    with (
        emulated_evaluation(module, emulator),
        emulator.running(telemetry=telemetry, listener=watch),
    ):
        run()
    rows = [_row(site, counts, telemetry) for site, counts in watch.sites.items()]
    return Activations(
        tuple(replace(row, cycles=_cycles(row.site, reports)) for row in rows), watch.folded
    )


def _row(site: str, counts: _Counts, telemetry: Telemetry) -> ActivationMetrics:
    sampled = telemetry.sites.get(site)
    if sampled is not None and not sampled.results:  # Biases and sums alone were looked at.
        sampled = None
    qparams, integers = counts.qparams, counts.counts
    return ActivationMetrics(
        site=site,
        function=counts.function,
        where=counts.where,
        calls=counts.calls,
        elements=counts.elements,
        bits=(32 if counts.where == "fallback" else None) if qparams is None else qparams.bits,
        zeros=counts.zeros / max(counts.total, 1),
        entropy_bits=0.0 if integers is None else counts_entropy(integers),
        sqnr_db=None if sampled is None else sampled.sqnr_db,
        clip_rate=None if sampled is None else sampled.clip_rate,
        histogram=() if integers is None else _binned(integers),
    )


def _binned(counts: Tensor) -> tuple[int, ...]:
    """Add up the counts of neighboring integers, so that there are few bins."""
    bins = torch.arange(len(counts)) * HISTOGRAM_BINS // len(counts)
    return tuple(torch.bincount(bins, counts.double()).long().tolist())


def _cycles(site: str, reports: Sequence[VelaReport]) -> int | None:
    """Add up the cycles of operators that are named by a call site; None if they are unknown."""
    operators = [
        operator
        for report in reports
        for operator in report.operators
        if operator.on_npu and is_part_of(operator.name, site)
    ]
    # Vela names few of the many parts of an LSTM by its call site.
    if not operators or any(operator.operator == VELA_LSTM for operator in operators):
        return None
    return sum(operator.cycles for operator in operators)


def is_part_of(operator: str, *sites: str) -> bool:
    """Tell whether Vela's name of an operator is that of a call site, or of a part of one.

    Args:
        operator: Name of the operator, see :class:`.VelaOperator`.
        sites: Keys of call sites.

    Example:
        >>> is_part_of("head/mean#0_intermediate", "head/mean#0"), is_part_of("a#10", "a#1")
        (True, False)
    """
    return any(
        operator == site or operator.startswith((f"{site}/", f"{site}:", f"{site}_"))
        for site in sites
    )
