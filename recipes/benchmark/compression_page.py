"""The page of ``recipes.benchmark.compression``: tables, verdicts and figure, from its rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from recipes.benchmark.an4 import percent
from recipes.benchmark.fine_tuning import STEPS
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

#: Methods that the figure compares.
_COMPARED = ("rtn", "lloyd", "ste", "lsq", "parq", "s8bqat", "gq")


def page(rows: Sequence[Row], titles: Titles) -> str:
    """The page as Markdown."""
    means = [
        _mean_line(rows, method, bits, title)
        for method, title in titles.items()
        for bits in _widths(rows, method)
    ]
    each = [_line(row, titles) for row in sorted(rows, key=_order(titles))]
    lines = [_HEAD, *means, "", VERDICTS, *verdicts(rows, titles), "", INTERVALS, _EACH, *each]
    return "\n".join([*lines, *commands(rows)])


def verdicts(rows: Sequence[Row], titles: Titles) -> list[str]:
    """Each target, and whether it is met on the seeds that are there."""
    floats = {
        "float, trained on": select(rows, method="float_tuned"),
        "float before training": select(rows, method="float"),
        "8 bits, chip-aware": select(rows, method="nna8"),
    }
    lines = []
    for method, name in (("s8bqat", "S8BQAT"), ("gq", "GQ")):
        for title, reference in floats.items():
            if pairs := paired(select(rows, method=method, bits=5), reference):
                change, error = difference(pairs)
                mean = fmean(theirs for _, theirs in pairs)
                lines.append(
                    f"- {name} at 5 bits no worse in loss than {title}: {change / mean:+.1%} ± "
                    f"{error / mean:.1%} over {len(pairs)} seed(s), {verdict(change, error)}."
                )
    # What the chip saves at 5 bits is to cost no words.
    for method in ("gq", "gq_higher_rate", "gq_rate"):
        reference = floats["8 bits, chip-aware"]
        if pairs := paired(select(rows, method=method, bits=5), reference, "wer"):
            change, error = difference(pairs)
            lines.append(
                f"- {titles[method]} at 5 bits without loss of WER against 8 bits, chip-aware: "
                f"{_points(change, error)} over {len(pairs)} seed(s), {verdict(change, error)}."
            )
    for bits, figure in itertools.product((4, 3, 2), _FIGURES):
        mine = select(rows, method="gq", bits=bits)
        others = {
            method: pairs
            for method in _COMPARED
            if method != "gq"
            and (pairs := paired(mine, select(rows, method=method, bits=bits), figure))
        }
        if others:
            rival = hardest_rival(others)
            change, error = difference(others[rival])
            lines.append(
                f"- GQ best or tied at {bits} bits: {_FIGURES[figure](change, error)} against the "
                f"best other ({titles[rival]}) over {len(others[rival])} seed(s), "
                f"{verdict(change, error)}."
            )
    start = floats["float before training"]
    ours, lsq = (paired(select(rows, method=m, bits=2), start) for m in ("gq", "lsq"))
    if ours and lsq:
        # Where LSQ loses nothing, GQ must lose nothing either, and be no worse.
        bound = relative(lsq) * (0.5 if relative(lsq) > 0 else 1.0)
        lines.append(
            f"- At 2 bits at most half of LSQ's increase of the loss: GQ {relative(ours):+.1%}, "
            f"LSQ {relative(lsq):+.1%}, {verdict(relative(ours) - bound)}."
        )
    mixed = [row for row in select(rows, method="gq") if row["one_bit_tensors"]]
    for place in dict.fromkeys(row["bits"] for row in mixed):
        here = select(mixed, bits=place)
        for title, reference in floats.items():
            if pairs := paired(here, reference, "wer"):
                change, error = difference(pairs)
                width = max(row["mean_bits"] for row in here)
                word = verdict(change, error) if width <= 4 else "missed"
                lines.append(
                    f"- A mixed allocation with 1-bit tensors ({', '.join(_one_bit(here))}), mean "
                    f"at most 4 bits, without loss of WER against {title}: {width:.2f} bits, "
                    f"{_points(change, error)} over {len(pairs)} seed(s), {word}."
                )
    return lines


def _one_bit(rows: Sequence[Row]) -> list[str]:
    return sorted({name for row in rows for name in row["one_bit_tensors"]})


def _nats(change: float, error: float) -> str:
    return f"{change:+.4f} ± {error:.4f} nats per label"


def _points(change: float, error: float) -> str:
    return f"{100 * change:+.1f} ± {100 * error:.1f} points of WER"


#: What methods are compared in, and its words.
_FIGURES = {"loss_per_token": _nats, "wer": _points}


def draw(rows: Sequence[Row], titles: Titles, path: Path) -> None:
    """Plot the loss over the width."""
    lines = {
        titles[method]: points
        for method in _COMPARED
        if (
            points := [
                (r["bits"], r) for r in select(rows, method=method) if isinstance(r["bits"], int)
            ]
        )
    }
    levels = {
        titles[method]: found
        for method in ("float", "float_tuned", "nna8")
        if (found := select(rows, method=method))
    }
    draw_losses(
        path,
        lines=lines,
        levels=levels,
        label="bits of a weight",
        places=(2, 3, 4, 5),
    )


def _widths(rows: Sequence[Row], method: str) -> list[int | str]:
    found = {row["bits"] for row in select(rows, method=method)}
    return sorted(found, key=lambda bits: -bits if isinstance(bits, int) else 0)


def _mean_line(rows: Sequence[Row], method: str, bits: int | str, title: str) -> str:
    here = select(rows, method=method, bits=bits)
    rate, least, greatest = spread(row["wer"] for row in here)
    size = spread(row["packed_bytes"] for row in here)[0]
    before, tuned = (against(here, select(rows, method=m)) for m in ("float", "float_tuned"))
    return (
        f"| {title} | {_bits(here[0])} | {len(here)} | {percent(rate)} | {percent(least)} to "
        f"{percent(greatest)} | {mean_loss(here):.4f} | {before} | {tuned} | {size / 1e6:.3f} MB |"
    )


def _bits(row: Row) -> str:
    if isinstance(row["bits"], int):
        return str(row["bits"])
    return f"mixed, {row['mean_bits']:.2f}" + (", 1 bit too" if row["one_bit_tensors"] else "")


def _line(row: Row, titles: Titles) -> str:
    minutes = "-" if not row["cpu_seconds"] else f"{row['cpu_seconds'] / 60:.1f} min"
    return (
        f"| {titles[row['method']]} | {_bits(row)} | {row['seed']} | {percent(row['wer'])} | "
        f"{percent(row['wer_low'])} to {percent(row['wer_high'])} | {row['loss_per_token']:.4f} | "
        f"{minutes} |"
    )


def _order(titles: Titles) -> Callable[[Row], tuple[int, float, int]]:
    """The order of the tables: by method, width and seed."""
    places = {method: at for at, method in enumerate(titles)}

    def key(row: Row) -> tuple[int, float, int]:
        width = -row["bits"] if isinstance(row["bits"], int) else 0.0
        return places[row["method"]], width, row["seed"]

    return key


_HEAD = f"""# Weights of few bits on AN4

Generated by `python -m recipes.benchmark.compression` from `compression.jsonl`.

The RNN-T of [AN4](an4.md), seed 1, from the weights in `recipes/pretrained`, with every weight of
its LSTMs, linear layers and embedding in so many bits; vectors (biases) stay as they are. All rows
but those of float are on the 8-bit chip. What is trained is trained for {STEPS} steps in fast
fidelity, with the settings of `experiment=an4_rnnt_finetune` and, seed by seed, the same data in
the same order for every method; everything is scored in exact fidelity, greedily. *Rounded* is
without training. *Against float* compares the mean loss with that of the start, *against float,
trained on* with that of the same training in float.

On this corpus the loss says more than damage: the float model is over-confident on new speakers,
so that training it on makes its loss no better, and coarse weights act as a regularizer, most of
all where many of them are zero. So the targets are looked at in word errors, too.

The General Quantizer has the settings of `conf/compression/gq.yaml`: fixed values, hard from the
first step on, one of them zero, gradients straight through. Its borders and its zero were changed
when the grid had been run with what is now the row of µ = 15: on the validation speakers, at 3 and
2 bits, the loss went from 0.327 and 0.322 to 0.303 and 0.328, words wrong from 23.2 and 27.7 % to
23.5 and 23.5 %.

Rows with a `training_commit` were trained at that one and scored again at their `commit`, when the
greedy search had been mended on the chip (its `torch.where` kept no grid); losses did not move.

`compression_three_starts.jsonl` has a part of the grid from three float models, with three times
the steps. Against the float models before training, means of three: GQ at 5, 4, 3 and 2 bits
+0.8 %, +0.6 %, +0.2 % and -1.9 % of the loss, S8BQAT at 5 bits +1.9 %, LSQ and straight-through
training at 2 bits +0.7 % and -2.1 %; a mixed allocation of 3.64 bits 17.0 % of words wrong, float
16.8 %. `compression_short.jsonl` has an earlier one at a learning rate of 1e-3.

![Loss by bits of a weight](compression.png)

| method | bits | seeds | WER | range | nats per label | against float | trained on | packed |
|---|---|---|---|---|---|---|---|---|"""

_EACH = """
*CPU* is the processor time of training and scoring, on one thread.

| method | bits | seed | WER | interval | nats per label | CPU |
|---|---|---|---|---|---|---|"""
