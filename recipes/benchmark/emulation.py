"""Cost of emulation: training steps compared with float and with other libraries' quantizers.

    python -m recipes.benchmark.emulation               # run what is missing, then report
    python -m recipes.benchmark.emulation --page-only   # write the report from the rows that exist

A time is the ratio of two training steps (forward, backward and the optimizer's step) that are
timed one right after the other, the variant's and the float network's: the median over pairs. What
one call of an operator costs, whatever the size of its tensors, is measured by :mod:`.calls`.
The other libraries come with the extra ``bench``. Each is asked for 8-bit weights and activations
of every layer that it knows, by its own call for a whole network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nna import emulate
from recipes import require_extra
from recipes.benchmark.calls import (
    CALLS,
    DECODINGS,
    CallRun,
    DecodingRun,
    table_of_calls,
    table_of_decodings,
)
from recipes.benchmark.grid import Run, Study, axis, threads_option
from recipes.benchmark.report import Fields, line, ruled
from recipes.benchmark.rows import Row, has_row, select
from recipes.benchmark.timing import (
    Step,
    machine,
    peak_in_process,
    ratio_columns,
    time_ratios,
    time_with_range,
)
from recipes.benchmark.workloads import WORKLOADS, Group, Workload

#: Preset of the published rows.
PRESET = "litert-int8"
PAIRS = 15
#: Largest ratio of time by group of workloads and fidelity, and of memory.
TARGETS: dict[Group, dict[str, float]] = {
    "layers": {"exact": 1.5, "fast": 1.25},
    "gru": {"exact": 1.5, "fast": 1.3},
    "small": {"exact": 2.5, "fast": 2.0},
}
MEMORY_TARGET = 1.5
#: Names of the groups in sentences.
GROUPS: dict[Group, str] = {"layers": "layers", "gru": "the GRU", "small": "small networks"}
#: Variants that have targets.
OURS = ("exact", "fast")


class NotPossibleError(RuntimeError):
    """Raised if a library cannot train a network; the message says why."""


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        title: Name in tables.
        prepare: Function from a network and its batch to the network that is trained.
        scope: Function from the network to a context that is entered for every step.
    """

    title: str
    prepare: Callable[[nn.Module, tuple[Tensor, ...]], nn.Module]
    scope: Callable[[nn.Module], AbstractContextManager[Any]] = lambda module: nullcontext()

    def step(self, workload: Workload, device: torch.device) -> Step:
        """Make a function that does one training step of ``workload``.

        Raises:
            NotPossibleError: If the library cannot train it.
        """
        torch.manual_seed(0)
        module = workload.module().train().to(device)
        batch = tuple(x.to(device) for x in workload.batch())
        try:
            module = self.prepare(module, batch)
            optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, foreach=False)
            step = partial(_step, self, workload, module, batch, optimizer)
            for _ in range(3):
                step()
        except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            first, *_ = str(error).splitlines() or [""]
            raise NotPossibleError(f"{type(error).__name__}: {first}") from error
        return step


def _step(
    variant: Variant,
    workload: Workload,
    module: nn.Module,
    batch: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
) -> None:
    with variant.scope(module):
        optimizer.zero_grad()
        workload.loss(module(*batch), batch).backward()
        optimizer.step()


def _calibrated(module: nn.Module, batch: tuple[Tensor, ...]) -> nn.Module:
    with emulate(module, PRESET) as emulator, emulator.observing():
        module(*batch)
    return module


def _brevitas(module: nn.Module, batch: tuple[Tensor, ...]) -> nn.Module:
    require_extra("bench", "brevitas")
    from brevitas.graph.quantize import layerwise_quantize

    quantized: nn.Module = layerwise_quantize(module)
    return quantized.train()


def _torchao(module: nn.Module, batch: tuple[Tensor, ...]) -> nn.Module:
    require_extra("bench", "torchao")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if not any(isinstance(child, nn.Linear) for child in module.modules()):
        raise NotPossibleError("it quantizes linear layers alone, and there are none")
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    config = QATConfig(activation_config=activations, weight_config=weights, step="prepare")
    quantize_(module, config)
    return module


def _modelopt(module: nn.Module, batch: tuple[Tensor, ...]) -> nn.Module:
    require_extra("bench", "modelopt")
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    quantized: nn.Module = mtq.quantize(module, config, lambda network: network(*batch))
    return quantized.train()


#: Variants by the name that rows use; the others are compared with ``float``.
VARIANTS: dict[str, Variant] = {
    "float": Variant("float", lambda module, batch: module),
    "exact": Variant("ours, exact", _calibrated, partial(emulate, fidelity="exact")),
    "fast": Variant("ours, fast", _calibrated, partial(emulate, fidelity="fast")),
    "brevitas": Variant("Brevitas", _brevitas),
    "torchao": Variant("torchao", _torchao),
    "modelopt": Variant("ModelOpt", _modelopt),
}


def training_step(workload: str, variant: str, *, device: torch.device) -> Step:
    """Make a training step by the names that rows use."""
    return VARIANTS[variant].step(WORKLOADS[workload], device)


@dataclass(frozen=True)
class EmulationRun(Run):
    """All variants of one workload, timed side by side in one process.

    Attributes:
        work: A key of :data:`~recipes.benchmark.workloads.WORKLOADS`.
        device: ``"cpu"`` or ``"cuda"``.
        pairs: Number of pairs of steps that are timed.
    """

    work: str
    device: str = "cpu"
    pairs: int = PAIRS

    @property
    def key(self) -> dict[str, Any]:
        """Values that all rows of the run have."""
        device = machine(torch.device(self.device))
        return {"work": self.work, "device": device, "threads": self.threads}

    @property
    def variants(self) -> tuple[str, ...]:
        """Variants that are timed: small networks are not compared with other libraries."""
        return tuple(VARIANTS) if WORKLOADS[self.work].group == "layers" else ("float", *OURS)

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one mapping for each variant."""
        return [{**self.key, "variant": variant} for variant in self.variants]

    def rows(self) -> Iterator[Row]:
        """Time every variant that can train the workload, and measure its memory."""
        torch.set_num_threads(self.threads or 1)
        device, key = torch.device(self.device), self.key
        steps: dict[str, Step] = {}
        reasons: dict[str, str] = {}
        for variant in self.variants:
            try:
                steps[variant] = training_step(self.work, variant, device=device)
            except NotPossibleError as error:
                reasons[variant] = str(error)
        ratios, float_ms = time_ratios(steps, device, self.pairs)
        memory = {
            variant: peak_in_process(
                "recipes.benchmark.emulation",
                *(self.work, variant),
                device=device,
                threads=self.threads,
            )
            for variant in steps
        }
        for variant in self.variants:
            row = {**key, "variant": variant, "fidelity": variant if variant in OURS else None}
            if variant in reasons:
                yield row | {"time_ratio": None, "memory_ratio": None, "reason": reasons[variant]}
                continue
            yield row | {
                **ratio_columns(ratios[variant]),
                "memory_ratio": round(memory[variant] / memory["float"], 3),
                "float_ms": round(float_ms, 2),
                "peak_bytes": memory[variant],
                "pairs": len(ratios[variant]),
            }


def runs(
    *,
    works: Sequence[str] = tuple(WORKLOADS),
    calls: Sequence[str] = tuple(CALLS),
    decodings: Sequence[str] = tuple(DECODINGS),
    device: str = "cpu",
    threads: int = 1,
    pairs: int,
) -> list[Run]:
    """List the grid, one run a workload and one an operator."""
    return [
        *(EmulationRun(work, device, pairs, threads=threads) for work in works),
        *(CallRun(call, device, threads=threads) for call in calls),
        *(DecodingRun(each, device, threads=threads) for each in decodings),
    ]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report: tables of time and memory for each machine, and of calls."""
    parts = []
    for device, threads in dict.fromkeys((row["device"], row["threads"]) for row in rows):
        selected = select(rows, device=device, threads=threads)
        steps = [row for row in selected if "work" in row]
        small = [row for row in steps if WORKLOADS[row["work"]].group == "small"]
        large = [row for row in steps if WORKLOADS[row["work"]].group != "small"]
        parts += [
            f"## {device}, {threads} thread(s)\n",
            *_tables("Layers and recognizers", large),
            *_tables("Small networks", small),
            *checks(steps),
            "",
            *_reasons(steps),
            *table_of_calls([row for row in selected if "call" in row]),
            *table_of_decodings([row for row in selected if "decoding" in row]),
        ]
    return {"machines": parts}


def checks(rows: Sequence[Row]) -> list[str]:
    """Check times and memory, and name the workloads that miss a target."""
    lines = []
    for group, targets in TARGETS.items():
        own = [row for row in rows if WORKLOADS[row["work"]].group == group]
        for variant, target in targets.items() if own else ():
            missed = [
                f"{WORKLOADS[row['work']].title} ({row['time_ratio']:.2f})"
                for row in select(own, variant=variant)
                if row["time_ratio"] > target
            ]
            title = f"{VARIANTS[variant].title}, {GROUPS[group]}"
            lines.append(f"- Time, {title}: at most {target}; {_missed_by(missed)}.")
    missed = [
        f"{WORKLOADS[row['work']].title}, {row['variant']} ({row['memory_ratio']:.2f})"
        for row in rows
        if row["variant"] in OURS and (row["memory_ratio"] or 0.0) > MEMORY_TARGET
    ]
    return [*lines, f"- Memory: at most {MEMORY_TARGET}; {_missed_by(missed)}."] if rows else []


def _missed_by(workloads: Sequence[str]) -> str:
    return f"missed by {', '.join(workloads)}" if workloads else "met by every workload"


def _tables(title: str, rows: Sequence[Row]) -> list[str]:
    """Tables of time and memory under a title; nothing without rows."""
    if not rows:
        return []
    return [
        f"### {title}\n\nTime of a training step over that of float:\n",
        *_table(rows, "time_ratio"),
        "\nPeak memory over that of float:\n",
        *_table(rows, "memory_ratio"),
        "",
    ]


def _table(rows: Sequence[Row], metric: str) -> list[str]:
    variants = [variant for variant in VARIANTS if variant != "float"]
    unit = "ms" if metric == "time_ratio" else "MB"
    titles = [VARIANTS[variant].title for variant in variants]
    lines = ruled(["workload", f"float, {unit}", *titles])
    for work, workload in WORKLOADS.items():
        if has_row(rows, work=work):
            by_variant = {row["variant"]: row for row in select(rows, work=work)}
            base = by_variant["float"]
            amount = base["float_ms"] if unit == "ms" else base["peak_bytes"] / 1e6
            columns = [_column(by_variant.get(variant), metric) for variant in variants]
            lines.append(line(workload.title, f"{amount:.1f}", *columns))
    return lines


def _column(row: Row | None, metric: str) -> str:
    if row is None or row[metric] is None:
        return "-"
    return time_with_range(row) if metric == "time_ratio" else f"{row[metric]:.2f}"


def _reasons(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"- {VARIANTS[row['variant']].title}, {WORKLOADS[row['work']].title}: `{row['reason']}`"
        for row in rows
        if row.get("reason")
    ]
    return ["What a library could not train:\n", *lines, ""] if lines else []


STUDY = Study(
    name="emulation",
    runs=runs,
    report=report,
    options={
        "works": axis(WORKLOADS),
        "calls": axis(CALLS),
        "decodings": axis(DECODINGS),
        "device": {"default": "cpu", "help": "cpu or cuda"},
        "threads": threads_option(),
        "pairs": {"type": int, "default": PAIRS, "help": "pairs of steps that are timed"},
    },
)

if __name__ == "__main__":
    STUDY.main()
