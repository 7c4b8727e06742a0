"""Reports: Markdown templates, lines of tables, statistics by seed, acceptance checks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from string import Template

from recipes.asr.scoring import RateDifference
from recipes.benchmark.rows import Row, spread

TEMPLATES = Path(__file__).parent / "templates"
#: Values of a template's fields: words and numbers of a sentence, or lines of a table or list.
Fields = Mapping[str, str | int | float | Sequence[str]]
#: A metric of two methods, seed by seed.
Pairs = Sequence[tuple[float, float]]


def render(name: str, fields: Fields) -> str:
    """Fill ``templates/<name>.md``.

    A section, from one ``##`` to the next, whose tables and lists are all empty is left out.

    Args:
        name: Stem of the template.
        fields: Value of each ``$field``; lists are joined as lines.
    """
    text = (TEMPLATES / f"{name}.md").read_text(encoding="utf-8")
    first, *sections = re.split(r"(?m)^(?=## )", text)
    lists = {key for key, value in fields.items() if isinstance(value, list)}
    values = {key: "\n".join(v) if isinstance(v, list) else v for key, v in fields.items()}
    shown = [first]
    for section in sections:
        names = lists.intersection(Template(section).get_identifiers())
        if not names or any(values[each] for each in names):
            shown.append(section)
    return "".join(Template(section).substitute(values) for section in shown)


def line(*columns: object) -> str:
    """Join the columns of a table's line.

    Example:
        >>> line("GQ", 5, "16.4 %")
        '| GQ | 5 | 16.4 % |'
    """
    return f"| {' | '.join(str(column) for column in columns)} |"


def ruled(columns: Sequence[str]) -> list[str]:
    """Head a table: its column titles and the rule below them.

    Example:
        >>> ruled(["method", "bits"])
        ['| method | bits |', '|---|---|']
    """
    return [line(*columns), f"|{'---|' * len(columns)}"]


def percent(fraction: float) -> str:
    """Format a fraction in percent.

    Example:
        >>> percent(0.1234)
        '12.3 %'
    """
    return f"{100 * fraction:.1f} %"


def median_range(values: Sequence[float]) -> str:
    """Format the median of ratios, and their range.

    Example:
        >>> median_range([1.0, 1.5])
        '1.25 (1.00-1.50)'
    """
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def word_errors(rows: Sequence[Row]) -> tuple[str, str]:
    """Format the mean word error rate over seeds, and its range."""
    mean, low, high = spread(row["wer"] for row in rows)
    return percent(mean), f"{percent(low)} to {percent(high)}"


def interval(row: Row) -> str:
    """Format the 95 % bootstrap interval of a run's word error rate."""
    return f"{percent(row['wer_low'])} to {percent(row['wer_high'])}"


def mean_loss(rows: Sequence[Row]) -> float:
    """Average the loss per token.

    Example:
        >>> mean_loss([{"loss_per_token": 1.0}, {"loss_per_token": 3.0}])
        2.0
    """
    return spread(row["loss_per_token"] for row in rows)[0]


def paired(
    rows: Sequence[Row], references: Sequence[Row], metric: str = "loss_per_token"
) -> list[tuple[float, float]]:
    """Pair a metric of two methods by seed; an untrained reference is compared with every seed.

    Example:
        >>> paired([{"seed": 1, "loss_per_token": 2.0}, {"seed": 2, "loss_per_token": 3.0}],
        ...     [{"seed": 1, "loss_per_token": 4.0, "train_seconds": 60.0}])
        [(2.0, 4.0)]
    """
    untrained = next((row for row in references if row["train_seconds"] is None), None)
    by_seed = {row["seed"]: row for row in references}
    pairs = [(row, by_seed.get(row["seed"], untrained)) for row in rows]
    return [(row[metric], other[metric]) for row, other in pairs if other is not None]


def difference(pairs: Pairs) -> tuple[float, float]:
    """Average the differences by seed; the second value is the standard error, 0 for one seed.

    Example:
        >>> difference([(1.0, 2.0), (2.0, 1.0)])
        (0.0, 1.0)
    """
    differences = [value - reference for value, reference in pairs]
    error = stdev(differences) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
    return fmean(differences), error


def relative(pairs: Pairs) -> float:
    """Compute the relative difference of two means.

    Example:
        >>> relative([(1.0, 2.0), (2.0, 2.0)])
        -0.25
    """
    return sum(value for value, _ in pairs) / sum(reference for _, reference in pairs) - 1


def against(rows: Sequence[Row], references: Sequence[Row]) -> str:
    """Format the relative difference of the losses, or a dash where there is none."""
    if rows == references or not (pairs := paired(rows, references)):
        return "-"
    return f"{relative(pairs):+.1%}"


def hardest_rival(others: Mapping[str, Pairs]) -> str:
    """Name the method that is hardest to beat, of those with the most seeds."""
    seeds = max(len(pairs) for pairs in others.values())
    complete = [method for method, pairs in others.items() if len(pairs) == seeds]
    return max(complete, key=lambda method: difference(others[method])[0])


def outcome(increase: float, error: float = 0.0) -> str:
    """Name the outcome of an acceptance check on an increase that should not be one.

    Example:
        >>> outcome(-1.0), outcome(0.5, error=0.6), outcome(0.5)
        ('met', 'tied', 'missed')
    """
    return "met" if increase <= 0 else "tied" if increase <= error else "missed"


def points(change: RateDifference | None) -> str:
    """Format a difference of error rates in points, with its interval and whether it is tied.

    Example:
        >>> points(RateDifference(-0.012, -0.02, -0.004))
        '-1.2 (-2.0 to -0.4)'
        >>> points(RateDifference(0.001, -0.02, 0.004)), points(None)
        ('+0.1 (-2.0 to +0.4, tied)', '-')
    """
    if change is None:
        return "-"
    mean, low, high = (f"{100 * each:+.1f}" for each in change)
    return f"{mean} ({low} to {high}{', tied' if change.is_tied else ''})"


def met(is_met: bool) -> str:
    """Name the outcome of an acceptance check.

    Example:
        >>> met(True)
        'met'
    """
    return "met" if is_met else "missed"


def loss_change(change: float, error: float) -> str:
    """Format a difference in the loss per token.

    Example:
        >>> loss_change(0.0023, 0.0043)
        'loss per token +0.0023 ± 0.0043 nats'
    """
    return f"loss per token {change:+.4f} ± {error:.4f} nats"


def wer_change(change: float, error: float) -> str:
    """Format a difference in the word error rate.

    Example:
        >>> wer_change(0.006, 0.005)
        '+0.6 ± 0.5 points of WER'
    """
    return f"{100 * change:+.1f} ± {100 * error:.1f} points of WER"
