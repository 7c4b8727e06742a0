"""Cost of low-bit weights: training steps compared with those of float weights.

    python -m recipes.benchmark.weight_methods               # run what is missing, then report
    python -m recipes.benchmark.weight_methods --page-only

Times are ratios of steps that are timed one right after the other, as in
``recipes.benchmark.emulation``. Memory is the peak of a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nna.keyed_adam import KeyedAdam
from lightning_nna.quantization.general_quantizer_transform import GeneralQuantizerTransform
from lightning_nna.quantization.mracos import mracos_gradient
from lightning_nna.quantization.uniform import UniformTransform
from lightning_nna.weights.codebook import Codebook, to_grid_units
from lightning_nna.weights.pipeline import WeightTransform, pipeline_of
from recipes.benchmark.grid import Run, Study, axis, threads_option
from recipes.benchmark.report import Fields, line, met, ruled
from recipes.benchmark.rows import Row, select
from recipes.benchmark.timing import (
    Step,
    machine,
    peak_in_process,
    ratio_columns,
    time_ratios,
    time_with_range,
)
from recipes.benchmark.workloads import WORKLOADS, Workload
from recipes.comparators import DKMTransform

#: The LSTM of the targets, and the speech recognizer.
CASES = ("lstm", "rnnt")
BITS = (2, 5, 8)
PAIRS = 11
#: Targets of GQ on the LSTM: time over float, memory beyond float over the weights'.
TIME_TARGET, MEMORY_TARGET = 1.25, 3.0
_COMPRESS_EVERY = 100


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        title: Name in tables.
        attach: Function that claims a network's weights and returns what is done before the
            optimizer's step.
    """

    title: str
    attach: Callable[[nn.Module, int], Step]

    def step(self, workload: Workload, bits: int) -> Step:
        """Make a function that does one training step of ``workload``."""
        torch.manual_seed(0)
        module, batch = workload.module().train(), workload.batch()
        before_step = self.attach(module, bits)
        pipeline = pipeline_of(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, foreach=False)

        def step() -> None:
            pipeline.substitute("train")
            optimizer.zero_grad()
            workload.loss(module(*batch), batch).backward()
            pipeline.restore()
            pipeline.pull_back(module.parameters())
            before_step()
            optimizer.step()

        for _ in range(3):
            step()
        return step


def _in_pipeline(
    make: Callable[[Tensor, int], WeightTransform], module: nn.Module, bits: int
) -> Step:
    transforms: dict[str, Any] = {
        n: make(p, bits) for n, p in module.named_parameters() if p.ndim > 1
    }
    for name, transform in transforms.items():
        pipeline_of(module).claim(name, module.get_parameter(name), transform)
    adam = KeyedAdam(1e-4)

    def before_step() -> None:
        learned = {
            name: transform.scale_log2
            if isinstance(transform, UniformTransform)
            else transform.centroids
            for name, transform in transforms.items()
        }
        adam.update({name: x for name, x in learned.items() if x.grad is not None})

    return before_step


def _gq(is_hard: bool) -> Callable[[nn.Module, int], Step]:
    def make(weight: Tensor, bits: int) -> WeightTransform:
        transform = GeneralQuantizerTransform(weight, bits)
        transform.sharpness, transform.is_hard = 4.0, is_hard
        transform.gradient_sharpness = None
        return transform

    return partial(_in_pipeline, make)


def _s8bqat(module: nn.Module, bits: int) -> Step:
    weights = {n: p for n, p in module.named_parameters() if p.ndim > 1}
    books = {name: Codebook.fit(weight, bits) for name, weight in weights.items()}
    steps = 0

    @torch.no_grad()
    def before_step() -> None:
        nonlocal steps
        steps += 1
        for name, weight in weights.items():
            book = books[name]
            if weight.grad is not None:
                gradient = mracos_gradient(to_grid_units(weight, book.scales), book.centroids)
                weight.grad.add_(gradient, alpha=1e-4)
            if steps % _COMPRESS_EVERY == 0:
                weight.copy_(book.project(weight))

    return before_step


METHODS: dict[str, Method] = {
    "gq": Method("GQ, hard", _gq(True)),
    "gq_soft": Method("GQ, soft", _gq(False)),
    "s8bqat": Method("S8BQAT", _s8bqat),
    "lsq": Method("LSQ", partial(_in_pipeline, UniformTransform)),
    "dkm": Method("DKM", partial(_in_pipeline, DKMTransform)),
}
_FLOAT = Method("float", lambda module, bits: lambda: None)


def training_step(workload: str, method: str, bits: str, *, device: torch.device) -> Step:
    """Make a training step by the names that rows use."""
    return METHODS.get(method, _FLOAT).step(WORKLOADS[workload], int(bits))


@dataclass(frozen=True)
class WeightMethodRun(Run):
    """All methods on one workload at one width, timed side by side in one process.

    Attributes:
        work: A key of :data:`~recipes.benchmark.workloads.WORKLOADS`.
        bits: Bits of a weight.
        pairs: Number of pairs of steps that are timed.
    """

    work: str
    bits: int
    pairs: int = PAIRS

    @property
    def key(self) -> dict[str, Any]:
        """Values that all rows of the run have."""
        device = machine(torch.device("cpu"))
        return {"work": self.work, "bits": self.bits, "device": device, "threads": self.threads}

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one mapping for each method."""
        return [{**self.key, "method": method} for method in METHODS]

    def rows(self) -> Iterator[Row]:
        """Time every method and measure its memory."""
        torch.set_num_threads(self.threads or 1)
        cpu, key, workload = torch.device("cpu"), self.key, WORKLOADS[self.work]
        methods = {**METHODS, "float": _FLOAT}
        steps = {name: method.step(workload, self.bits) for name, method in methods.items()}
        ratios, float_ms = time_ratios(steps, cpu, self.pairs)
        parameters = workload.module().parameters()
        weight_bytes = sum(4 * p.numel() for p in parameters if p.ndim > 1)
        base = self._peak("float")
        for name in METHODS:
            yield {
                **key,
                "method": name,
                **ratio_columns(ratios[name]),
                "memory_over_weights": round((self._peak(name) - base) / weight_bytes, 2),
                "float_ms": round(float_ms, 2),
                "weight_bytes": weight_bytes,
                "pairs": self.pairs,
            }

    def _peak(self, method: str) -> int:
        return peak_in_process(
            "recipes.benchmark.weight_methods",
            *(self.work, method, str(self.bits)),
            device=torch.device("cpu"),
            threads=self.threads,
        )


def runs(
    *,
    works: Sequence[str] = CASES,
    bits: Sequence[int] = BITS,
    threads: int = 1,
    pairs: int = PAIRS,
) -> list[WeightMethodRun]:
    """List the grid, workload by workload."""
    return [
        WeightMethodRun(work, width, pairs, threads=threads) for work in works for width in bits
    ]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report: a table of time and one of memory for each machine."""
    parts = []
    for device, threads in dict.fromkeys((row["device"], row["threads"]) for row in rows):
        selected = select(rows, device=device, threads=threads)
        parts += [
            f"## {device}, {threads} thread(s)\n\nTime of a training step over that of float:\n",
            *_table(selected, time_with_range),
            "\nPeak memory beyond that of float, over the size of the float weights:\n",
            *_table(selected, lambda row: f"{row['memory_over_weights']:.2f}"),
            "",
            *checks(selected),
            "",
        ]
    return {"machines": parts}


def checks(rows: Sequence[Row]) -> list[str]:
    """Check time and memory of GQ on the LSTM."""
    gq = [row for row in select(rows, work="lstm") if row["method"].startswith("gq")]
    if not gq:
        return []
    slowest = max(gq, key=lambda row: row["time_ratio"])
    return [
        f"- Time of GQ on the LSTM, at most {TIME_TARGET}: at worst {slowest['time_ratio']:.2f} "
        f"({METHODS[slowest['method']].title}, {slowest['bits']} bits), "
        f"{met(slowest['time_ratio'] <= TIME_TARGET)}.",
        *(
            f"- Memory of {METHODS[row['method']].title} at 8 bits, at most {MEMORY_TARGET:g} "
            f"times the weights: {row['memory_over_weights']:.2f}, "
            f"{met(row['memory_over_weights'] <= MEMORY_TARGET)}."
            for row in select(gq, bits=8)
        ),
    ]


def _table(rows: Sequence[Row], column: Callable[[Row], str]) -> list[str]:
    titles = [method.title for method in METHODS.values()]
    lines = ruled(["workload", "bits", "float, ms", *titles])
    for work, bits in dict.fromkeys((row["work"], row["bits"]) for row in rows):
        by_method = {row["method"]: row for row in select(rows, work=work, bits=bits)}
        columns = [column(by_method[name]) if name in by_method else "-" for name in METHODS]
        float_ms = next(iter(by_method.values()))["float_ms"]
        lines.append(line(WORKLOADS[work].title, bits, f"{float_ms:.1f}", *columns))
    return lines


STUDY = Study(
    name="weight_methods",
    runs=runs,
    report=report,
    options={
        "works": axis(WORKLOADS) | {"default": list(CASES)},
        "bits": axis(BITS, is_open=True),
        "threads": threads_option(),
        "pairs": {"type": int, "default": PAIRS, "help": "pairs of steps that are timed"},
    },
)

if __name__ == "__main__":
    STUDY.main()
