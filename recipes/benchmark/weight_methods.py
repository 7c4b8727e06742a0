"""What a training step costs with weights of few bits, beside float weights.

    python -m recipes.benchmark.weight_methods               # what is missing, then the page
    python -m recipes.benchmark.weight_methods --page-only

Times are ratios of steps that were timed one right after the other, as in
``recipes.benchmark.emulation``. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nna.files import write_whole
from lightning_nna.keyed_adam import KeyedAdam
from lightning_nna.quantization.general_quantizer_transform import GeneralQuantizerTransform
from lightning_nna.quantization.mracos import mracos_gradient
from lightning_nna.quantization.uniform import UniformTransform
from lightning_nna.weights.codebook import Codebook, to_grid_units
from lightning_nna.weights.pipeline import WeightTransform, pipeline_of
from recipes.benchmark.dkm import DKMTransform
from recipes.benchmark.emulation import machine, time_ratios
from recipes.benchmark.memory import peak_bytes, peak_in_process
from recipes.benchmark.rows import Row, append_row, has_row, read_rows
from recipes.benchmark.works import WORKS, Work
from recipes.run_folder import command_line, git_commit

ROWS = Path("docs/results/weight_methods.jsonl")
#: The LSTM of the targets, and the speech recognizer.
CASES = ("lstm", "rnnt")
BITS = (2, 5, 8)
PAIRS = 11
#: Of the General Quantizer on the LSTM: time over float, memory beyond float over the weights'.
TIME_TARGET, MEMORY_TARGET = 1.25, 3.0
_COMPRESS_EVERY = 100

Step = Callable[[], None]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        title: In tables.
        attach: Claims a network's weights; returns what is done before the optimizer's step.
    """

    title: str
    attach: Callable[[nn.Module, int], Step]

    def step(self, work: Work, bits: int) -> Step:
        """A function that does one training step of ``work``."""
        torch.manual_seed(0)
        module, batch = work.module().train(), work.batch()
        before_step = self.attach(module, bits)
        pipeline = pipeline_of(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, foreach=False)

        def step() -> None:
            pipeline.substitute("train")
            optimizer.zero_grad()
            work.loss(module(*batch), batch).backward()
            pipeline.restore()
            pipeline.pull_back(module.parameters())
            before_step()
            optimizer.step()

        for _ in range(3):
            step()
        return step


def _with_transforms(
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
            name: transform.centroids if hasattr(transform, "centroids") else transform.scale_log2
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

    return lambda module, bits: _with_transforms(make, module, bits)


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
                pull = mracos_gradient(to_grid_units(weight, book.scales), book.centroids)
                weight.grad.add_(pull, alpha=1e-4)
            if steps % _COMPRESS_EVERY == 0:
                weight.copy_(book.project(weight))

    return before_step


METHODS: dict[str, Method] = {
    "gq": Method("GQ, hard", _gq(True)),
    "gq_soft": Method("GQ, soft", _gq(False)),
    "s8bqat": Method("S8BQAT", _s8bqat),
    "lsq": Method("LSQ", lambda module, bits: _with_transforms(UniformTransform, module, bits)),
    "dkm": Method("DKM", lambda module, bits: _with_transforms(DKMTransform, module, bits)),
}
_FLOAT = Method("float", lambda module, bits: lambda: None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--works", nargs="*", default=list(CASES), choices=list(WORKS))
    parser.add_argument("--bits", nargs="*", type=int, default=list(BITS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        work, name, bits = options.memory_of
        method = METHODS.get(name, _FLOAT)
        print(peak_bytes(lambda: method.step(WORKS[work], int(bits)), torch.device("cpu")))
        return
    if not options.page_only:
        for work in options.works:
            for bits in options.bits:
                measure(work, bits, threads=options.threads, pairs=options.pairs)
    write_whole(ROWS.with_suffix(".md"), page(read_rows(ROWS)))


def measure(work: str, bits: int, *, threads: int, pairs: int) -> None:
    """Append the rows of a network and a width that are missing on this machine."""
    cpu = torch.device("cpu")
    key = {"work": work, "bits": bits, "device": machine(cpu), "threads": threads}
    if all(has_row(read_rows(ROWS), method=name, **key) for name in METHODS):
        return
    steps = {name: method.step(WORKS[work], bits) for name, method in METHODS.items()}
    steps["float"] = _FLOAT.step(WORKS[work], bits)
    ratios, float_ms = time_ratios(steps, cpu, pairs)
    weight_bytes = sum(4 * p.numel() for p in WORKS[work].module().parameters() if p.ndim > 1)
    base = _memory_of(work, "float", bits, threads)
    for name in METHODS:
        if has_row(read_rows(ROWS), method=name, **key):
            continue
        peak = _memory_of(work, name, bits, threads)
        row = {
            "command": command_line(),
            "commit": git_commit(),
            **key,
            "method": name,
            "time_ratio": round(median(ratios[name]), 3),
            "time_ratio_low": round(min(ratios[name]), 3),
            "time_ratio_high": round(max(ratios[name]), 3),
            "memory_over_weights": round((peak - base) / weight_bytes, 2),
            "float_ms": round(float_ms, 2),
            "weight_bytes": weight_bytes,
            "pairs": pairs,
        }
        append_row(ROWS, row)


def _memory_of(work: str, name: str, bits: int, threads: int) -> int:
    asked = ["--memory-of", work, name, str(bits), "--threads", str(threads)]
    return peak_in_process("recipes.benchmark.weight_methods", *asked)


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown: a table of time and one of memory for each machine."""
    parts = [_HEAD]
    for device, threads in dict.fromkeys((row["device"], row["threads"]) for row in rows):
        here = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        parts += [
            f"## {device}, {threads} thread(s)\n\nTime of a training step over that of float:\n",
            *_table(here, _time),
            "\nPeak memory beyond that of float, over the size of the float weights:\n",
            *_table(here, lambda row: f"{row['memory_over_weights']:.2f}"),
            "",
            *verdicts(here),
            "",
        ]
    commands = dict.fromkeys(row["command"] for row in rows)
    return "\n".join([*parts, "## Commands\n\n```bash", *commands, "```", ""])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Whether the targets are met by the General Quantizer on the LSTM."""
    ours = [row for row in rows if row["work"] == "lstm" and row["method"].startswith("gq")]
    if not ours:
        return []
    slowest = max(ours, key=lambda row: row["time_ratio"])
    word = "met" if slowest["time_ratio"] <= TIME_TARGET else "missed"
    lines = [
        f"- Time of GQ on the LSTM, at most {TIME_TARGET}: at worst {slowest['time_ratio']:.2f} "
        f"({METHODS[slowest['method']].title}, {slowest['bits']} bits), {word}."
    ]
    for row in ours:
        if row["bits"] == 8:
            word = "met" if row["memory_over_weights"] <= MEMORY_TARGET else "missed"
            lines.append(
                f"- Memory of {METHODS[row['method']].title} at 8 bits, at most {MEMORY_TARGET:g} "
                f"times the weights: {row['memory_over_weights']:.2f}, {word}."
            )
    return lines


def _table(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[str]:
    titles = " | ".join(method.title for method in METHODS.values())
    lines = [f"| work | bits | float, ms | {titles} |", "|---|---|---|" + "---|" * len(METHODS)]
    for work, bits in dict.fromkeys((row["work"], row["bits"]) for row in rows):
        found = {r["method"]: r for r in rows if (r["work"], r["bits"]) == (work, bits)}
        cells = [cell(found[name]) if name in found else "-" for name in METHODS]
        base = next(iter(found.values()))["float_ms"]
        lines.append(f"| {WORKS[work].title} | {bits} | {base:.1f} | " + " | ".join(cells) + " |")
    return lines


def _time(row: Row) -> str:
    return f"{row['time_ratio']:.2f} ({row['time_ratio_low']:.2f}-{row['time_ratio_high']:.2f})"


_HEAD = """# Cost of weights of few bits

Generated by `python -m recipes.benchmark.weight_methods` from `weight_methods.jsonl`.

How long a training step takes, forward, backward and the optimizer's step (SGD), on a float network
whose weights are trained to few bits. All variants of a row run in one process, in turn; every time
is divided by that of the float network measured right before it, and a cell is the median of the
ratios, with their range. *S8BQAT* is the regularizer's gradient in every step and compression in
every hundredth. *DKM* is its attention of every weight to every centroid, one iteration a step,
with autograd's gradient: what the General Quantizer's soft assignment would cost if it were written
down as it is defined.
"""


if __name__ == "__main__":
    main()
