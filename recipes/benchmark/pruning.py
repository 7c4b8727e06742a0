"""Zero weights: every method from the same float weights, with the same budget.

    python -m recipes.benchmark.pruning --workers 2                 # run what is missing
    python -m recipes.benchmark.pruning --seeds 1 --sparsities 0.8  # a part of the grid
    python -m recipes.benchmark.pruning --corpora commands
    python -m recipes.benchmark.pruning --page-only

On AN4, with all methods, and on the synthetic commands, whose 10,350 test words tell small
differences apart. Start and budget are those of ``recipes.benchmark.compression`` and
``recipes.benchmark.low_bits``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_nna.checkpoints import load_checkpoint
from recipes.benchmark.grid import Study, axis, threads_option
from recipes.benchmark.plots import plot_losses
from recipes.benchmark.recipe_runs import (
    AN4_RNNT,
    COMMANDS_RNNT,
    SEEDS,
    Method,
    RecipeRun,
    compressed,
    evaluation,
    metrics_of,
    packed_errors,
    training,
    wer_difference,
)
from recipes.benchmark.report import (
    Fields,
    against,
    difference,
    hardest_rival,
    interval,
    line,
    loss_change,
    mean_loss,
    outcome,
    paired,
    percent,
    points,
    relative,
    wer_change,
    word_errors,
)
from recipes.benchmark.rows import Row, read_rows, select, spread

RUNS = Path("runs/pruning")
#: Float recognizers that the methods start from, by corpus.
CORPORA = {"an4": AN4_RNNT, "commands": COMMANDS_RNNT}
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
#: Methods that CSP is compared with, and its own other measurements.
BASELINES = ("gmp", "gmp_global", "gmp_global_100", "l1", "lth", "random", "model_pruning")
MEASUREMENTS = ("csp_identity", "csp_random")
#: Patterns of zeros, each with its baseline.
PATTERNS = (
    ("csp_2:4", "gmp_2:4"),
    ("csp_2:4_unfitted", "gmp_2:4"),
    ("csp_1x16", "gmp_1x16"),
)
#: From magnitude to CSP, one thing at a time: a method, and what it adds to the one above it.
LADDER = {
    "gmp_global": "magnitude, one budget",
    "csp_identity_plain": "CSP, identity: zeroed weights may return",
    "csp_random_plain": "random projections instead of the identity",
    "csp_plain": "input moments instead of projections",
    "csp_unfitted": "and gradients",
    "csp": "and the fit of the survivors: CSP of the recipes",
    "csp_identity": "aside: identity and gradients",
    "csp_random": "aside: random projections, gradients and fit",
}
#: Pairs of methods that differ in one thing, and what it is.
STEPS_OF_LADDER = (
    ("csp_identity_plain", "gmp_global", "Zeroed weights may return"),
    ("csp_random_plain", "csp_identity_plain", "Random projections instead of the identity"),
    ("csp_plain", "csp_random_plain", "Input moments instead of random projections"),
    ("csp_unfitted", "csp_plain", "Gradients"),
    ("csp", "csp_unfitted", "The fit of the survivors"),
    ("csp_identity", "gmp_global", "Identity with gradients instead of magnitude"),
    ("csp_random", "gmp_global", "Random projections with gradients and fit instead of magnitude"),
    ("csp", "csp_random", "Input moments instead of random projections, with gradients and fit"),
)
#: Rows of cycles by pattern.
NPU_ROWS = Path("docs/results/npu_patterns.jsonl")
#: Methods at a sparsity, with the pattern of zeros whose cycles are theirs.
FORMS = (
    ("nna8", 0.0, "dense"),
    ("gmp_global", 0.5, "unstructured 50 %"),
    ("csp", 0.5, "unstructured 50 %"),
    ("gmp_2:4", 0.5, "2:4"),
    ("csp_2:4", 0.5, "2:4"),
    ("csp_2:4_unfitted", 0.5, "2:4"),
    ("gmp_1x16", 0.5, "1x16 50 %"),
    ("csp_1x16", 0.5, "1x16 50 %"),
    ("gmp_global", 0.8, "unstructured 80 %"),
    ("csp", 0.8, "unstructured 80 %"),
    ("gmp_1x16", 0.8, "1x16 80 %"),
    ("csp_1x16", 0.8, "1x16 80 %"),
)
#: From this sparsity on CSP is to be clearly better, below it no worse.
CLEAR_FROM = 0.8
# A method that misses the fraction of zeros by more is no rival there.
_SHORTFALL = 0.02


@dataclass(frozen=True)
class SparsitiesMethod(Method):
    """A method of pruning.

    Attributes:
        sparsities: Fractions of zeros that it is run at.
    """

    sparsities: tuple[float, ...] = SPARSITIES


_PRUNE = "+callbacks.prune"
_BY_LAYER = "callbacks.prune.scope=layer"
# Every layer and every error counts the same, and the remaining weights stay what they are.
_PLAIN = (f"{_PRUNE}.weighting=equal", f"{_PRUNE}.refit=false")
# Fractions of zeros of the ladder.
_LADDER = (0.7, 0.8, 0.9)
METHODS: dict[str, SparsitiesMethod] = {
    "float": SparsitiesMethod("float", "none", sparsities=(0.0,)),
    "nna8": SparsitiesMethod("dense, emulated and trained", "nna8", sparsities=(0.0,)),
    "csp": SparsitiesMethod("CSP, activations", "csp"),
    "csp_identity": SparsitiesMethod("CSP, identity", "csp", (f"{_PRUNE}.measurement=identity",)),
    "csp_random": SparsitiesMethod(
        "CSP, random projections", "csp", (f"{_PRUNE}.measurement=random",)
    ),
    "csp_100": SparsitiesMethod(
        "CSP, activations, every 100 steps", "csp", (f"{_PRUNE}.every_n_steps=100",)
    ),
    "csp_identity_plain": SparsitiesMethod(
        "CSP, identity, no gradients", "csp", (f"{_PRUNE}.measurement=identity", *_PLAIN), _LADDER
    ),
    "csp_random_plain": SparsitiesMethod(
        "CSP, random projections, no gradients, survivors unchanged",
        "csp",
        (f"{_PRUNE}.measurement=random", *_PLAIN),
        _LADDER,
    ),
    "csp_plain": SparsitiesMethod(
        "CSP, activations, no gradients, survivors unchanged", "csp", _PLAIN, _LADDER
    ),
    "csp_unfitted": SparsitiesMethod(
        "CSP, activations, survivors unchanged", "csp", (f"{_PRUNE}.refit=false",), (0.5, *_LADDER)
    ),
    "csp_layer": SparsitiesMethod("CSP, same fraction in each layer", "csp", (_BY_LAYER,), (0.5,)),
    "csp_kept": SparsitiesMethod(
        "CSP, zeros stay zero", "csp", (f"{_PRUNE}.revives=false",), (0.5,)
    ),
    "gmp": SparsitiesMethod("gradual magnitude", "gmp"),
    "gmp_global": SparsitiesMethod(
        "gradual magnitude, global budget", "gmp", (f"{_PRUNE}.scope=global",)
    ),
    "gmp_global_100": SparsitiesMethod(
        "gradual magnitude, global budget, every 100 steps",
        "gmp",
        (f"{_PRUNE}.scope=global", f"{_PRUNE}.every_n_steps=100"),
        (0.5, 0.7, 0.8),
    ),
    "l1": SparsitiesMethod("L1, proximal", "l1"),
    "lth": SparsitiesMethod(
        "lottery ticket", "lottery", (f"{_PRUNE}.every_n_steps=120", f"{_PRUNE}.freeze_step=0.5")
    ),
    "random": SparsitiesMethod("random", "random_pruning", sparsities=(0.5, 0.8)),
    "model_pruning": SparsitiesMethod("Lightning's ModelPruning", "model_pruning"),
    "csp_2:4": SparsitiesMethod("CSP, 2:4", "csp", ("pattern='2:4'", _BY_LAYER), (0.5,)),
    "gmp_2:4": SparsitiesMethod("gradual magnitude, 2:4", "gmp", ("pattern='2:4'",), (0.5,)),
    "csp_2:4_unfitted": SparsitiesMethod(
        "CSP, 2:4, survivors unchanged",
        "csp",
        ("pattern='2:4'", _BY_LAYER, f"{_PRUNE}.refit=false"),
        (0.5,),
    ),
    "csp_1x16": SparsitiesMethod("CSP, blocks of 16", "csp", ("pattern=1x16",), (0.5, 0.8)),
    "gmp_1x16": SparsitiesMethod(
        "gradual magnitude, blocks of 16", "gmp", ("pattern=1x16",), (0.5, 0.8)
    ),
    "csp_5bits": SparsitiesMethod(
        "CSP and 5 bits (codebook)", "csp_codebook", ("bits=5",), (0.7, 0.8)
    ),
}
#: Methods on each corpus, with their fractions of zeros.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "an4": {name: method.sparsities for name, method in METHODS.items()},
    "commands": {
        "float": (0.0,),
        "nna8": (0.0,),
        **dict.fromkeys(LADDER, _LADDER),
        "gmp_global": (0.5, *_LADDER),
        "csp": (0.5, *_LADDER),
        "csp_100": _LADDER,
        "gmp_2:4": (0.5,),
        "csp_2:4": (0.5,),
        "csp_2:4_unfitted": (0.5,),
    },
}


@dataclass(frozen=True)
class PruningRun(RecipeRun):
    """One method at one sparsity.

    Attributes:
        corpus: A key of :data:`CORPORA`.
        method: A key of :data:`METHODS`.
        sparsity: Fraction of zeros.
        seed: Seed of the training.
    """

    corpus: str
    method: str
    sparsity: float
    seed: int

    @property
    def folder(self) -> Path:
        """Run folder."""
        name = self.method.replace(":", "of")
        # The study of deployment takes its networks from the folders of AN4.
        folder = RUNS if self.corpus == "an4" else RUNS / self.corpus
        return folder / f"{name}_{round(100 * self.sparsity)}" / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Module and overrides of the run."""
        method, start = METHODS[self.method], CORPORA[self.corpus]
        settings = [*compressed(method.compression), *method.settings]
        if self.method == "float":
            return evaluation(self.folder, *settings, start=start)
        if method.compression != "nna8":
            settings.append(f"sparsity={self.sparsity}")
        return training(self.seed, self.folder, *settings, start=start)

    def row(self, summary: Mapping[str, Any]) -> Row:
        """Make the row of a finished run from its summary and its checkpoint."""
        checkpoint = load_checkpoint(self.checkpoint) if self.checkpoint.exists() else {}
        counts = nonzero_counts(checkpoint) if checkpoint else {}
        bits = 5 if self.method == "csp_5bits" else 8
        return {
            "corpus": self.corpus,
            "model": CORPORA[self.corpus].model,
            "method": self.method,
            "sparsity": self.sparsity,
            "seed": self.seed,
            "bits": bits,
            "zeros": fraction_of_zeros(counts, checkpoint.get("state_dict", {})),
            **metrics_of(summary),
            "packed_bytes": packed_bytes(counts, bits=bits, parameters=summary["parameters"]),
            "utterance_errors": packed_errors(self.folder),
        }


def runs(
    *,
    corpora: Sequence[str] = tuple(CORPORA),
    methods: Sequence[str] = tuple(METHODS),
    sparsities: Sequence[float] = (),
    seeds: Sequence[int] = SEEDS,
    threads: int = 1,
) -> list[PruningRun]:
    """List the grid, or a part of it, seed by seed.

    Args:
        corpora: Keys of :data:`CORPORA`.
        methods: Keys of :data:`METHODS`; a corpus has those of :data:`GRIDS`.
        sparsities: Fractions of zeros; empty for all.
        seeds: Seeds of the training; the float weights are scored once.
        threads: Number of CPU threads of each run.
    """
    grid = [
        PruningRun(
            corpus, method, sparsity, SEEDS[0] if method == "float" else seed, threads=threads
        )
        for corpus, seed, method in itertools.product(corpora, seeds, methods)
        for sparsity in GRIDS[corpus].get(method, ())
        if not sparsities or sparsity in sparsities
    ]
    return list(dict.fromkeys(grid))


def nonzero_counts(checkpoint: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Count nonzero weights and all weights, by pruned tensor; empty where nothing is pruned.

    Args:
        checkpoint: Checkpoint of a run: masks are in the state of a callback; Lightning's own
            pruning leaves zeros in the weights.
    """
    masks = {
        name: saved["mask"]
        for state in checkpoint["callbacks"].values()
        if isinstance(state, Mapping) and "masks" in state
        for name, saved in state["masks"].items()
    }
    if not masks:
        nonzero = {name: x != 0 for name, x in checkpoint["state_dict"].items() if x.ndim > 1}
        masks = {name: mask for name, mask in nonzero.items() if not mask.all()}
    return {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}


def fraction_of_zeros(
    counts: Mapping[str, tuple[int, int]], state: Mapping[str, torch.Tensor]
) -> float:
    """Compute the fraction of zeros in all matrices of a network, pruned or not.

    Args:
        counts: Nonzero weights and all weights of each pruned tensor.
        state: State of the network.

    Example:
        >>> fraction_of_zeros({"a": (1, 4)}, {"a": torch.ones(1, 4), "b": torch.ones(2, 1)})
        0.5
    """
    matrices = sum(x.numel() for x in state.values() if x.ndim > 1)
    return sum(total - nonzero for nonzero, total in counts.values()) / max(matrices, 1)


def packed_bytes(counts: Mapping[str, tuple[int, int]], *, bits: int, parameters: int) -> int:
    """Compute the size of a network: a bitmap and the nonzero weights, or all weights if smaller.

    Args:
        counts: Nonzero weights and all weights of each pruned tensor.
        bits: Bits of a nonzero weight; below 8 with one byte a centroid.
        parameters: Number of the network's parameters; what is not pruned takes 8 bits.

    Example:
        >>> packed_bytes({"weight": (20, 100)}, bits=8, parameters=110)
        47
    """
    size = parameters - sum(total for _, total in counts.values())
    for nonzero, total in counts.values():
        masked = -(-total // 8) + -(-nonzero * bits // 8)
        size += min(masked, -(-total * bits // 8)) + (2**bits if bits < 8 else 0) + 4
    return size


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    an4, commands = (select(rows, corpus=corpus) for corpus in CORPORA)
    each = [
        row
        for corpus in (an4, commands)
        for method in METHODS
        for row in sorted(
            select(corpus, method=method), key=lambda row: (row["sparsity"], row["seed"])
        )
    ]
    return {
        "means": [
            mean_line(an4, method, sparsity)
            for method in METHODS
            for sparsity in _sparsities(an4, method)
        ],
        "checks": checks(an4),
        "ladder": ladder(an4),
        "steps": ladder_steps(an4),
        "forms": forms(an4, read_rows(NPU_ROWS)),
        "commands_means": [
            commands_line(commands, method, sparsity)
            for method in METHODS
            for sparsity in _sparsities(commands, method)
        ],
        "commands_ladder": ladder(commands),
        "commands_steps": commands_steps(commands),
        "runs": [run_line(row) for row in each],
    }


def ladder(rows: Sequence[Row]) -> list[str]:
    """Format a line of each rung of :data:`LADDER` that has rows."""
    lines = []
    for method, title in LADDER.items():
        cells = []
        for sparsity in _LADDER:
            if selected := select(rows, method=method, sparsity=sparsity):
                words, loss = word_errors(selected)[0], mean_loss(selected)
                cells.append(f"{words}, {loss:.3f} ({len(selected)})")
            else:
                cells.append("-")
        if set(cells) != {"-"}:
            lines.append(line(title, *cells))
    return lines


def ladder_steps(rows: Sequence[Row]) -> list[str]:
    """Compare the pairs of :data:`STEPS_OF_LADDER` on the seeds that both have."""
    lines = []
    for method, other, change in STEPS_OF_LADDER:
        for sparsity in _LADDER:
            selected, others = (select(rows, method=m, sparsity=sparsity) for m in (method, other))
            if pairs := paired(selected, others):
                words = wer_change(*difference(paired(selected, others, "wer")))
                loss = loss_change(*difference(pairs))
                lines.append(f"- {change}, {sparsity:.0%}: {words}; {loss}; {len(pairs)} seed(s).")
    return lines


def commands_steps(rows: Sequence[Row]) -> list[str]:
    """Compare the pairs of :data:`STEPS_OF_LADDER` on the commands, with bootstrap intervals."""
    lines = []
    for method, other, change in STEPS_OF_LADDER:
        cells = []
        for sparsity in _LADDER:
            selected, others = (select(rows, method=m, sparsity=sparsity) for m in (method, other))
            cells.append(points(wer_difference(selected, others)))
        if set(cells) != {"-"}:
            lines.append(line(change, *cells))
    return lines


def commands_line(rows: Sequence[Row], method: str, sparsity: float) -> str:
    """Format a line of means over the seeds, with differences to float and of CSP to the method.

    A pattern of zeros is compared with CSP of the same pattern.
    """
    selected = select(rows, method=method, sparsity=sparsity)
    own = "csp_2:4" if "2:4" in method else "csp"
    csp = select(rows, method=own, sparsity=sparsity) if method != own else []
    unpruned = select(rows, method="float") if method != "float" else []
    return line(
        METHODS[method].title,
        f"{sparsity:.0%}",
        len(selected),
        *word_errors(selected),
        f"{mean_loss(selected):.4f}",
        points(wer_difference(selected, unpruned)),
        points(wer_difference(csp, selected)),
    )


def forms(rows: Sequence[Row], npu_rows: Sequence[Row]) -> list[str]:
    """Format words and cycles of each form of zeros.

    Args:
        rows: Rows of this study.
        npu_rows: Rows of ``recipes.benchmark.npu_patterns``.
    """
    lines = []
    for method, sparsity, pattern in FORMS:
        selected = select(rows, method=method, sparsity=sparsity)
        if not selected:
            continue
        cycles = []
        for target in ("u85", "u55"):
            key = {"layer": "an4_rnnt", "target": target}
            found = select(npu_rows, **key, pattern=pattern)
            dense = select(npu_rows, **key, pattern="dense")
            ratio = f"{found[0]['cycles'] / dense[0]['cycles']:.2f}" if found and dense else "-"
            cycles.append(ratio)
        words, loss = word_errors(selected)[0], f"{mean_loss(selected):.3f}"
        lines.append(
            line(METHODS[method].title, f"{sparsity:.0%}", len(selected), words, loss, *cycles)
        )
    return lines


def checks(rows: Sequence[Row]) -> list[str]:
    """Run every acceptance check on the seeds that have rows."""
    lines = []
    for sparsity in _sparsities(rows, "csp"):
        csp = select(rows, method="csp", sparsity=sparsity)
        lines += _check_baselines(rows, csp, sparsity)
        for method in MEASUREMENTS:
            others = select(rows, method=method, sparsity=sparsity)
            title = METHODS[method].title
            claim = f"Measured by activations, CSP is no worse than {title} at {sparsity:.0%}"
            lines += _check_loss(claim, csp, others)
    for method, rival in PATTERNS:
        for sparsity in _sparsities(rows, method):
            claim = f"{METHODS[method].title}, no worse than {METHODS[rival].title}"
            selected, others = (select(rows, method=m, sparsity=sparsity) for m in (method, rival))
            lines += _check_loss(f"{claim} at {sparsity:.0%}", selected, others)
    for method in ("float", "nna8"):
        csp, others = select(rows, method="csp", sparsity=0.7), select(rows, method=method)
        if pairs := paired(csp, others):
            lines.append(
                f"- 70 % of zeros without loss of accuracy against {METHODS[method].title}: "
                f"{relative(pairs):+.1%} of the loss over {len(pairs)} seed(s), "
                f"{outcome(*difference(pairs))}; {_words(csp, others)}."
            )
    return lines


def _check_baselines(rows: Sequence[Row], csp: Sequence[Row], sparsity: float) -> list[str]:
    candidates = {method: _as_sparse(rows, method, sparsity) for method in BASELINES}
    others = {method: selected for method, selected in candidates.items() if paired(csp, selected)}
    if not others:
        return []
    # The baseline that is hardest to beat in loss need not be so in words.
    in_loss, in_words = (
        hardest_rival({m: paired(csp, selected, metric) for m, selected in others.items()})
        for metric in ("loss_per_token", "wer")
    )
    is_clear = sparsity >= CLEAR_FROM
    word = "clearly better than" if is_clear else "no worse than"
    return _check_loss(
        f"CSP {word} every baseline at {sparsity:.0%}",
        csp,
        others[in_loss],
        rival=f" against the best of them ({METHODS[in_loss].title})",
        words=_words(csp, others[in_words], f" against the best ({METHODS[in_words].title})"),
        is_clear=is_clear,
    )


def _check_loss(
    claim: str,
    rows: Sequence[Row],
    others: Sequence[Row],
    *,
    rival: str = "",
    words: str = "",
    is_clear: bool = False,
) -> list[str]:
    """Check that a loss is no greater than another's, or clearly less: by more than its error.

    What is said of words is of the same rows unless ``words`` says something else.
    """
    if not (pairs := paired(rows, others)):
        return []
    change, error = difference(pairs)
    bound = -error if is_clear else 0.0
    return [
        f"- {claim}: {loss_change(change, error)}{rival} over {len(pairs)} seed(s), "
        f"{outcome(change - bound, error - bound)}; {words or _words(rows, others)}."
    ]


def _words(rows: Sequence[Row], others: Sequence[Row], rival: str = "") -> str:
    change, error = difference(paired(rows, others, "wer"))
    return f"{wer_change(change, error)}{rival}, {outcome(change, error)}"


def mean_line(rows: Sequence[Row], method: str, sparsity: float) -> str:
    """Format a line of means over the seeds."""
    selected = select(rows, method=method, sparsity=sparsity)
    return line(
        METHODS[method].title,
        f"{sparsity:.0%}",
        f"{spread(row['zeros'] for row in selected)[0]:.1%}",
        len(selected),
        *word_errors(selected),
        f"{mean_loss(selected):.4f}",
        against(selected, select(rows, method="float")),
        f"{spread(row['packed_bytes'] for row in selected)[0] / 1e6:.3f} MB",
    )


def run_line(row: Row) -> str:
    """Format the line of one run."""
    return line(
        CORPORA[row["corpus"]].title,
        METHODS[row["method"]].title,
        f"{row['sparsity']:.0%}",
        row["seed"],
        percent(row["wer"]),
        interval(row),
        f"{row['loss_per_token']:.4f}",
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the loss on AN4 over the fraction of zeros."""
    rows = select(rows, corpus="an4")
    plot_losses(
        path,
        curves={
            METHODS[method].title: [(round(100 * row["zeros"]), row) for row in selected]
            for method in ("csp", *MEASUREMENTS, *BASELINES)
            if (selected := select(rows, method=method))
        },
        baselines={
            METHODS[method].title: selected
            for method in ("float", "nna8")
            if (selected := select(rows, method=method))
        },
        label="zero weights in per cent",
        ticks=(50, 70, 80, 90, 95),
    )


def _sparsities(rows: Sequence[Row], method: str) -> list[float]:
    return sorted({row["sparsity"] for row in select(rows, method=method)})


def _as_sparse(rows: Sequence[Row], method: str, sparsity: float) -> list[Row]:
    """Select the rows that reached the fraction of zeros."""
    selected = select(rows, method=method, sparsity=sparsity)
    return [row for row in selected if row["zeros"] > sparsity - _SHORTFALL]


STUDY = Study(
    name="pruning",
    runs=runs,
    report=report,
    plot=plot,
    options={
        "corpora": axis(CORPORA),
        "methods": axis(METHODS),
        "sparsities": {"nargs": "*", "type": float, "default": [], "help": "all if left out"},
        "seeds": axis(SEEDS, is_open=True),
        "threads": threads_option(),
    },
    workers=1,
)

if __name__ == "__main__":
    STUDY.main()
