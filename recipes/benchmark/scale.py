"""Scale of emulation: its cost against depth, length, width and parameters, and one large module.

    python -m recipes.benchmark.scale               # run what is missing, then report
    python -m recipes.benchmark.scale --axes depth module
    python -m recipes.benchmark.scale --page-only

A size of an axis is a training step, timed and weighed as in :mod:`recipes.benchmark.emulation`.
What a module of 50 million parameters costs is in :mod:`recipes.benchmark.large_module`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
from torch import Tensor, nn

from recipes.benchmark import large_module
from recipes.benchmark.emulation import PRESET, VARIANTS
from recipes.benchmark.grid import Run, Study, axis, threads_option
from recipes.benchmark.large_module import STAGES, LargeModuleRun
from recipes.benchmark.plots import saved_figure
from recipes.benchmark.report import Fields, line, met, ruled
from recipes.benchmark.rows import Row, has_row, select
from recipes.benchmark.timing import (
    Step,
    machine,
    peaks_in_process,
    ratio_columns,
    time_ratios,
    time_with_range,
)
from recipes.benchmark.workloads import Workload

PAIRS = 5
FIDELITIES = ("exact", "fast")
#: Largest ratio at the largest size of an axis over the one at its middle size.
GROWTH_TARGET = 1.2
MODULE = "module"
# Emulated steps of the smallest sizes take ten times as long, and there are many sizes.
_STRETCH_SECONDS = 0.05
_RATIO_TICKS = (0.5, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50)


@dataclass(frozen=True)
class Axis:
    """A size of a network or a batch, and its values.

    Attributes:
        title: Title of its plot.
        label: Label of the sizes.
        sizes: Sizes, ascending.
        workload: Function from a size to a workload.
    """

    title: str
    label: str
    sizes: tuple[int, ...]
    workload: Callable[[int], Workload]

    @property
    def middle(self) -> int:
        """Size that the largest one is compared with."""
        return self.sizes[len(self.sizes) // 2]


def _layers(width: int, count: int) -> nn.Module:
    return nn.Sequential(*(layer for _ in range(count) for layer in _layer(width)))


def _layer(width: int) -> tuple[nn.Module, nn.Module]:
    linear = nn.Linear(width, width)
    nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")  # Else 1,000 layers return zeros.
    return linear, nn.ReLU()


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lstm(x)[0]
        return result


def _mean_square(result: Tensor, _: tuple[Tensor, ...]) -> Tensor:
    return result.square().mean()


def _sized(
    make: Callable[[int], nn.Module], shape: Callable[[int], Sequence[int]], size: int
) -> Workload:
    """Return the workload of a size, with a batch of noise."""
    return Workload(
        str(size), partial(make, size), lambda: (torch.randn(*shape(size)),), _mean_square
    )


def _convolutions(_: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(32, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 32, 5, padding=2)
    )


def _attention(_: int) -> nn.Module:
    return nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0)


#: Axes by the name that rows and the command line use.
AXES: dict[str, Axis] = {
    "depth": Axis(
        "depth: layers of 64 units",
        "layers",
        (10, 30, 100, 300, 1000),
        partial(_sized, partial(_layers, 64), lambda size: (32, 64)),
    ),
    "width": Axis(
        "width: three layers",
        "width",
        (64, 128, 256, 512, 1024, 2048),
        partial(_sized, lambda size: _layers(size, 3), lambda size: (32, size)),
    ),
    "parameters": Axis(
        "parameters: layers of 1,024 units",
        "million parameters",
        (1, 5, 10, 20, 50),
        partial(_sized, partial(_layers, 1024), lambda size: (32, 1024)),
    ),
    "lstm": Axis(
        "length: LSTM",
        "steps",
        (10, 50, 200, 1000, 5000),
        partial(_sized, lambda _: _Recurrent(), lambda size: (size, 4, 64)),
    ),
    "convolution": Axis(
        "length: two convolutions",
        "steps",
        (10, 50, 200, 1000, 5000),
        partial(_sized, _convolutions, lambda size: (4, 32, size)),
    ),
    "attention": Axis(
        "length: Transformer layer",
        "steps",
        (10, 50, 200, 600, 2000),
        partial(_sized, _attention, lambda size: (size, 1, 32)),
    ),
}
#: Names of the command line: the axes and the large module.
NAMES = (*AXES, MODULE)


def training_step(name: str, size: str, variant: str, *, device: torch.device) -> Step:
    """Make a training step by the names that rows use."""
    return VARIANTS[variant].step(AXES[name].workload(int(size)), device)


@dataclass(frozen=True)
class ScaleRun(Run):
    """One size of an axis: float, exact and fast side by side.

    Attributes:
        axis: A key of :data:`AXES`.
        size: Size on it.
        pairs: Number of pairs of steps that are timed.
    """

    axis: str
    size: int
    pairs: int = PAIRS

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one mapping for each fidelity."""
        key = {"axis": self.axis, "size": self.size, "threads": self.threads}
        return [{**key, "fidelity": fidelity} for fidelity in FIDELITIES]

    def rows(self) -> Iterator[Row]:
        """Time the steps and measure their memory."""
        torch.set_num_threads(self.threads or 1)
        device = torch.device("cpu")
        variants = ("float", *FIDELITIES)
        names = [(self.axis, str(self.size), variant) for variant in variants]
        steps = {each[-1]: training_step(*each, device=device) for each in names}
        ratios, float_ms = time_ratios(steps, device, self.pairs, stretch_seconds=_STRETCH_SECONDS)
        steps.clear()
        peaks = peaks_in_process(
            "recipes.benchmark.scale", names, device=device, threads=self.threads
        )
        memory = dict(zip(variants, peaks, strict=True))
        for key in self.keys:
            fidelity = key["fidelity"]
            yield {
                **key,
                "device": machine(device),
                **ratio_columns(ratios[fidelity]),
                "memory_ratio": round(memory[fidelity] / memory["float"], 3),
                "float_ms": round(float_ms, 3),
                "float_bytes": memory["float"],
                "peak_bytes": memory[fidelity],
                "pairs": self.pairs,
            }


def runs(
    *, axes: Sequence[str] = NAMES, largest: int | None = None, threads: int = 1, pairs: int = PAIRS
) -> list[Run]:
    """List the grid: every size of every axis, then the large module."""
    sizes: list[Run] = [
        ScaleRun(name, size, pairs, threads=threads)
        for name, each in AXES.items()
        if name in axes
        for size in each.sizes
        if largest is None or size <= largest
    ]
    stages = [LargeModuleRun(task, threads=threads) for task in large_module.TASKS]
    return [*sizes, *(stages if MODULE in axes else [])]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report: a table of every axis, their growth, and the large module."""
    tables = []
    for name, each in AXES.items():
        if has_row(rows, axis=name):
            tables += [f"{_sentence(each.title)}.\n", *_table(rows, name), ""]
    stages = select(rows, axis=MODULE)
    return {
        "preset": PRESET,
        "target": GROWTH_TARGET,
        "axes": tables,
        "growth": growth(rows),
        "devices": ", ".join(dict.fromkeys(f"{row['device']}" for row in rows)),
        "parameters": f"{stages[0]['parameters'] / 1e6:.1f}" if stages else "50",
        "stages": _stages(stages),
    }


def growth(rows: Sequence[Row]) -> list[str]:
    """Compare the ratio at the largest size of every axis with the one at its middle size."""
    lines = []
    for name, each in AXES.items():
        for metric, title in (("time_ratio", "time"), ("memory_ratio", "memory")):
            by_fidelity = {
                fidelity: _growth(rows, name, fidelity, metric) for fidelity in FIDELITIES
            }
            grown = {key: value for key, value in by_fidelity.items() if value is not None}
            if grown:
                numbers = ", ".join(f"{key} {value:.2f}" for key, value in grown.items())
                lines.append(
                    f"- {_sentence(each.title)}, {title} at {_size(name, each.sizes[-1])} over "
                    f"{_size(name, each.middle)}: {numbers}, "
                    f"{met(max(grown.values()) <= GROWTH_TARGET)} (at most {GROWTH_TARGET})."
                )
    return lines


def _growth(rows: Sequence[Row], name: str, fidelity: str, metric: str) -> float | None:
    """Return the ratio at the largest size over the one at the middle size, if both are there."""
    by_size = {row["size"]: row[metric] for row in select(rows, axis=name, fidelity=fidelity)}
    middle, largest = AXES[name].middle, AXES[name].sizes[-1]
    if not {middle, largest} <= by_size.keys():
        return None
    return float(by_size[largest] / by_size[middle])


def _sentence(title: str) -> str:
    return title[:1].upper() + title[1:]  # str.capitalize makes an Lstm of an LSTM.


def _size(name: str, size: int) -> str:
    label = AXES[name].label
    return f"{label} {size:,}" if label == "width" else f"{size:,} {label}"


def _table(rows: Sequence[Row], name: str) -> list[str]:
    columns = [AXES[name].label, "float, ms", "exact", "fast", "float, MB", "exact", "fast"]
    lines = ruled(columns)
    for size in AXES[name].sizes:
        by_fidelity = {row["fidelity"]: row for row in select(rows, axis=name, size=size)}
        if by_fidelity.keys() >= set(FIDELITIES):
            base, both = by_fidelity["exact"], [by_fidelity[each] for each in FIDELITIES]
            lines.append(
                line(
                    f"{size:,}",
                    f"{base['float_ms']:.2f}",
                    *map(time_with_range, both),
                    f"{base['float_bytes'] / 1e6:.1f}",
                    *(f"{row['memory_ratio']:.2f}" for row in both),
                )
            )
    return lines


def _stages(rows: Sequence[Row]) -> list[str]:
    lines = []
    for stage, title in STAGES.items():
        for row in select(rows, stage=stage):
            lines.append(
                line(
                    title,
                    f"{row['seconds']:.2f} s",
                    f"{row['time_ratio']:.1f}",
                    f"{row['peak_bytes'] / 1e6:.0f} MB",
                    f"{row['memory_ratio']:.2f}",
                )
            )
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the ratios against the size: time in the upper row, memory in the lower one."""
    metrics = {"time_ratio": "time over float", "memory_ratio": "peak memory over float"}
    measured = {name: each for name, each in AXES.items() if has_row(rows, axis=name)}
    if not measured:
        return
    with saved_figure(path, (1.0 + 2.4 * len(measured), 5.4), font_size=8.5) as figure:
        panels = figure.subplots(len(metrics), len(measured), sharey="row", squeeze=False)
        for across, (metric, label) in zip(panels, metrics.items(), strict=True):
            for panel, (name, each) in zip(across, measured.items(), strict=True):
                _plot_panel(panel, select(rows, axis=name), metric)
                panel.set_xscale("log")
                panel.set_xticks(each.sizes, [f"{size:,}" for size in each.sizes])
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.set_xlabel(each.label)
                if metric == "time_ratio":
                    panel.set_title(each.title.replace(": ", "\n"), fontsize=8.5)
            across[0].set_ylabel(label)
        panels[0][0].legend(frameon=False)


def _plot_panel(panel: Axes, rows: Sequence[Row], metric: str) -> None:
    for fidelity in FIDELITIES:
        points: list[Row] = sorted(
            select(rows, fidelity=fidelity), key=lambda row: int(row["size"])
        )
        sizes, values = [row["size"] for row in points], [row[metric] for row in points]
        (curve,) = panel.plot(sizes, values, marker="o", ms=4, label=fidelity)
        if metric == "time_ratio":
            low, high = ([row[f"{metric}_{end}"] for row in points] for end in ("low", "high"))
            panel.fill_between(sizes, low, high, color=curve.get_color(), alpha=0.2, lw=0)
    panel.axhline(1.0, color="black", lw=0.8, ls=":")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(FixedLocator(_RATIO_TICKS))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "axes": axis(NAMES),
    "largest": {"type": int, "help": "largest size of an axis; all by default"},
    "threads": threads_option(),
    "pairs": {"type": int, "default": PAIRS, "help": "pairs of steps that are timed"},
}
STUDY = Study(name="scale", runs=runs, report=report, plot=plot, options=OPTIONS)

if __name__ == "__main__":
    STUDY.main()
