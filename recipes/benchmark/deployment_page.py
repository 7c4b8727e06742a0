"""The page of ``recipes.benchmark.deployment``: tables and verdicts, from its rows."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.benchmark.an4 import percent
from recipes.benchmark.compression import HIGHER_RATE_BITS, RATE_BITS
from recipes.benchmark.fine_tuning_page import commands
from recipes.benchmark.rows import Row, select

TITLES = {
    "nna8": "8 bits, chip-aware",
    "gq": "General Quantizer",
    "gq_rate": f"GQ, entropy of at most {RATE_BITS} bits",
    "gq_higher_rate": f"GQ, entropy of at most {HIGHER_RATE_BITS} bits",
    "csp": "CSP",
    "csp_gq": "CSP and General Quantizer",
}
#: What the General Quantizer's paper saved of memory and of latency against 8 bits.
MEMORY_SAVED, TIME_SAVED = 0.31, 0.3175
#: Units of the encoder by model.
SIZES = {"rnnt_small": 256, "rnnt": 320, "rnnt_large": 400}
#: A larger network of few bits, and the smaller one of 8 that it is to beat.
PAIRS = (("rnnt_large", "rnnt"), ("rnnt", "rnnt_small"))
_TARGET_SYSTEM = "Ethos_U55_High_End_Embedded"


def page(rows: Sequence[Row], *, float_wer: float | None = None) -> str:
    """The page as Markdown.

    Args:
        rows: Of networks of all sizes.
        float_wer: Of the float weights of the model ``rnnt``, greedily.
    """
    usual = select(rows, model="rnnt")
    lines = [_HEAD, *_accuracy(usual), "", *verdicts(rows)]
    for bound, title in _BOUNDS.items():
        here = [row for row in usual if row["bound"]["encoder"] == bound]
        if here:
            lines += ["", f"## {title}", _SYSTEMS, *(_system_line(usual, row) for row in here)]
    lines += _larger(rows, float_wer)
    first = {row["command"]: row for row in rows}
    return "\n".join([*lines, *commands(list(first.values()))])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Each target, and whether it is met."""
    lines = []
    outputs = [row["equal_outputs"] for row in rows]
    if outputs:
        same = min(row["equal_transcripts"] for row in rows)
        lines.append(
            f"- Every output of the programs equal to the emulation's in every bit: the least "
            f"share is {min(outputs):.6%}, of transcripts {same:.2%}."
        )
    for base in select(rows, model="rnnt", method="nna8", system=_TARGET_SYSTEM):
        lines += _saving(rows, base)
    lines += [
        _faster_and_better(row, base)
        for row, base in _pairs(rows)
        if row["system"] == _TARGET_SYSTEM
    ]
    return lines


def _saving(rows: Sequence[Row], base: Row) -> list[str]:
    """What the best network of 5 bits and no zeros saves against that of 8."""
    few = select(rows, model="rnnt", bits=5, sparsity=0.0, seed=base["seed"], system=_TARGET_SYSTEM)
    if not few:
        return []
    # Without loss of WER first; of those, what saves most of the scarcer of the two.
    best = max(few, key=lambda row: (row["wer"] <= base["wer"], _least_margin(row, base)))
    memory, time = (_saved(best, base, name) for name in ("memory_bytes", "inference_ms"))
    is_met = best["wer"] <= base["wer"] and _least_margin(best, base) >= 0
    return [
        f"- At least {MEMORY_SAVED:.0%} of memory and {TIME_SAVED:.2%} of time saved at 5 bits on "
        f"{_TARGET_SYSTEM} without loss of WER, seed {base['seed']}, by the best row, "
        f"*{TITLES[best['method']]}*: {memory:.1%} and {time:.1%}, WER {percent(best['wer'])} "
        f"against {percent(base['wer'])}, {'met' if is_met else 'missed'}."
    ]


def _least_margin(row: Row, base: Row) -> float:
    """By how much the target is passed, of memory or of time: the lesser."""
    memory, time = (_saved(row, base, name) for name in ("memory_bytes", "inference_ms"))
    return min(memory - MEMORY_SAVED, time - TIME_SAVED)


def _faster_and_better(row: Row, base: Row) -> str:
    """Whether a larger network of few bits is no slower than a smaller one of 8, and better."""
    is_met = row["inference_ms"] <= base["inference_ms"] and row["wer"] < base["wer"]
    return (
        f"- A network of {SIZES[row['model']]} units at {row['bits']} bits at least as fast as one "
        f"of {SIZES[base['model']]} at 8 on {_TARGET_SYSTEM}, and better in WER, seed "
        f"{row['seed']}: {row['inference_ms']:.2f} against {base['inference_ms']:.2f} ms for a "
        f"second of speech, WER {percent(row['wer'])} against {percent(base['wer'])}, "
        f"{'met' if is_met else 'missed'}."
    )


def _pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Larger networks of 5 bits, each with the smaller one of 8 on the same system."""
    return [
        (row, base)
        for larger, smaller in PAIRS
        for row in select(rows, model=larger, method="gq_rate", sparsity=0.0)
        if (base := _base(rows, row, model=smaller)) is not None
    ]


def _larger(rows: Sequence[Row], float_wer: float | None) -> list[str]:
    """The table of larger networks of few bits beside smaller ones of 8."""
    lines = [
        _pair_line(each, float_wer if each["model"] == "rnnt" else each.get("wer_start"))
        for pair in _pairs(rows)
        for each in reversed(pair)
    ]
    return [_LARGER, *lines] if lines else []


def _pair_line(row: Row, float_wer: float | None) -> str:
    return (
        f"| {row['system']} | {SIZES[row['model']]} | {TITLES[row['method']]} | "
        f"{row['bits']} | {row['seed']} | "
        f"{'-' if float_wer is None else percent(float_wer)} | {percent(row['wer'])} | "
        f"{row['loss_per_token']:.4f} | {row['tflite_bytes'] / 1e6:.3f} MB | "
        f"{row['encoded_bytes'] / 1024:.0f} | {row['memory_bytes'] / 1024:.0f} | "
        f"{row['inference_ms']:.2f} |"
    )


def _accuracy(rows: Sequence[Row]) -> list[str]:
    seen: dict[tuple[object, ...], Row] = {}
    for row in rows:
        seen.setdefault((row["method"], row["bits"], row["sparsity"], row["seed"]), row)
    return [
        f"| {TITLES[row['method']]} | {row['bits']} | {row['sparsity']:.0%} | {row['seed']} | "
        f"{'-' if row['wer_float'] is None else percent(row['wer_float'])} | "
        f"{percent(row['wer_emulated'])} | {percent(row['wer'])} | {row['loss_per_token']:.4f} | "
        f"{row['equal_outputs']:.4%} of {row['outputs']} | "
        f"{round(row['equal_transcripts'] * row['utterances'])} of {row['utterances']} | "
        f"{row['tflite_bytes'] / 1e6:.3f} MB | {row['real_time_factor']:.3f} |"
        for row in seen.values()
    ]


def _system_line(rows: Sequence[Row], row: Row) -> str:
    base = _base(rows, row)
    saved = ["-", "-"]
    if base is not None and row["method"] != "nna8":
        saved = [f"{_saved(row, base, name):.1%}" for name in ("memory_bytes", "inference_ms")]
    return (
        f"| {TITLES[row['method']]} | {row['bits']} | {row['sparsity']:.0%} | "
        f"{row['accelerator']} | {row['system']} | {row['encoded_bytes'] / 1024:.0f} | "
        f"{row['memory_bytes'] / 1024:.0f} | {saved[0]} | {row['part_ms']['encoder']:.3f} | "
        f"{row['inference_ms']:.2f} | {saved[1]} | {', '.join(row['cpu_operators']) or 'none'} |"
    )


def _base(rows: Sequence[Row], row: Row, *, model: str = "rnnt") -> Row | None:
    """A network at 8 bits on the same system."""
    same = {name: row[name] for name in ("seed", "accelerator", "system", "memory_mode")}
    found = select(rows, model=model, method="nna8", **same)
    return found[0] if found else None


def _saved(row: Row, base: Row, name: str) -> float:
    return 1.0 - float(row[name]) / float(base[name])


_BOUNDS = {
    "bandwidth": "Where reading the weights takes the time",
    "computation": "Where computing takes the time",
}
_HEAD = """# Deployment on AN4

Generated by `python -m recipes.benchmark.deployment` from `deployment.jsonl`.

The RNN-T of [AN4](an4.md) as three programs (one step of the encoder, one label of the predictor,
one score of the joint network), decoded on LiteRT's reference kernels. *Equal* compares every
encoding, prediction and logit of the test set with the emulation's, bit by bit. *Float* is the same
checkpoint in float arithmetic. The real-time factor is that of LiteRT's fast kernels, greedily, on
the CPU that ran the grid, beside whatever else ran there. Sizes and times hardly depend on the
seed; word error rates do, and those of more seeds are in [Weights of few bits](compression.md) and
[Pruning](pruning.md).
Over three seeds 5 bits with 4.25 bits of entropy cost 0.6 ± 0.5 points of WER against 8 bits: what
is saved is saved there, but *without loss of WER* is missed.

| method | bits | zeros | seed | float | emulated | deployed | nats per label | outputs equal |"""
_HEAD += """ transcripts equal | .tflite | real-time factor |
|---|---|---|---|---|---|---|---|---|---|---|---|"""

_LARGER = """
## A larger network of 5 bits beside a smaller one of 8

*Units* are those of each of the encoder's layers. *Float* are the weights that training on the chip
started from, in float; all is decoded greedily. With one seed a point of WER is within a run's
interval. In loss 400 units are behind 320, which is all that AN4's 948 utterances teach; 256 are
behind both.

| system | units | method | bits | seed | float | deployed | nats per label | .tflite |"""
_LARGER += """ weights KiB | memory KiB | ms/s |
|---|---|---|---|---|---|---|---|---|---|---|---|"""

_SYSTEMS = """
Vela's estimates. Memory is that of all three programs, weights included; *ms* is a step of the
encoder (60 ms of speech), *ms/s* all programs for a second of speech, as often as the greedy search
runs them. Vela has no time for what stays on the CPU.

| method | bits | zeros | accelerator | system | weights KiB | memory KiB | saved | ms | ms/s |"""
_SYSTEMS += """ saved | on the CPU |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
