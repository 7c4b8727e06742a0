"""The page of ``recipes.benchmark.pruning``: tables, verdicts and figure, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes.benchmark.an4 import percent
from recipes.benchmark.fine_tuning_page import (
    INTERVALS,
    VERDICTS,
    Titles,
    against,
    commands,
    difference,
    draw_losses,
    hardest_rival,
    mean_loss,
    paired,
    relative,
    verdict,
)
from recipes.benchmark.rows import Row, select, spread

# Of the share of zeros; what falls short by more is no rival there.
_SHORT = 0.02
#: From this sparsity on CSP is to be clearly better, below it no worse.
CLEAR_FROM = 0.8
#: What CSP is compared with.
BASELINES = ("gmp", "gmp_global", "gmp_global_100", "l1", "lth", "random", "model_pruning")
#: Its own other measurements.
MEASUREMENTS = ("csp_identity", "csp_random")
#: Patterns of zeros, each with its baseline.
PATTERNS = (("csp_2:4", "gmp_2:4"), ("csp_1x16", "gmp_1x16"))


def page(rows: Sequence[Row], titles: Titles) -> str:
    """The page as Markdown."""
    means = [
        _mean_line(rows, method, sparsity, title)
        for method, title in titles.items()
        for sparsity in _sparsities(rows, method)
    ]
    each = [
        f"| {titles[method]} | {row['sparsity']:.0%} | {row['seed']} | {percent(row['wer'])} | "
        f"{percent(row['wer_low'])} to {percent(row['wer_high'])} | {row['loss_per_token']:.4f} |"
        for method in titles
        for row in sorted(
            select(rows, method=method), key=lambda row: (row["sparsity"], row["seed"])
        )
    ]
    lines = [_HEAD, *means, "", VERDICTS, *verdicts(rows, titles), "", INTERVALS, _EACH, *each]
    return "\n".join([*lines, *commands(rows)])


def verdicts(rows: Sequence[Row], titles: Titles) -> list[str]:
    """Each target, and whether it is met on the seeds that are there."""
    lines = []
    for sparsity in _sparsities(rows, "csp"):
        mine = select(rows, method="csp", sparsity=sparsity)
        others = {method: _as_sparse(rows, method, sparsity) for method in BASELINES}
        others = {method: theirs for method, theirs in others.items() if paired(mine, theirs)}
        if others:
            # Who is hardest to beat in loss need not be so in words.
            rival, in_words = (
                hardest_rival({m: paired(mine, theirs, figure) for m, theirs in others.items()})
                for figure in ("loss_per_token", "wer")
            )
            is_clear = sparsity >= CLEAR_FROM
            word = "clearly better than" if is_clear else "no worse than"
            lines.append(
                _judged(
                    f"CSP {word} every baseline at {sparsity:.0%}",
                    mine,
                    others[rival],
                    against=f" against the best of them ({titles[rival]})",
                    words=_words(mine, others[in_words], f" against the best ({titles[in_words]})"),
                    is_clear=is_clear,
                )
            )
        for method in MEASUREMENTS:
            theirs = select(rows, method=method, sparsity=sparsity)
            if paired(mine, theirs):
                claim = f"Measured by activations, CSP is no worse than {titles[method]}"
                lines.append(_judged(f"{claim} at {sparsity:.0%}", mine, theirs))
    for name, rival in PATTERNS:
        for sparsity in _sparsities(rows, name):
            mine, theirs = (select(rows, method=m, sparsity=sparsity) for m in (name, rival))
            if paired(mine, theirs):
                claim = f"{titles[name]}, no worse than {titles[rival]}"
                lines.append(_judged(f"{claim} at {sparsity:.0%}", mine, theirs))
    for method in ("float", "nna8"):
        mine, theirs = select(rows, method="csp", sparsity=0.7), select(rows, method=method)
        if pairs := paired(mine, theirs):
            change, error = difference(pairs)
            lines.append(
                f"- 70 % of zeros without loss of accuracy against {titles[method]}: "
                f"{relative(pairs):+.1%} of the loss over {len(pairs)} seed(s), "
                f"{verdict(change, error)}{_words(mine, theirs)}."
            )
    return lines


def _judged(
    claim: str,
    mine: Sequence[Row],
    theirs: Sequence[Row],
    *,
    against: str = "",
    words: str = "",
    is_clear: bool = False,
) -> str:
    """A claim, the difference in loss, and whether it is met; clearly is by more than its error.

    What is said of words is of the same rows unless ``words`` says something else.
    """
    pairs = paired(mine, theirs)
    change, error = difference(pairs)
    bound = -error if is_clear else 0.0
    return (
        f"- {claim}: {change:+.4f} ± {error:.4f} nats per label{against} over {len(pairs)} "
        f"seed(s), {verdict(change - bound, error - bound)}{words or _words(mine, theirs)}."
    )


def _words(mine: Sequence[Row], theirs: Sequence[Row], against: str = "") -> str:
    """The difference in WER, and its word."""
    change, error = difference(paired(mine, theirs, "wer"))
    return (
        f"; {100 * change:+.1f} ± {100 * error:.1f} points of WER{against}, "
        f"{verdict(change, error)}"
    )


def draw(rows: Sequence[Row], titles: Titles, path: Path) -> None:
    """Plot the loss over the share of zeros."""
    lines = {
        titles[method]: points
        for method in ("csp", *MEASUREMENTS, *BASELINES)
        if (points := [(round(100 * row["zeros"]), row) for row in select(rows, method=method)])
    }
    levels = {
        titles[method]: found
        for method in ("float", "nna8")
        if (found := select(rows, method=method))
    }
    draw_losses(
        path,
        lines=lines,
        levels=levels,
        label="zero weights in per cent",
        places=(50, 70, 80, 90, 95),
    )


def _sparsities(rows: Sequence[Row], method: str) -> list[float]:
    return sorted({row["sparsity"] for row in select(rows, method=method)})


def _as_sparse(rows: Sequence[Row], method: str, sparsity: float) -> list[Row]:
    """Rows that reached the share of zeros that was wanted."""
    here = select(rows, method=method, sparsity=sparsity)
    return [row for row in here if row["zeros"] > sparsity - _SHORT]


def _mean_line(rows: Sequence[Row], method: str, sparsity: float, title: str) -> str:
    here = select(rows, method=method, sparsity=sparsity)
    rate, least, greatest = spread(row["wer"] for row in here)
    change = against(here, select(rows, method="float"))
    zeros = spread(row["zeros"] for row in here)[0]
    size = spread(row["packed_bytes"] for row in here)[0]
    return (
        f"| {title} | {sparsity:.0%} | {zeros:.1%} | {len(here)} | {percent(rate)} | "
        f"{percent(least)} to {percent(greatest)} | {mean_loss(here):.4f} | {change} | "
        f"{size / 1e6:.3f} MB |"
    )


_HEAD = """# Pruning on AN4

Generated by `python -m recipes.benchmark.pruning` from `pruning.jsonl`.

The RNN-T of [AN4](an4.md), seed 1, with so many of the weights of its LSTMs, linear layers and
embedding zero. CSP and magnitude with *one budget* share it among the layers, the others take as
much from each. Start, budget, data and scoring are those of
[Weights of few bits](compression.md), whose dense rows stand here too; all rows but float are on
the 8-bit chip. *Zeros* is what was reached in all matrices of the network: Lightning's
`ModelPruning` leaves LSTMs dense, which are most of them, and is drawn at what it reached.

What CSP does was chosen on the validation speakers, at 80 %, seed 1: nats per label 0.445 with all
layers and errors alike, 0.404 with errors weighed by gradients, 0.325 with one budget as well;
gradual magnitude 0.563. A ramp that ends at 30 % of the run with masks frozen at 50 % gave 0.321,
words 1.6 points worse, and was not adopted: all methods have the same ramp, to 50 %, and freeze at
75 %. All but the lottery ticket choose masks every 50 steps. Every 100 is less work
([what it costs](pruning_cost.md)); on the validation speakers, seeds 1 to 3, with 16 iterations a
recovery instead of ten, it gave 0.421 nats per label instead of 0.384 at 95 %, and 0.350 instead of
0.344 at 90 %, so 50 stayed. Shares of zeros that a method has no row for were not run.

At 50 % the loss says how sure of itself a network is rather than what it hears. Multiplying the
weights and bias of the joint's output of the float network by 0.9, 0.8 and 0.7 changes no word and
gives 0.1618, 0.1546 and 0.1522 nats per label; pruning by magnitude does some of that, and CSP,
which keeps what layers put out, does not. Of the factors 1, 0.8, 0.7 and 0.6, in float, seed 1, the
best give magnitude with each layer alike 0.1573 (at 0.8) and CSP 0.1567 (at 0.7). In words, too,
CSP is not the best at 50 %: magnitude with one budget is.

![Loss by share of zeros](pruning.png)

| method | wanted | zeros | seeds | WER | range | nats per label | against float | packed |
|---|---|---|---|---|---|---|---|---|"""

_EACH = """
| method | wanted | seed | WER | interval | nats per label |
|---|---|---|---|---|---|"""
