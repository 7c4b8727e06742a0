"""What training on the chip costs, beside float and beside other libraries.

    python -m recipes.benchmark.emulation               # what is missing, then the page
    python -m recipes.benchmark.emulation --page-only   # the page from the rows that are there

A figure is the ratio of two training steps (forward, backward and the optimizer's step) that were
timed one right after the other, the variant's and the float network's: the median over pairs.
Memory is the peak of a process of its own, above what it had before the network was made a second
time: what libraries load and compile at their first use does not count.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lightning_nna.files import write_whole
from recipes.benchmark.memory import peak_bytes, peak_in_process
from recipes.benchmark.rows import Row, append_row, has_row, read_rows
from recipes.benchmark.variants import VARIANTS, NotPossibleError
from recipes.benchmark.works import WORKS
from recipes.run_folder import command_line, git_commit

ROWS = Path("docs/results/emulation.jsonl")
PAIRS = 15
#: What the project asks of itself: ratio of time for each fidelity, and of memory.
TARGETS = {"fast": 1.5, "exact": 2.0}
MEMORY_TARGET = 1.5
# Steps are repeated until a timed stretch takes this long.
_STRETCH_SECONDS = 0.15

Step = Callable[[], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--works", nargs="*", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--memory-of", nargs=2, metavar=("WORK", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.memory_of:
        work, variant = options.memory_of
        print(peak_bytes(lambda: VARIANTS[variant].step(WORKS[work], device), device))
        return
    if not options.page_only:
        for work in options.works:
            measure(work, device, threads=options.threads, pairs=options.pairs)
    write_whole(ROWS.with_suffix(".md"), page(read_rows(ROWS)))


def measure(work: str, device: torch.device, *, threads: int, pairs: int) -> None:
    """Append the rows of a network that are missing on this machine; all are timed side by side."""
    name = machine(device)
    key = {"work": work, "device": name, "threads": threads}
    if all(has_row(read_rows(ROWS), variant=variant, **key) for variant in VARIANTS):
        return
    steps: dict[str, Step] = {}
    reasons: dict[str, str] = {}
    for variant, way in VARIANTS.items():
        try:
            steps[variant] = way.step(WORKS[work], device)
        except NotPossibleError as error:
            reasons[variant] = str(error)
    ratios, float_ms = time_ratios(steps, device, pairs)
    memory = {variant: memory_of(work, variant, device, threads) for variant in steps}
    for variant in VARIANTS:
        if has_row(read_rows(ROWS), variant=variant, **key):
            continue
        row: dict[str, Any] = {
            "command": command_line(),
            "commit": git_commit(),
            **key,
            "variant": variant,
            "fidelity": variant if variant in TARGETS else None,
        }
        if variant in reasons:
            row |= {"time_ratio": None, "memory_ratio": None, "reason": reasons[variant]}
        else:
            found = ratios[variant]
            row |= {
                "time_ratio": round(median(found), 3),
                "time_ratio_low": round(min(found), 3),
                "time_ratio_high": round(max(found), 3),
                "memory_ratio": round(memory[variant] / memory["float"], 3),
                "float_ms": round(float_ms, 2),
                "peak_bytes": memory[variant],
                "pairs": len(found),
            }
        append_row(ROWS, row)


def time_ratios(
    steps: dict[str, Step], device: torch.device, pairs: int
) -> tuple[dict[str, list[float]], float]:
    """Time of every variant over that of float, measured right before it; and float's, in ms."""
    repeats = max(1, int(_STRETCH_SECONDS / seconds(steps["float"], 3, device)))
    ratios: dict[str, list[float]] = {variant: [] for variant in steps}
    floats = []
    for _ in range(pairs):
        for variant, step in steps.items():
            base = seconds(steps["float"], repeats, device)
            ratios[variant].append(seconds(step, repeats, device) / base)
            floats.append(1e3 * base)
    return ratios, median(floats)


def seconds(step: Step, repeats: int, device: torch.device) -> float:
    """Wall time of one step, the mean over some."""
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait_for(device)
    return (time.perf_counter() - start) / repeats


def memory_of(work: str, variant: str, device: torch.device, threads: int) -> int:
    """Peak memory of a step, in bytes, measured in a process of its own."""
    place = ["--device", device.type, "--threads", str(threads)]
    return peak_in_process("recipes.benchmark.emulation", "--memory-of", work, variant, *place)


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    words = Path("/proc/cpuinfo")
    lines = words.read_text().splitlines() if words.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    bytes_too = ", products of bytes" if torch.cpu._is_vnni_supported() else ""
    return f"CPU: {names[0] if names else platform.machine()}{bytes_too}"


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown: a table of time and one of memory for each machine."""
    parts = [_HEAD]
    for device, threads in dict.fromkeys((row["device"], row["threads"]) for row in rows):
        here = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        parts += [
            f"## {device}, {threads} thread(s)\n\nTime of a training step over that of float:\n",
            *_table(here, "time_ratio"),
            "\nPeak memory over that of float:\n",
            *_table(here, "memory_ratio"),
            "",
            *_verdicts(here),
            *_reasons(here),
        ]
    commands = dict.fromkeys(row["command"] for row in rows)
    return "\n".join([*parts, "## Commands\n\n```bash", *commands, "```", ""])


def _table(rows: Sequence[Row], figure: str) -> list[str]:
    works = [work for work in WORKS if has_row(rows, work=work)]
    others = [variant for variant in VARIANTS if variant != "float"]
    unit = "ms" if figure == "time_ratio" else "MB"
    header = f"| work | float, {unit} | " + " | ".join(VARIANTS[v].title for v in others) + " |"
    lines = [header, "|---|---|" + "---|" * len(others)]
    for work in works:
        found = {row["variant"]: row for row in rows if row["work"] == work}
        cells = [_cell(found.get(variant), figure) for variant in others]
        base = found["float"]
        whole = base["float_ms"] if unit == "ms" else base["peak_bytes"] / 1e6
        lines.append(f"| {WORKS[work].title} | {whole:.1f} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: Row | None, figure: str) -> str:
    if row is None or row[figure] is None:
        return "-"
    if figure != "time_ratio":
        return f"{row[figure]:.2f}"
    return f"{row[figure]:.2f} ({row['time_ratio_low']:.2f}-{row['time_ratio_high']:.2f})"


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """Which targets are met, and which are missed by which work."""
    lines = []
    for variant, target in TARGETS.items():
        ours = [row for row in rows if row["variant"] == variant]
        missed = [row for row in ours if row["time_ratio"] > target]
        shown = ", ".join(f"{WORKS[row['work']].title} ({row['time_ratio']:.2f})" for row in missed)
        verdict = f"missed by {shown}" if missed else "met by every work"
        lines.append(f"- Time, {VARIANTS[variant].title}: at most {target}; {verdict}.")
    ours = [row for row in rows if row["variant"] in TARGETS and row["memory_ratio"]]
    missed = [row for row in ours if row["memory_ratio"] > MEMORY_TARGET]
    shown = ", ".join(
        f"{WORKS[row['work']].title}, {row['variant']} ({row['memory_ratio']:.2f})"
        for row in missed
    )
    verdict = f"missed by {shown}" if missed else "met by every work"
    return [*lines, f"- Memory: at most {MEMORY_TARGET}; {verdict}.", ""]


def _reasons(rows: Sequence[Row]) -> list[str]:
    missing = [row for row in rows if row.get("reason")]
    if not missing:
        return []
    lines = [
        f"- {VARIANTS[row['variant']].title}, {WORKS[row['work']].title}: `{row['reason']}`"
        for row in missing
    ]
    return ["What a library could not train:\n", *lines, ""]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_HEAD = """# Cost of emulation

Generated by `python -m recipes.benchmark.emulation` from `emulation.jsonl`.

How long a training step takes, forward, backward and the optimizer's step, when the network runs in
the chip's arithmetic (`litert-int8`), and when other libraries quantize it for training. All
variants of a row run in one process, in turn; every time is divided by that of the float network
measured right before it, and a cell is the median of the ratios, with their range. *Exact* computes
every output bit as the chip does; *fast* may differ by one unit in less than a thousandth of the
outputs.

The libraries do not do the same work. Brevitas replaces linear layers, convolutions, attention and
LSTMs by quantized ones (`layerwise_quantize`); ModelOpt puts quantizers before and into these
(`INT8_DEFAULT_CFG`); torchao quantizes linear layers alone (`QATConfig`, 8 bits both). Each leaves
normalizations, activations, sums and products in float, and none claims the chip's bits; ours runs
every operator as integers. An LSTM in Brevitas is unrolled in Python step by step.
"""


if __name__ == "__main__":
    main()
