"""Show what the project is for, in a few minutes: one recognizer of speech in seven forms.

    python -m recipes.demo                  # or make demo
    python -m recipes.demo --from-scratch   # or make demo FROM_SCRATCH=1

Starts from a float recognizer of spoken commands that the checkout has, or trains it first. It is
scored in float, in the 8 bits of an accelerator, on a chip with 4-bit weights before and after
training for it, and compressed by the General Quantizer and by compressed-sensing pruning. Every
network is exported: its programs run on TFLite-Micro and on LiteRT, their outputs are compared with
the emulation's, and Arm's compiler estimates memory and time. Networks are made side by side, one
on each core. Everything is written into ``runs/demo``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_nna.files import whole_file, write_whole
from recipes.demo_networks import (
    NETWORKS,
    SCALE,
    SHOWN,
    START,
    Scale,
    checkpoint,
    compile_kernels,
    measure,
    prepare_data,
    train_float,
    work_of,
)
from recipes.run_folder import sole_run
from recipes.side_by_side import Job, JobError, side_by_side
from recipes.sweep_table import front

FOLDER = Path("runs/demo")
_PREPARED = {
    "data": "speech is synthesized",
    "kernels": "kernels are compiled for this processor",
    "float training": "float recognizer is trained",
}
_RESULTS = "results.json"
_BEFORE = "before"
# A worker takes a gigabyte and more.
_MOST_WORKERS = 4
# Of the progress bar, in training steps that take as long.
_DATA_WORK, _FLOAT_STEPS = 300.0, 16_192.0


def main() -> None:
    """Run the demo, and print its table and the paths of what it has written."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the float recognizer first"
    )
    parser.add_argument(
        *("--workers", "-j"), type=int, default=_cores(), help="networks at a time, one core each"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"of the runs ({FOLDER})")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_run(options.folder, setting="--folder"))
        except ValueError as error:
            sys.exit(f"recipes.demo: {error}")
        try:
            _show(options.folder, options.workers, from_scratch=options.from_scratch)
        except JobError as error:
            sys.exit(f"recipes.demo: {error}")
        except KeyboardInterrupt:
            print("\nrecipes.demo: stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


def _show(folder: Path, workers: int, *, from_scratch: bool) -> None:
    """Run the demo, and print what it has measured and written; keep the results before."""
    began = time.monotonic()
    if set_aside(folder):
        print(f"The results of the demo before are in {folder / _BEFORE}.")
    print(announcement(folder, workers, from_scratch=from_scratch), flush=True)
    rows = demo(
        folder,
        workers=workers,
        from_scratch=from_scratch,
        tell=lambda text: print(f"{time.monotonic() - began:4.0f} s  {text}", flush=True),
    )
    shown = folder / SHOWN
    print(f"\n{table(rows)}\n")
    print(f"figure      {folder / 'pareto.png'}")
    print(f"metrics     {folder / _RESULTS}")
    print(f"of the last network ({NETWORKS[SHOWN].title}):")
    print(f"report      {shown / 'deployed' / 'report.html'}")
    print(f"firmware    {shown / 'deployed' / 'firmware'}, for a microcontroller without an NPU")
    print(f"checkpoint  {checkpoint(shown)}")
    print(f"{time.monotonic() - began:.0f} seconds in all")


def set_aside(folder: Path) -> bool:
    """Move the results of the demo before into a folder of their own, in place of older ones.

    Args:
        folder: Folder of the runs.

    Returns:
        Whether there were results. What a demo that did not end has written is removed.
    """
    others = [path for path in folder.iterdir() if path.name not in (".lock", _BEFORE)]
    before = folder / _BEFORE
    is_whole = (folder / _RESULTS).is_file()
    if is_whole:
        shutil.rmtree(before, ignore_errors=True)
        before.mkdir()
    for path in others:
        if is_whole:
            path.rename(before / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return is_whole


def announcement(folder: Path, workers: int, *, from_scratch: bool) -> str:
    """Describe what the demo will do, and how long it takes.

    Args:
        folder: Folder of the runs.
        workers: Number of networks at a time.
        from_scratch: Whether the float recognizer is trained first.

    Example:
        >>> print(announcement(FOLDER, 2, from_scratch=False).splitlines()[0])
        One speech recognizer in 7 forms, 2 at a time.
    """
    start = (
        "The float network is trained first, which takes 7 to 15 minutes."
        if from_scratch
        else f"It starts from float weights of this checkout, {START}\n"
        "(--from-scratch, or make demo FROM_SCRATCH=1, trains them first)."
    )
    return (
        f"One speech recognizer in {len(NETWORKS)} forms, {workers} at a time.\n{start}\n"
        f"The {len(NETWORKS)} networks take 3 to 7 minutes on two idle cores, twice as long on "
        f"one. What their runs print is in {folder}/*/log.txt."
    )


def demo(
    folder: Path,
    *,
    workers: int = 1,
    from_scratch: bool = False,
    scale: Scale = SCALE,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Make, score and deploy the networks; write ``results.json`` and ``pareto.png``.

    Args:
        folder: Folder of the runs.
        workers: Number of networks at a time.
        from_scratch: Whether the float recognizer is trained first.
        scale: Size of data and training.
        tell: Function that gets a line of text whenever a stage is done.

    Returns:
        What was measured of each network, see :func:`.measure`, by the keys of :data:`.NETWORKS`.

    Raises:
        JobError: If a stage fails.
    """
    start = checkpoint(folder / "float_training") if from_scratch else START
    preparations = [
        Job("data", prepare_data, (scale,), folder / "data" / "log.txt", _DATA_WORK),
        # Else each worker compiles them, beside the other.
        Job("kernels", compile_kernels, (), folder / "kernels" / "log.txt", _DATA_WORK),
    ]
    if from_scratch:
        run_dir = folder / "float_training"
        job = Job(
            "float training", train_float, (run_dir, scale), run_dir / "log.txt", _FLOAT_STEPS
        )
        preparations.append(job)
    for name, _ in side_by_side(preparations, workers=workers):
        tell(_PREPARED[name])
    jobs = [
        Job(
            name,
            measure,
            (name, start, folder / name, scale),
            folder / name / "log.txt",
            work_of(name, scale),
        )
        for name in NETWORKS
    ]
    # The longest first, so that no core is idle at the end.
    jobs.sort(key=lambda job: -job.work)
    rows = {}
    for name, row in side_by_side(jobs, workers=workers):
        rows[name] = row
        tell(f"{row['title']}: {_percent(row['wer'])} of the words wrong")
    rows = {name: rows[name] for name in NETWORKS}
    draw(rows, folder / "pareto.png")
    write_whole(folder / _RESULTS, json.dumps(rows, indent=2) + "\n")
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Format what was measured as text, with a paragraph that explains the columns.

    Args:
        rows: Rows of :func:`.measure` by name; the first has the most words.
    """
    runtimes = list(next((row["runtimes"] for row in rows.values() if row["runtimes"]), {}))
    head = f"{'':<28}{'WER':>7}{'95 % interval':>16}{'weights':>11}{'memory':>10}{'time':>9}"
    lines = [head + "".join(f"  {name}" for name in runtimes)]
    for row in rows.values():
        interval = f"{100 * row['wer_low']:.1f} - {_percent(row['wer_high'])}"
        memory, milliseconds = row["memory_bytes"], row["inference_ms"]
        lines.append(
            f"{row['title']:<28}{_percent(row['wer']):>7}{interval:>16}"
            f"{_kibibytes(row['packed_bytes']):>11}{_kibibytes(memory):>10}"
            f"{'-' if milliseconds is None else f'{milliseconds:.1f} ms':>9}"
            + "".join(f"  {_equality(row['runtimes'].get(name)):>{len(name)}}" for name in runtimes)
        )
    return "\n".join([*lines, "", explanation(rows)])


def explanation(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Explain the columns of the table, and count the outputs that were compared.

    Args:
        rows: Rows of :func:`.measure` by name.
    """
    words = max(row["words"] for row in rows.values())
    compared: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows.values():
        for name, each in row["runtimes"].items():
            compared.setdefault(name, []).append(each)
    utterances = max((each["utterances"] for part in compared.values() for each in part), default=0)
    counts = [
        f"{name} {sum(each['equal_outputs'] for each in part):,} of "
        f"{sum(each['outputs'] for each in part):,}"
        for name, part in compared.items()
    ]
    return (
        f"WER: word error rate on {words:,} words of unseen voices. weights: in a packed file. "
        "memory, and time for a\nsecond of speech: estimates of Arm's compiler for an Ethos-U55 "
        "with 128 MACs. Each network was\nexported for both runtimes, and the outputs of its "
        f"programs for {utterances} utterances compared with\nthe emulation's, bit by bit. "
        f"Equal outputs: {'; '.join(counts)}."
    )


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot the word error rates over the memory of the device, with intervals and Pareto front.

    Args:
        rows: Rows of :func:`.measure` by name.
        path: PNG file.
    """
    size, label = "memory_bytes", "memory on an Ethos-U55, KiB"
    deployed = [row for row in rows.values() if row["runtimes"]]
    if any(row[size] is None for row in deployed):  # Without Vela.
        size, label = "packed_bytes", "packed weights, KiB"
    sizes = [row[size] / 1024 for row in deployed]
    rates = [100 * row["wer"] for row in deployed]
    below = [100 * (row["wer"] - row["wer_low"]) for row in deployed]
    above = [100 * (row["wer_high"] - row["wer"]) for row in deployed]
    best = front(list(zip(sizes, rates, strict=True)))
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        for row in rows.values():
            if not row["runtimes"]:
                text = f"{row['title']}, {row['packed_bytes'] / 1024:,.0f} KiB of weights"
                axes.axhline(100 * row["wer"], color="black", lw=1, ls="--", label=text)
        axes.errorbar(sizes, rates, yerr=[below, above], fmt="o", color="#9aa7b4", capsize=3)
        on_front = [sizes[index] for index in best], [rates[index] for index in best]
        axes.plot(*on_front, "o-", color="#b8442c", label="no other network beats it", zorder=3)
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        for row, x, y in zip(deployed, sizes, rates, strict=True):
            axes.annotate(
                row["title"], (x, y), xytext=(7, 5), textcoords="offset points", bbox=behind
            )
        axes.set_xlabel(label)
        axes.set_ylabel("word error rate, %")
        axes.set_xlim(0, 1.3 * max(sizes))
        axes.legend(frameon=False)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format="png")


def _equality(runtime: Mapping[str, Any] | None) -> str:
    """Say whether all outputs are equal.

    Example:
        >>> _equality({"outputs": 4000, "equal_outputs": 4000}), _equality(None)
        ('equal', '-')
        >>> _equality({"outputs": 4000, "equal_outputs": 3999})
        'DIFFERS'
    """
    if runtime is None:
        return "-"
    return "equal" if runtime["equal_outputs"] == runtime["outputs"] else "DIFFERS"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _kibibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1024:,.0f} KiB"


def _cores() -> int:
    """Return the number of cores that this process may use, up to four."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it.
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


if __name__ == "__main__":
    main()
