"""The page of ``recipes.benchmark.compression``: tables, verdicts and figure, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_nna.files import write_whole
from recipes.benchmark.an4 import percent
from recipes.benchmark.rows import Row, read_rows, spread

#: Methods that the figure compares.
_COMPARED = ("rtn", "lloyd", "ste", "lsq", "parq", "s8bqat", "gq")


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
        _mean_line(rows, method, bits, title)
        for method, title in titles.items()
        for bits in _widths(rows, method)
    ]
    each = [_line(row, titles) for row in sorted(rows, key=_order(titles))]
    commands = [row["command"] for row in rows]
    lines = [_HEAD, *means, "", _VERDICTS, *verdicts(rows), _EACH, *each, _FOOT, *commands]
    return "\n".join([*lines, "```", ""])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Each target, and whether it is met on the seeds that are there."""
    lines = []
    for method, name in (("s8bqat", "S8BQAT"), ("gq", "GQ")):
        pairs = _paired(rows, (method, 5), ("float", 32))
        if pairs:
            difference, error = _difference(pairs)
            mean = fmean(theirs for _, theirs in pairs)
            lines.append(
                f"- {name} at 5 bits no worse than float in loss: {difference / mean:+.1%} ± "
                f"{error / mean:.1%} over {len(pairs)} seed(s), {_verdict(difference, error)}."
            )
    for bits in (4, 3, 2):
        others = {
            method: _paired(rows, ("gq", bits), (method, bits))
            for method in _COMPARED
            if method != "gq" and _paired(rows, ("gq", bits), (method, bits))
        }
        if not others:
            continue
        # The other that is hardest to beat, on the seeds that both have.
        rival = max(others, key=lambda method: _difference(others[method])[0])
        difference, error = _difference(others[rival])
        lines.append(
            f"- GQ best or tied at {bits} bits: {difference:+.4f} ± {error:.4f} nats per label "
            f"against the best other ({rival}) over {len(others[rival])} seed(s), "
            f"{_verdict(difference, error)}."
        )
    if pairs := _paired(rows, ("gq", 2), ("float", 32)):
        against = _paired(rows, ("lsq", 2), ("float", 32))
        mine, theirs = _relative(pairs), _relative(against) if against else float("nan")
        # Where LSQ loses nothing, GQ must lose nothing either, and be no worse.
        met = mine <= 0.5 * theirs if theirs > 0 else mine <= theirs
        lines.append(
            f"- At 2 bits at most half of LSQ's increase of the loss: GQ {mine:+.1%}, LSQ "
            f"{theirs:+.1%}, {_word(met)}."
        )
    for method in ("gq", "s8bqat"):
        mixed = [row for row in _of(rows, method, "mixed") if row["one_bit_tensors"]]
        floats = {row["seed"]: row["wer"] for row in _of(rows, "float", 32)}
        mixed = [row for row in mixed if row["seed"] in floats]
        if mixed:
            change = sum(row["wer"] - floats[row["seed"]] for row in mixed) / len(mixed)
            width = max(row["mean_bits"] for row in mixed)
            lines.append(
                f"- A mixed allocation with 1-bit tensors, mean at most 4 bits, without loss of "
                f"WER ({method}): {width:.2f} bits, {100 * change:+.1f} points over {len(mixed)} "
                f"seed(s), {_word(change <= 0 and width <= 4)}."
            )
    return lines


def draw(rows: Sequence[Row], titles: Mapping[str, str], path: Path) -> None:
    """Plot the loss over the width: lines are means over seeds, dots the seeds."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for method in _COMPARED:
            widths = sorted(bits for bits in _widths(rows, method) if isinstance(bits, int))
            if not widths:
                continue
            losses = [_loss(rows, method, bits) for bits in widths]
            (line,) = axes.plot(widths, losses, marker="o", ms=4, label=titles[method])
            dots = [(b, row["loss_per_token"]) for b in widths for row in _of(rows, method, b)]
            places, heights = zip(*dots, strict=True)
            axes.scatter(places, heights, color=line.get_color(), s=6, alpha=0.5)
        for method, style in (("float", "-"), ("nna8", "--")):
            for bits in _widths(rows, method)[:1]:
                level = _loss(rows, method, bits)
                axes.axhline(level, color="black", lw=1, ls=style, label=titles[method])
        axes.set_xlabel("bits of a weight")
        axes.set_ylabel("nats per label on AN4 test")
        axes.set_yscale("log")
        axes.set_xticks([2, 3, 4, 5])
        axes.legend(frameon=False, fontsize=8, ncols=2)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _of(rows: Sequence[Row], method: str, bits: int | str) -> list[Row]:
    return [row for row in rows if (row["method"], row["bits"]) == (method, bits)]


def _widths(rows: Sequence[Row], method: str) -> list[int | str]:
    found = {row["bits"] for row in rows if row["method"] == method}
    return sorted(found, key=lambda bits: -bits if isinstance(bits, int) else 0)


def _loss(rows: Sequence[Row], method: str, bits: int | str) -> float:
    return spread(row["loss_per_token"] for row in _of(rows, method, bits))[0]


def _paired(
    rows: Sequence[Row], mine: tuple[str, int], theirs: tuple[str, int]
) -> list[tuple[float, float]]:
    """Losses of two methods on the seeds that both have."""
    reference = {row["seed"]: row["loss_per_token"] for row in _of(rows, *theirs)}
    return [
        (row["loss_per_token"], reference[row["seed"]])
        for row in _of(rows, *mine)
        if row["seed"] in reference
    ]


def _difference(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of the differences by seed, and its standard error; 0 for a single seed."""
    differences = [mine - theirs for mine, theirs in pairs]
    error = stdev(differences) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
    return fmean(differences), error


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(mine for mine, _ in pairs) / sum(theirs for _, theirs in pairs) - 1


def _verdict(difference: float, error: float) -> str:
    return "met" if difference <= 0 else "tied" if difference <= error else "missed"


def _word(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _mean_line(rows: Sequence[Row], method: str, bits: int | str, title: str) -> str:
    here = _of(rows, method, bits)
    rate, least, greatest = spread(row["wer"] for row in here)
    size = spread(row["packed_bytes"] for row in here)[0]
    pairs = [
        (row["loss_per_token"], reference["loss_per_token"])
        for row in here
        for reference in _of(rows, "float", 32)
        if reference["seed"] == row["seed"]
    ]
    against = f"{_relative(pairs):+.1%}" if pairs and method != "float" else "-"
    return (
        f"| {title} | {_bits(here[0])} | {len(here)} | {percent(rate)} | {percent(least)} to "
        f"{percent(greatest)} | {_loss(rows, method, bits):.4f} | {against} | "
        f"{size / 1e6:.3f} MB |"
    )


def _bits(row: Row) -> str:
    return f"mixed, {row['mean_bits']:.2f}" if row["bits"] == "mixed" else str(row["bits"])


def _line(row: Row, titles: Mapping[str, str]) -> str:
    minutes = "-" if row["train_seconds"] is None else f"{row['train_seconds'] / 60:.1f} min"
    return (
        f"| {titles[row['method']]} | {_bits(row)} | {row['seed']} | {percent(row['wer'])} | "
        f"{percent(row['wer_low'])} to {percent(row['wer_high'])} | {row['loss_per_token']:.4f} | "
        f"{minutes} |"
    )


def _order(titles: Mapping[str, str]) -> Callable[[Row], tuple[int, float, int]]:
    """The order of the tables: by method, width and seed."""
    places = {method: at for at, method in enumerate(titles)}

    def key(row: Row) -> tuple[int, float, int]:
        width = -row["bits"] if isinstance(row["bits"], int) else 0.0
        return places[row["method"]], width, row["seed"]

    return key


_HEAD = """# Weights of few bits on AN4

Generated by `python -m recipes.benchmark.compression` from `compression.jsonl`.

The RNN-T of [AN4](an4.md), from the same float weights of each seed, with every weight of its
LSTMs, linear layers and embedding in so many bits; vectors (biases) stay as they are. All rows but
those of float are on the 8-bit chip. What is trained is trained for 1442 steps, 4.3 minutes of a
core where two runs share the machine, in fast fidelity, with the settings of
`experiment=an4_rnnt_finetune` and the same data in the same order for every method; everything is
scored in exact fidelity, greedily. *Rounded* is without training. *Against float* compares the mean
loss with that of the same seeds before training.

On this corpus the loss says more than damage: the float model is over-confident on new speakers,
and coarse weights act as a regulariser, so that some methods of few bits are better than float. The
same method differs by several per cent from seed to seed, so compare means over seeds.

`compression_short.jsonl` has an earlier grid with one epoch at a learning rate of 1e-3, chosen on
the validation speakers, whose loss turned out to say little there (two runs of GQ whose centroids
differed from the third decimal on were a tenth apart), and a mixed allocation of 3 bits chosen for
each seed by itself: 17.0 % of words wrong, float 16.8 %.

![Loss by bits of a weight](compression.png)

| method | bits | seeds | WER | range | nats per label | against float | packed |
|---|---|---|---|---|---|---|---|"""

_VERDICTS = """What the project asked of itself, on the seeds that are in the table. Two methods are
*tied* where their mean difference by seed is within its standard error.
"""

_EACH = """
The interval of each run is the 95 % bootstrap over utterances.

| method | bits | seed | WER | interval | nats per label | training |
|---|---|---|---|---|---|---|"""

_FOOT = """
The commands, in the order in which they finished:

```bash"""
