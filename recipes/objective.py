"""What a sweep makes small: metrics of the summary of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.nearest import did_you_mean

#: Metrics of every run that a sweep can make small; those of its test come with the module.
OF_TRAINING = (
    *("parameters", "size_bytes", "epochs", "train_seconds", "bits", "sparsity", "packed_bytes"),
)
#: Metrics of its programs on an Ethos-U, by Vela: the run is deployed for them when it ends.
OF_DEPLOYMENT = ("cycles", "inference_ms", "encoded_bytes", "memory_bytes", "sram_bytes")


def check_objective(names: Sequence[str], of_testing: Sequence[str]) -> None:
    """Raise unless every name is a metric of a summary.

    Args:
        names: Names of metrics.
        of_testing: Metrics of a test; none if only a test tells.

    Raises:
        ValueError: If there is no such metric, or no name; lists the metrics.
    """
    known = (*of_testing, *OF_TRAINING, *OF_DEPLOYMENT)
    for name in names:
        if name not in known and of_testing:
            hint = did_you_mean(name, known)
            raise ValueError(
                f"objective={name} is no metric of a run{hint or ';'} there are {', '.join(known)}"
            )
    if isinstance(names, str) or not names:
        raise ValueError(f"objective is a list of metrics, as [wer]; got {names!r}")


def objective_of(
    summary: Mapping[str, Any], names: Sequence[str]
) -> float | tuple[float, ...] | None:
    """Return the metrics that a sweep makes small.

    Args:
        summary: Summary of a run.
        names: Names of metrics.

    Returns:
        A number for one name, a tuple for several; None if the run was not tested and has not all.

    Example:
        >>> summary = {"wer": 0.1, "packed_bytes": 4096}
        >>> objective_of(summary, ["wer"]), objective_of(summary, ["wer", "packed_bytes"])
        (0.1, (0.1, 4096.0))
    """
    if not all(name in summary for name in names):
        return None
    values = tuple(float(summary[name]) for name in names)
    return values if len(values) > 1 else values[0]
