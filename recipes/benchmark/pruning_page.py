"""The page of ``recipes.benchmark.pruning``: tables, verdicts and figure, from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_nna.files import write_whole
from recipes.benchmark.an4 import percent
from recipes.benchmark.rows import Row, read_rows, spread

#: What CSP is compared with.
BASELINES = ("csp_identity", "csp_random", "gmp", "l1", "lottery", "random", "model_pruning")


def write_page(rows_path: Path, titles: Mapping[str, str]) -> None:
    """Generate the page and its figure beside the rows.

    Args:
        rows_path: The rows.
        titles: What tables call each method, in their order.
    """
    rows = read_rows(rows_path)
    draw(rows, titles, rows_path.with_suffix(".png"))
    write_whole(rows_path.with_suffix(".md"), page(rows, titles))


def page(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """The page as Markdown."""
    means = [
        _mean_line(rows, method, sparsity, title)
        for method, title in titles.items()
        for sparsity in _sparsities(rows, method)
    ]
    each = [
        f"| {titles[row['method']]} | {row['sparsity']:.0%} | {row['seed']} | "
        f"{percent(row['wer'])} | {percent(row['wer_low'])} to {percent(row['wer_high'])} | "
        f"{row['loss_per_token']:.4f} |"
        for method in titles
        for row in sorted(rows, key=lambda row: (row["sparsity"], row["seed"]))
        if row["method"] == method
    ]
    commands = [row["command"] for row in rows]
    lines = [_HEAD, *means, "", _VERDICTS, *verdicts(rows, titles), _EACH, *each, _FOOT, *commands]
    return "\n".join([*lines, "```", ""])


def verdicts(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """Each target, and whether it is met on the seeds that are there."""
    lines = []
    for sparsity in _sparsities(rows, "csp"):
        others = {
            method: found
            for method in BASELINES
            if (found := paired(rows, ("csp", sparsity), (method, sparsity)))
        }
        if not others:
            continue
        rival = max(others, key=lambda method: difference(others[method])[0])
        change, error = difference(others[rival])
        word = "met" if change <= 0 else "tied" if change <= error else "missed"
        lines.append(
            f"- CSP no worse than every baseline at {sparsity:.0%}: {change:+.4f} ± {error:.4f} "
            f"nats per label against the best of them ({titles[rival]}) over "
            f"{len(others[rival])} seed(s), {word}."
        )
    if pairs := paired(rows, ("csp", 0.7), ("float", 0.0)):
        change = sum(mine for mine, _ in pairs) / sum(theirs for _, theirs in pairs) - 1
        word = "met" if change <= 0 else "missed"
        lines.append(
            f"- 70 % of zeros without loss of accuracy: {change:+.1%} of the float loss over "
            f"{len(pairs)} seed(s), {word}."
        )
    return lines


def draw(rows: Sequence[Row], titles: Mapping[str, str], path: Path) -> None:
    """Plot the loss over the share of zeros: lines are means over seeds, dots the seeds."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for method in ("csp", *BASELINES):
            places = _sparsities(rows, method)
            if not places:
                continue
            losses = [_loss(rows, method, sparsity) for sparsity in places]
            shown = [100 * sparsity for sparsity in places]
            (line,) = axes.plot(shown, losses, marker="o", ms=4, label=titles[method])
            for sparsity in places:
                dots = [row["loss_per_token"] for row in _of(rows, method, sparsity)]
                axes.scatter([100 * sparsity] * len(dots), dots, color=line.get_color(), s=6)
        for method, style in (("float", "-"), ("nna8", "--")):
            if _of(rows, method, 0.0):
                level = _loss(rows, method, 0.0)
                axes.axhline(level, color="black", lw=1, ls=style, label=titles[method])
        axes.set_xlabel("zero weights in per cent")
        axes.set_ylabel("nats per label on AN4 test")
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8, ncols=2)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def paired(
    rows: Sequence[Row], mine: tuple[str, float], theirs: tuple[str, float]
) -> list[tuple[float, float]]:
    """Losses of two methods on the seeds that both have."""
    reference = {row["seed"]: row["loss_per_token"] for row in _of(rows, *theirs)}
    return [
        (row["loss_per_token"], reference[row["seed"]])
        for row in _of(rows, *mine)
        if row["seed"] in reference
    ]


def difference(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of the differences by seed, and its standard error; 0 for a single seed."""
    differences = [mine - theirs for mine, theirs in pairs]
    error = stdev(differences) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
    return fmean(differences), error


def _of(rows: Sequence[Row], method: str, sparsity: float) -> list[Row]:
    return [row for row in rows if (row["method"], row["sparsity"]) == (method, sparsity)]


def _sparsities(rows: Sequence[Row], method: str) -> list[float]:
    return sorted({row["sparsity"] for row in rows if row["method"] == method})


def _loss(rows: Sequence[Row], method: str, sparsity: float) -> float:
    return spread(row["loss_per_token"] for row in _of(rows, method, sparsity))[0]


def _mean_line(rows: Sequence[Row], method: str, sparsity: float, title: str) -> str:
    here = _of(rows, method, sparsity)
    rate, least, greatest = spread(row["wer"] for row in here)
    pairs = paired(rows, (method, sparsity), ("float", 0.0))
    change = sum(a for a, _ in pairs) / sum(b for _, b in pairs) - 1 if pairs else 0.0
    against = f"{change:+.1%}" if pairs and method != "float" else "-"
    zeros = spread(row["zeros"] for row in here)[0]
    size = spread(row["packed_bytes"] for row in here)[0]
    return (
        f"| {title} | {sparsity:.0%} | {zeros:.1%} | {len(here)} | {percent(rate)} | "
        f"{percent(least)} to {percent(greatest)} | {_loss(rows, method, sparsity):.4f} | "
        f"{against} | {size / 1e6:.3f} MB |"
    )


_HEAD = """# Pruning on AN4

Generated by `python -m recipes.benchmark.pruning` from `pruning.jsonl`.

The RNN-T of [AN4](an4.md), from the same float weights of each seed, with so many of the weights of
its LSTMs, linear layers and embedding zero, each tensor alike. Start, budget, data and scoring are
those of [Weights of few bits](compression.md); all rows but float are on the 8-bit chip. *Zeros* is
what was reached in the weights that a method prunes: Lightning's `ModelPruning` leaves LSTMs dense.

![Loss by share of zeros](pruning.png)

| method | wanted | zeros | seeds | WER | range | nats per label | against float | packed |
|---|---|---|---|---|---|---|---|---|"""

_VERDICTS = """What the project asked of itself, on the seeds that are in the table. Two methods are
*tied* where their mean difference by seed is within its standard error.
"""

_EACH = """
The interval of each run is the 95 % bootstrap over utterances.

| method | wanted | seed | WER | interval | nats per label |
|---|---|---|---|---|---|"""

_FOOT = """
The commands, in the order in which they finished:

```bash"""
